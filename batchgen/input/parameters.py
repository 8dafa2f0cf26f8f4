"""Parameters that a row gives for itself; they win over those of the job.

They are columns with the names of SamplingParams, or members of an object such as `sampling_params`, which may also
have the names of vLLM, Text Generation Inference and Transformers. Whatever else such an object asks for is an error.

Other columns belong to the user, with one exception: a name that can only be a misspelled parameter is an error.
Otherwise a row with `max_token` would silently get the default, and nobody would notice for a million rows.
"""

import ast
import io
import itertools
import json
import re
import tokenize
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from difflib import get_close_matches
from functools import lru_cache

from batchgen.errors import UsageError
from batchgen.files import parse_json, unique_keys
from batchgen.options import find_escape, say, shown
from batchgen.types import MAX_PATTERN_BYTES, PATTERN_NAMES, RowParameters, SamplingParams

PARAMETERS = frozenset(field.name for field in fields(SamplingParams))

# names that other libraries use
_ELSEWHERE = {
    "max_tokens": (
        *("max_new_tokens", "max_completion_tokens", "max_output_tokens", "max_tokens_to_sample"),
        *("max_gen_toks", "max_gen_len", "num_predict", "n_predict"),
    ),
    "min_tokens": ("min_new_tokens",),
    "n": ("num_return_sequences",),
    "stop": ("stop_strings", "stop_sequences", "stop_words"),
    "include_stop": ("include_stop_str_in_output",),
    "bad_words": ("bad_words_ids",),
    "repetition_penalty": ("repeat_penalty",),
    "echo": ("return_full_text",),
    "heal": ("token_healing",),
    "choices": ("guided_choice",),
    "regex": ("guided_regex",),
    "json_schema": ("guided_json",),
    "grammar": ("guided_grammar",),
}
ALIASES = {theirs: ours for ours, names in _ELSEWHERE.items() for theirs in names}
# what other libraries have and SamplingParams has not, with the values that ask for nothing; null is always one
NEUTRAL: dict[str, tuple[object, ...]] = {
    "best_of": (1,),  # or n
    "do_sample": (),  # as temperature says
    "spaces_between_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "num_beam_groups": (1,),
    **dict.fromkeys(("diversity_penalty", "penalty_alpha", "epsilon_cutoff", "eta_cutoff"), (0,)),
    "logits_processors": ([],),
    "dry_penalty_last_n": (-1,),  # llama.cpp's word for the whole context
}
# more of them, whose names a user's own column may have
NEUTRAL_MEMBERS: dict[str, tuple[object, ...]] = {
    "suffix": ("",),
    "use_cache": (True, False),
    **dict.fromkeys(("add_special_tokens", "detokenize"), (True,)),
    **dict.fromkeys(("stream", "store", "details", "decoder_input_details", "watermark"), (False,)),
    **dict.fromkeys(("return_token_ids", "return_tokens_as_token_ids"), (False,)),
    **dict.fromkeys(("priority", "top_n_tokens", "top_logprobs", "output_kind"), (0,)),
    **dict.fromkeys(("extra_args", "extra_body", "stream_options"), ({},)),
}
# objects that have a pattern: OpenAI's, and vLLM's by their members
RESPONSE_FORMAT = "response_format"
_STRUCTURED = {"choice": "choices", "regex": "regex", "json": "json_schema", "grammar": "grammar"}
_SHAPED = frozenset((RESPONSE_FORMAT, "structured_outputs", "guided_decoding"))
# columns whose values are objects of parameters, in any style; of the others, if they have the name of a parameter
_SURE_OBJECT = re.compile(
    r"(?:sampling|sampler|generation|generate|gen|textgeneration|decoding|decode|inference)"
    r"(?:params|parameters|options|config|kwargs|args|settings)"
)
_MAYBE_OBJECT = re.compile(r"(?:model|request|completion|llm)?(?:params|parameters|options)|modelkwargs|extrabody")
# an output of batchgen has all of these; what it says of seed and the like is no wish but a result
_OUTPUT = frozenset(("row", "sample", "completion", "finish_reason", "status", "parameters"))
_RESULTS = ("seed", "logprobs", "prompt_logprobs", "parameters")
_SIMILAR = 0.9  # accepts `max_token` and `temprature`, but not `n_tokens`
_SHORTEST = 7  # shorter names may differ only in case and separators: `speed` is not a misspelled `seed`


def _without_style(name: str) -> str:
    """maxTokens, max-tokens -> maxtokens"""
    return name.casefold().replace("_", "").replace("-", "").replace(" ", "")


_PLAIN = {_without_style(name): name for name in sorted(PARAMETERS)}
_PLAIN |= {_without_style(name): parameter for name, parameter in ALIASES.items()}
_LONG = [name for name in sorted(PARAMETERS) if len(name) > _SHORTEST]


def find_misspelled(name: str) -> str | None:
    """The parameter that `maxTokens`, `top-k` or `temprature` must mean; None for any other name."""
    return _find_similar(name) if 4 <= len(name) <= 64 and name not in PARAMETERS else None  # `N` is the user's own


@lru_cache(maxsize=4096)
def _find_similar(name: str) -> str | None:
    if parameter := _PLAIN.get(_without_style(name)):
        return parameter
    if len(name) < _SHORTEST:
        return None
    return next(iter(get_close_matches(name.casefold(), _LONG, n=1, cutoff=_SIMILAR)), None)


def find_results(names: Iterable[str]) -> tuple[str, ...]:
    """The columns that are results and no parameters, if these columns are those of an output of batchgen."""
    present = set(names)
    return tuple(name for name in _RESULTS if name in present) if present >= _OUTPUT else ()


# The output has their columns, or lacks them, before the first row is read: so the scan looks for their names, and for
# that of echo, which beside logprobs in OpenAI's lines asks for both.
LOGPROBS = ("logprobs", "prompt_logprobs")
WITH_COLUMNS = (*LOGPROBS, "num_beams")
ASKING = frozenset((*WITH_COLUMNS, "echo"))
_SOUGHT = {name.encode(): name for name in ASKING} | {b"return_full_text": "echo"}
_ESCAPED = re.compile(rb"\\+(?:u00|x)(5[fF]|[67][0-9a-fA-F])")  # a letter in JSON or a dict of Python: log\u0070robs
_KEY = re.compile(rb"[\"'](" + b"|".join(_SOUGHT) + rb")\\*[\"']\s*:")
_ANYWHERE = re.compile(b"|".join(_SOUGHT))
_OUTPUT_KEYS = [f'"{name}"'.encode() for name in sorted(_OUTPUT)]


def _unescape_letters(data: bytes) -> bytes:
    return _ESCAPED.sub(lambda found: bytes.fromhex(found[1].decode()), data) if b"\\" in data else data


def mentioned(data: bytes) -> frozenset[str]:
    """The names of ASKING that JSON text, or many texts, may have."""
    return frozenset(_SOUGHT[name] for name in _ANYWHERE.findall(_unescape_letters(data)))


def asked_in(line: bytes) -> frozenset[str]:
    """The names of ASKING that a line of JSON may have as a parameter, at any depth; not those that are results."""
    text = _unescape_letters(line)
    if not _ANYWHERE.search(text):
        return frozenset()
    found = _keys(text)
    if not found or not all(key in text for key in _OUTPUT_KEYS):
        return found
    with suppress(ValueError, RecursionError, AttributeError):  # such a line is rejected
        fields = json.loads(line)
        results = find_results(fields.keys())
        return _keys(json.dumps({name: value for name, value in fields.items() if name not in results}).encode())
    return frozenset()


def is_asked(name: str, params: SamplingParams) -> bool:
    """Whether parameters ask for what a name of ASKING stands for."""
    value = getattr(params, name)
    return value is not None and value is not False and (name != "num_beams" or value > 1)


def _keys(text: bytes) -> frozenset[str]:
    return frozenset(_SOUGHT[name] for name in _KEY.findall(text))


def parameter_names(names: Iterable[str], not_parameters: Iterable[str] = ()) -> tuple[str, ...]:
    """The columns that are parameters, or may be objects of them; UsageError for one that is misspelled."""
    return _parameter_names(tuple(names), tuple(not_parameters))


@lru_cache(maxsize=16)  # the rows of an input have few sets of names, and a name may be long
def _parameter_names(names: tuple[str, ...], not_parameters: tuple[str, ...]) -> tuple[str, ...]:
    found = []
    results = find_results(names)
    for name in names:
        if name in not_parameters or name in results:
            continue
        if name in PARAMETERS or name in NEUTRAL or name in _SHAPED or is_object(name):
            found.append(name)
        elif near := find_misspelled(name):
            raise UsageError(f"{name!r} is not a parameter; did you mean {near!r}? rename it")
    return tuple(found)


# ---- from the values of a row to SamplingParams


def is_object(name: str) -> bool:
    """Whether a column of this name may hold an object of parameters: `sampling_params`, `samplingParams`."""
    return len(name) <= 64 and _is_plain_object(name)


@lru_cache(maxsize=4096)
def _is_plain_object(name: str) -> bool:
    return _is_sure(name) or _MAYBE_OBJECT.fullmatch(_without_style(name)) is not None


def _is_sure(name: str) -> bool:
    """Whether all that a column of this name asks for is a parameter, known here or not."""
    return _SURE_OBJECT.fullmatch(_without_style(name)) is not None


MAX_TEXT = 2**16  # characters of an object that is written as text
_MENTION = re.compile(r"\b(\w{1,64})\b[\\\"']*\s*[:=]")
_SYNTAX = re.compile(r"[\[({=:]|\s-?\d")  # of what may be parameters


def _is_known(name: object) -> bool:
    if not isinstance(name, str):
        return False
    known = name in PARAMETERS or name in ALIASES or name in NEUTRAL or name in _SHAPED or is_object(name)
    return known or find_misspelled(name) is not None


def _is_mentioned(column: str, name: str) -> bool:
    """Whether `name:` or `name=` in a text means a parameter; `n = 3` may be one of a question's options."""
    return _is_known(name) and (len(name) > 4 or column != "options")


def _read_object(column: str, value: object) -> Mapping[object, object]:
    """The parameters in a column that may hold them: an object, its text in JSON or Python, a map (of pairs).

    Empty if it holds something else; UsageError if that asks for something.
    """
    found, is_sure = value, _is_sure(column)
    if isinstance(value, str):
        found = _parse_object(value[:MAX_TEXT])
    elif isinstance(value, list) and value and all(_is_pair(pair) and isinstance(pair[0], str) for pair in value):
        found = dict(value)
    if isinstance(found, Mapping):
        return found if is_sure or any(map(_is_known, found)) else {}
    text = value if isinstance(value, str) else "" if isinstance(value, bool) or not value else repr(value)
    asks = is_sure and (text != value or _SYNTAX.search(text))  # a single word is a name that the user gave them
    if text and (asks or any(_is_mentioned(column, match[1]) for match in _MENTION.finditer(text))):
        remedy = f'write {{"max_tokens": 8}} or pass {say("row_params", False)}'
        raise UsageError(f"{column} {shown(value)} is not an object that can be read; {remedy}")
    return {}


def _parse_object(text: str) -> object:
    """A dict; None for any other text."""
    value: object = None
    with suppress(ValueError, SyntaxError, RecursionError, MemoryError), warnings.catch_warnings(action="ignore"):
        if text.lstrip().startswith("{"):
            try:
                value = parse_json(text)
            except json.JSONDecodeError:
                value = ast.literal_eval(text.strip())
    return value if isinstance(value, dict) else None


def _flatten(values: Mapping[str, object]) -> Iterator[tuple[str, str, object]]:
    """Each value that is not null: where it is written, its name, and itself; UsageError for a member without a use."""
    for column, value in values.items():
        if not is_object(column):
            yield from read_member(column, column, value)
            continue
        if value is None:
            continue
        for name, member in _read_object(column, value).items():
            yield from read_member(f"{column}.{name}", str(name), member)


def read_member(where: str, name: str, value: object) -> Iterator[tuple[str, str, object]]:
    """One member of an object of parameters, under its name here, or none if it is null; UsageError if not known."""
    if value is None or (name in LOGPROBS and value is False):
        return
    if name in _SHAPED:
        yield from _read_shape(where, name, value)
        return
    if name not in PARAMETERS and name not in ALIASES and name not in NEUTRAL and name not in NEUTRAL_MEMBERS:
        near = find_misspelled(name)
        remedy = f"did you mean {near!r}?" if near else "leave it out"
        if where != name:
            remedy += f" or pass {say('row_params', False)}"
        raise UsageError(f"{where[:80]!r} is not supported; {remedy}")
    yield where, ALIASES.get(name, name), value


def _read_shape(where: str, name: str, value: object) -> Iterator[tuple[str, str, object]]:
    """The pattern in an object of OpenAI's or vLLM's; UsageError for what else it asks for.

    {"type": "json_schema", "json_schema": {"schema": {...}}}, {"regex": "[0-9]+"}, {"json_object": true}
    """
    if isinstance(value, str):  # in CSV, or a column of text
        value = read_literal(value, python=False)
    if not isinstance(value, Mapping):
        raise UsageError(f"{where} {shown(value)} is not an object; leave it out")
    members = {key: member for key, member in value.items() if member not in (None, False)}
    if name == RESPONSE_FORMAT:
        members = _response_format(where, members)
    if members.pop("json_object", None):
        yield f"{where}.json_object", "json_schema", {"type": "object"}
    for key, member in members.items():
        if key not in _STRUCTURED:
            known = ", ".join((*_STRUCTURED, "json_object"))
            raise UsageError(f"'{where}.{str(key)[:40]}' is not supported; leave it out: its members are {known}")
        yield f"{where}.{key}", _STRUCTURED[key], member


def _response_format(where: str, members: dict[object, object]) -> dict[object, object]:
    """OpenAI's members as vLLM's; a schema's name, description and strictness change nothing."""
    kind = members.pop("type", None)
    if kind == "json_schema" and isinstance(inner := members.pop("json_schema", None), Mapping):
        members |= {f"json_schema.{key}": member for key, member in inner.items() if member is not None}
        for key in ("name", "description", "strict"):
            members.pop(f"json_schema.{key}", None)
        if (schema := members.pop("json_schema.schema", None)) is not None:
            return {"json": schema, **members}
    elif kind in ("text", "json_object"):
        return {"json_object": kind == "json_object", **members}
    raise UsageError(
        f'{where}.type {shown(kind)} is not supported as it is written; write {{"type": "json_schema", "json_schema": '
        '{"schema": {...}}}, or the type "json_object" or "text"'
    )


def override_params(
    values: Mapping[str, object], base: SamplingParams, found: RowParameters | None = None
) -> SamplingParams:
    """The base with a row's values in place of its own; null changes nothing. Raises UsageError by name."""
    given = list(_flatten(values))
    try:
        params = apply_values(given, base)
    except UsageError as error:
        if not any(str(error).startswith(f"{name} ") for name in PATTERN_NAMES if name in values):
            raise
        remedy = f"if the column is your own, rename it or pass {say('row_params', False)}"
        raise UsageError(f"{error}; {remedy}") from error
    if found is not None and given:
        found.taken.update({where.partition(".")[0] for where, name, _ in given if name in PARAMETERS})
        count_escapes(params, base, found)
    return params


def count_escapes(params: SamplingParams, base: SamplingParams, found: RowParameters) -> None:
    """Note the escapes in a row's own stop strings, such as a backslash and an n, which are no line feed."""
    if params.stop != base.stop:
        found.escaped.update({escape for text in params.stop if (escape := find_escape(text))})


def apply_values(given: Iterable[tuple[str, str, object]], base: SamplingParams) -> SamplingParams:
    """The base with these values: where each is written, its name, and itself. UsageError if two of them differ."""
    changes: dict[str, object] = {}
    places: dict[str, str] = {}
    for where, name, value in given:
        value = _read(name, value)
        if name in places and not _is_equal(changes[name], value):
            raise UsageError(f"{places[name]} {shown(changes[name])} and {where} {shown(value)} differ; keep one")
        changes[name], places[name] = value, where
    if any(changes.get(name) for name in PATTERN_NAMES):  # in place of the base's, which may be of another kind
        changes = {name: None for name in MAX_PATTERN_BYTES} | {"choices": ()} | changes
    other = {name: changes.pop(name) for name in list(changes) if name not in PARAMETERS}
    params = replace(base, **changes) if changes else base  # type: ignore[arg-type]  # SamplingParams checks each
    for name, value in other.items():
        _check_neutral(name, value, places[name], params)
    return params


def _is_equal(a: object, b: object) -> bool:
    try:
        return a == b
    except RecursionError:  # nested too deeply for any parameter
        return False


def _check_neutral(name: str, value: object, where: str, params: SamplingParams) -> None:
    """Raise UsageError for a value that asks for what is not supported."""
    if isinstance(value, str):
        value = {"true": True, "false": False}.get(value.casefold(), value)  # as pandas writes them in CSV
    if name == "do_sample" and value == params.greedy:
        remedy = "set temperature to 0" if params.greedy is False else "set temperature above 0"
        if params.num_beams > 1:  # which draws nothing
            remedy = "set do_sample to false, or num_beams to 1 and temperature above 0"
        raise UsageError(f"{where} {shown(value)} and temperature {params.temperature} contradict; {remedy}")
    neutral = {"best_of": (1, params.n), "do_sample": (True, False)}.get(name) or (NEUTRAL | NEUTRAL_MEMBERS)[name]
    if value not in neutral:
        remedy = "give num_beams instead" if name == "use_beam_search" else "leave it out"
        raise UsageError(f"{where} {shown(value)} is not supported; {remedy}")


def own_parameters(
    params: SamplingParams, run_params: SamplingParams, prompt_token_ids: Sequence[int] | None = None
) -> str | None:
    """JSON of the row's parameters that differ from the run's, and of prompt_token_ids; None if there are none."""
    own = {name: value for name, value in params.as_dict().items() if value != getattr(run_params, name)}
    if prompt_token_ids is not None:
        own["prompt_token_ids"] = prompt_token_ids
    return json.dumps(own, sort_keys=True) if own else None


# ---- how JSON, Parquet and CSV write the values of a type


def _read(name: str, value: object) -> object:
    if name == "choices" and isinstance(value, str) and value:
        raise UsageError(f'choices {shown(value)} is out of range (a list of strings; write ["a", "b"])')
    if name in PATTERN_NAMES:  # an empty text asks for nothing, but as one of choices it is refused
        return value if value != "" else () if name == "choices" else None
    read = _READERS.get(_TYPES.get(name))
    return value if read is None else read(name, value)


def _read_whole(name: str, value: object) -> object:
    """40.0 -> 40: pandas writes whole numbers so if a column has nulls."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _read_texts(_name: str, value: object) -> object:
    """["a", ""] -> ["a"], "" -> []: an empty stop string asks for nothing."""
    if isinstance(value, str):
        value = [value]
    return [text for text in value if text != ""] if isinstance(value, list | tuple) else value


def _read_biases(name: str, value: object) -> object:
    """{"50256": -100} -> ((50256, -100),), as in OpenAI's API; a map column of Parquet gives a list of pairs."""
    expected = f"{name} is out of range (an object of token ids and numbers"
    pairs = tuple(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(pairs, list | tuple) or not all(_is_pair(pair) for pair in pairs):
        raise UsageError(f"{expected})")
    biases: dict[int, object] = {}
    for token, bias in pairs:
        text = str(token)
        if not (text.isascii() and text.isdecimal() and len(text) <= 9) or isinstance(token, bool):
            raise UsageError(f"{expected}; {text[:40]!r} is not a token id)")
        if bias is not None:  # a struct column has every member in every row
            biases[int(text)] = bias
    return tuple(biases.items())


def _is_pair(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2


# Values of the other types are as SamplingParams takes them.
_READERS: dict[object, Callable[[str, object], object]] = {
    int: _read_whole,
    int | None: _read_whole,
    tuple[str, ...]: _read_texts,
    tuple[tuple[int, float], ...]: _read_biases,
}
_TYPES: dict[str, object] = {field.name: field.type for field in fields(SamplingParams)}


_BOOLEANS = {"true": True, "t": True, "1": True, "1.0": True, "false": False, "f": False, "0": False, "0.0": False}
_NULLS = {"NA", "<NA>", "None", "null", "NULL", r"\N"}  # in R, pandas, JSON, SQL, its dumps
_BRACKETED = re.compile(r"\s*(?:(?:c|list|tuple|set|frozenset)\s*\(|[\[({])(.*)[\])}]\s*", re.DOTALL)
_DECIMAL = re.compile(r"-?(?:\.\d{1,17}|[1-9]\d{0,14}\.)")  # .5 and 2., as Oracle and R write them and JSON does not
# what is a list, whole or damaged: [ or a function of R or Python, a bracket before a quote, a pair of braces, strings
# between commas
_LIKE_A_LIST = re.compile(
    r"""\s*(?:\[|(?:\w+\.)?(?:c|list|tuple|set|frozenset|array|deque|character|Series)\s*\(|[({]\s*['")]|\{.*\}\s*\Z|"""
    r"""(?:"[^"]*"|'[^']*')(?:(?:\s++|(?=,))(?:,\s*+)?(?:"[^"]*"|'[^']*'))+\s*\Z)""",
    re.DOTALL,
)
_NO_LITERAL = (ValueError, SyntaxError, tokenize.TokenError, Warning, MemoryError, RecursionError)
_MAX_LITERAL = 2**20  # characters; more than any list of parameters has


def parse_text(name: str, text: str) -> object:
    """A parameter in a field of CSV: as JSON, Python, pandas or R write it; strings need no quotes, empty is null.

    "0.8" -> 0.8; "TRUE" -> True; "['a', 'b']", 'c("a", "b")' -> ["a", "b"]; for stop and bad_words "5" -> "5"
    Raises UsageError for a text that may be a list or null, if a string is taken; else SamplingParams refuses it.
    """
    if is_object(name):
        return text or None
    kind, plain = _TYPES.get(name), text.strip()
    is_text = kind == tuple[str, ...] or name == "regex"
    if not text or (plain in _NULLS and not is_text):
        return None
    if kind is bool:
        return _BOOLEANS.get(plain.lower(), text)
    if name in MAX_PATTERN_BYTES or (is_text and not _LIKE_A_LIST.match(text)):
        if is_text and (plain in _NULLS or plain.lower() == "nan"):
            escaped = f"(?:{plain})" if name == "regex" else f'["{plain}"]'
            raise UsageError(f"{name} {text!r} is out of range (a text: leave it empty for none, or write {escaped})")
        return text
    if kind in (int, float) and _DECIMAL.fullmatch(plain):
        return float(plain)
    bracketed = None if name == "logit_bias" else _BRACKETED.fullmatch(text)
    value = read_literal(f"[{bracketed[1]}]" if bracketed else text, python=str(kind).startswith("tuple"))
    if kind == tuple[str, ...] and (isinstance(value, str) or plain in ("()", "{}")):
        remedy = 'write a list as ["a", "b"], and a text that begins like a list in one'
        raise UsageError(f"{name} {shown(text)} is out of range ({remedy})")
    return value


def read_literal(text: str, python: bool) -> object:
    """The value of a text in JSON, or in Python; the text itself if it has none."""
    value: object = text
    try:
        value = json.loads(text, object_pairs_hook=unique_keys)
    except json.JSONDecodeError:
        if python and len(text) <= _MAX_LITERAL:
            with suppress(*_NO_LITERAL), warnings.catch_warnings():
                warnings.simplefilter("error")  # an escape that Python does not know
                value = text if _has_neighbours(text) else ast.literal_eval(text.strip())
    except (ValueError, RecursionError):
        pass
    return value


def _has_neighbours(text: str) -> bool:
    """Whether two strings have no comma between them: a list by NumPy, ['a' 'b'], which Python reads as ['ab']."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    kinds = [token.type for token in tokens if token.type not in (tokenize.NL, tokenize.COMMENT)]
    return any(a == b == tokenize.STRING for a, b in itertools.pairwise(kinds))
