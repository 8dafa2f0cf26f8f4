"""Worker processes of this machine: chunks out, receipts in; lost chunks are done again, workers that hang are killed.

What to do after a loss is decided in blame.py. Not joblib.Parallel: only loky's futures say which chunk was lost.
"""

import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Collection, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TypeAlias

from joblib.externals.loky import ProcessPoolExecutor
from joblib.externals.loky.backend.resource_tracker import _resource_tracker as loky_tracker
from joblib.externals.loky.process_executor import ShutdownExecutorError

from batchgen.errors import BatchgenError
from batchgen.limits import FEW_THREADS, reached_limit, reason_of
from batchgen.options import say
from batchgen.types import MAX_INT, Chunk, Receipt, TokenizedRequest
from batchgen.workers.blame import (
    STALL_SECONDS,
    UNSEEN,
    History,
    Loss,
    StallDetector,
    Trial,
    find_culprits,
    find_gone,
    find_guilty,
    next_trial,
    stall_reason,
)
from batchgen.workers.marker import read_sightings
from batchgen.workers.supply import Supply
from batchgen.workers.worker import OUT_OF_MEMORY, WorkerSetup, become_worker, run_chunk

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
OF_A_TERMINAL = {signal.SIGINT, signal.SIGHUP}  # Ctrl-C, and its end: sent to all processes
IDLE_SECONDS = 10  # a worker without work ends after this

ChunkFuture: TypeAlias = "Future[Receipt]"


def _start_trackers() -> None:
    """Start the processes that clear up after a killed run; they would warn that they do."""
    sys.warnoptions.append("ignore:resource_tracker")  # passed to new processes
    try:
        resource_tracker.ensure_running()
        loky_tracker.ensure_running()
    finally:
        sys.warnoptions.pop()


@contextmanager
def no_interrupts_to_workers() -> Iterator[None]:
    """Processes started in this block inherit a mask: a terminal's signals reach this one alone, which ends them."""
    safe_path = os.environ.get("PYTHONSAFEPATH", "")
    os.environ["PYTHONSAFEPATH"] = "1"  # no file of the current folder is a library of its name, such as random.py
    before = signal.pthread_sigmask(signal.SIG_BLOCK, OF_A_TERMINAL)
    try:
        _start_trackers()  # which lifts the mask in part
        signal.pthread_sigmask(signal.SIG_BLOCK, OF_A_TERMINAL)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.environ["PYTHONSAFEPATH"] = safe_path  # empty is as good as unset


@contextmanager
def starting_workers() -> Iterator[None]:
    """Start processes in this block, as in no_interrupts_to_workers; BatchgenError says what the system refuses."""
    try:
        with no_interrupts_to_workers():
            yield
    except (BrokenProcessPool, ShutdownExecutorError):
        raise
    except (OSError, RuntimeError) as error:
        limit = reached_limit(error)
        if limit is None and not isinstance(error, OSError):
            raise
        place = "semaphores need room in shared memory (/dev/shm)"
        if isinstance(error, FileNotFoundError):
            place = "the current folder was removed, and this command began in it"
        name = getattr(error, "filename", None) or place
        reason = limit or f"{reason_of(error)}: {name}; correct that"
        kept = "finished chunks are kept: run the same command to resume"
        raise BatchgenError(f"a worker process cannot be started: {reason}; {kept}") from error


def start_failure() -> str:
    """Why a new process cannot be a worker: the last line of its error and the file; empty if it can."""
    code = f"import sys; sys.path[:] = {sys.path!r}; import batchgen.workers.worker"
    try:
        with no_interrupts_to_workers():
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", errors="replace")
    except OSError as error:
        return str(error)
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    files = [line for line in lines if line.startswith("File ")]
    return f"{lines[-1]} ({files[-1] if files else sys.executable})" if done.returncode and lines else ""


# By process, as a fork may not touch its parent's: the executors that are between two runs, and their jobs. loky's own
# reusable executor is joblib's too, which fails on one that it did not make, and it is one for all threads.
_idle: defaultdict[int, list[tuple[int, ProcessPoolExecutor]]] = defaultdict(list)


def take_executor(jobs: int) -> ProcessPoolExecutor:
    """An executor of `jobs` workers for one run: that of the last run, if it has as many, or a new one."""
    idle = _idle[os.getpid()]
    while idle:
        with suppress(IndexError):  # another thread took it
            found, executor = idle.pop()
            if found == jobs and not is_over(executor) and not has_lost_manager(executor):
                return executor
            end_workers(executor)
    parent = (os.getpid(),)
    with starting_workers():
        executor = ProcessPoolExecutor(jobs, None, None, IDLE_SECONDS, None, become_worker, parent, FEW_THREADS)
        executor._call_queue._start_thread()  # loky's own thread would start it, and die in silence if it cannot
    return executor


def keep_executor(jobs: int, executor: ProcessPoolExecutor) -> None:
    """Its run is over: the next one may take it."""
    _end_idle_at_exit()
    _idle[os.getpid()].append((jobs, executor))


@cache
def _end_idle_at_exit() -> None:
    """Runs before loky's handler, which is registered earlier, asks workers to end, and waits half a second for it."""
    with suppress(AttributeError, RuntimeError):  # another Python; an interpreter that already ends
        threading._register_atexit(end_idle)  # type: ignore[attr-defined]


def end_idle() -> None:
    """Kill the workers of this process that are between two runs."""
    for _, executor in _idle.pop(os.getpid(), ()):
        end_workers(executor)


def is_over(executor: ProcessPoolExecutor) -> bool:
    return bool(executor._flags.broken or executor._flags.shutdown)


def end_workers(executor: ProcessPoolExecutor) -> None:
    """Kill the workers. shutdown(kill_workers=True) fails in its thread if work was not given out yet."""
    for pid in list(executor._processes or ()):
        _kill(pid)
    manager = executor._executor_manager_thread
    executor.shutdown(wait=manager is None or manager.ident is not None)  # a thread that never started cannot be joined


def has_lost_manager(executor: ProcessPoolExecutor) -> bool:
    """Whether loky's thread that hands out chunks and notices dead workers has ended before its executor."""
    manager = executor._executor_manager_thread
    return manager is not None and not manager.is_alive() and not is_over(executor)


def exit_codes(error: BaseException | None) -> str:
    """` (SIGKILL(-9))`: joblib's text ends in the exit codes, as `{SIGKILL(-9)}`."""
    codes = re.search(r"\{(.*)\}", str(error))
    return f" ({codes[1].replace(f'EXIT({OUT_OF_MEMORY})', 'out of memory')})" if codes else ""


class Pool:
    """Up to `jobs` worker processes that write parts into the attempt's directory."""

    def __init__(self, setup: WorkerSetup, attempt: Path, jobs: int, row_timeout: float | None = None) -> None:
        """row_timeout: seconds without a step after which a worker hangs."""
        self.setup, self.jobs = setup, jobs
        self.attempt = attempt.absolute()  # workers of an earlier run may be in another folder
        self.markers = Path(setup.markers) if setup.markers else self.attempt
        self.row_timeout = row_timeout or STALL_SECONDS
        self.longest = 0.0  # seconds of a chunk
        self._has_done_one = False
        self._history = History()
        self._hung: set[int] = set()  # process ids that were killed because they hung
        self._dead: set[int] = set()  # process ids that were gone when the pool was found broken
        self._executor: ProcessPoolExecutor | None = None

    def receipts(self, chunks: Iterator[Chunk]) -> Generator[Receipt, None, None]:
        """Do the chunks; yields their receipts as they come. Kills the workers if it is closed before its end.

        Raises what reading `chunks` raises, when the chunks given out before are done.
        """
        supply = Supply(chunks)
        futures: dict[ChunkFuture, Chunk] = {}
        stall = StallDetector(self.row_timeout)
        try:
            while True:
                while len(futures) < self._room() and (chunk := supply.take()):
                    futures[self._submit(chunk)] = chunk
                if not futures:
                    break
                finished = self._wait(futures, stall, self._executor)
                for future in [f for f in finished if f.exception() is None]:
                    del futures[future]
                    self._history.add_progress(future.result().ok)
                    self._has_done_one = True
                    self.longest = max(self.longest, future.result().seconds)
                    yield future.result()
                if lost := [(futures.pop(future), future) for future in finished if future in futures]:
                    supply.again.extend(self._after_loss(lost))
        except BaseException:
            if self._executor:
                end_workers(self._executor)
            raise
        if self._executor:
            keep_executor(self.jobs, self._executor)
        if supply.failure:
            raise supply.failure

    def _room(self) -> int:
        """Chunks to give out: one more than there are workers, so that no worker waits for its next.

        Not before a chunk is done: how long one takes is not known then, and it may be all of a time limit.
        """
        return 1 if self._history.is_short_of_memory else self.jobs + self._has_done_one

    def _submit(self, chunk: Chunk) -> ChunkFuture:
        while True:
            if self._executor is None or is_over(self._executor):
                self._executor = take_executor(self.jobs)
            with suppress(BrokenProcessPool, ShutdownExecutorError):  # it broke just now; the next one is new
                return self._submit_to(self._executor, chunk, self.setup)

    def _submit_to(self, executor: ProcessPoolExecutor, chunk: Chunk, setup: WorkerSetup) -> ChunkFuture:
        with starting_workers():
            future: ChunkFuture = executor.submit(run_chunk, setup, chunk, str(self.attempt))
        future.add_done_callback(self._note_dead)
        return future

    def _note_dead(self, future: ChunkFuture) -> None:
        """Called by loky when it finds a worker dead, before it kills the other workers of the pool."""
        if isinstance(future.exception(), BrokenProcessPool):
            self._dead |= {sighting.pid for sighting in read_sightings(self.markers) if not _is_alive(sighting.pid)}

    def _wait(
        self, futures: Collection[ChunkFuture], stall: StallDetector, executor: ProcessPoolExecutor | None
    ) -> list[ChunkFuture]:
        """The futures that have ended, at least one; all if the pool is broken. Kills workers that hang."""
        stall.silent = 0.0
        while True:
            finished, others = wait(futures, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
            if any(map(_is_broken, finished)):
                finished |= wait(others, timeout=POLL_SECONDS).done  # loky fails them one after another
            if finished:
                return list(finished)
            sightings = read_sightings(self.markers)
            waiting = [sighting.pid for sighting in sightings if _is_waiting(sighting.pid)]
            for pid in stall.look(time.monotonic(), sightings, waiting):
                self._hung.add(pid)
                _kill(pid)
            if executor and has_lost_manager(executor):
                what = "the thread that gives chunks to the workers has ended, perhaps at a limit on processes or files"
                raise BatchgenError(f"{what}; finished chunks are kept: run the same command to resume")
            if executor and stall.is_silent:  # no worker begins a chunk
                end_workers(executor)

    def _after_loss(self, lost: Sequence[tuple[Chunk, ChunkFuture]]) -> list[Chunk]:
        """The chunks to do again, without the rows that end their worker."""
        if not read_sightings(self.markers) and (failure := start_failure()):
            raise BatchgenError(f"a worker process cannot start: {failure}; correct that and run again")
        losses = [_loss(chunk, future) for chunk, future in lost]
        culprits = {loss.chunk: loss for loss in self._culprits(losses)}
        self._history.losses += 1
        again = [
            self._without_guilty(chunk, culprits[chunk.index]) if chunk.index in culprits else chunk
            for chunk, _ in lost
        ]
        self._history.check(losses[0])
        return again

    def _culprits(self, losses: Sequence[Loss]) -> list[Loss]:
        """The losses whose own worker raised, died or hung; removes the markers of workers that are gone."""
        sightings = read_sightings(self.markers)
        culprits = find_culprits(losses, sightings, self._dead | self._hung)
        for sighting in find_gone(losses, sightings):
            (self.markers / f"worker-{sighting.pid}").unlink(missing_ok=True)
        return [
            replace(loss, reason=stall_reason(loss.sighting.phase, self.row_timeout))
            if loss.has_died and loss.sighting.pid in self._hung
            else loss
            for loss in culprits
        ]

    def _without_guilty(self, chunk: Chunk, loss: Loss) -> Chunk:
        """The chunk after a trial of its suspects: those that end a worker of their own are failed."""
        trial = next_trial(self._history, loss, chunk)
        suspects = {i.row: i for i in chunk.items if i.row in trial.rows and isinstance(i, TokenizedRequest)}
        first = f", after {len(suspects)} of its rows are tried alone" if suspects else ""
        logger.warning("chunk %d: its worker %s; it is done again%s", chunk.index, loss.reason, first)
        failed = {}
        try_rows = lambda rows: self._try([suspects[row] for row in rows], chunk, trial)  # noqa: E731
        for row, end in find_guilty(self._history, suspects, try_rows):
            reason = f"its worker {end.reason}, also with this row alone; {say('retry_failed')} tries it again"
            failed[row] = suspects[row].failed(reason)
            logger.warning("%s", failed[row].error)
        if failed:
            self._history.add_cause(chunk.index)
        return replace(chunk, items=tuple(failed.get(item.row, item) for item in chunk.items))

    def _try(self, items: Sequence[TokenizedRequest], chunk: Chunk, trial: Trial) -> Loss | None:
        """Complete rows of a chunk one by one in a worker of their own; None if it lives."""
        most = 1 if trial.is_first_step else MAX_INT
        tried = tuple(item.with_new_tokens(most) for item in items)
        part = replace(chunk, items=tried, kept=None, reused=None)
        executor = take_executor(1)
        try:
            future = self._submit_to(executor, part, replace(self.setup, max_batch=1, share_prefixes=False))
            self._wait([future], StallDetector(self.row_timeout), executor)
        finally:
            end_workers(executor)
        if future.exception() is None:
            return None
        loss = _loss(part, future)
        return next(iter(self._culprits([loss])), loss)


def _loss(chunk: Chunk, future: ChunkFuture) -> Loss:
    """How a future ended without a receipt; raises an error that concerns the whole job, such as a full disk."""
    error = future.exception()
    if isinstance(error, (BatchgenError, OSError)):
        raise error
    if _is_broken(future):
        return Loss(chunk.index, f"died{exit_codes(error)}")
    reason = f"raised {' '.join(str(error).split())}"
    return Loss(chunk.index, reason, has_died=False, sighting=getattr(error, "sighting", UNSEEN))


def _is_broken(future: ChunkFuture) -> bool:
    return isinstance(future.exception(), (BrokenProcessPool, ShutdownExecutorError))


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _is_waiting(pid: int) -> bool:
    """Whether a process waits for the disk or is stopped, if this system says so."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][:1] in {*"DTt"}
    return False


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
