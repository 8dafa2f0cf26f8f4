"""Columns that the output carries from the input, unchanged and of any Arrow type.

Each chunk carries the values of its rows as an Arrow stream, and the worker puts them beside the rows that it writes.
A Parquet column keeps its type, and a CSV column is a string. The type of a JSON key comes from its values in all rows
of the input (see kind_of); if no single type holds them all, they are kept as JSON text.
"""

import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchgen.errors import InputError
from batchgen.input.sources import Source
from batchgen.input.words import find_surrogate
from batchgen.limits import reason_of
from batchgen.options import say, shown
from batchgen.types import Chunk

ROW = "row"  # beside the kept columns of a chunk: their row numbers; no kept column may have this name
JSON_TEXT = {"batchgen": "JSON text"}  # in the metadata of a field whose values are JSON text
EXACT = 2**53  # a float64 holds every whole number up to here
MAX_DEPTH = 16

# ---- the type of JSON values


@dataclass(frozen=True, slots=True)
class ListKind:
    """A JSON array whose items have one kind."""

    item: "Kind"


@dataclass(frozen=True, slots=True)
class StructKind:
    """A JSON object with these keys."""

    fields: tuple[tuple[str, "Kind"], ...]


# None: only nulls so far; "bool", "int", "long" (a whole number beyond EXACT), "float", "string", or MIXED
Kind: TypeAlias = ListKind | StructKind | str | None
MIXED = "mixed"
_SCALARS = {"bool": pa.bool_(), "int": pa.int64(), "long": pa.int64(), "float": pa.float64(), "string": pa.string()}


def kind_of(value: object, depth: int = 0) -> Kind:
    """The narrowest kind that holds one JSON value.

    [1, 2.5] -> ListKind("float"); {"a": "x"} -> StructKind((("a", "string"),)); [1, "x"] -> MIXED; {} -> MIXED
    """
    if value is None or isinstance(value, bool):
        return None if value is None else "bool"
    if isinstance(value, str):
        return MIXED if find_surrogate(value) else "string"
    if isinstance(value, int):
        return "int" if abs(value) <= EXACT else "long" if -(2**63) <= value < 2**63 else MIXED
    if isinstance(value, float):
        return "float"
    if depth == MAX_DEPTH:
        return MIXED
    if isinstance(value, list):
        kind: Kind = None
        for item in value:
            kind = merge_kinds(kind, kind_of(item, depth + 1))
        return MIXED if kind == MIXED else ListKind(kind)
    assert isinstance(value, dict)
    fields = tuple((key, kind_of(item, depth + 1)) for key, item in value.items())
    has_type = fields and all(kind != MIXED and key and not find_surrogate(key) for key, kind in fields)
    return StructKind(fields) if has_type else MIXED


def merge_kinds(a: Kind, b: Kind) -> Kind:
    """The narrowest kind that holds the values of both; whole numbers merge with fractions only if that is exact."""
    if a == b or b is None:
        return a
    if a is None:
        return b
    if isinstance(a, str) and isinstance(b, str):
        return {frozenset(("float", "int")): "float", frozenset(("int", "long")): "long"}.get(frozenset((a, b)), MIXED)
    if isinstance(a, ListKind) and isinstance(b, ListKind):
        kind = merge_kinds(a.item, b.item)
        return MIXED if kind == MIXED else ListKind(kind)
    if isinstance(a, StructKind) and isinstance(b, StructKind):
        others = dict(b.fields)
        if others.keys() == dict(a.fields).keys():
            fields = tuple((key, merge_kinds(kind, others[key])) for key, kind in a.fields)
            return MIXED if any(kind == MIXED for _, kind in fields) else StructKind(fields)
    return MIXED


def _arrow_type(kind: Kind) -> pa.DataType:
    """The Arrow type of a kind other than MIXED; string if there are only nulls."""
    if isinstance(kind, ListKind):
        return pa.list_(_arrow_type(kind.item))
    if isinstance(kind, StructKind):
        return pa.struct([(key, _arrow_type(inner)) for key, inner in kind.fields])
    return _SCALARS[kind or "string"]


_encode = json.JSONEncoder(ensure_ascii=False).encode


def json_text(value: object) -> str:
    """A value as JSON; NaN and the infinities, which JSON has not, become null."""
    text = _encode(value)
    if "NaN" in text or "Infinity" in text:  # perhaps only within a string
        text = _encode(json.loads(text, parse_constant=lambda _: None))
    return text


def _kept_text(value: object) -> str | None:
    if value is None:
        return None
    text = json_text(value)
    return json.dumps(json.loads(text)) if find_surrogate(text) else text


# ---- the types of all kept columns

Column: TypeAlias = pa.Field | Kind  # of one file; a Kind in JSON lines


def kept_schema(keep: Sequence[str], sources: Sequence[Source], columns: Sequence[Mapping[str, Column]]) -> pa.Schema:
    """The fields of the kept columns; of several types, one that holds all values, or JSON text. Nulls agree with each.

    columns: those that each source has, without folders.
    """
    return pa.schema([_agree(name, _fields_of(name, sources, columns)) for name in keep])


def _fields_of(name: str, sources: Sequence[Source], columns: Sequence[Mapping[str, Column]]) -> list[pa.Field]:
    """The column in each source: its own, else that of its folders, else nulls."""
    kind: Kind = None
    for own in columns:
        if not isinstance(own.get(name), pa.Field):
            kind = merge_kinds(kind, own.get(name))
    in_json, in_folders = _json_field(name, kind), _folder_field(name, sources)
    fields = []
    for source, own in zip(sources, columns, strict=True):
        if name in own:
            fields.append(own[name] if isinstance(own[name], pa.Field) else in_json)
        else:
            fields.append(in_folders if name in dict(source.partition) else pa.field(name, pa.null()))
    return fields


def _json_field(name: str, kind: Kind) -> pa.Field:
    if kind is None:
        return pa.field(name, pa.null())
    if kind != MIXED and _is_stored(field := pa.field(name, _arrow_type(kind))):
        return field
    return pa.field(name, pa.string(), metadata=JSON_TEXT)


def _folder_field(name: str, sources: Sequence[Source]) -> pa.Field:
    values = [dict(source.partition).get(name) for source in sources]
    return pa.field(name, pa.int64() if all(value is None or _is_whole(value) for value in values) else pa.string())


def _is_whole(text: str) -> bool:
    """Whether the text is an int64 in its usual form: 7 and -7, but not 007."""
    try:
        number = int(text)
    except ValueError:
        return False
    return str(number) == text and -(2**63) <= number < 2**63


def parquet_field(name: str, field: pa.Field) -> pa.Field:
    """The field of a kept Parquet column: its own, or JSON text if its type cannot be written again."""
    metadata = {key: value for key, value in (field.metadata or {}).items() if key != b"PARQUET:field_id"}
    kept = pa.field(name, field.type, metadata=metadata or None)
    return kept if _is_stored(kept) else pa.field(name, pa.string(), metadata=JSON_TEXT)


def _is_stored(field: pa.Field) -> bool:
    """Whether Parquet gives a field back as it was."""
    schema, file = pa.schema([field]), BytesIO()
    try:
        pq.write_table(schema.empty_table(), file)
        return bool(pq.read_schema(file).field(0).type == field.type)
    except (pa.ArrowException, ValueError):
        return False


def _agree(name: str, fields: Sequence[pa.Field]) -> pa.Field:
    """The one field of a column that holds the values of all sources exactly; a string if all are null."""
    typed = [field for field in fields if not pa.types.is_null(field.type)]
    if not typed:
        return pa.field(name, pa.string())
    chosen = typed[0]
    for field in typed:
        common = _common_type(chosen.type, field.type)
        if common is None or _is_json_text(field) != _is_json_text(chosen):
            return pa.field(name, pa.string(), metadata=JSON_TEXT)
        chosen = chosen.with_type(common)
    return chosen


def _common_type(a: pa.DataType, b: pa.DataType) -> pa.DataType | None:
    """The type that holds the values of both exactly, if they are spellings of one: int32 and int64 -> int64"""
    if a == b:
        return a
    a, b = _plain_type(a), _plain_type(b)
    if pa.types.is_list(a) and pa.types.is_list(b):
        item = _common_type(a.value_type, b.value_type)
        return item and pa.list_(item)
    is_exact = a == b or any(
        is_kind(a) and is_kind(b)
        for is_kind in (pa.types.is_signed_integer, pa.types.is_unsigned_integer, pa.types.is_floating)
    )
    is_exact = is_exact or (pa.types.is_integer(a) and pa.types.is_integer(b) and pa.uint64() not in (a, b))
    is_exact = is_exact or (pa.types.is_decimal(a) and pa.types.is_decimal(b))
    if not is_exact:
        return None
    schemas = [pa.schema([("k", kind)]) for kind in (a, b)]
    try:
        return pa.unify_schemas(schemas, promote_options="permissive").field("k").type
    except pa.ArrowInvalid:  # decimals of more digits together than any type has
        return None


def _plain_type(kind: pa.DataType) -> pa.DataType:
    """The usual one of the types that hold the same values."""
    if pa.types.is_dictionary(kind):
        return _plain_type(kind.value_type)
    if pa.types.is_string(kind) or pa.types.is_string_view(kind):
        return pa.large_string()
    if pa.types.is_binary(kind) or pa.types.is_binary_view(kind) or pa.types.is_fixed_size_binary(kind):
        return pa.large_binary()
    if pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return pa.list_(kind.value_type)
    return kind


def _is_json_text(field: pa.Field) -> bool:
    return (field.metadata or {}).get(b"batchgen") == JSON_TEXT["batchgen"].encode()


# ---- the values of a batch of rows


def text_array(values: list[object], field: pa.Field, source: Source) -> pa.Array:
    """Values of JSON lines or CSV as the type that the scan found for them."""
    if _is_json_text(field):
        values = [_kept_text(value) for value in values]
    try:
        return pa.array(values, field.type)
    except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
        what = f"column {shown(field.name)} is no longer of type {field.type} ({reason_of(error)})"
        remedy = f"was it changed meanwhile? run again with {say('restart', True)}"
        raise InputError(f"{source.where}: {what}; {remedy}") from error


def json_values(array: pa.Array) -> list[Any]:
    """Values as JSON has them: times and decimals as text, bytes in base64, a map as pairs. UnicodeDecodeError if text
    is not UTF-8; whatever else Parquet can hold has such a form.
    """
    kind = array.type
    if isinstance(kind, pa.BaseExtensionType):
        return json_values(array.storage)
    if pa.types.is_dictionary(kind):
        return json_values(array.dictionary_decode())
    if pa.types.is_map(kind):
        pair = pa.struct([("key", kind.key_type), ("value", kind.item_type)])
        return [pairs and [[*pair.values()] for pair in pairs] for pairs in json_values(array.cast(pa.list_(pair)))]
    if pa.types.is_struct(kind):
        names = [field.name for field in kind]
        make = dict if len(set(names)) == len(names) else list  # a list of pairs, as no object has a key twice
        rows = zip(array.is_valid().to_pylist(), *map(json_values, array.flatten()), strict=True)
        return [make(zip(names, row, strict=True)) if valid else None for valid, *row in rows]
    if pa.types.is_nested(kind):  # lists of all kinds
        items = iter(json_values(array.flatten()))
        return [n if n is None else list(islice(items, n)) for n in pc.list_value_length(array).to_pylist()]
    if pa.types.is_temporal(kind) or pa.types.is_decimal(kind):
        return texts_of(array)
    values = (array.cast(pa.float32()) if pa.types.is_float16(kind) else array).to_pylist()
    return [b64encode(value).decode() if isinstance(value, bytes) else value for value in values]


def texts_of(array: pa.Array) -> list[str | None]:
    """Decimals, dates and times as Arrow writes them; a time in UTC if nobody here knows its zone."""
    if not pa.types.is_timestamp(array.type) or array.type.tz is None:
        return array.cast(pa.string()).to_pylist()  # type: ignore[no-any-return]
    plain = array.cast(pa.timestamp(array.type.unit)).cast(pa.string()).to_pylist()
    try:
        texts = array.cast(pa.string()).to_pylist()
    except pa.ArrowInvalid:
        texts = array.cast(pa.timestamp(array.type.unit, "UTC")).cast(pa.string()).to_pylist()
    return [known if known and known[0] == "<" else text for known, text in zip(plain, texts, strict=True)]


def find_not_utf8(array: pa.Array) -> set[int]:
    """The values that json_values cannot make."""

    def is_not(row: int) -> bool:
        try:
            json_values(array.slice(row, 1))
        except UnicodeDecodeError:
            return True
        return False

    try:
        json_values(array)
    except UnicodeDecodeError:
        return {*filter(is_not, range(len(array)))}
    return set()


def converted(array: pa.Array, own: pa.Field, field: pa.Field, as_json: bool) -> tuple[pa.Array, set[int]]:
    """A column of one file as the type that it has over all files; and the rows that have null in it, instead of text
    that is not UTF-8, because JSON is to hold it.
    """
    is_same = pa.types.is_null(array.type) or array.type == field.type and _is_json_text(own) >= _is_json_text(field)
    is_text = _is_json_text(field) and not is_same
    bad = find_not_utf8(array) if is_text or as_json else set()
    if bad:
        places = [None if row in bad else row for row in range(len(array))]
        array = take_rows(pa.table([array], ["k"]), places)["k"].combine_chunks()
    if is_text:
        return pa.array([_kept_text(shared_spelling(value)) for value in json_values(array)], field.type), bad
    return (array if is_same else array.cast(field.type)), bad


def shared_spelling(value: object) -> object:
    """A number as files of all types spell it: 7.0 -> 7"""
    if isinstance(value, dict):
        return {key: shared_spelling(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shared_spelling(item) for item in value]
    if isinstance(value, float) and value.is_integer() and abs(value) <= EXACT and str(value) != "-0.0":
        return int(value)
    return value


def kept_batch(source: Source, schema: pa.Schema, arrays: Mapping[str, pa.Array], length: int) -> pa.Table:
    """All kept columns of `length` rows: the arrays of the file's own columns, values of its folders, or nulls."""
    folders = dict(source.partition)
    columns = []
    for field in schema:
        array = arrays.get(field.name)
        if array is None or pa.types.is_null(array.type):
            text = None if array is not None else folders.get(field.name)
            array = _repeat(text, field, length)
        columns.append(array)
    return pa.Table.from_arrays(columns, schema=schema)


def _repeat(text: str | None, field: pa.Field, length: int) -> pa.Array:
    if text is None:
        return pa.nulls(length, field.type)
    value: object = int(text) if _is_whole(text) and not pa.types.is_large_string(field.type) else text
    if _is_json_text(field):
        value = _kept_text(value)
    return pa.repeat(pa.scalar(str(value) if pa.types.is_string(field.type) else value, field.type), length)


# ---- from the input to the worker


def without_others(table: pa.Table) -> pa.Table:
    """The table without the values of other rows, which a dictionary still holds: as Parquet gives it back."""
    return pa.table([_without_others(column) for column in table.columns], schema=table.schema)


def _without_others(column: pa.ChunkedArray) -> pa.ChunkedArray:
    kind = str(column.type)
    holds_others = "dictionary<" in kind or "list_view<" in kind
    if not holds_others or "string_view" in kind or "binary_view" in kind:  # Parquet cannot write a slice of these
        return column
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"": column}), sink, use_dictionary=False, compression="none")
    return pq.read_table(pa.BufferReader(sink.getvalue())).column(0).cast(column.type)


def pack_kept(tables: Sequence[pa.Table], rows: Sequence[int]) -> bytes:
    """The kept columns of a chunk's rows as an Arrow stream."""
    table = pa.concat_tables(tables).unify_dictionaries().append_column(ROW, pa.array(rows, pa.int64()))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return bytes(sink.getvalue())


def kept_columns(chunk: Chunk, numbers: npt.NDArray[np.int64]) -> pa.Table:
    """The kept columns beside output rows of a chunk, whose input rows have these numbers.

    A table without columns if nothing is kept.
    """
    if chunk.kept is None:
        return pa.table({})
    table = pa.ipc.open_stream(chunk.kept).read_all()
    rows = table[ROW].to_numpy()  # ascending
    return take_rows(table.drop_columns([ROW]), np.searchsorted(rows, numbers))


def take_rows(table: pa.Table, indices: Sequence[int] | pa.Array) -> pa.Table:
    """The rows of a table at these indices, nulls at those that are None, with its types unchanged."""
    numbers = pa.array(indices, pa.int64())
    return pa.table([_take(column, numbers) for column in table.columns], schema=table.schema)


def _take(column: pa.ChunkedArray, indices: pa.Array) -> pa.ChunkedArray:
    """Arrow's own take, and a way around the types for which it has none: views, and what has them within."""
    plain = {pa.string_view(): pa.large_binary(), pa.binary_view(): pa.large_binary()}.get(column.type)
    if plain is not None:
        return column.cast(plain).take(indices).cast(column.type, safe=False)
    try:
        return column.take(indices)
    except pa.ArrowNotImplementedError:
        null = pa.chunked_array([pa.nulls(1, column.type)])
        rows = [null if index is None else column.slice(index, 1) for index in indices.to_pylist()]
        return pa.chunked_array([chunk for row in rows for chunk in row.chunks], column.type)
