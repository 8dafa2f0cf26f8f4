"""Which rows of an input a run does: --skip-rows, --limit, --sample and --shard, in this order."""

from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from batchgen.options import Shard

Numbers: TypeAlias = range | npt.NDArray[np.int64]

MAX_ROWS = 2**62


@dataclass(frozen=True, slots=True)
class Selection:
    """The numbers of the input's rows that a run does, ascending; a row keeps its number wherever it is done."""

    numbers: Numbers = field(compare=False)
    before: Numbers = field(default=range(0), compare=False)  # rows of the shards before this one

    def __len__(self) -> int:
        return len(self.numbers)

    def __contains__(self, row: object) -> bool:
        assert isinstance(row, int)
        if isinstance(self.numbers, range):
            return row in self.numbers
        at = int(np.searchsorted(self.numbers, row))
        return at < len(self.numbers) and int(self.numbers[at]) == row

    def holds(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which of these numbers are selected."""
        numbers = self.numbers
        if isinstance(numbers, range):
            return (rows >= numbers.start) & (rows < numbers.stop)
        at = np.minimum(np.searchsorted(numbers, rows), len(numbers) - 1)
        return numbers[at] == rows if len(numbers) else np.zeros(len(rows), np.bool_)

    @property
    def end(self) -> int:
        """The row after the last one."""
        return int(self.numbers[-1]) + 1 if len(self.numbers) else 0

    def between(self, begin: int, end: int) -> npt.NDArray[np.int64]:
        """The numbers at these positions of the selection."""
        return np.asarray(self.numbers[begin:end], np.int64)


def select_rows(
    rows: int,
    skip_rows: int = 0,
    limit: int | None = None,
    sample: int | None = None,
    *,
    seed: int = 0,
    shard: Shard | None = None,
) -> Selection:
    """Of so many rows, those to do: the first left out, of the others at most so many, of them a sample, of it a part.

    A sample is that of the rows with the least hashes of (seed, row): it depends on no generator's version, and most of
    it stays if rows are added. Shards are consecutive, and differ by one row at most.
    """
    rows = min(rows, MAX_ROWS)  # of metadata that somebody has changed
    end = rows if limit is None else min(rows, skip_rows + limit)
    begin = min(skip_rows, end)
    numbers: Numbers = range(begin, end)
    if sample is not None and sample < len(numbers):
        every = np.arange(begin, end)
        numbers = np.sort(every[np.argpartition(_hashes(every, seed), sample)[:sample]])
    if shard is None:
        return Selection(numbers)
    k, n = shard
    begin, end = len(numbers) * (k - 1) // n, len(numbers) * k // n
    return Selection(numbers[begin:end], numbers[:begin])


def _hashes(rows: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.uint64]:
    """Of each (seed, row), a number that looks random: the finaliser of SplitMix64, which is one to one."""
    x = rows.astype(np.uint64) + _mix(np.array([seed], np.uint64))
    return _mix(x)


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
