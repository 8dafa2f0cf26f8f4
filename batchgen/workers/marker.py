"""The marker of a worker: a small mapped file with what the worker does now. It outlives the worker.

It shows progress, that a worker hangs, and the rows that ended a worker, to the process that waits for it.
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

import numpy as np
import numpy.typing as npt

from batchgen.engine.limits import LARGEST_BATCH
from batchgen.engine.sequence import Work

MAX_ROWS = 2 * LARGEST_BATCH

RECORD = np.dtype(
    [
        ("pulse", np.int64),  # changes with everything that the worker does
        ("phase", np.int64),
        ("chunk", np.int64),
        ("rows", np.int64),  # of the chunk that are done
        ("prompt_tokens", np.int64),  # of these rows
        ("completion_tokens", np.int64),  # of all rows so far
        ("n_suspects", np.int64),
        ("n_running", np.int64),
        ("in_flight", np.int64, MAX_ROWS),  # [n_suspects + n_running] rows, the suspects first
        ("step", np.int64),  # how often in a row these rows were named
        ("begun", np.int64, 2),  # rows of this chunk, and of all chunks of the worker, from the first step on
        ("work", np.int64, len(Work().counts())),
    ]
)
COUNTS = ("rows", "prompt_tokens", "completion_tokens")


class Phase(IntEnum):
    """What a worker is at. Rows can end it, and `--row-timeout` counts, only while it is at rows."""

    IDLE = 0  # as a bool, false
    STARTING = 1  # a chunk: it maps the model, if it has not done so, and schedules the rows
    ROWS = 2
    WRITING = 3  # the part: all rows are complete


@dataclass(frozen=True, slots=True)
class Sighting:
    """What a marker says: the worker's chunk, what is done of it, and the rows in flight.

    suspects are the rows that the worker has just begun to read, or is about to write down: if a row ends its worker,
    it is most likely one of these. running are the other rows of the step.
    """

    pid: int
    pulse: int
    phase: Phase
    chunk: int
    rows: int
    prompt_tokens: int
    completion_tokens: int
    suspects: tuple[int, ...]
    running: tuple[int, ...]
    chunk_rows: int = 0  # all rows of the chunk, from its first step on
    rows_begun: int = 0  # in all chunks of this worker
    work: Work = field(default_factory=Work)  # in all chunks of this worker
    step: int = 1  # of a row that is in flight alone

    @property
    def in_flight(self) -> tuple[int, ...]:
        return self.suspects + self.running


class Marker:
    """Writes one record, a few microseconds per step; the pulse last, when the rest is there."""

    def __init__(self, record: npt.NDArray[np.void], chunk: int = 0) -> None:
        """record [1]: of type RECORD, mapped (see `open`) or in memory."""
        self._record: np.void = record[0]  # a view
        self._in_flight: npt.NDArray[np.int64] = self._record["in_flight"]
        self._begun: npt.NDArray[np.int64] = self._record["begun"]
        self._work: npt.NDArray[np.int64] = self._record["work"]
        self._engine_work, self._rows = Work(), 0
        self._named: list[int] = []  # the rows in flight
        self._begun[0] = 0
        self._record["chunk"] = chunk
        for name in (*COUNTS, "n_suspects", "n_running", "step"):
            self._record[name] = 0
        self._record["phase"] = Phase.STARTING
        self._record["pulse"] += 1

    @classmethod
    def open(cls, directory: Path, chunk: int) -> "Marker":
        """The marker of this process, at the start of a chunk."""
        path = directory / f"worker-{os.getpid()}"
        if not path.exists():
            path.write_bytes(bytes(RECORD.itemsize))  # not a hole: it could not be filled on a full disk
        return cls(np.memmap(path, RECORD, "r+"), chunk)

    def begin(self, rows: int, work: Work) -> None:
        """The chunk has these rows; work is the engine's, and is read at each step."""
        self._rows, self._engine_work = rows, work

    def add(self, rows: int, prompt_tokens: int) -> None:
        """Count what is done."""
        self._record["rows"] += rows
        self._record["prompt_tokens"] += prompt_tokens

    def add_scored(self, tokens: int) -> None:
        """Count tokens that are scored, in the place of generated ones."""
        self._record["completion_tokens"] += tokens

    def set_in_flight(self, suspects: Sequence[int], running: Sequence[int] = ()) -> None:
        """Name the rows that are next, before anything is done with them."""
        rows = [*suspects, *running][:MAX_ROWS]
        self._record["step"] = self._record["step"] + 1 if rows == self._named else 1
        self._named = rows
        self._in_flight[: len(rows)] = rows
        self._record["n_suspects"] = min(len(suspects), len(rows))
        self._record["n_running"] = max(len(rows) - len(suspects), 0)
        self._record["pulse"] += 1

    def on_step(self, starting: Sequence[int], running: Sequence[int], reading: Sequence[int] = ()) -> None:
        """Called by the engine before each step, of which the rows that are only read get no token."""
        if self._rows:
            self._begun[:] = self._rows, self._begun[1] + self._rows
            self._rows = 0
        self._work[:] = self._engine_work.counts()
        self._record["phase"] = Phase.ROWS
        self.set_in_flight([*starting, *reading], running)
        self._record["completion_tokens"] += len(starting) + len(running)

    def set_completion_tokens(self, completion_tokens: int) -> None:
        """Correct the count: a token that ends a sequence is not in it, and equal rows are generated only once."""
        self._record["completion_tokens"] = completion_tokens

    def finish(self, phase: Phase = Phase.IDLE) -> None:
        """The chunk is done, or its rows are (WRITING); its counts stay until the next chunk."""
        self._work[:] = self._engine_work.counts()
        self._record["phase"] = phase
        self.set_in_flight(())

    def abandon(self) -> Sighting:
        """What the marker says now; then clear its counts, as nothing of the chunk will come."""
        sighting = _sighting(os.getpid(), self._record)
        for name in COUNTS:
            self._record[name] = 0
        self.finish()
        return sighting


def _sighting(pid: int, record: np.void) -> Sighting:
    n_suspects, n_running = int(record["n_suspects"]), int(record["n_running"])
    in_flight = tuple(record["in_flight"][: n_suspects + n_running].tolist())
    numbers = {name: int(record[name]) for name in ("pulse", "chunk", "step", *COUNTS)}
    return Sighting(
        pid=pid,
        phase=Phase(int(record["phase"])),
        suspects=in_flight[:n_suspects],
        running=in_flight[n_suspects:],
        chunk_rows=int(record["begun"][0]),
        rows_begun=int(record["begun"][1]),
        work=Work(*record["work"].tolist()),
        **numbers,
    )


def read_sightings(directory: Path) -> list[Sighting]:
    """What the workers of an attempt do now; for a dead one, what it did last. What cannot be read now is left out."""
    sightings, paths = [], []
    with suppress(OSError):
        paths = list(directory.glob("worker-*"))
    for path in paths:
        with suppress(OSError):
            data = path.read_bytes()
            if len(data) == RECORD.itemsize:  # otherwise it is just being made
                sightings.append(_sighting(int(path.name.partition("-")[2]), np.frombuffer(data, RECORD)[0]))
    return sightings
