"""Older outputs to copy rows from (--reuse): they are found, checked for damage, and compared with the new run's plan.

A file's pages have checksums, and its footer has none: there, all that decides rows is written twice, or can be added
up. A part of a dataset has its SHA-256 in its name, and the digest of the plan in its receipt.
"""

import hashlib
import json
import os
import shutil
import tempfile
from base64 import b64decode
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from glob import glob, has_magic
from io import BufferedReader
from itertools import groupby
from pathlib import Path
from typing import TypeAlias, cast

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.errors import InputError
from batchgen.files import PART, SUCCESS, WORK_SUFFIX, Stamp, parse_json, stamp_of
from batchgen.input.sources import Source, find_sources
from batchgen.limits import reached_limit, reason_of
from batchgen.options import say
from batchgen.output.ledger import parse_plan, work_directory
from batchgen.output.parts import METADATA_KEY, RECEIPT_KEY, open_parquet
from batchgen.output.place import is_json_lines
from batchgen.output.reading import left_out_of, writer_of
from batchgen.output.rows import LeftOut
from batchgen.output.store import is_address
from batchgen.plan import Plan

OpenFile: TypeAlias = Callable[[], AbstractContextManager[BufferedReader]]
BLOCK_BYTES = 2**20
FIRST_PAGE = 4  # bytes before the first page of a Parquet file


@dataclass(frozen=True, slots=True)
class OlderFile:
    """A Parquet file of an older output."""

    where: str
    open: OpenFile
    sha256: str = ""  # the start of it, of a part


# ---- reading


def remedy() -> str:
    return f"take the file as batchgen wrote it, or leave it out of {say('reuse')}"


@contextmanager
def _errors(where: str) -> Iterator[None]:
    """Whatever damage does to a reader is an InputError that names the file."""
    try:
        yield
    except (OSError, pa.ArrowException, UnicodeDecodeError, ValueError, KeyError, TypeError, RecursionError) as error:
        if reached_limit(error):
            raise
        if getattr(error, "strerror", None):  # of the system, such as a permission that is missing
            raise InputError(f"{where}: cannot be read: {reason_of(error)}; correct that, and run again") from error
        raise InputError(f"{where}: damaged, or not written by batchgen ({reason_of(error)}); {remedy()}") from error


class OlderOutput:
    """A file, or a dataset with its _SUCCESS, whose plan is known; `batches` reads its rows."""

    def __init__(self, where: str, files: Sequence[OlderFile], success: bytes | None = None) -> None:
        """Reads what says how it was made; InputError if that is damaged."""
        self.where, self.files, self.success = where, files, success
        self.writer = ""  # the version that made it, if its plan is none of this version
        self.plan: Plan | None = None
        self.names: set[str] = set()  # of columns
        self.left_out: LeftOut = Counter()
        text = success
        for file in files[:1]:
            with _errors(file.where), file.open() as raw, open_parquet(raw) as parquet:
                self.names = set(parquet.schema_arrow.names)
                if text is None:
                    text = _checked_plan(parquet)
                    self.left_out = left_out_of(parquet)
        try:
            self.plan = parse_plan(text or b"")
        except ValueError as error:
            self.writer = writer_of(text or b"")
            if not self.writer:
                what = f"its metadata under {METADATA_KEY!r} is not a plan of batchgen ({error})"
                raise InputError(f"{self.where}: {what}; {remedy()}") from error

    def sha256(self) -> str:
        """16 digits, of the file, or of a dataset's plan and the names of its parts."""
        if self.success is None:
            (file,) = self.files
            with _errors(file.where), file.open() as raw:
                return hashlib.file_digest(raw, "sha256").hexdigest()[:16]
        names = json.dumps([file.sha256 for file in self.files])
        return hashlib.sha256(self.success + names.encode()).hexdigest()[:16]

    def batches(self, columns: Sequence[str], rows: int) -> Iterator[pa.RecordBatch]:
        """Yield the rows in batches of so many at most; InputError if a file is damaged."""
        for file in self.files:
            with _errors(file.where), file.open() as raw:
                if file.sha256 and not hashlib.file_digest(raw, "sha256").hexdigest().startswith(file.sha256):
                    raise ValueError("it has not the SHA-256 that is in its name")
                raw.seek(0)
                with open_parquet(raw) as parquet:
                    for batches in _read_groups(parquet, raw, columns, rows, checked=not file.sha256):
                        self._check_receipt(parquet)
                        yield from batches

    def _check_receipt(self, parquet: pq.ParquetFile) -> None:
        """ValueError for a part of another run."""
        if self.success is not None:
            receipt = parse_json(parquet.schema_arrow.metadata[RECEIPT_KEY.encode()])
            if self.plan is None or receipt["plan"] != self.plan.digest:
                raise ValueError(f"the part was not made by the plan in {SUCCESS}")


def _checked_plan(parquet: pq.ParquetFile) -> bytes:
    """The plan of a file, which is in its footer twice; ValueError unless both are the same."""
    metadata = parquet.metadata.metadata or {}
    text = metadata.get(METADATA_KEY.encode())
    if text is None:
        raise ValueError(f"it has no metadata under {METADATA_KEY!r}")
    schema = pa.ipc.read_schema(pa.py_buffer(b64decode(metadata[b"ARROW:schema"], validate=True)))
    if (schema.metadata or {}).get(METADATA_KEY.encode()) != text:
        raise ValueError("what says how it was made is there twice, and differs")
    if not schema.equals(parquet.schema_arrow):
        raise ValueError("its columns are described twice, and differ")
    return bytes(text)


def _read_groups(
    parquet: pq.ParquetFile, raw: BufferedReader, columns: Sequence[str], rows: int, *, checked: bool
) -> Iterator[list[pa.RecordBatch]]:
    """Yield the batches of each row group; ValueError unless its columns are where they must be, if that is checked.

    Each is read before its metadata is looked at: where that is damaged, reading raises, and pyarrow's look aborts.
    """
    names, last = [*parquet.schema_arrow.names], (-1, 0)  # the column that was read before, and where it ended
    for number in range(parquet.num_row_groups):
        batches = [*parquet.iter_batches(rows, row_groups=[number], columns=[*columns], use_threads=False)]
        for name in sorted(columns, key=names.index) if checked else ():
            last = _check_chunks(parquet, number, name, last)
        if sum(map(len, batches)) != parquet.metadata.row_group(number).num_rows:
            raise ValueError(f"row group {number} has not the rows that it should have")
        yield batches
    size = raw.seek(0, os.SEEK_END)
    if checked and last[1] > size:
        raise ValueError("its footer is damaged")


def _check_chunks(parquet: pq.ParquetFile, number: int, name: str, last: tuple[int, int]) -> tuple[int, int]:
    """Compare where the chunks of a column begin with where those before it ended; returns the same of these."""
    group, (before, at) = parquet.metadata.row_group(number), last
    paths = [parquet.schema.column(index).path for index in range(group.num_columns)]
    for index in (index for index, path in enumerate(paths) if path.split(".")[0] == name):
        chunk = group.column(index)
        begin = chunk.dictionary_page_offset if chunk.has_dictionary_page else chunk.data_page_offset
        is_next = index == before + 1
        if begin < at or (is_next and begin != max(at, FIRST_PAGE)) or chunk.path_in_schema != paths[index]:
            raise ValueError(f"its footer is damaged, at column {name!r} of row group {number}")
        before, at = index, begin + chunk.total_compressed_size
    return (before if before + 1 < group.num_columns else -1), at


# ---- finding


def find_older(names: Sequence[str], spool: Path, stack: ExitStack) -> list[OlderOutput]:
    """The outputs that are named, each once: files, datasets, globs, addresses.

    `spool` is for copies from stores, which may be open until the stack is closed.
    """
    found: dict[str, OlderOutput] = {}
    for name in names:
        if is_address(name):
            outputs = _find_remote(name, spool, stack)
        else:
            outputs = (_find_local(path, spool) for path in _local_paths(name))
        found |= {one.where: one for one in outputs if one.where not in found}
    return list(found.values())


def _local_paths(name: str) -> list[Path]:
    path = Path(name)
    if not has_magic(name) or os.path.lexists(path):
        return [path]
    paths = [Path(one) for one in sorted(glob(name, recursive=True), key=os.fsencode)]
    paths = [one for one in paths if one.suffix.lower() == ".parquet" or (one / SUCCESS).exists()]
    if not paths:
        raise InputError(f"{name}: no Parquet file and no dataset matches; check the pattern of {say('reuse')}")
    return paths


def _find_local(path: Path, spool: Path) -> OlderOutput:
    if not path.exists():
        work = work_directory(path)
        if work.exists() and not work.samefile(spool):  # which is this run's own
            raise InputError(f"{path}: its run has not ended; run that command again first, to its end")
        raise InputError(f"{path}: no such file; check the name given to {say('reuse')}")
    where = str(path.resolve())
    if path.is_dir():
        return _find_dataset(path, where)
    _refuse_lines(str(path))
    if not path.is_file():
        raise InputError(f"{path}: a pipe or a device, and no file; name a .parquet file in {say('reuse')}")
    return OlderOutput(where, [OlderFile(str(path), partial(_open_local, path, []))])


def _refuse_lines(where: str) -> None:
    if is_json_lines(Path(where)):
        what = "JSON lines do not say how they were made, so no row can be copied from them"
        raise InputError(f"{where}: {what}; keep outputs as .parquet to reuse them")


def _find_dataset(folder: Path, where: str) -> OlderOutput:
    names = sorted(path.name for path in folder.iterdir())
    if SUCCESS not in names:
        if folder.name.endswith(WORK_SUFFIX) or any(map(PART.fullmatch, names)):
            what = "the work of a run that has not ended; run that command again first, to its end"
            raise InputError(f"{folder}: {what}, and name its output")
        what = f"a folder without batchgen's {SUCCESS}, so not a complete dataset"
        raise InputError(f"{folder}: {what}; name the files in it, such as '{folder}/*.parquet'")
    with _errors(str(folder)):
        success = (folder / SUCCESS).read_bytes()
    parts = [(folder / name, match[2]) for name in names if (match := PART.fullmatch(name))]
    files = [OlderFile(str(path), partial(_open_local, path, []), sha256) for path, sha256 in parts]
    return OlderOutput(where, files, success)


def _find_remote(name: str, spool: Path, stack: ExitStack) -> Iterator[OlderOutput]:
    """Those of an address: Parquet files, and the datasets that parts among them are of."""
    sources = find_sources([name], "parquet")
    for source in sources:
        _refuse_lines(source.where)
    for folder, group in groupby(sources, lambda source: _prefix(source.where)):
        files = [
            OlderFile(one.where, partial(_open_remote, one, spool, stack, []), _part_sha256(one.where)) for one in group
        ]
        if folder:
            yield OlderOutput(folder, files, _read_success(files, sources, folder))
        else:
            yield from (OlderOutput(one.where, [one]) for one in files)


def _part_sha256(where: str) -> str:
    match = PART.fullmatch(where.rpartition("/")[2])
    return match[2] if match else ""


def _prefix(where: str) -> str:
    """The dataset that a file may be a part of, or nothing."""
    return where.rpartition("/")[0] if _part_sha256(where) else ""


def _read_success(files: Sequence[OlderFile], sources: Sequence[Source], folder: str) -> bytes:
    storage = next(one for one in sources if one.where == files[0].where).storage
    path = str(storage.path).rpartition("/")[0]  # type: ignore[union-attr]  # it is no spool
    try:
        with storage.filesystem.open_input_stream(f"{path}/{SUCCESS}") as file:  # type: ignore[union-attr]
            return bytes(file.read())
    except FileNotFoundError as error:
        what = f"has no {SUCCESS}: its run has not ended"
        raise InputError(f"{folder}: {what}; run that command again first, to its end") from error
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{folder}: {SUCCESS} cannot be read: {reason_of(error)}") from error


@contextmanager
def _open_local(path: Path, seen: list[Stamp]) -> Iterator[BufferedReader]:
    """seen: the file's stamp when it was opened first."""
    with open(path, "rb") as file:
        seen.append(stamp_of(file.fileno()))
        yield file
        if {stamp_of(file.fileno()), *seen} != {seen[0]}:
            raise InputError(f"{path}: the file was changed while it was being read; run again when nothing writes it")


@contextmanager
def _open_remote(source: Source, spool: Path, stack: ExitStack, kept: list[BufferedReader]) -> Iterator[BufferedReader]:
    """A copy; the only file of an output is opened several times, and its copy is kept until the stack is closed."""
    if _part_sha256(source.where):
        with _copy(source, spool) as copy:
            yield copy
        return
    if not kept:
        kept.append(stack.enter_context(_copy(source, spool)))
    kept[0].seek(0)
    yield kept[0]


@contextmanager
def _copy(source: Source, spool: Path) -> Iterator[BufferedReader]:
    """What is in a store, in a file without a name."""
    with tempfile.TemporaryFile(dir=spool) as copy:
        try:
            with source.storage.open() as file:
                shutil.copyfileobj(file, copy, BLOCK_BYTES)
        except (OSError, pa.ArrowException) as error:
            what = f"cannot be copied to {spool}: {reason_of(error)}"
            raise InputError(f"{source.where}: {what}; correct that, and run again") from error
        copy.seek(0)
        yield cast(BufferedReader, copy)
