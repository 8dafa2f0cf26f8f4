"""Output files: a part for every chunk, and their merge, which takes the output's name in one rename.

At every instant the output path is absent, its previous version, or the complete new file. Closing a
pq.ParquetWriter writes a valid footer over whatever it got so far, after an exception too, so nothing is ever
written under the final name: only a file that was closed, counted and synced is renamed to it.
"""

import hashlib
import json
import os
import tempfile
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from math import isfinite
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.errors import OutputError, UsageError
from batchgen.files import sync_path
from batchgen.output.dataset import may_become_dataset
from batchgen.output.schema import rows_to_table
from batchgen.types import OutputRow

GROUP_ROWS = 65_536
GROUP_BYTES = 64 * 2**20  # a row group is held in memory until it is written
GROUP_BATCHES = 512
BATCH_ROWS = 8_192
SUFFIXES = (".parquet", ".jsonl")
METADATA_KEY = "batchgen"  # in the output's own metadata: the run manifest
FEW_VALUES = ["finish_reason", "status", "error", "parameters"]  # worth a dictionary; the other columns hardly repeat

PARQUET_OPTIONS: dict[str, Any] = {
    "compression": "zstd",
    "use_dictionary": FEW_VALUES,
    "write_statistics": ["row", "sample", "status"],
    "write_page_checksum": True,
}

LinesWriter = Callable[[Iterable[Any], BinaryIO], None]  # record batches into a file


def is_json_lines(out: Path) -> bool:
    return out.suffix.lower() == ".jsonl"


# ---- files that are whole or not there


@contextmanager
def _output_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"{out}: cannot be written: {reason}; make room or choose another path") from error


def _temporary(out: Path) -> Path:
    """Always the same for one output, so that the next run finds what a killed one left: a lock keeps others out."""
    return out.with_name(f".{out.name}.batchgen-tmp")


@contextmanager
def _replacing(out: Path) -> Iterator[BinaryIO]:
    """Yield a temporary file in the same folder that takes the name `out` on success, and goes on any error.

    A temporary that a killed run left is cleared away first.
    """
    temporary = _temporary(out)
    with _output_errors(out):
        temporary.unlink(missing_ok=True)
        try:
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, out)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_path(out.parent)


def _file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- parts


@contextmanager
def _parquet_writer(file: BinaryIO, schema: pa.Schema) -> Iterator[Any]:
    """A pq.ParquetWriter that is always closed here, never by the garbage collector."""
    writer = pq.ParquetWriter(file, schema, **PARQUET_OPTIONS)
    try:
        yield writer
    except BaseException:
        with suppress(OSError, pa.ArrowException):  # the first error is the one to tell; the file is removed
            writer.close()
        raise
    writer.close()


def write_part(rows: Sequence[OutputRow], path: Path, schema: pa.Schema, kept: Any = None) -> str:
    """Write one chunk's rows to a new file, on disk when this returns its SHA-256; equal rows give equal bytes.

    kept is a table of the columns that come from the input, as long as rows.
    """
    with _output_errors(path):
        with open(path, "xb") as file:
            with _parquet_writer(file, schema) as writer:
                writer.write_table(rows_to_table(rows, schema, kept), row_group_size=GROUP_ROWS)
            file.flush()
            os.fsync(file.fileno())
        return _file_sha256(path)


def _part_batches(part: Path, schema: pa.Schema) -> Iterator[Any]:
    """Yield a part's record batches with their checksums verified; OutputError names a damaged part."""
    try:
        with open(part, "rb") as raw, pq.ParquetFile(raw, page_checksum_verification=True) as file:
            if not file.schema_arrow.equals(schema):
                raise OutputError(f"{part}: the part has other columns than this run's; run again with --restart")
            yield from file.iter_batches(BATCH_ROWS, use_threads=False)
    except (OSError, pa.ArrowException) as error:
        reason = str(error).split("\n")[0]
        raise OutputError(f"{part}: the part is damaged ({reason}); delete it and run again") from error


# ---- merge


def _groups(batches: Iterable[Any]) -> Iterator[list[Any]]:
    """Gather small batches into row groups of up to GROUP_ROWS rows and about GROUP_BYTES bytes."""
    group: list[Any] = []
    rows = size = 0
    for batch in batches:
        if group and (rows + len(batch) > GROUP_ROWS or size + batch.nbytes > GROUP_BYTES):
            yield group
            group, rows, size = [], 0, 0
        if len(group) == GROUP_BATCHES:  # a batch of few rows is mostly its own administration, 16 KB
            group = pa.Table.from_batches(group).combine_chunks().to_batches()
        group.append(batch)
        rows += len(batch)
        size += batch.nbytes
    if group:
        yield group


def _write_parquet(batches: Iterable[Any], file: BinaryIO, schema: pa.Schema, metadata: dict[str, str]) -> None:
    with _parquet_writer(file, schema.with_metadata(metadata)) as writer:
        for group in _groups(batches):
            writer.write_table(pa.Table.from_batches(group, schema), row_group_size=GROUP_ROWS)


def _json_type(kind: Any) -> Any:
    """The type to cast to before values become Python's: text for what JSON has no word for, through all nesting."""
    if isinstance(kind, pa.BaseExtensionType):
        return _json_type(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return _json_type(kind.value_type)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return pa.large_list(_json_type(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _json_type(field.type)) for field in kind])
    if pa.types.is_float16(kind):
        return pa.float32()
    return pa.string() if pa.types.is_temporal(kind) or pa.types.is_decimal(kind) else kind


def _json_values(column: Any, name: str, out: Path) -> list[Any]:
    """A column's values as Python's; OutputError where JSON cannot hold them."""
    kind = _json_type(column.type)
    try:
        values: list[Any] = (column if kind == column.type else column.cast(kind)).to_pylist()
    except (pa.ArrowException, ValueError) as error:  # ValueError: not UTF-8, or nanoseconds within a map
        what = f"column {name!r} of type {column.type} has values that JSON cannot hold"
        raise OutputError(f"{out}: {what} ({error}); name the output .parquet") from error
    return values


def _in_json(value: object) -> str:
    return b64encode(value).decode() if isinstance(value, bytes) else str(value)


def _without_nan(value: Any) -> Any:
    """NaN and the infinities are no JSON: null."""
    if isinstance(value, float) and not isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return [_without_nan(item) for item in value] if isinstance(value, (list, tuple)) else value


def _json_line(row: dict[str, Any]) -> str:
    try:
        return _encode(row)
    except ValueError:
        return _encode(_without_nan(row))


_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, default=_in_json).encode


def write_json_lines(batches: Iterable[Any], file: BinaryIO) -> None:
    r"""One object a line, keys in the schema's order; JSON lines have no place for metadata.

    JSON escapes every control character, so the only b"\n" in the file are the ends of the rows.
    """
    out = Path(str(file.name))
    for batch in batches:
        names = batch.schema.names
        columns = [_json_values(column, name, out) for name, column in zip(names, batch.columns, strict=True)]
        rows = (dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True))
        file.write("".join(_json_line(row) + "\n" for row in rows).encode())


def _counted(batches: Iterable[Any], expected_rows: int, out: Path) -> Iterator[Any]:
    """Pass the batches on, and raise at their end unless they made up the expected number of rows."""
    rows = 0
    for batch in batches:
        rows += len(batch)
        yield batch
    if rows != expected_rows:
        raise OutputError(f"{out}: the parts hold {rows} rows, not {expected_rows}; run again with --restart")


def merge_parts(
    parts: Iterable[Path],
    out: Path,
    schema: pa.Schema,
    metadata: dict[str, str],
    expected_rows: int,
    write_lines: LinesWriter = write_json_lines,
) -> None:
    """Write all rows of the parts, in order, to a .parquet or .jsonl file that appears complete or not at all.

    Memory is one row group, whatever the number of parts; metadata goes into a Parquet file's own, and write_lines
    says how JSON lines look. Raises OutputError for a damaged part, a wrong number of rows, or a file that cannot be
    written.

    metadata={"batchgen": manifest_json} -> pq.read_schema(out).metadata[b"batchgen"]
    """
    batches = (batch for part in parts for batch in _part_batches(part, schema))
    write_output(batches, out, schema, metadata, expected_rows, write_lines)


def write_output(
    batches: Iterable[Any],
    out: Path,
    schema: pa.Schema,
    metadata: dict[str, str],
    expected_rows: int,
    write_lines: LinesWriter = write_json_lines,
) -> None:
    """The same for record batches."""
    batches = _counted(batches, expected_rows, out)
    with _replacing(out) as file:
        if is_json_lines(out):
            write_lines(batches, file)
        else:
            _write_parquet(batches, file, schema, metadata)


# ---- before the run


def check_output(out: Path, inputs: Sequence[Path], *, dataset: bool = False) -> None:
    """Refuse, before any work, an output path that could not be written or must not be replaced.

    inputs are files, and directories whose files are all read.
    """
    if not dataset and out.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{out}: the suffix {out.suffix!r} is neither of {', '.join(SUFFIXES)}; name the output so")
    with _output_errors(out):
        with suppress(FileNotFoundError, NotADirectoryError):
            _temporary(out).lstat()  # asks for the longest of the names; is_symlink and the like would answer False
        if out.is_symlink():
            raise OutputError(f"{out}: a symbolic link, which would be replaced; name the file it points to")
        if dataset:
            if not may_become_dataset(out):
                raise OutputError(f"{out}: there is something else than a dataset of batchgen; choose another name")
        elif out.is_dir():
            raise OutputError(
                f"{out}: a directory; name a file in it, such as {out / 'completions.parquet'}, "
                "or pass --format dataset"
            )
        elif out.exists() and not out.is_file():
            raise OutputError(f"{out}: a pipe or device, which cannot be replaced at once; name a regular file")
        for path in inputs:
            if out.exists() and path.exists() and out.samefile(path):
                raise OutputError(f"{out}: this is the input {path}; choose another name for the output")
            if dataset and path.resolve().is_relative_to(out.resolve()):
                raise OutputError(f"{out}: the input {path} is in it, and would be replaced; choose another name")
    check_folder(out, inputs)


def check_folder(out: Path, inputs: Sequence[Path]) -> None:
    """Refuse a folder that would be read as input, or in which nothing can be written.

    Permissions are asked by really creating a file: for root, and on a read-only mount, the bits do not tell.
    """
    for path in inputs:
        if path.is_dir() and out.parent.resolve().is_relative_to(path.resolve()):
            raise OutputError(f"{out}: it would be in the input {path} and be read with it; choose another folder")
    folder = out.parent
    if not folder.is_dir():
        what = "not a folder" if folder.exists() else "no such folder"
        raise OutputError(f"{out}: {folder} is {what}; create it (mkdir -p) or choose another")
    try:
        tempfile.TemporaryFile(dir=folder).close()  # noqa: SIM115  # made and gone
    except OSError as error:
        raise OutputError(f"{out}: the folder cannot be written: {error.strerror}; choose another") from error
