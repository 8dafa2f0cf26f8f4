"""CSV: a file's bytes become a header and records, each with the line that it begins on, in flat memory.

Fields are quoted as RFC 4180 has it: a quoted field may hold the delimiter, line ends, and quotes written twice.
A blank line is no record. A record that is broken is told by a reason in its place and costs no other one anything,
but for the lines that an open quote has swallowed.
"""

import csv
from collections.abc import Iterator
from io import BufferedReader

from batchgen.errors import InputError
from batchgen.input.sources import BUFFER_BYTES, UNPACKING_ERRORS, Source, read_error

MAX_RECORD_BYTES = 32 * 2**20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

Record = list[str] | str  # the fields, or why there are none

# how the csv module's errors begin, and what to say
_REASONS = {
    "unexpected end of data": "a quote is opened here and never closed; close it, or write a quote as two",
    "new-line character": "a carriage return within the line; end lines with a line feed, or quote the field",
    "field larger": f"the record is longer than {MAX_RECORD_BYTES} bytes, or a quote is not closed; shorten it",
}


class _Lines:
    """The text of one line after another; what csv.reader cannot be told is in `invalid`, and bounded by `size`."""

    def __init__(self, file: BufferedReader) -> None:
        self.file, self.number = file, 0
        self.begin()

    def begin(self) -> None:
        """A new record begins."""
        self.size, self.invalid = 0, 0

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

    An empty file has no names and no records. Raises InputError for a header that is none.

    b"id,prompt\\n1,Once\\n2\\n" -> ["id", "prompt"], [(2, ["1", "Once"]), (3, "1 field, and the header has 2; ...")]
    """
    records = _records(file, source)
    number, header = next(records, (1, []))
    if isinstance(header, str):
        raise InputError(f"{source.name}:{number}: {header}")
    if any("\0" in name for name in header):
        raise InputError(f"{source.where}: this is UTF-16 text or no text at all, not CSV; save it as UTF-8")
    return header, _of_length(records, len(header))


def _of_length(records: Iterator[tuple[int, Record]], length: int) -> Iterator[tuple[int, Record]]:
    for number, fields in records:
        if isinstance(fields, list) and len(fields) != length:
            many = f"{len(fields)} field{'s' if len(fields) > 1 else ''}"
            yield number, f"{many}, and the header has {length}; quote a field that holds the delimiter"
        else:
            yield number, fields


def _records(file: BufferedReader, source: Source) -> Iterator[tuple[int, Record]]:
    csv.field_size_limit(MAX_RECORD_BYTES)
    lines = _Lines(file)
    reader = csv.reader(lines, delimiter="\t" if source.format == "tsv" else ",", strict=True)
    while True:
        first = lines.number + 1
        lines.begin()
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            known = (words for start, words in _REASONS.items() if str(error).startswith(start))
            yield first, next(known, "a quote within a quoted field; write it as two, or quote the whole field")
            continue
        except UNPACKING_ERRORS as error:
            raise read_error(source, lines.number + 1, error) from error
        if lines.invalid:
            yield first, f"invalid UTF-8 in line {lines.invalid}; save the file as UTF-8"
        elif fields:
            yield first, fields
