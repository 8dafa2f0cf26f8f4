r"""Input rows: JSON lines or Parquet in, one Request or Rejected for every row, in order, in flat memory.

JSON lines are split on b"\n" alone. A line of nothing but spaces, tabs and carriage returns is no row; every
other line is exactly one row, however broken. What is wrong with a row becomes its Rejected and costs no other
row anything; what is wrong with a file (no such column, a truncated gzip) is an InputError.
"""

import gzip
import hashlib
import io
import json
import os
import stat
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.errors import InputError, UsageError
from batchgen.records.openai import is_batch_line, read_batch_line
from batchgen.records.parameters import parameter_names, row_params
from batchgen.types import Rejected, Request, SamplingParams

DEFAULT_ID_COLUMN = "id"  # may be absent; an id column that was asked for by name may not
JSON_LINES_SUFFIXES = (".jsonl", ".ndjson", ".json")
MAX_LINE_BYTES = 32 * 2**20  # the longest prompt that fits a GPT-2 is a few hundred KB
ROWS_LOOKED_AT = 1000  # by check_input, before it says that a column is not there
BATCH_ROWS = 16_384  # of Parquet, decoded at a time, or fewer where rows are large:
BATCH_BYTES = 16 * 2**20
BUFFER_BYTES = 2**20
BLANK = " \t\r"
TOO_LONG = b""  # what stands for a line that was not kept; no line that is a row is empty
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
EXAMPLE = '{"prompt": "Once upon a time"}'

_Texts = list[str | bytes | None]  # bytes: a value that is not UTF-8
_Values = list[dict[str, Any]]  # a row's parameters
_Columns = tuple[_Texts, _Texts, _Values]

# the first bytes of files that are often given by mistake: what it is, and what to do
_OTHER_FORMATS = (
    (b"\xff\xfe", "UTF-16 text", "save it as UTF-8"),
    (b"\xfe\xff", "UTF-16 text", "save it as UTF-8"),
    (b"{\0", "UTF-16 text", "save it as UTF-8"),
    (b"\0{", "UTF-16 text", "save it as UTF-8"),
    (b"PAR1", "a Parquet file", "name it .parquet"),
    (b"\x1f\x8b", "a gzip file", "name it .jsonl.gz, or unpack it if it was packed twice"),
    (b"\x28\xb5\x2f\xfd", "a zstd file", "unpack it"),
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
    """What identifies an input: its number of rows, and the SHA-256 and length of the file's bytes.

    logprobs: some row may ask for them. openai: it is one of OpenAI's batch files.
    """

    rows: int
    sha256: str
    bytes: int
    logprobs: bool = False
    openai: bool = False


class _BadRow(Exception):
    """Why one row is no request, and what of it could be read all the same."""

    def __init__(self, reason: str, id_: str | None = None, prompt: str | None = None) -> None:
        super().__init__(reason, id_, prompt)
        self.reason, self.id, self.prompt = reason, id_, prompt


class _Hashed(io.RawIOBase):
    """A file that hashes and counts its bytes as they are read, so that one pass does both."""

    def __init__(self, raw: io.FileIO) -> None:
        self.raw, self.digest, self.bytes = raw, hashlib.sha256(), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self.raw.readinto(buffer) or 0
        self.digest.update(memoryview(buffer)[:count])
        self.bytes += count
        return count


# ---- words for errors


def _shown_name(path: Path) -> str:
    """The file's name for places; a name that is no UTF-8 must not make an error text that cannot be written."""
    return os.fsencode(path.name).decode("utf-8", "replace")


def _shown(text: str) -> str:
    """repr, so that no control character or lone surrogate gets into an error text; shortened to 40 characters."""
    return repr(text) if len(text) <= 40 else repr(text[:37] + "...")


def _shown_names(names: Sequence[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(_shown(name) for name in names[:8]) + more


def _nearest(name: str, names: Iterable[str]) -> str | None:
    """The name most like another in letters, or in all but their case; the bounds keep hostile keys cheap."""
    short = {known.casefold(): known for known in islice(names, 100) if len(known) <= 100}
    near = get_close_matches(name.casefold(), short, n=1)
    return short[near[0]] if near else None


def _missing(column: str, option: str, names: Sequence[str], kind: str) -> str:
    """`no key 'prompt'; the keys are 'Prompt', 'id'; did you mean 'Prompt'? pass --prompt-column`."""
    if not names:
        return f"no {kind} {_shown(column)}; there are no {kind}s at all"
    near = _nearest(column, names)
    remedy = f"did you mean {_shown(near)}? pass it as {option}" if near else f"name the right one with {option}"
    return f"no {kind} {_shown(column)}; the {kind}s are {_shown_names(names)}; {remedy}"


def _shown_value(value: object) -> str:
    """`a number (1.5)`, `an array`: the JSON type, and the value where it is short."""
    kind = _JSON_TYPES[type(value)]
    return f"{kind} ({_shown(str(value)).strip(chr(39))})" if isinstance(value, (int, float)) else kind


# ---- JSON lines: bytes to lines to rows


@contextmanager
def _open_lines(path: Path) -> Iterator[tuple[io.BufferedReader, _Hashed]]:
    """Open a plain or gzipped file for reading lines; the second gives hash and length of the bytes on disk."""
    with _open(path) as raw:
        hashed = _Hashed(raw)
        source: Any = hashed
        if path.suffix.lower() == ".gz":
            source = gzip.GzipFile(fileobj=io.BufferedReader(hashed, BUFFER_BYTES))
        with io.BufferedReader(source, BUFFER_BYTES) as file:
            yield file, hashed


def _open(path: Path) -> io.FileIO:
    try:
        return open(path, "rb", buffering=0)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def _lines(file: BinaryIO, name: str) -> Iterator[tuple[int, bytes]]:
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
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(
            f"{name}:{number + 1}: the gzip data is truncated or damaged here ({error}); fetch or pack the file again"
        ) from error
    except OSError as error:
        raise InputError(f"{name}:{number + 1}: cannot be read: {error.strerror}") from error


def _skip_line(file: BinaryIO) -> bool:
    """Pass over the rest of a line without holding it; True if that rest is blank."""
    blank = True
    for piece in iter(partial(file.readline, BUFFER_BYTES), b""):
        blank = blank and not piece.strip(b" \t\r\n")
        if piece.endswith(b"\n"):
            break
    return blank


def _no_constant(name: str) -> None:
    raise _BadRow(f"not JSON: {name} is not a JSON value; use null or a string")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """[("id", 1), ("prompt", "a")] -> {"id": 1, "prompt": "a"}"""
    fields = dict(pairs)
    if len(fields) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _BadRow(f"the key {_shown(twice)} is there twice; keep one")
    return fields


_DECODER = json.JSONDecoder(parse_constant=_no_constant, object_pairs_hook=_no_duplicates)


def _decode(line: bytes) -> dict[str, Any]:
    """One line's JSON object; raises _BadRow on any bytes that are not one."""
    if line == TOO_LONG:
        raise _BadRow(f"the line is longer than {MAX_LINE_BYTES} bytes; shorten it")
    try:
        text = line.decode()
        start = 0 if text[0] == "{" else len(text) - len(text.lstrip(BLANK))
        value, end = _DECODER.raw_decode(text, start)
    except UnicodeDecodeError as error:
        raise _BadRow(f"invalid UTF-8 at byte {error.start + 1} of the line; save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise _BadRow(f"not JSON: {error.msg} at column {error.pos + 1}; write {EXAMPLE}") from error
    except RecursionError as error:
        raise _BadRow("the JSON is nested too deeply to be read; flatten it") from error
    except ValueError as error:
        raise _BadRow("an integer has too many digits to be read; write it as a string") from error
    if end != len(text):
        raise _BadRow(f"not JSON: extra data at column {end + 1}; write one object a line")
    if not isinstance(value, dict):
        raise _BadRow(f"the line is {_shown_value(value)}, not an object; write {EXAMPLE}")
    return value


def _check_surrogates(fields: dict[str, Any], prompt_column: str, id_column: str) -> None:
    r"""Refuse half of a surrogate pair: \ud800 is legal in JSON, but it is no character and no file can hold it."""
    for key, value in fields.items():
        texts = (key, value) if key in (prompt_column, id_column) and isinstance(value, str) else (key,)
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                where = f"the key {_shown(key)}" if text is key else _shown(key)
                code = f"\\u{ord(text[error.start]):04x}"
                raise _BadRow(f"{where} has a lone surrogate ({code}), which is no character; remove it") from error


def _id_text(value: object, id_column: str, prompt: str | None) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    reason = f"{_shown(id_column)} is {_shown_value(value)}; make it a string or a whole number"
    raise _BadRow(reason, prompt=prompt)


def _parse(line: bytes, prompt_column: str, id_column: str) -> tuple[str | None, str, dict[str, Any]]:
    """One line's id, prompt and all its fields; raises _BadRow with whichever of the first two was good."""
    fields = _decode(line)
    # only an escape can make a surrogate, for the bytes were strict UTF-8; one byte is found faster than two
    if b"\\" in line and b"\\u" in line:
        _check_surrogates(fields, prompt_column, id_column)
    id_, prompt = fields.get(id_column), fields.get(prompt_column)
    if isinstance(prompt, str):
        return (id_ if id_ is None or isinstance(id_, str) else _id_text(id_, id_column, prompt)), prompt, fields
    id_ = _id_text(id_, id_column, None)
    if prompt_column not in fields:
        raise _BadRow(_missing(prompt_column, "--prompt-column", list(fields), "key"), id_)
    raise _BadRow(f"{_shown(prompt_column)} is {_shown_value(prompt)}; make it a string", id_)


def _own_params(fields: dict[str, Any], not_parameters: tuple[str, ...], params: SamplingParams) -> SamplingParams:
    """The row's parameters; raises UsageError."""
    names = parameter_names(fields, not_parameters)
    return row_params({name: fields[name] for name in names}, params) if names else params


def _read_json_lines(
    path: Path, prompt_column: str, id_column: str, params: SamplingParams, first_row: int, own_params: bool
) -> Iterator[Request | Rejected]:
    name = _shown_name(path)
    with _open_lines(path) as (file, _):
        for row, (number, line) in enumerate(_lines(file, name), first_row):
            place = f"{name}:{number}"
            item: Request | Rejected
            id_ = prompt = None
            try:
                id_, prompt, fields = _parse(line, prompt_column, id_column)
                own = _own_params(fields, (prompt_column, id_column), params) if own_params else params
                item = Request(row, place, id_, prompt, own)
            except _BadRow as bad:
                item = Rejected(row, place, bad.id, bad.prompt, f"{place}: {bad.reason}")
            except UsageError as error:
                item = Rejected(row, place, id_, prompt, f"{place}: {error}")
            yield item


def _read_openai(path: Path, params: SamplingParams, first_row: int) -> Iterator[Request | Rejected]:
    name = _shown_name(path)
    line_of: dict[str, int] = {}  # by custom_id
    with _open_lines(path) as (file, _):
        for row, (number, line) in enumerate(_lines(file, name), first_row):
            place = f"{name}:{number}"
            item: Request | Rejected
            id_ = None
            try:
                fields = _decode(line)
                id_ = fields.get("custom_id") if _is_sound(fields.get("custom_id")) else None
                if id_ and (first := line_of.setdefault(id_, number)) != number:
                    raise _BadRow(f"custom_id {_shown(id_)} is that of line {first} too; rename one")
                prompts, own = read_batch_line(fields, params)
                item = Request(row, place, id_, prompts[0], own, prompts[1:])
            except _BadRow as bad:
                item = Rejected(row, place, id_, bad.prompt, f"{place}: {bad.reason}")
            except UsageError as error:
                item = Rejected(row, place, id_, None, f"{place}: {error}")
            yield item


def _is_sound(text: object) -> bool:
    """Whether it is text that a file can hold."""
    return isinstance(text, str) and text.encode("utf-8", "replace").decode() == text


# ---- Parquet


@contextmanager
def _open_parquet(path: Path) -> Iterator[Any]:
    """A pq.ParquetFile that reads by pages, not by whole row groups, and verifies their checksums."""
    with _open(path) as raw:
        try:
            file = pq.ParquetFile(raw, buffer_size=BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: not a Parquet file, or a damaged one ({_first_line(error)})") from error
        with file:
            yield file


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]


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


def _parquet_columns(schema: Any, path: Path, prompt_column: str, id_column: str, own_params: bool) -> list[str]:
    """The columns to read; InputError unless the prompt column is text and the id column could be an id.

    A column that is no parameter, but could only have been meant as one, is an InputError too.
    """
    names = schema.names
    if prompt_column not in names:
        raise InputError(f"{path}: {_missing(prompt_column, '--prompt-column', names, 'column')}")
    if id_column not in names and id_column != DEFAULT_ID_COLUMN:
        raise InputError(f"{path}: {_missing(id_column, '--id-column', names, 'column')}")
    columns = [name for name in dict.fromkeys((prompt_column, id_column)) if name in names]
    if own_params:
        try:
            columns += parameter_names(dict.fromkeys(names), (prompt_column, id_column))
        except UsageError as error:
            raise InputError(f"{path}: column {error}, or pass --no-row-params") from error
    for name in columns:
        if names.count(name) > 1:
            raise InputError(f"{path}: {names.count(name)} columns are called {_shown(name)}; rename all but one")
    kind = schema.field(prompt_column).type
    if not _is_text(kind):
        raise InputError(f"{path}: column {_shown(prompt_column)} is of type {kind}; cast it to string")
    kind = schema.field(id_column).type if id_column in names else pa.null()
    if not _can_be_id(kind):
        raise InputError(f"{path}: column {_shown(id_column)} is of type {kind}; cast it to string or an integer type")
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


def _batches(file: Any, prompt_column: str, id_column: str, columns: list[str], name: str) -> Iterator[_Columns]:
    """Yield ids, prompts and parameters of one batch of rows after another, of equal length."""
    row = 0
    parameters = [column for column in columns if column not in (prompt_column, id_column)]
    try:
        for batch in file.iter_batches(_batch_rows(file.metadata), columns=columns, use_threads=False):
            ids: _Texts = _texts(batch.column(id_column)) if id_column in columns else [None] * len(batch)
            yield ids, _texts(batch.column(prompt_column)), _values(batch, parameters)
            row += len(batch)
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{name}:row {row}: the Parquet data is damaged here or later ({_first_line(error)}); write the file again"
        ) from error


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
    path: Path, prompt_column: str, id_column: str, params: SamplingParams, first_row: int, own_params: bool
) -> Iterator[Request | Rejected]:
    name = _shown_name(path)
    with _open_parquet(path) as file:
        columns = _parquet_columns(file.schema_arrow, path, prompt_column, id_column, own_params)
        batches = _batches(file, prompt_column, id_column, columns, name)
        rows = chain.from_iterable(zip(*columns, strict=True) for columns in batches)
        for number, (id_, prompt, values) in enumerate(rows):
            yield _parquet_item(first_row + number, f"{name}:row {number}", id_, prompt, values, params)


# ---- before the run


def _names_in(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _check_file(path: Path) -> None:
    """An existing, regular, readable file of a known suffix, or an InputError that says what to do."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        near = _nearest(path.name, _names_in(path.parent))
        remedy = f"; did you mean {path.parent / near}?" if near else "; check the name and the folder"
        raise InputError(f"{path}: no such file{remedy}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    if stat.S_ISDIR(mode):
        raise InputError(f"{path}: a directory, not a file; name the files in it")
    if not stat.S_ISREG(mode):
        raise InputError(f"{path}: a pipe or device; the input is read more than once: save it to a file first")
    if not _is_parquet(path) and _json_lines_suffix(path) not in JSON_LINES_SUFFIXES:
        known = ", ".join((".parquet", *JSON_LINES_SUFFIXES, *(suffix + ".gz" for suffix in JSON_LINES_SUFFIXES)))
        raise InputError(f"{path}: the suffix {path.suffix!r} is none of {known}; rename or convert the file")
    _open(path).close()


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() == ".parquet"


def _json_lines_suffix(path: Path) -> str:
    """a.jsonl -> .jsonl, a.jsonl.gz -> .jsonl"""
    return (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()


def _check_first_bytes(path: Path) -> None:
    with _open_lines(path) as (file, _):
        try:
            start = file.read(8)
        except (EOFError, zlib.error, OSError) as error:
            raise InputError(f"{path}: not a gzip file, or a damaged one ({error}); fetch or pack it again") from error
    for magic, what, remedy in _OTHER_FORMATS:
        if start.startswith(magic):
            raise InputError(f"{path}: this is {what}, not JSON lines; {remedy}")


def _check_json_lines(path: Path, prompt_column: str, id_column: str) -> None:
    """Look at the first rows: a column that none of them has makes a bad job, one that some lack makes bad rows."""
    _check_first_bytes(path)
    name = _shown_name(path)
    columns = {"--prompt-column": prompt_column}
    if id_column != DEFAULT_ID_COLUMN:
        columns["--id-column"] = id_column
    found: dict[str, None] = {}
    if is_openai_batch(path):
        return
    problem, rows = None, 0
    with _open_lines(path) as (file, _):
        for number, line in islice(_lines(file, name), ROWS_LOOKED_AT):
            rows += 1
            try:
                found |= dict.fromkeys(_decode(line))
            except _BadRow as bad:
                problem = problem or f"{name}:{number}: {bad.reason}"
            if all(column in found for column in columns.values()):
                return
    if rows and not found:
        problem = problem or f"write {EXAMPLE}"
        raise InputError(f"{path}: none of the first {rows} rows is a JSON object with a key; {problem}")
    for option, column in columns.items():
        if rows and column not in found:
            raise InputError(f"{path}: in the first {rows} rows {_missing(column, option, list(found), 'key')}")


def is_openai_batch(path: Path) -> bool:
    """Whether the first row that is a JSON object is a line of one of OpenAI's batch files."""
    if _is_parquet(path):
        return False
    with _open_lines(path) as (file, _):
        for _, line in islice(_lines(file, _shown_name(path)), ROWS_LOOKED_AT):
            try:
                return is_batch_line(_decode(line))
            except _BadRow:
                continue
    return False


def check_input(
    path: Path, prompt_column: str = "prompt", id_column: str = DEFAULT_ID_COLUMN, *, own_params: bool = True
) -> None:
    """Refuse, in milliseconds, a file that cannot be an input at all; raises InputError with place and remedy.

    Single bad rows pass: they are rejected one by one. So does an empty file: zero rows.
    """
    _check_file(path)
    if _is_parquet(path):
        with _open_parquet(path) as file:
            _parquet_columns(file.schema_arrow, path, prompt_column, id_column, own_params)
    else:
        _check_json_lines(path, prompt_column, id_column)


def scan_input(path: Path) -> InputFacts:
    """Count the rows and hash the bytes in one pass; raises InputError at the place where a gzip is damaged."""
    if _is_parquet(path):
        with _open_parquet(path) as file, _open(path) as raw:
            rows, logprobs = file.metadata.num_rows, "logprobs" in file.schema_arrow.names
            return InputFacts(rows, hashlib.file_digest(raw, "sha256").hexdigest(), raw.tell(), logprobs)
    rows, logprobs = 0, False
    with _open_lines(path) as (lines, hashed):
        for _, line in _lines(lines, _shown_name(path)):
            rows += 1
            logprobs = logprobs or b'"logprobs"' in line
    return InputFacts(rows, hashed.digest.hexdigest(), hashed.bytes, logprobs, is_openai_batch(path))


def read_requests(
    path: Path,
    *,
    prompt_column: str = "prompt",
    id_column: str = DEFAULT_ID_COLUMN,
    params: SamplingParams,
    first_row: int = 0,
    own_params: bool = True,
) -> Iterator[Request | Rejected]:
    """Yield every row of the file in order, numbered from first_row; places are `a.jsonl:LINE`, `a.parquet:row N`.

    With own_params, a row's own parameters win over params. Memory is flat in the number of rows, but for the
    custom_ids of an OpenAI batch file. Raises InputError where the file itself turns out to be damaged.
    """
    if is_openai_batch(path):
        return _read_openai(path, params, first_row)
    read = _read_parquet if _is_parquet(path) else _read_json_lines
    return read(path, prompt_column, id_column, params, first_row, own_params)
