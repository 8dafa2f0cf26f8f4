"""A row's own sampling parameters: under the names of the command line, which they win over.

Other columns are the user's own and are left alone, but for one that can only be a misspelt parameter: a row that
asks for `max_token` and silently gets the default would be found out a million rows later.
"""

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import fields, replace
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from batchgen.errors import UsageError
from batchgen.types import SamplingParams

PARAMETERS = frozenset(field.name for field in fields(SamplingParams))

# what other libraries call them
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
_WHOLE = {"max_tokens", "top_k", "min_tokens", "n", "seed", "logprobs"}
_SIMILAR = 0.9  # `max_token`, `temprature`, but not `n_tokens`
_SHORTEST = 7  # shorter names are compared only but for case and separators: `speed` is no misspelt `seed`


def _bare(name: str) -> str:
    return name.casefold().replace("_", "").replace("-", "").replace(" ", "")


_BARE = {_bare(name): name for name in sorted(PARAMETERS)} | {_bare(name): near for name, near in ALIASES.items()}
_LONG = [name for name in sorted(PARAMETERS) if len(name) > _SHORTEST]


def misspelt(name: str) -> str | None:
    """The parameter that a name can only have meant: `maxTokens`, `top-k`, `temprature`; None for any other name."""
    return _meant(name) if 4 <= len(name) <= 64 and name not in PARAMETERS else None  # `N` is the user's own


@lru_cache(maxsize=4096)
def _meant(name: str) -> str | None:
    if near := _BARE.get(_bare(name)):
        return near
    if len(name) < _SHORTEST:
        return None
    return next(iter(get_close_matches(name.casefold(), _LONG, n=1, cutoff=_SIMILAR)), None)


def parameter_names(names: Iterable[str], not_parameters: Container[str] = ()) -> tuple[str, ...]:
    """Those of a row's names that are parameters; UsageError names one that is misspelt."""
    found = []
    for name in names:
        if name in not_parameters:
            continue
        if name in PARAMETERS:
            found.append(name)
        elif near := misspelt(name):
            raise UsageError(f"{name!r} is no parameter; did you mean {near!r}? rename it")
    return tuple(found)


def row_params(values: Mapping[str, Any], base: SamplingParams) -> SamplingParams:
    """The base with a row's values in place of its own; null is as if not there. Raises UsageError by name."""
    changes = {name: _READ.get(name, _number)(name, value) for name, value in values.items() if value is not None}
    return replace(base, **changes) if changes else base


# ---- how values are written in JSON and Parquet, and what they are here


def _number(name: str, value: Any) -> Any:
    """40.0 -> 40 where a whole number is wanted: what a column with nulls becomes in pandas."""
    return int(value) if name in _WHOLE and isinstance(value, float) and value.is_integer() else value


def _texts(name: str, value: Any) -> tuple[Any, ...]:
    return (value,) if isinstance(value, str) else tuple(_listed(name, value, "a string or a list of strings"))


def _token_ids(name: str, value: Any) -> tuple[Any, ...]:
    return tuple(_listed(name, value, "a list of token ids"))


def _biases(name: str, value: Any) -> tuple[tuple[int, Any], ...]:
    """{"50256": -100} -> ((50256, -100.0),), as in OpenAI's API; from Parquet also a list of pairs (a map column)."""
    words = f"{name} is out of range (an object of token ids and numbers)"
    if isinstance(value, (list, tuple)) and all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in value):
        pairs: Iterable[tuple[Any, Any]] = value
    elif isinstance(value, dict):
        pairs = value.items()
    else:
        raise UsageError(words)
    biases: dict[int, Any] = {}
    for token, bias in pairs:
        text = str(token)
        if not (text.isascii() and text.isdecimal() and len(text) <= 9) or isinstance(token, bool):
            raise UsageError(f"{words[:-1]}; {text[:40]!r} is no token id)")
        if bias is not None:  # a struct column has every member in every row
            biases[int(text)] = bias
    return tuple(biases.items())


def _listed(name: str, value: Any, words: str) -> Iterable[Any]:
    if not isinstance(value, (list, tuple)):
        raise UsageError(f"{name} is out of range ({words})")
    return value


_READ: dict[str, Callable[[str, Any], Any]] = {
    "stop": _texts,
    "bad_words": _texts,
    "stop_token_ids": _token_ids,
    "logit_bias": _biases,
}
