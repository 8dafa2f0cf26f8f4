"""Tokens beside BPE's: those that stand in a text as they are, stand before every prompt, or end a completion.

They are found as Hugging Face's `tokenizers` finds them. `special_tokens.json` holds them; OpenAI's models have none.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import regex  # type: ignore[import-untyped]  # it ships no types

SPECIAL_TOKENS = "special_tokens.json"

SPACES = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"
_WORD = regex.compile(r"[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]")  # \w of `tokenizers`


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that stands in a text as it is; the names are those of Hugging Face's `tokenizers`."""

    id: int
    content: str
    special: bool = False  # a mark such as <|endoftext|>; others are words
    single_word: bool = False  # found only where no word goes on before or after it
    lstrip: bool = False  # takes the spaces before it
    rstrip: bool = False  # takes the spaces after it
    normalized: bool = True  # searched after those that are not


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """What a model's tokenizer does besides BPE."""

    added: tuple[AddedToken, ...] = ()
    begin: tuple[int, ...] = ()  # stand before every prompt
    end: tuple[int, ...] = ()  # each ends a completion
    start: int | None = None  # a completion without a prompt begins after it
    unknown: int | None = None  # stands for a byte that the vocabulary lacks
    prefix_space: bool = False  # a text that does not begin with a space gets one
    parse: bool = True  # whether special tokens in a text are found unless asked otherwise

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "SpecialTokens":
        """The reverse; raises TypeError or ValueError for what to_json does not write."""
        made = replace(cls(), **values)
        added = tuple(AddedToken(**token) for token in values.get("added", ()))
        ids = [*made.begin, *made.end, *(token.id for token in added)]
        ids += [token for token in (made.start, made.unknown) if token is not None]
        flags = [getattr(made, name) for name in ("prefix_space", "parse")]
        flags += [getattr(token, field.name) for token in added for field in fields(AddedToken)[2:]]
        if not all(type(token) is int and token >= 0 for token in ids) or not all(type(flag) is bool for flag in flags):
            raise ValueError("an id is not a whole number, or a flag neither true nor false")
        if not all(isinstance(token.content, str) and token.content for token in added):
            raise ValueError("a token has no content")
        return replace(made, added=added, begin=tuple(made.begin), end=tuple(made.end))


class Finder:
    """Cuts texts at the added tokens in them, as `tokenizers` does: of several at one place, the longest counts."""

    def __init__(self, added: Sequence[AddedToken]) -> None:
        self._tokens = {token.content: token for token in added}
        self._has_words = not all(token.special for token in added)
        passes = [[text for text, token in self._tokens.items() if token.normalized is late] for late in (False, True)]
        longest_first = [sorted(contents, key=len, reverse=True) for contents in passes if contents]
        self._passes = [re.compile("|".join(map(re.escape, contents))) for contents in longest_first]

    def split(self, text: str, *, with_special: bool = True) -> list[str | AddedToken]:
        """Texts and tokens in order; without with_special, special tokens are text.

        "a<|end|>b" -> ["a", AddedToken(256, "<|end|>"), "b"]
        """
        pieces: list[str | AddedToken] = [text] if text else []
        for pattern in self._passes if with_special or self._has_words else ():
            pieces = [
                part
                for piece in pieces
                for part in (self._cut(piece, pattern, with_special) if isinstance(piece, str) else (piece,))
            ]
        return pieces

    def _cut(self, text: str, pattern: re.Pattern[str], with_special: bool) -> Iterator[str | AddedToken]:
        done = 0
        for match in pattern.finditer(text):
            begin, end = match.span()
            token = self._tokens[match[0]]
            if token.special and not with_special:
                continue
            if token.single_word and (_is_word(text[begin - 1 : begin]) or _is_word(text[end : end + 1])):
                continue
            while token.lstrip and begin > done and text[begin - 1] in SPACES:
                begin -= 1
            if token.lstrip:
                begin = max(begin, done)
            while token.rstrip and end < len(text) and text[end] in SPACES:
                end += 1
            if begin >= end:  # the spaces that it is belong to the token before
                continue
            if done < begin:
                yield text[done:begin]
            yield token
            done = end
        if done < len(text):
            yield text[done:]


def _is_word(character: str) -> bool:
    return bool(_WORD.match(character))
