"""The small records that pass between the floors: sampling parameters, requests, chunks, rows, receipts."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, get_args

from batchgen.errors import UsageError
from batchgen.files import parse_json
from batchgen.options import (
    check_ranges,
    is_number,
    known_keywords,
    option,
    parse_biases,
    parse_token_ids,
    plain,
    read_grammar,
    read_regex,
    read_schema,
    show_biases,
    show_token_ids,
    shown,
)

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Ids: TypeAlias = tuple[int, ...]
Mask: TypeAlias = "npt.NDArray[np.uint32]"  # of token ids; see make_mask
Floats: TypeAlias = tuple[float, ...]
FinishReason = Literal["stop", "length", "repetition", "blocked"]
Precision = Literal["float32", "int8"]  # of the products with weights
Status = Literal["ok", "rejected", "failed", "dropped"]
STATUSES: tuple[Status, ...] = get_args(Status)
Task = Literal["generate", "score", "embed"]  # what a run does with each row
Kind = Literal["generate", "text", "completion", "choices", "embed"]  # the same; of scores, what each row has
EarlyStopping = Literal["false", "true", "never"]  # of beam search
ReadSpecial = Literal["auto", "parse", "text"]  # of special tokens in prompts; auto: as the model's tokenizer does

MAX_INT = 2**31 - 1
MAX_SEED = 2**63 - 1
MAX_N = 1024
MIN_TEMPERATURE = 1e-5  # as in vLLM; below it the most likely token has all of the probability
MAX_LOGPROBS = 100
MAX_STOPS = 64
MAX_STOP_CHARACTERS = 1000
MAX_CHOICES = 1024
MAX_PATTERN_BYTES = {"regex": 2**14, "json_schema": 2**16, "grammar": 2**16}
MAX_TOKENS_NAMED = 64  # bad_words, stop_token_ids
MAX_BIASES = 1024
MAX_REASONS = 32  # kinds of reasons that are counted apart
MAX_REASON = 300  # characters of one

MEASURED = ("mean_logprob", "repetition")  # columns of what is measured of each completion, if asked for

# groups of options in --help
SAMPLING, PATTERNS, BEAMS = "Sampling", "What a completion may be", "Beam search"
ENDS, IO = "Where a completion ends", "Input, model, output"

PATTERN_NAMES = ("choices", *MAX_PATTERN_BYTES)  # a completion may have one of them

DRY_BREAKERS = ("\n", ":", '"', "*")  # llama.cpp's
MAX_BREAKER_BYTES = 40  # which llama.cpp cuts them to
MAX_NUM_BEAMS = 64
# what changes draws alone, with the value that changes nothing: beam search draws nothing
OF_DRAWS = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0, "top_n_sigma": 0.0}
OF_DRAWS["xtc_probability"] = 0.0

_TOP_K = "Draw from the K most likely tokens; 0 is off."
_TOP_P = "Draw from the most likely tokens that make up this probability; 1 is off."
_MIN_P = "Drop tokens less likely than this times the most likely; 0 is off."
_REPETITION = "Divide the logits of tokens already there; 1 is off."
_PRESENCE = "Subtract from the logits of generated tokens; 0 is off."
_FREQUENCY = "The same for every time that they were generated; 0 is off."
_LOGIT_BIAS = "Add to the logits of tokens, -100 to 100: 198=-100,464=2.5."
_SEED = "Draws the same samples again; used if temperature is above 0."
_LOGPROBS = "Add columns of log-probabilities: each token's, and the K highest."
_PROMPT_LOGPROBS = "The same for the tokens of the prompt."
_STOP = f"End before this text, \\n is a line feed; again for more, up to {MAX_STOPS}."
_SKIP_SPECIAL = "Leave special tokens out of the completion's text; token ids keep them."
_PENALTY = (-100.0, 100.0, "-100 to 100, 0 is off")
_NO_REPEAT = "No N tokens in a row occur twice, prompt included; 0 is off."
_TYPICAL_P = "Draw from the tokens of the most expected surprise that make up this probability; 1 is off."
_TOP_N_SIGMA = "Draw from tokens whose logit is within N standard deviations of the largest; 0 is off."
_DRY = "Lower the logits of tokens that continue a repetition, the more the longer it is; 0 is off."
_DRY_BASE = "Each repeated token more multiplies the lowering by this."
_DRY_ALLOWED = "Repetitions of fewer tokens are not lowered."
_DRY_BREAKERS = "No repetition goes on past this text; again for more, '' is none."
_XTC = "How often all but the least likely of the tokens above the threshold are left out; 0 is off."
_XTC_THRESHOLD = "The probability from which on a token counts for that; above 0.5 is off."
_ALLOWED = "Generate these token ids alone: 198,13."
_CHOICES = "The completion is exactly one of these texts; again for each."
_REGEX = "The completion matches this regular expression as a whole."
_JSON_SCHEMA = "The completion is JSON of this schema: its text, or the file that has it."
_GRAMMAR = "The completion is of this grammar, in Lark's form: its text, or the file that has it."
_EARLY = "End when N beams are complete: true; when no better one is likely: false; when none can come: never."
_HEAL = "Complete a token that the prompt's end cuts: a space, or half of a word."


@known_keywords
@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to complete one prompt; names and meanings are vLLM's, and docs/parameters.md explains each.

    temperature 0 is greedy; engine/sampler.py has the order of work on the logits. Raises UsageError, with the range,
    on a value out of it. A new parameter is a field here; the command line, rows, OpenAI bodies, `Generator` and the
    plan take it from this declaration.
    """

    max_tokens: int = option(40, "New tokens at most, for each sample.", SAMPLING, within=(0, MAX_INT, "1 or more"))
    temperature: float = option(
        0.0, "0 is greedy: always the most likely token.", SAMPLING, within=(0.0, 100.0, "0 (greedy) to 100")
    )
    top_k: int = option(0, _TOP_K, SAMPLING, within=(0, MAX_INT, "0 (off) or more"))
    top_p: float = option(1.0, _TOP_P, SAMPLING, within=(0.0, 1.0, "above 0, up to 1 (off)"))
    min_p: float = option(0.0, _MIN_P, SAMPLING, within=(0.0, 1.0, "0 (off) to 1"))
    repetition_penalty: float = option(1.0, _REPETITION, SAMPLING, within=(0.01, 100.0, "0.01 to 100, 1 is off"))
    presence_penalty: float = option(0.0, _PRESENCE, SAMPLING, within=_PENALTY)
    frequency_penalty: float = option(0.0, _FREQUENCY, SAMPLING, within=_PENALTY)
    logit_bias: tuple[tuple[int, float], ...] = option(
        (), _LOGIT_BIAS, SAMPLING, metavar="ID=BIAS,...", parse=parse_biases, show=show_biases
    )
    stop_token_ids: tuple[int, ...] = option(
        (), "End at these token ids too: 198,13.", ENDS, metavar="ID,ID", parse=parse_token_ids, show=show_token_ids
    )
    min_tokens: int = option(0, "No end before this many tokens.", SAMPLING, within=(0, MAX_INT, "0 to max_tokens"))
    ignore_eos: bool = option(False, "Continue past the model's end tokens.", ENDS, off="--stop-at-eos")
    n: int = option(
        1, "Samples of each prompt; one output row each.", SAMPLING, short="-n", within=(1, MAX_N, f"1 to {MAX_N}")
    )
    seed: int = option(0, _SEED, SAMPLING, within=(0, MAX_SEED, f"0 to {MAX_SEED}"))
    logprobs: int | None = option(None, _LOGPROBS, IO, metavar="K", within=(0, MAX_LOGPROBS, f"0 to {MAX_LOGPROBS}"))
    prompt_logprobs: int | None = option(
        None, _PROMPT_LOGPROBS, IO, metavar="K", within=(0, MAX_LOGPROBS, f"0 to {MAX_LOGPROBS}")
    )
    stop: tuple[str, ...] = option((), _STOP, ENDS, metavar="TEXT", escaped=True)
    include_stop: bool = option(False, "Keep the stop string in the completion.", ENDS, off=None)
    bad_words: tuple[str, ...] = option(
        (), "Never generate the tokens of this text; again for more.", SAMPLING, metavar="TEXT", escaped=True
    )
    echo: bool = option(False, "Begin the completion with the prompt.", ENDS, off=None)
    stop_loops: bool = option(False, "End a completion that repeats itself.", ENDS, off=None)
    skip_special_tokens: bool = option(False, _SKIP_SPECIAL, IO, off="--keep-special-tokens")

    no_repeat_ngram_size: int = option(0, _NO_REPEAT, SAMPLING, metavar="N", within=(0, MAX_INT, "0 (off) or more"))
    typical_p: float = option(1.0, _TYPICAL_P, SAMPLING, within=(0.0, 1.0, "above 0, up to 1 (off)"))
    top_n_sigma: float = option(0.0, _TOP_N_SIGMA, SAMPLING, within=(0.0, 100.0, "0 (off) to 100"))
    dry_multiplier: float = option(0.0, _DRY, SAMPLING, within=(0.0, 100.0, "0 (off) to 100"))
    dry_base: float = option(1.75, _DRY_BASE, SAMPLING, within=(1.0, 100.0, "1 to 100"))
    dry_allowed_length: int = option(2, _DRY_ALLOWED, SAMPLING, within=(0, MAX_INT, "0 or more"))
    dry_sequence_breakers: tuple[str, ...] = option(DRY_BREAKERS, _DRY_BREAKERS, SAMPLING, metavar="TEXT", escaped=True)
    xtc_probability: float = option(0.0, _XTC, SAMPLING, within=(0.0, 1.0, "0 (off) to 1"))
    xtc_threshold: float = option(0.1, _XTC_THRESHOLD, SAMPLING, within=(0.0, 1.0, "0 to 1"))
    allowed_token_ids: tuple[int, ...] = option(
        (), _ALLOWED, SAMPLING, metavar="ID,ID", parse=parse_token_ids, show=show_token_ids
    )
    choices: tuple[str, ...] = option((), _CHOICES, PATTERNS, metavar="TEXT", escaped=True)
    regex: str | None = option(None, _REGEX, PATTERNS, metavar="REGEX", read=read_regex)
    json_schema: str | None = option(None, _JSON_SCHEMA, PATTERNS, metavar="SCHEMA|FILE", read=read_schema)
    grammar: str | None = option(None, _GRAMMAR, PATTERNS, metavar="LARK|FILE", read=read_grammar)
    num_beams: int = option(
        1,
        "Search the likeliest completion with N beams; 1 is off.",
        BEAMS,
        metavar="N",
        within=(1, MAX_NUM_BEAMS, f"1 (off) to {MAX_NUM_BEAMS}"),
    )
    length_penalty: float = option(
        1.0, "Divide a beam's log-probability by its length to this power.", BEAMS, within=(-10.0, 10.0, "-10 to 10")
    )
    early_stopping: EarlyStopping = option("false", _EARLY, BEAMS, choices=get_args(EarlyStopping))
    heal: bool = option(False, _HEAL, SAMPLING, off=None)

    def __post_init__(self) -> None:
        for name, what in _LISTS.items():
            object.__setattr__(self, name, _as_tuple(name, getattr(self, name), what))
        for name, off in (("top_k", 0), ("top_n_sigma", 0.0)):
            if getattr(self, name) == -1:  # vLLM's word for off, and llama.cpp's
                object.__setattr__(self, name, off)
        if self.dry_sequence_breakers == ("",):  # how a command line says that there are none
            object.__setattr__(self, "dry_sequence_breakers", ())
        if isinstance(self.early_stopping, bool | str):  # transformers has booleans, and pandas writes True
            object.__setattr__(self, "early_stopping", str(self.early_stopping).lower())
        check_ranges(self)
        if not self.max_tokens and self.prompt_logprobs is None and not self.echo:
            raise UsageError(
                "max_tokens 0 is out of range (1 or more), unless prompt_logprobs or echo asks for the prompt"
            )
        if 0.0 < self.temperature < MIN_TEMPERATURE:
            object.__setattr__(self, "temperature", 0.0)
        for name in ("top_p", "typical_p"):
            if getattr(self, name) == 0.0:
                raise UsageError(f"{name} 0.0 is out of range (above 0, up to 1 (off)); greedy is temperature 0")
        if self.min_tokens > self.max_tokens:
            raise UsageError(f"min_tokens {self.min_tokens} exceeds max_tokens {self.max_tokens}; lower it")
        for token, bias in self.logit_bias:
            if not is_number(bias) or not -100.0 <= bias <= 100.0:
                raise UsageError(f"logit_bias {shown(bias)} of token {token} is out of range (-100 to 100)")
        self._check_lists()
        self._check_patterns()
        if self.num_beams > 1:
            self._check_beams()

    def _check_beams(self) -> None:
        """Beam search returns its best beams, and draws nothing."""
        if self.n > self.num_beams:
            what = f"n {self.n} exceeds num_beams {self.num_beams}, the most completions that a search returns"
            raise UsageError(f"{what}; lower n, or raise num_beams")
        for name, off in OF_DRAWS.items():
            if (value := getattr(self, name)) != off:
                what = f"{name} {value} changes draws, and beam search (num_beams {self.num_beams}) draws nothing"
                raise UsageError(f"{what}; set {name} to {off} or num_beams to 1")

    def _check_lists(self) -> None:
        _check_texts("stop", self.stop, MAX_STOPS)
        _check_texts("bad_words", self.bad_words, MAX_TOKENS_NAMED)
        _check_texts("dry_sequence_breakers", self.dry_sequence_breakers, MAX_STOPS, MAX_BREAKER_BYTES, "bytes")
        _check_texts("choices", self.choices, MAX_CHOICES)
        for name, tokens, most in (
            ("allowed_token_ids", self.allowed_token_ids, MAX_INT),
            ("stop_token_ids", self.stop_token_ids, MAX_TOKENS_NAMED),
            ("logit_bias", tuple(token for token, _ in self.logit_bias), MAX_BIASES),
        ):
            if len(tokens) > most:
                raise UsageError(f"{name} names {len(tokens)} tokens, which is out of range (up to {most})")
            for token in tokens:
                if not isinstance(token, int) or isinstance(token, bool) or token < 0:
                    raise UsageError(f"{name} {shown(token)} is out of range (token ids, from 0 on)")

    def _check_patterns(self) -> None:
        """Raise UsageError for two patterns, and for a parameter that could end one before it is complete."""
        for name, most in MAX_PATTERN_BYTES.items():
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, _as_pattern(name, value, most))
        given = [name for name in PATTERN_NAMES if getattr(self, name)]
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)} cannot both say what the completion may be; keep one")
        for name in ("stop", "stop_token_ids", "min_tokens", "ignore_eos") if given else ():
            if getattr(self, name):
                what = f"{name} {shown(getattr(self, name))} and {given[0]} contradict: {given[0]} says where it ends"
                raise UsageError(f"{what}; leave {name} out")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def searches(self) -> bool:
        """Whether completions are found by beam search."""
        return self.num_beams > 1 and self.max_tokens > 0

    @property
    def n_sequences(self) -> int:
        """Sequences that are decoded for a prompt."""
        return self.num_beams if self.searches else 1 if self.greedy else self.n

    def as_dict(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


# field: what it is a list of
_LISTS = {
    **dict.fromkeys(("stop", "bad_words", "dry_sequence_breakers", "choices"), "strings"),
    **dict.fromkeys(("stop_token_ids", "allowed_token_ids"), "token ids"),
    "logit_bias": "pairs",
}


def _as_tuple(name: str, value: object, what: str) -> tuple[Any, ...]:
    """Lists as people write them: a string for one, a list, an array, a dict of token ids; a tuple can be a key."""
    value = plain(value)
    if isinstance(value, str) and what == "strings":
        return (value,)
    if isinstance(value, Mapping) and what == "pairs":
        value = [*value.items()]
    if not isinstance(value, list | tuple):
        raise UsageError(f"{name} {shown(value)} is out of range (a list of {what})")
    if what != "pairs":
        return tuple(map(plain, value))
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in value):
        raise UsageError(f"{name} {shown(value)} is out of range (a list of pairs of a token id and a bias)")
    return tuple(tuple(map(plain, pair)) for pair in value)


def _is_encodable(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _check_texts(
    name: str, texts: tuple[str, ...], most: int, longest: int = MAX_STOP_CHARACTERS, unit: str = "characters"
) -> None:
    if len(texts) > most:
        raise UsageError(f"{name} has {len(texts)} strings, which is out of range (up to {most})")
    for text in texts:
        length = len(text.encode(errors="surrogatepass") if unit == "bytes" else text) if isinstance(text, str) else 0
        if not 1 <= length <= longest:
            raise UsageError(f"{name} {shown(text)} is out of range (strings of 1 to {longest} {unit})")
        if not _is_encodable(text):
            raise UsageError(f"{name} {shown(text)} is out of range (half of a surrogate pair is no character)")


def _as_pattern(name: str, value: object, most: int) -> str:
    """The text of a pattern; a schema may be an object, and becomes one line of JSON, in its own order."""
    text = value
    if name == "json_schema":
        try:
            found = parse_json(value) if isinstance(value, str) else value
            is_object = isinstance(found, dict)
            text = json.dumps(found, ensure_ascii=False, separators=(",", ":"), allow_nan=False) if is_object else None
        except (ValueError, TypeError, RecursionError):
            text = None
    if not isinstance(text, str) or not text or not _is_encodable(text):
        what = "a JSON object of a schema" if name == "json_schema" else "a text of one character or more"
        raise UsageError(f"{name} {shown(value)} is out of range ({what})")
    if (size := len(text.encode())) > most:
        raise UsageError(f"{name} has {size} bytes, which is out of range (up to {most})")
    return text


def make_mask(ids: Iterable[int], n_vocab: int = 0) -> Mask:
    """Bit i % 32 of word i // 32 says whether i is one of these, for n_vocab ids or more."""
    import numpy as np  # not with the records: they are loaded for --help

    chosen = np.fromiter(ids, np.int64)
    bits = np.zeros(-(-max(n_vocab, chosen.max(initial=-1) + 1) // 32) * 32, np.bool_)
    bits[chosen] = True
    return np.packbits(bits, bitorder="little").view(np.uint32)


def is_in(token: int, mask: "Mask | None") -> bool:
    """Whether a mask has this token; None has all."""
    return mask is None or 0 <= token < 32 * len(mask) and bool(mask[token // 32] >> (token % 32) & 1)


class Guide(Protocol):
    """Which tokens may come next in one sequence; its state depends on the sequence's own tokens alone."""

    def allowed(self) -> "Mask | None":
        """The tokens that may come next; None: all."""

    def is_given(self, token: int) -> bool:
        """Whether this token, if it is the next, lies within the prompt's text, and so ends nothing; text/healing.py"""
        return False

    def advance(self, token: int) -> bool:
        """Take the token that came; whether the completion is complete with it, and so ends."""

    def may_end(self) -> bool:
        """Whether the completion is complete as it stands, though tokens may follow."""
        return False

    def copy(self) -> "Guide":
        """The same state, which goes on by itself."""


READING = SamplingParams(max_tokens=0, prompt_logprobs=0)  # nothing is generated: prompts are read


@dataclass(frozen=True, slots=True)
class Request:
    """One input row that could be read: row is its 0-based number, place its `file:line`; a prompt may be token ids."""

    row: int
    place: str
    id: str | None
    prompt: str | tuple[int, ...]
    params: SamplingParams
    others: tuple[str | tuple[int, ...], ...] = ()  # prompts after the first, in OpenAI's batch files
    targets: tuple[str, ...] = ()  # to score after the prompt: its completion, or its choices; none: the prompt itself
    answer: int | None = None  # the index of the choice that is right, if the input says so

    def rejected(self, reason: str, prompt_tokens: int | None = None) -> "Rejected":
        """The row set aside, with what could be read of it; a prompt of token ids is no text."""
        prompt = self.prompt if isinstance(self.prompt, str) else None
        error = f"{self.place}: {reason}"
        return Rejected(self.row, self.place, self.id, prompt, error, prompt_tokens, targets=self.targets)


@dataclass(frozen=True, slots=True)
class RowParameters:
    """What was found in rows besides their parameters themselves, for the summary."""

    taken: Counter[str] = field(default_factory=Counter)  # rows by the column that gave them a parameter
    escaped: Counter[str] = field(default_factory=Counter)  # rows by an escape in a stop string, such as \n
    results: tuple[str, ...] = ()  # columns that an output of batchgen has and that are no parameters
    folders: tuple[str, ...] = ()  # named as parameters, and no columns: the user named what is below them


def encodable(text: str) -> str:
    """An error as files can hold it: half of a surrogate pair, which it may quote, becomes its escape."""
    return text.encode("utf-8", "backslashreplace").decode()


@dataclass(frozen=True, slots=True)
class Rejected:
    """One input row that cannot be generated, and why; it gets its output row all the same."""

    row: int
    place: str
    id: str | None
    prompt: str | None
    error: str
    prompt_tokens: int | None = None
    status: Status = "rejected"  # or failed: it was tried, and killed its worker; or dropped: it repeats another
    targets: tuple[str, ...] = ()  # of a row to score, if they could be read


@dataclass(frozen=True, slots=True)
class Passage:
    """Tokens to score in one reading: those from index `scored` on, each after all that are before it.

    2 <= len(token_ids) <= n_ctx + 1, as the last token is not read; 1 <= scored < len(token_ids).
    """

    token_ids: Ids
    scored: int

    @property
    def scored_ids(self) -> Ids:
        return self.token_ids[self.scored :]


@dataclass(frozen=True, slots=True)
class Begun:
    """A sample to generate, and its first tokens, if an older run has generated them: the next one is drawn first.

    None of them ends the sample by the rules of the row. So of a sample that an older max_tokens has ended, the last
    token is left out and drawn again: then every rule looks at it.
    """

    sample: int
    token_ids: Ids = ()


@dataclass(frozen=True, slots=True)
class TokenizedRequest:
    """A request that fits the model: 1 <= len(prompt_token_ids), and that + max_tokens <= n_ctx. So do the `others`.

    One to score has passages: one for each of its targets, or the windows of a text, in order.
    """

    row: int
    place: str
    id: str | None
    prompt: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    others: tuple[tuple[str, tuple[int, ...]], ...] = ()
    given_as_ids: bool = False  # the text was made of the ids, and may not give them again
    has_special_text: bool = False  # of a prompt, such as <|endoftext|>, and nobody said how to read it
    targets: tuple[str, ...] = ()
    answer: int | None = None
    passages: tuple[Passage, ...] = ()
    seed_key: Ids = ()  # what its random numbers hang on besides the seed, in words of 32 bits; none: the row's number
    begun: tuple[Begun, ...] | None = None  # the samples to generate, if some are done already; None: all n
    measured: tuple[str, ...] = ()  # of MEASURED
    again: tuple[Ids, ...] = ()  # of each prompt, the tokens after these that are drawn again; (): of none

    @property
    def prompts(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Text and token ids of every prompt; sample k of the row is sample k % n of prompt k // n."""
        return ((self.prompt, self.prompt_token_ids), *self.others)

    @property
    def all_again(self) -> tuple[Ids, ...]:
        """Of each prompt, the tokens at its end that its completions begin with, or replace; see text/healing.py."""
        return self.again or ((),) * len(self.prompts)

    def failed(self, reason: str) -> Rejected:
        return self.set_aside(reason, "failed")

    def set_aside(self, reason: str, status: Status) -> Rejected:
        error = f"{self.place}: {reason}"
        tokens = len(self.prompt_token_ids)
        return Rejected(self.row, self.place, self.id, self.prompt, error, tokens, status, self.targets)

    @property
    def first_sample(self) -> int:
        """The first of the samples to generate."""
        return 0 if self.begun is None else min((one.sample for one in self.begun), default=0)

    def with_new_tokens(self, most: int) -> "TokenizedRequest":
        """The request with at most so many new tokens of the sample that has most already, and more of the others."""
        n_begun = max((len(one.token_ids) for one in self.begun or ()), default=0)
        return self.with_max_tokens(min(self.params.max_tokens, n_begun + most))

    def with_max_tokens(self, max_tokens: int) -> "TokenizedRequest":
        params = replace(self.params, max_tokens=max_tokens, min_tokens=min(self.params.min_tokens, max_tokens))
        return replace(self, params=params)


@dataclass(frozen=True, slots=True)
class Reused:
    """Output rows that are copied from an older output; see output/reused.py."""

    stream: bytes  # of Arrow
    samples: int  # in it
    rows: int = 0  # input rows of which all samples are in it, which are in no Chunk.items
    first: int = 0  # of these input rows, the first and the last
    last: int = 0


@dataclass(frozen=True, slots=True)
class Chunk:
    """Input rows, in order, done by one worker call and written as one part; see input/grouping.py.

    Rows of which an older output has all samples are in `reused` alone; of the others, those samples that it has.
    """

    index: int
    items: tuple[TokenizedRequest | Rejected, ...]
    kept: bytes | None = None  # what the output carries from the input of these rows; see input/kept.py
    reused: Reused | None = None  # output rows that are copied

    @property
    def n_rows(self) -> int:
        """Of the input."""
        return len(self.items) + (self.reused.rows if self.reused else 0)

    @property
    def first_row(self) -> int:
        return min(self._ends())

    @property
    def words(self) -> str:
        """Its rows for people: `input rows 3 to 9`, or, if others are between them, `7 of the input rows 3 to 20`."""
        first, last = min(self._ends()), max(self._ends())
        has_all = last - first + 1 == self.n_rows
        return f"{'' if has_all else f'{self.n_rows} of the '}input rows {first} to {last}"

    def _ends(self) -> list[int]:
        """The first and the last row of the items, and of the rows that are copied."""
        copied = [self.reused.first, self.reused.last] if self.reused and self.reused.rows else []
        return [*copied, *(item.row for item in (*self.items[:1], *self.items[-1:]))]


@dataclass(frozen=True, slots=True)
class OutputRow:
    """One row of the output: one sample of one input row; the fields are the columns."""

    row: int
    sample: int
    id: str | None
    prompt: str | None
    completion: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    finish_reason: FinishReason | None = None
    status: Status = "ok"
    error: str | None = None
    seed: int | None = None
    completion_token_ids: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    top_logprobs: tuple[tuple[tuple[int, str, float], ...], ...] | None = None  # token id, text; the likeliest first
    stop_reason: str | None = None
    prompt_index: int = 0
    parameters: str | None = None  # JSON of those that are not the run's
    prompt_token_ids: tuple[int, ...] | None = None
    prompt_logprobs: tuple[float | None, ...] | None = None  # of each prompt token; None for the first
    prompt_top_logprobs: tuple[tuple[tuple[int, str, float], ...] | None, ...] | None = None
    beam_score: float | None = None  # of beam search: what the samples are ordered by
    mean_logprob: float | None = None  # of its tokens; these two only if they are asked for
    repetition: float | None = None  # the share of its 4-grams of tokens that occurred before in it


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRow:
    """One row of scores; the fields are the columns, of which an output has those of its kind (output/schema.py).

    Log-probabilities are natural logarithms. Lists of a row with choices have an element for each choice.
    """

    row: int
    id: str | None
    prompt: str | None  # or the text that is scored alone
    status: Status
    error: str | None = None
    prompt_tokens: int | None = None  # read and not scored
    completion: str | None = None
    tokens: int | None = None  # scored
    logprob: float | None = None  # their sum
    greedy: bool | None = None  # every scored token was the likeliest
    nats: float | None = None  # -logprob
    bytes: int | None = None  # of the scored text, in UTF-8
    bits_per_byte: float | None = None
    perplexity: float | None = None  # by token
    choices: tuple[str, ...] | None = None
    choice_tokens: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    logprobs_by_token: tuple[float, ...] | None = None
    logprobs_by_byte: tuple[float, ...] | None = None
    best: int | None = None  # the index of the highest of logprobs, the first of equal ones
    best_by_token: int | None = None
    best_by_byte: int | None = None
    answer: int | None = None
    token_ids: Ids | tuple[Ids, ...] | None = None  # of the scored tokens; of choices, a tuple for each
    token_logprobs: Floats | tuple[Floats, ...] | None = None
    token_ranks: Ids | tuple[Ids, ...] | None = None  # 1: the likeliest
    sample: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingRow:
    """One row of embeddings; the fields are the columns."""

    row: int
    id: str | None
    prompt: str | None
    status: Status
    error: str | None = None
    prompt_tokens: int | None = None
    embedding: "npt.NDArray[np.float32] | None" = None  # [n_embd]
    sample: int = 0


Row: TypeAlias = OutputRow | ScoreRow | EmbeddingRow


def task_of(kind: Kind) -> Task:
    return kind if kind in ("generate", "embed") else "score"


@dataclass(frozen=True, slots=True)
class Reason:
    """Why rows have no completion: these have the same error but for what it quotes or counts."""

    rows: int
    row: int  # the first of them, its place, and what is wrong with it
    place: str
    text: str

    @classmethod
    def of(cls, row: int, place: str, error: str) -> "Reason":
        """Of the row at this place, whose error may begin with it."""
        text = error.removeprefix(f"{place}: ")[:MAX_REASON]
        return cls(1, row, place, encodable(text))

    @property
    def kind(self) -> str:
        """The text without what it quotes and counts: equal for all of these rows."""
        return _SEVERAL.sub("...", _VALUE.sub("...", self.text))


# a string as repr writes it (one at the begin is a name: of a column), a list, an object, a number; several of them
_VALUE = re.compile(
    r"""(?!\A['"])(?:(?<!\w)b?'(?:[^'\\]|\\.)*'|(?<!\w)b?"(?:[^"\\]|\\.)*"|\[.*\]|\{.*\}|-?\b(?:\d[\d.e+-]*|nan\b|inf\b))""",
    re.DOTALL,
)
_SEVERAL = re.compile(r"\.\.\.(?:, \.\.\.)+")


def add_reasons(reasons: dict[str, Reason], new: Iterable[Reason]) -> None:
    """Add rows to the reasons of their kind; those of more than MAX_REASONS kinds are counted together."""
    for one in new:
        kind = one.kind
        if kind not in reasons and len(reasons) >= MAX_REASONS:
            kind, one = "", replace(one, text="other reasons; the column error has them")
        first = min(reasons.get(kind, one), one, key=lambda reason: reason.row)
        reasons[kind] = replace(first, rows=one.rows + (reasons[kind].rows if kind in reasons else 0))


# the fields of a Receipt that sum up scores; as whole numbers, so that their sums depend on no order
TOTALS = ("nanonats", "scored_bytes", "greedy", "answered", "right", "right_by_token", "right_by_byte")


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a worker sends back of a finished chunk: a few hundred bytes, never the rows."""

    chunk: int
    path: str
    sha256: str
    input_rows: int
    rows: int  # of the output: ok + rejected + failed + dropped
    ok: int
    rejected: int
    failed: int
    prompt_tokens: int
    completion_tokens: int  # or scored ones
    seconds: float = 0.0
    space_ends: int = 0  # input rows with a prompt that ends in a space
    special_texts: int = 0  # and with one that holds a special token, read as text
    reasons: tuple[Reason, ...] = ()
    plan: str = ""  # the digest of the run's
    nanonats: int = 0  # of scores: their sum, of texts and completions
    scored_bytes: int = 0  # of texts, in UTF-8
    greedy: int = 0  # completions of which every token was the likeliest
    answered: int = 0  # rows with choices of which the input names the right one; of them, those that chose it:
    right: int = 0
    right_by_token: int = 0
    right_by_byte: int = 0
    dropped: int = 0
    reused: int = 0  # input rows of which all samples are copied from an older output
    extended: int = 0  # and of which some are, or were continued

    def finished(self, sha256: str, seconds: float) -> "Receipt":
        return replace(self, sha256=sha256, seconds=seconds)
