"""A finished output, read again: the plan in its metadata, and its rows."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.errors import InputError
from batchgen.files import parse_json
from batchgen.output.file import METADATA_KEY
from batchgen.output.ledger import parse_plan
from batchgen.output.parts import BATCH_ROWS
from batchgen.output.place import is_json_lines
from batchgen.plan import Plan

_NUMBERS = ("row", "sample", "prompt_tokens", "completion_tokens")
_TEXTS = ("id", "prompt", "completion", "finish_reason", "status", "error")


def _damaged(path: Path, error: Exception) -> InputError:
    reason = str(error).split("\n")[0]
    return InputError(f"{path}: not a Parquet file, or a damaged one ({reason}); take the file as batchgen wrote it")


@contextmanager
def _file_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; check the name") from error
    except OSError as error:
        if error.strerror:
            raise InputError(f"{path}: {error.strerror}; check the name") from error
        raise _damaged(path, error) from error  # Arrow's own, such as a page whose checksum is wrong
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise _damaged(path, error) from error


@contextmanager
def open_output_file(path: Path) -> Iterator[pq.ParquetFile]:
    """Open an output's Parquet file; InputError if it is missing or damaged, also for what is read later."""
    with _file_errors(path), open(path, "rb") as raw, pq.ParquetFile(raw, page_checksum_verification=True) as file:
        yield file


def _read_metadata(path: Path) -> tuple[bytes, pa.Schema]:
    """What the file's metadata has under METADATA_KEY, and its columns."""
    if is_json_lines(path):
        raise InputError(f"{path}: JSON lines have no place for the run's metadata; write the output as .parquet")
    with open_output_file(path) as file:
        schema = file.schema_arrow
    text = (schema.metadata or {}).get(METADATA_KEY.encode())
    if text is None:
        raise InputError(
            f"{path}: has no metadata under {METADATA_KEY!r}: batchgen did not write it, or another program wrote it "
            "anew; take the file as batchgen wrote it"
        )
    return text, schema


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind))


def _check_columns(path: Path, schema: pa.Schema) -> None:
    for name in (*_NUMBERS, *_TEXTS):
        found = schema.names.count(name)
        if found != 1:
            what = f"no column {name!r}" if not found else f"{found} columns {name!r}"
            raise InputError(f"{path}: has {what}; it was changed: take the file as batchgen wrote it")
        kind = schema.field(name).type
        words = "whole numbers" if name in _NUMBERS else "text"
        if not (pa.types.is_integer(kind) if name in _NUMBERS else _is_text(kind)):
            raise InputError(f"{path}: column {name!r} is of type {kind}, not {words}; it was changed")


def _name_writer(text: bytes) -> str:
    """The version of batchgen that a plan names, if it can be read."""
    try:
        written_by = parse_json(text)["batchgen"]
    except (ValueError, RecursionError, TypeError, KeyError):
        return "another version of batchgen"
    return f"batchgen {written_by}"


def read_plan(path: Path) -> Plan:
    """The plan of the run that made an output, from its metadata.

    Raises InputError if the file is not an output of batchgen: not Parquet, no plan, or columns changed.
    """
    text, schema = _read_metadata(path)
    try:
        plan = parse_plan(text)
    except ValueError as error:
        what = f"the metadata under {METADATA_KEY!r} is not a plan of this version ({error})"
        raise InputError(f"{path}: {what}; it was changed, or {_name_writer(text)} wrote it") from error
    _check_columns(path, schema)
    return plan


def read_batches(path: Path, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    """Yield an output's record batches, of all or some columns, in order; InputError if the file is damaged."""
    with open_output_file(path) as file:
        yield from file.iter_batches(BATCH_ROWS, columns=columns and list(columns))


def read_input_rows(path: Path, rows: Sequence[int]) -> pa.Table:
    """All output rows of some input rows, in order. Row groups without any of them are not read."""
    with _file_errors(path), open(path, "rb") as raw:
        return pq.read_table(raw, filters=[("row", "in", list(rows))])


def read_rows_at(path: Path, positions: Sequence[int], columns: Sequence[str]) -> list[dict[str, Any]]:
    """The output rows at some ascending positions from 0; row groups without any of them are not read."""
    rows: list[dict[str, Any]] = []
    first = 0
    with open_output_file(path) as file:
        for group in range(file.num_row_groups):
            after = first + file.metadata.row_group(group).num_rows
            within = [position - first for position in positions if first <= position < after]
            if within:
                rows += file.read_row_group(group, columns=list(columns), use_threads=False).take(within).to_pylist()
            first = after
    return rows
