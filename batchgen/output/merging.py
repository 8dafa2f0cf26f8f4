"""Shards merged: what the runs of --shard 1/N to N/N have written becomes what one run would have written."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from batchgen.errors import BusyError, InputError, UsageError
from batchgen.files import replacing, sha256_of
from batchgen.input.kept import json_text
from batchgen.input.prompts import Prompts
from batchgen.job import InputOptions
from batchgen.options import Shard, parse_shard, say, show_shard
from batchgen.output.beside import read_beside, write_beside
from batchgen.output.dataset import Dataset
from batchgen.output.file import FileOutput, decide_rows, write_groups, write_parquet
from batchgen.output.finished import OF_THE_MACHINE, find_finished
from batchgen.output.ledger import Ledger, open_ledger, work_directory
from batchgen.output.parts import BATCH_ROWS, group_batches, in_order, read_receipt, with_receipt
from batchgen.output.place import SUFFIXES, check_folder, is_json_lines, output_errors, refuse_input
from batchgen.output.reading import open_output_file, output_files, read_batches, read_stored
from batchgen.output.rows import LeftOut, Stored, statuses_of
from batchgen.plan import Plan
from batchgen.progress import Summary, status_path
from batchgen.types import Receipt

MAX_NAMED = 8  # shards that an error names
OF_A_SHARD = frozenset({"shard", "chunk_rows", "batch_size", "kv_bytes", "reuse"})  # no row depends on these
AGAIN = "take the file as batchgen wrote it, or make this shard again"
_LINE = "its line"
_OF_LINES = pa.schema(
    [
        *(pa.field("row", pa.int64()), pa.field("sample", pa.int64())),
        *(pa.field(name, pa.string()) for name in ("completion", "status", "error")),
        pa.field(_LINE, pa.binary()),
    ]
)
_DECIDED = (_LINE, "status", "error")
KINDS = {  # of outputs, by format: several, and one
    "parquet": ("Parquet files", "a .parquet file"),
    "jsonl": ("JSON lines", "a .jsonl file"),
    "dataset": ("datasets", "a folder"),
}


@dataclass(frozen=True, slots=True)
class Piece:
    """A finished output that is the k-th of n shards."""

    path: Path
    stored: Stored
    place: Shard

    @property
    def plan(self) -> Plan:
        return self.stored.plan


def merge_shards(paths: Sequence[Path], out: Path, *, overwrite: bool = False) -> Summary:
    """Make `out` of all shards of one job, in any order; `out` is absent, as before, or complete at every instant.

    Raises a BatchgenError that names the shards that are missing, given twice, damaged or of another job.
    """
    pieces = sort_pieces([open_piece(path) for path in paths])
    plan = merged_plan(pieces)
    output = _check_place(out, plan, paths)
    with open_ledger(out, overwrite=overwrite) as ledger:
        if ledger.unfinished():
            remedy = "resume it with its own command, or choose another name for the output"
            raise BusyError(f"{ledger.directory}: an unfinished run is to write {out}; {remedy}")
        free = OF_A_SHARD - {"shard"} | OF_THE_MACHINE
        if (statuses := find_finished(output, ledger, plan, free, restart=False)) is not None:
            _refuse_older(out, statuses, pieces)
            return replace(Summary.of_complete(out, len(plan.selection), statuses), has_rejects=plan.rejects)
        ledger.begin()
        statuses = _MERGES[plan.format](pieces, plan, out, ledger)
        ledger.published = True
    status_path(out).unlink(missing_ok=True)  # of a run that made what was there before
    summary = Summary.of_complete(out, len(plan.selection), statuses)
    return replace(summary, complete=False, has_rejects=plan.rejects)


# ---- the shards


def open_piece(path: Path) -> Piece:
    """A shard, as its metadata says; InputError for what is none, BusyError for one that is not finished."""
    if not path.exists() and work_directory(path).exists():
        raise BusyError(f"{path}: not finished yet; resume it with its own command, and merge then")
    if not path.exists():
        raise InputError(f"{path}: no such file; check the name")
    stored = read_beside(path) if is_json_lines(path) and not path.is_dir() else read_stored(path)
    if stored.plan.shard is None:
        raise InputError(f"{path}: it was made without {say('shard')}, so it is no part of a whole; leave it out")
    return Piece(path, stored, parse_shard(stored.plan.shard))


def sort_pieces(pieces: Sequence[Piece]) -> list[Piece]:
    """All shards of one job from the first to the last; UsageError if they are anything else."""
    first = pieces[0]
    n = first.place[1]
    for other in pieces[1:]:
        if difference := first.plan.conflict(other.plan, OF_A_SHARD):
            what = f"{other.path}: not of the job that made {first.path}: {difference}"
            raise UsageError(f"{what}; merge shards of one job")
        if other.place[1] != n:
            what = f"{first.path} is {first.plan.shard} and {other.path} is {other.plan.shard}, which overlap"
            raise UsageError(f"{what}; merge shards of one number")
    by_place: dict[int, list[Piece]] = {}
    for piece in pieces:
        by_place.setdefault(piece.place[0], []).append(piece)
    wrong = [*_missing(by_place.keys(), n)]
    wrong += [
        f"{show_shard((k, n))} is both {same[0].path} and {same[1].path}"
        for k, same in sorted(by_place.items())
        if len(same) > 1
    ]
    if wrong:
        more = [f"and {len(wrong) - MAX_NAMED} more"] if len(wrong) > MAX_NAMED else []
        raise UsageError(f"{n} shards, and {'; '.join([*wrong[:MAX_NAMED], *more])}; give each of them once")
    return [by_place[k][0] for k in range(1, n + 1)]


def _missing(given: Iterable[int], n: int) -> Iterator[str]:
    """`3/8 is missing`, `5/8 to 7/8 are missing`"""
    absent = sorted({*range(1, n + 1)} - {*given})
    begin = 0
    for at, k in enumerate(absent, 1):
        if at < len(absent) and absent[at] == k + 1:
            continue
        names = [f"{one}/{n}" for one in dict.fromkeys((absent[begin], k))]
        yield f"{' to '.join(names)} {'is' if len(names) == 1 else 'are'} missing"
        begin = at


def merged_plan(pieces: Sequence[Piece]) -> Plan:
    """That of one run, with the sizes of the first shard's."""
    reuse = tuple(dict.fromkeys(name for piece in pieces for name in piece.plan.reuse))
    return replace(pieces[0].plan, shard=None, reuse=reuse)


# ---- the place


def _check_place(out: Path, plan: Plan, inputs: Sequence[Path]) -> FileOutput | Dataset:
    """The output, after its check; BatchgenError for a place that cannot hold it, or that is one of the shards."""
    suffix = out.suffix.lower()
    if suffix in SUFFIXES if plan.format == "dataset" else suffix != f".{plan.format}":
        several, one = KINDS[plan.format]
        raise UsageError(f"{out}: the shards are {several}, and so will be the output; name {one}")
    prompts = Prompts(InputOptions(()), (), openai=False)
    with output_errors(out):
        refuse_input(out, inputs)
    check_folder(out, inputs)
    output = Dataset(out, prompts) if plan.format == "dataset" else FileOutput(out, prompts, write_parquet)
    output.check()
    return output


def _refuse_older(out: Path, statuses: Counter[str], pieces: Sequence[Piece]) -> None:
    """Raise UsageError if the complete output was merged before failed rows of a shard were made again."""
    failed = sum(piece.stored.statuses["failed"] for piece in pieces)
    if statuses["failed"] != failed:
        what = f"{out} is complete with {statuses['failed']:,} failed rows, and the shards have {failed:,}"
        raise UsageError(f"{what}; pass {say('overwrite', True)} to replace it")


# ---- the rows


def _read_pieces(
    pieces: Sequence[Piece], schema: pa.Schema, columns: Sequence[str] | None = None
) -> Iterator[pa.RecordBatch]:
    """Yield the rows of all shards in order; InputError names a shard that does not hold what its metadata says."""
    for piece in pieces:
        for file_path in output_files(piece.path):
            with open_output_file(file_path) as file:
                if not file.schema_arrow.equals(schema):
                    raise InputError(f"{file_path}: its columns are not those of the other shards; {AGAIN}")
        batches, selection = read_batches(piece.path, columns), piece.plan.selection
        yield from in_order(batches, selection, piece.path, AGAIN, piece.stored.left_out, InputError)


def _schema_of(pieces: Sequence[Piece]) -> pa.Schema:
    """The columns, without metadata; none if there is no file, as in datasets without rows."""
    for piece in pieces:
        for path in output_files(piece.path):
            with open_output_file(path) as file:
                return file.schema_arrow.remove_metadata()
    return pa.schema([])


def _left_out(pieces: Sequence[Piece]) -> LeftOut:
    """What the shards have left out, by status."""
    return _sum(statuses_of(piece.stored.left_out) for piece in pieces)


def _sum(counters: Iterable[Counter[str]]) -> Counter[str]:
    """Added up with their zeros, which + would lose."""
    total: Counter[str] = Counter()
    for one in counters:
        total.update(one)
    return total


# ---- the kinds of outputs


def _merge_parquet(pieces: Sequence[Piece], plan: Plan, out: Path, ledger: Ledger) -> Counter[str]:
    left_out = _left_out(pieces)
    statuses = left_out.copy()
    schema = _schema_of(pieces)
    with output_errors(out), replacing(out) as file:
        batches = decide_rows(_read_pieces(pieces, schema), plan, statuses, left_out)
        write_parquet(batches, file, schema, plan, left_out)
        ledger.made = os.fstat(file.fileno())
    return statuses


def _merge_json_lines(pieces: Sequence[Piece], plan: Plan, out: Path, ledger: Ledger) -> Counter[str]:
    """Lines are copied: the hash beside each file says that they are those of its shard."""
    left_out = _sum(piece.stored.left_out for piece in pieces)
    statuses = _sum(piece.stored.statuses for piece in pieces)
    with output_errors(out), replacing(out) as file:
        if plan.drops("completion"):
            left_out = _left_out(pieces)
            statuses = left_out.copy()
            file.writelines(_decide_lines(pieces, plan, statuses, left_out))
        else:
            for piece in pieces:
                with _opened(piece.path) as lines:
                    shutil.copyfileobj(lines, file, 2**20)
        write_beside(out, file, Stored(plan, statuses, left_out))
        ledger.made = os.fstat(file.fileno())
    return statuses


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        file = open(path, "rb")  # noqa: SIM115  # closed below; an error of the block is another file's
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    with file:
        yield file


def _decide_lines(pieces: Sequence[Piece], plan: Plan, statuses: Counter[str], left_out: LeftOut) -> Iterator[bytes]:
    """The lines of all shards; a line with a completion that an earlier shard has gets the status dropped."""
    for batch in decide_rows(_read_lines(pieces), plan, statuses, left_out):
        for line, status, error in zip(*(batch[name].to_pylist() for name in _DECIDED), strict=True):
            values = json.loads(line)
            changed = values | {"status": status, "error": error}
            yield line if changed == values else f"{json_text(changed)}\n".encode()


def _read_lines(pieces: Sequence[Piece]) -> Iterator[pa.RecordBatch]:
    """Each line, and what decides about it, in batches."""
    for piece in pieces:
        with _opened(piece.path) as file:
            while lines := [*islice(file, BATCH_ROWS)]:
                yield pa.RecordBatch.from_pylist([json.loads(line) | {_LINE: line} for line in lines], _OF_LINES)


def _merge_datasets(pieces: Sequence[Piece], plan: Plan, out: Path, ledger: Ledger) -> Counter[str]:
    """Each part is written anew, with its number among all."""
    schema = _schema_of(pieces)
    for _ in _read_pieces(pieces, schema, ("row", "sample")):  # whether all rows are there, in order
        pass
    parts = (part for piece in pieces for part in output_files(piece.path))
    with output_errors(out):
        for number, part in enumerate(parts):
            ledger.commit(_copy_part(part, number, plan, ledger.attempt))
        statuses = ledger.statuses()
        ledger.publish_dataset(plan, ledger.counts["rows"])
    return statuses


def _copy_part(part: Path, number: int, plan: Plan, folder: Path) -> Receipt:
    """Write a shard's part as the part of this number; InputError for one that is not what its name says."""
    old = read_receipt(part)
    if old is None:
        raise InputError(f"{part}: damaged: it is not what its name says; make this shard again")
    receipt = replace(old, chunk=number, path=str(folder / f"{number:08d}.parquet"), plan=plan.digest)
    with open_output_file(part) as file, open(receipt.path, "xb") as copy:
        write_groups(group_batches(file), copy, with_receipt(file.schema_arrow, receipt))
        copy.flush()
        os.fsync(copy.fileno())
    return replace(receipt, sha256=sha256_of(Path(receipt.path)))


_MERGES = {"parquet": _merge_parquet, "jsonl": _merge_json_lines, "dataset": _merge_datasets}
