"""text/stopping.py: a text ends at the same stop string however its tokens cut it."""

import json
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from batchgen.engine.sequence import Prompt, Sequence
from batchgen.text.stopping import (
    StopMatcher,
    StopStrings,
    bad_word_ids,
    breaker_ids,
    completed_text,
    find_stop,
    whole_characters,
)
from batchgen.text.tokenizer import Tokenizer
from batchgen.types import SamplingParams
from tests.support.models import write_byte_vocabulary
from tests.support.vocabulary import gpt2_tokenizer

ALPHABET = "ab\né☃🦊"
TEXTS = st.text(ALPHABET, max_size=24)
STOPS = st.lists(st.text(ALPHABET, min_size=1, max_size=5), min_size=1, max_size=8)


class Pieces:
    """A tokenizer whose token i is piece i, of any bytes."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces

    def encode_part(self, text: str) -> list[int]:
        raise AssertionError

    def decode_bytes(self, ids, *, skip_special=False) -> bytes:
        return b"".join(self.pieces[token] for token in ids)


def naive_find_stop(data: bytes, stops: list[bytes], start: int) -> tuple[int, int] | None:
    """Tries every place: the first end after start, then the first beginning."""
    for end in range(start + 1, len(data) + 1):
        for begin in range(end):
            if data[begin:end] in stops:
                return begin, end
    return None


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[a:b] for a, b in zip(edges, edges[1:], strict=False)]


@given(st.binary(max_size=20) | TEXTS.map(str.encode), STOPS, st.integers(0, 8))
def test_the_stop_string_that_ends_first_is_found(data, stops, start):
    encoded = [stop.encode() for stop in stops]
    assert find_stop(data, encoded, start) == naive_find_stop(data, encoded, start)


def test_the_longer_of_two_stop_strings_with_the_same_end_is_found():
    assert find_stop(b"xabc", [b"c", b"abc", b"bc"]) == (1, 4)
    assert find_stop(b"abcd", [b"abcd", b"bc"]) == (1, 3)


@given(TEXTS, STOPS, st.lists(st.integers(0, 100), max_size=30), st.integers(0, 6))
def test_a_stream_stops_at_the_piece_that_completes_the_stop_string(text, stops, places, n_ignored):
    """Pieces may end within characters and may be empty."""
    encoded = [stop.encode() for stop in stops]
    pieces = cut(text.encode(), places)
    start = len(b"".join(pieces[:n_ignored]))
    matcher = StopMatcher(encoded)
    stopped = next((i for i, p in enumerate(pieces) if matcher.push(p, can_stop=i >= n_ignored)), None)
    found = naive_find_stop(text.encode(), encoded, start)
    if found is None:
        assert stopped is None
    else:
        assert stopped is not None
        assert len(b"".join(pieces[:stopped])) < found[1] <= len(b"".join(pieces[: stopped + 1]))


@given(TEXTS, STOPS, st.lists(st.integers(0, 100), max_size=30), st.integers(0, 4), st.booleans())
def test_the_text_does_not_depend_on_its_tokens(text, stops, places, min_tokens, include):
    """A sequence that stops early has the same text as the whole sequence."""
    pieces = cut(text.encode(), places)
    params = SamplingParams(
        max_tokens=len(pieces), min_tokens=min(min_tokens, len(pieces)), stop=tuple(stops), include_stop=include
    )
    tokenizer = Pieces(pieces)
    sequence = Sequence(Prompt(0, (0,), params, (0,)), 0, 0)
    should_stop = StopStrings(tokenizer)
    for token in range(len(pieces)):
        sequence.token_ids.append(token)
        if reason := should_stop(sequence):
            break
    assert not should_stop._matchers
    found, matched = completed_text(sequence.token_ids, params, tokenizer)
    assert (found, matched) == completed_text(range(len(pieces)), params, tokenizer)
    assert (reason == "stop") == (matched is not None)
    if matched is not None:
        assert matched in stops
        assert text.startswith(found)
        assert found.endswith(matched) if include else text[len(found) :].startswith(matched)
    else:
        assert found == text


@given(st.binary(max_size=12))
@example(b"a\xed\xa0")
def test_whole_characters_leaves_out_only_an_incomplete_last_character(data):
    found, whole = whole_characters(data), data.decode("utf-8", "replace")
    assert whole in (found, found + "\ufffd")
    if whole != found:  # then some bytes complete the last character
        tails = (
            bytes([a, b, c][:n]) for n in (1, 2, 3) for a in (0x80, 0x9F, 0xA0, 0xBF) for b in (0x80,) for c in (0x80,)
        )
        assert any(not (data + tail).decode("utf-8", "replace").endswith("\ufffd") for tail in tails)


@pytest.mark.parametrize("character", ["é", "☃", "🦊"])
def test_a_completion_never_ends_within_a_character(character):
    data = ("ab" + character).encode()
    for length in range(len(data) + 1):
        assert whole_characters(data[:length]) == ("ab" + character if length == len(data) else "ab"[:length])
    assert whole_characters(b"a\xe2\x98b") == "a\ufffdb"
    assert whole_characters(b"a\x83") == "a\ufffd"


@given(st.text(ALPHABET, max_size=24), STOPS, st.lists(st.integers(0, 99), max_size=9), st.integers(0, 4))
def test_a_beam_stops_where_a_sequence_does_and_nothing_is_kept_of_it(text, stops, places, min_tokens):
    pieces = [piece for piece in cut(text.encode(), places) if piece]
    found = []
    for num_beams in (1, 2):
        params = SamplingParams(stop=tuple(stops), num_beams=num_beams, min_tokens=min_tokens)
        should_stop = StopStrings(Pieces(pieces))
        sequence = Sequence(Prompt(0, (0,), params, (0,)), 0, 0)
        reasons = []
        for token in range(len(pieces)):
            sequence.token_ids.append(token)
            reasons.append(should_stop(sequence))
            if reasons[-1]:
                break
        found.append(reasons)
    assert found[0] == found[1]
    assert not should_stop._matchers


def test_a_sequence_without_stop_strings_needs_no_matcher():
    sequence = Sequence(Prompt(0, (0,), SamplingParams(), (0,)), 0, 0, token_ids=[1])
    should_stop = StopStrings(Pieces([]))
    assert should_stop(sequence) is None
    assert not should_stop._matchers


def test_bad_words_are_encoded_with_and_without_a_space_before_them():
    tokenizer = gpt2_tokenizer()
    words = ("fox", " fox", "ice cream", "\n")
    assert set(bad_word_ids(words, tokenizer)) == {
        tuple(tokenizer.encode(text)) for text in ("fox", " fox", "ice cream", " ice cream", "\n")
    }
    assert bad_word_ids((), tokenizer) == ()


def test_a_bad_word_with_a_byte_that_the_vocabulary_lacks_is_ignored(tmp_path):
    tokenizer = Tokenizer.load(write_byte_vocabulary(tmp_path / "v"))
    tokenizer._byte_ids[ord("q")] = -1
    assert bad_word_ids(("q", "a"), tokenizer) == ((97,), (32, 97))


def test_breakers_are_those_of_llama_cpp():
    tokenizer = gpt2_tokenizer()
    cases = json.loads((Path(__file__).parent / "cases" / "dry_llama_cpp.json").read_text(encoding="utf-8"))
    for text, sequences in cases["breakers"].items():
        assert sorted(map(list, breaker_ids((text,), tokenizer))) == sequences
    all_of_them = breaker_ids(tuple(cases["breakers"]), tokenizer)
    assert sorted(all_of_them) == sorted({tuple(ids) for one in cases["breakers"].values() for ids in one})


@given(st.text("ab\né", min_size=1, max_size=5), st.text("ab\né ", max_size=20))
def test_a_text_with_a_breaker_has_its_tokens(breaker, text):
    """Unless the tokens after the first are cut otherwise: so of a breaker of one character always."""
    tokenizer = gpt2_tokenizer()
    ids = tokenizer.encode(text)
    found = {tuple(ids[a:b]) for a in range(len(ids)) for b in range(a + 1, len(ids) + 1)}
    has_breaker = not found.isdisjoint(breaker_ids((breaker,), tokenizer))
    if breaker not in text:
        assert not has_breaker
    elif len(breaker.encode()) == 1:
        assert has_breaker


def test_a_breaker_with_a_byte_that_the_vocabulary_lacks_is_ignored(tmp_path):
    tokenizer = Tokenizer.load(write_byte_vocabulary(tmp_path / "v"))
    tokenizer._byte_ids[ord("q")] = -1
    assert set(breaker_ids(("aq", "ab"), tokenizer)) == {(97, 98)}
