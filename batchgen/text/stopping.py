"""Where a completion's text ends, and what must not be in it: stop strings, whole characters, bad words.

The engine sees tokens alone. Here their bytes are searched, so that a stop string is found however the tokens cut it,
and what is found does not depend on how they do: of the stop strings in a text, the one that ends first counts.
"""

import codecs
from collections.abc import Sequence as Seq
from functools import lru_cache
from typing import Protocol

from batchgen.errors import InputError
from batchgen.types import FinishReason, SamplingParams


class Sequence(Protocol):
    """What is asked of a sequence of the engine here."""

    @property
    def params(self) -> SamplingParams: ...

    @property
    def token_ids(self) -> list[int]: ...


class Decoder(Protocol):
    """What is asked of a tokenizer here."""

    def encode(self, text: str, /) -> list[int]: ...

    def decode_bytes(self, ids: Seq[int], /) -> bytes: ...


def first_stop(data: bytes, stops: Seq[bytes], start: int = 0) -> tuple[int, int] | None:
    """(begin, end) of the stop string that ends first past `start`, of two that end there the longer; None without one.

    data=b"abcd", stops=[b"abcd", b"bc"] -> (1, 3)
    """
    begins = [(data.find(stop, max(start - len(stop) + 1, 0)), len(stop)) for stop in stops]
    found = [(begin, begin + length) for begin, length in begins if begin >= 0]
    return min(found, key=lambda match: (match[1], match[0]), default=None)


class StopMatcher:
    """Watches bytes that come in pieces for the first complete stop string."""

    def __init__(self, stops: Seq[bytes]) -> None:
        self._stops = stops
        self._kept = max(map(len, stops)) - 1  # bytes that a stop string may have begun in
        self._tail = b""

    def push(self, data: bytes, *, heed: bool = True) -> bool:
        """Whether a stop string ends in this piece; one that ends in a piece not to be heeded never counts."""
        seen = self._tail + data
        stopped = heed and first_stop(seen, self._stops, len(self._tail)) is not None
        self._tail = seen[len(seen) - self._kept :] if len(seen) > self._kept else seen
        return stopped


class StopStrings:
    """Tells the engine to end a sequence with the token that completes one of its stop strings."""

    def __init__(self, tokenizer: Decoder) -> None:
        self._tokenizer = tokenizer
        self._matchers: dict[Sequence, StopMatcher] = {}

    def __call__(self, sequence: Sequence) -> FinishReason | None:
        params, n = sequence.params, len(sequence.token_ids)
        if not params.stop:
            return None
        if sequence not in self._matchers:
            self._matchers[sequence] = StopMatcher(as_bytes(params.stop))
        data = self._tokenizer.decode_bytes(sequence.token_ids[-1:])
        stopped = self._matchers[sequence].push(data, heed=n > params.min_tokens)
        if stopped or n >= params.max_tokens:
            del self._matchers[sequence]
        return "stop" if stopped else None


@lru_cache
def as_bytes(texts: tuple[str, ...]) -> tuple[bytes, ...]:
    return tuple(text.encode() for text in texts)


def completed_text(token_ids: Seq[int], params: SamplingParams, tokenizer: Decoder) -> tuple[str, str | None]:
    """The text of a completion, and the stop string that ended it, if one did.

    It ends before that string, or with include_stop after it. A last character of which bytes are missing is left
    out: what is there of it is no text. Other bytes that are not UTF-8 become U+FFFD.
    """
    data = tokenizer.decode_bytes(token_ids)
    if params.stop:
        stops = as_bytes(params.stop)
        found = first_stop(data, stops, len(tokenizer.decode_bytes(token_ids[: params.min_tokens])))
        if found:
            begin, end = found
            text = data[: end if params.include_stop else begin].decode("utf-8", "replace")
            return text, data[begin:end].decode()
    return whole_characters(data), None


def whole_characters(data: bytes) -> str:
    r"""b"caf\xc3\xa9 \xc3" -> "café "; an incomplete character at the end goes, other invalid bytes are U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = decoder.decode(data)
    rest = decoder.getstate()[0].decode("utf-8", "replace")
    return text + rest if len(rest) > 1 else text  # it keeps back half of a surrogate too, which nothing completes


@lru_cache(maxsize=1024)
def bad_word_ids(words: tuple[str, ...], tokenizer: Decoder) -> tuple[tuple[int, ...], ...]:
    """The token sequences of the words as they are and after a space, as GPT-2 writes them within a text.

    A word with a byte that the vocabulary lacks cannot be generated, and has none.
    """
    spelled = dict.fromkeys(text for word in words for text in (word, word if word[0].isspace() else f" {word}"))
    sequences = []
    for text in spelled:
        try:
            sequences.append(tuple(tokenizer.encode(text)))
        except InputError:
            continue
    return tuple(dict.fromkeys(sequences))
