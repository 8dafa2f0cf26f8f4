"""Parquet: record batches of the prompt, the id, the parameters and the kept columns."""

import hashlib
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.errors import InputError, UsageError
from batchgen.input.formats import BadRow, Found, Reading, Rows, Scanned, find_columns
from batchgen.input.kept import kept_batch, parquet_field
from batchgen.input.parameters import override_params
from batchgen.input.sources import BUFFER_BYTES, Source, open_parquet
from batchgen.input.words import first_line
from batchgen.job import InputOptions
from batchgen.options import shown
from batchgen.types import Rejected, Request

BATCH_ROWS = 16_384  # rows that are decoded at a time, or fewer if they are large:
BATCH_BYTES = 16 * 2**20

_Text = str | bytes | None  # bytes: a value that is not UTF-8


# ---- columns


def _check_columns(schema: pa.Schema, source: Source, options: InputOptions) -> list[str]:
    """The columns to read; InputError if prompts are not text, or ids cannot be written as text."""
    columns = find_columns(schema.names, source, options)
    for name, accepts, remedy in (
        (options.prompt_column, _is_text, "string"),
        (options.id_column, _can_be_id, "string or an integer type"),
    ):
        if name in columns and not accepts(kind := schema.field(name).type):
            raise InputError(f"{source.where}: column {shown(name)} is of type {kind}; cast it to {remedy}")
    return columns


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _can_be_id(kind: pa.DataType) -> bool:
    """Text, and every type that Arrow writes as text: numbers, dates, booleans; not bytes, and nothing nested."""
    if pa.types.is_dictionary(kind):
        return _can_be_id(kind.value_type)
    if "binary" in str(kind) or isinstance(kind, pa.BaseExtensionType):
        return False
    try:
        pa.nulls(1, kind).cast(pa.large_string())
    except pa.ArrowNotImplementedError:
        return False
    return True


def _kept_fields(schema: pa.Schema, source: Source, keep: Sequence[str]) -> dict[str, pa.Field]:
    return {name: parquet_field(schema, name, source) for name in keep if name in schema.names}


# ---- values


def _read_texts(column: pa.Array) -> list[_Text]:
    """The strings of a column; a value that is not UTF-8 stays bytes."""
    values: list[_Text]
    try:
        values = column.cast(pa.large_string()).to_pylist()
    except UnicodeDecodeError:
        values = [_decode(value) for value in column.cast(pa.large_binary()).to_pylist()]
    return values


def _decode(value: bytes | None) -> _Text:
    try:
        return value if value is None else value.decode()
    except UnicodeDecodeError:
        return value


def _read_values(batch: pa.RecordBatch, names: list[str]) -> list[dict[str, object]]:
    """The parameters of each row; text that is not UTF-8 becomes bytes, which no parameter accepts."""
    if not names:
        return [{}] * len(batch)
    columns = batch.select(names)
    values: list[dict[str, object]]
    try:
        values = columns.to_pylist()
    except UnicodeDecodeError:
        values = [_read_row(columns.slice(row, 1), names) for row in range(len(batch))]
    return values


def _read_row(row: pa.RecordBatch, names: list[str]) -> dict[str, object]:
    try:
        return dict(row.to_pylist()[0])
    except UnicodeDecodeError:
        return dict.fromkeys(names, b"not UTF-8")


def _make_request(
    row: int, place: str, id_: _Text, prompt: _Text, values: dict[str, object], reading: Reading
) -> Request | Rejected:
    if isinstance(prompt, str) and not isinstance(id_, bytes):
        try:
            return Request(row, place, id_, prompt, override_params(values, reading.params))
        except UsageError as error:
            reason = str(error)
    elif prompt is None:
        reason = "the prompt is null; make it a string"
    else:
        what = "prompt" if isinstance(prompt, bytes) else "id"
        reason = f"the {what} is not UTF-8; write the column as UTF-8 strings"
    good = [None if isinstance(value, bytes) else value for value in (id_, prompt)]
    return BadRow(reason, *good).reject(row, place)


# ---- batches


def _read_batches(file: pq.ParquetFile, columns: list[str], source: Source) -> Iterator[pa.RecordBatch]:
    """Yield these columns; InputError if the data is damaged."""
    metadata = file.metadata
    size: int = sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
    rows = max(1, min(BATCH_ROWS, BATCH_BYTES * metadata.num_rows // max(size, 1)))
    row = 0
    try:
        for batch in file.iter_batches(rows, columns=columns, use_threads=False):
            yield batch
            row += len(batch)
    except (pa.ArrowException, OSError) as error:
        what = f"the Parquet data is damaged here or later ({first_line(error)})"
        raise InputError(f"{source.name}:row {row}: {what}; write the file again") from error


def _read_columns(
    batch: pa.RecordBatch, columns: list[str], options: InputOptions
) -> Iterator[tuple[_Text, _Text, dict[str, object]]]:
    """The id, the prompt and the parameters of each row."""
    prompt_column, id_column = options.prompt_column, options.id_column
    ids: list[_Text] = [None] * len(batch)
    if id_column in columns:
        ids = _read_texts(batch.column(id_column))
    values = _read_values(batch, [name for name in columns if name not in (prompt_column, id_column)])
    return zip(ids, _read_texts(batch.column(prompt_column)), values, strict=True)


# ---- the functions of a format; see formats.py


def check(source: Source, options: InputOptions) -> Found:
    with open_parquet(source) as (file, _):
        schema = file.schema_arrow
        _check_columns(schema, source, options)
        _kept_fields(schema, source, options.keep)
        return Found(schema.names)


def scan(source: Source, keep: Sequence[str]) -> Scanned:
    with open_parquet(source) as (file, stored):
        rows, schema = file.metadata.num_rows, file.schema_arrow
        digest = hashlib.sha256()
        stored.seek(0)
        while data := stored.read(BUFFER_BYTES):
            digest.update(data)
        columns = _kept_fields(schema, source, keep)
        return Scanned(rows, digest.hexdigest(), stored.tell(), "logprobs" in schema.names, columns)


def read(source: Source, reading: Reading, first_row: int) -> Iterator[Rows]:
    with open_parquet(source) as (file, _):
        columns = _check_columns(file.schema_arrow, source, reading.options)
        names = [name for name in reading.kept.names if name in file.schema_arrow.names]
        number = 0
        for batch in _read_batches(file, list(dict.fromkeys(columns + names)), source):
            rows = enumerate(_read_columns(batch, columns, reading.options), number)
            items = [_make_request(first_row + n, f"{source.name}:row {n}", *row, reading) for n, row in rows]
            arrays = {name: batch.column(name) for name in names}
            kept = kept_batch(source, reading.kept, arrays, len(batch)) if reading.kept.names else None
            yield Rows(items, kept)
            number += len(batch)
