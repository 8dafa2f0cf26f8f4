"""A finished output, read again: the run that its metadata tells of, and its rows."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.errors import InputError
from batchgen.output.writer import BATCH_ROWS, METADATA_KEY

# the columns that a reader needs, and what each must be
_KINDS: dict[str, tuple[Any, str]] = {
    "row": (pa.types.is_integer, "whole numbers"),
    "sample": (pa.types.is_integer, "whole numbers"),
    "prompt_tokens": (pa.types.is_integer, "whole numbers"),
    "completion_tokens": (pa.types.is_integer, "whole numbers"),
    **{
        name: (
            lambda kind: pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind),
            "text",
        )
        for name in ("id", "prompt", "completion", "finish_reason", "status", "error")
    },
}


def read_run(path: Path) -> dict[str, Any]:
    """What an output's metadata says of the run that made it: run.run_metadata, read back.

    Raises InputError where the file is no output of batchgen: no Parquet, no metadata, or columns changed.
    """
    if path.suffix.lower() == ".jsonl":
        raise InputError(f"{path}: JSON lines have no place for the run's metadata; write the output as .parquet")
    with _open(path) as file:
        schema = file.schema_arrow
    text = (schema.metadata or {}).get(METADATA_KEY.encode())
    if text is None:
        raise InputError(
            f"{path}: has no metadata under {METADATA_KEY!r}: batchgen did not write it, or another program wrote it "
            "anew; take the file as batchgen wrote it"
        )
    try:
        run = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: the metadata under {METADATA_KEY!r} is not JSON ({error}); it was changed"
        ) from error
    if not isinstance(run, dict):
        raise InputError(f"{path}: the metadata under {METADATA_KEY!r} is not an object; it was changed")
    _check_columns(path, schema)
    return run


def read_batches(path: Path, columns: Sequence[str]) -> Iterator[Any]:
    """Yield an output's record batches of some columns, in order; a damaged file is an InputError."""
    with _open(path) as file:
        yield from file.iter_batches(BATCH_ROWS, columns=list(columns))


def read_input_rows(path: Path, rows: Sequence[int]) -> pa.Table:
    """All output rows of some input rows, in order. Row groups without any of them are not read."""
    with _file_errors(path), open(path, "rb") as raw:
        return pq.read_table(raw, filters=[("row", "in", list(rows))])


def read_rows_at(path: Path, positions: Sequence[int], columns: Sequence[str]) -> list[dict[str, Any]]:
    """The output rows at some ascending positions from 0; row groups without any of them are not read."""
    rows: list[dict[str, Any]] = []
    first = 0
    with _open(path) as file:
        for group in range(file.num_row_groups):
            after = first + file.metadata.row_group(group).num_rows
            within = [position - first for position in positions if first <= position < after]
            if within:
                rows += file.read_row_group(group, columns=list(columns), use_threads=False).take(within).to_pylist()
            first = after
    return rows


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    with _file_errors(path), open(path, "rb") as raw, pq.ParquetFile(raw, page_checksum_verification=True) as file:
        yield file


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


def _damaged(path: Path, error: Exception) -> InputError:
    reason = str(error).split("\n")[0]
    return InputError(f"{path}: not a Parquet file, or a damaged one ({reason}); take the file as batchgen wrote it")


def _check_columns(path: Path, schema: Any) -> None:
    for name, (is_kind, words) in _KINDS.items():
        found = schema.names.count(name)
        if found != 1:
            what = f"no column {name!r}" if not found else f"{found} columns {name!r}"
            raise InputError(f"{path}: has {what}; it was changed: take the file as batchgen wrote it")
        if not is_kind(schema.field(name).type):
            raise InputError(
                f"{path}: column {name!r} is of type {schema.field(name).type}, not {words}; it was changed"
            )
