"""What an input is made of: files, globs, directories, addresses and standard input become an ordered list of Sources.

A Source can be opened again and again, and tells whether it has changed since it was found. Inputs are read in the
order given; what a glob or a directory stands for is sorted by path, byte by byte.
"""

import gzip
import hashlib
import io
import os
import re
import shutil
import stat
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from glob import glob, has_magic
from itertools import takewhile
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol, TypeAlias, cast
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from batchgen.errors import InputError
from batchgen.files import STATUS_SUFFIX, WORK_SUFFIX
from batchgen.input.words import first_line, nearest

Format = Literal["jsonl", "csv", "tsv", "parquet"]
InputFormat = Literal["auto", "jsonl", "csv", "tsv", "parquet"]

SUFFIXES: dict[str, Format] = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
}
PACKINGS = {".gz": "gzip", ".zst": "zstd"}
BUFFER_BYTES = 2**20
REMOTE_BUFFER_BYTES = 8 * 2**20  # a request each
NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"

# what an unpacking raises on bytes that are damaged, cut off, or not packed at all
UNPACKING_ERRORS = (EOFError, zlib.error, gzip.BadGzipFile, OSError)

Partition = tuple[tuple[str, str | None], ...]


class Storage(Protocol):
    """Where bytes are: open() begins at the first of them each time; stamp() is equal as long as they are the same."""

    def open(self) -> Any: ...

    def stamp(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, slots=True)
class Source:
    """One file of an input: `where` names it in errors, `name` in places (`name:12`)."""

    where: str
    name: str
    format: Format
    packing: str  # "", "gzip" or "zstd"
    storage: Storage
    stamp: tuple[int, ...]  # when it was found
    folder: Path | None = None  # the directory that was named, where it was not the file
    partition: Partition = ()  # of lang=en/year=2024/part-0.parquet: (("lang", "en"), ("year", "2024"))


Input: TypeAlias = Path | str | Source
Inputs: TypeAlias = Input | Sequence[Input]


@dataclass(frozen=True, slots=True)
class _LocalFile:
    path: Path

    def open(self) -> Any:
        return open(self.path, "rb", buffering=0)

    def stamp(self) -> tuple[int, ...]:
        now = self.path.stat()
        return now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns


@dataclass(frozen=True, slots=True)
class _RemoteFile:
    """A file that one of pyarrow's filesystems reads; path is as that filesystem wants it."""

    filesystem: Any
    path: str

    def open(self) -> Any:
        return self.filesystem.open_input_file(self.path)

    def stamp(self) -> tuple[int, ...]:
        return _remote_stamp(self.filesystem.get_file_info(self.path))


def _remote_stamp(info: Any) -> tuple[int, ...]:
    """By seconds: a listing can know the time better than a question about one file."""
    return info.type.value, info.size or 0, (info.mtime_ns or 0) // 10**9


class _Spool:
    """What came over standard input, in a file without a name: the system removes it however this process ends."""

    def __init__(self, file: BinaryIO) -> None:
        self.descriptor = os.dup(file.fileno())

    def __del__(self) -> None:
        os.close(self.descriptor)

    def open(self) -> Any:
        return _SpoolReader(self)

    def stamp(self) -> tuple[int, ...]:
        return ()


class _SpoolReader(io.RawIOBase):
    """Reads a descriptor from its start without moving it, so that several can read at once."""

    def __init__(self, spool: _Spool) -> None:
        self.spool, self.at = spool, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: os.fstat(self.spool.descriptor).st_size}[whence]
        self.at = start + offset
        return self.at

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer: Any) -> int:
        data = os.pread(self.spool.descriptor, len(buffer), self.at)
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)


class Hashed(io.RawIOBase):
    """A file that hashes and counts its bytes as they are read, so that one pass does both."""

    def __init__(self, raw: Any) -> None:
        self.raw, self.digest, self.bytes = raw, hashlib.sha256(), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count: int = self.raw.readinto(buffer) or 0
        self.digest.update(memoryview(buffer)[:count])
        self.bytes += count
        return count


# ---- opening


@contextmanager
def open_raw(source: Source) -> Iterator[Any]:
    """The file's own bytes, unbuffered and seekable."""
    try:
        raw = source.storage.open()
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{source.where}: cannot be read: {first_line(error)}") from error
    with raw:
        yield raw


@contextmanager
def open_bytes(source: Source) -> Iterator[tuple[io.BufferedReader, Hashed]]:
    """Open for reading, unpacked; the second gives hash and length of the bytes as they are stored."""
    buffer = REMOTE_BUFFER_BYTES if isinstance(source.storage, _RemoteFile) else BUFFER_BYTES
    with open_raw(source) as raw:
        hashed = Hashed(raw)
        file: Any = hashed
        if source.packing == "gzip":
            file = gzip.GzipFile(fileobj=io.BufferedReader(hashed, buffer))
        elif source.packing == "zstd":
            file = pa.CompressedInputStream(pa.PythonFile(io.BufferedReader(hashed, buffer), "r"), "zstd")
        with io.BufferedReader(file, buffer) as unpacked:
            yield unpacked, hashed


@contextmanager
def open_parquet(source: Source) -> Iterator[Any]:
    """A pq.ParquetFile that reads by pages, not by whole row groups, and verifies their checksums."""
    with open_raw(source) as raw:
        try:
            file = pq.ParquetFile(raw, buffer_size=BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise InputError(f"{source.where}: not a Parquet file, or a damaged one ({first_line(error)})") from error
        with file:
            yield file


def check_unchanged(source: Source) -> None:
    """Raise InputError where the file is no longer the one that was found."""
    try:
        same = source.storage.stamp() == source.stamp
    except (OSError, pa.ArrowException):
        same = False
    if not same:
        raise InputError(
            f"{source.where}: the file was changed while it was being read; "
            "run again with --restart when nothing writes it any more"
        )


def read_error(source: Source, line: int, error: Exception) -> InputError:
    """What to raise where reading or unpacking a line failed (one of UNPACKING_ERRORS)."""
    if source.packing and not getattr(error, "errno", None):
        what = f"the {source.packing} data is truncated or damaged here ({first_line(error)})"
        return InputError(f"{source.name}:{line}: {what}; fetch or pack the file again")
    return InputError(f"{source.name}:{line}: cannot be read: {first_line(error)}")


# ---- finding


def find_sources(
    inputs: Inputs,
    *,
    input_format: InputFormat = "auto",
    spool: Path | None = None,
) -> tuple[Source, ...]:
    """The files that the inputs stand for, in order, each of them there; raises InputError naming what is not.

    An input is a path, a glob, a directory, an address that pyarrow reads (`s3://bucket/key`), or `-`: standard
    input, which is copied to a nameless file in the folder `spool`. Sources are passed through, so that what was
    found once can be given again. A run's status file is none of several: the shell may have named it, for *.json.
    """
    alone = isinstance(inputs, (str, Path, Source))
    given: list[Any] = [inputs] if alone else list(inputs)  # type: ignore[arg-type]
    if len(given) > 1:
        given = [item for item in given if isinstance(item, Source) or not str(item).endswith(STATUS_SUFFIX)]
    sources = [source for item in given for source in _find(item, input_format, spool)]
    if not sources:
        raise InputError("no input; name a file, a directory, a glob, or - for standard input")
    seen: set[object] = set()
    for source in sources:
        if _identity(source) in seen:
            raise InputError(f"{source.where}: named twice; name it once (for several samples of a prompt: --n)")
        seen.add(_identity(source))
    return _with_names(sources)


def local_paths(sources: Iterable[Source]) -> list[Path]:
    """The local files of an input, and the directories that were named for them."""
    files = [source.storage.path for source in sources if isinstance(source.storage, _LocalFile)]
    return [*{source.folder: None for source in sources if source.folder is not None}, *files]


def _identity(source: Source) -> object:
    return source.storage.path.resolve() if isinstance(source.storage, _LocalFile) else source.where


def _with_names(sources: Sequence[Source]) -> tuple[Source, ...]:
    """Places name a file by its last part where that tells it from the others, or else by all of its path."""
    times = Counter(source.name for source in sources)
    return tuple(source if times[source.name] == 1 else replace(source, name=source.where) for source in sources)


def _find(item: Any, input_format: InputFormat, spool: Path | None) -> list[Source]:
    if isinstance(item, Source):
        return [item]
    if str(item) == "-":
        return [_spooled(input_format, spool)]
    if re.match(r"[a-z][a-z0-9+.-]+://", text := os.fspath(item), re.IGNORECASE):
        return _find_remote(text, input_format)
    if not text:
        raise InputError("an empty name is no input; name a file, a directory, a glob, or - for standard input")
    return _find_local(Path(text), input_format)


def _source(
    where: str, storage: Storage, stamp: tuple[int, ...], input_format: InputFormat, partition: Partition
) -> Source:
    """A Source for a file that is there; where and the name for places can be written whatever the file is called."""
    where = os.fsencode(where).decode("utf-8", "replace")
    packing, kind = _packing_and_format(where, input_format)
    return Source(where, where.rsplit("/", 1)[-1], kind, packing, storage, stamp, partition=partition)


def _packing_and_format(where: str, input_format: InputFormat) -> tuple[str, Format]:
    """a.jsonl.gz -> gzip, jsonl; InputError for a suffix that says nothing."""
    name, _, suffix = where.rsplit("/", 1)[-1].lower().rpartition(".")
    packing = PACKINGS.get(f".{suffix}", "")
    if packing:
        suffix = name.rpartition(".")[2] if "." in name else ""
    kind = SUFFIXES.get(f".{suffix}") if input_format == "auto" else input_format
    if kind is None or (packing and kind == "parquet"):
        known = ", ".join(SUFFIXES)
        packed = ", ".join(PACKINGS)
        found = Path(where).suffix
        raise InputError(
            f"{where}: the suffix {found!r} is none of {known}, all but the first also with {packed}; "
            "rename or convert the file, name the others with a glob, or pass --input-format"
        )
    return packing, kind


# ---- standard input


def _spooled(input_format: InputFormat, folder: Path | None) -> Source:
    """Copy standard input to a file without a name; what it is, where nobody says, is told by its first bytes."""
    if sys.stdin is None:
        raise InputError("-: standard input is closed; pipe prompts into it, such as: < prompts.jsonl")
    stdin = sys.stdin.buffer
    if stdin.isatty():
        raise InputError("-: standard input is a terminal; pipe prompts into it, such as: < prompts.jsonl")
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            shutil.copyfileobj(stdin, file, BUFFER_BYTES)
            file.flush()
            start = os.pread(file.fileno(), 4, 0)
            spool = _Spool(cast(BinaryIO, file))
    except OSError as error:
        where = folder or tempfile.gettempdir()
        raise InputError(f"-: standard input cannot be copied to {where}: {first_line(error)}") from error
    packing = {b"\x1f\x8b": "gzip", b"\x28\xb5": "zstd"}.get(start[:2], "")
    told: Format = "parquet" if start == b"PAR1" else "jsonl"
    kind = told if input_format == "auto" else input_format
    return Source("-", "stdin", kind, packing, spool, ())


# ---- local files


def _find_local(path: Path, input_format: InputFormat) -> list[Source]:
    if has_magic(str(path)) and not os.path.lexists(path):
        return _find_glob(path, input_format)
    _check_there(path)
    if path.is_dir():
        return _find_directory(path, input_format)
    return [_local(path, input_format)]


def _local(path: Path, input_format: InputFormat, root: Path | None = None) -> Source:
    """An existing, regular, readable file; its partition is what its folders below root say."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise InputError(
                f"{path}: a pipe or device, and the input is read more than once; save it to a file first, "
                "or give it on standard input as -"
            )
        partition = _partition(path.relative_to(root).parts[:-1]) if root else ()
        file = _LocalFile(path)
        file.open().close()
        return _source(str(path), file, file.stamp(), input_format, partition)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def _check_there(path: Path) -> None:
    try:
        path.stat()
    except FileNotFoundError as error:
        near = nearest(path.name, _names_in(path.parent))
        remedy = f"; did you mean {path.parent / near}?" if near else "; check the name and the folder"
        raise InputError(f"{path}: no such file{remedy}") from error
    except (OSError, ValueError) as error:  # ValueError: a null character
        raise InputError(f"{path}: cannot be read: {first_line(error)}") from error


def _names_in(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _find_glob(pattern: Path, input_format: InputFormat) -> list[Source]:
    root = Path(*takewhile(lambda part: not has_magic(part), pattern.parts))
    paths = [Path(name) for name in sorted(glob(str(pattern), recursive=True), key=os.fsencode)]
    files = [path for path in paths if not path.is_dir() and not _is_work(path.relative_to(root).parts)]
    if not files:
        only = "only directories match (a pattern for the files in them ends in /*.parquet)" if paths else "no match"
        raise InputError(f"{pattern}: {only}; check the pattern, and that {root} is the folder")
    return [_local(path, input_format, root) for path in files]


def _find_directory(folder: Path, input_format: InputFormat) -> list[Source]:
    names = _list_files(folder, frozenset())
    names.sort(key=lambda path: os.fsencode(str(path.relative_to(folder))))
    if not names:
        raise InputError(f"{folder}: no file in this directory (hidden ones and _SUCCESS do not count); name another")
    return [replace(_local(path, input_format, folder), folder=folder) for path in names]


def _list_files(folder: Path, above: frozenset[Path]) -> list[Path]:
    """All files below a folder, links followed, but for those whose names begin with . or _, and work directories."""
    here = folder.resolve()
    if here in above:
        raise InputError(f"{folder}: a link to a directory that it is in; remove it, or name the files")
    files: list[Path] = []
    try:
        with os.scandir(folder) as entries:
            found = list(entries)
        for entry in found:
            if _is_work((entry.name,)):
                continue
            path = folder / entry.name
            files += _list_files(path, above | {here}) if entry.is_dir() else [path]
    except OSError as error:
        raise InputError(f"{error.filename or folder}: cannot be read: {error.strerror}") from error
    return files


def _is_work(parts: Iterable[str]) -> bool:
    """What no input is: hidden files, _SUCCESS and _metadata, and what a run keeps beside its output."""
    beside = (WORK_SUFFIX, STATUS_SUFFIX)
    return any(part.startswith((".", "_")) or part.endswith(beside) for part in parts if part != "..")


def _partition(folders: Iterable[str]) -> Partition:
    """("lang=en", "more", "year=2024") -> (("lang", "en"), ("year", "2024")), as Hive writes them."""
    pairs = [folder.split("=", 1) for folder in folders if "=" in folder]
    return tuple((unquote(key), None if value == NULL_PARTITION else unquote(value)) for key, value in pairs)


# ---- addresses


def _find_remote(uri: str, input_format: InputFormat) -> list[Source]:
    scheme = uri.partition("://")[0]
    shown = re.sub(r"://[^/@]*@", "://", uri.partition("?")[0])  # keys and options are nobody's business
    try:
        filesystem, path = pafs.FileSystem.from_uri(uri)
        if isinstance(filesystem, pafs.LocalFileSystem):
            return _find_local(Path(path), input_format)
        found = _list_remote(filesystem, path.rstrip("/"))
    except pa.ArrowInvalid as error:
        remedy = "download the file, or use s3://, gs://, abfs://, hdfs:// or file:// (a space is %20)"
        raise InputError(f"{shown}: not an address that can be read ({first_line(error)}); {remedy}") from error
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{shown}: cannot be read: {first_line(error)}; check the address and the keys") from error
    if not found:
        raise InputError(f"{shown}: no such file, directory or match; check the address")
    return [
        _source(
            f"{scheme}://{info.path}",
            _RemoteFile(filesystem, info.path),
            _remote_stamp(info),
            input_format,
            _partition(folders),
        )
        for info, folders in found
    ]


def _list_remote(filesystem: Any, path: str) -> list[tuple[Any, tuple[str, ...]]]:
    """The files that a file, directory or pattern stands for, each with its folders below the named one."""
    root = "/".join(takewhile(lambda part: "*" not in part, path.split("/")))
    if root == path:
        info = filesystem.get_file_info(path)
        if info.type == pafs.FileType.File:
            return [(info, ())]
    matches = re.compile(_glob_expression(path) if root != path else ".*", re.DOTALL).fullmatch
    infos = filesystem.get_file_info(pafs.FileSelector(root, recursive=True, allow_not_found=True))
    files = [info for info in infos if info.type == pafs.FileType.File and matches(info.path)]
    files.sort(key=lambda info: info.path.encode())
    below = [(info, tuple(info.path.removeprefix(root).strip("/").split("/"))) for info in files]
    return [(info, parts[:-1]) for info, parts in below if not _is_work(parts)]


def _glob_expression(pattern: str) -> str:
    """a/**/*.parquet -> an expression in which * stays within a folder and **/ is any folders, or none."""
    pieces = re.split(r"(\*\*/|\*)", pattern)
    return "".join({"**/": "(?:.*/)?", "*": "[^/]*"}.get(piece, re.escape(piece)) for piece in pieces)
