r"""JSON lines: one object a line; each line becomes exactly one row, however broken it is.

Lines are split at b"\n" alone. A line of only spaces, tabs and carriage returns is not a row.
"""

import json
from collections.abc import Iterator, Sequence
from functools import partial
from io import BufferedReader
from itertools import islice

from batchgen.errors import InputError, UsageError
from batchgen.files import unique_keys
from batchgen.input import openai
from batchgen.input.formats import BadRow, Found, Reading, Rows, Scanned, batch_rows, check_first_bytes, needed_columns
from batchgen.input.kept import MIXED, Kind, kind_of, merge_kinds
from batchgen.input.openai import Fields, Prompt
from batchgen.input.parameters import override_params, parameter_names
from batchgen.input.sources import BUFFER_BYTES, UNPACKING_ERRORS, Source, open_bytes, read_error
from batchgen.input.words import describe_missing, find_surrogate
from batchgen.job import InputOptions
from batchgen.options import shown
from batchgen.types import Rejected, Request, SamplingParams

MAX_LINE_BYTES = 32 * 2**20  # the longest prompt that fits a GPT-2 is a few hundred KB
CHECKED_ROWS = 1000  # rows that check reads before it reports a key as missing
BLANK = " \t\r"
TOO_LONG = b""  # in place of a line over MAX_LINE_BYTES; no other row is empty
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
EXAMPLE = '{"prompt": "Once upon a time"}'

_TYPE_NAMES = {str: "a string", bool: "a boolean", dict: "an object", list: "an array", type(None): "null"}


# ---- bytes to lines


def read_lines(file: BufferedReader, source: Source) -> Iterator[tuple[int, bytes]]:
    """Yield the number, from 1, and the bytes of every line that is not blank; TOO_LONG for a line that is too long."""
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


def _skip_line(file: BufferedReader) -> bool:
    """Skip the rest of a line without holding it; True if that rest is blank."""
    blank = True
    for piece in iter(partial(file.readline, BUFFER_BYTES), b""):
        blank = blank and not piece.strip(b" \t\r\n")
        if piece.endswith(b"\n"):
            break
    return blank


# ---- lines to objects


def _refuse_constant(name: str) -> None:
    raise BadRow(f"not JSON: {name} is not a JSON value; use null or a string")


def _refuse_duplicates(pairs: list[tuple[str, object]]) -> Fields:
    try:
        return unique_keys(pairs)
    except ValueError as error:
        raise BadRow(f"{error}; keep one") from error


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_refuse_duplicates)


def decode(line: bytes) -> Fields:
    """The JSON object of one line; BadRow for any other bytes."""
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
        raise BadRow(f"the line is {_describe(value)}, not an object; write {EXAMPLE}")
    return value


def _describe(value: object) -> str:
    """`a number (1.5)`, `an array`: the JSON type, and the value if it is short."""
    kind = _TYPE_NAMES.get(type(value), "a number")
    return f"{kind} ({shown(value)})" if isinstance(value, (int, float)) else kind


# ---- objects to requests


def _read_fields(
    fields: Fields, line: bytes, _place: str, reading: Reading
) -> tuple[str | None, tuple[Prompt, ...], SamplingParams]:
    """The id, the prompt and the parameters of a row; BadRow carries the id or prompt that could be read."""
    prompt_column, id_column = reading.options.prompt_column, reading.options.id_column
    # the bytes are UTF-8, so only an escape can make a surrogate; one byte is found faster than two
    if b"\\" in line and b"\\u" in line:
        _check_surrogates(fields, (prompt_column, id_column))
    prompt, id_ = fields.get(prompt_column), fields.get(id_column)
    text = prompt if isinstance(prompt, str) else None
    if id_ is not None and not isinstance(id_, str):
        if not isinstance(id_, int) or isinstance(id_, bool):
            reason = f"{shown(id_column)} is {_describe(id_)}; make it a string or a whole number"
            raise BadRow(reason, prompt=text)
        id_ = str(id_)
    if text is None:
        if prompt_column not in fields:
            raise BadRow(describe_missing(prompt_column, "prompt_column", list(fields), "key"), id_)
        raise BadRow(f"{shown(prompt_column)} is {_describe(prompt)}; make it a string", id_)
    params = reading.params
    if reading.options.row_params:
        try:
            names = parameter_names(fields, (prompt_column, id_column))
            params = override_params({name: fields[name] for name in names}, params) if names else params
        except UsageError as error:
            raise BadRow(str(error), id_, text) from error
    return id_, (text,), params


def _check_surrogates(fields: Fields, columns: tuple[str, str]) -> None:
    """Refuse a lone surrogate, which no file can hold, in keys and in the prompt and id columns."""
    for key, value in fields.items():
        for text in (key, value) if key in columns and isinstance(value, str) else (key,):
            if code := find_surrogate(text):
                what = f"the key {shown(key)}" if text is key else shown(key)
                raise BadRow(f"{what} has a lone surrogate ({code}), which is not a character; remove it")


def _read_rows(
    file: BufferedReader, source: Source, reading: Reading, first_row: int
) -> Iterator[tuple[Request | Rejected, Fields, int]]:
    read_fields = openai.read_fields if reading.openai else _read_fields
    for row, (number, line) in enumerate(read_lines(file, source), first_row):
        place = f"{source.name}:{number}"
        item: Request | Rejected
        fields: Fields = {}
        try:
            fields = decode(line)
            id_, prompts, params = read_fields(fields, line, place, reading)
            item = Request(row, place, id_, prompts[0], params, prompts[1:])
        except BadRow as bad:
            item = bad.reject(row, place)
        yield item, fields, len(line)


# ---- kept columns


def _own_names(source: Source, keep: Sequence[str]) -> list[str]:
    """The kept columns that come from the lines: the folders of the file go before its keys."""
    return [name for name in keep if name not in dict(source.partition)]


def _add_kinds(kinds: dict[str, Kind], line: bytes) -> None:
    """Widen the kinds of kept columns by the values of one line."""
    try:
        fields = decode(line)
    except BadRow:
        return
    for name, kind in kinds.items():
        if kind != MIXED and (value := fields.get(name)) is not None:
            kinds[name] = merge_kinds(kind, kind_of(value))


# ---- the functions of a format; see formats.py


def check(source: Source, options: InputOptions) -> Found:
    """Read the first rows: a key that all of them lack is an error of the job, a key that some lack rejects rows."""
    needed = needed_columns(options)
    keys: dict[str, None] = {}
    problem, rows, objects = None, 0, 0
    with open_bytes(source) as (file, _):
        check_first_bytes(file, source)
        for number, line in islice(read_lines(file, source), CHECKED_ROWS):
            rows += 1
            try:
                fields = decode(line)
            except BadRow as bad:
                problem = problem or f"{source.name}:{number}: {bad.reason}"
                continue
            objects += 1
            if objects == 1 and openai.is_batch_line(fields):
                return Found(list(openai.LINE_KEYS), openai=True)
            keys |= dict.fromkeys(fields)
            if keys.keys() >= {*needed.values(), *options.keep}:
                break
    if rows and not keys:
        problem = problem or f"write {EXAMPLE}"
        raise InputError(f"{source.where}: none of the first {rows} rows is a JSON object with a key; {problem}")
    for option, column in needed.items():
        if rows and column not in keys:
            what = describe_missing(column, option, list(keys), "key")
            raise InputError(f"{source.where}: in the first {rows} rows {what}")
    return Found(list(keys), openai=False if rows else None)


def scan(source: Source, keep: Sequence[str]) -> Scanned:
    rows, logprobs = 0, False
    kinds: dict[str, Kind] = dict.fromkeys(_own_names(source, keep))
    with open_bytes(source) as (file, stored):
        for rows, (_, line) in enumerate(read_lines(file, source), 1):  # noqa: B007  # counts them
            logprobs = logprobs or b'"logprobs"' in line
            if kinds:
                _add_kinds(kinds, line)
        return Scanned(rows, stored.digest.hexdigest(), stored.bytes, logprobs, kinds)


def read(source: Source, reading: Reading, first_row: int) -> Iterator[Rows]:
    with open_bytes(source) as (file, _):
        rows = _read_rows(file, source, reading, first_row)
        yield from batch_rows(rows, _own_names(source, reading.kept.names), source, reading.kept)
