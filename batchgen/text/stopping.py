"""The end of a completion's text: stop strings, whole characters, and the tokens of bad words.

The engine sees tokens only. Stop strings are searched in the bytes of the tokens, so the result does not depend on how
the tokens cut the text. If a text has several stop strings, the one that ends first counts.
"""

import codecs
from collections.abc import Sequence as Seq
from functools import lru_cache
from typing import Protocol

from batchgen.errors import InputError
from batchgen.text.tokenizer import Tokenizer
from batchgen.types import FinishReason, SamplingParams


class Sequence(Protocol):
    """The part of engine.sequence.Sequence that this module uses."""

    @property
    def params(self) -> SamplingParams: ...

    @property
    def token_ids(self) -> list[int]: ...


@lru_cache
def _encode_stops(stops: tuple[str, ...]) -> tuple[bytes, ...]:
    return tuple(stop.encode() for stop in stops)


def find_stop(data: bytes, stops: Seq[bytes], start: int = 0) -> tuple[int, int] | None:
    """(begin, end) of the stop string that ends first after `start`; of several with that end, the longest.

    data=b"abcd", stops=[b"abcd", b"bc"] -> (1, 3)
    """
    begins = [(data.find(stop, max(start - len(stop) + 1, 0)), len(stop)) for stop in stops]
    found = [(begin, begin + length) for begin, length in begins if begin >= 0]
    return min(found, key=lambda match: (match[1], match[0]), default=None)


class StopMatcher:
    """Searches bytes that arrive in pieces for the first complete stop string."""

    def __init__(self, stops: Seq[bytes]) -> None:
        self._stops = stops
        self._n_kept = max(map(len, stops)) - 1  # a stop string may begin in this many last bytes
        self._tail = b""

    def push(self, data: bytes, *, can_stop: bool = True) -> bool:
        """Whether a stop string ends in this piece; with can_stop False, one that does never counts."""
        seen = self._tail + data
        has_stopped = can_stop and find_stop(seen, self._stops, len(self._tail)) is not None
        self._tail = seen[max(len(seen) - self._n_kept, 0) :]
        return has_stopped


class StopStrings:
    """The engine's should_stop: ends a sequence with the token that completes one of its stop strings."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._matchers: dict[Sequence, StopMatcher] = {}

    def __call__(self, sequence: Sequence) -> FinishReason | None:
        params, n = sequence.params, len(sequence.token_ids)
        if not params.stop:
            return None
        if sequence not in self._matchers:
            self._matchers[sequence] = self._matcher(sequence)
        data = self._tokenizer.decode_bytes(sequence.token_ids[-1:], skip_special=params.skip_special_tokens)
        has_stopped = self._matchers[sequence].push(data, can_stop=n > params.min_tokens)
        if has_stopped or n >= params.max_tokens:
            del self._matchers[sequence]
        return "stop" if has_stopped else None

    def _matcher(self, sequence: Sequence) -> StopMatcher:
        """That of a sequence which has its first new token: a stop string may begin in those before it."""
        matcher, before = StopMatcher(_encode_stops(sequence.params.stop)), sequence.token_ids[:-1]
        skip = sequence.params.skip_special_tokens
        matcher.push(self._tokenizer.decode_bytes(before, skip_special=skip), can_stop=False)
        return matcher


def whole_characters(data: bytes) -> str:
    r"""b"caf\xc3\xa9 \xc3" -> "café ": without an incomplete last character; other invalid bytes become U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = decoder.decode(data)
    rest = decoder.getstate()[0].decode("utf-8", "replace")
    return text + rest if len(rest) > 1 else text  # the decoder also holds back half of a surrogate: it is invalid


def _find_stop(
    data: bytes, token_ids: Seq[int], params: SamplingParams, tokenizer: Tokenizer
) -> tuple[int, int] | None:
    """find_stop in data, the text of these tokens, after that of the first min_tokens."""
    start = len(tokenizer.decode_bytes(token_ids[: params.min_tokens], skip_special=params.skip_special_tokens))
    return find_stop(data, _encode_stops(params.stop), start)


def has_stop(token_ids: Seq[int], params: SamplingParams, tokenizer: Tokenizer) -> bool:
    """Whether a stop string ends a completion within these tokens."""
    data = tokenizer.decode_bytes(token_ids, skip_special=params.skip_special_tokens)
    return bool(params.stop) and _find_stop(data, token_ids, params, tokenizer) is not None


def completed_text(token_ids: Seq[int], params: SamplingParams, tokenizer: Tokenizer) -> tuple[str, str | None]:
    """The text of a completion, and the stop string that ended it, if any; see whole_characters."""
    data = tokenizer.decode_bytes(token_ids, skip_special=params.skip_special_tokens)
    if params.stop and (found := _find_stop(data, token_ids, params, tokenizer)):
        begin, end = found
        return data[: end if params.include_stop else begin].decode("utf-8", "replace"), data[begin:end].decode()
    return whole_characters(data), None


@lru_cache(maxsize=1024)
def bad_word_ids(words: tuple[str, ...], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """The token sequences of each word, without a space before it and, as within a text, with one."""
    spellings = dict.fromkeys(text for word in words for text in (word, word if word[0].isspace() else f" {word}"))
    sequences = []
    for text in spellings:
        try:
            sequences.append(tuple(tokenizer.encode_part(text)))
        except InputError:  # a byte that the vocabulary lacks cannot be generated
            continue
    return tuple(dict.fromkeys(sequences))
