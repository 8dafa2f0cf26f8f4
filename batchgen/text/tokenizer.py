"""GPT-2's byte-level BPE: text to token ids and back, from `encoder.json` and `vocab.bpe`.

A text is split into pieces, a piece is its UTF-8 bytes, a byte is one symbol, and symbols merge pair by pair in the
order of the merges file. The ids are those of the original encoder for every string, whatever the vocabulary.
"""

import codecs
import json
import re
import reprlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from heapq import heapify, heappop, heappush
from itertools import chain, repeat
from os.path import isfile
from pathlib import Path
from typing import Any

import regex  # type: ignore[import-untyped]  # it ships no types

from batchgen.errors import InputError, ModelError

END_OF_TEXT = "<|endoftext|>"
VOCABULARY_FILES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))  # OpenAI's names, Hugging Face's
MAX_FILE_BYTES = 64 * 2**20

MAX_CACHED = 2**16  # runs, and as many pieces
MAX_CACHED_CHARACTERS = 64  # a longer one is rarely seen twice
SHORT_PIECE = 48  # symbols; up to here rescanning the piece for each merge is the faster way
NEVER = 2**62  # the rank of a pair that does not merge
ABSENT = -1  # the id of a byte that the vocabulary lacks, and of a symbol that has merged into another

# The split pattern of GPT-2: contractions, then words, numbers and other marks with the space before them, then
# whitespace, of which the last before a word is left to that word.
PIECES = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

# No piece has whitespace after a non-space, so that a text may be cut after each run of non-spaces and each run split
# into its pieces by itself, once for all the times that it occurs; `re` finds the runs three times as fast.
_SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # PIECES' \s; that of `re` has \x1c-\x1f
RUNS = re.compile(rf" ?[^{_SPACE}]+|[{_SPACE}]+(?![^{_SPACE}])|[{_SPACE}]+")

_SPECIAL = re.compile(r"<.+>|\[.+\]", re.DOTALL)

Ranks = dict[tuple[int, int], int]  # (left id, right id) -> its line in the merges file, lowest first
Merged = list[tuple[int, int, int]]  # rank -> (left id, right id, id of the two together)


def byte_alphabet() -> dict[int, str]:
    """The printable character that stands for each byte in the vocabulary files: itself, or one from U+0100 on.

    33 ("!") -> "!", 10 (newline) -> "Ċ" (U+010A), 32 (space) -> "Ġ" (U+0120).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


BYTE_TO_CHARACTER = byte_alphabet()
CHARACTER_TO_BYTE = {character: byte for byte, character in BYTE_TO_CHARACTER.items()}


def merge_short(symbols: list[int], ranks: Ranks, merged: Merged) -> list[int]:
    """Merge the symbols of one piece in place, always the pair of lowest rank, everywhere, from left to right.

    ranks={(1, 1): 0, (2, 1): 1}, merged=[(1, 1, 2), (2, 1, 3)]: [1, 1, 1] -> [2, 1] -> [3].
    """
    # scores[i] is the rank of symbols[i] with symbols[i + 1]
    scores = list(map(ranks.get, zip(symbols, symbols[1:], strict=False), repeat(NEVER)))
    while scores and (best := min(scores)) != NEVER:
        new = merged[best][2]
        while best in scores:  # no merge makes this pair anew: what it makes is longer than either side
            at = scores.index(best)
            symbols[at] = new
            del symbols[at + 1], scores[at]
            if at:
                scores[at - 1] = ranks.get((symbols[at - 1], new), NEVER)
            if at < len(scores):
                scores[at] = ranks.get((new, symbols[at + 1]), NEVER)
    return symbols


def merge_long(symbols: list[int], ranks: Ranks, merged: Merged) -> list[int]:
    """The same as merge_short in O(n log n): a linked list of symbols, and for each rank the places that had it.

    A place may be out of date when its rank comes up, so that it is checked against the symbols that stand there.
    """
    end = len(symbols)
    symbols.append(ABSENT)  # stands at `end`, and before the first symbol as symbols[-1]
    following = list(range(1, end + 1))
    preceding = list(range(-1, end))
    places: defaultdict[int, list[int]] = defaultdict(list)
    for at, rank in enumerate(map(ranks.get, zip(symbols, symbols[1:], strict=False))):
        if rank is not None:
            places[rank].append(at)
    waiting = list(places)
    heapify(waiting)
    while waiting:
        rank = heappop(waiting)
        left, right, new = merged[rank]
        for at in sorted(places.pop(rank)):
            right_at = following[at]
            if symbols[at] != left or symbols[right_at] != right:
                continue
            symbols[at] = new
            symbols[right_at] = ABSENT
            after, before = following[right_at], preceding[at]
            following[at] = after
            preceding[after] = at
            for pair, place in (((new, symbols[after]), at), ((symbols[before], new), before)):
                if (rank_made := ranks.get(pair)) is not None:
                    if rank_made not in places:
                        heappush(waiting, rank_made)
                    places[rank_made].append(place)
    return [symbol for symbol in symbols if symbol != ABSENT]


class Cache(dict[str, tuple[int, ...]]):
    """Ids by string, worked out by `ids_of` when first asked for; empties when full, and keeps no long string."""

    def __init__(self, ids_of: Callable[[str], tuple[int, ...]]) -> None:
        super().__init__()
        self.ids_of = ids_of

    def __missing__(self, key: str) -> tuple[int, ...]:
        ids = self.ids_of(key)
        if len(key) <= MAX_CACHED_CHARACTERS:
            if len(self) >= MAX_CACHED:
                self.clear()
            self[key] = ids
        return ids


class Tokenizer:
    """Text to ids and back, with one vocabulary; made by `load`, which checks what it reads.

    encoder: token, in the characters of byte_alphabet -> id; merges: the pairs of tokens that merge, in order;
    token_bytes: id -> the bytes it stands for.
    """

    def __init__(self, encoder: dict[str, int], merges: list[tuple[str, str]], token_bytes: dict[int, bytes]) -> None:
        self.encoder = encoder
        self.decoder = {token_id: token for token, token_id in encoder.items()}
        self.n_vocab = len(encoder)
        self.eos_id = encoder.get(END_OF_TEXT)
        self.longest_token_bytes = max(map(len, token_bytes.values()))
        self._token_bytes = token_bytes
        self._byte_ids = [encoder.get(BYTE_TO_CHARACTER[byte], ABSENT) for byte in range(256)]
        self._merged = [(encoder[left], encoder[right], encoder[left + right]) for left, right in merges]
        self._ranks = {(left, right): rank for rank, (left, right, _) in enumerate(self._merged)}
        self._runs = Cache(self._ids_of_run)
        self._pieces = Cache(self._ids_of_piece)

    @classmethod
    def load(cls, directory: str | Path) -> "Tokenizer":
        """Read `encoder.json` and `vocab.bpe`, or `vocab.json` and `merges.txt`; ModelError says what is wrong."""
        vocabulary_path, merges_path = find_vocabulary(Path(directory))
        encoder = read_vocabulary(vocabulary_path)
        merges = read_merges(merges_path, encoder)
        return cls(encoder, merges, bytes_by_id(vocabulary_path, encoder, merges))

    def encode(self, text: str) -> list[int]:
        """The ids of a text, `<|endoftext|>` in it being ordinary text. InputError on half of a surrogate pair."""
        try:
            return list(chain.from_iterable(map(self._runs.__getitem__, RUNS.findall(text))))
        except UnicodeEncodeError:
            at = next(i for i, character in enumerate(text) if "\ud800" <= character <= "\udfff")
            raise InputError(
                f"character {at} (from 0) is U+{ord(text[at]):04X}, half of a surrogate pair, which is no text; "
                "remove it or write the whole character"
            ) from None

    def _ids_of_run(self, run: str) -> tuple[int, ...]:
        pieces = PIECES.findall(run)
        if len(pieces) == 1:
            return self._pieces[run]
        return tuple(chain.from_iterable(map(self._pieces.__getitem__, pieces)))

    def _ids_of_piece(self, piece: str) -> tuple[int, ...]:
        symbols = list(map(self._byte_ids.__getitem__, piece.encode()))
        if ABSENT in symbols:
            byte = piece.encode()[symbols.index(ABSENT)]
            raise InputError(f"the vocabulary has no token for byte 0x{byte:02X} of {piece[:40]!r}; leave it out")
        merge = merge_short if len(symbols) <= SHORT_PIECE else merge_long
        return tuple(merge(symbols, self._ranks, self._merged))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of the ids, not always whole characters; an id outside the vocabulary gives those of U+FFFD."""
        return b"".join(map(self._token_bytes.get, ids, repeat("\ufffd".encode())))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of any ids; what is not UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_text(self, token_id: int) -> str:
        r"""The text of one token; of a part of a character its bytes, as OpenAI writes them: `bytes:\xe2\x80`."""
        data = self.decode_bytes([token_id])
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class StreamDecoder:
    """Text from ids that come little by little; the texts given out add up to `decode` of all the ids.

    A character whose bytes are spread over several ids comes out with the last of them.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[int]) -> str:
        """The text that is certain with these ids and was not before."""
        return self._utf8.decode(self._tokenizer.decode_bytes(ids))

    def flush(self) -> str:
        """What was held back, U+FFFD for an incomplete character; the decoder is then as new."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


def get_encoder(model_name: str, models_dir: str | Path) -> Tokenizer:
    """picoGPT's name for loading the vocabulary in `models_dir/model_name`."""
    return Tokenizer.load(Path(models_dir) / model_name)


def find_vocabulary(directory: Path) -> tuple[Path, Path]:
    """The vocabulary and the merges file of a directory, by OpenAI's names or Hugging Face's."""
    for vocabulary, merges in VOCABULARY_FILES:
        if isfile(directory / vocabulary) and isfile(directory / merges):
            return directory / vocabulary, directory / merges
    pairs = ", nor ".join(" and ".join(pair) for pair in VOCABULARY_FILES)
    raise ModelError(f"{directory}: no vocabulary here, neither {pairs}; put one of the two pairs there")


def read_vocabulary(path: Path) -> dict[str, int]:
    """Token -> id from a JSON object whose ids are 0 to n_vocab - 1, each once, in any order."""
    try:
        encoder = json.loads(_read_text(path), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not a JSON object of tokens and ids ({error}); get the file anew") from None
    if not isinstance(encoder, dict) or not encoder:
        raise ModelError(f"{path}: {reprlib.repr(encoder)} is not a JSON object of tokens and ids; get the file anew")
    for token, token_id in encoder.items():
        if type(token_id) is not int:
            raise ModelError(f"{path}: the id of {token[:40]!r} is {reprlib.repr(token_id)}, not an integer; mend it")
    missing = set(range(len(encoder))).difference(encoder.values())
    if missing:
        raise ModelError(
            f"{path}: the ids of {len(encoder)} tokens must be 0 to {len(encoder) - 1}, each once; "
            f"{min(missing)} is missing, so the file is incomplete or edited"
        )
    return encoder


def read_merges(path: Path, encoder: dict[str, int]) -> list[tuple[str, str]]:
    """The pairs of a merges file in order; its first line may be `#version: ...`, its last may lack the newline."""
    lines = _read_text(path).replace("\r\n", "\n").rstrip("\n").split("\n")
    first_line_of: dict[tuple[str, str], int] = {}
    for number, line in enumerate(lines, start=1):
        if number == 1 and (line.startswith("#version") or lines == [""]):
            continue
        left, _, right = line.partition(" ")
        if not left or not right or " " in right:
            raise ModelError(f"{path}:{number}: {line[:40]!r} is not two symbols with a space between; mend it")
        for symbol in (left, right, left + right):
            if symbol not in encoder:
                raise ModelError(
                    f"{path}:{number}: {symbol[:40]!r} is not in the vocabulary; are the two files of one model?"
                )
        if first_line_of.setdefault((left, right), number) != number:
            first = first_line_of[left, right]
            raise ModelError(f"{path}:{number}: {line[:40]!r} stands in line {first} too; remove one")
    return list(first_line_of)


def bytes_by_id(path: Path, encoder: dict[str, int], merges: list[tuple[str, str]]) -> dict[int, bytes]:
    """What each id stands for; a special token, such as `<|pad|>` or `[SEP]` and made by no merge, is its own text."""
    made = {left + right for left, right in merges}
    result: dict[int, bytes] = {}
    for token, token_id in encoder.items():
        try:
            if token not in made and _SPECIAL.fullmatch(token):
                result[token_id] = token.encode()
            else:
                result[token_id] = bytes([CHARACTER_TO_BYTE[character] for character in token])
        except (KeyError, UnicodeEncodeError):
            raise ModelError(
                f"{path}: the token {token[:40]!r} (id {token_id}) has a character that stands for no byte in GPT-2's "
                "alphabet; use a byte-level BPE vocabulary, not one of SentencePiece or WordPiece"
            ) from None
    return result


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); see to the file and its permissions") from None
    if len(data) > MAX_FILE_BYTES:
        raise ModelError(f"{path}: over {MAX_FILE_BYTES} bytes, the most for a vocabulary file; is it the right file?")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ModelError(f"{path}: byte {error.start} is not UTF-8; get the file anew") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        twice, _ = Counter(token for token, _ in pairs).most_common(1)[0]
        raise ValueError(f"the token {twice[:40]!r} stands twice")
    return result
