"""Files: replaced durably, hashed, locked, read again; strict JSON; and what a run keeps beside its output."""

import fcntl
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, TypeAlias

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

JsonObject: TypeAlias = dict[str, Any]
Stamp: TypeAlias = tuple[int, int, int, int]  # of a file on this machine; see stamp_of

SUCCESS = "_SUCCESS"  # in a dataset's folder: it is complete; readers of Parquet skip names that begin with _
WORK_SUFFIX = ".batchgen"  # of a run's work directory; see output/ledger.py
STATUS_SUFFIX = ".status.json"  # of a run's status file; see progress.py
PLAN_SUFFIX = ".plan.json"  # of the plan of JSON lines; see output/beside.py
CARD = "README.md"  # of a dataset card; see review/card.py
CARD_MARK = b"<!-- batchgen card, SHA-256 of what is above: "
SIZE = -1  # in place of a block's number: how long the file is
TEMPORARY_SUFFIX = ".batchgen-tmp"  # of a file that is being written
PART = re.compile(r"(\d{8,})-([0-9a-f]{16})\.parquet")  # the chunk's number and the start of the part's SHA-256


# ---- replacing


def temporary_path(path: Path) -> Path:
    """The temporary file of `path`: always the same name, so that the next writer removes what a killed one left."""
    return path.with_name(f".{path.name}{TEMPORARY_SUFFIX}")


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Yield a file that takes the name `path` when the block ends well; on an exception `path` stays as it was.

    At every instant `path` is absent, its previous version, or the complete new file. With durable, the new file and
    its name have reached the disk when the block ends. Writers of one path must exclude each other.
    """
    temporary = temporary_path(path)
    temporary.unlink(missing_ok=True)
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_path(path.parent)


def replace_file(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write `data` to `path`, which is replaced at once; see `replacing`."""
    with replacing(path, durable=durable) as file:
        file.write(data)


def sync_path(path: Path) -> None:
    """fsync a file or a directory; a rename is on disk once its directory is synced."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- dataset cards


def seal_card(text: str) -> bytes:
    """A card with a last line that shows whether anyone has edited it since."""
    data = text.encode()
    return data + CARD_MARK + hashlib.sha256(data).hexdigest().encode() + b" -->\n"


def is_sealed_card(path: Path) -> bool:
    """Whether a file is a card as batchgen wrote it: nothing of anyone else's is lost with it."""
    try:
        text, mark, _ = (data := path.read_bytes() if path.is_file() else b"").rpartition(CARD_MARK)
    except OSError:
        return False
    return bool(mark) and data == seal_card(text.decode("utf-8", "replace"))


# ---- hashing, locking


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lock(descriptor: int, *, wait: bool = False) -> bool:
    """Lock an open file or directory (flock) until it is closed; False if another holds it and wait is False."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder; wait for another process that holds it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        lock(descriptor, wait=True)
        yield
    finally:
        os.close(descriptor)


# ---- the user's cache


def cache_dir() -> Path | None:
    """batchgen's folder in the user's cache, which may not exist yet; None for a user without a home."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # the XDG specification ignores a relative one
        base = os.path.expanduser("~/.cache")
    return Path(base, "batchgen") if os.path.isabs(base) else None


# ---- reading again


def stamp_of(path: Path | int) -> Stamp:
    """Device, inode, size and time of the last change of a file, or an open one's."""
    status = os.stat(path)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@dataclass(slots=True)
class Contents:
    """What has been read of a file that is read several times: a digest of each block, 16 bytes for a megabyte."""

    stamp: tuple[int, ...] = ()  # of the file when its bytes were last known to be these
    block_bytes: int = 2**20
    digests: dict[int, bytes] = field(default_factory=dict)

    def is_same(self, index: int, block: bytes) -> bool:
        """Whether the block is what it was before; the first time, it is remembered. A block of no bytes is the end."""
        digest = hashlib.sha256(block).digest()[:16]
        return self.digests.setdefault(index, digest) == digest


class Seekable(Protocol):
    """A file, of Python's or of Arrow's; read may return less than it is asked for before the end."""

    def read(self, size: int, /) -> bytes | None: ...
    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int: ...


class SteadyFile(io.RawIOBase):
    """Reads a file by whole blocks, and raises changed() instead of giving a byte of a block that is not as before."""

    def __init__(self, raw: Seekable, contents: Contents, changed: Callable[[], Exception]) -> None:
        self.raw, self.contents, self.changed = raw, contents, changed
        self.position, self.index, self.block = 0, -1, b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_CUR:
            offset += self.position
        elif whence == os.SEEK_END:
            size = self.raw.seek(0, os.SEEK_END)
            if not self.contents.is_same(SIZE, b"%d" % size):
                raise self.changed()
            offset += size
        self.position = offset
        return self.position

    def readinto(self, buffer: "WriteableBuffer") -> int:
        view, filled = memoryview(buffer).cast("B"), 0
        while filled < len(view) and (piece := self._rest_of_block()[: len(view) - filled]):
            view[filled : filled + len(piece)] = piece
            filled += len(piece)
            self.position += len(piece)
        return filled

    def _rest_of_block(self) -> memoryview:
        size = self.contents.block_bytes
        index, offset = divmod(self.position, size)
        if index != self.index:
            self.raw.seek(index * size)
            block = b""
            while len(block) < size and (more := self.raw.read(size - len(block))):
                block += more
            if not self.contents.is_same(index, block):
                raise self.changed()
            self.index, self.block = index, block
        return memoryview(self.block)[offset:]


# ---- JSON


def parse_json(data: str | bytes) -> Any:
    """One JSON value. ValueError on NaN, Infinity and a key that appears twice, RecursionError on deep nesting."""
    return json.loads(data, object_pairs_hook=unique_keys, parse_constant=_refuse_constant)


def read_object(data: bytes | None) -> JsonObject:
    """A JSON object, or an empty one if the data is not one."""
    try:
        value = parse_json(data or b"{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def unique_keys(pairs: list[tuple[str, Any]]) -> JsonObject:
    """[("id", 1), ("prompt", "a")] -> {"id": 1, "prompt": "a"}; ValueError if a key appears twice."""
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:40]!r} appears twice")
    return values


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")
