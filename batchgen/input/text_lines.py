"""Plain text: a prompt a line, with its spaces. A line of only blanks is not a row."""

import re
from collections.abc import Iterator
from io import BufferedReader

from batchgen.errors import InputError
from batchgen.input.csv_files import DELIMITERS
from batchgen.input.formats import BadRow, Found, Reading, Rows, Scanned, batch_rows, check_first_bytes, find_columns
from batchgen.input.json_text import TOO_LONG, decode_line, read_lines
from batchgen.input.sources import Source, open_bytes
from batchgen.input.targets import prompt_option, target_columns
from batchgen.job import InputOptions
from batchgen.options import say, shown
from batchgen.types import Rejected, Request

_JSON = re.compile(r'\s*(?:\{\s*(?:"|\Z)|\[\s*(?:[\[{]|\Z))')  # how an object or an array of them begins


def _refuse_table(line: str, column: str, source: Source) -> None:
    """Raise InputError if the first line is no prompt but the start of JSON, or the header of CSV."""
    formats = ["jsonl"] if _JSON.match(line) else []
    for mark in DELIMITERS:
        if column in [name.strip(' "') for name in line.split(mark)]:
            formats.append("tsv" if mark == "\t" else "csv")
    if formats:
        what = f"its first line, {shown(line)}, is that of {'JSON' if formats[0] == 'jsonl' else 'a table'}"
        remedy = f"pass {say('input_format', formats[0])}, or {say('input_format', 'txt')} if each line is a prompt"
        raise InputError(f"{source.where}: {what}; {remedy}")


def _read_prompts(file: BufferedReader, source: Source) -> Iterator[tuple[int, bytes]]:
    lines = read_lines(file, source, blanks=b"\r\n")
    return ((number, line) for number, line in lines if line == TOO_LONG or line.strip(b" \t\r"))


# ---- the functions of a format; see formats.py


def check(source: Source, options: InputOptions) -> Found:
    name = "text" if prompt_option(options) == "text_column" else "prompt"
    for option in target_columns(options):
        what = f"a line of text has nothing for {say(option)}"
        raise InputError(f"{source.where}: {what}; write JSON lines, CSV or Parquet, or score each line without it")
    find_columns([name], source, options)
    with open_bytes(source) as (file, _):
        check_first_bytes(file, source)
        _, first = next(_read_prompts(file, source), (0, b""))
        if options.format == "auto":
            _refuse_table(first[:1000].decode(errors="replace"), name, source)
    return Found([name])


def scan(source: Source, _options: InputOptions) -> Scanned:
    with open_bytes(source) as (file, stored):
        rows = sum(1 for _ in _read_prompts(file, source))
        return Scanned(rows, stored.digest.hexdigest(), stored.bytes, asks=frozenset(), columns={})


def read(source: Source, reading: Reading, first_row: int) -> Iterator[Rows]:
    with open_bytes(source) as (file, _):
        yield from batch_rows(_read_rows(file, source, reading, first_row), [], source, reading.kept)


def _read_rows(
    file: BufferedReader, source: Source, reading: Reading, first_row: int
) -> Iterator[tuple[Request | Rejected, dict[str, object], int]]:
    for row, (number, line) in enumerate(_read_prompts(file, source), first_row):
        place = f"{source.name}:{number}"
        try:
            text = decode_line(line)
            if reading.template:
                text = reading.template.fill(dict.fromkeys(reading.template.columns, text))
            yield Request(row, place, None, reading.before + text, reading.params), {}, len(line)
        except BadRow as bad:
            yield bad.reject(row, place), {}, len(line)
