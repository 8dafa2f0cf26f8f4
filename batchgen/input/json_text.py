r"""JSON as people save it: one object a line, one array, or objects over several lines; cut into the text of each row.

Lines are split at b"\n" alone, and a line of only spaces, tabs and carriage returns is not a row: each other line is
exactly one row, however broken it is. An array or an object over several lines cannot be read beyond an error in it.
"""

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from functools import partial
from io import BufferedReader
from itertools import chain, islice

from batchgen.errors import InputError
from batchgen.input.formats import BadRow
from batchgen.input.sources import BUFFER_BYTES, UNPACKING_ERRORS, Source, read_error

MAX_LINE_BYTES = 32 * 2**20  # the longest prompt that fits a GPT-2 is a few hundred KB
TOO_LONG = b""  # in place of a line over MAX_LINE_BYTES; no other row is empty
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

_NUMBER = ".eE+-0123456789"  # what may follow within a number; "" is in it too
_BLANKS = re.compile(r"[ \t\r\n]*")
# Finds where a value ends. It accepts what later rejects only the row: line ends in strings, numbers of any length.
_SPLITTER = json.JSONDecoder(strict=False, parse_int=str, parse_float=str)


def read_rows(file: BufferedReader, source: Source) -> Iterator[tuple[str, bytes]]:
    """Yield the place and the text of every row; TOO_LONG for a line that is too long."""
    number, head = _first_line(file, source)
    text = _without_mark(head.strip(b" \t\r\n"))
    lines = read_lines(file, source, number, head)
    if text[:1] == b"[" and _is_complete(text):  # an array on one line, or lines of which each is an array
        first_two = list(islice(lines, 2))
        if len(first_two) == 1:
            yield from _read_items([text], source, number)
            return
        lines = chain(first_two, lines)
    elif text[:1] == b"[" or text == b"{":
        pieces = chain([_without_mark(head)], iter(partial(file.read, BUFFER_BYTES), b""))
        yield from _read_items(pieces, source, number)
        return
    yield from ((f"{source.name}:{number}", line) for number, line in lines)


# ---- lines


def _first_line(file: BufferedReader, source: Source) -> tuple[int, bytes]:
    """The number and the bytes of the first line that is not blank; of a line that is too long, its start."""
    number, line = 0, b""
    try:
        for line in iter(partial(file.readline, MAX_LINE_BYTES + 1), b""):
            number += 1
            if _without_mark(line.strip(b" \t\r\n")) or not line.endswith(b"\n"):
                break
    except UNPACKING_ERRORS as error:
        raise read_error(source, number + 1, error) from error
    return number, line


def read_lines(
    file: BufferedReader, source: Source, first: int = 1, head: bytes = b"", blanks: bytes = b" \t\r\n"
) -> Iterator[tuple[int, bytes]]:
    """Yield the number and the text of every line that is not blank; head: what was read of the line `first`."""
    number = first - 1
    read = iter(partial(file.readline, MAX_LINE_BYTES + 1), b"")
    try:
        for number, line in enumerate(chain([head] if head else [], read), first):
            text = line.rstrip(blanks)
            if text[:1] == BYTE_ORDER_MARK[:1]:
                text = _without_mark(text)
            if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
                if not _skip_line(file) or text:
                    yield number, TOO_LONG
            elif text:
                yield number, text
    except UNPACKING_ERRORS as error:
        raise read_error(source, number + 1, error) from error


def decode_line(line: bytes) -> str:
    """The text of a line; BadRow if it has none."""
    if line == TOO_LONG:
        raise BadRow(f"the line is longer than {MAX_LINE_BYTES} bytes; shorten it")
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise BadRow(f"invalid UTF-8 at byte {error.start + 1} of the line; save the file as UTF-8") from error


def _without_mark(text: bytes) -> bytes:
    """A line without byte order marks, which any line has if files were joined."""
    while text.startswith(BYTE_ORDER_MARK):
        text = text.removeprefix(BYTE_ORDER_MARK).lstrip(b" \t\r")
    return text


def _skip_line(file: BufferedReader) -> bool:
    """Skip the rest of a line without holding it; True if that rest is blank."""
    blank = True
    for piece in iter(partial(file.readline, BUFFER_BYTES), b""):
        blank = blank and not piece.strip(b" \t\r\n")
        if piece.endswith(b"\n"):
            break
    return blank


def _is_complete(text: bytes) -> bool:
    try:
        json.loads(text.decode(errors="replace"), strict=False, parse_int=str, parse_float=str)
    except RecursionError:
        return True
    except ValueError:
        return False
    return True


# ---- arrays, and objects over several lines


class _Text:
    """JSON text of which the next value and little more is in memory; bytes that are not UTF-8 are surrogates."""

    def __init__(self, pieces: Iterable[bytes], line: int) -> None:
        self.pieces = codecs.iterdecode(pieces, "utf-8", "surrogateescape")
        self.text, self.at, self.line = "", 0, line  # line: of the start of text

    def next_character(self) -> str:
        """The next character that is not blank, which stays the next; empty at the end."""
        while True:
            self.at = _BLANKS.match(self.text, self.at).end()  # type: ignore[union-attr]  # it matches nothing too
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._read_more():
                return ""

    def accept(self, character: str) -> bool:
        """Step over the next character if it is this one."""
        found = self.next_character() == character
        self.at += found
        return found

    def next_value(self) -> str:
        """Step over a value; ValueError or RecursionError if there is none."""
        while True:
            try:
                _, end = _SPLITTER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                self._check_length()
                line = self.line_at(error.pos)
                if not self._read_more():
                    raise ValueError(f"{error.msg}, line {line}") from error
            else:
                value = self.text[self.at : end]
                if self.text[end : end + 1] not in _NUMBER or not self._read_more():  # the 1 of 1.5 is a value too
                    self.at += len(value)
                    return value

    def line_at(self, position: int) -> int:
        return self.line + self.text.count("\n", 0, position)

    def _check_length(self) -> None:
        if len(self.text) - self.at > MAX_LINE_BYTES:
            raise ValueError(f"a value is longer than {MAX_LINE_BYTES} bytes or is not closed")

    def _read_more(self) -> bool:
        """Drop what was read, and double the rest, so that a long value is tried few times; False at the end."""
        self.line = self.line_at(self.at)
        self.text, self.at = self.text[self.at :], 0
        pieces, wanted = [self.text], 2 * len(self.text)
        while sum(map(len, pieces)) <= wanted and (piece := next(self.pieces, "")):
            pieces.append(piece)
        self.text = "".join(pieces)
        return len(pieces) > 1


def _read_items(pieces: Iterable[bytes], source: Source, line: int) -> Iterator[tuple[str, bytes]]:
    """Yield the items of an array, or objects one after the other; a place is `prompts.json:row 0`."""
    text = _Text(pieces, line)
    try:
        is_array, row = text.accept("["), 0
        is_open = not (is_array and text.accept("]"))
        while is_open:
            text.next_character()
            yield f"{source.name}:row {row}", text.next_value().encode("utf-8", "surrogateescape")
            row += 1
            is_open = text.accept(",") if is_array else bool(text.next_character())
            if is_array and not is_open and not text.accept("]"):
                raise ValueError("a comma or the closing bracket is missing")
        if text.next_character():
            raise ValueError("more follows the end of the array")
    except UNPACKING_ERRORS as error:
        raise read_error(source, text.line_at(text.at), error) from error
    except (ValueError, RecursionError) as error:
        where = f"{source.name}:{text.line_at(text.at)}"
        what = str(error) if isinstance(error, ValueError) else "it is nested too deeply to be read"
        raise InputError(f"{where}: not JSON: {what}; correct it, or write one object a line") from error
