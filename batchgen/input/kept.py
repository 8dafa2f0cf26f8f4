"""Columns that the output carries from the input, unchanged and of any Arrow type.

They do not pass through the engine: a second reading of the input, in step with the first, attaches to each chunk
what its rows hold, as an Arrow stream, and the worker lays it beside the rows that it writes.

A Parquet column keeps its type. A CSV column is a string. What a JSON key holds is looked at in every row before the
first is generated (see kind_of); where no one type holds all of its values, they are kept as text of JSON.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from io import BufferedReader, BytesIO
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.errors import InputError
from batchgen.input.csv_files import Record, read_csv
from batchgen.input.readers import BadRow, decode, read_batches, read_lines
from batchgen.input.sources import Inputs, Source, check_unchanged, find_sources, open_bytes, open_parquet
from batchgen.input.words import first_line, shown
from batchgen.types import Chunk, OutputRow

BATCH_ROWS = 4_096  # of text, gathered at a time, or fewer where rows are large:
BATCH_BYTES = 16 * 2**20
ROW = "row"  # no kept column is called so: the output has its own
JSON_TEXT = {"batchgen": "JSON text"}  # in the metadata of a field whose values are text of JSON
EXACT = 2**53  # a float64 holds every whole number up to here
MAX_DEPTH = 16

# None (nothing but null so far), "bool", "int", "long" (beyond EXACT), "float", "string", MIXED,
# ("list", kind) or ("struct", ((key, kind), ...))
Kind: TypeAlias = Any
MIXED = "mixed"
_SCALARS = {"bool": pa.bool_(), "int": pa.int64(), "long": pa.int64(), "float": pa.float64(), "string": pa.string()}

# ---- the type of JSON values


def kind_of(value: object, depth: int = 0) -> Kind:
    """The narrowest kind that holds one JSON value.

    [1, 2.5] -> ("list", "float"); {"a": "x"} -> ("struct", (("a", "string"),)); [1, "x"] -> MIXED; {} -> MIXED
    """
    if value is None or isinstance(value, bool):
        return None if value is None else "bool"
    if isinstance(value, str):
        return "string" if _is_text(value) else MIXED
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
        return MIXED if kind == MIXED else ("list", kind)
    assert isinstance(value, dict)
    kinds = tuple((key, kind_of(item, depth + 1)) for key, item in value.items())
    bad = not kinds or any(kind == MIXED or not key or not _is_text(key) for key, kind in kinds)
    return MIXED if bad else ("struct", kinds)


def merge_kinds(a: Kind, b: Kind) -> Kind:
    """The narrowest kind that holds the values of both: whole numbers and fractions are float, if that is exact."""
    if a == b or b is None:
        return a
    if a is None:
        return b
    if isinstance(a, str) and isinstance(b, str):
        return {("float", "int"): "float", ("int", "long"): "long"}.get(tuple(sorted((a, b))), MIXED)  # type: ignore[arg-type]
    if a[0] == b[0] == "list":
        kind = merge_kinds(a[1], b[1])
        return MIXED if kind == MIXED else ("list", kind)
    if a[0] == b[0] == "struct" and {key for key, _ in a[1]} == {key for key, _ in b[1]}:
        other = dict(b[1])
        kinds = tuple((key, merge_kinds(kind, other[key])) for key, kind in a[1])
        return MIXED if any(kind == MIXED for _, kind in kinds) else ("struct", kinds)
    return MIXED


def _arrow_type(kind: Kind) -> Any:
    """The Arrow type of a kind that is not MIXED; what is null everywhere is as good as text."""
    if kind is None:
        return pa.string()
    if isinstance(kind, str):
        return _SCALARS[kind]
    if kind[0] == "list":
        return pa.list_(_arrow_type(kind[1]))
    return pa.struct([(key, _arrow_type(inner)) for key, inner in kind[1]])


def _is_text(value: str) -> bool:
    """Whether no lone surrogate is in it."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _json_text(value: object) -> str | None:
    if value is None:
        return None
    text = json.dumps(value, ensure_ascii=False)
    return text if _is_text(text) else json.dumps(value)


# ---- the types of all kept columns


def kept_schema(inputs: Inputs, keep: Sequence[str]) -> Any:
    """The fields of the kept columns, in the order asked for; JSON lines have to be read to the end for it.

    Raises InputError where files disagree about a column's type; a column of nulls agrees with any.
    """
    if not keep:
        return pa.schema([])
    sources = find_sources(inputs)
    kinds = _json_kinds(sources, keep)
    folders = {name: _folder_field(name, sources) for name in keep}
    found = []
    for source in sources:
        inner = dict(source.partition)
        own = _own_fields(source, keep, kinds)
        found.append(
            [own.get(name) or (folders[name] if name in inner else pa.field(name, pa.null())) for name in keep]
        )
    return pa.schema([_agreed(name, fields, sources) for name, *fields in zip(keep, *found, strict=True)])


def _json_kinds(sources: Iterable[Source], keep: Sequence[str]) -> dict[str, Kind]:
    """What kind of values each key has in all JSON lines together."""
    kinds: dict[str, Kind] = dict.fromkeys(keep)
    for source in sources:
        if source.format == "jsonl":
            with open_bytes(source) as (file, _):
                for row, _size in _json_rows(file, source, _json_names(source, keep)):
                    for name, value in row.items():
                        if value is not None and kinds[name] != MIXED:
                            kinds[name] = merge_kinds(kinds[name], kind_of(value))
            check_unchanged(source)
    return kinds


def _json_names(source: Source, keep: Iterable[str]) -> list[str]:
    """The columns that come from the lines: what the folders say of all of them goes before."""
    return [name for name in keep if name not in dict(source.partition)]


def _own_fields(source: Source, keep: Sequence[str], kinds: Mapping[str, Kind]) -> dict[str, Any]:
    """What the file itself says about columns; in Parquet and CSV, it goes before what its folders say."""
    if source.format == "jsonl":
        return {name: _json_field(name, kinds[name]) for name in _json_names(source, keep)}
    if source.format == "parquet":
        with open_parquet(source) as file:
            schema = file.schema_arrow
            return {name: _parquet_field(schema, name, source) for name in _once(schema.names, keep, source)}
    with open_bytes(source) as (file, _):
        return {name: pa.field(name, pa.string()) for name in _once(read_csv(file, source)[0], keep, source)}


def _once(names: Sequence[str], keep: Sequence[str], source: Source) -> list[str]:
    for name in keep:
        if (times := names.count(name)) > 1:
            raise InputError(f"{source.where}: {times} columns are called {shown(name)}; rename all but one")
    return [name for name in keep if name in names]


def _json_field(name: str, kind: Kind) -> Any:
    if kind is None:
        return pa.field(name, pa.null())
    if kind != MIXED and _is_stored(field := pa.field(name, _arrow_type(kind))):
        return field
    return pa.field(name, pa.string(), metadata=JSON_TEXT)


def _folder_field(name: str, sources: Sequence[Source]) -> Any:
    values = [dict(source.partition).get(name) for source in sources]
    return pa.field(name, pa.int64() if all(value is None or _is_whole(value) for value in values) else pa.string())


def _is_whole(text: str) -> bool:
    """Whether an int64 holds it so that it can be written as it was: 7 and -7, but not 007."""
    try:
        number = int(text)
    except ValueError:
        return False
    return str(number) == text and -(2**63) <= number < 2**63


def _parquet_field(schema: Any, name: str, source: Source) -> Any:
    field = schema.field(name)
    if not _is_stored(field):
        raise InputError(f"{source.where}: column {shown(name)} is of type {field.type}, which cannot be kept; cast it")
    metadata = {key: value for key, value in (field.metadata or {}).items() if key != b"PARQUET:field_id"}
    return pa.field(name, field.type, metadata=metadata or None)


def _is_stored(field: Any) -> bool:
    """Whether a field can be written to Parquet and comes back as it was."""
    schema, file = pa.schema([field]), BytesIO()
    try:
        pq.write_table(schema.empty_table(), file)
        return bool(pq.read_schema(file).field(0).type == field.type)
    except (pa.ArrowException, ValueError):
        return False


def _agreed(name: str, fields: Sequence[Any], sources: Sequence[Source]) -> Any:
    chosen, first = None, None
    for field, source in zip(fields, sources, strict=True):
        if pa.types.is_null(field.type):
            continue
        if chosen is None:
            chosen, first = field, source
        elif first is not None and _words(field) != _words(chosen):
            raise InputError(
                f"{source.where}: column {shown(name)} is of type {_words(field)}, and in {first.where} of type "
                f"{_words(chosen)}; cast one of them, or run them apart"
            )
    return pa.field(name, pa.string()) if chosen is None else chosen


def _is_json_text(field: Any) -> bool:
    return (field.metadata or {}).get(b"batchgen") == JSON_TEXT["batchgen"].encode()


def _words(field: Any) -> str:
    return "JSON of several types" if _is_json_text(field) else str(field.type)


# ---- reading


def read_kept(inputs: Inputs, schema: Any) -> Iterator[Any]:
    """Yield the kept columns of every input row, in order, as record batches; of a row that is none, nulls."""
    for source in find_sources(inputs):
        yield from _kept_of(source, schema)
        check_unchanged(source)


def _kept_of(source: Source, schema: Any) -> Iterator[Any]:
    if source.format == "parquet":
        with open_parquet(source) as file:
            names = [name for name in schema.names if name in file.schema_arrow.names]
            for batch in read_batches(file, names, source):
                yield _batch(source, schema, {name: batch.column(name) for name in names}, len(batch))
        return
    with open_bytes(source) as (lines, _):
        names, rows = _text_rows(lines, source, schema.names)
        for gathered in _gathered(rows):
            arrays = {name: _array([row.get(name) for row in gathered], schema.field(name), source) for name in names}
            yield _batch(source, schema, arrays, len(gathered))


def _text_rows(
    file: BufferedReader, source: Source, keep: Sequence[str]
) -> tuple[list[str], Iterator[tuple[dict[str, Any], int]]]:
    """The kept columns that stand in the file, and what every row has of them, with the row's size."""
    if source.format == "jsonl":
        names = _json_names(source, keep)
        return names, _json_rows(file, source, names)
    header, records = read_csv(file, source)
    return [name for name in keep if name in header], _csv_rows(header, records)


def _gathered(rows: Iterable[tuple[dict[str, Any], int]]) -> Iterator[list[dict[str, Any]]]:
    """Lists of rows, each row given with its bytes."""
    gathered: list[dict[str, Any]] = []
    size = 0
    for row, length in rows:
        gathered.append(row)
        size += length
        if len(gathered) == BATCH_ROWS or size >= BATCH_BYTES:
            yield gathered
            gathered, size = [], 0
    if gathered:
        yield gathered


def _json_rows(file: BufferedReader, source: Source, names: Sequence[str]) -> Iterator[tuple[dict[str, Any], int]]:
    for _number, line in read_lines(file, source):
        try:
            fields = decode(line)
        except BadRow:
            fields = {}
        yield {name: fields.get(name) for name in names}, len(line)


def _csv_rows(header: Sequence[str], records: Iterable[tuple[int, Record]]) -> Iterator[tuple[dict[str, Any], int]]:
    for _number, fields in records:
        if isinstance(fields, str):
            yield {}, 0
        else:
            yield dict(zip(header, fields, strict=True)), sum(map(len, fields))


def _array(values: list[Any], field: Any, source: Source) -> Any:
    if _is_json_text(field):
        values = [_json_text(value) for value in values]
    try:
        return pa.array(values, field.type)
    except (pa.ArrowException, ValueError, TypeError) as error:  # it was of this type when the types were found
        what = f"column {shown(field.name)} is no longer of type {field.type} ({first_line(error)})"
        raise InputError(f"{source.where}: {what}; was it changed meanwhile? run again with --restart") from error


def _batch(source: Source, schema: Any, arrays: Mapping[str, Any], length: int) -> Any:
    """The arrays that are there, beside constants from the file's folders, and nulls."""
    folders = dict(source.partition)
    columns = []
    for field in schema:
        array = arrays.get(field.name)
        if array is None or pa.types.is_null(array.type):
            text = None if array is not None else folders.get(field.name)
            array = _constant(text, field.type, length)
        columns.append(array)
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _constant(text: str | None, kind: Any, length: int) -> Any:
    if text is None:
        return pa.nulls(length, kind)
    return pa.repeat(pa.scalar(int(text) if pa.types.is_int64(kind) else text, kind), length)


# ---- to the worker, and there


def with_kept(chunks: Iterator[Chunk], inputs: Inputs, schema: Any) -> Iterator[Chunk]:
    """Attach to each chunk what its rows keep, reading the input once more, as far as needed."""
    return _attached(chunks, read_kept(inputs, schema)) if schema.names else chunks


def _attached(chunks: Iterable[Chunk], source: Iterator[Any]) -> Iterator[Chunk]:
    held, start = None, 0  # a table, and the number of its first row
    for chunk in chunks:
        rows = [item.row for item in chunk.items]
        while held is None or start + len(held) <= rows[-1]:
            batch = pa.Table.from_batches([next(source)])
            if held is None or start + len(held) <= rows[0]:
                held, start = batch, start + (0 if held is None else len(held))
            else:
                held = pa.concat_tables([held, batch])
        table = _take(held.unify_dictionaries(), [row - start for row in rows])
        yield replace(chunk, kept=_to_bytes(table.append_column(ROW, pa.array(rows, pa.int64()))))
        held, start = held.slice(rows[-1] + 1 - start), rows[-1] + 1


def _to_bytes(table: Any) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return bytes(sink.getvalue())


def kept_columns(chunk: Chunk, rows: Sequence[OutputRow]) -> Any:
    """A table of the kept columns beside these output rows of a chunk; without columns where nothing is kept."""
    if chunk.kept is None:
        return pa.table({})
    table = pa.ipc.open_stream(chunk.kept).read_all()
    place = {row: index for index, row in enumerate(table.column(ROW).to_pylist())}
    return _take(table.drop_columns([ROW]), [place[row.row] for row in rows])


def _take(table: Any, indices: Sequence[int]) -> Any:
    """These rows of a table, its types as they are; Arrow itself can do it for nearly all of them."""
    numbers = pa.array(indices, pa.int64())
    return pa.table([_take_column(column, numbers) for column in table.columns], schema=table.schema)


def _take_column(column: Any, indices: Any) -> Any:
    plain = {pa.string_view(): pa.large_string(), pa.binary_view(): pa.large_binary()}.get(column.type)
    if plain is not None:
        return column.cast(plain).take(indices).cast(column.type)
    try:
        return column.take(indices)
    except pa.ArrowNotImplementedError:
        return pa.chunked_array([column.slice(index.as_py(), 1).chunk(0) for index in indices], column.type)
