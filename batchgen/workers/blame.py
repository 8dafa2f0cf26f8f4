"""Decisions after a worker is lost: the cause, what is tried next, when the run gives up; and which workers hang.

A chunk that lost its worker is done again by a fresh worker. Before that, some of its rows, the suspects, are tried
one by one in a worker of their own. If that ends too, it may have been killed from outside: the row that it was at is
tried again, in further workers. The row fails if it ends SAME_STEP of them in a row at the same step, which kills from
outside hardly ever hit again and again, and the chunk is done again without it.

    loss of a chunk   suspects
    1st               the rows that the worker had just begun to read, or was about to write down; if there are
                      several, only the first token of each
    2nd               the rows in flight at both losses
    3rd, 4th          all rows; from here on one worker at a time, as memory may be short
    5th               the run gives up

A worker that writes its part has completed all rows, so its end is no row's fault, and none is tried.
Nothing here starts a process, reads a file or asks for the time; pool.py does.
"""

from collections.abc import Callable, Collection, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from batchgen.errors import BatchgenError
from batchgen.options import say
from batchgen.types import Chunk
from batchgen.workers.marker import Phase, Sighting

MAX_LOSSES = 5  # of one chunk, or in a row
SAME_STEP = 5  # workers in a row that a row ends alone, at the same step: then it fails
MAX_ALONE = 18  # workers in a row that end at a row alone, at different steps: then the run gives up
MAX_FAILED = 16  # rows in a row, with none between them that was completed
STALL_SECONDS = 600.0  # no step, no start and no part takes so long on any usable machine
LOOK_SECONDS = 1.0  # if a look at the workers comes later, this process was stopped or busy, and perhaps they were


# ---- losses

UNSEEN = Sighting(0, 0, Phase.STARTING, 0, 0, 0, 0, (), ())  # of a worker that has written no marker


@dataclass(frozen=True, slots=True)
class Loss:
    """A chunk that lost its worker. `reason` completes a sentence: its worker `died (SIGKILL(-9))`."""

    chunk: int
    reason: str
    has_died: bool = True  # False: the worker raised an exception and lives
    sighting: Sighting = UNSEEN  # what the worker did at the moment of the loss


def find_culprits(losses: Sequence[Loss], sightings: Iterable[Sighting], dead: Collection[int]) -> list[Loss]:
    """The losses whose own worker raised or died, each with its sighting; dead are process ids.

    When one worker of a pool dies, loky kills the others: their chunks are lost too, but are not the cause.
    """
    working = {sighting.chunk: sighting for sighting in sightings if sighting.phase}
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
            if sighting.phase and (len(losses) > 1 or sighting.chunk == losses[0].chunk):
                yield sighting


@dataclass(slots=True)
class History:
    """What a run has lost since it last made progress."""

    losses: int = 0  # in a row, since a chunk was last done
    failed: int = 0  # rows in a row, since one was last completed
    chunks: dict[int, list[set[int]]] = field(default_factory=dict)  # the rows in flight at each loss of a chunk
    is_short_of_memory: bool = False  # perhaps: one worker at a time

    def add_progress(self, ok: int) -> None:
        """A chunk is done, with so many completed rows."""
        self.losses, self.failed = 0, 0 if ok else self.failed

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
    losses = history.chunks.setdefault(loss.chunk, [])
    losses.append({*loss.sighting.in_flight})
    if len(losses) >= MAX_LOSSES:
        raise no_cause(len(losses), f" on {chunk.words}", loss)
    history.is_short_of_memory |= len(losses) > 2
    if loss.sighting.phase == Phase.WRITING:
        return Trial(frozenset())
    if len(losses) == 1:
        # What ends a worker at the first step of several rows does so again; a single row is tried to its end.
        suspects = frozenset(loss.sighting.suspects)
        return Trial(suspects, is_first_step=len(suspects) > 1)
    return Trial(frozenset(losses[0] & losses[1] if len(losses) == 2 else (item.row for item in chunk.items)))


def _next_end(rows: list[int], try_rows: TryRows) -> Loss | None:
    """Try the rows until a worker ends at one of them; None if one completes them all."""
    early = 0
    while (loss := try_rows(rows)) and loss.sighting.phase != Phase.WRITING:
        if loss.sighting.phase == Phase.ROWS:
            return loss
        early += 1
        if early == MAX_LOSSES:
            raise no_cause(early, " before they came to a row", loss)
    return None


def _last_end(row: int, end: Loss | None, try_rows: TryRows) -> Loss | None:
    """Try a row that ended a worker until it fails, and return the last loss; None if a worker completes it."""
    steps = []
    while end:
        steps.append((end.sighting.in_flight, end.sighting.step))
        if steps[-SAME_STEP:] == steps[-1:] * SAME_STEP:
            return end
        if len(steps) == MAX_ALONE:
            raise no_cause(MAX_ALONE, f" on input row {row} alone, at different steps", end)
        end = _next_end([row], try_rows)
    return None


def find_guilty(history: History, rows: Iterable[int], try_rows: TryRows) -> Iterator[tuple[int, Loss]]:
    """Try the rows until a worker survives the rest of them; yields each row that fails, and how its last worker ended.

    BatchgenError if the rows are not the cause: workers end before they come to one, or one after another fails.
    """
    left = list(rows)
    while left and (loss := _next_end(left, try_rows)):
        history.failed = 0 if loss.sighting.rows else history.failed
        row = next(iter(loss.sighting.in_flight), left[0])  # none is, while a pass reads a shared prefix alone
        left.remove(row)
        if last := _last_end(row, loss, try_rows):
            if history.failed == MAX_FAILED:
                raise no_cause(SAME_STEP, f" on each of {MAX_FAILED + 1} rows, the last of them input row {row}", last)
            history.failed += 1
            yield row, last


def no_cause(times: int, where: str, last: Loss) -> BatchgenError:
    """The error of a run that gives up."""
    return BatchgenError(
        f"{times} workers were lost in a row{where}, and no row was identified as the cause; the last {last.reason}. "
        f"If memory ran out, lower {say('jobs')}. Finished chunks are kept: run the same command to resume."
    )


# ---- workers that hang


def stall_reason(phase: Phase, limit: float) -> str:
    """What a worker that hangs did not do; the reason of a Loss."""
    if phase == Phase.ROWS:
        return f"took no step for {limit:g} s ({say('row_timeout')})"
    return f"did not begin its rows, or not write its part, within {max(limit, STALL_SECONDS):g} s"


@dataclass(slots=True)
class StallDetector:
    """Finds workers that hang, in a sequence of looks at their markers; times are seconds of one clock.

    Between two looks a second counts at most: after more, this process was stopped or busy, or the machine slept.
    """

    limit: float  # of work on rows without a step
    pulses: dict[int, tuple[int, float, float]] = field(default_factory=dict)  # process id -> pulse, at rows, in all
    looked: float = float("inf")  # last
    silent: float = 0.0  # since a worker was on a chunk, or ended one

    def look(self, now: float, sightings: Sequence[Sighting], waiting: Container[int] = ()) -> list[int]:
        """Process ids of the workers that hang; `waiting` has those of workers that wait for the disk or are stopped.

        A start, the writing of a part and a wait are no work on rows, and have STALL_SECONDS.
        """
        passed = max(min(now - self.looked, LOOK_SECONDS, self.limit / 4), 0.0)
        self.looked = now
        self.silent = 0.0 if any(sighting.phase for sighting in sightings) else self.silent + passed
        stuck = []
        for sighting in sightings:
            pulse, at_rows, in_all = self.pulses.get(sighting.pid, (None, 0.0, 0.0))
            if not sighting.phase or pulse != sighting.pulse:
                self.pulses[sighting.pid] = sighting.pulse, 0.0, 0.0
                continue
            in_all += passed
            at_rows += passed if sighting.phase == Phase.ROWS and sighting.pid not in waiting else 0.0
            self.pulses[sighting.pid] = sighting.pulse, at_rows, in_all
            if at_rows > self.limit or in_all > max(self.limit, STALL_SECONDS):
                stuck.append(sighting.pid)
        return stuck

    @property
    def is_silent(self) -> bool:
        return self.silent > max(self.limit, STALL_SECONDS)
