"""JSON: the text of a row becomes a request, or a rejection with its reason; json_text.py cuts a file into rows."""

import json
from collections.abc import Iterator, Mapping, Sequence
from io import BufferedReader
from itertools import islice
from typing import Any

from batchgen.errors import InputError, UsageError
from batchgen.files import unique_keys
from batchgen.input import openai
from batchgen.input.formats import (
    BadRow,
    Found,
    Reading,
    Rows,
    Scanned,
    batch_rows,
    check_first_bytes,
    needed_columns,
    text_columns,
)
from batchgen.input.json_columns import refuse_columns
from batchgen.input.json_text import decode_line, read_rows
from batchgen.input.kept import EXACT, MIXED, Kind, kind_of, merge_kinds
from batchgen.input.openai import Fields, Prompt
from batchgen.input.parameters import asked_in, override_params, parameter_names
from batchgen.input.sources import Source, open_bytes
from batchgen.input.targets import labels_column, prompt_option, target_columns, with_targets
from batchgen.input.templates import Template, prompt_columns, template_of
from batchgen.input.words import ABSENT, describe_missing, find_surrogate, find_value, list_names
from batchgen.job import InputOptions
from batchgen.options import say, shown
from batchgen.types import Rejected, Request, SamplingParams

CHECKED_ROWS = 1000  # rows that check reads before it reports a key as missing
MAX_NESTING = 200  # far below what Python can read, and write again as the text of a kept value, at any depth of calls
BLANK = " \t\r"
EXAMPLE = '{"prompt": "Once upon a time"}'

_TYPE_NAMES = {str: "a string", bool: "a boolean", dict: "an object", list: "an array", type(None): "null"}


# ---- lines to objects


def _refuse_duplicates(pairs: list[tuple[str, object]]) -> Fields:
    try:
        return unique_keys(pairs)
    except ValueError as error:
        raise BadRow(f"{error}; keep one") from error


def _is_too_deep(value: object) -> bool:
    level: list[Any] = [value]
    for _ in range(MAX_NESTING):
        items = (item for outer in level for item in (outer.values() if isinstance(outer, dict) else outer))
        level = [item for item in items if isinstance(item, dict | list)]
    return bool(level)


_TOO_DEEP = f"the JSON is nested too deeply (over {MAX_NESTING} levels); flatten it"
_DECODER = json.JSONDecoder(object_pairs_hook=_refuse_duplicates)
_PLAIN = json.JSONDecoder()


def _decode_plain(line: bytes, text: str) -> Fields | None:
    """The object of a line if it holds no other, no list and no escape, and each key once; None if that is not sure."""
    if b"\\" in line:
        return None
    try:
        value, end = _PLAIN.raw_decode(text)
    except (ValueError, RecursionError):  # decode says what is wrong
        return None
    if type(value) is not dict or end != len(text):
        return None
    n_text = 0
    for item in value.values():
        if type(item) is str:
            n_text += 1
        elif isinstance(item, dict | list):
            return None
    # quotes are around keys and texts alone; a key that appears twice has more
    return value if line.count(b'"') == 2 * (len(value) + n_text) else None


def decode(line: bytes) -> Fields:
    """The JSON object of one line; BadRow for any other bytes."""
    text = decode_line(line)
    if (found := _decode_plain(line, text)) is not None:
        return found
    try:
        start = 0 if text[0] == "{" else len(text) - len(text.lstrip(BLANK))
        value, end = _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise BadRow(f"not JSON: {error.msg} at column {error.pos + 1}; write {EXAMPLE}") from error
    except RecursionError as error:
        raise BadRow(_TOO_DEEP) from error
    except ValueError as error:
        raise BadRow("an integer has too many digits to be read; write it as a string") from error
    if end != len(text):
        raise BadRow(f"not JSON: extra data at column {end + 1}; write one object a line")
    if not isinstance(value, dict):
        raise BadRow(f"the line is {_describe(value)}, not an object; write {EXAMPLE}")
    if line.count(b"[") + line.count(b"{") > MAX_NESTING and _is_too_deep(value):
        raise BadRow(_TOO_DEEP)
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
    prompt_column, id_column, template = reading.options.prompt_column, reading.options.id_column, reading.template
    prompt, id_ = find_value(fields, prompt_column, ABSENT), find_value(fields, id_column)
    # the bytes are UTF-8, so only an escape can make a surrogate; one byte is found faster than two
    if b"\\" in line and b"\\u" in line:
        _check_surrogates(fields, {id_column: id_} if template else {prompt_column: prompt, id_column: id_})
    id_ = _read_id(id_column, id_, prompt if isinstance(prompt, str) and not template else None)
    if template:
        text = _fill(template, fields, id_)
    elif isinstance(prompt, str):
        text = prompt
    elif prompt is ABSENT:
        raise BadRow(describe_missing(prompt_column, prompt_option(reading.options), list(fields), "key"), id_)
    else:
        remedy = _mend_object(prompt_column, prompt_option(reading.options), prompt) or "make it a string"
        raise BadRow(f"{shown(prompt_column)} is {_describe(prompt)}; {remedy}", id_)
    text, params = reading.before + text, reading.params
    if reading.options.row_params:
        try:
            names = parameter_names(fields, (*(template.roots if template else (prompt_column,)), id_column))
            if names:
                params = override_params({name: fields[name] for name in names}, params, reading.found)
        except UsageError as error:
            raise BadRow(str(error), id_, text) from error
    return id_, (text,), params


def _read_id(column: str, id_: object, prompt: str | None) -> str | None:
    if isinstance(id_, float) and id_.is_integer() and abs(id_) < EXACT:
        id_ = int(id_)  # pandas writes 7.0 if a column has nulls
    if id_ is None or isinstance(id_, str):
        return id_
    if not isinstance(id_, int) or isinstance(id_, bool):
        reason = f"{shown(column)} is {_describe(id_)}; make it a string or a whole number"
        raise BadRow(reason, prompt=prompt)
    return str(id_)


def _fill(template: Template, fields: Fields, id_: str | None) -> str:
    """The prompt that the template makes of a row."""
    values = {column: find_value(fields, column, ABSENT) for column in template.columns}
    for field in template.fields:
        if values[field.column] is ABSENT:
            what = f"no key {shown(field.column)}, which its prompt needs; the keys are {list_names(list(fields))}"
            raise BadRow(f"{what}; write one, or leave the row out", id_)
    try:
        return template.fill(values)
    except UsageError as error:
        raise BadRow(str(error), id_) from error


def _mend_object(column: str, option: str, value: object) -> str:
    """The remedy for an object in place of a text or a list: the path of one within it; empty if there is none."""
    wanted = list if option == "choices_column" else str
    inner = [key for key, item in value.items() if isinstance(item, wanted)] if isinstance(value, dict) else []
    return (
        f"name a {'string' if wanted is str else 'list'} in it, such as {say(option, f'{column}.{inner[0]}')}"
        if inner
        else ""
    )


def _check_surrogates(fields: Fields, columns: Mapping[str, object]) -> None:
    """Refuse a lone surrogate, which no file can hold, in keys and in the prompt and id columns."""
    texts = [(f"the key {shown(key)}", key) for key in fields]
    texts += [(shown(column), value) for column, value in columns.items() if isinstance(value, str)]
    for what, text in texts:
        if code := find_surrogate(text):
            raise BadRow(f"{what} has a lone surrogate ({code}), which is not a character; remove it")


def _add_targets(
    request: Request, fields: Fields, columns: Mapping[str, str], labels: str | None
) -> Request | Rejected:
    """The row with what it gives to score, by the columns of each option; rejected if it gives none."""
    values = {option: find_value(fields, column, ABSENT) for option, column in columns.items()}
    for option, value in values.items():
        column = columns[option]
        if value is ABSENT and option != "answer_column":
            return request.rejected(describe_missing(column, option, list(fields), "key"))
        if remedy := _mend_object(column, option, value):
            return request.rejected(f"{shown(column)} is an object; {remedy}")
    return with_targets(request, {**values, "labels": find_value(fields, labels) if labels else None})


def _read_rows(
    file: BufferedReader, source: Source, reading: Reading, first_row: int
) -> Iterator[tuple[Request | Rejected, Fields, int]]:
    read_fields = openai.read_fields if reading.openai else _read_fields
    columns, labels = target_columns(reading.options), labels_column(reading.options)
    for row, (place, line) in enumerate(read_rows(file, source), first_row):
        item: Request | Rejected
        fields: Fields = {}
        try:
            fields = decode(line)
            id_, prompts, params = read_fields(fields, line, place, reading)
            item = Request(row, place, id_, prompts[0], params, prompts[1:])
            if columns:
                item = _add_targets(item, fields, columns, labels)
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
        if kind != MIXED and (value := find_value(fields, name)) is not None:
            kinds[name] = merge_kinds(kind, kind_of(value))


# ---- the functions of a format; see formats.py


def check(source: Source, options: InputOptions) -> Found:
    """Read the first rows: a key that all of them lack is an error of the job, a key that some lack rejects rows."""
    texts = [column for _, column in text_columns(options)]
    wanted = {*(column for _, column in needed_columns(options)), *options.keep}
    keys: dict[str, None] = {}
    found: dict[str, object] = {}  # the wanted ones, with a value
    problem, rows = None, 0
    fields: Fields = {}
    with open_bytes(source) as (file, _):
        check_first_bytes(file, source)
        lines = read_rows(file, source)
        for place, line in islice(lines, CHECKED_ROWS):
            rows += 1
            try:
                fields = decode(line)
            except BadRow as bad:
                problem = problem or f"{place}: {bad.reason}"
                continue
            if not keys and openai.is_batch_line(fields):
                return Found(list(openai.LINE_KEYS), openai=True)
            keys |= dict.fromkeys(fields)
            values = {name: find_value(fields, name, ABSENT) for name in wanted}
            found |= {name: value for name, value in values.items() if value is not ABSENT}
            if found.keys() >= wanted and not any(isinstance(found[name], dict) for name in texts if name in found):
                break
        is_only = rows == 1 and next(lines, None) is None
    if rows and not keys:
        problem = problem or f"write {EXAMPLE}"
        problem += f", or pass {say('input_format')} for CSV or text" if source.where == "-" else ""
        raise InputError(f"{source.where}: none of the first {rows} rows is a JSON object with a key; {problem}")
    if is_only and _may_be_table(fields, found, options):
        refuse_columns(fields, source, options)
    _check_found(source, rows, list(keys), found, options)
    return Found([*keys, *(found.keys() - keys.keys())], openai=False if rows else None)


def _may_be_table(fields: Fields, found: Fields, options: InputOptions) -> bool:
    """Whether an object that is alone in its file may be a whole table: no column of the prompt has a text in it."""
    values = [found.get(name) for name in prompt_columns(options)]
    if template_of(options) is None:
        return not isinstance(values[0], str)
    return None in values or (len(fields) > 1 and all(isinstance(value, dict | list) for value in values))


def _check_found(source: Source, rows: int, keys: list[str], found: Fields, options: InputOptions) -> None:
    """InputError if no row has a column that is needed, or if one of them is an object in the last one."""
    for option, column in needed_columns(options):
        if rows and column not in found:
            what = describe_missing(column, option, keys, "key")
            raise InputError(f"{source.where}: in the first {rows} rows {what}")
    for option, column in text_columns(options):
        if isinstance(value := found.get(column), dict):
            what = "a list of strings" if option == "choices_column" else "a string"
            remedy = _mend_object(column, option, value) or f"make it {what}"
            raise InputError(f"{source.where}: in the first {rows} rows {shown(column)} is an object; {remedy}")


def scan(source: Source, options: InputOptions) -> Scanned:
    rows, asks = 0, frozenset[str]()
    kinds: dict[str, Kind] = dict.fromkeys(_own_names(source, options.keep))
    with open_bytes(source) as (file, stored):
        for rows, (_, line) in enumerate(read_rows(file, source), 1):  # noqa: B007  # counts them
            asks |= asked_in(line)
            if kinds:
                _add_kinds(kinds, line)
        return Scanned(rows, stored.digest.hexdigest(), stored.bytes, asks, kinds)


def read(source: Source, reading: Reading, first_row: int) -> Iterator[Rows]:
    with open_bytes(source) as (file, _):
        rows = _read_rows(file, source, reading, first_row)
        yield from batch_rows(rows, _own_names(source, reading.kept.names), source, reading.kept)
