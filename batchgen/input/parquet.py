"""Parquet: record batches of the prompt, the id, the parameters and the kept columns."""

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchgen.errors import InputError, UsageError
from batchgen.input.formats import (
    BATCH_BYTES,
    BadRow,
    Found,
    Reading,
    Rows,
    Scanned,
    find_columns,
    request_columns,
    text_columns,
)
from batchgen.input.kept import EXACT, converted, find_not_utf8, json_values, kept_batch, parquet_field, texts_of
from batchgen.input.parameters import WITH_COLUMNS, find_results, is_object, mentioned, override_params
from batchgen.input.sources import Source, open_parquet
from batchgen.input.targets import labels_column, prompt_word, target_columns, with_targets
from batchgen.input.templates import Template
from batchgen.job import InputOptions
from batchgen.limits import reason_of
from batchgen.options import say, shown
from batchgen.types import Rejected, Request

BATCH_ROWS = 512  # rows that are decoded at a time, or fewer if the rows before them are large
FIRST_ROWS = 16  # nothing in a file says how large its values are: a dictionary has the text of many rows once


@dataclass(frozen=True, slots=True)
class _Unreadable:
    """A value that is no text, with the reason and the remedy."""

    reason: str


_Text = str | None | _Unreadable
_NOT_UTF8 = _Unreadable("is not UTF-8; write the column as UTF-8 strings")
_READING_ERRORS = (pa.ArrowException, ValueError, OverflowError, LookupError)  # of what Python has no type or zone for


# ---- columns


def _find_fields(fields: Iterable[pa.Field], name: str) -> list[pa.Field]:
    """The fields of a column, else those at a path in a struct: "a.b" is the b of the struct a. A column "a.b" wins."""
    first, dot, rest = name.partition(".")
    structs = [field.type for field in fields if dot and field.name == first and pa.types.is_struct(field.type)]
    found = [field for field in fields if field.name == name]
    return found or [field for struct in structs for field in _find_fields(struct, rest)]


def _find_array(batch: pa.RecordBatch | pa.StructArray, name: str) -> pa.Array:
    """The values of the field that _find_fields finds."""
    names = batch.schema.names if isinstance(batch, pa.RecordBatch) else [field.name for field in batch.type]
    first, _, rest = (name, "", "") if name in names else name.partition(".")
    array = batch.column(first) if isinstance(batch, pa.RecordBatch) else pc.struct_field(batch, [first])
    return _find_array(array, rest) if rest else array


def _check_columns(schema: pa.Schema, source: Source, options: InputOptions) -> list[str]:
    """The columns to read; InputError if a prompt, a completion or choices cannot be text."""
    asked = dict.fromkeys((*request_columns(options), *options.keep))
    nested = [name for name in asked if name not in schema.names for _ in _find_fields(schema, name)]
    columns = find_columns([*schema.names, *nested], source, options)
    for option, name in text_columns(options):
        fits = _may_be_choices if option == "choices_column" else _is_text
        kind = _find_fields(schema, name)[0].type  # find_columns has seen it
        if option != "answer_column" and not fits(kind):
            what = "list" if option == "choices_column" else "string"
            inner = [field.name for field in kind if fits(field.type)] if pa.types.is_struct(kind) else []
            path = f"name a {what} in it, such as {say(option, f'{name}.{inner[0]}')}" if inner else ""
            cast = f"cast it to {'a list of strings' if option == 'choices_column' else 'string'}"
            raise InputError(f"{source.where}: column {shown(name)} is of type {kind}; {path or cast}")
    return columns


def _may_be_choices(kind: pa.DataType) -> bool:
    """Whether values may be lists of text, or the text of such a list."""
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    views = (pa.types.is_list_view, pa.types.is_large_list_view)
    return _is_text(kind.value_type if any(is_type(kind) for is_type in (*lists, *views)) else kind)


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
    found = {name: _find_fields(schema, name) for name in keep}
    return {name: parquet_field(name, fields[0]) for name, fields in found.items() if fields}


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
    if pa.types.is_temporal(column.type):
        return [*texts_of(column)]
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
        return [{name: _read_value(columns.column(name), row) for name in names} for row in range(len(batch))]
    return [{name: _plain(value) for name, value in row.items()} for row in rows]


def _read_value(column: pa.Array, row: int) -> object:
    try:
        return _plain(column[row].as_py())
    except _READING_ERRORS:
        return b"not UTF-8" if _may_be_choices(column.type) else b"a value out of range"


def _plain(value: object) -> object:
    """Decimals as numbers and bytes as text, at any depth: 0.8, 4, "a"; structs without the members that are null.

    A struct column has the members of all its rows in every row.
    """
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, bytes):
        text = _decode(value)
        return text if isinstance(text, str) else value
    if isinstance(value, dict):  # a struct
        return {name: _plain(item) for name, item in value.items() if item is not None}
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
        reason = prompt.reason
    else:
        assert isinstance(id_, _Unreadable)
        reason = f"the id {id_.reason}"
    good = [None if isinstance(value, _Unreadable) else value for value in (id_, prompt)]
    return BadRow(reason, *good).reject(row, place)


def _read_prompts(batch: pa.RecordBatch, reading: Reading) -> list[_Text]:
    """The prompt of each row, or the reason why it has none."""
    if reading.template:
        columns = {name: _read_any(_find_array(batch, name)) for name in reading.template.columns}
        prompts = [
            _fill(reading.template, dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)
        ]
    else:
        word, texts = prompt_word(reading.options), _read_texts(_find_array(batch, reading.options.prompt_column))
        null = _Unreadable("is null; make it a string")
        found = (null if text is None else text for text in texts)
        prompts = [text if isinstance(text, str) else _Unreadable(f"{word} {text.reason}") for text in found]
    return [reading.before + text if isinstance(text, str) else text for text in prompts]


def _fill(template: Template, values: dict[str, object]) -> str | _Unreadable:
    try:
        return template.fill(values)
    except UsageError as error:
        return _Unreadable(str(error))


def _read_any(array: pa.Array) -> list[object]:
    """The values of a column of any type, as JSON has them; bytes for what is not UTF-8."""
    kind = array.type.value_type if pa.types.is_dictionary(array.type) else array.type
    if _is_text(kind) or isinstance(kind, pa.UuidType):
        return [b"" if isinstance(text, _Unreadable) else text for text in _read_texts(array)]
    if pa.types.is_float16(kind) or pa.types.is_float32(kind):  # 0.1, not the 0.10000000149 that it is as a float64
        values = array.cast(pa.float32()).to_pylist()
        return [None if value is None else float(str(np.float32(value))) for value in values]
    bad = find_not_utf8(array)
    return (
        [b"" if row in bad else json_values(array.slice(row, 1))[0] for row in range(len(array))]
        if bad
        else json_values(array)
    )


def _reject_kept(item: Request | Rejected, name: str) -> Rejected:
    """The row whose kept value cannot be written as JSON; a row that is rejected already keeps its reason."""
    if isinstance(item, Rejected):
        return item
    return item.rejected(
        f"the kept {shown(name)} is not UTF-8, and JSON is to hold it; write it as UTF-8, or as binary"
    )


# ---- batches


def count_bytes(array: pa.Array) -> npt.NDArray[np.int64]:
    """The bytes of each value, with those that a dictionary or a view has for it; equal however the rows are cut."""
    kind = array.type
    if isinstance(kind, pa.BaseExtensionType):
        return count_bytes(array.storage)
    sizes: npt.NDArray[np.int64] = np.full(len(array), 8)
    if pa.types.is_dictionary(kind):
        sizes = np.append(count_bytes(array.dictionary), 8)[pc.fill_null(array.indices.cast(pa.int64()), -1).to_numpy()]
    elif pa.types.is_struct(kind):
        sizes = sum(map(count_bytes, array.flatten()), sizes)
    elif _is_text(kind):
        sizes += pc.fill_null(pc.binary_length(array.cast(pa.large_binary())), 0).to_numpy()
    elif isinstance(
        array, (pa.ListArray, pa.LargeListArray, pa.FixedSizeListArray, pa.ListViewArray, pa.LargeListViewArray)
    ):
        if pa.types.is_map(kind):
            array = array.cast(pa.list_(pa.struct([kind.key_field, kind.item_field])))
        ends = np.cumsum(pc.fill_null(pc.list_value_length(array), 0).to_numpy())
        sizes += np.diff(np.append(0, np.cumsum(count_bytes(array.flatten())))[ends], prepend=0)
    return sizes


def _read_batches(
    file: pq.ParquetFile, columns: list[str], source: Source
) -> Iterator[tuple[pa.RecordBatch, list[int]]]:
    """Yield these columns, and the bytes of each row; InputError if the data is damaged, or not all of it is there."""
    row, rows = 0, min(FIRST_ROWS, BATCH_ROWS)
    groups: list[list[int] | None] = [None]  # all
    if any(pa.types.is_nested(field.type) and "dictionary<" in str(field.type) for field in file.schema_arrow):
        groups = [[group] for group in range(file.num_row_groups)]  # Arrow cannot join dictionaries within a list
    batches = (batch for group in groups for batch in file.iter_batches(rows, group, columns, use_threads=False))
    try:
        for batch in batches:
            sizes = sum(map(count_bytes, batch.columns), np.zeros(len(batch), np.int64))
            yield batch, sizes.tolist()
            row += len(batch)
            rows = max(1, min(BATCH_ROWS, 2 * rows, BATCH_BYTES * len(batch) // max(int(sizes.sum()), 1)))
            file.reader.set_batch_size(rows)  # of the next one
        if row != (expected := file.metadata.num_rows):
            raise pa.ArrowInvalid(f"its footer says {expected} rows")
    except (pa.ArrowException, OSError) as error:
        what = f"the Parquet data is damaged here or later ({reason_of(error)})"
        raise InputError(f"{source.name}:row {row}: {what}; write the file again") from error


def _read_requests(
    batch: pa.RecordBatch, places: Sequence[tuple[int, str]], columns: list[str], reading: Reading
) -> Iterator[Request | Rejected]:
    """The request of each row; places: its number and its place."""
    options, found = reading.options, request_columns(reading.options)
    ids: list[_Text] = [None] * len(batch)
    if options.id_column in columns:
        ids = _read_texts(_find_array(batch, options.id_column))
    prompts = _read_prompts(batch, reading)
    values = _read_values(batch, [name for name in columns if name not in found])
    targets = _read_targets(batch, columns, options)
    for place, id_, prompt, own, target in zip(places, ids, prompts, values, targets, strict=True):
        item = _make_request(*place, id_, prompt, own, reading)
        yield with_targets(item, target) if target and isinstance(item, Request) else item


def _read_targets(batch: pa.RecordBatch, columns: list[str], options: InputOptions) -> list[dict[str, object]]:
    """What each row gives to score, by option; nothing if it is to be completed."""
    named, labels = target_columns(options), labels_column(options)
    if named and labels in columns:
        named["labels"] = labels
    arrays = [_find_array(batch, name) for name in named.values()]
    return _read_values(pa.RecordBatch.from_arrays(arrays, [*named]), [*named]) if named else [{}] * len(batch)


def _asked(file: pq.ParquetFile, source: Source) -> frozenset[str]:
    """The names of ASKING that a row may have: in a column of that name, in a struct, in a map, or in JSON text."""
    schema = file.schema_arrow
    results = find_results(schema.names)
    kinds = {name: schema.field(name).type for name in schema.names if is_object(name) and name not in results}
    structs = [kind for kind in kinds.values() if pa.types.is_struct(kind)]
    asks = {name for name in WITH_COLUMNS if name in schema.names and name not in results}
    asks |= {name for name in WITH_COLUMNS if any(kind.get_field_index(name) >= 0 for kind in structs)}
    texts = [name for name, kind in kinds.items() if _is_text(kind) or pa.types.is_map(kind)]
    batches = _read_batches(file, texts, source) if texts else ()
    arrays = (column for batch, _ in batches for column in batch.columns)
    plain = (array.dictionary_decode() if pa.types.is_dictionary(array.type) else array for array in arrays)
    for buffer in (buffer for array in plain for buffer in array.buffers() if buffer is not None):
        asks |= mentioned(buffer.to_pybytes())
    return frozenset(asks)


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
        stored.seek(0)
        digest = hashlib.file_digest(stored, "sha256")
        columns = _kept_fields(schema, options.keep)
        return Scanned(rows, digest.hexdigest(), stored.tell(), _asked(file, source), columns)


def read(source: Source, reading: Reading, first_row: int) -> Iterator[Rows]:
    with open_parquet(source) as (file, _):
        if not file.metadata.num_rows:
            return
        columns = _check_columns(file.schema_arrow, source, reading.options)
        own = _kept_fields(file.schema_arrow, reading.kept.names)
        number = 0
        for batch, sizes in _read_batches(file, list(dict.fromkeys([*columns, *own])), source):
            places = [(first_row + n, f"{source.name}:row {n}") for n in range(number, number + len(batch))]
            items = list(_read_requests(batch, places, columns, reading))
            arrays: dict[str, pa.Array] = {}
            for name, field in own.items():
                kept = reading.kept.field(name)
                arrays[name], bad = converted(_find_array(batch, name), field, kept, reading.as_json)
                if bad:
                    items = [_reject_kept(item, name) if n in bad else item for n, item in enumerate(items)]
            kept_rows = kept_batch(source, reading.kept, arrays, len(batch)) if reading.kept.names else None
            yield Rows(items, kept_rows, sizes)
            number += len(batch)
