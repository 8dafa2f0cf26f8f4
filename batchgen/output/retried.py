"""A finished file whose failed rows are generated again; its other rows stay as they are."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from batchgen.errors import BusyError, OutputError, UsageError
from batchgen.files import sha256_of
from batchgen.input.prompts import Facts
from batchgen.options import say
from batchgen.output.file import FileOutput
from batchgen.output.ledger import Ledger, refuse_conflict, work_directory
from batchgen.output.parts import in_order, read_parts
from batchgen.output.reading import open_output_file, read_batches, read_plan, read_stored
from batchgen.output.rows import LeftOut, Rows, statuses_of
from batchgen.output.schema import Columns
from batchgen.plan import Plan
from batchgen.selection import Selection
from batchgen.types import Reason, add_reasons


def find_failed(path: Path, rows: Selection, left_out: LeftOut) -> Rows:
    """The input rows of an output that failed, of these, and the number of its other output rows by status.

    OutputError if its rows are no longer in the input's order, in which new ones take their places.
    """
    failed: set[int] = set()
    staying = statuses_of(left_out)
    reasons: dict[str, Reason] = {}
    batches = read_batches(path, ["row", "sample", "status", "error"])
    remedy = "it was changed: take the file as batchgen wrote it"
    for batch in in_order(batches, rows, path, remedy, left_out):
        is_failed = pc.field("status") == "failed"
        failed.update(batch.filter(is_failed)["row"].to_pylist())
        staying.update(batch.filter(~is_failed)["status"].to_pylist())
        rejected = batch.filter(pc.field("status") == "rejected")
        for row, error in zip(rejected["row"].to_pylist(), rejected["error"].to_pylist(), strict=True):
            place, _, text = (error or "").partition(": ")
            add_reasons(reasons, [Reason(1, row, place, text)])
    return Rows(len(failed), frozenset(failed), len(rows), staying, reasons.values())


def _by_row(batches: Iterable[pa.RecordBatch]) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Each input row's number and output rows; those of one row may come in several pieces."""
    for batch in batches:
        begin = 0
        for row, samples in groupby(batch["row"].to_pylist()):
            length = sum(1 for _ in samples)
            yield row, batch.slice(begin, length)
            begin += length


def replace_failed(path: Path, new: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Yield an output's record batches, in order, with the new rows, in order, in the place of the failed ones."""
    again = groupby(_by_row(new), key=itemgetter(0))
    for batch in read_batches(path):
        begin = 0
        for at in pc.indices_nonzero(pc.equal(batch["status"], "failed")).to_pylist():
            if begin < at:
                yield batch.slice(begin, at - begin)
            yield from (piece for _, piece in next(again, (None, ()))[1])
            begin = at + 1
        if begin < len(batch):
            yield batch.slice(begin)


@dataclass(frozen=True, slots=True)
class RetriedFile(FileOutput):
    """A Parquet file that is read first, and replaced once its failed rows are done."""

    seen: list[str] = field(default_factory=list)  # its SHA-256 when its failed rows were looked for
    without: LeftOut = field(default_factory=Counter)  # what it left out then

    def check(self) -> None:
        """Raise UsageError or OutputError unless there is a Parquet file that can be replaced."""
        FileOutput.check(self)
        if self.format != "parquet":
            what = "wants a finished .parquet file, which says how it was made"
            raise UsageError(f"{self.path}: {say('retry_failed', True)} {what}")
        if not self.path.exists() and work_directory(self.path).exists():
            raise BusyError(f"{self.path}: not finished yet; {say('retry_failed', True)} is for afterwards")
        if not self.path.exists():
            raise OutputError(f"{self.path}: no such file; run without {say('retry_failed', True)} first")

    def rows_to_do(self, selection: Selection) -> Rows:
        stored = read_stored(self.path)  # refuses a file that is not a whole output
        self.seen[:] = [sha256_of(self.path)]
        self.without.update(stored.left_out)
        return find_failed(self.path, stored.plan.selection, stored.left_out)

    def left_out(self) -> LeftOut:
        return self.without.copy()

    def columns(self, facts: Facts, plan: Plan, n_embd: int = 0) -> Columns:
        """The columns of the new rows; OutputError unless the file has just these."""
        columns = FileOutput.columns(self, facts, plan, n_embd)
        with open_output_file(self.path) as file:
            if not file.schema_arrow.equals(columns.schema(facts.kept)):
                what = "another program changed its columns, or their types or order"
                raise OutputError(f"{self.path}: {what}; take the file as batchgen wrote it")
        return columns

    def claim(self, ledger: Ledger, plan: Plan, automatic: frozenset[str], restart: bool) -> Plan:
        """Adopt the plan of this retry; UsageError unless the file's own plan makes the same rows."""
        if not restart and ledger.unfinished():
            remedy = f"resume it first (without {say('retry_failed', True)}), or discard it with {say('restart', True)}"
            raise BusyError(f"{ledger.directory}: an unfinished run is to replace this file; {remedy}")
        remedy = "give the options that made it, with its batchgen and regex"
        refuse_conflict(str(self.path), read_plan(self.path), plan, automatic, remedy)
        return ledger.adopt(replace(plan, retry=True), automatic, restart)

    def publish(self, ledger: Ledger, plan: Plan, schema: pa.Schema, rows: int) -> None:
        """Put the parts' rows in the place of the failed ones; the file keeps the plan that made it."""
        if ledger.committed:
            self._check_unchanged()
            batches = self._held(replace_failed(self.path, read_parts(ledger.parts(), schema)))
            self.replace_rows(ledger, batches, read_plan(self.path), schema, rows)

    def _held(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Yield the batches, which are read of the file that was looked at first."""
        yield from batches
        self._check_unchanged()

    def _check_unchanged(self) -> None:
        if not self.path.exists() or [sha256_of(self.path)] != self.seen:
            what = "the file was changed while its failed rows were generated"
            raise OutputError(f"{self.path}: {what}; it stays as it is: run again to retry those that it has now")
