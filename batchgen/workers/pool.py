"""Worker processes, and what happens to their chunks when one dies, hangs, or raises.

The rule: a chunk that lost its worker is done again, in a fresh pool. The rows that the worker had just taken up are
first tried one by one in a worker of their own; one that ends that worker too is set aside as failed, and the chunk
is done again without it. So a row that kills whatever reads it costs two workers, and every other row is completed.

    lost for the   tried alone before the chunk is done again
    1st time       the rows that the worker had begun to read, or to write down, at that moment
    2nd time       the rows that were in flight both times
    3rd time       all rows of the chunk; from here on with one worker at a time, as it may be for lack of memory

loky's executor is used as joblib hands it out, not joblib.Parallel: only futures tell which chunk was lost.
"""

import logging
import os
import re
import signal
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from joblib.externals.loky import ProcessPoolExecutor, get_reusable_executor
from joblib.externals.loky.process_executor import ShutdownExecutorError

from batchgen.errors import BatchgenError
from batchgen.types import Chunk, Receipt, Rejected, TokenizedRequest
from batchgen.workers.worker import OUT_OF_MEMORY, Sighting, WorkerSetup, become_worker, read_sightings, run_chunk

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
STALL_SECONDS = 600.0  # no step takes so long, and no start, on any machine that would be used for this
IDLE_SECONDS = 10  # a worker without work goes after that
MAX_LOSSES = 5  # of one chunk, or in a row without anything done between
MAX_FAILED = 16  # rows in a row without one between that could be generated

_Lost = tuple[Chunk, "Future[Receipt]"]
_Ended = tuple["Future[Receipt]", Sighting | None]  # how a worker was lost, and what it was doing


@dataclass(slots=True)
class _Loss:
    """Of one chunk's workers: how many, and the rows that were in flight every time."""

    times: int = 0
    in_flight: frozenset[int] | None = None

    def add(self, sighting: Sighting | None) -> None:
        rows = frozenset(sighting.in_flight if sighting else ())
        self.in_flight = rows if self.in_flight is None else self.in_flight & rows
        self.times += 1


@dataclass(slots=True)
class _Stall:
    """Notices workers whose pulse has stopped."""

    limit: float  # seconds, while rows are in flight
    seen: dict[int, tuple[int, float]] = field(default_factory=dict)  # pid -> pulse, and since when
    looked: float = field(default_factory=time.monotonic)

    def stuck(self, sightings: Sequence[Sighting]) -> list[int]:
        """Process ids of the workers that have been on the same rows for longer than the limit."""
        now = time.monotonic()
        if now - self.looked > 20 * POLL_SECONDS:  # this process was stopped, and so may they have been
            self.seen.clear()
        self.looked = now
        stuck = []
        for sighting in sightings:
            pulse, since = self.seen.get(sighting.pid, (None, now))
            if pulse != sighting.pulse:
                self.seen[sighting.pid] = sighting.pulse, now
                continue
            limit = self.limit if sighting.in_flight else STALL_SECONDS
            if sighting.working and now - since > limit:
                stuck.append(sighting.pid)
        return stuck


class Supply:
    """Chunks to give out: those that are to be done again first, then those of the run."""

    def __init__(self, chunks: Iterator[Chunk]) -> None:
        self.again: deque[Chunk] = deque()
        self.failure: Exception | None = None  # of reading the run's, for when what is under way has ended
        self._chunks = chunks

    def take(self) -> Chunk | None:
        """The next one; None where there is none now."""
        if self.again:
            return self.again.popleft()
        try:
            return next(self._chunks, None)
        except Exception as error:
            self._chunks, self.failure = iter(()), error
            return None


class Pool:
    """Up to `jobs` worker processes that write parts into the attempt's directory."""

    def __init__(self, setup: WorkerSetup, attempt: Path, jobs: int, row_timeout: float | None = None) -> None:
        """row_timeout: seconds after which a worker that takes no step is taken for hung."""
        self.setup, self.jobs = setup, jobs
        self.in_flight = jobs + 1  # chunks given out: one more than are worked on, so that no worker has to wait
        self.attempt = attempt.absolute()  # workers of an earlier run may be in another folder
        self.markers = Path(setup.markers) if setup.markers else self.attempt
        self.row_timeout = row_timeout or STALL_SECONDS
        self.losses: dict[int, _Loss] = {}  # by chunk
        self.losses_in_a_row = 0
        self.failed_in_a_row = 0  # rows
        self.longest = 0.0  # seconds that a chunk took
        self.hung: set[int] = set()  # process ids that were killed for it
        self.dead: set[int] = set()  # process ids that were, when the pool was found broken
        self._executor: Any = None
        self._start = {"initializer": become_worker, "initargs": (setup.parent,)}

    def receipts(self, chunks: Iterator[Chunk]) -> Generator[Receipt, None, None]:
        """Do the chunks; yields their receipts as they come. Ends the workers when it is closed before its end.

        Raises what reading `chunks` raises, after what is under way; the BatchgenError of a worker that cannot
        write; and one of its own where workers keep dying and no row is to blame.
        """
        supply = Supply(chunks)
        futures: dict[Future[Receipt], Chunk] = {}
        stall = _Stall(self.row_timeout)
        try:
            while True:
                while len(futures) < self.in_flight and (chunk := supply.take()):
                    futures[self._submit(chunk)] = chunk
                if not futures:
                    break
                finished = self._wait(futures, stall)
                for future in [f for f in finished if f.exception() is None]:
                    del futures[future]
                    self.losses_in_a_row = self.failed_in_a_row = 0
                    self.longest = max(self.longest, future.result().seconds)
                    yield future.result()
                if lost := [(futures.pop(future), future) for future in finished if future in futures]:
                    supply.again.extend(self._after_loss(lost))
        except BaseException:
            self._end_workers()
            raise
        if supply.failure:
            raise supply.failure

    def _submit(self, chunk: Chunk) -> "Future[Receipt]":
        while True:
            with no_interrupts_to_workers():
                self._executor = get_reusable_executor(self.jobs, timeout=IDLE_SECONDS, **self._start)
            with suppress(BrokenProcessPool, ShutdownExecutorError):  # it died just now: the next is a fresh one
                return self._submit_to(self._executor, chunk, self.setup)

    def _submit_to(self, executor: Any, chunk: Chunk, setup: WorkerSetup) -> "Future[Receipt]":
        with no_interrupts_to_workers():
            future: Future[Receipt] = executor.submit(run_chunk, setup, chunk, str(self.attempt))
        future.add_done_callback(self._note_the_dead)
        return future

    def _note_the_dead(self, future: "Future[Receipt]") -> None:
        """loky calls this when it has found a worker dead, and before it kills the others of the pool."""
        if isinstance(future.exception(), BrokenProcessPool):
            self.dead |= {sighting.pid for sighting in read_sightings(self.markers) if not _is_alive(sighting.pid)}

    def _wait(self, futures: dict["Future[Receipt]", Chunk], stall: _Stall) -> list["Future[Receipt]"]:
        """The futures that have ended, at least one; all of them where the pool is broken. Kills what hangs."""
        last_sign = time.monotonic()
        while True:
            finished, others = wait(futures, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
            if any(_is_broken(future) for future in finished):
                finished |= wait(others, timeout=POLL_SECONDS).done  # loky fails them one after another
            if finished:
                return list(finished)
            sightings = read_sightings(self.markers)
            if any(sighting.working for sighting in sightings):
                last_sign = time.monotonic()
            for pid in stall.stuck(sightings):
                self.hung.add(pid)
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() - last_sign > STALL_SECONDS:  # none has even begun
                self._end_workers()

    def _after_loss(self, lost: Sequence[_Lost]) -> Iterator[Chunk]:
        """The chunks to be done again, without the rows that are to blame."""
        for _, future in lost:
            _raise_a_jobs_error(future)
        blamed = self._blamed(lost)
        self.losses_in_a_row += 1
        for chunk, future in lost:
            yield self._judged(chunk, future, blamed[chunk.index]) if chunk.index in blamed else chunk
        if self.losses_in_a_row >= MAX_LOSSES:
            raise BatchgenError(_notice(lost[0][1], self.losses_in_a_row, ""))

    def _blamed(self, lost: Sequence[_Lost]) -> dict[int, Sighting | None]:
        """The chunks whose own worker died or raised, with what it was doing; a broken pool's markers are removed."""
        sightings = {s.chunk: s for s in read_sightings(self.markers) if s.working}
        blamed: dict[int, Sighting | None] = {}
        alone = len(lost) == 1  # nobody else can have died; and loky may call _note_the_dead later than this
        for chunk, future in lost:
            sighting = sightings.get(chunk.index)
            if not _is_broken(future):
                blamed[chunk.index] = getattr(future.exception(), "sighting", None)
            elif sighting and (alone or sighting.pid in self.dead | self.hung):
                blamed[chunk.index] = sighting
        for sighting in sightings.values():
            if _is_broken(lost[0][1]) and (not alone or sighting.chunk == lost[0][0].index):
                (self.markers / f"worker-{sighting.pid}").unlink(missing_ok=True)
        return blamed

    def _judged(self, chunk: Chunk, future: "Future[Receipt]", sighting: Sighting | None) -> Chunk:
        """The chunk as it is to be done again: as it was, or with a failed row."""
        loss = self.losses.setdefault(chunk.index, _Loss())
        loss.add(sighting)
        if loss.times >= MAX_LOSSES:
            where = f" on input rows {chunk.first_row} to {chunk.items[-1].row}"
            raise BatchgenError(_notice(future, loss.times, where))
        if loss.times == 1:
            suspects = frozenset(sighting.suspects) if sighting else frozenset()
        elif loss.times == 2:
            suspects = loss.in_flight or frozenset()
        else:
            suspects = frozenset(item.row for item in chunk.items)
            self.in_flight = 1
        trial = f", after {len(suspects)} of its rows were tried one by one" if suspects else ""
        logger.warning("chunk %d: %s; it is done again%s", chunk.index, self._how(future, sighting), trial)
        # What happened at the first step of several happens at the first step again; a single one is tried to its end.
        first_step = loss.times == 1 and len(suspects) > 1
        failed = {item.row: item for item in self._guilty(chunk, suspects, first_step=first_step)}
        if failed:
            self.losses_in_a_row = 0
            del self.losses[chunk.index]
        return replace(chunk, items=tuple(failed.get(item.row, item) for item in chunk.items))

    def _guilty(self, chunk: Chunk, suspects: frozenset[int], *, first_step: bool) -> Iterator[Rejected]:
        """Have the suspects generated one by one in a worker of their own; yields those that are the end of it, failed.

        A worker that dies when it has long taken the row up may have been killed from outside: it has another try.
        Where it dies before it comes to a row, or one row after another is the end of it, the rows are not to blame.
        """
        untried = {i.row: i for i in chunk.items if i.row in suspects and isinstance(i, TokenizedRequest)}
        doubted: set[int | None] = set()
        while untried and (loss := self._try_one_by_one(chunk, list(untried.values()), first_step)):
            future, sighting = loss
            row = next(iter(sighting.in_flight), None) if sighting else None
            if sighting and sighting.rows:
                self.failed_in_a_row = 0
            if self.failed_in_a_row >= MAX_FAILED:
                raise BatchgenError(_notice(future, self.failed_in_a_row + 1, f", last on input row {row} alone"))
            if sighting is None or row is None:
                if None in doubted:
                    raise BatchgenError(_notice(future, 2, " before it came to a row"))
            elif not _is_broken(future) or row in sighting.suspects or row in doubted:
                how = self._how(future, sighting)
                failed = untried.pop(row).failed(f"{how}, also when alone in it; --retry-failed tries it once more")
                logger.warning("%s", failed.error)
                self.failed_in_a_row += 1
                yield failed
            doubted.add(row)

    def _try_one_by_one(
        self, chunk: Chunk, items: Sequence[TokenizedRequest], first_step: bool
    ) -> "tuple[Future[Receipt], Sighting | None] | None":
        """None if all is well with all of them, or how the worker was lost, and with which of them in flight."""
        alone = replace(self.setup, max_batch=1, share_prefixes=False)
        tried = tuple(item.with_max_tokens(1) for item in items) if first_step else tuple(items)
        trial = replace(chunk, items=tried, kept=None)
        with self._one_worker() as executor:
            future = self._submit_to(executor, trial, alone)
            self._wait({future: trial}, _Stall(self.row_timeout))
        if future.exception() is None:
            return None
        _raise_a_jobs_error(future)
        return future, self._blamed([(trial, future)]).get(chunk.index)

    @contextmanager
    def _one_worker(self) -> Iterator[Any]:
        with no_interrupts_to_workers():
            executor = ProcessPoolExecutor(1, **self._start)
        try:
            yield executor
        finally:
            end_workers(executor)

    def _how(self, future: "Future[Receipt]", sighting: Sighting | None) -> str:
        """The end of a worker, in words."""
        if not _is_broken(future):
            return f"its worker raised {' '.join(str(future.exception()).split())}"
        if sighting and sighting.pid in self.hung:
            return f"its worker took no step for {self.row_timeout:g} s (--row-timeout)"
        return f"its worker died{exit_codes(future.exception())}"

    def _end_workers(self) -> None:
        """At once, whatever they are doing."""
        if self._executor is not None:
            end_workers(self._executor)


def end_workers(executor: Any) -> None:
    """At once; shutdown(kill_workers=True) has its thread trip over work that it has not handed out yet."""
    for pid in list(executor._processes or ()):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    executor.shutdown(wait=True)


def _is_broken(future: "Future[Any]") -> bool:
    return isinstance(future.exception(), (BrokenProcessPool, ShutdownExecutorError))


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def exit_codes(error: BaseException | None) -> str:
    """joblib's text ends in the exit codes: `{SIGKILL(-9)}`."""
    codes = re.search(r"\{(.*)\}", str(error))
    return f" ({codes[1].replace(f'EXIT({OUT_OF_MEMORY})', 'out of memory')})" if codes else ""


def _notice(future: "Future[Any]", times: int, where: str) -> str:
    how = exit_codes(future.exception()) if _is_broken(future) else f" ({future.exception()})"
    return (
        f"a worker process died {times} times in a row{where}{how} and no single row is to blame, perhaps for lack "
        "of memory; what is finished is kept: run again to go on, with fewer --jobs if so"
    )


def _raise_a_jobs_error(future: "Future[Any]") -> None:
    """What a worker says is wrong with the job as a whole, such as a full disk."""
    error = future.exception()
    if isinstance(error, (BatchgenError, OSError)):
        raise error


@contextmanager
def no_interrupts_to_workers() -> Iterator[None]:
    """What is started in this block inherits a mask: Ctrl-C reaches this process alone, which ends its workers."""
    resource_tracker.ensure_running()  # whose start would lift the mask
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
