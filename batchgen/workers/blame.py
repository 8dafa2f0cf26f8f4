"""Decisions after a worker is lost: the cause, what is tried next, when the run gives up; and which workers hang.

A chunk that lost its worker is done again by a fresh worker. Before that, some of its rows, the suspects, are tried
one by one in a worker of their own. A row that ends that worker too fails, and the chunk is done again without it. So
a row that ends every worker costs two workers, and every other row is completed.

    loss of a chunk   suspects
    1st               the rows that the worker had just begun to read, or was about to write down; if there are
                      several, only the first token of each
    2nd               the rows in flight at both losses
    3rd, 4th          all rows; from here on one worker at a time, as memory may be short
    5th               the run gives up

Nothing here starts a process, reads a file or asks for the time; pool.py does.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from batchgen.errors import BatchgenError
from batchgen.options import say
from batchgen.types import Chunk
from batchgen.workers.marker import Sighting

MAX_LOSSES = 5  # of one chunk, or in a row
MAX_FAILED = 16  # rows in a row, with none between them that was completed
STALL_SECONDS = 600.0  # no step and no start takes so long on any usable machine
PAUSE_SECONDS = 10.0  # if nobody looked at the workers for so long, this process was stopped


# ---- losses


@dataclass(frozen=True, slots=True)
class Loss:
    """A chunk that lost its worker. `reason` completes a sentence: its worker `died (SIGKILL(-9))`."""

    chunk: int
    reason: str
    has_died: bool = True  # False: the worker raised an exception and lives
    sighting: Sighting | None = None  # what the worker did at the moment of the loss, if known


def find_culprits(losses: Sequence[Loss], sightings: Iterable[Sighting], dead: Collection[int]) -> list[Loss]:
    """The losses whose own worker raised or died, each with its sighting; dead are process ids.

    When one worker of a pool dies, loky kills the others: their chunks are lost too, but are not the cause.
    """
    working = {sighting.chunk: sighting for sighting in sightings if sighting.working}
    is_alone = len(losses) == 1  # no other worker can have died
    culprits = []
    for loss in losses:
        sighting = working.get(loss.chunk)
        if not loss.has_died:
            culprits.append(loss)
        elif sighting and (is_alone or sighting.pid in dead):
            culprits.append(replace(loss, sighting=sighting))
    return culprits


def find_gone(losses: Sequence[Loss], sightings: Iterable[Sighting]) -> Iterator[Sighting]:
    """The sightings of workers that are gone; if one chunk alone is lost, other workers may live."""
    if any(loss.has_died for loss in losses):
        for sighting in sightings:
            if sighting.working and (len(losses) > 1 or sighting.chunk == losses[0].chunk):
                yield sighting


@dataclass(frozen=True, slots=True)
class ChunkLosses:
    """The losses of one chunk: how many, the suspects of the last, and the rows in flight at all of them."""

    times: int = 0
    suspects: frozenset[int] = frozenset()
    in_flight: frozenset[int] = frozenset()

    def add(self, sighting: Sighting | None) -> "ChunkLosses":
        suspects, in_flight = (sighting.suspects, sighting.in_flight) if sighting else ((), ())
        both = self.in_flight.intersection(in_flight) if self.times else frozenset(in_flight)
        return ChunkLosses(self.times + 1, frozenset(suspects), both)


@dataclass(slots=True)
class History:
    """What a run has lost since it last made progress."""

    losses: int = 0  # in a row, since a chunk was last done
    failed: int = 0  # rows in a row, since one was last completed
    chunks: dict[int, ChunkLosses] = field(default_factory=dict)
    is_short_of_memory: bool = False  # perhaps: one worker at a time

    def add_progress(self) -> None:
        """A chunk is done."""
        self.losses = self.failed = 0

    def add_cause(self, chunk: int) -> None:
        """Rows of the chunk failed: its losses are explained."""
        self.losses = 0
        del self.chunks[chunk]

    def check(self, loss: Loss) -> None:
        """Raise BatchgenError if too many workers are lost in a row; loss is the last."""
        if self.losses >= MAX_LOSSES:
            raise no_cause(self.losses, "", loss)


# ---- trials


@dataclass(frozen=True, slots=True)
class Trial:
    """Rows to try one by one in a worker of their own: to their ends, or only the first token of each."""

    rows: frozenset[int]
    is_first_step: bool = False


TryRows = Callable[[list[int]], Loss | None]  # tries rows one by one in one worker; None: it lives


def next_trial(history: History, loss: Loss, chunk: Chunk) -> Trial:
    """What to try before the chunk is done again; BatchgenError if it was lost too often. See the table above."""
    losses = history.chunks.get(loss.chunk, ChunkLosses()).add(loss.sighting)
    history.chunks[loss.chunk] = losses
    if losses.times >= MAX_LOSSES:
        raise no_cause(losses.times, f" on input rows {chunk.first_row} to {chunk.items[-1].row}", loss)
    if losses.times == 1:
        # What ends a worker at the first step of several rows does so again; a single row is tried to its end.
        return Trial(losses.suspects, is_first_step=len(losses.suspects) > 1)
    if losses.times == 2:
        return Trial(losses.in_flight)
    history.is_short_of_memory = True
    return Trial(frozenset(item.row for item in chunk.items))


def find_guilty(history: History, rows: Iterable[int], try_rows: TryRows) -> Iterator[tuple[int, Loss]]:
    """Try the rows until a worker survives the rest of them; yields each row that ended one, and how.

    A worker that dies some time after it began with a row may have been killed from outside, so the row gets a second
    try. Raises BatchgenError if workers end before they come to a row, or if one row after another ends its worker:
    then the rows are not the cause.
    """
    left = list(rows)
    doubted: set[int | None] = set()
    while left and (loss := try_rows(left)):
        suspects, in_flight = (loss.sighting.suspects, loss.sighting.in_flight) if loss.sighting else ((), ())
        row = next(iter(in_flight), None)
        if loss.sighting and loss.sighting.rows:
            history.failed = 0
        if history.failed >= MAX_FAILED:
            raise no_cause(history.failed + 1, f", last on input row {row} alone", loss)
        if row is None:
            if None in doubted:
                raise no_cause(2, " before they came to a row", loss)
        elif not loss.has_died or row in suspects or row in doubted:
            left.remove(row)
            history.failed += 1
            yield row, loss
        doubted.add(row)


def no_cause(times: int, where: str, last: Loss) -> BatchgenError:
    """The error of a run that gives up."""
    return BatchgenError(
        f"{times} workers were lost in a row{where}, and no row was identified as the cause; the last {last.reason}. "
        f"If memory ran out, lower {say('jobs')}. Finished chunks are kept: run the same command to resume."
    )


# ---- workers that hang


@dataclass(slots=True)
class StallDetector:
    """Finds workers that hang, in a sequence of looks at their markers; times are seconds of one clock."""

    limit: float  # without a step, while rows are in flight
    pulses: dict[int, tuple[int, float]] = field(default_factory=dict)  # process id -> its pulse, since when
    looked: float = float("-inf")  # last
    alive: float = float("-inf")  # last sign of life: a worker on a chunk, or the end of one

    def look(self, now: float, sightings: Sequence[Sighting]) -> list[int]:
        """Process ids of the workers that hang; one that loads its model or writes its part has STALL_SECONDS."""
        if now - self.looked > PAUSE_SECONDS:  # the workers may have been stopped too
            self.pulses.clear()
            self.alive = now
        self.looked = now
        if any(sighting.working for sighting in sightings):
            self.alive = now
        stuck = []
        for sighting in sightings:
            pulse, since = self.pulses.get(sighting.pid, (None, now))
            if pulse != sighting.pulse:
                self.pulses[sighting.pid] = sighting.pulse, now
            elif sighting.working and now - since > (self.limit if sighting.in_flight else STALL_SECONDS):
                stuck.append(sighting.pid)
        return stuck

    @property
    def is_silent(self) -> bool:
        """Whether no worker began a chunk for STALL_SECONDS."""
        return self.looked - self.alive > STALL_SECONDS
