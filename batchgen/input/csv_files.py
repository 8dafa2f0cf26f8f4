"""CSV and TSV: a header, and records with the number of their first line.

Fields are quoted as in RFC 4180: a quoted field may hold the delimiter, line ends, and quotes written twice. A blank
line is not a record. A broken record becomes a rejected row, and so do the lines that an open quote swallows; other
records are not affected.
"""

import csv
from collections.abc import Iterator, Mapping, Sequence
from io import BufferedReader

import pyarrow as pa

from batchgen.errors import InputError, UsageError
from batchgen.input.formats import Found, Reading, Rows, Scanned, batch_rows, check_first_bytes, find_columns
from batchgen.input.parameters import override_params, parse_text
from batchgen.input.sources import BUFFER_BYTES, UNPACKING_ERRORS, Source, open_bytes, read_error
from batchgen.job import InputOptions
from batchgen.types import Rejected, Request

MAX_RECORD_BYTES = 32 * 2**20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

Record = list[str] | str  # the fields, or the reason why there are none

# the start of an error of the csv module, and the reason that a row gives
_REASONS = {
    "unexpected end of data": "a quote is opened here and never closed; close it, or write a quote as two",
    "new-line character": "a carriage return within the line; end lines with a line feed, or quote the field",
    "field larger": f"the record is longer than {MAX_RECORD_BYTES} bytes, or a quote is not closed; shorten it",
}


class _Lines:
    """The lines of a file as text, for csv.reader, with what it does not know: line numbers, sizes, invalid UTF-8."""

    def __init__(self, file: BufferedReader) -> None:
        self.file, self.number = file, 0
        self.begin_record()

    def begin_record(self) -> None:
        self.size = 0  # bytes of the record so far
        self.invalid = 0  # the first line of the record that is not UTF-8

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self.file.readline(MAX_RECORD_BYTES + 1)
        if not line:
            raise StopIteration
        self.number += 1
        self.size += len(line)
        if self.number == 1:
            line = line.removeprefix(BYTE_ORDER_MARK)
        if self.size > MAX_RECORD_BYTES:
            while not line.endswith(b"\n") and (line := self.file.readline(BUFFER_BYTES)):
                pass
            raise csv.Error("field larger")
        try:
            return line.decode()
        except UnicodeDecodeError:
            self.invalid = self.invalid or self.number
            return line.decode(errors="replace")


def read_csv(file: BufferedReader, source: Source) -> tuple[list[str], Iterator[tuple[int, Record]]]:
    """The names in the first record, and the records after it with the numbers of their first lines, from 1.

    An empty file has no names and no records. Raises InputError for a broken header.

    b"id,prompt\\n1,Once\\n2\\n" -> ["id", "prompt"], [(2, ["1", "Once"]), (3, "1 field, and the header has 2; ...")]
    """
    records = _read_records(file, source)
    number, header = next(records, (1, []))
    if isinstance(header, str):
        raise InputError(f"{source.name}:{number}: {header}")
    if any("\0" in name for name in header):
        raise InputError(f"{source.where}: this is UTF-16 text or no text at all, not CSV; save it as UTF-8")
    return header, records


def _read_records(file: BufferedReader, source: Source) -> Iterator[tuple[int, Record]]:
    csv.field_size_limit(MAX_RECORD_BYTES)
    lines = _Lines(file)
    reader = csv.reader(lines, delimiter="\t" if source.format == "tsv" else ",", strict=True)
    length = 0  # of the header
    while True:
        first = lines.number + 1
        lines.begin_record()
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            known = (reason for start, reason in _REASONS.items() if str(error).startswith(start))
            yield first, next(known, "a quote within a quoted field; write it as two, or quote the whole field")
            continue
        except UNPACKING_ERRORS as error:
            raise read_error(source, lines.number + 1, error) from error
        if lines.invalid:
            yield first, f"invalid UTF-8 in line {lines.invalid}; save the file as UTF-8"
        elif fields and length not in (0, len(fields)):
            count = f"{len(fields)} field{'s' if len(fields) > 1 else ''}"
            yield first, f"{count}, and the header has {length}; quote a field that holds the delimiter"
        elif fields:
            length = len(fields)
            yield first, fields


# ---- the functions of a format; see formats.py


def check(source: Source, options: InputOptions) -> Found:
    with open_bytes(source) as (file, _):
        check_first_bytes(file, source)
        header, _records = read_csv(file, source)
    if header:
        find_columns(header, source, options)
    return Found(header)


def scan(source: Source, keep: Sequence[str]) -> Scanned:
    with open_bytes(source) as (file, stored):
        header, records = read_csv(file, source)
        rows = sum(1 for _ in records)
        columns = {name: pa.field(name, pa.string()) for name in keep if name in header}
        return Scanned(rows, stored.digest.hexdigest(), stored.bytes, "logprobs" in header, columns)


def read(source: Source, reading: Reading, first_row: int) -> Iterator[Rows]:
    with open_bytes(source) as (file, _):
        header, records = read_csv(file, source)
        rows = _read_rows(header, records, source, reading, first_row)
        yield from batch_rows(rows, [name for name in reading.kept.names if name in header], source, reading.kept)


def _read_rows(
    header: list[str], records: Iterator[tuple[int, Record]], source: Source, reading: Reading, first_row: int
) -> Iterator[tuple[Request | Rejected, Mapping[str, str], int]]:
    prompt_column, id_column = reading.options.prompt_column, reading.options.id_column
    columns = find_columns(header, source, reading.options) if header else []
    parameters = [name for name in columns if name not in (prompt_column, id_column)]
    for row, (number, record) in enumerate(records, first_row):
        place = f"{source.name}:{number}"
        if isinstance(record, str):
            yield Rejected(row, place, None, None, f"{place}: {record}"), {}, 0
            continue
        fields = dict(zip(header, record, strict=True))
        id_, prompt = fields.get(id_column) or None, fields[prompt_column]  # in CSV, an empty id is no id
        item: Request | Rejected
        try:
            own = {name: parse_text(name, fields[name]) for name in parameters}
            item = Request(row, place, id_, prompt, override_params(own, reading.params))
        except UsageError as error:
            item = Rejected(row, place, id_, prompt, f"{place}: {error}")
        yield item, fields, sum(map(len, record))
