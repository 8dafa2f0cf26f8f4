"""Parquet: record batches of the prompt, the id, the parameters and the kept columns."""

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchgen.errors import InputError, UsageError
from batchgen.input.formats import BadRow, Found, Reading, Rows, Scanned, find_columns
from batchgen.input.kept import EXACT, converted, kept_batch, parquet_field
from batchgen.input.parameters import find_results, is_object, override_params
from batchgen.input.sources import BUFFER_BYTES, Source, open_parquet
from batchgen.input.words import first_line
from batchgen.job import InputOptions
from batchgen.options import say, shown
from batchgen.types import Rejected, Request

BATCH_ROWS = 16_384  # rows that are decoded at a time, or fewer if they are large:
BATCH_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class _Unreadable:
    """A value that is no text, with the reason and the remedy."""

    reason: str


_Text = str | None | _Unreadable
_NOT_UTF8 = _Unreadable("is not UTF-8; write the column as UTF-8 strings")
_READING_ERRORS = (pa.ArrowException, ValueError, OverflowError)  # of values that Python has no type for


# ---- columns


def _find_field(fields: Iterable[pa.Field], name: str) -> pa.Field | None:
    """The field of a column, else that at a path in a struct: "a.b" is the b of the struct a. A column "a.b" wins."""
    found = {field.name: field for field in fields}
    if name in found:
        return found[name]
    first, dot, rest = name.partition(".")
    is_inner = dot and first in found and pa.types.is_struct(found[first].type)
    return _find_field(found[first].type, rest) if is_inner else None


def _find_array(batch: pa.RecordBatch | pa.StructArray, name: str) -> pa.Array:
    """The values of the field that _find_field finds."""
    names = batch.schema.names if isinstance(batch, pa.RecordBatch) else [field.name for field in batch.type]
    first, _, rest = (name, "", "") if name in names else name.partition(".")
    array = batch.column(first) if isinstance(batch, pa.RecordBatch) else pc.struct_field(batch, [first])
    return _find_array(array, rest) if rest else array


def _check_columns(schema: pa.Schema, source: Source, options: InputOptions) -> list[str]:
    """The columns to read; InputError if prompts are not text."""
    asked = dict.fromkeys((options.prompt_column, options.id_column, *options.keep))
    nested = [name for name in asked if name not in schema.names and _find_field(schema, name)]
    columns = find_columns([*schema.names, *nested], source, options)
    name = options.prompt_column
    field = _find_field(schema, name)
    assert field is not None  # find_columns has seen it
    if not _is_text(kind := field.type):
        inner = [field.name for field in kind if _is_text(field.type)] if pa.types.is_struct(kind) else []
        path = f"name a string in it, such as {say('prompt_column', f'{name}.{inner[0]}')}" if inner else ""
        raise InputError(f"{source.where}: column {shown(name)} is of type {kind}; {path or 'cast it to string'}")
    return columns


def _is_text(kind: pa.DataType) -> bool:
    """Whether values may be text: strings and bytes, which may be UTF-8; nulls too, each of which rejects its row."""
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    if isinstance(kind, pa.JsonType):
        return True
    of_bytes = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
    of_text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    return any(is_type(kind) for is_type in (*of_text, *of_bytes))


def _kept_fields(schema: pa.Schema, keep: Sequence[str]) -> dict[str, pa.Field]:
    found = {name: _find_field(schema, name) for name in keep}
    return {name: parquet_field(name, field) for name, field in found.items() if field is not None}


# ---- values


def _read_texts(column: pa.Array) -> list[_Text]:
    """The values of a column as text, for every type that has one form as text."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if isinstance(column.type, pa.UuidType):
        return [value if value is None else str(value) for value in column.to_pylist()]
    if isinstance(column.type, pa.BaseExtensionType):
        column = column.storage
    if pa.types.is_floating(column.type):
        return [_whole_text(value) for value in column.to_pylist()]
    values: list[_Text]
    try:
        values = column.cast(pa.large_string()).to_pylist()
    except pa.ArrowNotImplementedError:
        bad = _Unreadable(f"is of type {column.type}; cast it to string, or name another with {say('id_column')}")
        values = [bad if valid else None for valid in column.is_valid().to_pylist()]
    except (UnicodeDecodeError, pa.ArrowInvalid):
        values = [_decode(value) for value in column.cast(pa.large_binary()).to_pylist()]
    return values


def _whole_text(value: float | None) -> _Text:
    """7.0 -> "7": pandas writes whole numbers so if a column has nulls."""
    if value is None or not math.isfinite(value):
        return value if value is None else _Unreadable(f"is {value}; make it a whole number, a string or null")
    return str(int(value)) if value.is_integer() and abs(value) <= EXACT else str(value)


def _decode(value: bytes | None) -> _Text:
    try:
        return value if value is None else value.decode()
    except UnicodeDecodeError:
        return _NOT_UTF8


def _read_values(batch: pa.RecordBatch, names: list[str]) -> list[dict[str, object]]:
    """The parameters of each row; a value that cannot be read becomes bytes, which no parameter accepts."""
    if not names:
        return [{}] * len(batch)
    columns = batch.select(names)
    try:
        rows = columns.to_pylist()
    except _READING_ERRORS:
        rows = [{name: _read_value(columns.column(name), row) for name in names} for row in range(len(batch))]
    return [{name: _plain(value) for name, value in row.items()} for row in rows]


def _read_value(column: pa.Array, row: int) -> object:
    try:
        value: object = column[row].as_py()
    except _READING_ERRORS:
        return b"not UTF-8" if _is_text(column.type) else b"a value out of range"
    return value


def _plain(value: object) -> object:
    """Decimals as numbers and bytes as text, at any depth: 0.8, 4, "a"."""
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, bytes):
        text = _decode(value)
        return text if isinstance(text, str) else value
    if isinstance(value, dict):  # a struct
        return {name: _plain(item) for name, item in value.items()}
    return type(value)(map(_plain, value)) if isinstance(value, list | tuple) else value  # a map has pairs


def _make_request(
    row: int, place: str, id_: _Text, prompt: _Text, values: dict[str, object], reading: Reading
) -> Request | Rejected:
    if isinstance(prompt, str) and not isinstance(id_, _Unreadable):
        try:
            return Request(row, place, id_, prompt, override_params(values, reading.params, reading.found))
        except UsageError as error:
            reason = str(error)
    elif isinstance(prompt, _Unreadable):
        reason = f"the prompt {prompt.reason}"
    elif prompt is None:
        reason = "the prompt is null; make it a string"
    else:
        assert isinstance(id_, _Unreadable)
        reason = f"the id {id_.reason}"
    good = [None if isinstance(value, _Unreadable) else value for value in (id_, prompt)]
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
        ids = _read_texts(_find_array(batch, id_column))
    values = _read_values(batch, [name for name in columns if name not in (prompt_column, id_column)])
    return zip(ids, _read_texts(_find_array(batch, prompt_column)), values, strict=True)


def _may_ask_logprobs(file: pq.ParquetFile, source: Source) -> bool:
    """Whether a row may have the parameter logprobs: in its column, in a struct, in a map, or in JSON text."""
    schema = file.schema_arrow
    results = find_results(schema.names)
    kinds = {name: schema.field(name).type for name in schema.names if is_object(name) and name not in results}
    structs = [kind for kind in kinds.values() if pa.types.is_struct(kind)]
    if any(kind.get_field_index("logprobs") >= 0 for kind in structs):
        return True
    texts = [name for name, kind in kinds.items() if _is_text(kind) or pa.types.is_map(kind)]
    batches = _read_batches(file, texts, source) if texts else ()
    arrays = (column for batch in batches for column in batch.columns)
    plain = (array.dictionary_decode() if pa.types.is_dictionary(array.type) else array for array in arrays)
    buffers = (buffer for array in plain for buffer in array.buffers() if buffer is not None)
    return ("logprobs" in schema.names and "logprobs" not in results) or any(
        b"logprobs" in buffer.to_pybytes() for buffer in buffers
    )


# ---- the functions of a format; see formats.py


def check(source: Source, options: InputOptions) -> Found:
    with open_parquet(source) as (file, _):
        schema = file.schema_arrow
        if file.metadata.num_rows:  # a file without rows may have columns of any type, or none
            _check_columns(schema, source, options)
        return Found([*schema.names, *(_kept_fields(schema, options.keep).keys() - set(schema.names))])


def scan(source: Source, options: InputOptions) -> Scanned:
    with open_parquet(source) as (file, stored):
        rows, schema = file.metadata.num_rows, file.schema_arrow
        digest = hashlib.sha256()
        stored.seek(0)
        while data := stored.read(BUFFER_BYTES):
            digest.update(data)
        columns = _kept_fields(schema, options.keep)
        return Scanned(rows, digest.hexdigest(), stored.tell(), _may_ask_logprobs(file, source), columns)


def read(source: Source, reading: Reading, first_row: int) -> Iterator[Rows]:
    with open_parquet(source) as (file, _):
        if not file.metadata.num_rows:
            return
        columns = _check_columns(file.schema_arrow, source, reading.options)
        own = _kept_fields(file.schema_arrow, reading.kept.names)
        number = 0
        for batch in _read_batches(file, list(dict.fromkeys([*columns, *own])), source):
            rows = enumerate(_read_columns(batch, columns, reading.options), number)
            items = [_make_request(first_row + n, f"{source.name}:row {n}", *row, reading) for n, row in rows]
            arrays = {
                name: converted(_find_array(batch, name), field, reading.kept.field(name))
                for name, field in own.items()
            }
            kept = kept_batch(source, reading.kept, arrays, len(batch)) if reading.kept.names else None
            yield Rows(items, kept)
            number += len(batch)
