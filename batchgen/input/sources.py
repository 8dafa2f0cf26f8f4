"""The files of an input: paths, globs, directories, addresses and standard input become an ordered list of Sources.

A Source can be opened more than once, and gives the same bytes each time or an error. Inputs are read in the order
given; the files of a glob or a directory are sorted by path, byte by byte.
"""

import gzip
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import stat
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from glob import escape, glob, has_magic
from itertools import accumulate, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeAlias, cast
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from batchgen.errors import InputError
from batchgen.files import (
    CARD,
    CARD_MARK,
    PLAN_SUFFIX,
    STATUS_SUFFIX,
    WORK_SUFFIX,
    Contents,
    SteadyFile,
    read_object,
    stamp_of,
)
from batchgen.input.tables import PATTERNS, folders_of, refuse_tables
from batchgen.input.words import find_nearest
from batchgen.job import Files
from batchgen.limits import reason_of
from batchgen.options import say

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

SUFFIXES = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "txt",  # a prompt a line; in a directory, where it may be a README.txt, only if named
}
PACKINGS = {".gz": "gzip", ".zst": "zstd"}
BUFFER_BYTES = 2**20
REMOTE_BUFFER_BYTES = 8 * 2**20  # of one request
LONG_WINDOW = "packed with a zstd window of more than 128 MiB; unpack it first: zstd -d --long=31"
# of a file or a stream of Arrow, which have one suffix
_TO_PARQUET = (
    "import pyarrow as a, pyarrow.parquet as p; f = a.memory_map(%s); start = f.read(6); f.seek(0); "
    'table = (a.ipc.open_file if start == b"ARROW1" else a.ipc.open_stream)(f).read_all(); '
    'p.write_table(table, "prompts.parquet")'
)
MAX_BESIDE_BYTES = 2**24  # of a status or a plan
BESIDE_KEYS = ({"state", "exit_code", "output", "rows_done"}, {"sha256", "statuses", "plan"})
NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"

# raised by a decompressor if bytes are damaged, truncated, or not compressed
UNPACKING_ERRORS = (EOFError, zlib.error, gzip.BadGzipFile, OSError)

Partition = tuple[tuple[str, str | None], ...]
RawFile: TypeAlias = "io.RawIOBase | pa.NativeFile"  # unbuffered, seekable


@dataclass(frozen=True, slots=True)
class _LocalFile:
    path: Path

    def open(self) -> RawFile:
        return open(self.path, "rb", buffering=0)

    def stamp(self) -> tuple[int, ...]:
        return stamp_of(self.path)


@dataclass(frozen=True, slots=True)
class _RemoteFile:
    """A file in one of pyarrow's filesystems; path is as that filesystem writes it."""

    filesystem: pafs.FileSystem
    path: str

    def open(self) -> RawFile:
        return self.filesystem.open_input_file(self.path)

    def stamp(self) -> tuple[int, ...]:
        return _remote_stamp(self.filesystem.get_file_info(self.path))


def _remote_stamp(info: pafs.FileInfo) -> tuple[int, ...]:
    """Whole seconds: a listing may have a finer time than a query for one file."""
    return info.type.value, info.size or 0, (info.mtime_ns or 0) // 10**9


class _Spool:
    """A copy of standard input in a file without a name: the system deletes it however this process ends."""

    def __init__(self, file: BinaryIO) -> None:
        self.descriptor = os.dup(file.fileno())

    def __del__(self) -> None:
        os.close(self.descriptor)

    def open(self) -> RawFile:
        return _SpoolReader(self)

    def stamp(self) -> tuple[int, ...]:
        return ()


class _SpoolReader(io.RawIOBase):
    """Reads a descriptor from its start and never moves its position, so that several readers can share it."""

    def __init__(self, spool: _Spool) -> None:
        self.spool, self.position = spool, 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + (os.fstat(self.spool.descriptor).st_size if whence == os.SEEK_END else 0)
        return self.position

    def read(self, size: int = -1) -> bytes:
        data = os.pread(self.spool.descriptor, size, self.position)
        self.position += len(data)
        return data


Storage: TypeAlias = _LocalFile | _RemoteFile | _Spool  # open() starts at byte 0; another stamp() hints at other bytes


@dataclass(frozen=True, slots=True)
class Source:
    """One file of an input: errors about the file name it `where`, places in it begin with `name` (`name:12`)."""

    where: str
    name: str
    format: str  # a key of prompts.FORMATS
    packing: str  # "", "gzip" or "zstd"
    storage: Storage
    contents: Contents = field(compare=False)  # as they were read first
    folder: Path | None = None  # the directory that the user named, if not the file itself
    partition: Partition = ()  # of lang=en/year=2024/part-0.parquet: (("lang", "en"), ("year", "2024"))


class HashingFile(io.RawIOBase):
    """Hashes and counts the bytes of a file while they are read."""

    def __init__(self, raw: io.RawIOBase) -> None:
        self.raw, self.digest, self.bytes = raw, hashlib.sha256(), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        count: int = self.raw.readinto(buffer) or 0
        self.digest.update(memoryview(buffer)[:count])
        self.bytes += count
        return count


# ---- opening


@contextmanager
def open_raw(source: Source) -> Iterator[SteadyFile]:
    """Open the stored bytes, seekable; InputError, also for what is read later, if they are not those of before."""
    try:
        raw = source.storage.open()
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{source.where}: cannot be read: {reason_of(error)}") from error
    with raw:
        yield SteadyFile(raw, source.contents, lambda: _changed(source))


@contextmanager
def open_bytes(source: Source) -> Iterator[tuple[io.BufferedReader, HashingFile]]:
    """Open the unpacked bytes; the second value hashes and counts the stored bytes."""
    size = source.contents.block_bytes
    with open_raw(source) as raw:
        if source.packing and not raw.seek(0, os.SEEK_END):
            what = f"no bytes, and {source.packing} data of nothing has some: truncated"
            raise InputError(f"{source.where}: {what}; fetch or pack it again")
        raw.seek(0)
        hashing = HashingFile(raw)
        file: RawFile = hashing
        if source.packing == "gzip":
            file = gzip.GzipFile(fileobj=io.BufferedReader(hashing, size))
        elif source.packing == "zstd":
            file = pa.CompressedInputStream(pa.PythonFile(io.BufferedReader(hashing, size), "r"), "zstd")
        with io.BufferedReader(file, size) as unpacked:
            yield unpacked, hashing


@contextmanager
def open_parquet(source: Source) -> Iterator[tuple[pq.ParquetFile, SteadyFile]]:
    """Open a Parquet file, and the stored bytes; it reads pages, not whole row groups, and verifies their checksums."""
    with open_raw(source) as raw:
        try:
            file = pq.ParquetFile(raw, buffer_size=BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise InputError(f"{source.where}: not a Parquet file, or a damaged one ({reason_of(error)})") from error
        with file:
            yield file, raw


def check_unchanged(source: Source) -> None:
    """Raise InputError if the file has other bytes than before; they are read again if its time or size differs."""
    try:
        stamp = source.storage.stamp()
    except (OSError, pa.ArrowException) as error:
        raise _changed(source) from error
    if stamp != source.contents.stamp:
        with open_raw(source) as raw:
            while raw.read(BUFFER_BYTES):
                pass
        source.contents.stamp = stamp


def check_local_unchanged(source: Source) -> None:
    """check_unchanged, if asking costs no request."""
    if isinstance(source.storage, _LocalFile):
        check_unchanged(source)


def _changed(source: Source) -> InputError:
    remedy = f"put it back to resume, or run again with {say('restart', True)} when nothing writes it any more"
    return InputError(f"{source.where}: the file was changed while it was being read; {remedy}")


def needs_long_window(error: Exception) -> bool:
    return "requires too much memory" in str(error)  # zstd's words


def read_error(source: Source, line: int, error: Exception) -> InputError:
    """The error to raise when reading or unpacking fails at a line with one of UNPACKING_ERRORS."""
    if needs_long_window(error):
        return InputError(f"{source.where}: {LONG_WINDOW} {shlex.quote(source.where)}")
    if source.packing and not getattr(error, "errno", None):
        what = f"the {source.packing} data is truncated or damaged here ({reason_of(error)})"
        return InputError(f"{source.name}:{line}: {what}; fetch or pack the file again")
    return InputError(f"{source.name}:{line}: cannot be read: {reason_of(error)}")


# ---- finding


def find_sources(files: Files, input_format: str = "auto", spool: Path | None = None) -> tuple[Source, ...]:
    """List the files of an input in order; nothing is opened. Raises InputError naming what is missing.

    Standard input is copied to a nameless file in the folder `spool` (default: the system's). Among several files, what
    a run wrote beside its output is skipped: the shell includes it in *.json.
    """
    given = [files] if isinstance(files, str | Path) else list(files)
    if len(given) > 1:
        given = [file for file in given if not _is_beside(_LocalFile(Path(file)))]
    sources = [source for file in given for source in _find(os.fspath(file), input_format, spool)]
    if not sources:
        raise InputError("no input; name a file, a directory, a glob, or - for standard input")
    seen: set[object] = set()
    for source in sources:
        if _identity(source) in seen:
            raise InputError(f"{source.where}: named twice; name it once (for several samples of a prompt: {say('n')})")
        seen.add(_identity(source))
    return _name_apart(sources)


def local_paths(sources: Iterable[Source]) -> list[Path]:
    """The local files of an input, and the directories that the user named for them."""
    files = [source.storage.path for source in sources if isinstance(source.storage, _LocalFile)]
    return [*{source.folder: None for source in sources if source.folder is not None}, *files]


def _identity(source: Source) -> object:
    return source.storage.path.resolve() if isinstance(source.storage, _LocalFile) else source.where


def _name_apart(sources: Sequence[Source]) -> tuple[Source, ...]:
    """Name files in places by the last part of the path, or by the whole path if two files share that part."""
    times = Counter(source.name for source in sources)
    return tuple(source if times[source.name] == 1 else replace(source, name=source.where) for source in sources)


def _find(file: str, input_format: str, spool: Path | None) -> list[Source]:
    if file == "-":
        return [_copy_stdin(input_format, spool)]
    if re.match(r"[a-z][a-z0-9+.-]+://", file, re.IGNORECASE):
        return _find_remote(file, input_format)
    if not file:
        raise InputError("an empty name is not an input; name a file, a directory, a glob, or - for standard input")
    return _find_local(Path(file), input_format)


def _make_source(where: str, storage: Storage, stamp: tuple[int, ...], input_format: str) -> Source:
    """A Source of an existing file; `where` and `name` can be printed even if the file's name is not UTF-8."""
    where = os.fsencode(where).decode("utf-8", "replace")
    packing, format_ = _packing_and_format(where, input_format)
    block_bytes = REMOTE_BUFFER_BYTES if isinstance(storage, _RemoteFile) else BUFFER_BYTES
    return Source(where, where.rsplit("/", 1)[-1], format_, packing, storage, Contents(stamp, block_bytes))


def _packing_and_format(where: str, input_format: str) -> tuple[str, str]:
    """a.jsonl.gz -> gzip, jsonl; InputError for an unknown suffix."""
    name, _, suffix = where.rsplit("/", 1)[-1].lower().rpartition(".")
    packing = PACKINGS.get(f".{suffix}", "")
    if packing:
        suffix = name.rpartition(".")[2] if "." in name else ""
    format_ = SUFFIXES.get(f".{suffix}") if input_format == "auto" else input_format
    if suffix in ("arrow", "feather", "ipc") and format_ is None:
        raise InputError(
            f"{where}: an Arrow file; write it as Parquet: python -c {shlex.quote(_TO_PARQUET % json.dumps(where))}"
        )
    if format_ is None or (packing and format_ == "parquet"):
        *most, last = SUFFIXES
        raise InputError(
            f"{where}: unknown format; use {', '.join(most)} or {last} (all but .parquet also with "
            f"{' or '.join(PACKINGS)}): rename or convert the file, name the others with a glob, or pass "
            f"{say('input_format')}"
        )
    return packing, format_


# ---- standard input


def _copy_stdin(input_format: str, folder: Path | None) -> Source:
    """Copy standard input to a file without a name; its first bytes decide its packing and, if needed, its format."""
    remedy = "pipe prompts into it, such as: < prompts.jsonl"
    if sys.stdin is None:
        raise InputError(f"-: standard input is closed; {remedy}")
    stdin = sys.stdin.buffer
    if stdin.isatty():
        raise InputError(f"-: standard input is a terminal; {remedy}")
    with suppress(OSError):  # it may be no file
        os.set_blocking(stdin.fileno(), True)  # else a pipe that is empty for a moment reads as one at its end
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            shutil.copyfileobj(stdin, file, BUFFER_BYTES)
            file.flush()
            start = os.pread(file.fileno(), 4, 0)
            spool = _Spool(cast(BinaryIO, file))
    except OSError as error:
        target = folder or tempfile.gettempdir()
        raise InputError(f"-: standard input cannot be copied to {target}: {reason_of(error)}") from error
    packing = {b"\x1f\x8b": "gzip", b"\x28\xb5": "zstd"}.get(start[:2], "")
    if input_format == "auto":
        input_format = "parquet" if start == b"PAR1" else "jsonl"
    return Source("-", "stdin", input_format, packing, spool, Contents())


# ---- local files


def _find_local(path: Path, input_format: str) -> list[Source]:
    if has_magic(str(path)) and not os.path.lexists(path):
        return _find_glob(path, input_format)
    _check_exists(path)
    if path.is_dir():
        return _find_directory(path, input_format)
    _refuse_local_tables([path])
    return [_find_file(path, input_format)]


def _refuse_local_tables(paths: Sequence[Path]) -> None:
    files = [os.path.realpath(path) for path in paths]
    refuse_tables(
        files, (log for one in folders_of(files) for name in PATTERNS for log in glob(f"{escape(one)}/{name}"))
    )


def _find_file(path: Path, input_format: str, root: Path | None = None) -> Source:
    """A regular file; the names of its folders below root are its partition."""
    file = _LocalFile(path)
    try:
        mode, stamp = path.stat().st_mode, file.stamp()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        raise InputError(
            f"{path}: a pipe or device, and the input is read more than once; save it to a file first, "
            "or give it on standard input as -"
        )
    source = _make_source(str(path), file, stamp, input_format)
    return replace(source, partition=_parse_partition(path.relative_to(root).parts[:-1])) if root else source


def _check_exists(path: Path) -> None:
    try:
        path.stat()
    except FileNotFoundError as error:
        names: list[str] = []
        with suppress(OSError):
            names = sorted(os.listdir(path.parent))
        near = find_nearest(path.name, names)
        remedy = f"; did you mean {path.parent / near}?" if near else "; check the name and the folder"
        raise InputError(f"{path}: no such file{remedy}") from error
    except (OSError, ValueError) as error:  # ValueError: a null character
        raise InputError(f"{path}: cannot be read: {reason_of(error)}") from error


def _find_glob(pattern: Path, input_format: str) -> list[Source]:
    root = Path(*takewhile(lambda part: not has_magic(part), pattern.parts))
    paths = [Path(name) for name in sorted(glob(str(pattern), recursive=True), key=os.fsencode)]
    files = [path for path in paths if not path.is_dir() and not _is_skipped(path, root, pattern.parts)]
    if not files:
        only = "only directories match (a pattern for the files in them ends in /*.parquet)" if paths else "no match"
        raise InputError(f"{pattern}: {only}; check the pattern, and that {root} is the folder")
    _refuse_local_tables(files)
    return [_find_file(path, input_format, root) for path in files]


def _find_directory(folder: Path, input_format: str) -> list[Source]:
    paths = _list_files(folder, frozenset())
    paths.sort(key=lambda path: os.fsencode(str(path.relative_to(folder))))
    if not paths:
        raise InputError(f"{folder}: no file in this directory (hidden ones and _SUCCESS do not count); name another")
    _refuse_local_tables(paths)
    if input_format == "auto":
        _refuse_text(str(folder), map(str, paths))
    return [replace(_find_file(path, input_format, folder), folder=folder) for path in paths]


def _refuse_text(folder: str, paths: Iterable[str]) -> None:
    for path in paths:
        if Path(path.removesuffix(".gz").removesuffix(".zst")).suffix.lower() == ".txt":
            remedy = f"name such files with a glob ({folder}/*.txt), or pass {say('input_format', 'txt')}"
            raise InputError(f"{path}: is this text a prompt a line, or a note about the others? {remedy}")


def _list_files(folder: Path, above: frozenset[Path]) -> list[Path]:
    """All files below a folder, except skipped ones; links are followed."""
    here = folder.resolve()
    if here in above:
        raise InputError(f"{folder}: a link to a directory that contains it; remove it, or name the files")
    files: list[Path] = []
    try:
        with os.scandir(folder) as entries:
            found = list(entries)
        for entry in found:
            path = folder / entry.name
            if _is_skipped(path, folder):
                continue
            files += _list_files(path, above | {here}) if entry.is_dir() else [path]
    except OSError as error:
        raise InputError(f"{error.filename or folder}: cannot be read: {error.strerror}") from error
    return files


def _is_skipped(path: Path, root: Path, pattern: Sequence[str] = ()) -> bool:
    """Whether a path below root is no input: it is hidden, or a run keeps it beside its output."""
    parts = path.relative_to(root).parts
    is_work = _is_work(parts, lambda name: (root / name).exists())
    return _is_hidden(parts, pattern) or is_work or _is_beside(_LocalFile(path))


def _is_hidden(parts: Sequence[str], pattern: Sequence[str] = ()) -> bool:
    """Whether a path is not meant: a part of it begins with . or _ as _SUCCESS and _temporary/ do.

    In a pattern, * means _a.jsonl too, as in a shell, and a part that begins with one of them means such names.
    """
    spelled = {part[0] for part in pattern if part.startswith((".", "_"))}
    hidden = [part for part in parts if part[0] in {".", "_"} - spelled and part != ".."]
    return bool(hidden) and not (pattern and hidden == [parts[-1]] and _has_suffix(parts[-1]))


def _has_suffix(name: str) -> bool:
    return name[0] == "_" and name.lower().removesuffix(".gz").removesuffix(".zst").endswith(tuple(SUFFIXES))


def _is_work(parts: Sequence[str], exists: Callable[[str], bool]) -> bool:
    """Whether a path is in a run's work directory, which has a lock."""
    below = accumulate(parts, lambda folder, name: f"{folder}/{name}")
    return any(path.endswith(WORK_SUFFIX) and exists(f"{path}/lock") for path in below)


def _is_beside(file: "_LocalFile | _RemoteFile") -> bool:
    """Whether a file is a status, a plan or a dataset card, by its name and by what it says."""
    is_card = str(file.path).rpartition("/")[2] == CARD
    if not is_card and not str(file.path).endswith((STATUS_SUFFIX, PLAN_SUFFIX)):
        return False
    try:
        with file.open() as opened:
            data = opened.read(MAX_BESIDE_BYTES)
    except (OSError, pa.ArrowException):
        return False
    if is_card:
        return CARD_MARK in data
    values = read_object(data)
    return any(keys <= values.keys() for keys in BESIDE_KEYS)


def _parse_partition(folders: Iterable[str]) -> Partition:
    """("lang=en", "more", "year=2024") -> (("lang", "en"), ("year", "2024")), as Hive writes them."""
    pairs = [folder.split("=", 1) for folder in folders if "=" in folder]
    return tuple((unquote(key), None if value == NULL_PARTITION else unquote(value)) for key, value in pairs)


# ---- addresses


def _find_remote(uri: str, input_format: str) -> list[Source]:
    scheme = uri.partition("://")[0]
    address = re.sub(r"://[^/@]*@", "://", uri.partition("?")[0])  # errors show neither keys nor options
    try:
        filesystem, path = pafs.FileSystem.from_uri(uri)
        if isinstance(filesystem, pafs.LocalFileSystem):
            return _find_local(Path(path), input_format)
        found, listed = _list_remote(filesystem, path.rstrip("/"))
        _refuse_remote_tables(filesystem, f"{scheme}://", [info.path for info, _ in found], listed)
        if input_format == "auto" and "*" not in path and listed[0] not in [info.path for info, _ in found]:
            _refuse_text(address, (f"{scheme}://{info.path}" for info, _ in found))
    except pa.ArrowInvalid as error:
        remedy = "download the file, or use s3://, gs://, abfs://, hdfs:// or file:// (a space is %20)"
        raise InputError(f"{address}: this address cannot be read ({reason_of(error)}); {remedy}") from error
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{address}: cannot be read: {reason_of(error)}; check the address and the keys") from error
    if not found:
        raise InputError(f"{address}: no such file, directory or match; check the address")
    sources = []
    for info, folders in found:
        file = _RemoteFile(filesystem, info.path)
        source = _make_source(f"{scheme}://{info.path}", file, _remote_stamp(info), input_format)
        sources.append(replace(source, partition=_parse_partition(folders)))
    return sources


def _list_remote(
    filesystem: pafs.FileSystem, path: str
) -> tuple[list[tuple[pafs.FileInfo, tuple[str, ...]]], list[str]]:
    """The files of a file, directory or pattern, each with its folders below the first `*` or the directory; and all
    paths that were listed to find them, first the folder of the listing."""
    root = "/".join(takewhile(lambda part: "*" not in part, path.split("/")))
    if root == path:
        info = filesystem.get_file_info(path)
        if info.type == pafs.FileType.File:
            return [(info, ())], [root]
    matches = re.compile(_glob_expression(path) if root != path else ".*", re.DOTALL).fullmatch
    infos = filesystem.get_file_info(pafs.FileSelector(root, recursive=True, allow_not_found=True))
    files = [info for info in infos if info.type == pafs.FileType.File and matches(info.path)]
    files.sort(key=lambda info: info.path.encode())
    below = [(info, tuple(info.path.removeprefix(root).strip("/").split("/"))) for info in files]
    pattern = path.split("/") if root != path else ()
    listed = {info.path for info in infos}
    found = []
    for info, parts in below:
        is_work = _is_work(parts, lambda name: f"{root}/{name}" in listed)
        if not (_is_hidden(parts, pattern) or is_work or _is_beside(_RemoteFile(filesystem, info.path))):
            found.append((info, parts[:-1]))
    return found, [root, *(info.path for info in infos)]


def _refuse_remote_tables(filesystem: pafs.FileSystem, before: str, files: Sequence[str], listed: list[str]) -> None:
    """listed: a folder and all paths below it; the folders above it are asked for."""
    logs = list(listed)
    for folder in folders_of([f"{listed[0]}/file"]):
        for name in PATTERNS:
            path, _, pattern = f"{folder}/{name}".partition("/*")
            with suppress(OSError):  # a key may read the files and not list the folders above them
                asked = pafs.FileSelector(path, allow_not_found=True) if pattern else [path]
                infos = filesystem.get_file_info(asked)
                logs += [info.path for info in infos if info.type != pafs.FileType.NotFound]
    refuse_tables(files, logs, before)


def _glob_expression(pattern: str) -> str:
    """a/**/*.parquet -> a regular expression: * stays within a folder, **/ is any number of folders."""
    pieces = re.split(r"(\*\*/|\*)", pattern)
    return "".join({"**/": "(?:.*/)?", "*": "[^/]*"}.get(piece, re.escape(piece)) for piece in pieces)
