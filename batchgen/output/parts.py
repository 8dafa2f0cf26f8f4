"""Parts: the finished rows of one chunk as a Parquet file, with the chunk's receipt in its metadata."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.errors import BatchgenError, OutputError
from batchgen.files import PART, sha256_of
from batchgen.input.kept import take_rows
from batchgen.limits import reached_limit, reason_of
from batchgen.options import say
from batchgen.output.place import KEPT, output_errors
from batchgen.output.schema import rows_to_table
from batchgen.selection import Selection
from batchgen.types import TOTALS, EmbeddingRow, Reason, Receipt, Row, ScoreRow

GROUP_ROWS = 65_536  # of a row group at most
GROUP_BYTES = 64 * 2**20  # a row group is held in memory until it is written
BATCH_ROWS = 8_192
MERGED_BYTES = 2**20  # of each of the parts that are merged, in memory
MAX_ROW = 2**63 - 1
RECEIPT_KEY = "batchgen_receipt"
MADE_AGAIN = "the same command makes it again"
METADATA_KEY = "batchgen"  # in the metadata of a file of all rows: the plan
LEFT_OUT_KEY = "batchgen_left_out"  # and what --no-rejects leaves out of it
FEW_VALUES = ["finish_reason", "status", "error", "parameters"]  # worth a dictionary; other columns rarely repeat

Numbers: TypeAlias = npt.NDArray[np.int64]
KeptOf: TypeAlias = Callable[[Numbers], pa.Table | None]  # the input's columns of these rows
PARQUET_OPTIONS: dict[str, object] = {
    "compression": "zstd",
    "use_dictionary": FEW_VALUES,
    "write_statistics": ["row", "sample", "status"],
    "write_page_checksum": True,
    "column_encoding": {"embedding.list.element": "BYTE_STREAM_SPLIT"},  # a tenth smaller than plain, and faster
}


def open_parquet(raw: BinaryIO) -> pq.ParquetFile:
    """Read a file in this thread alone, with its checksums verified; pre_buffer would start threads."""
    return pq.ParquetFile(raw, pre_buffer=False, page_checksum_verification=True)


@contextmanager
def open_writer(file: BinaryIO, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    """A pq.ParquetWriter that is always closed here, never by the garbage collector."""
    writer = pq.ParquetWriter(file, schema, **PARQUET_OPTIONS)
    try:
        yield writer
    except BaseException:
        with suppress(OSError, pa.ArrowException):  # the first error is the one to raise; the file is removed
            writer.close()
        raise
    writer.close()


def part_name(chunk: int, sha256: str) -> str:
    return f"{chunk:08d}-{sha256[:16]}.parquet"


def _size(row: Row) -> int:
    """About the bytes of a row's longest columns."""
    if isinstance(row, EmbeddingRow):
        return len(row.prompt or "") + (0 if row.embedding is None else row.embedding.nbytes)
    more = row.choices or () if isinstance(row, ScoreRow) else ()
    return len(row.prompt or "") + len(row.completion or "") + sum(map(len, more))


def _groups(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    """The rows in groups of about GROUP_BYTES of text: samples of a row share its prompt until they are written."""
    begin = size = 0
    for at, row in enumerate(rows):
        size += _size(row)
        if size >= GROUP_BYTES:
            yield rows[begin : at + 1]
            begin, size = at + 1, 0
    if begin < len(rows) or not rows:
        yield rows[begin:]


def _tables(rows: Sequence[Row], schema: pa.Schema, keep: KeptOf) -> Iterator[pa.Table]:
    """The rows as tables of bounded size, with the kept columns beside them."""
    for group in _groups(rows):
        yield rows_to_table(group, schema, keep(np.array([row.row for row in group], np.int64)))


def _merged_tables(rows: Sequence[Row], copied: pa.Table, schema: pa.Schema, keep: KeptOf) -> Iterator[pa.Table]:
    """The same with rows that are copied: all in the order of the input, and of a row's samples."""
    own = pa.schema([schema.field(name) for name in copied.schema.names])
    table = pa.concat_tables([copied.cast(own), rows_to_table(rows, own)]) if rows else copied.cast(own)
    numbers, samples = table["row"].to_numpy(), table["sample"].to_numpy()
    order = np.lexsort((samples, numbers))
    if not np.array_equal(order, np.arange(len(order))):
        table, numbers = table.take(order), numbers[order]
    step = max(GROUP_BYTES * len(order) // max(table.nbytes, 1), 1)
    for begin in range(0, len(order), step):
        group, kept = table[begin : begin + step], keep(numbers[begin : begin + step])
        columns = [*group.columns, *(kept.columns if kept else ())]
        yield pa.Table.from_arrays(columns, schema=schema)


def write_part(
    rows: Sequence[Row], path: Path, schema: pa.Schema, keep: KeptOf = lambda _: None, copied: pa.Table | None = None
) -> str:
    """Write one chunk's rows to a new file, on disk when this returns its SHA-256; equal rows give equal bytes.

    copied: rows that are written with them, by all columns but the kept ones.
    """
    tables = _tables(rows, schema, keep) if copied is None else _merged_tables(rows, copied, schema, keep)
    with output_errors(path, KEPT):
        with open(path, "xb") as file:
            with open_writer(file, schema) as writer:
                for table in tables:
                    writer.write_table(table, row_group_size=GROUP_ROWS)
            file.flush()
            os.fsync(file.fileno())
        return sha256_of(path)


@contextmanager
def open_part(path: Path) -> Iterator[tuple[pq.ParquetFile, str]]:
    """Open a committed part, whose name must hold its SHA-256: no damage reaches Arrow; OutputError names the part."""
    match = PART.fullmatch(path.name)
    try:
        with open(path, "rb") as raw:
            sha256 = hashlib.file_digest(raw, "sha256").hexdigest()
            if not match or sha256[:16] != match[2]:
                raise OutputError(f"{path}: the part is damaged: it is not what was committed; {MADE_AGAIN}")
            raw.seek(0)
            with open_parquet(raw) as file:
                yield file, sha256
    except (OSError, pa.ArrowException) as error:
        if reached_limit(error):
            raise
        raise OutputError(f"{path}: the part cannot be read ({reason_of(error)}); {MADE_AGAIN}") from error


def group_batches(
    file: pq.ParquetFile, columns: Sequence[str] | None = None, batch_bytes: int = GROUP_BYTES
) -> Iterator[pa.RecordBatch]:
    """Yield the record batches of a file of ours, of about batch_bytes at most; no row group is larger in memory."""
    for number in range(file.num_row_groups):
        group = file.metadata.row_group(number)
        rows = batch_bytes * group.num_rows // max(group.total_byte_size, 1)
        yield from file.iter_batches(
            min(max(rows, 1), BATCH_ROWS), row_groups=[number], columns=columns and list(columns), use_threads=False
        )


def _read_part(part: Path, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    with open_part(part) as (file, _):
        if not file.schema_arrow.equals(schema):
            what = "the part has other columns than this run's"
            raise OutputError(f"{part}: {what}; run again with {say('restart', True)}")
        yield from group_batches(file, batch_bytes=MERGED_BYTES)


def read_parts(parts: Iterable[Path], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Yield the rows of committed parts, whose first rows ascend, in the order of the input; see open_part."""
    return merge_rows(_read_part(part, schema) for part in parts)


class _Open:
    """A stream of record batches that is read up to somewhere: the rows of `batch`, with these numbers, are next."""

    def __init__(self, batch: pa.RecordBatch, rest: Iterator[pa.RecordBatch]) -> None:
        self.rest = rest
        self._begin(batch)

    def _begin(self, batch: pa.RecordBatch) -> None:
        self.batch = batch
        self.numbers: Numbers = batch["row"].to_numpy()

    def take(self, last: int) -> pa.RecordBatch:
        """Remove and return the rows up to this input row."""
        n = int(np.searchsorted(self.numbers, last, side="right"))
        taken = self.batch[:n]
        self._begin(self.batch[n:])
        return taken

    def is_over(self) -> bool:
        while not len(self.batch):
            following = next(self.rest, None)
            if following is None:
                return True
            self._begin(following)
        return False


def merge_rows(streams: Iterable[Iterator[pa.RecordBatch]]) -> Iterator[pa.RecordBatch]:
    """Merge by row streams in which rows ascend, and whose first rows do; a stream is open from its first to its last.

    rows 0 3 4, rows 1 2, rows 5 6 -> rows 0 1 2, rows 3 4, rows 5 6
    """
    opened = (_Open(batch, stream) for stream in streams for batch in islice(stream, 1))
    coming = next(opened, None)
    streams_now: list[_Open] = []
    while coming or streams_now:
        last = min((int(one.numbers[-1]) for one in streams_now), default=MAX_ROW)
        while coming and coming.numbers[0] <= last:
            streams_now.append(coming)
            last = min(last, int(coming.numbers[-1]))
            coming = next(opened, None)
        yield from _sorted([one.take(last) for one in streams_now if one.numbers[0] <= last])
        streams_now = [one for one in streams_now if not one.is_over()]


def _sorted(batches: list[pa.RecordBatch]) -> list[pa.RecordBatch]:
    """The rows of these batches in the order of the input."""
    if len(batches) == 1:
        return batches
    table = pa.Table.from_batches(batches).unify_dictionaries()
    order = np.argsort(table["row"].to_numpy(), kind="stable")
    in_one: list[pa.RecordBatch] = take_rows(table, order).combine_chunks().to_batches()
    return in_one


def read_numbers(parts: Iterable[Path]) -> Iterator[pa.RecordBatch]:
    """Yield the columns of committed parts that say which rows they hold; see open_part."""
    for part in parts:
        with open_part(part) as (file, _):
            yield from group_batches(file, ["row", "sample"])


def in_order(
    batches: Iterable[pa.RecordBatch],
    rows: Selection,
    where: Path | str,
    remedy: str,
    left_out: Counter[str] | None = None,
    error: type[BatchgenError] = OutputError,
) -> Iterator[pa.RecordBatch]:
    """Yield the batches; an error unless they hold samples, in order, of each of these input rows.

    left_out: what --no-rejects has left out, if it has; then as many rows as it says may be missing, and first samples.
    """
    done, n_out = 0, left_out["rows"] if left_out else 0  # input rows that have begun, and that are missing
    last, sample, is_whole = -1, -1, not left_out  # row and sample before
    for batch in batches:
        numbers, samples = batch["row"].to_numpy(), batch["sample"].to_numpy()
        steps = np.diff(numbers, prepend=last)
        begins, n = steps != 0, int(np.count_nonzero(steps))
        good = np.where(begins, samples == 0 if is_whole else True, np.diff(samples, prepend=sample) > 0)
        if is_whole:
            expected = np.append(last, rows.between(done, done + n))
            good &= numbers == np.append(expected, np.full(n + 1 - len(expected), -1))[np.cumsum(begins)]
        else:
            good &= rows.holds(numbers) & (steps >= 0)
        if not good.all():
            what = f": row {numbers[good.argmin()]} is out of order, or the rows before it are missing"
            break
        last, sample, done = (int(numbers[-1]), int(samples[-1]), done + n) if len(batch) else (last, sample, done)
        yield batch
    else:
        if done == len(rows) - n_out:
            return
        what = f": it holds {done:,}"
    wanted = f"{len(rows) - n_out:,}" if n_out else "each"
    raise error(f"{where}: does not hold {wanted} of its {len(rows):,} input rows in order{what}; {remedy}")


def count_part(part: Path) -> tuple[int, str]:
    """The rows and the SHA-256 of a committed part; see open_part."""
    with open_part(part) as (file, sha256):
        return file.metadata.num_rows, sha256


def check_count(where: Path | str, rows: int, expected: int) -> None:
    """Raise OutputError unless the parts of an output that is to be published hold the expected number of rows."""
    if rows != expected:
        remedy = f"run again with {say('restart', True)}"
        raise OutputError(f"{where}: the parts hold {rows} rows, not {expected}; {remedy}")


def with_receipt(schema: pa.Schema, receipt: Receipt) -> pa.Schema:
    """The schema of a part that carries its receipt, without the fields that are only known of the finished file."""
    left_out = {"path", "sha256", *(name for name in TOTALS if not getattr(receipt, name))}
    values = {key: value for key, value in asdict(receipt).items() if key not in left_out}
    return schema.with_metadata({RECEIPT_KEY: json.dumps(values)})


def read_receipt(path: Path) -> Receipt | None:
    """The receipt of a committed part, or None if the file is not what its name says."""
    match = PART.fullmatch(path.name)
    if not match or path.is_symlink() or not path.is_file():
        return None
    try:
        with open_part(path) as (file, sha256):
            values = json.loads(file.schema_arrow.metadata[RECEIPT_KEY.encode()])
        reasons = tuple(Reason(**reason) for reason in values.pop("reasons", ()))
        receipt = Receipt(**values, path=path.name, sha256=sha256, reasons=reasons)
    except (OutputError, KeyError, TypeError, ValueError):
        return None
    return receipt if receipt.chunk == int(match[1]) else None
