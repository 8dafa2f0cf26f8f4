"""The run's side of a cluster: chunks out, receipts in, as batchgen.workers.pool.Pool on one machine.

A chunk whose worker or node is lost is given out again, up to MAX_LOSSES times; all others go on. A reply counts once,
and only where the part that it tells of is there, whole: a node that was believed dead may still send one.
"""

import logging
import pickle
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import IO

from batchgen import __version__
from batchgen.errors import BatchgenError, StoppedError, UsageError
from batchgen.types import Chunk, Receipt
from batchgen.workers.cluster.lease import held_lease
from batchgen.workers.cluster.messages import CONNECT_SECONDS, Event, NodeSetup, Order, Reply, receive, send
from batchgen.workers.pool import MAX_LOSSES, POLL_SECONDS, STALL_SECONDS, Supply, no_interrupts_to_workers

logger = logging.getLogger(__name__)

SILENCE_SECONDS = 20.0  # without a word of the scheduler, it is lost
NO_WORKERS_SECONDS = 30.0  # between two warnings that there are none
GRACE_SECONDS = 60.0  # after the time limit, for what is under way

_PART = re.compile(r"[A-Za-z0-9._-]+/[0-9]{8,}-[0-9]+\.parquet")


@dataclass(frozen=True, slots=True)
class Engine:
    """What to say of one."""

    module: str
    start: str  # how a cluster is started
    option: str  # that names it


ENGINES = {
    "dask": Engine("distributed", "dask scheduler", "--scheduler"),
    "ray": Engine("ray", "ray start --head", "--address"),
}


class Cluster:
    """A connection to a scheduler, through a driver process."""

    def __init__(self, backend: str, address: str) -> None:
        self.where = f"{backend} at {address}"
        self.slots = 0
        self._heard = self._asked = time.monotonic()
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._orders: SimpleQueue[Order | None] = SimpleQueue()
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as the driver writes to it
        command = [sys.executable, "-m", "batchgen.workers.cluster.driver", backend, address]
        with no_interrupts_to_workers():
            self._driver = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log)
            self._listener = threading.Thread(target=self._listen, daemon=True)
            self._listener.start()
            threading.Thread(target=self._speak, daemon=True).start()

    def _listen(self) -> None:
        assert self._driver.stdout is not None
        with suppress(EOFError, OSError, ValueError):
            while True:
                event: Event = pickle.loads(receive(self._driver.stdout))
                self._heard = time.monotonic()
                self._events.put(event)
        self._events.put(Event(error=f"its client ended{self._last_words()}"))

    def _speak(self) -> None:
        """From a thread: a driver that hangs in its engine does not read on, and the run must notice."""
        assert self._driver.stdin is not None
        with suppress(OSError, ValueError):
            while order := self._orders.get():
                send(self._driver.stdin, pickle.dumps(order))

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").split("\n")
        words = [line.strip() for line in lines if line.strip()]
        return f" ({words[-1][:200]})" if words else ""

    def order(self, order: Order) -> None:
        self._orders.put(order)

    def event(self, seconds: float) -> Event | None:
        """The next event of a ticket, if one comes so soon. Raises StoppedError where the scheduler is lost."""
        now, before = time.monotonic(), self._asked
        self._asked = now
        if now - before > SILENCE_SECONDS / 2:  # this process was stopped, and hears now what was said meanwhile
            self._heard = now
        try:
            event = self._events.get(timeout=seconds)
        except Empty:
            silence = time.monotonic() - self._heard
            event = (
                Event(error=f"not a word for {silence:.0f} s") if silence > SILENCE_SECONDS else Event(slots=self.slots)
            )
        if event.ticket is not None:
            return event
        if event.error:
            raise StoppedError(
                f"{self.where} is lost: {event.error}; what is finished is kept: run the same command again to go on"
            )
        self.slots = event.slots
        return None

    def first_word(self) -> None:
        """Wait for the connection; BatchgenError where there is none, with the reason."""
        try:
            event = self._events.get(timeout=2 * CONNECT_SECONDS)
        except Empty:
            event = Event(error=f"no answer within {2 * CONNECT_SECONDS:.0f} s")
        if event.error:
            backend, _, address = self.where.partition(" at ")
            engine = ENGINES[backend]
            raise BatchgenError(
                f"--backend {backend}: no cluster at {address} ({event.error}); start one with `{engine.start}`, or "
                f"give its address with {engine.option}"
            )
        self.slots = event.slots

    def close(self) -> None:
        """The engine sees the driver go, and cancels what it has not begun."""
        self._orders.put(None)
        self._driver.kill()
        self._driver.wait()
        self._listener.join()  # it reads to the end
        for stream in (self._driver.stdin, self._driver.stdout, self._log):
            with suppress(OSError):  # an order that was not sent
                if stream is not None:
                    stream.close()


@contextmanager
def connected(backend: str, address: str) -> Iterator[Cluster]:
    """A connection while the block runs.

    Raises UsageError where the engine is not installed. Where nobody answers that is a BatchgenError with exit code 1,
    not 75: nothing has begun, and an address that is mistyped would be tried for ever by what heeds 75.
    """
    if find_spec(ENGINES[backend].module) is None:
        raise UsageError(f"--backend {backend}: {backend} is not installed here; pip install 'batchgen[{backend}]'")
    cluster = Cluster(backend, address)
    try:
        cluster.first_word()
        yield cluster
    finally:
        cluster.close()


class ClusterPool:
    """Does chunks on a cluster: as many at once as it has slots, up to `jobs`."""

    def __init__(self, cluster: Cluster, setup: NodeSetup, jobs: int | None = None, until: float | None = None) -> None:
        """until: on time.monotonic()'s clock, after which chunks are not waited for where there are no workers."""
        self.cluster, self.jobs, self.until = cluster, jobs, until
        self.attempt = Path(setup.attempt)
        self.longest = 0.0  # seconds that a chunk took
        self._setup = pickle.dumps(setup)
        self._out: dict[int, Chunk] = {}  # by ticket: what was given out and not answered
        self._tickets = 0
        self._losses: Counter[int] = Counter()  # by chunk
        self._workers_seen = self._answered = time.monotonic()

    def receipts(self, chunks: Iterator[Chunk]) -> Generator[Receipt, None, None]:
        """Do the chunks; yields their receipts as they come. Nodes stop what they are doing when it is closed.

        Raises what reading `chunks` raises, after what is under way; the BatchgenError of a node that is not fit for
        the run; one of its own where a chunk is lost again and again; StoppedError where the scheduler is lost.
        """
        supply = Supply(chunks)
        with held_lease(self.attempt) as lease:
            self.cluster.order(Order(0, lease=str(lease)))
            while True:
                while len(self._out) < self._room() and (given := supply.take()):
                    self._give(given)
                if not self._out or self._waits_in_vain():
                    break
                event = self.cluster.event(POLL_SECONDS)
                if event is None:
                    supply.again.extend(self._overdue())
                chunk = self._out.pop(event.ticket, None) if event and event.ticket is not None else None
                if event is None or chunk is None:  # or it is late: the chunk is no longer waited for
                    continue
                receipt, reason = self._answer(chunk, event)
                self._answered = time.monotonic()
                if receipt:
                    self.longest = max(self.longest, receipt.seconds)
                    yield receipt
                else:
                    self._note_loss(chunk, reason)
                    supply.again.append(chunk)
        if supply.failure:
            raise supply.failure

    def _room(self) -> int:
        """Chunks to be out at once. One where there are no workers: it is what more of them are started for.

        No more than there are slots: Dask gives what waits to a worker, which need not be the first to be free.
        """
        return max(min(self.cluster.slots, self.jobs or self.cluster.slots), 1)

    def _give(self, chunk: Chunk) -> None:
        self._tickets += 1
        self._out[self._tickets] = chunk
        arguments = (__version__, str(self.attempt), self._setup, pickle.dumps(chunk))
        self.cluster.order(Order(self._tickets, arguments))

    def _answer(self, chunk: Chunk, event: Event) -> tuple[Receipt | None, str]:
        """A receipt, with its path in full, or why there is none."""
        if event.error:
            raise BatchgenError(
                f"{self.cluster.where} cannot run batchgen's tasks ({event.error}); all nodes need this batchgen, "
                f"{__version__}, and the same Python and libraries"
            )
        if not event.reply:
            return None, event.lost
        reply: Reply = pickle.loads(event.reply)
        for line in reply.warnings:
            logger.warning("node %s: %s", reply.host, line)
        if reply.error:
            raise reply.error
        if reply.receipt is None:
            return None, reply.lost
        receipt = replace(reply.receipt, path=str(self.attempt / reply.receipt.path))
        asked = (receipt.chunk, receipt.input_rows) == (chunk.index, len(chunk.items))
        if not asked or not _PART.fullmatch(reply.receipt.path) or _size(Path(receipt.path)) != reply.size:
            return None, f"{receipt.path} is not the part of {reply.size} bytes that node {reply.host} wrote"
        return receipt, ""

    def _note_loss(self, chunk: Chunk, reason: str) -> None:
        self._losses[chunk.index] += 1
        if self._losses[chunk.index] >= MAX_LOSSES:
            raise BatchgenError(
                f"input rows {chunk.first_row} to {chunk.items[-1].row}: lost {MAX_LOSSES} times, last "
                f"because {reason}; what is finished is kept: run again to go on, with smaller "
                "--chunk-rows if workers do not live so long"
            )
        logger.warning("chunk %d is lost and done again: %s", chunk.index, reason)

    def _overdue(self) -> Iterator[Chunk]:
        """All that is out, to be given out anew, where nothing has come for far longer than a chunk takes.

        The engine believes in a node whose file system hangs; or its slots are others'. What is given up does not
        count if it comes after all.
        """
        patience = max(STALL_SECONDS, 10 * self.longest)
        known = self.longest and self.cluster.slots  # before the first chunk is done, nobody knows how long it takes
        if not known or time.monotonic() - self._answered < patience:
            return
        self._answered = time.monotonic()
        logger.warning(
            "%s: not a chunk done for %.0f s; all that are out are given out anew", self.cluster.where, patience
        )
        for ticket in list(self._out):
            self.cluster.order(Order(ticket))
            yield self._out.pop(ticket)

    def _waits_in_vain(self) -> bool:
        """Whether the time is over and nothing will come soon; says so now and then where there are no workers."""
        now = time.monotonic()
        if self.cluster.slots:
            self._workers_seen = now
        elif now - self._workers_seen > NO_WORKERS_SECONDS:
            self._workers_seen = now
            logger.warning("%s has no workers; waiting for some", self.cluster.where)
        if self.until is None or now < self.until:
            return False
        return not self.cluster.slots or now > self.until + max(GRACE_SECONDS, 2 * self.longest)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
