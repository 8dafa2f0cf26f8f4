"""A finished file whose failed rows are generated again; its other rows stay as they are."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from batchgen.errors import BusyError, OutputError, UsageError
from batchgen.input.prompts import Facts
from batchgen.options import say
from batchgen.output.file import FileOutput
from batchgen.output.ledger import Ledger, refuse_conflict, work_directory
from batchgen.output.parts import read_parts
from batchgen.output.reading import open_output_file, read_batches, read_plan
from batchgen.output.rows import Rows
from batchgen.plan import Plan
from batchgen.types import Reason, add_reasons


def find_failed(path: Path) -> Rows:
    """The input rows of an output that failed, and the number of its other output rows by status."""
    failed: set[int] = set()
    staying: Counter[str] = Counter()
    reasons: dict[str, Reason] = {}
    for batch in read_batches(path, ["row", "status", "error"]):
        is_failed = pc.field("status") == "failed"
        failed.update(batch.filter(is_failed)["row"].to_pylist())
        staying.update(batch.filter(~is_failed)["status"].to_pylist())
        rejected = batch.filter(pc.field("status") == "rejected")
        for row, error in zip(rejected["row"].to_pylist(), rejected["error"].to_pylist(), strict=True):
            place, _, text = (error or "").partition(": ")
            add_reasons(reasons, [Reason(1, row, place, text)])
    return Rows(len(failed), frozenset(failed), staying, reasons.values())


def replace_failed(path: Path, new: pa.Table) -> Iterator[pa.RecordBatch]:
    """Yield an output's record batches, in order, with the new rows in the place of the failed ones.

    Memory is that of the new rows and one batch.
    """
    with open_output_file(path) as file:
        schema = file.schema_arrow.remove_metadata()
    new = new.cast(schema)
    for batch in read_batches(path):
        failed = batch.filter(pc.field("status") == "failed")["row"]
        staying = pa.Table.from_batches([batch.filter(pc.field("status") != "failed")], schema)
        table = pa.concat_tables([staying, new.filter(pc.is_in(new["row"], failed))])
        yield from table.sort_by([("row", "ascending"), ("sample", "ascending")]).combine_chunks().to_batches()


class RetriedFile(FileOutput):
    """A Parquet file that is read first, and replaced once its failed rows are done."""

    __slots__ = ()

    def check(self) -> None:
        """Raise UsageError or OutputError unless there is a Parquet file that can be replaced."""
        super().check()
        if self.format != "parquet":
            what = "wants a finished .parquet file, which says how it was made"
            raise UsageError(f"{self.path}: {say('retry_failed', True)} {what}")
        if not self.path.exists() and work_directory(self.path).exists():
            raise BusyError(f"{self.path}: not finished yet; {say('retry_failed', True)} is for afterwards")
        if not self.path.exists():
            raise OutputError(f"{self.path}: no such file; run without {say('retry_failed', True)} first")

    def rows_to_do(self, facts: Facts) -> Rows:
        read_plan(self.path)  # refuses a file that is not an output
        return find_failed(self.path)

    def claim(self, ledger: Ledger, plan: Plan, automatic: frozenset[str], restart: bool) -> Plan:
        """Adopt the plan of this retry; UsageError unless the file's own plan makes the same rows."""
        if not restart and ledger.unfinished():
            remedy = f"resume it first (without {say('retry_failed', True)}), or discard it with {say('restart', True)}"
            raise BusyError(f"{ledger.directory}: an unfinished run is to replace this file; {remedy}")
        remedy = "give the options that made it, with its batchgen, NumPy and BLAS"
        refuse_conflict(str(self.path), read_plan(self.path), plan, automatic, remedy)
        return ledger.adopt(replace(plan, retry=True), automatic, restart)

    def publish(self, ledger: Ledger, plan: Plan, schema: pa.Schema, rows: int) -> None:
        """Put the parts' rows in the place of the failed ones; the file keeps the plan that made it."""
        if ledger.committed:
            new = pa.Table.from_batches(read_parts(ledger.parts(), schema), schema)
            self.replace_rows(replace_failed(self.path, new), read_plan(self.path), schema, rows)
