"""JSON lines: one object for each row of the output."""

import json
from base64 import b64encode
from collections.abc import Iterable
from math import isfinite
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from batchgen.errors import OutputError


def _json_type(kind: pa.DataType) -> pa.DataType:
    """The type to cast to before values become Python's: text for what JSON has no word for, at any depth."""
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


def _json_values(column: pa.Array, name: str, out: Path) -> list[object]:
    """A column's values as Python's; OutputError if JSON cannot hold them."""
    kind = _json_type(column.type)
    try:
        values: list[object] = (column if kind == column.type else column.cast(kind)).to_pylist()
    except (pa.ArrowException, ValueError) as error:  # ValueError: not UTF-8, or nanoseconds within a map
        what = f"column {name!r} of type {column.type} has values that JSON cannot hold"
        raise OutputError(f"{out}: {what} ({error}); name the output .parquet") from error
    return values


def _plain(value: object) -> str:
    return b64encode(value).decode() if isinstance(value, bytes) else str(value)


_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, default=_plain).encode


def _without_nan(value: object) -> object:
    """NaN and the infinities are not JSON: null takes their place."""
    if isinstance(value, float) and not isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return [_without_nan(item) for item in value] if isinstance(value, list | tuple) else value


def _json_line(row: dict[str, object]) -> str:
    try:
        return _encode(row)
    except ValueError:
        return _encode(_without_nan(row))


def write_json_lines(batches: Iterable[pa.RecordBatch], file: BinaryIO, *_: object) -> None:
    r"""One object a line, keys in the schema's order; JSON lines have no place for metadata.

    JSON escapes every control character, so the only b"\n" in the file are the ends of the rows.
    """
    out = Path(str(file.name))
    for batch in batches:
        names = batch.schema.names
        columns = [_json_values(column, name, out) for name, column in zip(names, batch.columns, strict=True)]
        rows = (dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True))
        file.write("".join(_json_line(row) + "\n" for row in rows).encode())
