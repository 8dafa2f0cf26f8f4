"""CSV and TSV: a header, and records with the number of their first line.

Between commas, fields are quoted as in RFC 4180: a quoted field may hold the delimiter, line ends, and quotes written
twice; spaces around it are not text. Between tabs, a quote is text, unless the names in the header are quoted. A blank
line is not a record. A broken record becomes a rejected row, and so do the lines that an open quote swallows.
"""

import csv
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from io import BufferedReader

import pyarrow as pa

from batchgen.errors import InputError, UsageError
from batchgen.input.formats import (
    Found,
    Reading,
    Rows,
    Scanned,
    batch_rows,
    check_first_bytes,
    find_columns,
    request_columns,
)
from batchgen.input.parameters import WITH_COLUMNS, find_results, is_object, mentioned, override_params, parse_text
from batchgen.input.sources import BUFFER_BYTES, UNPACKING_ERRORS, Source, open_bytes, read_error
from batchgen.input.targets import labels_column, prompt_option, prompt_word, target_columns, with_targets
from batchgen.input.templates import prompt_columns
from batchgen.job import InputOptions
from batchgen.options import say, shown
from batchgen.types import Rejected, Request

MAX_RECORD_BYTES = 32 * 2**20
BYTE_ORDER_MARK = "\ufeff"
NULL = r"\N"  # of MySQL, PostgreSQL and Hive
DELIMITERS = (",", "\t", ";", "|")  # those that are recognized in a header
_SEPARATOR = re.compile(r"sep=([^\r\n\" ])\s*")  # Excel's first line

Record = list[str] | str  # the fields, or the reason why there are none

# the start of an error of the csv module, and the reason that a row gives
_REASONS = {
    "unexpected end of data": "a quote is opened here and never closed; close it, or write a quote as two",
    "new-line character": "a carriage return within the line; end lines with a line feed, or quote the field",
    "field larger": f"the record is longer than {MAX_RECORD_BYTES} bytes, or a quote is not closed; shorten it",
}

# ---- bytes to records


@dataclass(frozen=True)
class _Dialect:
    delimiter: str
    quoted: bool  # quotes enclose fields; else they are text
    unsure: bool = False  # quotes are taken as text, and nobody said so

    def read(self, lines: Iterator[str], strict: bool = True) -> Iterator[list[str]]:
        kind = csv.QUOTE_MINIMAL if self.quoted else csv.QUOTE_NONE
        return csv.reader(lines, delimiter=self.delimiter, quoting=kind, strict=strict)  # type: ignore[arg-type]

    def tidy(self, line: str, is_open: bool) -> str:
        """The line without the spaces around quoted fields; is_open: it begins within one.

        `1, "a, ""b" ,2` -> `1,"a, ""b",2`
        """
        if not self.quoted or (' "' not in line and '\t"' not in line and '" ' not in line):
            return line
        return self._spaces.sub(r"\1\2", '"' + line)[1:] if is_open else self._spaces.sub(r"\1\2", line)

    @cached_property
    def _spaces(self) -> re.Pattern[str]:
        mark = re.escape(self.delimiter)
        blank = " " if self.delimiter == "\t" else r"[ \t]"
        quoted = r'"(?:[^"]++|"")*+"?'  # to its end, or to that of the line
        return re.compile(rf"(\A|{mark}){blank}*+({quoted})(?:{blank}++(?={mark}|[\r\n]|\Z))?")


def _find_dialect(header: str, source: Source, options: InputOptions) -> _Dialect:
    """The dialect of a file by its first line: the delimiter that makes the prompt's column, else any that is there."""
    usual = "\t" if source.format == "tsv" else ","
    tried = {"auto": (usual, *DELIMITERS), "tab": ("\t",)}.get(options.delimiter, (options.delimiter,))
    names = {mark: _names(header, _Dialect(mark, options.quotes != "no")) for mark in tried}
    wanted = prompt_columns(options).keys()
    with_prompt = [mark for mark, found in names.items() if wanted <= {*found}]
    if not with_prompt and options.delimiter != "auto":
        other = _find_dialect(header, source, replace(options, delimiter="auto"))
        if wanted <= {*_names(header, other)}:
            what = f"the header has {shown(other.delimiter)} between its names"
            raise InputError(f"{source.where}: {what}; leave {say('delimiter', options.delimiter)} out")
    delimiter = (with_prompt or [mark for mark, found in names.items() if len(found) > 1] or tried)[0]
    unsure = options.quotes == "auto" and delimiter == "\t" and '"' not in header
    return _Dialect(delimiter, options.quotes != "no" and not unsure, unsure)


def _names(header: str, dialect: _Dialect) -> list[str]:
    try:
        return [name.strip(" ") for name in next(dialect.read(iter([dialect.tidy(header, False)]), strict=False), [])]
    except csv.Error:
        return []  # reading the record gives its reason


class _Lines:
    """The lines of a file as text, for csv.reader, with what it does not know: line numbers, sizes, invalid text."""

    def __init__(self, file: BufferedReader) -> None:
        self.file, self.number, self.dialect = file, 0, _Dialect("", quoted=False)
        self.held = ""  # the header, looked at and not yet read
        self.begin_record()

    def begin_record(self) -> None:
        self.size = 0  # bytes of the record so far
        self.problem = ""  # the first line of the record that is not text
        self.marked = False  # it begins with a byte order mark

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        is_open = self.size > 0 and not self.held
        line, self.held = self.held or self._read_line(), ""
        return self.dialect.tidy(line, is_open)

    def look(self) -> str:
        """The next line, which stays the next."""
        self.held = self._read_line()
        return self.held

    def _read_line(self) -> str:
        line = self.file.readline(MAX_RECORD_BYTES + 1)
        if not line:
            raise StopIteration
        self.number += 1
        is_first, self.size = not self.size, self.size + len(line)
        if self.size > MAX_RECORD_BYTES:
            while not line.endswith(b"\n") and (line := self.file.readline(BUFFER_BYTES)):
                pass
            raise csv.Error("field larger")
        try:
            text = line.decode()
        except UnicodeDecodeError:
            self.problem = self.problem or f"invalid UTF-8 in line {self.number}; save the file as UTF-8"
            text = line.decode(errors="replace")
        if "\0" in text:
            what = f"a NUL byte in line {self.number}: this is UTF-16 text, or damaged"
            self.problem = self.problem or f"{what}; save the file as UTF-8"
        if is_first and text.startswith(BYTE_ORDER_MARK):
            self.marked, text = True, text.lstrip(BYTE_ORDER_MARK)
        blank = " \r\n" if self.dialect.delimiter == "\t" else " \t\r\n"
        return "\n" if is_first and not text.strip(blank) else text


def read_csv(
    file: BufferedReader, source: Source, options: InputOptions
) -> tuple[list[str], Iterator[tuple[int, Record]]]:
    """The names in the first record, and the records after it with the numbers of their first lines, from 1.

    An empty file has no names and no records. Raises InputError for a broken header.

    b"id,prompt\\n1,Once\\n2\\n" -> ["id", "prompt"], [(2, ["1", "Once"]), (3, "1 field, and the header has 2; ...")]
    """
    lines = _Lines(file)
    records = _read_records(lines, source, options)
    number, header = next(records, (1, []))
    if isinstance(header, str):
        raise InputError(f"{source.name}:{number}: {header}")
    return header, _reject_doubtful(records) if lines.dialect.unsure else records


def _read_records(lines: _Lines, source: Source, options: InputOptions) -> Iterator[tuple[int, Record]]:
    csv.field_size_limit(MAX_RECORD_BYTES)
    header: list[str] = []
    reader: Iterator[list[str]] | None = None
    while True:
        first = lines.number + 1
        lines.begin_record()
        try:
            if reader is None and (line := lines.look()) != "\n":
                if said := _SEPARATOR.fullmatch(line):
                    options = replace(options, delimiter=said[1])
                    continue
                lines.dialect = _find_dialect(line, source, options)
                reader = lines.dialect.read(lines)
            fields = next(reader) if reader else []
        except StopIteration:
            return
        except csv.Error as error:
            known = (reason for start, reason in _REASONS.items() if str(error).startswith(start))
            yield first, next(known, "a quote within a quoted field; write it as two, or quote the whole field")
            continue
        except UNPACKING_ERRORS as error:
            raise read_error(source, lines.number + 1, error) from error
        if lines.problem:
            yield first, lines.problem
        elif fields and not header:
            header = [name.strip(" ") for name in fields]
            yield first, header
        elif fields:
            yield first, _check_record(fields, header, lines) or fields


def _check_record(fields: list[str], header: list[str], lines: _Lines) -> str | None:
    """The reason why fields are not a record below this header."""
    if len(fields) != len(header):
        count = f"{len(fields)} field{'s' if len(fields) > 1 else ''}"
        remedy = "quote a field that holds the delimiter"
        more = "" if lines.dialect.quoted else f", and pass {say('quotes', 'yes')}"
        return f"{count}, and the header has {len(header)}; {remedy}{more}"
    again = fields[0].strip(" ") in header and sorted(name.strip(" ") for name in fields) == sorted(header)
    if again and (lines.marked or len(header) > 1):  # a column of words may hold its own name
        return "the header once more, as if files were joined here; remove the line"
    return None


# ---- quotes that are text

_WRITTEN_TWICE = re.compile(r'"(?:[^"]*"")+[^"]*"|""')


def _reject_doubtful(records: Iterator[tuple[int, Record]]) -> Iterator[tuple[int, Record]]:
    """Reject what only a program writes that encloses fields in quotes: it means another text, or parts of one.

    These are quotes written twice in a field in quotes, and a single quote at the edge of a field in a line whose
    neighbour has more or fewer fields than the header: together they are one record.
    """
    remedy = f"pass {say('quotes', 'yes')} if quotes enclose fields, or {say('quotes', 'no')} if they are text"
    before: Record = []
    held = next(records, None)
    while held:
        number, record = held
        held = next(records, None)
        is_beside = isinstance(before, str) or (held is not None and isinstance(held[1], str))
        before = record
        if isinstance(record, list) and any('"' in field for field in record):
            if any(map(_WRITTEN_TWICE.fullmatch, record)):
                record = f"a field in quotes, with quotes written twice; {remedy}"
            elif is_beside and any(map(_is_cut, record)):
                record = f"a quote that is opened or closed beside a broken line; {remedy}"
        yield number, record


def _is_cut(field: str) -> bool:
    """Whether the field may be the start or the end of one in quotes, which goes on in another line."""
    return '"' in (field[:1], field[-1:]) and field.count('"') % 2 == 1


# ---- the functions of a format; see formats.py


def check(source: Source, options: InputOptions) -> Found:
    with open_bytes(source) as (file, _):
        check_first_bytes(file, source)
        header, _records = read_csv(file, source, options)
    words = re.findall(r"\w+", header[0]) if len(header) == 1 else []
    if len(words) > 1 and {*words} >= prompt_columns(options).keys() != {*header}:
        what = f"the header is a single name, {shown(header[0])}; separate its columns by commas, name the character"
        remedy = f"between them with {say('delimiter')}"
        remedy += f", or pass {say(prompt_option(options))} if it is one" if options.template is None else ""
        raise InputError(f"{source.where}: {what} {remedy}")
    if header:
        find_columns(header, source, options)
    return Found(header)


def scan(source: Source, options: InputOptions) -> Scanned:
    with open_bytes(source) as (file, stored):
        header, records = read_csv(file, source, options)
        results = find_results(header)
        objects = [index for index, name in enumerate(header) if is_object(name) and name not in results]
        asks, rows = {name for name in WITH_COLUMNS if name in header and name not in results}, 0
        for rows, (_, record) in enumerate(records, 1):  # noqa: B007  # counts them
            for index in objects if isinstance(record, list) else ():
                asks |= mentioned(record[index].encode())
        columns = {name: pa.field(name, pa.string()) for name in options.keep if name in header}
        return Scanned(rows, stored.digest.hexdigest(), stored.bytes, frozenset(asks), columns)


def read(source: Source, reading: Reading, first_row: int) -> Iterator[Rows]:
    with open_bytes(source) as (file, _):
        header, records = read_csv(file, source, reading.options)
        rows = _read_rows(header, records, source, reading, first_row)
        yield from batch_rows(rows, [name for name in reading.kept.names if name in header], source, reading.kept)


def _make_prompt(fields: Mapping[str, str], reading: Reading) -> str:
    """The prompt of a row; UsageError with the reason if a part of it is missing."""
    for name, option in prompt_columns(reading.options).items():
        if fields[name] == NULL:
            what = shown(name) if option == "template" else prompt_word(reading.options)
            raise UsageError(f"{what} is {NULL}, as databases write a missing value; leave the row out")
    made = reading.template.fill(fields) if reading.template else fields[reading.options.prompt_column]
    return reading.before + made


def _read_rows(
    header: list[str], records: Iterator[tuple[int, Record]], source: Source, reading: Reading, first_row: int
) -> Iterator[tuple[Request | Rejected, Mapping[str, str], int]]:
    id_column = reading.options.id_column
    columns = find_columns(header, source, reading.options) if header else []
    parameters = [name for name in columns if name not in request_columns(reading.options)]
    targets, labels = target_columns(reading.options), labels_column(reading.options)
    for row, (number, record) in enumerate(records, first_row):
        place = f"{source.name}:{number}"
        if isinstance(record, str):
            yield Rejected(row, place, None, None, f"{place}: {record}"), {}, 0
            continue
        fields, size = dict(zip(header, record, strict=True)), sum(map(len, record))
        id_, prompt = fields.get(id_column), None
        id_ = None if id_ in ("", NULL) else id_  # in CSV, an empty id is no id
        item: Request | Rejected
        try:
            prompt = _make_prompt(fields, reading)
            own = {name: parse_text(name, fields[name]) for name in parameters}
            item = Request(row, place, id_, prompt, override_params(own, reading.params, reading.found))
            if targets:
                values = {option: fields[column] for option, column in targets.items()}
                values["labels"] = fields.get(labels or "", NULL)
                item = with_targets(item, {name: None if value == NULL else value for name, value in values.items()})
        except UsageError as error:
            item = Rejected(row, place, id_, prompt, f"{place}: {error}")
        yield item, fields, size
