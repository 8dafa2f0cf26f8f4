r"""Input rows: JSON lines, CSV or Parquet in, one Request or Rejected for every row, in order, in flat memory.

JSON lines are split on b"\n" alone. A line of nothing but spaces, tabs and carriage returns is no row; every
other line is exactly one row, however broken. What is wrong with a row becomes its Rejected and costs no other
row anything; what is wrong with a file (no such column, a truncated gzip) is an InputError.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from batchgen.errors import InputError, UsageError
from batchgen.input.csv_files import read_csv
from batchgen.input.openai import is_batch_line, read_batch_line
from batchgen.input.parameters import parameter_names, row_params
from batchgen.input.sources import (
    BUFFER_BYTES,
    UNPACKING_ERRORS,
    InputFormat,
    Inputs,
    Source,
    check_unchanged,
    find_sources,
    open_bytes,
    open_parquet,
    open_raw,
    read_error,
)
from batchgen.input.words import first_line, missing, shown
from batchgen.types import Rejected, Request, SamplingParams

DEFAULT_ID_COLUMN = "id"  # may be absent; an id column that was asked for by name may not
MAX_LINE_BYTES = 32 * 2**20  # the longest prompt that fits a GPT-2 is a few hundred KB
ROWS_LOOKED_AT = 1000  # by check_input, before it says that a column is not there
BATCH_ROWS = 16_384  # of Parquet, decoded at a time, or fewer where rows are large:
BATCH_BYTES = 16 * 2**20
BLANK = " \t\r"
TOO_LONG = b""  # what stands for a line that was not kept; no line that is a row is empty
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
EXAMPLE = '{"prompt": "Once upon a time"}'

_Texts = list[str | bytes | None]  # bytes: a value that is not UTF-8
_Values = list[dict[str, Any]]  # a row's parameters

# the first bytes of files that are often given by mistake: what it is, and what to do
_OTHER_FORMATS = (
    (b"\xff\xfe", "UTF-16 text", "save it as UTF-8"),
    (b"\xfe\xff", "UTF-16 text", "save it as UTF-8"),
    (b"{\0", "UTF-16 text", "save it as UTF-8"),
    (b"\0{", "UTF-16 text", "save it as UTF-8"),
    (b"PAR1", "a Parquet file", "name it .parquet"),
    (b"\x1f\x8b", "a gzip file", "name it .jsonl.gz, or unpack it if it was packed twice"),
    (b"\x28\xb5\x2f\xfd", "a zstd file", "name it .jsonl.zst, or unpack it if it was packed twice"),
    (b"BZh", "a bzip2 file", "unpack it"),
    (b"\xfd7zXZ", "an xz file", "unpack it"),
    (b"PK\x03\x04", "a zip file", "unpack it"),
)
_JSON_TYPES = {
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    dict: "an object",
    list: "an array",
    type(None): "null",
}


@dataclass(frozen=True, slots=True)
class InputFacts:
    """What identifies an input: its number of rows, and the SHA-256 and length of its bytes.

    Of one file, the SHA-256 is that of its bytes as they are stored; of several, that of their SHA-256s, each in
    hex on a line of its own, in order: names do not count. What a partitioned file's folders say does.

    logprobs: some row may ask for them. openai: it is made of OpenAI's batch files.
    """

    rows: int
    sha256: str
    bytes: int
    logprobs: bool = False
    openai: bool = False


class BadRow(Exception):
    """Why one row is no request, and what of it could be read all the same."""

    def __init__(self, reason: str, id_: str | None = None, prompt: str | None = None) -> None:
        super().__init__(reason, id_, prompt)
        self.reason, self.id, self.prompt = reason, id_, prompt


def _shown_value(value: object) -> str:
    """`a number (1.5)`, `an array`: the JSON type, and the value where it is short."""
    kind = _JSON_TYPES[type(value)]
    return f"{kind} ({shown(str(value)).strip(chr(39))})" if isinstance(value, (int, float)) else kind


# ---- JSON lines: bytes to lines to rows


def read_lines(file: BinaryIO, source: Source) -> Iterator[tuple[int, bytes]]:
    """Yield the 1-based number and the bytes of every line that is not blank; TOO_LONG is one over MAX_LINE_BYTES."""
    number = 0
    try:
        for number, line in enumerate(iter(partial(file.readline, MAX_LINE_BYTES + 1), b""), 1):
            text = line.rstrip(b" \t\r\n")
            if number == 1:
                text = text.removeprefix(BYTE_ORDER_MARK).lstrip(b" \t\r")
            if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
                if not _skip_line(file) or text:
                    yield number, TOO_LONG
            elif text:
                yield number, text
    except UNPACKING_ERRORS as error:
        raise read_error(source, number + 1, error) from error


def _skip_line(file: BinaryIO) -> bool:
    """Pass over the rest of a line without holding it; True if that rest is blank."""
    blank = True
    for piece in iter(partial(file.readline, BUFFER_BYTES), b""):
        blank = blank and not piece.strip(b" \t\r\n")
        if piece.endswith(b"\n"):
            break
    return blank


def _no_constant(name: str) -> None:
    raise BadRow(f"not JSON: {name} is not a JSON value; use null or a string")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """[("id", 1), ("prompt", "a")] -> {"id": 1, "prompt": "a"}"""
    fields = dict(pairs)
    if len(fields) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise BadRow(f"the key {shown(twice)} is there twice; keep one")
    return fields


_DECODER = json.JSONDecoder(parse_constant=_no_constant, object_pairs_hook=_no_duplicates)


def decode(line: bytes) -> dict[str, Any]:
    """One line's JSON object; raises BadRow on any bytes that are not one."""
    if line == TOO_LONG:
        raise BadRow(f"the line is longer than {MAX_LINE_BYTES} bytes; shorten it")
    try:
        text = line.decode()
        start = 0 if text[0] == "{" else len(text) - len(text.lstrip(BLANK))
        value, end = _DECODER.raw_decode(text, start)
    except UnicodeDecodeError as error:
        raise BadRow(f"invalid UTF-8 at byte {error.start + 1} of the line; save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise BadRow(f"not JSON: {error.msg} at column {error.pos + 1}; write {EXAMPLE}") from error
    except RecursionError as error:
        raise BadRow("the JSON is nested too deeply to be read; flatten it") from error
    except ValueError as error:
        raise BadRow("an integer has too many digits to be read; write it as a string") from error
    if end != len(text):
        raise BadRow(f"not JSON: extra data at column {end + 1}; write one object a line")
    if not isinstance(value, dict):
        raise BadRow(f"the line is {_shown_value(value)}, not an object; write {EXAMPLE}")
    return value


def _check_surrogates(fields: dict[str, Any], prompt_column: str, id_column: str) -> None:
    r"""Refuse half of a surrogate pair: \ud800 is legal in JSON, but it is no character and no file can hold it."""
    for key, value in fields.items():
        texts = (key, value) if key in (prompt_column, id_column) and isinstance(value, str) else (key,)
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                where = f"the key {shown(key)}" if text is key else shown(key)
                code = f"\\u{ord(text[error.start]):04x}"
                raise BadRow(f"{where} has a lone surrogate ({code}), which is no character; remove it") from error


def _id_text(value: object, id_column: str, prompt: str | None) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    reason = f"{shown(id_column)} is {_shown_value(value)}; make it a string or a whole number"
    raise BadRow(reason, prompt=prompt)


def _parse(line: bytes, prompt_column: str, id_column: str) -> tuple[str | None, str, dict[str, Any]]:
    """One line's id, prompt and all its fields; raises BadRow with whichever of the first two was good."""
    fields = decode(line)
    # only an escape can make a surrogate, for the bytes were strict UTF-8; one byte is found faster than two
    if b"\\" in line and b"\\u" in line:
        _check_surrogates(fields, prompt_column, id_column)
    id_, prompt = fields.get(id_column), fields.get(prompt_column)
    if isinstance(prompt, str):
        return (id_ if id_ is None or isinstance(id_, str) else _id_text(id_, id_column, prompt)), prompt, fields
    id_ = _id_text(id_, id_column, None)
    if prompt_column not in fields:
        raise BadRow(missing(prompt_column, "--prompt-column", list(fields), "key"), id_)
    raise BadRow(f"{shown(prompt_column)} is {_shown_value(prompt)}; make it a string", id_)


def _own_params(fields: dict[str, Any], not_parameters: tuple[str, ...], params: SamplingParams) -> SamplingParams:
    """The row's parameters; raises UsageError."""
    names = parameter_names(fields, not_parameters)
    return row_params({name: fields[name] for name in names}, params) if names else params


def _read_json_lines(
    source: Source, prompt_column: str, id_column: str, params: SamplingParams, first_row: int, own_params: bool
) -> Iterator[Request | Rejected]:
    with open_bytes(source) as (file, _):
        for row, (number, line) in enumerate(read_lines(file, source), first_row):
            place = f"{source.name}:{number}"
            item: Request | Rejected
            id_ = prompt = None
            try:
                id_, prompt, fields = _parse(line, prompt_column, id_column)
                own = _own_params(fields, (prompt_column, id_column), params) if own_params else params
                item = Request(row, place, id_, prompt, own)
            except BadRow as bad:
                item = Rejected(row, place, bad.id, bad.prompt, f"{place}: {bad.reason}")
            except UsageError as error:
                item = Rejected(row, place, id_, prompt, f"{place}: {error}")
            yield item


def _read_openai(
    source: Source, params: SamplingParams, first_row: int, place_of: dict[str, str]
) -> Iterator[Request | Rejected]:
    """place_of has the custom_ids so far."""
    with open_bytes(source) as (file, _):
        for row, (number, line) in enumerate(read_lines(file, source), first_row):
            place = f"{source.name}:{number}"
            item: Request | Rejected
            id_ = None
            try:
                fields = decode(line)
                id_ = fields.get("custom_id") if _is_sound(fields.get("custom_id")) else None
                if id_ and (first := place_of.setdefault(id_, place)) != place:
                    raise BadRow(f"custom_id {shown(id_)} is that of {first} too; rename one")
                prompts, own = read_batch_line(fields, params)
                item = Request(row, place, id_, prompts[0], own, prompts[1:])
            except BadRow as bad:
                item = Rejected(row, place, id_, bad.prompt, f"{place}: {bad.reason}")
            except UsageError as error:
                item = Rejected(row, place, id_, None, f"{place}: {error}")
            yield item


def _is_sound(text: object) -> bool:
    """Whether it is text that a file can hold."""
    return isinstance(text, str) and text.encode("utf-8", "replace").decode() == text


# ---- columns


def _find_columns(
    names: Sequence[str], source: Source, prompt_column: str, id_column: str, own_params: bool
) -> list[str]:
    """The columns to read; InputError unless each is there once (the default id column may be absent).

    A column that is no parameter, but could only have been meant as one, is an InputError too.
    """
    if prompt_column not in names:
        raise InputError(f"{source.where}: {missing(prompt_column, '--prompt-column', names, 'column')}")
    if id_column not in names and id_column != DEFAULT_ID_COLUMN:
        raise InputError(f"{source.where}: {missing(id_column, '--id-column', names, 'column')}")
    columns = [name for name in dict.fromkeys((prompt_column, id_column)) if name in names]
    if own_params:
        try:
            columns += parameter_names(dict.fromkeys(names), (prompt_column, id_column))
        except UsageError as error:
            raise InputError(f"{source.where}: column {error}, or pass --no-row-params") from error
    for name in columns:
        if names.count(name) > 1:
            many = f"{names.count(name)} columns are called {shown(name)}"
            raise InputError(f"{source.where}: {many}; rename all but one")
    return columns


# ---- CSV


def _csv_value(name: str, text: str) -> Any:
    """A parameter as it is written in JSON, strings without their quotes; an empty field is none.

    "0.8" -> 0.8, "" -> None, '["a", "b"]' -> ["a", "b"]; of stop and bad_words, which are text, "5" -> "5"
    """
    if not text or (name in ("stop", "bad_words") and not text.startswith("[")):
        return text or None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text  # which the parameter says it cannot be


def _read_csv(
    source: Source, prompt_column: str, id_column: str, params: SamplingParams, first_row: int, own_params: bool
) -> Iterator[Request | Rejected]:
    with open_bytes(source) as (file, _):
        header, records = read_csv(file, source)
        columns = _find_columns(header, source, prompt_column, id_column, own_params) if header else []
        parameters = [name for name in columns if name not in (prompt_column, id_column)]
        for row, (number, record) in enumerate(records, first_row):
            place = f"{source.name}:{number}"
            if isinstance(record, str):
                yield Rejected(row, place, None, None, f"{place}: {record}")
                continue
            fields = dict(zip(header, record, strict=True))
            id_, prompt = fields.get(id_column) or None, fields[prompt_column]  # CSV writes no id as an empty one
            try:
                own = row_params({name: _csv_value(name, fields[name]) for name in parameters}, params)
                yield Request(row, place, id_, prompt, own)
            except UsageError as error:
                yield Rejected(row, place, id_, prompt, f"{place}: {error}")


# ---- Parquet


def _is_text(kind: Any) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _can_be_id(kind: Any) -> bool:
    """Text, and whatever Arrow writes as text: numbers, dates, booleans; no bytes and nothing nested."""
    if pa.types.is_dictionary(kind):
        return _can_be_id(kind.value_type)
    if "binary" in str(kind) or isinstance(kind, pa.BaseExtensionType):
        return False
    try:
        pa.nulls(1, kind).cast(pa.large_string())
    except pa.ArrowNotImplementedError:
        return False
    return True


def _parquet_columns(schema: Any, source: Source, prompt_column: str, id_column: str, own_params: bool) -> list[str]:
    """The columns to read; InputError unless the prompt column is text and the id column could be an id."""
    columns = _find_columns(schema.names, source, prompt_column, id_column, own_params)
    kind = schema.field(prompt_column).type
    if not _is_text(kind):
        raise InputError(f"{source.where}: column {shown(prompt_column)} is of type {kind}; cast it to string")
    kind = schema.field(id_column).type if id_column in columns else pa.null()
    if not _can_be_id(kind):
        remedy = "cast it to string or an integer type"
        raise InputError(f"{source.where}: column {shown(id_column)} is of type {kind}; {remedy}")
    return columns


def _texts(column: Any) -> _Texts:
    """An Arrow column as Python strings; a value that is not UTF-8 comes back as its bytes."""
    values: _Texts
    try:
        values = column.cast(pa.large_string()).to_pylist()
    except UnicodeDecodeError:
        values = [_text_or_bytes(value) for value in column.cast(pa.large_binary()).to_pylist()]
    return values


def _text_or_bytes(value: bytes | None) -> str | bytes | None:
    try:
        return value if value is None else value.decode()
    except UnicodeDecodeError:
        return value


def _batch_rows(metadata: Any) -> int:
    """How many rows to decode at a time: BATCH_ROWS, or what makes up BATCH_BYTES in this file."""
    rows: int = metadata.num_rows
    size: int = sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
    return max(1, min(BATCH_ROWS, BATCH_BYTES * rows // max(size, 1)))


def _values(batch: Any, names: list[str]) -> _Values:
    """Each row's parameters; text that is not UTF-8 becomes bytes, which no parameter is."""
    if not names:
        return [{}] * len(batch)
    columns = batch.select(names)
    try:
        values: _Values = columns.to_pylist()
    except UnicodeDecodeError:
        values = [_value(columns.slice(row, 1), names) for row in range(len(batch))]
    return values


def _value(row: Any, names: list[str]) -> dict[str, Any]:
    try:
        return dict(row.to_pylist()[0])
    except UnicodeDecodeError:
        return dict.fromkeys(names, b"not UTF-8")


def read_batches(file: Any, columns: list[str], source: Source) -> Iterator[Any]:
    """Yield these columns of a pq.ParquetFile in record batches; InputError where the data is damaged."""
    row = 0
    try:
        for batch in file.iter_batches(_batch_rows(file.metadata), columns=columns, use_threads=False):
            yield batch
            row += len(batch)
    except (pa.ArrowException, OSError) as error:
        what = f"the Parquet data is damaged here or later ({first_line(error)})"
        raise InputError(f"{source.name}:row {row}: {what}; write the file again") from error


def _fields(batch: Any, prompt_column: str, id_column: str) -> Iterator[tuple[Any, Any, dict[str, Any]]]:
    """The id, the prompt and the parameters of every row of a record batch."""
    names = batch.schema.names
    ids: _Texts = _texts(batch.column(id_column)) if id_column in names else [None] * len(batch)
    parameters = [name for name in names if name not in (prompt_column, id_column)]
    return zip(ids, _texts(batch.column(prompt_column)), _values(batch, parameters), strict=True)


def _parquet_item(
    row: int,
    place: str,
    id_: str | bytes | None,
    prompt: str | bytes | None,
    values: dict[str, Any],
    params: SamplingParams,
) -> Request | Rejected:
    good = [None if isinstance(value, bytes) else value for value in (id_, prompt)]
    if isinstance(prompt, str) and not isinstance(id_, bytes):
        try:
            return Request(row, place, id_, prompt, row_params(values, params))
        except UsageError as error:
            reason = str(error)
    elif prompt is None:
        reason = "the prompt is null; make it a string"
    else:
        what = "prompt" if isinstance(prompt, bytes) else "id"
        reason = f"the {what} is not UTF-8; write the column as UTF-8 strings"
    return Rejected(row, place, good[0], good[1], f"{place}: {reason}")


def _read_parquet(
    source: Source, prompt_column: str, id_column: str, params: SamplingParams, first_row: int, own_params: bool
) -> Iterator[Request | Rejected]:
    with open_parquet(source) as file:
        columns = _parquet_columns(file.schema_arrow, source, prompt_column, id_column, own_params)
        batches = read_batches(file, columns, source)
        rows = chain.from_iterable(_fields(batch, prompt_column, id_column) for batch in batches)
        for number, (id_, prompt, values) in enumerate(rows):
            yield _parquet_item(first_row + number, f"{source.name}:row {number}", id_, prompt, values, params)


# ---- before the run


def _check_first_bytes(source: Source) -> None:
    with open_bytes(source) as (file, _):
        try:
            start = file.read(8)
        except UNPACKING_ERRORS as error:
            what = f"not a {source.packing} file, or a damaged one" if source.packing else "cannot be read"
            raise InputError(f"{source.where}: {what} ({first_line(error)}); fetch or pack it again") from error
    for magic, what, remedy in _OTHER_FORMATS:
        if start.startswith(magic):
            wanted = "JSON lines" if source.format == "jsonl" else source.format.upper()
            raise InputError(f"{source.where}: this is {what}, not {wanted}; {remedy}")


def _check_json_lines(source: Source, prompt_column: str, id_column: str, keep: Sequence[str]) -> list[str]:
    """Look at the first rows: a column that none of them has makes a bad job, one that some lack makes bad rows."""
    _check_first_bytes(source)
    columns = {"--prompt-column": prompt_column}
    if id_column != DEFAULT_ID_COLUMN:
        columns["--id-column"] = id_column
    found: dict[str, None] = {}
    if _is_batch(source):
        return ["custom_id", "method", "url", "body"]
    problem, rows = None, 0
    with open_bytes(source) as (file, _):
        for number, line in islice(read_lines(file, source), ROWS_LOOKED_AT):
            rows += 1
            try:
                found |= dict.fromkeys(decode(line))
            except BadRow as bad:
                problem = problem or f"{source.name}:{number}: {bad.reason}"
            if found.keys() >= {*columns.values(), *keep}:
                return list(found)
    if rows and not found:
        problem = problem or f"write {EXAMPLE}"
        raise InputError(f"{source.where}: none of the first {rows} rows is a JSON object with a key; {problem}")
    for option, column in columns.items():
        if rows and column not in found:
            what = missing(column, option, list(found), "key")
            raise InputError(f"{source.where}: in the first {rows} rows {what}")
    return list(found)


def _is_batch(source: Source) -> bool | None:
    """Whether the first row that is a JSON object is a line of one of OpenAI's batch files; None: there is no row."""
    if source.format != "jsonl":
        return False
    kind = None
    with open_bytes(source) as (file, _):
        for _, line in islice(read_lines(file, source), ROWS_LOOKED_AT):
            try:
                return is_batch_line(decode(line))
            except BadRow:
                kind = False
    return kind


def is_openai_batch(inputs: Inputs) -> bool:
    """Whether the input is made of OpenAI's batch files; its first row tells."""
    kinds = (_is_batch(source) for source in find_sources(inputs))
    return next((kind for kind in kinds if kind is not None), False)


def _check_source(
    source: Source, prompt_column: str, id_column: str, keep: Sequence[str], own_params: bool
) -> list[str]:
    """The names of a file's columns, as far as they are easily known; InputError where it cannot be an input."""
    if source.format == "parquet":
        with open_parquet(source) as file:
            names: list[str] = file.schema_arrow.names
            _parquet_columns(file.schema_arrow, source, prompt_column, id_column, own_params)
    elif source.format == "jsonl":
        names = _check_json_lines(source, prompt_column, id_column, keep)
    else:
        _check_first_bytes(source)
        with open_bytes(source) as (file, _):
            names, _records = read_csv(file, source)
        if names:
            _find_columns(names, source, prompt_column, id_column, own_params)
    return names + [key for key, _ in source.partition]


def check_input(
    inputs: Inputs,
    prompt_column: str = "prompt",
    id_column: str = DEFAULT_ID_COLUMN,
    *,
    keep: Sequence[str] = (),
    input_format: InputFormat = "auto",
    spool: Path | None = None,
    own_params: bool = True,
) -> tuple[Source, ...]:
    """Find the files and refuse, in milliseconds each, what cannot be an input; raises InputError with a remedy.

    Single bad rows pass: they are rejected one by one. So does an empty file: zero rows. A column to keep may be
    absent from some files, but not from all.
    """
    sources = find_sources(inputs, input_format=input_format, spool=spool)
    names: dict[str, None] = {}
    for source in sources:
        names |= dict.fromkeys(_check_source(source, prompt_column, id_column, keep, own_params))
    openai = is_openai_batch(sources)
    for source in sources:
        if _is_batch(source) not in (None, openai):
            which = "the first is one of OpenAI's batch files and this is not"
            which = which if openai else "this is one of OpenAI's batch files and the first is not"
            raise InputError(f"{source.where}: {which}; run them apart")
    for column in keep:
        if names and column not in names:
            where = sources[0].where if len(sources) == 1 else f"{sources[0].where} and {len(sources) - 1} more"
            raise InputError(f"{where}: {missing(column, '--keep', list(names), 'column')}")
    return sources


def _scan(source: Source) -> InputFacts:
    if source.format == "parquet":
        with open_parquet(source) as file, open_raw(source) as raw:
            rows, logprobs = file.metadata.num_rows, "logprobs" in file.schema_arrow.names
            digest = hashlib.sha256()
            while data := raw.read(BUFFER_BYTES):
                digest.update(data)
            return InputFacts(rows, digest.hexdigest(), raw.tell(), logprobs)
    with open_bytes(source) as (unpacked, hashed):
        if source.format == "jsonl":
            rows, logprobs = 0, False
            for rows, (_, line) in enumerate(read_lines(unpacked, source), 1):  # noqa: B007  # counts them
                logprobs = logprobs or b'"logprobs"' in line
        else:
            header, records = read_csv(unpacked, source)
            rows, logprobs = sum(1 for _ in records), "logprobs" in header
        return InputFacts(rows, hashed.digest.hexdigest(), hashed.bytes, logprobs)


def scan_input(inputs: Inputs) -> InputFacts:
    """Count the rows and hash the bytes in one pass; raises InputError where packed data is damaged."""
    sources = find_sources(inputs)
    facts = []
    for source in sources:
        facts.append(_scan(source))
        check_unchanged(source)
    sha256 = facts[0].sha256
    if len(facts) > 1 or sources[0].partition:
        lines = (_hash_line(source, fact.sha256) for source, fact in zip(sources, facts, strict=True))
        sha256 = hashlib.sha256("".join(lines).encode()).hexdigest()
    return InputFacts(
        rows=sum(fact.rows for fact in facts),
        sha256=sha256,
        bytes=sum(fact.bytes for fact in facts),
        logprobs=any(fact.logprobs for fact in facts),
        openai=is_openai_batch(sources),
    )


def _hash_line(source: Source, sha256: str) -> str:
    folders = f" {json.dumps(source.partition)}" if source.partition else ""
    return f"{sha256}{folders}\n"


def read_requests(
    inputs: Inputs,
    *,
    prompt_column: str = "prompt",
    id_column: str = DEFAULT_ID_COLUMN,
    params: SamplingParams,
    first_row: int = 0,
    own_params: bool = True,
) -> Iterator[Request | Rejected]:
    """Yield every row of the files in order, numbered from first_row; places are `a.jsonl:LINE`, `a.parquet:row N`.

    With own_params, a row's own parameters win over params. Memory is flat in the number of rows, but for the
    custom_ids of OpenAI batch files. Raises InputError where a file turns out to be damaged, or was changed.
    """
    readers = {"jsonl": _read_json_lines, "csv": _read_csv, "tsv": _read_csv, "parquet": _read_parquet}
    sources, row, place_of = find_sources(inputs), first_row, dict[str, str]()
    openai = is_openai_batch(sources)
    for source in sources:
        if openai:
            items = _read_openai(source, params, row, place_of)
        else:
            items = readers[source.format](source, prompt_column, id_column, params, row, own_params)
        for item in items:
            row += 1
            yield item
        check_unchanged(source)
