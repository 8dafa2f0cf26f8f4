"""The rows of an output as they are at a moment: of a run's committed parts, or of what it has published.

Nothing here takes a lock or writes: parts may appear, and vanish when the run publishes, while they are read.
"""

import hashlib
import io
import json
import os
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchgen.errors import InputError, OutputError
from batchgen.files import PART, SUCCESS, read_object
from batchgen.files import JsonObject as Row
from batchgen.input.grouping import TOGETHER
from batchgen.input.kept import json_values
from batchgen.input.sources import find_sources, open_parquet, open_raw
from batchgen.limits import reason_of
from batchgen.output.beside import find_beside, read_note
from batchgen.output.ledger import parse_plan, work_directory
from batchgen.output.parts import GROUP_BYTES, MAX_ROW, MERGED_BYTES, RECEIPT_KEY, group_batches, merge_rows, open_part
from batchgen.output.place import SUFFIXES, is_json_lines
from batchgen.output.reading import open_output_file, output_files, read_plan
from batchgen.output.store import Address, Store, is_address, open_store, parse_address
from batchgen.output.upload import CHECK_RETRIES
from batchgen.plan import Plan

Damaged: TypeAlias = Callable[[Exception], None]  # called with what cannot be shown
Read: TypeAlias = Callable[[pq.ParquetFile, list[str] | None], Iterator[pa.RecordBatch]]  # some columns of a file

KEYS = ("row", "sample", "status")  # always read: they say which row it is
LEFT_OUT = ("rejected", "dropped")  # statuses that --no-rejects leaves out
MOST_ROWS = 2**32  # of an input, if its plan is not known
BUFFER_BYTES = 2**16


class MovedError(Exception):
    """What was found is no longer there: the run has published its output, or another one began. Look again."""


class DamagedError(Exception):
    """A part cannot be shown; the text says which, and why."""


# ---- what holds the rows


@dataclass(frozen=True, slots=True)
class Tables:
    """Parquet files: a run's committed parts, which interleave, or the files of a finished output, in order."""

    plan: Plan | None
    finished: bool
    names: Sequence[str]
    open: Callable[[str], AbstractContextManager[pq.ParquetFile]]
    statuses: Counter[str] = field(default_factory=Counter)  # of a finished output that says so

    def read_all(self, columns: Sequence[str], damaged: Damaged) -> Iterator[list[Row]]:
        """All rows in the order of the input, without those of files that are damaged."""
        size = GROUP_BYTES if self.finished else MERGED_BYTES  # those of a window are open at once
        streams = (self._read(name, columns, damaged, partial(group_batches, batch_bytes=size)) for name in self.names)
        for batches in streams if self.finished else [merge_rows(streams)]:
            yield from map(self._rows, batches)

    def read(self, name: str, columns: Sequence[str], damaged: Damaged) -> Iterator[list[Row]]:
        """The rows of one file, some at a time."""
        return map(self._rows, self._read(name, columns, damaged, group_batches))

    def newest(self, n: int, columns: Sequence[str], damaged: Damaged) -> list[Row]:
        """The last n rows of a finished output, or n rows of the parts that a run committed last; in order."""
        found: list[Row] = []
        for name in reversed(self.names if self.finished else sorted(self.names, key=_time_of)):
            for batch in self._read(name, columns, damaged, _backwards):
                found += self._rows(batch.slice(max(len(batch) - n + len(found), 0)))
                if len(found) >= n:
                    return sorted(found, key=_place)
        return sorted(found, key=_place)

    def find_row(self, number: int, columns: Sequence[str], damaged: Damaged) -> list[Row]:
        """All samples of an input row; none if it is not there."""
        read = partial(_holding, number=number)
        batches = (batch for name in self._near(number) for batch in self._read(name, columns, damaged, read))
        return [row for batch in batches for row in self._rows(batch)]

    def _near(self, number: int) -> Sequence[str]:
        """The files that may hold a row: their first rows ascend, and only those of a window interleave."""
        try:
            after = bisect_right(self.names, number, key=self._first_row)
        except DamagedError:
            return self.names
        return self.names[max(after - TOGETHER, 0) : after]

    def _first_row(self, name: str) -> int:
        with self.open(name) as file:
            batches = file.iter_batches(1, columns=["row"], use_threads=False)
            return next((batch["row"][0].as_py() for batch in batches), MAX_ROW)

    def _read(self, name: str, columns: Sequence[str], damaged: Damaged, read: Read) -> Iterator[pa.RecordBatch]:
        try:
            with self.open(name) as file:
                yield from read(file, _wanted(file, columns))
        except DamagedError as error:
            damaged(error)

    def _rows(self, batch: pa.RecordBatch) -> list[Row]:
        """Values as the .jsonl output has them; a run's parts hold rows that its output may leave out."""
        columns = map(json_values, batch.columns)
        rows = [dict(zip(batch.schema.names, values, strict=True)) for values in zip(*columns, strict=True)]
        if self.finished or self.plan is None or self.plan.rejects:
            return rows
        return [row for row in rows if row["status"] not in LEFT_OUT]


def _wanted(file: pq.ParquetFile, columns: Sequence[str]) -> list[str] | None:
    """The columns to read, in the file's order; None: all."""
    names = file.schema_arrow.names
    _check_known(columns, names)
    return [name for name in names if name in {*columns, *KEYS}] if columns else None


def _check_known(columns: Sequence[str], names: Iterable[str]) -> None:
    if unknown := [name for name in columns if name not in names]:
        raise InputError(f"no column {unknown[0]!r} is in the output; it has {', '.join(names)}")


def _backwards(file: pq.ParquetFile, columns: list[str] | None) -> Iterator[pa.RecordBatch]:
    for group in reversed(range(file.num_row_groups)):
        yield from reversed(file.read_row_group(group, columns, use_threads=False).to_batches())


def _holding(file: pq.ParquetFile, columns: list[str] | None, number: int) -> Iterator[pa.RecordBatch]:
    """An input row's samples; row groups that do not hold it, by their statistics, are not read."""
    for group in range(file.num_row_groups):
        known = file.metadata.row_group(group).column(0).statistics
        if known is None or not known.has_min_max or known.min <= number <= known.max:
            table = file.read_row_group(group, columns, use_threads=False)
            yield from table.filter(pc.equal(table["row"], number)).to_batches()


def _time_of(name: str) -> int:
    try:
        return os.stat(name).st_mtime_ns
    except OSError:  # in a store, or just gone
        return 0


def _place(row: Row) -> tuple[int, int]:
    return row["row"], row["sample"]


@dataclass(frozen=True, slots=True)
class Lines:
    """JSON lines of a finished output."""

    plan: Plan | None
    where: str
    open: Callable[[], AbstractContextManager[BinaryIO]]
    statuses: Counter[str] = field(default_factory=Counter)
    finished: bool = True

    def read_all(self, columns: Sequence[str], damaged: Damaged) -> Iterator[list[Row]]:
        with self.open() as file:
            yield from self._parse(enumerate(file, start=1), columns, damaged)

    def newest(self, n: int, columns: Sequence[str], damaged: Damaged) -> list[Row]:
        with self.open() as file:
            last = deque(enumerate(file, start=1), n)
        return [row for rows in self._parse(last, columns, damaged) for row in rows]

    def find_row(self, number: int, columns: Sequence[str], damaged: Damaged) -> list[Row]:
        return [row for rows in self.read_all(columns, damaged) for row in rows if row.get("row") == number]

    def _parse(
        self, lines: Iterable[tuple[int, bytes]], columns: Sequence[str], damaged: Damaged
    ) -> Iterator[list[Row]]:
        for number, line in lines:
            try:
                row = json.loads(line)
                if not isinstance(row, dict) or ("row" in row and not self._is_row(row)):
                    raise ValueError("it is no row of this output")
            except (ValueError, RecursionError) as error:
                damaged(DamagedError(f"{self.where}: line {number:,} is damaged ({error})"))
                continue
            _check_known(columns, row)
            yield [{name: row[name] for name in row if name in {*columns, *KEYS}} if columns else row]

    def _is_row(self, row: Row) -> bool:
        most = self.plan.rows if self.plan else MOST_ROWS
        return type(row["row"]) is int and type(row.get("sample")) is int and 0 <= row["row"] < most


Source: TypeAlias = Tables | Lines


# ---- finding it


@dataclass(frozen=True, slots=True)
class Target:
    """An output by the name that a user gives: a path, or an address with the folder where its run works."""

    where: str
    path: Path  # the work directory and the status file are beside it
    address: Address | None = None
    text: str = ""  # an address with its keys

    @classmethod
    def of(cls, text: str, work_dir: Path | None = None) -> "Target":
        if not is_address(text):
            path = Path(text)
            if not path.name:
                raise InputError(f"{text!r} is not a file name; name an output, such as completions.parquet")
            return cls(str(path), path)
        address = parse_address(text)
        if address.name and Path(address.name).suffix.lower() not in SUFFIXES:
            address = parse_address(text, dataset=True)
        return cls(address.where, (work_dir or Path()) / address.last, address, text)


def find(target: Target) -> Source | None:
    """Where the rows of an output are at this moment; None if neither an output nor a run's work is there."""
    try:
        source = _find_parts(target)
        if source is not None and (source.plan is None or not source.plan.retry):
            return source
        return (_find_stored(target) if target.address else _find_local(target.path)) or source
    except OSError as error:
        name = getattr(error, "filename", None) or target.path
        raise InputError(f"{name}: cannot be read: {reason_of(error)}; check the name and its permissions") from error


def _find_parts(target: Target) -> Tables | None:
    """The committed parts in the work directory, if a run is not over there."""
    directory = work_directory(target.path)
    try:
        data = (directory / "plan.json").read_bytes()
    except FileNotFoundError:
        is_beginning = (directory / "lock").exists() and not (directory / "published.json").exists()
        is_other = target.path.exists() or target.address
        return Tables(None, False, (), _open_local) if is_beginning and not is_other else None
    try:
        plan = parse_plan(data)
    except ValueError as error:
        what = f"not a plan of this version ({error}): batchgen {read_object(data).get('batchgen')} began the run"
        raise InputError(f"{directory / 'plan.json'}: {what}; look with that version") from error
    try:
        if target.address and (directory / "destination").read_text("utf-8") != target.where:
            return None
        names = [
            one.path for one in os.scandir(directory / "parts") if PART.fullmatch(one.name) and not one.is_symlink()
        ]
    except FileNotFoundError:  # the parts have become the dataset, or are being cleared away
        return None
    return Tables(plan, False, sorted(names), partial(_open_local, digest=plan.digest))


def _find_local(path: Path) -> Source | None:
    if not path.exists():
        return None
    if is_json_lines(path) and not path.is_dir():
        stored = find_beside(path)
        return Lines(stored.plan, str(path), lambda: open(path, "rb"), stored.statuses)
    return Tables(read_plan(path), True, [str(file) for file in output_files(path)], _open_local)


@contextmanager
def _open_local(name: str, digest: str = "") -> Iterator[pq.ParquetFile]:
    """Open a file of a finished output, or a part of the run of this plan; MovedError if it is gone by now."""
    try:
        if not digest:
            with open_output_file(Path(name)) as file:
                yield file
            return
        with open_part(Path(name)) as (file, _):
            if read_object((file.schema_arrow.metadata or {}).get(RECEIPT_KEY.encode())).get("plan") != digest:
                raise OutputError(f"{name}: a part of another run; the same command makes it again")
            yield file
    except (InputError, OutputError) as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise MovedError(name) from error
        if isinstance(error, InputError) and error.__cause__ is None:  # it is not about the file
            raise
        raise DamagedError(str(error)) from error


# ---- in a store


def _find_stored(target: Target) -> Source | None:
    assert target.address
    store = open_store(target.address, retries=CHECK_RETRIES)
    if not target.address.name:
        return _find_dataset(store)
    note = store.find_note(store.name)
    if note is None:
        return None
    stored = read_note(note, store.where) if note else None  # a plan may be too long for a note
    plan, statuses = (stored.plan, stored.statuses) if stored else (None, Counter[str]())
    if store.name.lower().endswith(".jsonl"):
        return Lines(plan, store.where, partial(_open_stored_lines, target.text), statuses)
    return Tables(plan, True, [target.text], _open_object, statuses)


@contextmanager
def _open_stored_lines(address: str) -> Iterator[BinaryIO]:
    [source] = find_sources([address])
    with open_raw(source) as raw, io.BufferedReader(raw, BUFFER_BYTES) as file:
        yield file


@contextmanager
def _open_object(address: str) -> Iterator[pq.ParquetFile]:
    [source] = find_sources([address])
    with open_parquet(source) as (file, _):
        yield file


def _find_dataset(store: Store) -> Source | None:
    """A complete dataset; the parts of one that is not complete are shown from the run's work directory."""
    data = store.get(SUCCESS)
    if data is None:
        return None
    names = sorted(name for name in store.list() if PART.fullmatch(name))
    statuses = Counter(read_object(data).get("statuses") or {})
    try:
        return Tables(parse_plan(data), True, names, partial(_open_stored, store), statuses)
    except ValueError as error:
        raise InputError(f"{store.where}: {SUCCESS} is not that of this version ({error})") from error


@contextmanager
def _open_stored(store: Store, name: str) -> Iterator[pq.ParquetFile]:
    """A part is a chunk's rows: it is fetched whole, and read only if its bytes are those of its name."""
    data, match = store.get(name), PART.fullmatch(name)
    if data is None:
        raise MovedError(name)
    if not match or hashlib.sha256(data).hexdigest()[:16] != match[2]:
        raise DamagedError(f"{store.where}: {name} is damaged: its bytes are not those of its name")
    with pq.ParquetFile(pa.BufferReader(data)) as file:
        yield file
