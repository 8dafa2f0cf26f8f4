"""A finished output, a Parquet file or a dataset, read again: the plan in its metadata, and its rows."""

import re
import shlex
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchgen.errors import InputError
from batchgen.files import PART, SUCCESS, JsonObject, parse_json, read_object
from batchgen.limits import reason_of
from batchgen.output.ledger import is_dataset, parse_plan, work_directory
from batchgen.output.parts import LEFT_OUT_KEY, METADATA_KEY, group_batches, open_parquet
from batchgen.output.place import is_json_lines
from batchgen.output.rows import LeftOut, Stored, read_counts, statuses_of
from batchgen.output.schema import columns_of
from batchgen.plan import Plan

NEVER_NULL = {"row", "sample", "status"}
_ALWAYS = {  # of completions, whatever version wrote them
    *("row", "sample", "prompt_tokens", "completion_tokens"),
    *("id", "prompt", "completion", "finish_reason", "status", "error"),
}


@contextmanager
def _file_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        if (work_directory(path) / "parts").is_dir():
            remedy = f"`batchgen peek {shlex.quote(str(path))}` shows the rows so far"
            raise InputError(f"{path}: its run is not finished; {remedy}") from error
        raise InputError(f"{path}: no such file; check the name") from error
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        reason = reason_of(error)
        if getattr(error, "strerror", None):  # else it is Arrow's own, such as a page whose checksum is wrong
            raise InputError(f"{path}: {reason}; check the name") from error
        what = f"not a Parquet file, or a damaged one ({reason})"
        raise InputError(f"{path}: {what}; take the file as batchgen wrote it") from error


@contextmanager
def open_output_file(path: Path) -> Iterator[pq.ParquetFile]:
    """Open an output's Parquet file; InputError if it is missing or damaged, also for what is read later."""
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise InputError(f"{path}: not a regular file, so no output of batchgen; check the name")
    with _file_errors(path), open(path, "rb") as raw, open_parquet(raw) as file:
        yield file


def output_files(path: Path) -> list[Path]:
    """The Parquet files of an output: itself, or a complete dataset's parts in order."""
    if not path.is_dir():
        return [path]
    if not is_dataset(path):
        raise InputError(f"{path}: a folder without batchgen's {SUCCESS}, so not a complete dataset; check the name")
    return sorted(file for file in path.iterdir() if PART.fullmatch(file.name))


def _read_metadata(path: Path) -> tuple[bytes, pa.Schema | None]:
    """What the output's metadata has under METADATA_KEY, or a dataset's _SUCCESS; and its columns, if it has a part."""
    if is_json_lines(path) and not path.is_dir():
        raise InputError(f"{path}: JSON lines have no place for the run's metadata; write the output as .parquet")
    schema = None
    for file_path in output_files(path)[:1]:
        with open_output_file(file_path) as file:
            schema = file.schema_arrow
    if schema is None or path.is_dir():
        with _file_errors(path):
            return (path / SUCCESS).read_bytes(), schema
    text = (schema.metadata or {}).get(METADATA_KEY.encode())
    if text is None:
        raise InputError(
            f"{path}: has no metadata under {METADATA_KEY!r}: batchgen did not write it, or another program wrote it "
            "anew; take the file as batchgen wrote it"
        )
    return text, schema


def _words(kind: pa.DataType) -> str:
    """What a column holds, whatever wrote it: int64 -> whole numbers; list<double> -> lists of fractions"""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return f"lists of {_words(kind.value_type)}"
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind):
        return "text"
    words = {pa.types.is_integer: "whole numbers", pa.types.is_floating: "fractions", pa.types.is_boolean: "yes or no"}
    return next((text for is_one, text in words.items() if is_one(kind)), str(kind))


def _check_columns(path: Path, schema: pa.Schema, plan: Plan) -> None:
    for field in columns_of(plan).schema():
        if plan.task == "generate" and field.name not in _ALWAYS:
            continue
        found = schema.names.count(field.name)
        if found != 1:
            what = f"no column {field.name!r}" if not found else f"{found} columns {field.name!r}"
            raise InputError(f"{path}: has {what}; it was changed: take the file as batchgen wrote it")
        kind = schema.field(field.name).type
        if _words(kind) != _words(field.type):
            what = f"column {field.name!r} is of type {kind}, not {_words(field.type)}"
            raise InputError(f"{path}: {what}; it was changed")


def writer_of(text: bytes) -> str:
    """The version of batchgen that a plan names; nothing if it cannot be read."""
    writer = read_object(text).get("batchgen")
    return writer if isinstance(writer, str) and re.fullmatch(r"\d[\w.+-]*", writer) else ""


def read_plan(path: Path) -> Plan:
    """The plan of the run that made an output, from its metadata; InputError if it is none of batchgen's outputs."""
    text, schema = _read_metadata(path)
    try:
        plan = parse_plan(text)
    except ValueError as error:
        what = f"the metadata under {METADATA_KEY!r} is not a plan of this version ({error})"
        writer = f"batchgen {version}" if (version := writer_of(text)) else "another version of batchgen"
        raise InputError(f"{path}: {what}; it was changed, or {writer} wrote it") from error
    if schema is not None:
        _check_columns(path, schema, plan)
    return plan


def read_batches(path: Path, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    """Yield an output's record batches, of all or some columns, in order; InputError if a file is damaged."""
    for file_path in output_files(path):
        with open_output_file(file_path) as file:
            for batch in group_batches(file, columns):
                for name in NEVER_NULL & {*batch.schema.names}:
                    if batch[name].null_count:
                        raise InputError(f"{path}: {name} is null in a row; it was changed")
                yield batch


def read_stored(path: Path) -> Stored:
    """What is known of an output; InputError if it is none of batchgen's, or does not have the rows of its plan."""
    plan, left_out = read_plan(path), read_left_out(path)
    statuses = statuses_of(left_out)
    rows, last = left_out["rows"], -1
    for batch in read_batches(path, ["row", "status"]):
        begun, last = count_begun(batch, last)
        rows += begun
        statuses.update(batch["status"].to_pylist())
    check_rows(path, plan, rows)
    return Stored(plan, statuses, left_out)


def count_begun(batch: pa.RecordBatch, last: int) -> tuple[int, int]:
    """How many input rows begin in this batch, after row `last`, and the last of them."""
    numbers = batch["row"].to_numpy()
    return int(np.count_nonzero(np.diff(numbers, prepend=last))), int(numbers[-1]) if len(numbers) else last


def left_out_of(file: pq.ParquetFile) -> LeftOut:
    """What the run has left out of a file; ValueError or RecursionError if that was changed."""
    return read_counts(parse_json((file.metadata.metadata or {}).get(LEFT_OUT_KEY.encode(), b"{}")))


def read_left_out(path: Path) -> LeftOut:
    """What the run has left out of an output; nothing of a dataset."""
    if path.is_dir():
        return Counter()
    with open_output_file(path) as file:
        try:
            return left_out_of(file)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: the metadata under {LEFT_OUT_KEY!r} was changed ({error})") from error


def check_rows(path: Path, plan: Plan, rows: int) -> None:
    """Raise InputError unless the output holds as many input rows as its plan has; those that it leaves out count."""
    if rows != (expected := len(plan.selection)):
        raise InputError(f"{path}: holds {rows} input rows, and its metadata says {expected}; it was changed")


def read_input_rows(path: Path, rows: Sequence[int], own: Collection[str]) -> pa.Table:
    """All output rows of some input rows, in order, without kept columns, whose values Python may not hold."""
    wanted, tables = pa.array(rows, pa.int64()), []
    for file_path in output_files(path):
        with open_output_file(file_path) as file:
            names = [name for name in file.schema_arrow.names if name in own]
            tables.append(file.schema_arrow.empty_table().select(names))
            for group in range(file.num_row_groups):
                found = pc.is_in(file.read_row_group(group, ["row"], use_threads=False)["row"], wanted)
                if pc.any(found).as_py():
                    tables.append(file.read_row_group(group, names, use_threads=False).filter(found))
                    tables[-1].validate(full=True)
    return pa.concat_tables(tables)


def read_rows_at(path: Path, positions: Sequence[int], columns: Sequence[str]) -> list[JsonObject]:
    """The output rows at some ascending positions from 0; row groups without any of them are not read."""
    rows: list[JsonObject] = []
    first = 0
    for file_path in output_files(path):
        with open_output_file(file_path) as file:
            for group in range(file.num_row_groups):
                after = first + file.metadata.row_group(group).num_rows
                if within := [position - first for position in positions if first <= position < after]:
                    table = file.read_row_group(group, columns=list(columns), use_threads=False)
                    rows += table.take(within).to_pylist()
                first = after
    return rows
