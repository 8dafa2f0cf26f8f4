"""One JSON object that holds a whole table, as pandas and services write: refused, with a command that mends it."""

import shlex
from collections.abc import Iterator, Mapping

from batchgen.errors import InputError
from batchgen.input.sources import Source
from batchgen.input.templates import prompt_columns
from batchgen.job import InputOptions

_CODE = "import json, sys; t = json.load(sys.stdin); [print(json.dumps(row)) for row in {rows}]"
_UNPACK = {"": "cat", "gzip": "zcat", "zstd": "zstdcat"}


def refuse_columns(fields: Mapping[str, object], source: Source, options: InputOptions) -> None:
    """Raise InputError if the only object of a file is not a row but a table."""
    for what, rows in _find_rows(fields, next(iter(prompt_columns(options))).partition(".")[0]):
        file = "prompts.json" if source.where == "-" or "://" in source.where else shlex.quote(source.where)
        command = f"{_UNPACK[source.packing]} {file} | python -c {shlex.quote(_CODE.format(rows=rows))} > rows.jsonl"
        raise InputError(f"{source.where}: this is one JSON object, {what}; write its rows, one a line: {command}")


def _find_rows(fields: Mapping[str, object], prompt: str) -> Iterator[tuple[str, str]]:
    """What the object is, and the Python that makes rows of it, called t."""
    values = list(fields.values())
    first = next(iter(values), None)
    if isinstance(first, dict) and all(isinstance(one, dict) and list(one) == list(first) for one in values):
        if prompt in fields and (len(fields) > 1 or all(map(str.isdecimal, first))):  # to_json(), to_dict()
            yield "of columns", "(dict(zip(t, row)) for row in zip(*(column.values() for column in t.values())))"
        elif prompt in first:  # to_json(orient="index")
            yield "of rows by their index", "t.values()"
    elif isinstance(first, list) and prompt in fields:  # to_dict(orient="list")
        if all(isinstance(one, list) and len(one) == len(first) for one in values):
            yield "of columns", "(dict(zip(t, row)) for row in zip(*t.values()))"
    elif isinstance(fields.get("columns"), list) and isinstance(fields.get("data"), list):  # orient="split"
        yield "of columns and data", '(dict(zip(t["columns"], row)) for row in t["data"])'
    elif prompt not in fields:  # {"data": [{"prompt": ...}]}, orient="table"
        for key, value in fields.items():
            if isinstance(value, list) and value and all(isinstance(row, dict) and prompt in row for row in value):
                yield f"with the rows in {key!r}", f"t[{key!r}]"
