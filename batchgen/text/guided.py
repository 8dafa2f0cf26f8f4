"""What a completion may be: one of some choices, or a text of a regular expression, a JSON schema or a grammar.

A guide says before each token of a sequence which tokens may come. It compares bytes, so token boundaries do not
matter; a text has no special tokens, and an end token may come only after a complete text. Choices are searched here;
llguidance, which the extra `guided` installs, reads and matches patterns.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from copy import copy
from functools import cached_property, lru_cache
from importlib.metadata import version
from types import ModuleType
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from batchgen.errors import SetupError, UsageError
from batchgen.options import shown
from batchgen.text.stopping import banned_ids
from batchgen.text.tokenizer import Tokenizer
from batchgen.text.trial import why_unreadable
from batchgen.types import PATTERN_NAMES, Guide, Mask, SamplingParams, make_mask

if TYPE_CHECKING:
    import llguidance

Kind: TypeAlias = str  # regex, json_schema or grammar

MAX_CHOICE_BYTES = 2**16  # of all choices of a row
MAX_PIECE = 256  # bytes of a token of a choice
MAX_MASKS = 64  # of 6 KB each for GPT-2's vocabulary, that are kept of a row's choices

# as json.dumps writes it, or without the spaces: if a small model may write spaces, it writes nothing else
_JSON_STYLE = {"item_separator": ", ?", "key_separator": ": ?", "whitespace_flexible": False}
MAX_REASON = 200  # characters of llguidance's
_LARK_OPTIONS = '%llguidance {"no_forcing": true}\n'  # every way to cut a text into tokens is allowed


def pattern_of(params: SamplingParams) -> str | None:
    """The parameter that says what the completion may be; None if there is none, or no token is generated."""
    return next((name for name in PATTERN_NAMES if getattr(params, name) and params.max_tokens), None)


class Vocabulary:
    """The tokens of a tokenizer, as guides see them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.n_vocab = tokenizer.n_vocab
        self.ends = tuple(token for token in tokenizer.special.end if tokenizer.has_id(token))
        left_out = tokenizer.special_ids.union(self.ends)
        self.tokens = [
            tokenizer.token_bytes.get(token, b"") if token not in left_out else b"" for token in range(self.n_vocab)
        ]

    def mask(self, ids: Iterable[int]) -> Mask:
        return make_mask(ids, self.n_vocab)

    @cached_property
    def usable(self) -> Mask:
        """The tokens that have a text."""
        return self.mask(token for token, data in enumerate(self.tokens) if data)

    @cached_property
    def end_mask(self) -> Mask:
        return self.mask(self.ends)

    @cached_property
    def ids_of(self) -> dict[bytes, list[int]]:
        """Bytes -> the tokens that have them: an empty list for bytes with which tokens only begin."""
        found: dict[bytes, list[int]] = {}
        for token, data in enumerate(self.tokens):
            if 0 < len(data) <= MAX_PIECE:
                for end in range(1, len(data)):
                    found.setdefault(data[:end], [])
                found.setdefault(data, []).append(token)
        return found

    def pieces(self, data: bytes, start: int) -> Iterator[tuple[int, list[int]]]:
        """The index after each piece of data that begins at `start` and is a token, and the tokens with these bytes."""
        for end in range(start + 1, len(data) + 1):
            ids = self.ids_of.get(data[start:end])
            if ids is None:
                return
            if ids:
                yield end, ids

    @cached_property
    def for_patterns(self) -> "llguidance.LLTokenizer":
        """The vocabulary in llguidance, with one more token, an end token that no model has."""
        made: llguidance.LLTokenizer = _load().LLTokenizer(_Tokens([*self.tokens, b"<end>"]), n_vocab=self.n_vocab + 1)
        return made


class _Tokens:
    """The attributes of a tokenizer that LLTokenizer needs."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokens: list[bytes]) -> None:
        self.tokens, self.eos_token_id = tokens, len(tokens) - 1
        self.special_token_ids = [self.eos_token_id]

    def __call__(self, _text: object) -> list[int]:
        return []  # asked only if tokens were forced


def _load() -> ModuleType:
    try:
        import llguidance
    except ImportError as error:
        what = "regex, json_schema and grammar need llguidance, which is not installed"
        raise SetupError(f"{what}; install it with: pip install llguidance") from error
    return llguidance


def installed_version() -> str:
    """llguidance's, which decides what tokens may come; SetupError without the extra."""
    return version(_load().__name__)


@lru_cache(maxsize=4)
def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    return Vocabulary(tokenizer)


# ---- choices


class Choices(Guide):
    """Leads to one of some texts."""

    def __init__(self, texts: tuple[str, ...], vocabulary: Vocabulary, before: bytes = b"") -> None:
        self.vocabulary, self._done = vocabulary, b""
        self._texts = {before + text.encode(): text for text in texts}
        if (size := sum(map(len, self._texts))) > MAX_CHOICE_BYTES:
            raise UsageError(f"choices have {size} bytes in all, and {MAX_CHOICE_BYTES} is the most; shorten them")
        self._needed = {data: self._count(data) for data in self._texts}
        self._mask = lru_cache(MAX_MASKS)(self._make_mask)
        for data, text in self._texts.items():
            if self._needed[data][0] == math.inf:
                raise UsageError(f"choices {shown(text)} cannot be made of this vocabulary's tokens; leave it out")
            if not vocabulary.ends and (longer := next(self._longer(data), None)):
                what = f"choices {shown(self._texts[longer])} begins with {shown(text)}, which would always end it"
                remedy = "change one, for example end both with a full stop"
                raise UsageError(f"{what}: this model has no end token; {remedy}")

    def _count(self, data: bytes) -> list[float]:
        """For each index: the fewest tokens that make the rest of the text; infinite if no tokens do."""
        needed = [math.inf] * len(data) + [0.0]
        for start in reversed(range(len(data))):
            needed[start] = 1 + min((needed[end] for end, _ in self.vocabulary.pieces(data, start)), default=math.inf)
        return needed

    def _longer(self, data: bytes) -> Iterator[bytes]:
        return (one for one in self._texts if len(one) > len(data) and one.startswith(data))

    def check_length(self, max_tokens: int) -> None:
        """Raise UsageError for a choice that needs more than max_tokens."""
        data = max(self._texts, key=lambda one: self._needed[one][0])
        if (needed := int(self._needed[data][0])) > max_tokens:
            what = f"choices {shown(self._texts[data])} needs {needed} tokens or more, and max_tokens is {max_tokens}"
            raise UsageError(f"{what}; raise it to {needed} or leave the choice out")

    def copy(self) -> "Choices":
        return copy(self)

    def _make_mask(self, done: bytes) -> Mask:
        ids = list(self.vocabulary.ends) if done in self._texts else []
        for data in self._longer(done):
            for end, tokens in self.vocabulary.pieces(data, len(done)):
                ids += tokens if self._needed[data][end] < math.inf else []
        return self.vocabulary.mask(ids)

    def allowed(self) -> Mask:
        return self._mask(self._done)

    def may_end(self) -> bool:
        return self._done in self._texts

    def advance(self, token: int) -> bool:
        self._done += self.vocabulary.tokens[token]
        return self.may_end() and next(self._longer(self._done), None) is None


# ---- patterns


def _one_of(text: str) -> str:
    """A regular expression of a text."""
    return "".join(f"\\x{{{ord(character):x}}}" for character in text)


def _to_grammar(kind: Kind, text: str, before: str) -> str:
    """The pattern in llguidance's form, preceded by a text."""
    first = f"/{_one_of(before)}/ " if before else ""
    if kind == "regex":
        body = f"{first}TEXT\nTEXT: /{_load().regex_to_lark(text)}/"
        return json.dumps({"grammars": [{"lark_grammar": f"{_LARK_OPTIONS}start: {body}"}]})
    pattern: dict[str, object] = {"lark_grammar": text}
    if kind == "json_schema":
        schema = json.loads(text)
        style = schema.get("x-guidance", {})
        pattern = {"json_schema": schema | {"x-guidance": _JSON_STYLE | style if isinstance(style, dict) else style}}
    whole = {"lark_grammar": f"{_LARK_OPTIONS}start: {first}@pattern"}
    return json.dumps({"grammars": [whole, {"name": "pattern"} | pattern]})


class Pattern(Guide):
    """Leads along a regular expression, a JSON schema or a grammar."""

    def __init__(self, kind: Kind, text: str, vocabulary: Vocabulary, before: bytes = b"") -> None:
        self.vocabulary = vocabulary
        if kind == "regex" and (len(text) - len(text.rstrip("\\"))) % 2:  # which regex_to_lark leaves out
            raise UsageError(f"regex {shown(text)} cannot be used: no character follows the last backslash; correct it")
        api = _load()
        limits = api.LLParserLimits(verbose_errors=False)
        try:
            grammar = _to_grammar(kind, text, before.decode())
        except UnicodeDecodeError as error:
            what = f"{kind} cannot go on from a part of a character, which heal draws again"
            raise UsageError(f"{what}; leave heal out, or end the prompt with the whole character") from error
        self._matcher = api.LLMatcher(vocabulary.for_patterns, grammar, log_level=0, limits=limits)
        if self._matcher.is_error():
            is_gbnf = kind == "grammar" and "::=" in text
            remedy = "this is GBNF: write it in Lark's form, start: ..." if is_gbnf else "correct it"
            raise UsageError(f"{kind} {shown(text)} cannot be used: {_reason(kind, self._matcher)}; {remedy}")
        may_continue, is_complete = self._look()
        if not may_continue:
            what = "matches no text but the empty one" if is_complete else "matches no text that this model can write"
            raise UsageError(f"{kind} {shown(text)} {what}; correct it")

    def _look(self) -> tuple[bool, bool]:
        """Find the tokens that may come next; whether any of a text is among them, and whether the text is complete."""
        words = np.zeros(-(-(self.vocabulary.n_vocab + 1) // 32), np.uint32)
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        mask = words[: len(self.vocabulary.usable)] & self.vocabulary.usable
        is_complete = self.may_end()
        self._mask = mask | self.vocabulary.end_mask if is_complete else mask
        return bool(mask.any()), is_complete

    @property
    def error(self) -> str | None:
        """Why the pattern cannot be followed further, if so."""
        return _reason("", self._matcher) if self._matcher.is_error() else None

    def copy(self) -> "Pattern":
        twin = copy(self)
        twin._matcher = self._matcher.deep_copy()
        return twin

    def allowed(self) -> Mask:
        return self._mask

    def may_end(self) -> bool:
        return bool(self._matcher.is_accepting())

    def advance(self, token: int) -> bool:
        self._matcher.consume_token(token)
        may_continue, is_complete = self._look()
        return is_complete and not (may_continue and self.vocabulary.ends)


_EXCERPT = re.compile(r"\n\s*\d+ \| .*|\n<non-verbose/>.*|; following special tokens.*", re.DOTALL)
_PLACE = re.compile(r"(?:at )?(\d+)\((\d+)\): ")


def _reason(kind: Kind, matcher: "llguidance.LLMatcher") -> str:
    """llguidance's error on one line; lines and columns stay only for a grammar, where they are the user's."""
    text = _EXCERPT.sub("", str(matcher.get_error()))
    found = _PLACE.match(text)
    place = f"line {found[1]}, column {found[2]}: " if found and kind == "grammar" else ""
    reason = text[found.end() :] if found else text
    if "regex parse error" in reason:
        reason = reason.rpartition("error: ")[2]
    if "precomputation failed" in reason:
        reason = "it is too large"
    return place + " ".join(reason.split())[:MAX_REASON]


@lru_cache(maxsize=256)
def _compile(kind: Kind, value: object, tokenizer: Tokenizer, before: bytes) -> Choices | Pattern | str:
    """Why it cannot be used, as text: what is raised is not kept, and many rows may have the same bad pattern."""
    vocabulary = vocabulary_of(tokenizer)
    try:
        if isinstance(value, tuple):
            return Choices(value, vocabulary, before)
        return Pattern(kind, str(value), vocabulary, before)
    except UsageError as error:
        return str(error)


def compile_guide(params: SamplingParams, tokenizer: Tokenizer, before: bytes = b"") -> Choices | Pattern | None:
    """The guide at the beginning of a completion, to be copied for each; None: any token may come.

    before: bytes that stand before the completion, whole characters. Raises UsageError for what cannot be met,
    SetupError without the extra.
    """
    kind = pattern_of(params)
    found = None if kind is None else _compile(kind, getattr(params, kind), tokenizer, before)
    if isinstance(found, str):
        raise UsageError(found)
    return found


def try_out(params: SamplingParams, tokenizer: Tokenizer, before: bytes = b"") -> Choices | Pattern | None:
    """`compile_guide` of a pattern that nobody has read yet: UsageError too for one that would take too long."""
    kind = pattern_of(params)
    if kind in ("json_schema", "grammar"):  # a regular expression is bounded by its length and llguidance's limits
        _load()
        text = str(getattr(params, kind))
        if reason := why_unreadable(_to_grammar(kind, text, "")):
            raise UsageError(f"{kind} {shown(text)} cannot be used: {reason}; make it simpler")
    return compile_guide(params, tokenizer, before)


def find_failure(params: SamplingParams, tokenizer: Tokenizer, token_ids: Seq[int], before: bytes = b"") -> str | None:
    """Why no token may follow these tokens of a completion, if the reason is that the pattern became too large."""
    first = compile_guide(params, tokenizer, before)
    if not isinstance(first, Pattern):
        return None
    guide = first.copy()
    for token in token_ids:
        guide.advance(token)
    return guide.error


def check_pattern(params: SamplingParams, tokenizer: Tokenizer, max_tokens: int, before: bytes = b"") -> None:
    """Raise UsageError for a pattern that cannot be met with these parameters."""
    guide = try_out(params, tokenizer, before)
    if guide is None:
        return
    if isinstance(guide, Choices):
        guide.check_length(max_tokens)
    first = guide.allowed() & ~guide.vocabulary.mask(banned_ids(params.bad_words, tokenizer))
    if params.allowed_token_ids:
        first &= guide.vocabulary.mask(params.allowed_token_ids)
    if not first.any():
        given = [name for name in ("allowed_token_ids", "bad_words") if getattr(params, name)]
        what = f"{' and '.join(given)} leave no token with which {pattern_of(params)} may begin"
        raise UsageError(f"{what}; change one of these")
