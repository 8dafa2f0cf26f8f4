"""The rows of older outputs, which are read once: in a mapped file, with an index of what each was asked for.

The file has no name; a row can be taken from anywhere in it, and later changes of the outputs change nothing. What
finds a row is a hash of all that decides it, 34 bytes a row; what it finds is compared before it is taken.
"""

import mmap
import tempfile
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from operator import attrgetter
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from batchgen.errors import InputError
from batchgen.input.parameters import WITH_COLUMNS, is_asked
from batchgen.output.duplicates import made
from batchgen.output.older import OlderOutput, remedy
from batchgen.output.parts import in_order
from batchgen.output.place import output_errors
from batchgen.output.schema import Columns
from batchgen.plan import Plan
from batchgen.types import Ids, SamplingParams

Integers: TypeAlias = npt.NDArray[np.int64]
Arrays: TypeAlias = tuple[npt.NDArray[Any], ...]
Places: TypeAlias = Iterable[tuple[int, str | None]]  # the number and the id of each row

BATCH_ROWS = 65_536  # of the mapped file, or fewer if they are large:
BATCH_BYTES = 32 * 2**20
NO_NUMBER = -1  # of parameters that no row has
# what may be missing: of rows that are copied none has a value, or all have this one
FILLS: dict[str, object] = dict.fromkeys(
    ("logprobs", "top_logprobs", "prompt_token_ids", "prompt_logprobs", "prompt_top_logprobs", "beam_score")
) | {"prompt_index": 0}
# what is read besides: what a sample is continued from, and what only a row with several prompts has
_FURTHER = ("completion_token_ids", "prompt_index")
_IDENTITY = attrgetter(*(one.name for one in fields(SamplingParams) if one.name not in ("n", "max_tokens", "seed")))


# ---- parameters


@dataclass(frozen=True, slots=True)
class Asked:
    """What parameters ask for: `number` is equal for those that differ in n, max_tokens and seed alone."""

    number: int
    n: int
    max_tokens: int
    seed: int  # 0 if nothing is drawn
    greedy: bool
    alike: bool = True  # all samples are the same


Numbers: TypeAlias = dict[tuple[object, ...], int]


def ask(numbers: Numbers, params: SamplingParams, as_ids: bool = False) -> Asked:
    """What parameters ask for, numbered; as_ids: the prompt is given as token ids."""
    number = numbers.setdefault((as_ids, *_IDENTITY(params)), len(numbers))
    greedy = params.greedy
    seed, alike = 0 if greedy else params.seed, greedy and not params.searches
    return Asked(number, params.n, params.max_tokens, seed, greedy, alike)


def list_values(asked: Sequence[Asked], *names: str) -> list[Integers]:
    """These values of each; most often all are the same object."""
    first = asked[0] if asked else None
    if all(one is first for one in asked):
        return [np.full(len(asked), getattr(first, name, 0), np.int64) for name in names]
    return [np.array([getattr(one, name) for one in asked], np.int64) for name in names]


def make_key(text: str | Ids, asked: Asked, seed_by: str, row: int, id_: str | None) -> int:
    """A hash of all that decides what is generated, besides n and max_tokens."""
    if asked.greedy:
        return hash((text, asked.number))
    return hash((text, asked.number, asked.seed, seed_by, {"row": row, "id": id_}.get(seed_by)))


def list_keys(texts: Sequence[str | Ids], asked: Sequence[Asked], seed_by: str, places: Places) -> list[int]:
    """make_key of each row, by its number and its id; of most inputs, all rows ask for the same, and draw nothing."""
    first = asked[0] if asked else None
    if first and first.greedy and all(one is first for one in asked):
        return [hash((text, first.number)) for text in texts]
    return [make_key(text, one, seed_by, *place) for text, one, place in zip(texts, asked, places, strict=True)]


# ---- the rows, in a mapped file


class Table:
    """Rows of record batches in a file without a name, which is mapped once it is whole."""

    def __init__(self, file: BinaryIO, schema: pa.Schema) -> None:
        self.file, self.schema = file, schema
        self.starts = np.zeros(1, np.int64)  # of each batch, the number of its first row; and of all rows
        self._writer = pa.ipc.new_file(pa.PythonFile(file, "w"), schema)
        self._batches: list[pa.RecordBatch] = []

    def add(self, batch: pa.RecordBatch) -> None:
        self._writer.write_batch(batch)
        self.starts = np.append(self.starts, self.starts[-1] + len(batch))

    def close(self) -> None:
        """No more is added."""
        self._writer.close()
        self.file.flush()
        mapped = mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_READ)
        reader = pa.ipc.open_file(pa.py_buffer(mapped))
        self._batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]

    def value(self, row: int, name: str) -> Any:
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self._batches[number][name][row - int(self.starts[number])].as_py()

    def take(self, rows: Integers, names: Sequence[str]) -> pa.Table:
        """Some columns of the rows with these numbers, in this order."""
        schema = pa.schema([self.schema.field(name) for name in names])
        which = np.searchsorted(self.starts, rows, side="right") - 1
        order = np.argsort(which, kind="stable")
        numbers, begins = np.unique(which[order], return_index=True)
        pieces = []
        for number, members in zip(numbers, np.split(order, begins[1:]), strict=True):
            at = rows[members] - self.starts[number]
            batch = self._batches[number].select(names)
            is_slice = len(at) and at[-1] - at[0] == len(at) - 1 and bool((np.diff(at) == 1).all())
            pieces.append(batch.slice(int(at[0]), len(at)) if is_slice else batch.take(pa.array(at)))
        table = pa.Table.from_batches(pieces, schema)
        if (order[1:] > order[:-1]).all():
            return table
        places = np.empty(len(order), np.int64)
        places[order] = np.arange(len(order))
        return table.take(places)


# ---- which older row is it?


@dataclass(slots=True)
class Index:
    """Of each older row of the input that may be copied: hash, first output row, and what it was asked for."""

    hashes: Integers  # ascending; of equal ones, the first is the first that was read
    firsts: Integers
    seeds: Integers
    numbers: npt.NDArray[np.int32]
    max_tokens: npt.NDArray[np.int32]
    samples: npt.NDArray[np.int16]


ReadOwn: TypeAlias = Callable[[str | None], tuple[Asked, Ids]]


def _reader(plan: Plan, names: Container[str], numbers: Numbers) -> ReadOwn:
    """Reads the column `parameters` of an output of this plan, which has columns of these names."""
    columns = {name: name for name in WITH_COLUMNS} | {"num_beams": "beam_score"}
    lacking = [name for name, column in columns.items() if column not in names]  # somebody has removed them

    @lru_cache(4096)
    def read_own(text: str | None) -> tuple[Asked, Ids]:
        params, ids = plan.read_own(text)
        asked = ask(numbers, params, bool(ids))
        has_all = not any(is_asked(name, params) for name in lacking)
        return asked if has_all else replace(asked, number=NO_NUMBER), ids

    return read_own


def _describe(batch: pa.RecordBatch, last: tuple[int, int], n: int, seed_by: str, read_own: ReadOwn) -> Arrays:
    """Of each row that begins in a batch, what the index has of it; and output rows that cannot be copied, and those
    before which some are missing. There are n output rows before the batch; `last`: row and sample of the last one.
    """
    rows, samples = batch["row"].to_numpy(), batch["sample"].to_numpy()
    is_first = np.diff(rows, prepend=last[0]) != 0
    is_next = samples == np.where(is_first, 0, np.append(last[1], samples[:-1]) + 1)
    good = made(batch).to_numpy(zero_copy_only=False)
    if "prompt_index" in batch.schema.names:  # of a row with several prompts
        good &= batch["prompt_index"].to_numpy() == 0
    first = np.flatnonzero(is_first)
    begin = batch.take(pa.array(first)) if len(first) < len(batch) else batch
    texts, own, id_ = (begin[name].to_pylist() for name in ("prompt", "parameters", "id"))
    read = [read_own(one) for one in own]
    prompts: list[str | Ids] = [ids or text or "" for text, (_, ids) in zip(texts, read, strict=True)]
    asked = [one for one, _ in read]
    keys = np.array(list_keys(prompts, asked, seed_by, zip(rows[first].tolist(), id_, strict=True)), np.int64)
    seeds, *small = list_values(asked, "seed", "number", "max_tokens")
    numbers, max_tokens = (column.astype(np.int32) for column in small)
    return keys, n + first, seeds, numbers, max_tokens, n + np.flatnonzero(~good), n + np.flatnonzero(~is_next)


def _index(pieces: Iterable[Arrays], n: int) -> Index:
    """Of all rows, those of which all samples are good, each with its samples before a gap; n: output rows."""
    columns = [np.concatenate(column) for column in zip(*pieces, strict=True)] or [np.empty(0, np.int64)] * 7
    hashes, firsts, seeds, numbers, max_tokens, bad, gaps = columns
    ends = np.minimum(np.append(firsts[1:], n), np.append(gaps, n)[np.searchsorted(gaps, firsts)])
    is_good = ends > firsts
    is_good[np.searchsorted(firsts, bad, side="right") - 1] = False
    good = np.flatnonzero(is_good)
    good = good[np.argsort(hashes[good], kind="stable")]
    samples = (ends - firsts).astype(np.int16)
    return Index(*(column[good] for column in (hashes, firsts, seeds, numbers, max_tokens, samples)))


# ---- reading


@dataclass(frozen=True, slots=True)
class MappedRows:
    """All rows of older outputs."""

    table: Table
    index: Index
    numbers: Numbers


def read_rows(outputs: Sequence[OlderOutput], schema: pa.Schema, spool: Path) -> MappedRows:
    """schema: of the new output; InputError for an output that is damaged."""
    numbers: Numbers = {}
    names = dict.fromkeys([*schema.names, *_FURTHER])
    full = Columns(token_ids=True, prompt_index=True).schema()
    stored = pa.schema([schema.field(name) if name in schema.names else full.field(name) for name in names])
    with output_errors(spool), tempfile.TemporaryFile(dir=spool) as file:
        table = Table(file, stored)
        pieces = [piece for older in outputs for piece in _read(older, table, numbers)]
        table.close()
    return MappedRows(table, _index(pieces, int(table.starts[-1])), numbers)


def _read(older: OlderOutput, table: Table, numbers: Numbers) -> Iterator[Arrays]:
    """Add the rows of an older output to the table, and yield what the index is made of."""
    assert older.plan is not None
    read_own, last = _reader(older.plan, older.names, numbers), (-1, -1)
    names = [name for name in table.schema.names if name in older.names]
    batches = (_fill(batch, table.schema) for batch in older.batches(names, BATCH_ROWS))
    try:
        for batch in in_order(batches, older.plan.selection, older.where, remedy(), older.left_out, InputError):
            if len(batch):
                yield _describe(batch, last, int(table.starts[-1]), older.plan.seed_by, read_own)
                last = batch["row"][-1].as_py(), batch["sample"][-1].as_py()
            for begin in range(0, len(batch), step := max(BATCH_BYTES * len(batch) // max(batch.nbytes, 1), 1)):
                table.add(batch.slice(begin, step))
    except (ValueError, KeyError, TypeError, RecursionError, pa.ArrowException) as error:
        raise InputError(f"{older.where}: its rows are not as batchgen wrote them ({error}); {remedy()}") from error


def _fill(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """The batch with the columns that it lacks, which have no values, and the types of the schema."""
    columns = [
        batch[one.name].cast(one.type)
        if one.name in batch.schema.names
        else pa.repeat(pa.scalar(FILLS.get(one.name), one.type), len(batch))
        for one in schema
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)
