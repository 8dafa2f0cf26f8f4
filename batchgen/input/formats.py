"""What the input formats share: the three functions of each, the records that they return, and a few checks."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BufferedReader
from typing import Protocol

import pyarrow as pa

from batchgen.errors import InputError, UsageError
from batchgen.input.kept import Column, kept_batch, take_rows, text_array, without_others
from batchgen.input.parameters import parameter_names, parse_text
from batchgen.input.sources import UNPACKING_ERRORS, Source, needs_long_window, read_error
from batchgen.input.targets import labels_column, prompt_option, target_columns
from batchgen.input.templates import Template, prompt_columns, template_of
from batchgen.input.words import describe_missing, find_value
from batchgen.job import DEFAULT_ID_COLUMN, InputOptions
from batchgen.limits import reason_of
from batchgen.options import say, shown
from batchgen.types import Rejected, Request, RowParameters, SamplingParams, TokenizedRequest

BATCH_ROWS = 1_024  # rows of a text format that are in memory at a time, or fewer if they are large:
BATCH_BYTES = 16 * 2**20

# the first bytes of files that users often pass by mistake: what they are, and the remedy
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


@dataclass(frozen=True, slots=True)
class Found:
    """What the check of a file finds: the names of its columns, and whether it is one of OpenAI's batch files."""

    names: list[str]  # in JSON lines, the keys of the first rows
    openai: bool | None = False  # None: it has no row


@dataclass(frozen=True, slots=True)
class Scanned:
    """What the scan of a file finds, of the whole file."""

    rows: int
    sha256: str  # of the stored bytes, in hex
    bytes: int
    asks: frozenset[str]  # of parameters.ASKING, those that a row may have
    columns: Mapping[str, Column]  # the kept columns that the file itself has


@dataclass(frozen=True, slots=True)
class Reading:
    """How a pass makes requests of rows, and the columns that it keeps."""

    options: InputOptions
    params: SamplingParams  # of a row that gives none of its own
    kept: pa.Schema
    openai: bool
    as_json: bool = False  # kept values are written as JSON lines
    found: RowParameters = field(default_factory=RowParameters)
    template: Template | None = None  # what prompts are made of; None: they are a column
    before: str = ""  # stands before every prompt
    custom_ids: dict[str, str] = field(default_factory=dict)  # of OpenAI's batch files so far, each with its place


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of an input, and what the output carries of each."""

    items: Sequence[Request | TokenizedRequest | Rejected]  # tokenized: those that are checked already
    kept: pa.Table | None  # a row for each item; None: nothing is kept
    sizes: Sequence[int]  # bytes of each row in the input, unpacked; they depend on nothing but the row
    older: Sequence[int] = ()  # of each, the row of an older output to copy, -1 for none; empty: none of any

    def take(self, indices: Sequence[int]) -> "Rows":
        """The rows at these indices, which hold nothing of the others."""
        kept = None if self.kept is None else without_others(take_rows(self.kept, indices))
        older = [self.older[index] for index in indices] if self.older else ()
        return Rows([self.items[index] for index in indices], kept, [self.sizes[index] for index in indices], older)


class Format(Protocol):
    """The functions of a format's module. Each opens the file once; InputError if it cannot be read as this format."""

    def check(self, source: Source, options: InputOptions) -> Found:
        """Read the start of the file and refuse what cannot be an input; a single bad row is not refused."""

    def scan(self, source: Source, options: InputOptions) -> Scanned:
        """Read the whole file: count its rows, hash its bytes, find the types of kept columns."""

    def read(self, source: Source, reading: Reading, first_row: int) -> Iterator[Rows]:
        """Yield every row in order, numbered from first_row, in batches of bounded size."""


class BadRow(Exception):
    """The reason why a row is not a request, and the parts of it that could be read."""

    def __init__(self, reason: str, id_: str | None = None, prompt: str | None = None) -> None:
        super().__init__(reason, id_, prompt)
        self.reason, self.id, self.prompt = reason, id_, prompt

    def reject(self, row: int, place: str) -> Rejected:
        """The row as it appears in the output."""
        return Rejected(row, place, self.id, self.prompt, f"{place}: {self.reason}")


# ---- checks


def check_first_bytes(file: BufferedReader, source: Source) -> None:
    """Raise InputError if a file at its start is damaged, or of a format that is often passed by mistake."""
    try:
        start = file.peek(8)
    except UNPACKING_ERRORS as error:
        if needs_long_window(error):
            raise read_error(source, 1, error) from error
        what = f"not a {source.packing} file, or a damaged one" if source.packing else "cannot be read"
        raise InputError(f"{source.where}: {what} ({reason_of(error)}); fetch or pack it again") from error
    for magic, what, remedy in _OTHER_FORMATS:
        if start.startswith(magic):
            wanted = "JSON lines" if source.format == "jsonl" else source.format.upper()
            raise InputError(f"{source.where}: this is {what}, not {wanted}; {remedy}")


def needed_columns(options: InputOptions) -> list[tuple[str, str]]:
    """The columns that an input must have, each after the option that names it; the default id column may be absent."""
    columns = [(option, column) for column, option in prompt_columns(options).items()]
    columns += target_columns(options).items()
    if options.id_column != DEFAULT_ID_COLUMN:
        columns.append(("id_column", options.id_column))
    return columns


def text_columns(options: InputOptions) -> list[tuple[str, str]]:
    """Those of the needed columns that are texts, or choices: a template takes any value."""
    columns = [] if template_of(options) else [(prompt_option(options), options.prompt_column)]
    return [*columns, *target_columns(options).items()]


def request_columns(options: InputOptions) -> tuple[str, ...]:
    """The columns that make a request; some may be absent. The others are parameters, or the user's own."""
    labels = labels_column(options)
    columns = (*prompt_columns(options), options.id_column, *target_columns(options).values())
    return (*dict.fromkeys(columns), *((labels,) if labels else ()))


def not_parameters(options: InputOptions) -> tuple[str, ...]:
    """The columns that are no parameters, whatever their names."""
    template = template_of(options)
    return (*request_columns(options), *(template.roots if template else ()))


def find_columns(names: Sequence[str], source: Source, options: InputOptions) -> list[str]:
    """The columns to read of a file with a header: prompt, id and parameters."""
    for option, column in needed_columns(options):
        if column not in names:
            raise InputError(f"{source.where}: {describe_missing(column, option, names, 'column')}")
    request = request_columns(options)
    columns = [name for name in request if name in names]
    if options.row_params:
        try:
            columns += parameter_names(dict.fromkeys(names), not_parameters(options))
        except UsageError as error:
            raise InputError(f"{source.where}: column {error}, or pass {say('row_params', False)}") from error
    for name in (*columns, *options.keep):
        if (times := names.count(name)) > 1:
            raise InputError(f"{source.where}: {times} columns are called {shown(name)}; rename all but one")
    return columns


def folder_parameters(source: Source, options: InputOptions) -> dict[str, object]:
    """The parameters in the names of a file's folders: temperature=0.5/a.parquet -> {"temperature": 0.5}"""
    values = {name: value for name, value in source.partition if value is not None and options.row_params}
    try:
        names = parameter_names(values, not_parameters(options))
        return {name: parse_text(name, values[name]) for name in names}
    except UsageError as error:
        raise InputError(f"{source.where}: folder {error}, or pass {say('row_params', False)}") from error


# ---- batches


def batch_rows(
    rows: Iterable[tuple[Request | Rejected, Mapping[str, object], int]],
    names: Sequence[str],
    source: Source,
    schema: pa.Schema,
) -> Iterator[Rows]:
    """Yield rows, which come with fields and bytes, in batches, those before an InputError too; names: kept fields."""
    items: list[Request | Rejected] = []
    values: dict[str, list[object]] = {name: [] for name in names}
    sizes: list[int] = []
    size = 0
    try:
        for item, fields, length in rows:
            items.append(item)
            sizes.append(length)
            for name, column in values.items():
                column.append(find_value(fields, name))
            size += length
            if len(items) == BATCH_ROWS or size >= BATCH_BYTES:
                yield Rows(items, _make_kept(values, len(items), source, schema), sizes)
                items, values, sizes, size = [], {name: [] for name in names}, [], 0
    except InputError:
        yield Rows(items, _make_kept(values, len(items), source, schema), sizes)
        raise
    yield Rows(items, _make_kept(values, len(items), source, schema), sizes)


def _make_kept(values: dict[str, list[object]], length: int, source: Source, schema: pa.Schema) -> pa.Table | None:
    arrays = {name: text_array(column, schema.field(name), source) for name, column in values.items()}
    return kept_batch(source, schema, arrays, length) if schema.names else None
