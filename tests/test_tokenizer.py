"""text/tokenizer.py against a plain reference and tiktoken, and its errors for damaged vocabulary files."""

import json
import pickle
import random
import tracemalloc
from array import array
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import regex  # type: ignore[import-untyped]  # it ships no types
from hypothesis import given, settings
from hypothesis import strategies as st

from batchgen.errors import InputError, ModelError
from batchgen.text import tokenizer as module
from batchgen.text.tokenizer import PIECES, RUNS, StreamDecoder, Tokenizer, get_encoder, merge_long, merge_short
from tests.support.vocabulary import gpt2_vocabulary_dir, tiktoken_gpt2

if TYPE_CHECKING:
    import tiktoken

# The reference: the algorithm of GPT-2's encoder, written plainly and without batchgen's code.

SPLIT = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
VISIBLE = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
HIDDEN = [byte for byte in range(256) if byte not in VISIBLE]
LETTERS = {byte: chr(byte) for byte in VISIBLE} | {byte: chr(256 + i) for i, byte in enumerate(HIDDEN)}

Rank = dict[tuple[str, str], int]


def reference_merge(symbols: list[str], rank: Rank) -> list[str]:
    """Find the pair of lowest rank, merge all its occurrences from left to right, and repeat."""
    while candidates := [pair for pair in pairwise(symbols) if pair in rank]:
        left, right = min(candidates, key=lambda pair: rank[pair])
        done: list[str] = []
        rest = list(symbols)
        while rest:
            if rest[:2] == [left, right]:
                done.append(left + right)
                rest = rest[2:]
            else:
                done.append(rest.pop(0))
        symbols = done
    return symbols


def reference_ids(text: str, encoder: dict[str, int], rank: Rank) -> list[int]:
    ids: list[int] = []
    for piece in SPLIT.findall(text):
        ids += [encoder[token] for token in reference_merge([LETTERS[byte] for byte in piece.encode()], rank)]
    return ids


# Texts of all kinds. Only ANYTHING has characters newer than this Python's Unicode tables: `regex` and tiktoken
# may disagree whether they are letters.

ANYTHING = st.characters(exclude_categories=["Cs"])
ASSIGNED = st.characters(exclude_categories=["Cs", "Cn"])
SNIPPETS = st.sampled_from(
    ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "'", "\u2019s", "don't", " I've", "we'll", "''s", "x'd's"]
    + [" ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", " \n ", "\xa0", "\u3000", "\u2028", "\x85", "\x1c", "\x1f", "\x00"]
    + ["the", " of", " The", "HELLO", "1", " 2024", "3.14", "½", "²", "Ⅷ", "٣", "...", " --", "!?", "<|endoftext|>"]
    + [
        "naïve",
        "e\u0301",
        "Straße",
        "Привет",
        "مرحبا",
        "नमस्ते",
        "日本語",
        "、",
        "한국어",
        "\u0301",
        "\u200b",
        "\ufeff",
        "\ufffd",
    ]
    + ["😀", "👩‍👩‍👧", "🇩🇪", "👍🏽", "𝒳", "\U0001f9d1\u200d\U0001f680", "\U000e0041", "\U0010ffff"]
    + ["def f(x):\n    return x\n", "\t\tif (a[i] != 0) {", "//", "==", "_name", "https://a.b/c?d=1", "```", "\\n"]
)


def texts(characters: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    pieces = st.one_of(SNIPPETS, characters, st.text(characters, max_size=8), st.text("abc '1.\n é", max_size=12))
    return st.lists(pieces, max_size=16).map("".join)


@pytest.fixture(scope="module")
def gpt2_dir() -> Path:
    return gpt2_vocabulary_dir()


@pytest.fixture(scope="module")
def gpt2(gpt2_dir: Path) -> Tokenizer:
    return Tokenizer.load(gpt2_dir)


@pytest.fixture(scope="module")
def gpt2_files(gpt2_dir: Path) -> tuple[dict[str, int], Rank]:
    lines = (gpt2_dir / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:-1]
    rank = {(left, right): i for i, (left, right) in enumerate(line.split() for line in lines)}
    encoder: dict[str, int] = json.loads((gpt2_dir / "encoder.json").read_text(encoding="utf-8"))
    return encoder, rank


@pytest.fixture(scope="module")
def tiktoken_encoding(gpt2_dir: Path) -> "tiktoken.Encoding":
    return tiktoken_gpt2(gpt2_dir)


# The law: the same ids as OpenAI's encoder for every string and every vocabulary.


@settings(max_examples=1000, deadline=None)
@given(text=texts(ANYTHING))
def test_ids_equal_the_reference_for_every_string(
    gpt2: Tokenizer, gpt2_files: tuple[dict[str, int], Rank], text: str
) -> None:
    assert gpt2.encode(text) == reference_ids(text, *gpt2_files)


@settings(max_examples=1000, deadline=None)
@given(text=texts(ASSIGNED))
def test_ids_equal_tiktokens_for_every_string(
    gpt2: Tokenizer, tiktoken_encoding: "tiktoken.Encoding", text: str
) -> None:
    assert gpt2.encode(text) == tiktoken_encoding.encode_ordinary(text)


def test_ids_equal_tiktokens_for_whole_files(gpt2: Tokenizer, tiktoken_encoding: "tiktoken.Encoding") -> None:
    for path in sorted(Path(json.__file__).parent.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert gpt2.encode(text) == tiktoken_encoding.encode_ordinary(text)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("", []),
        ("Not all heroes wear capes.", [3673, 477, 10281, 5806, 1451, 274, 13]),
        ("Hello world", [15496, 995]),
        (" ", [220]),
        ("\n\n", [628]),
        ("<|endoftext|>", [27, 91, 437, 1659, 5239, 91, 29]),  # ordinary text, as in GPT-2's encoder
    ],
)
def test_known_texts_have_their_known_ids(gpt2: Tokenizer, text: str, ids: list[int]) -> None:
    assert gpt2.encode(text) == ids


# All strings of up to 4 letters of "ab" are tokens, and their pairs merge in any order. Training makes no order such as
# ("ab", "a") before ("a", "b"): with it, all occurrences of a pair must merge before the next pair is chosen.
AB_TOKENS = ["a", "b"]
for _ in range(3):
    AB_TOKENS += [token + letter for token in AB_TOKENS for letter in "ab" if token + letter not in AB_TOKENS]
AB_ENCODER = {token: i for i, token in enumerate(AB_TOKENS)}
AB_BYTES = {i: token.encode() for token, i in AB_ENCODER.items()}
AB_PAIRS = [(left, right) for left in AB_TOKENS for right in AB_TOKENS if left + right in AB_ENCODER]


@settings(max_examples=500, deadline=None)
@given(merges=st.permutations(AB_PAIRS), n_merges=st.integers(0, len(AB_PAIRS)), text=st.text("ab", max_size=80))
def test_merges_equal_the_reference_for_every_vocabulary(
    merges: list[tuple[str, str]], n_merges: int, text: str
) -> None:
    merges = merges[:n_merges]
    merged = [(AB_ENCODER[left], AB_ENCODER[right], AB_ENCODER[left + right]) for left, right in merges]
    ranks = {(left, right): rank for rank, (left, right, _) in enumerate(merged)}
    expected = [AB_ENCODER[token] for token in reference_merge(list(text), {pair: i for i, pair in enumerate(merges)})]
    assert merge_short([AB_ENCODER[letter] for letter in text], ranks, merged) == expected
    assert merge_long(array("i", [AB_ENCODER[letter] for letter in text]), ranks, merged).tolist() == expected
    assert Tokenizer(AB_ENCODER, merged, AB_BYTES).encode(text) == expected


@pytest.mark.parametrize("count", range(1, 12))
def test_overlapping_pairs_merge_from_the_left(count: int) -> None:
    tokenizer = Tokenizer({"a": 0, "aa": 1}, [(0, 0, 1)], {0: b"a", 1: b"aa"})
    assert tokenizer.encode("a" * count) == [1] * (count // 2) + [0] * (count % 2)


@settings(max_examples=500, deadline=None)
@given(text=texts(ANYTHING))
def test_a_text_splits_into_the_pieces_of_its_runs(text: str) -> None:
    assert [piece for run in RUNS.findall(text) for piece in PIECES.findall(run)] == SPLIT.findall(text)


def test_runs_and_pieces_have_the_same_spaces() -> None:
    characters = [chr(code) for code in range(0x110000)]
    spaces = [character for character in characters if RUNS.findall(f"a{character}") != [f"a{character}"]]
    assert spaces == regex.findall(r"\s", "".join(characters))


# Long pieces: the work grows with n log n, not with the square of the length n.


class CountedRanks(dict[tuple[int, int], int]):
    lookups = 0

    def get(self, *args: Any) -> Any:
        self.lookups += 1
        return super().get(*args)


@pytest.mark.parametrize(
    "letters", ["a", "ab", "aab", "abcdefghijklmnopqrstuvwxyz", "0123456789", "!", "\u0301", "漢字"]
)
def test_merge_long_looks_up_at_most_three_pairs_for_each_symbol(gpt2: Tokenizer, letters: str) -> None:
    ranks = CountedRanks(gpt2._ranks)
    text = "".join(random.Random(0).choices(letters, k=20_000))
    symbols = array("i", [gpt2._byte_ids[byte] for byte in text.encode()])
    n_symbols = len(symbols)
    assert merge_long(symbols, ranks, gpt2._merged).tolist() == gpt2.encode(text)
    assert ranks.lookups <= 3 * n_symbols


@pytest.mark.parametrize(
    "text",
    [
        "a" * 500_000,
        "ab" * 250_000,
        " " * 500_000 + "x",
        "\n" * 500_000,
        "0123456789" * 50_000,
        "漢字" * 100_000,
        "\u0301" * 200_000,
        "😀" * 100_000,
        "'s" * 250_000,
        "a!" * 200_000 + "é",
        random.Random(0).randbytes(300_000).decode("latin-1"),
    ],
    ids=lambda text: ascii(text[:4]),
)
def test_a_huge_piece_decodes_to_itself(gpt2: Tokenizer, text: str) -> None:
    assert gpt2.decode(gpt2.encode(text)) == text


# A long text: its blocks, and only its last ids.


@settings(max_examples=300, deadline=None)
@given(text=texts(ANYTHING), block=st.integers(1, 9), last=st.integers(1, 20))
def test_the_last_ids_of_a_text_in_blocks_are_those_of_the_whole_text(
    gpt2: Tokenizer, text: str, block: int, last: int
) -> None:
    whole = gpt2.encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK_CHARACTERS", block)
        assert gpt2.encode(text) == whole
        assert gpt2.encode(text, "auto", last) == whole[-last:]


@pytest.mark.parametrize(
    "text", ["one two three 4 five\n" * 5_000, "a" * 30_000, "a7!b+" * 20_000, "é漢字x、" * 20_000]
)
def test_the_memory_for_the_last_ids_of_a_text_is_a_few_times_its_own(gpt2: Tokenizer, text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK_CHARACTERS", 1_000)
        gpt2.encode(text[:1_000])
        tracemalloc.start()
        gpt2.encode(text, "auto", 100)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 25 * len(text.encode())


def test_the_cache_is_bounded_and_changes_no_ids(monkeypatch: pytest.MonkeyPatch, gpt2_dir: Path) -> None:
    monkeypatch.setattr(module, "MAX_CACHED", 4)
    monkeypatch.setattr(module, "MAX_CACHED_CHARACTERS", 12)
    tokenizer = Tokenizer.load(gpt2_dir)
    text = "one two, three (four) five! " + "long" * 10 + " one two, three"
    first = tokenizer.encode(text)
    assert tokenizer.encode(text) == first
    for cache in (tokenizer._runs, tokenizer._pieces):
        assert 0 < len(cache) <= 4
        assert max(map(len, cache)) <= 12


# Halves of surrogate pairs.


@pytest.mark.parametrize(("text", "place"), [("\ud800", "character 0 "), ("abc é\udfffx", "character 5 ")])
def test_half_a_surrogate_pair_is_refused_with_place_and_code_point(gpt2: Tokenizer, text: str, place: str) -> None:
    with pytest.raises(InputError, match=rf"{place}.*U\+(D800|DFFF)"):
        gpt2.encode(text)


# Decoding.


@settings(max_examples=300, deadline=None)
@given(text=texts(ANYTHING))
def test_decode_inverts_encode_for_every_text(gpt2: Tokenizer, text: str) -> None:
    assert gpt2.decode(gpt2.encode(text)) == text
    assert gpt2.decode_bytes(gpt2.encode(text)) == text.encode()


IN_RANGE = st.integers(0, 50256)
ANY_ID = st.one_of(IN_RANGE, st.integers(0, 255), st.integers(-(2**70), 2**70))


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(ANY_ID, max_size=30))
def test_decode_of_any_ids_never_raises(gpt2: Tokenizer, ids: list[int]) -> None:
    assert gpt2.decode(ids) == gpt2.decode_bytes(ids).decode("utf-8", errors="replace")


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.one_of(IN_RANGE, st.integers(0, 255)), max_size=30))
def test_decode_equals_tiktokens(gpt2: Tokenizer, tiktoken_encoding: "tiktoken.Encoding", ids: list[int]) -> None:
    assert gpt2.decode_bytes(ids) == tiktoken_encoding.decode_bytes(ids)
    assert gpt2.decode(ids) == tiktoken_encoding.decode(ids)


def test_every_token_decodes_to_the_bytes_of_its_letters(gpt2: Tokenizer) -> None:
    byte_of = {letter: byte for byte, letter in LETTERS.items()}
    for token, token_id in gpt2.encoder.items():
        assert gpt2.decode_bytes([token_id]) == bytes(byte_of[letter] for letter in token)
        assert gpt2.decoder[token_id] == token


@pytest.mark.parametrize("token_id", [-1, 50257, 2**40])
def test_an_id_outside_the_vocabulary_becomes_the_replacement_character(gpt2: Tokenizer, token_id: int) -> None:
    assert gpt2.decode([15496, token_id, 995]) == "Hello\ufffd world"


def test_end_of_text_has_an_id_but_its_text_encodes_otherwise(gpt2: Tokenizer) -> None:
    assert (gpt2.n_vocab, gpt2.special.start) == (50257, 50256)
    assert gpt2.decode([50256]) == "<|endoftext|>"


def test_longest_token_bytes_is_the_most_bytes_of_a_token(gpt2: Tokenizer) -> None:
    lengths = [len(gpt2.decode_bytes([token_id])) for token_id in range(gpt2.n_vocab)]
    assert max(lengths) == gpt2.longest_token_bytes == 128


# Streaming.


@settings(max_examples=300, deadline=None)
@given(batches=st.lists(st.lists(ANY_ID, max_size=4), max_size=12))
def test_streamed_texts_add_up_to_decode(gpt2: Tokenizer, batches: list[list[int]]) -> None:
    stream = StreamDecoder(gpt2)
    texts = [stream.push(ids) for ids in batches]
    assert "".join(texts) + stream.flush() == gpt2.decode([token_id for ids in batches for token_id in ids])


def test_a_stream_returns_a_character_with_its_last_byte(gpt2: Tokenizer) -> None:
    ids = gpt2.encode("a漢b")
    assert len(ids) > 3  # the character is spread over several ids
    stream = StreamDecoder(gpt2)
    assert [stream.push([token_id]) for token_id in ids] == ["a"] + [""] * (len(ids) - 3) + ["漢", "b"]
    assert stream.flush() == ""


def test_a_flushed_stream_can_start_again(gpt2: Tokenizer) -> None:
    stream = StreamDecoder(gpt2)
    assert stream.push(gpt2.encode("漢")[:1]) == ""
    assert stream.flush() == "\ufffd"
    assert stream.push(gpt2.encode("漢")) + stream.flush() == "漢"


# Vocabulary files: accepted and refused ones.

TINY = {"a": 0, "b": 1, "c": 2, "Ġ": 3, "ab": 4, "abc": 5, "Ġa": 6, "<|endoftext|>": 7}
TINY_MERGES = ["a b", "ab c", "Ġ a"]
TINY_MERGES_FILE = "\n".join(["#version: 0.2", *TINY_MERGES, ""])

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(
        encoder: Any = TINY,
        merges: Any = TINY_MERGES_FILE,
        names: tuple[str, str] = ("encoder.json", "vocab.bpe"),
    ) -> Path:
        for name, content in zip(names, (encoder, merges), strict=True):
            text = content if isinstance(content, (str, bytes)) else json.dumps(content)
            (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return tmp_path

    return write


def test_a_tiny_vocabulary_merges_in_the_order_of_its_file(write: Write) -> None:
    tokenizer = Tokenizer.load(write())
    assert tokenizer.encode("abcab abc a") == [5, 4, 3, 5, 6]
    assert tokenizer.decode([5, 4, 3, 5, 6, 7]) == "abcab abc a<|endoftext|>"
    assert (tokenizer.n_vocab, tokenizer.special.start) == (8, 7)


@pytest.mark.parametrize("names", [("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")])
@pytest.mark.parametrize("version", [[], ["#version: 0.2"], ["#version: 0.2 - Trained by `huggingface/tokenizers`"]])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("final", [[], [""]])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_all_forms_of_the_files_give_the_same_tokenizer(
    write: Write, names: tuple[str, str], version: list[str], newline: str, final: list[str], bom: str
) -> None:
    keys_reversed = newline.join(json.dumps(dict(reversed(TINY.items())), indent=1, ensure_ascii=False).split("\n"))
    merges = newline.join(version + TINY_MERGES + final)
    tokenizer = Tokenizer.load(str(write(bom + keys_reversed, bom + merges, names)))
    assert tokenizer.encode("abcab abc a") == [5, 4, 3, 5, 6]
    assert tokenizer.encoder == TINY


def test_get_encoder_loads_the_model_of_that_name(write: Write) -> None:
    directory = write()
    assert get_encoder(directory.name, str(directory.parent)).encode("abc") == [5]


def test_a_loaded_tokenizer_pickles(write: Write) -> None:
    tokenizer = Tokenizer.load(write())
    tokenizer.encode("abc")
    assert pickle.loads(pickle.dumps(tokenizer)).encode("abcab abc a") == [5, 4, 3, 5, 6]


@pytest.mark.parametrize("merges", ["", "#version: 0.2", "#version: 0.2\n"])
def test_a_vocabulary_may_have_no_merges(write: Write, merges: str) -> None:
    assert Tokenizer.load(write(merges=merges)).encode("ab") == [0, 1]


def test_a_byte_that_the_vocabulary_lacks_is_named_in_the_error(write: Write) -> None:
    with pytest.raises(InputError, match=r"byte 0x78 of ' x'"):
        Tokenizer.load(write()).encode("ab abc x")


def test_a_vocabulary_without_end_of_text_has_no_eos(write: Write) -> None:
    assert Tokenizer.load(write({"a": 0}, "")).special.start is None


@pytest.mark.parametrize("token", ["<|pad token|>", "<｜tool▁call｜>", "[SEP 日本]", "<é>"])
def test_an_added_special_token_decodes_as_its_own_text(write: Write, token: str) -> None:
    assert Tokenizer.load(write(TINY | {token: 8})).decode([5, 8]) == f"abc{token}"


def test_ids_may_have_holes(write: Write) -> None:
    tokenizer = Tokenizer.load(write(TINY | {"z": 11}))
    assert tokenizer.n_vocab == 12
    assert tokenizer.absent_ids(14) == [8, 9, 10, 12, 13]
    assert tokenizer.encode("abz") == [4, 11]
    assert tokenizer.decode([4, 9, 11]) == "ab\ufffdz"


def _with(**changes: Any) -> dict[str, Any]:
    return TINY | changes


@pytest.mark.parametrize(
    ("encoder", "says"),
    [
        (b"\xff\xfe", "byte 0 is not UTF-8"),
        ("", "not a JSON object"),
        ("{", "not a JSON object"),
        ("[" * 200_000, "not a JSON object"),
        ("[1, 2]", r"\[1, 2\] is not a JSON object"),
        ("null", "None is not a JSON object"),
        ("{}", "not a JSON object"),
        ('{"a": 0, "a": 1}', "the key 'a' appears twice"),
        ('{"a": ' + "9" * 5000 + "}", "not a JSON object"),
        (_with(z="8"), "the id of 'z' is '8', not an integer"),
        (_with(z=8.0), "the id of 'z' is 8.0, not an integer"),
        (_with(z=True), "the id of 'z' is True, not an integer"),
        (_with(z=None), "the id of 'z' is None, not an integer"),
        (_with(z=[[[[[[[[[8]]]]]]]]]), "the id of 'z' is .*, not an integer"),
        ('{"a": NaN}', "not a JSON object.*NaN is not JSON"),
        (_with(z=7), "'<.endoftext.>' and 'z' have the same id 7"),
        (_with(z=-1), "the id of 'z' is -1; ids are 0 to 16777215"),
        (_with(a=2**70), "the id of 'a' is 1180591620717411303424; ids are 0 to"),
        (TINY | {"▁the": 8}, "'▁the'.* stands for no byte"),
        (TINY | {"a b": 8}, "'a b'.* stands for no byte"),
        (TINY | {"\xad": 8}, "stands for no byte"),
        ('{"a": 0, "b": 1, "c": 2, "\\ud800": 3}', "stands for no byte"),
        ('{"a": 0, "b": 1, "c": 2, "<\\ud800>": 3}', "stands for no byte"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_damaged_vocabulary_is_refused_with_its_place(write: Write, encoder: Any, says: str) -> None:
    with pytest.raises(ModelError, match=rf"encoder\.json: .*{says}"):
        Tokenizer.load(write(encoder, merges=""))


@pytest.mark.parametrize(
    ("merges", "says"),
    [
        (b"\xc3(", ": byte 0 is not UTF-8"),
        ("a b\nab\n", ":2: 'ab' is not two symbols"),
        ("a b\nab c Ġ\n", ":2: 'ab c Ġ' is not two symbols"),
        ("a b\n\nab c\n", ":2: '' is not two symbols"),
        ("a  b\n", ":1: 'a  b' is not two symbols"),
        (" a\n", ":1: ' a' is not two symbols"),
        ("a \n", ":1: 'a ' is not two symbols"),
        ("a\tb\n", ":1: .* is not two symbols"),
        ("#version: 0.2\n#version: 0.2\n", ":2: '#version:' is not in the vocabulary"),
        ("z b\n", ":1: 'z' is not in the vocabulary"),
        ("a z\n", ":1: 'z' is not in the vocabulary"),
        ("a c\n", ":1: 'ac' is not in the vocabulary"),
        ("a b\nab c\na b\n", ":3: 'a b' is also in line 1"),
    ],
)
def test_damaged_merges_are_refused_with_their_line(write: Write, merges: str | bytes, says: str) -> None:
    with pytest.raises(ModelError, match=rf"vocab\.bpe{says}"):
        Tokenizer.load(write(merges=merges))


def test_merges_of_another_alphabet_are_refused(write: Write) -> None:
    with pytest.raises(ModelError, match=r"'▁>'.* stands for no byte"):
        Tokenizer.load(write(TINY | {"▁>": 8, "<": 9, "<▁>": 10}, "< ▁>"))


@pytest.mark.parametrize("present", [[], ["encoder.json"], ["merges.txt"], ["encoder.json", "merges.txt"]])
def test_missing_files_are_named_with_both_names(tmp_path: Path, present: list[str]) -> None:
    for name in present:
        (tmp_path / name).write_text("{}")
    with pytest.raises(ModelError, match=r"encoder\.json and vocab\.bpe, nor vocab\.json and merges\.txt"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("name", ["encoder.json", "vocab.bpe"])
def test_a_file_over_the_limit_is_refused_unread(write: Write, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    directory = write()
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 200)
    with (directory / name).open("ab") as file:
        file.truncate(10**12)  # a sparse file: reading it all would fail
    with pytest.raises(ModelError, match=rf"{name}: over 200 bytes"):
        Tokenizer.load(directory)
