"""GPT-2's byte-level BPE: text to token ids and back, with `encoder.json` and `vocab.bpe`.

A text is split into pieces; each byte of a piece (UTF-8) is a symbol; pairs of symbols merge in the order of the merges
file. The ids are those of OpenAI's encoder, or of a Hugging Face model's tokenizer (special_tokens.py).
"""

import codecs
import hashlib
import re
import reprlib
from array import array
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from heapq import heapify, heappop, heappush
from itertools import chain, pairwise, repeat
from os.path import isfile, lexists
from pathlib import Path

import numpy as np
import regex  # type: ignore[import-untyped]  # it ships no types

from batchgen.errors import InputError, ModelError
from batchgen.files import parse_json
from batchgen.text.special_tokens import SPECIAL_TOKENS, AddedToken, Finder, SpecialTokens
from batchgen.types import ReadSpecial

END_OF_TEXT = "<|endoftext|>"
VOCABULARY_FILES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))  # OpenAI's names, Hugging Face's
MAX_FILE_BYTES = 64 * 2**20
MAX_ID = 2**24 - 1  # as many rows as a GPT2Config allows

MAX_CACHED = 2**16  # runs, and as many pieces
MAX_CACHED_CHARACTERS = 64  # a longer run or piece rarely occurs twice
BLOCK_CHARACTERS = 2**16  # of a long text that are split into runs at a time
SHORT_PIECE = 48  # symbols; up to this length merge_short is faster than merge_long
NEVER = 2**62  # the rank of a pair that does not merge
ABSENT = -1  # the id of a byte that the vocabulary lacks, and of a symbol that has merged into another

# GPT-2's split pattern: contractions; words, numbers and other marks, each with the space before it; whitespace, except
# its last character if a word follows.
PIECES = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

# In a piece, no whitespace follows a non-space. So a text can be cut after each run of non-spaces, and each distinct
# run split into pieces only once. `re` finds the runs three times as fast as `regex` would.
_SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # \s of `regex`; `re` adds \x1c-\x1f
RUNS = re.compile(rf" ?[^{_SPACE}]+|[{_SPACE}]+(?![^{_SPACE}])|[{_SPACE}]+")

_RUN_END = re.compile(rf"[^{_SPACE}](?=[{_SPACE}])")

_SPECIAL = re.compile(r"<.+>|\[.+\]", re.DOTALL)

Ranks = dict[tuple[int, int], int]  # (left id, right id) -> rank; the lowest rank merges first
Merged = list[tuple[int, int, int]]  # by rank: (left id, right id, id of both together)


def byte_alphabet() -> dict[int, str]:
    """The printable character for each byte in the vocabulary files: the byte's own, or one from U+0100 on.

    33 ("!") -> "!", 10 (newline) -> "Ċ" (U+010A), 32 (space) -> "Ġ" (U+0120).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


BYTE_TO_CHARACTER = byte_alphabet()
CHARACTER_TO_BYTE = {character: byte for byte, character in BYTE_TO_CHARACTER.items()}
_CODES = {ord(character): byte for character, byte in CHARACTER_TO_BYTE.items()}


def merge_short(symbols: list[int], ranks: Ranks, merged: Merged) -> list[int]:
    """Merge the symbols of one piece in place: the pair of lowest rank first, all its occurrences from left to right.

    O(n**2) for n symbols. ranks={(1, 1): 0, (2, 1): 1}, merged=[(1, 1, 2), (2, 1, 3)]: [1, 1, 1] -> [2, 1] -> [3].
    """
    # scores[i] is the rank of symbols[i] with symbols[i + 1]
    scores = list(map(ranks.get, zip(symbols, symbols[1:], strict=False), repeat(NEVER)))
    while scores and (best := min(scores)) != NEVER:
        new = merged[best][2]
        while best in scores:  # no merge creates this pair again: its result is longer than either symbol
            at = scores.index(best)
            symbols[at] = new
            del symbols[at + 1], scores[at]
            if at:
                scores[at - 1] = ranks.get((symbols[at - 1], new), NEVER)
            if at < len(scores):
                scores[at] = ranks.get((new, symbols[at + 1]), NEVER)
    return symbols


def merge_long(symbols: "array[int]", ranks: Ranks, merged: Merged) -> "array[int]":
    """merge_short in O(n log n): a linked list of symbols, and for each rank the places of its pair.

    A place can be out of date when its rank is next, so it is compared with the symbols that are there now. Arrays, as
    a list of a million numbers takes 40 MB.
    """
    end = len(symbols)
    symbols.append(ABSENT)  # at `end`, and as symbols[-1] also before the first symbol
    following = array("i", range(1, end + 1))
    preceding = array("i", range(-1, end))
    places: defaultdict[int, array[int]] = defaultdict(lambda: array("i"))
    for at, rank in enumerate(map(ranks.get, pairwise(symbols))):
        if rank is not None:
            places[rank].append(at)
    waiting = list(places)
    heapify(waiting)
    while waiting:
        rank = heappop(waiting)
        left, right, new = merged[rank]
        found = places.pop(rank)
        np.frombuffer(found, np.intc).sort()
        for at in found:
            right_at = following[at]
            if symbols[at] != left or symbols[right_at] != right:
                continue
            symbols[at] = new
            symbols[right_at] = ABSENT
            after, before = following[right_at], preceding[at]
            following[at] = after
            preceding[after] = at
            for pair, place in (((new, symbols[after]), at), ((symbols[before], new), before)):
                if (new_rank := ranks.get(pair)) is not None:
                    if new_rank not in places:
                        heappush(waiting, new_rank)
                    places[new_rank].append(place)
    return array("i", (symbol for symbol in symbols if symbol != ABSENT))


def cut_blocks(text: str) -> Iterator[str]:
    """The text in blocks of some BLOCK_CHARACTERS, or more if no run ends there; each has whole runs."""
    begin = 0
    while len(text) - begin > BLOCK_CHARACTERS and (end := _RUN_END.search(text, begin + BLOCK_CHARACTERS)):
        yield text[begin : end.end()]
        begin = end.end()
    yield text[begin:]


# ---- vocabulary files


def _read_text(path: Path, sha256: str | None = None) -> str:
    """ModelError if its SHA-256 is another one."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); check the file and its permissions") from None
    if len(data) > MAX_FILE_BYTES:
        raise ModelError(f"{path}: over {MAX_FILE_BYTES} bytes, the limit for a vocabulary file; is it the right file?")
    if sha256 not in (None, found := hashlib.sha256(data).hexdigest()):
        remedy = "fetch or convert the model again; if it was just replaced, run the same command again"
        raise ModelError(f"{path}: is not the model's (expected sha256 {sha256}, found {found}); {remedy}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ModelError(f"{path}: byte {error.start} is not UTF-8; download the file again") from None


def find_vocabulary(directory: Path) -> tuple[Path, Path]:
    """The vocabulary and the merges file of a directory, with OpenAI's names or Hugging Face's."""
    for vocabulary, merges in VOCABULARY_FILES:
        if isfile(directory / vocabulary) and isfile(directory / merges):
            return directory / vocabulary, directory / merges
    pairs = ", nor ".join(" and ".join(pair) for pair in VOCABULARY_FILES)
    raise ModelError(f"{directory}: no vocabulary, neither {pairs}; put one of the two pairs there")


def read_vocabulary(path: Path, sha256: str | None = None) -> dict[str, int]:
    """Token -> id from a JSON object; each id occurs once, in any order, and there may be holes between them."""
    try:
        encoder = parse_json(_read_text(path, sha256))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not a JSON object of tokens and ids ({error}); download the file again") from None
    if not isinstance(encoder, dict) or not encoder:
        raise ModelError(
            f"{path}: {reprlib.repr(encoder)} is not a JSON object of tokens and ids; download the file again"
        )
    for token, token_id in encoder.items():
        if type(token_id) is not int:
            raise ModelError(
                f"{path}: the id of {token[:40]!r} is {reprlib.repr(token_id)}, not an integer; correct it"
            )
        if not 0 <= token_id <= MAX_ID:
            raise ModelError(f"{path}: the id of {token[:40]!r} is {token_id}; ids are 0 to {MAX_ID}; correct it")
    owners = {token_id: token for token, token_id in encoder.items()}
    for token, token_id in encoder.items():
        if owners[token_id] != token:
            both = f"{token[:40]!r} and {owners[token_id][:40]!r} have the same id {token_id}"
            raise ModelError(f"{path}: {both}; the file is edited: download it again")
    return encoder


def read_merges(path: Path, encoder: dict[str, int], sha256: str | None = None) -> Merged:
    """The pairs of a merges file in order. The first line may be `#version: ...`; the last may lack a newline."""
    lines = _read_text(path, sha256).replace("\r\n", "\n").rstrip("\n").split("\n")
    first = int(lines[0].startswith("#version") or lines == [""])
    merged: Merged = []
    for number, line in enumerate(lines[first:], start=first + 1):
        left, _, right = line.partition(" ")
        if not left or not right or " " in right:
            raise ModelError(f"{path}:{number}: {line[:40]!r} is not two symbols with a space between; correct it")
        try:
            merged.append((encoder[left], encoder[right], encoder[left + right]))
        except KeyError as error:
            raise ModelError(
                f"{path}:{number}: {error.args[0][:40]!r} is not in the vocabulary; are the two files of one model?"
            ) from None
    if len(set(merged)) < len(merged):
        line_of: dict[tuple[int, int, int], int] = {}
        for number, triple in enumerate(merged, start=first + 1):
            if (other := line_of.setdefault(triple, number)) != number:
                line = lines[number - 1]
                raise ModelError(f"{path}:{number}: {line[:40]!r} is also in line {other}; remove one")
    return merged


def _find_marks(encoder: dict[str, int], merged: Merged) -> Iterator[tuple[str, int]]:
    """The tokens that no merge creates and that look like `<|endoftext|>`, with their ids."""
    created = {token_id for *_, token_id in merged}
    for token, token_id in encoder.items():
        if token_id not in created and _SPECIAL.fullmatch(token):
            yield token, token_id


def bytes_by_id(path: Path, encoder: dict[str, int], merged: Merged, added: Iterable[AddedToken]) -> dict[int, bytes]:
    """The bytes of each id; those of an added token that no merge creates, such as `<|pad|>`, are its own text."""
    created = {token_id for *_, token_id in merged}
    contents = {token.content for token in added if encoder.get(token.content) not in created}
    contents |= {token for token, _ in _find_marks(encoder, merged)}
    contents -= CHARACTER_TO_BYTE.keys()
    result: dict[int, bytes] = {}
    for token, token_id in encoder.items():
        try:
            result[token_id] = (
                token.encode() if token in contents else codecs.charmap_encode(token, "strict", _CODES)[0]
            )
        except UnicodeEncodeError:
            raise ModelError(
                f"{path}: the token {token[:40]!r} (id {token_id}) has a character that stands for no byte in GPT-2's "
                "alphabet; use a byte-level BPE vocabulary, not a SentencePiece or WordPiece one"
            ) from None
    return result


def find_special(encoder: dict[str, int], merged: Merged) -> SpecialTokens:
    """The special tokens of a vocabulary that comes without a list of them, as OpenAI's; in prompts they are text."""
    marks = _find_marks(encoder, merged)
    added = tuple(AddedToken(token_id, token, special=True, normalized=False) for token, token_id in marks)
    eos_id = encoder.get(END_OF_TEXT)
    return SpecialTokens(added, end=() if eos_id is None else (eos_id,), start=eos_id, parse=False)


def read_special(path: Path, sha256: str | None = None) -> SpecialTokens:
    """The contents of special_tokens.json; ModelError if it is damaged."""
    try:
        return SpecialTokens.from_json(parse_json(_read_text(path, sha256)))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"{path}: not a list of special tokens ({reason}); convert the model again") from error


# ---- the tokenizer


class Cache(dict[str, Sequence[int]]):
    """The ids of strings, computed by `encode` on first use; empties itself when full and keeps no long string."""

    def __init__(self, encode: Callable[[str], Sequence[int]]) -> None:
        super().__init__()
        self.encode = encode

    def __missing__(self, key: str) -> Sequence[int]:
        ids = self.encode(key)
        if len(key) <= MAX_CACHED_CHARACTERS:
            if len(self) >= MAX_CACHED:
                self.clear()
            self[key] = ids
        return ids


class Tokenizer:
    """Text to ids and back with one vocabulary; `load` reads and checks its files.

    encoder: token in the characters of byte_alphabet -> id. merged: pairs of tokens in order of their rank.
    token_bytes: id -> the bytes of the token. special: what the tokenizer does besides BPE.
    """

    def __init__(
        self,
        encoder: dict[str, int],
        merged: Merged,
        token_bytes: dict[int, bytes],
        special: SpecialTokens | None = None,
    ) -> None:
        self.encoder = encoder
        self.n_vocab, self.n_tokens = max(token_bytes) + 1, len(token_bytes)  # more ids than tokens: holes
        self.special = special or find_special(encoder, merged)
        self.special_ids = frozenset(token.id for token in self.special.added if token.special)
        # a token that takes spaces has any length
        takes_spaces = any(token.lstrip or token.rstrip for token in self.special.added)
        self.longest_token_bytes = 2**62 if takes_spaces else max(map(len, token_bytes.values()))
        self.token_bytes = token_bytes
        unknown = ABSENT if self.special.unknown is None else self.special.unknown
        self._byte_ids = [encoder.get(BYTE_TO_CHARACTER[byte], unknown) for byte in range(256)]
        self._merged = merged
        self._finder = Finder(self.special.added)
        self._runs = Cache(self._encode_run)
        self._pieces = Cache(self._encode_piece)

    @classmethod
    def load(cls, directory: str | Path, sha256: Mapping[str, str] | None = None) -> "Tokenizer":
        """Read a vocabulary's files, and `special_tokens.json` if any; sha256: of a model's, and no others are read."""
        path, known = Path(directory) / SPECIAL_TOKENS, sha256 or {}
        openai = path.with_name(VOCABULARY_FILES[0][0]), path.with_name(VOCABULARY_FILES[0][1])
        vocabulary_path, merges_path = openai if known else find_vocabulary(path.parent)
        encoder = read_vocabulary(vocabulary_path, known.get(vocabulary_path.name))
        merged = read_merges(merges_path, encoder, known.get(merges_path.name))
        has_special = SPECIAL_TOKENS in known if known else lexists(path)
        special = read_special(path, known.get(path.name)) if has_special else find_special(encoder, merged)
        return cls(encoder, merged, bytes_by_id(vocabulary_path, encoder, merged, special.added), special)

    @cached_property
    def decoder(self) -> dict[int, str]:
        """id -> token"""
        return {token_id: token for token, token_id in self.encoder.items()}

    @cached_property
    def _ranks(self) -> Ranks:
        """Made when a text is encoded; a worker most often decodes only."""
        return {(left, right): rank for rank, (left, right, _) in enumerate(self._merged)}

    def has_id(self, token_id: int) -> bool:
        """Whether a token has this id: a vocabulary may have holes."""
        return token_id in self.token_bytes

    def absent_ids(self, n_vocab: int) -> list[int]:
        """The ids below n_vocab that no token has."""
        return [token_id for token_id in range(n_vocab) if token_id not in self.token_bytes]

    def _encode_piece(self, piece: str) -> Sequence[int]:
        symbols = array("i", map(self._byte_ids.__getitem__, piece.encode()))
        if ABSENT in symbols:
            byte = piece.encode()[symbols.index(ABSENT)]
            raise InputError(f"the vocabulary has no token for byte 0x{byte:02X} of {piece[:40]!r}; leave it out")
        if len(symbols) <= SHORT_PIECE:
            return tuple(merge_short(symbols.tolist(), self._ranks, self._merged))
        return merge_long(symbols, self._ranks, self._merged)

    def _encode_run(self, run: str) -> Sequence[int]:
        pieces = PIECES.findall(run)
        if len(pieces) == 1:
            return self._pieces[run]
        return tuple(chain.from_iterable(map(self._pieces.__getitem__, pieces)))

    def _encode_block(self, block: str) -> Iterable[Sequence[int]]:
        if len(block) > 2 * BLOCK_CHARACTERS:  # a long run; not the list of its pieces, which takes 20 times its memory
            return (self._pieces[piece[0]] for piece in PIECES.finditer(block))
        return map(self._runs.__getitem__, RUNS.findall(block))

    def _encode_text(self, text: str) -> Iterable[int]:
        return chain.from_iterable(chain.from_iterable(map(self._encode_block, cut_blocks(text))))

    def encode(self, prompt: str, special_tokens: ReadSpecial = "auto", last: int | None = None) -> list[int]:
        """The ids of a prompt, or the last so many, after those that stand before every prompt of this model.

        special_tokens: whether marks such as `<|endoftext|>` are one id (parse) or the ids of their letters (text);
        auto is as the model's tokenizer does, and text for OpenAI's. Raises InputError on half of a surrogate pair.
        """
        return [*self.special.begin, *self._encode(prompt, special_tokens, self.special.prefix_space, last)]

    def encode_part(self, text: str) -> list[int]:
        """The ids of a text that stands anywhere."""
        return list(self._encode(text, "auto"))

    def _encode(
        self, text: str, special_tokens: ReadSpecial, prefix_space: bool = False, last: int | None = None
    ) -> deque[int]:
        with_special = self.special.parse if special_tokens == "auto" else special_tokens == "parse"
        ids: deque[int] = deque(maxlen=last)
        try:
            for piece in self._finder.split(text, with_special=with_special):
                if isinstance(piece, AddedToken):
                    ids.append(self._id_of(piece))
                else:
                    ids += self._encode_text(f" {piece}" if prefix_space and piece[0] != " " else piece)
        except UnicodeEncodeError:
            at = next(i for i, character in enumerate(text) if "\ud800" <= character <= "\udfff")
            raise InputError(
                f"character {at} (from 0) is U+{ord(text[at]):04X}, half of a surrogate pair; "
                "remove it or write the whole character"
            ) from None
        return ids

    def _id_of(self, token: AddedToken) -> int:
        if not self.has_id(token.id):
            raise InputError(
                f"{token.content[:40]!r} is token {token.id}, which has no weights in the model; remove it"
            )
        return token.id

    def reads_special_as_text(self, text: str) -> bool:
        """Whether a text holds a special token, such as `<|endoftext|>`, which is text unless asked otherwise."""
        return not self.special.parse and any(
            isinstance(piece, AddedToken) and piece.special for piece in self._finder.split(text)
        )

    def decode_bytes(self, ids: Iterable[int], *, skip_special: bool = False) -> bytes:
        """The bytes of the ids, not always whole characters; an id outside the vocabulary counts as U+FFFD."""
        if skip_special:
            ids = (token for token in ids if token not in self.special_ids)
        return b"".join(map(self.token_bytes.get, ids, repeat("\ufffd".encode())))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_text(self, token_id: int) -> str:
        r"""The text of one token; if it is part of a character, its bytes as OpenAI writes them: `bytes:\xe2\x80`."""
        data = self.decode_bytes([token_id])
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class StreamDecoder:
    """Decodes a stream of ids; the texts that it returns add up to `decode` of all ids, after n_skipped bytes."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = False, n_skipped: int = 0) -> None:
        self._tokenizer, self._skip_special, self._n_skipped = tokenizer, skip_special, n_skipped
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[int]) -> str:
        """The text that these ids complete."""
        data = self._tokenizer.decode_bytes(ids, skip_special=self._skip_special)
        if self._n_skipped:
            data, self._n_skipped = data[self._n_skipped :], max(self._n_skipped - len(data), 0)
        return self._utf8.decode(data)

    def flush(self) -> str:
        """The rest, with U+FFFD for an incomplete character; the decoder can then start again."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


def get_encoder(model_name: str, models_dir: str | Path) -> Tokenizer:
    """Load the vocabulary in `models_dir/model_name`, under picoGPT's name and arguments."""
    return Tokenizer.load(Path(models_dir) / model_name)
