"""Parameters that a row gives for itself, under the names of SamplingParams; they win over those of the job.

Other columns belong to the user, with one exception: a name that can only be a misspelled parameter is an error.
Otherwise a row with `max_token` would silently get the default, and nobody would notice for a million rows.
"""

import json
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import fields, replace
from difflib import get_close_matches
from functools import lru_cache

from batchgen.errors import UsageError
from batchgen.types import SamplingParams

PARAMETERS = frozenset(field.name for field in fields(SamplingParams))

# names that other libraries use
ALIASES = {
    "max_new_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "num_return_sequences": "n",
    "stop_strings": "stop",
    "stop_sequences": "stop",
    "stop_words": "stop",
    "include_stop_str_in_output": "include_stop",
    "bad_words_ids": "bad_words",
}
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


def parameter_names(names: Iterable[str], not_parameters: Container[str] = ()) -> tuple[str, ...]:
    """The names that are parameters; UsageError for one that is misspelled."""
    found = []
    for name in names:
        if name in not_parameters:
            continue
        if name in PARAMETERS:
            found.append(name)
        elif near := find_misspelled(name):
            raise UsageError(f"{name!r} is not a parameter; did you mean {near!r}? rename it")
    return tuple(found)


def override_params(values: Mapping[str, object], base: SamplingParams) -> SamplingParams:
    """The base with a row's values in place of its own; null changes nothing. Raises UsageError by name."""
    changes = {name: _read(name, value) for name, value in values.items() if value is not None}
    return replace(base, **changes) if changes else base  # type: ignore[arg-type]  # SamplingParams checks each


# ---- how JSON, Parquet and CSV write the values of a type


def _read(name: str, value: object) -> object:
    read = _READERS.get(_TYPES[name])
    return value if read is None else read(name, value)


def _read_whole(name: str, value: object) -> object:
    """40.0 -> 40: pandas writes whole numbers so if a column has nulls."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


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
    tuple[tuple[int, float], ...]: _read_biases,
}
_TYPES: dict[str, object] = {field.name: field.type for field in fields(SamplingParams)}


def parse_text(name: str, text: str) -> object:
    """A parameter in a field of CSV: JSON, but strings need no quotes, and an empty field is null.

    "0.8" -> 0.8, "" -> None, '["a", "b"]' -> ["a", "b"]; for stop and bad_words, which are text, "5" -> "5"
    """
    if not text or (_TYPES[name] == tuple[str, ...] and not text.startswith("[")):
        return text or None
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError):
        return text  # SamplingParams refuses it by name
    return value
