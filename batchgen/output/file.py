"""A file of all rows: Parquet, JSON lines, or answers to an OpenAI batch file.

Closing a pq.ParquetWriter writes a valid footer over whatever it got so far, after an exception too, so nothing is
ever written under the final name: only a file that was closed, counted and synced is renamed to it.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import BinaryIO, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc

from batchgen.errors import OutputError, UsageError
from batchgen.files import replacing
from batchgen.input.kept import json_text, json_values
from batchgen.input.prompts import Facts
from batchgen.options import say
from batchgen.output.beside import read_beside, write_beside
from batchgen.output.duplicates import drop_repeated
from batchgen.output.ledger import Ledger
from batchgen.output.parts import (
    GROUP_BYTES,
    GROUP_ROWS,
    LEFT_OUT_KEY,
    METADATA_KEY,
    check_count,
    in_order,
    open_writer,
    read_parts,
)
from batchgen.output.place import KEPT, SUFFIXES, check_folder, is_json_lines, output_errors, refuse_input, refuse_link
from batchgen.output.reading import count_begun, read_stored
from batchgen.output.rows import LeftOut, LocalOutput, Stored, statuses_of
from batchgen.output.schema import Columns, choose_columns
from batchgen.plan import Plan

GROUP_BATCHES = 512

WriteRows: TypeAlias = Callable[[Iterable[pa.RecordBatch], BinaryIO, pa.Schema, Plan, LeftOut], None]


def _groups(batches: Iterable[pa.RecordBatch]) -> Iterator[list[pa.RecordBatch]]:
    """Gather small batches into row groups of up to GROUP_ROWS rows and about GROUP_BYTES bytes."""
    group: list[pa.RecordBatch] = []
    rows = size = 0
    for batch in batches:
        if group and (rows + len(batch) > GROUP_ROWS or size + batch.nbytes > GROUP_BYTES):
            yield group
            group, rows, size = [], 0, 0
        if len(group) == GROUP_BATCHES:  # most of a batch of few rows is its own administration, 16 KB
            group = pa.Table.from_batches(group).combine_chunks().to_batches()
        group.append(batch)
        rows += len(batch)
        size += batch.nbytes
    if group:
        yield group


def write_groups(
    batches: Iterable[pa.RecordBatch], file: BinaryIO, schema: pa.Schema, left_out: LeftOut | None = None
) -> None:
    with open_writer(file, schema) as writer:
        for group in _groups(batches):
            writer.write_table(pa.Table.from_batches(group, schema), row_group_size=GROUP_ROWS)
        if left_out:  # known after the last row
            writer.add_key_value_metadata({LEFT_OUT_KEY: json.dumps(left_out, sort_keys=True)})


def write_parquet(
    batches: Iterable[pa.RecordBatch], file: BinaryIO, schema: pa.Schema, plan: Plan, left_out: LeftOut | None = None
) -> None:
    """Row groups of bounded size, with the plan in the file's own metadata; reading.read_plan reads it."""
    metadata = {METADATA_KEY: json.dumps(plan.to_json(), sort_keys=True)}
    write_groups(batches, file, schema.with_metadata(metadata), left_out)


def write_json_lines(batches: Iterable[pa.RecordBatch], file: BinaryIO, *_: object) -> None:
    """One object a line, keys in the schema's order; it has no b"\\n" within, as JSON escapes control characters."""
    for batch in batches:
        columns = map(json_values, batch.columns)
        rows = (dict(zip(batch.schema.names, values, strict=True)) for values in zip(*columns, strict=True))
        file.write("".join(json_text(row) + "\n" for row in rows).encode())


def decide_rows(
    batches: Iterable[pa.RecordBatch], plan: Plan, statuses: Counter[str], left_out: LeftOut
) -> Iterator[pa.RecordBatch]:
    """Yield what an output has of all rows of its plan; counts them by status, and what is left out."""
    if plan.drops("completion"):
        batches = drop_repeated(batches)
    batches = _count(batches, statuses)
    return batches if plan.rejects else _leave_out(batches, len(plan.selection), left_out)


def _count(batches: Iterable[pa.RecordBatch], statuses: Counter[str]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        for found in pc.value_counts(batch["status"]).to_pylist():
            statuses[found["values"]] += found["counts"]
        yield batch


def _leave_out(batches: Iterable[pa.RecordBatch], rows: int, left_out: LeftOut) -> Iterator[pa.RecordBatch]:
    """Yield the batches, of so many input rows, without what is rejected or dropped, and count that."""
    last, begun = -1, 0
    for batch in batches:
        is_out = pc.is_in(batch["status"], pa.array(["rejected", "dropped"]))
        left_out.update(batch["status"].filter(is_out).to_pylist())
        kept = batch.filter(pc.invert(is_out))
        new, last = count_begun(kept, last)
        begun += new
        if len(kept):
            yield kept
    left_out["rows"] = rows - begun


@dataclass(frozen=True, slots=True)
class FileOutput(LocalOutput):
    """A file that `write` fills with all rows; it appears complete or not at all."""

    write: WriteRows
    has_answers: bool = False  # to an OpenAI batch file

    @property
    def format(self) -> str:
        return self.path.suffix.lower().lstrip(".")

    def check(self) -> None:
        """Raise OutputError or UsageError for a path that cannot become a file, or must not be replaced by one."""
        path, inputs = self.path, self.prompts.local_paths
        if path.suffix.lower() not in SUFFIXES:
            what = f"the suffix {path.suffix!r} is not one of {', '.join(SUFFIXES)}"
            raise UsageError(f"{path}: {what}; name the output so, or {path}/ for a folder of parts")
        with output_errors(path):
            refuse_link(path)
            if path.is_dir():
                remedy = f"name a file in it, such as {path / 'completions.parquet'}"
                raise OutputError(f"{path}: a directory; {remedy}, or pass {say('output_format', 'dataset')}")
            if path.exists() and not path.is_file():
                raise OutputError(f"{path}: a pipe or device, which cannot be replaced at once; name a regular file")
            refuse_input(path, inputs)
        check_folder(path, inputs)

    def stored(self) -> Stored | None:
        if not self.path.exists() or not self.path.stat().st_size:  # nothing is lost with an empty file
            return None
        return read_beside(self.path) if is_json_lines(self.path) else read_stored(self.path)

    def columns(self, facts: Facts, plan: Plan, n_embd: int = 0) -> Columns:
        columns = choose_columns(self.prompts, facts, plan, n_embd)
        if self.has_answers and columns.logprobs:  # an answer has the text of each token
            return replace(columns, token_ids=True)
        return columns

    def left_out(self) -> LeftOut:
        """What the file has left out already, if it is the file of which some rows are done again."""
        return Counter()

    def publish(self, ledger: Ledger, plan: Plan, schema: pa.Schema, rows: int) -> None:
        """Merge the parts; memory is one row group, whatever their number."""
        self.replace_rows(ledger, read_parts(ledger.parts(), schema), plan, schema, rows)

    def replace_rows(
        self, ledger: Ledger, batches: Iterable[pa.RecordBatch], plan: Plan, schema: pa.Schema, rows: int
    ) -> None:
        """Make these batches the file; OutputError unless they are those of the plan's rows, `rows` in all."""
        left_out = self.left_out()
        statuses = statuses_of(left_out)
        with output_errors(self.path, KEPT), replacing(self.path) as file:
            remedy = f"run again with {say('restart', True)}"
            batches = in_order(batches, plan.selection, self.path, remedy, left_out)
            self.write(decide_rows(batches, plan, statuses, left_out), file, schema, plan, left_out)
            check_count(self.path, statuses.total(), rows)
            if is_json_lines(self.path):
                write_beside(self.path, file, Stored(plan, statuses, left_out))
            ledger.merged.clear()
            ledger.merged.update(statuses)
            ledger.made = os.fstat(file.fileno())
