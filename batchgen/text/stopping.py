"""The end of a completion's text: stop strings, whole characters; the tokens of bad words and of breakers.

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


class Prompt(Protocol):
    """The part of engine.sequence.Prompt that this module uses."""

    @property
    def given(self) -> bytes: ...


class Sequence(Protocol):
    """The part of engine.sequence.Sequence that this module uses."""

    @property
    def params(self) -> SamplingParams: ...

    @property
    def token_ids(self) -> list[int]: ...

    @property
    def prompt(self) -> Prompt: ...


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
    """Searches bytes that arrive in pieces for the first complete stop string; skips the first n_skipped bytes."""

    def __init__(self, stops: Seq[bytes], n_skipped: int = 0) -> None:
        self._n_skipped = n_skipped
        self._stops = stops
        self._n_kept = max(map(len, stops)) - 1  # a stop string may begin in this many last bytes
        self._tail = b""

    def push(self, data: bytes, *, can_stop: bool = True) -> bool:
        """Whether a stop string ends in this piece; with can_stop False, one that does never counts."""
        if self._n_skipped:
            data, self._n_skipped = data[self._n_skipped :], max(self._n_skipped - len(data), 0)
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
        matcher = self._matchers.get(sequence) or self._matcher(sequence)
        data = self._tokenizer.decode_bytes(sequence.token_ids[-1:], skip_special=params.skip_special_tokens)
        has_stopped = matcher.push(data, can_stop=n > params.min_tokens)
        if has_stopped or n >= params.max_tokens or params.searches:  # nothing is kept of a beam, which may fork
            self._matchers.pop(sequence, None)
        else:
            self._matchers[sequence] = matcher
        return "stop" if has_stopped else None

    def _matcher(self, sequence: Sequence) -> StopMatcher:
        """That of a sequence which has its first new token: a stop string may begin in those before it."""
        stops, before = _encode_stops(sequence.params.stop), sequence.token_ids[:-1]
        matcher, skip = StopMatcher(stops, len(sequence.prompt.given)), sequence.params.skip_special_tokens
        matcher.push(self._tokenizer.decode_bytes(before, skip_special=skip), can_stop=False)
        return matcher


def whole_characters(data: bytes) -> str:
    r"""b"caf\xc3\xa9 \xc3" -> "café ": without an incomplete last character; other invalid bytes become U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = decoder.decode(data)
    rest = decoder.getstate()[0].decode("utf-8", "replace")
    return text + rest if len(rest) > 1 else text  # the decoder also holds back half of a surrogate: it is invalid


def _find_stop(
    token_ids: Seq[int], params: SamplingParams, tokenizer: Tokenizer, n_given: int
) -> tuple[bytes, tuple[int, int] | None]:
    """The text of a completion's tokens, and find_stop in it, after the text of the first min_tokens."""
    skip = params.skip_special_tokens
    data = tokenizer.decode_bytes(token_ids, skip_special=skip)[n_given:]
    if not params.stop:
        return data, None
    start = len(tokenizer.decode_bytes(token_ids[: params.min_tokens], skip_special=skip)) - n_given
    return data, find_stop(data, _encode_stops(params.stop), max(start, 0))


def has_stop(token_ids: Seq[int], params: SamplingParams, tokenizer: Tokenizer, n_given: int = 0) -> bool:
    """Whether a stop string ends a completion within these tokens."""
    return _find_stop(token_ids, params, tokenizer, n_given)[1] is not None


def completed_text(
    token_ids: Seq[int], params: SamplingParams, tokenizer: Tokenizer, n_given: int = 0
) -> tuple[str, str | None]:
    """The text of a completion, and the stop string that ended it, if any; see whole_characters.

    n_given: so many bytes of the first tokens are the end of the prompt; see healing.py.
    """
    data, found = _find_stop(token_ids, params, tokenizer, n_given)
    if found:
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


def banned_ids(words: tuple[str, ...], tokenizer: Tokenizer) -> set[int]:
    """The tokens that these bad words ban everywhere."""
    return {word[0] for word in bad_word_ids(words, tokenizer) if len(word) == 1}


MAX_TAIL = 20  # tokens of a breaker after its first, as in llama.cpp


def breaker_ids(texts: tuple[str, ...], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """The token sequences of DRY's breakers, as llama.cpp finds them.

    Each token that has the text in it, and each that ends with its beginning, before the tokens of the rest.
    """
    return tuple(dict.fromkeys(ids for text in texts for ids in _breaker_ids(text, tokenizer)))


@lru_cache(maxsize=1024)
def _breaker_ids(text: str, tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    data, words = text.encode(), _words_by_end(tokenizer)
    found = {token for same in words.values() for token, word in same if data in word}
    sequences: list[tuple[int, ...]] = [(token,) for token in found]
    for n in range(1, len(data)):
        heads = [token for token, word in words.get(data[n - 1], ()) if word.endswith(data[:n]) and token not in found]
        try:
            tail = tokenizer.encode_part(data[n:].decode("utf-8", "replace"))[:MAX_TAIL] if heads else []
        except InputError:  # a byte that the vocabulary lacks
            continue
        sequences += [(head, *tail) for head in heads]
    return tuple(sequences)


@lru_cache(maxsize=4)
def _words_by_end(tokenizer: Tokenizer) -> dict[int, list[tuple[int, bytes]]]:
    """The last byte of tokens -> their ids and bytes."""
    words: dict[int, list[tuple[int, bytes]]] = {}
    for token in filter(tokenizer.has_id, range(tokenizer.n_vocab)):
        if word := tokenizer.decode_bytes([token]):
            words.setdefault(word[-1], []).append((token, word))
    return words
