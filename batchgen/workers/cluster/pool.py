"""The run's side of a cluster: chunks out, receipts in, as Pool does on one machine.

A chunk whose worker or node is lost is given out again, up to MAX_LOSSES times; other chunks are not affected. A reply
counts once, and only if its part is there at full length: a node that was believed dead may still send one.
"""

import logging
import pickle
import re
import time
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path

from batchgen import __version__
from batchgen.errors import BatchgenError
from batchgen.options import say
from batchgen.types import Chunk, Receipt
from batchgen.workers.blame import MAX_LOSSES, STALL_SECONDS
from batchgen.workers.cluster.connection import Connection
from batchgen.workers.cluster.lease import hold_lease
from batchgen.workers.cluster.messages import Event, NodeSetup, Order, Reply
from batchgen.workers.pool import POLL_SECONDS
from batchgen.workers.supply import Deadline, Supply

logger = logging.getLogger(__name__)

NO_WORKERS_SECONDS = 30.0  # between two warnings that there are none
GRACE_SECONDS = 60.0  # after the deadline, for chunks that are not done

_PART = re.compile(r"[A-Za-z0-9._-]+/[0-9]{8,}-[0-9]+\.parquet")


class ClusterPool:
    """Does chunks on a cluster: as many at once as it has slots, up to `jobs`."""

    def __init__(
        self, connection: Connection, setup: NodeSetup, jobs: int | None = None, deadline: Deadline | None = None
    ) -> None:
        """After the deadline, a cluster without workers is no longer waited for."""
        self.connection, self.jobs, self.deadline = connection, jobs, deadline or Deadline(None)
        self.attempt = Path(setup.attempt)
        self.longest = 0.0  # seconds of a chunk
        self._setup = pickle.dumps(setup)
        self._out: dict[int, Chunk] = {}  # by ticket: chunks that were given out and not answered
        self._tickets = 0
        self._losses: Counter[int] = Counter()  # by chunk
        self._workers_seen = self._answered = time.monotonic()
        self._patience = 1  # times the usual one

    def receipts(self, chunks: Iterator[Chunk]) -> Generator[Receipt, None, None]:
        """Do the chunks as Pool.receipts does. When it is closed, nodes stop what they do."""
        supply = Supply(chunks)
        with hold_lease(self.attempt) as lease:
            self.connection.order(Order(0, lease=str(lease)))
            while True:
                while len(self._out) < self._room() and (chunk := supply.take()):
                    self._give_out(chunk)
                if not self._out or self._waits_in_vain():
                    break
                event = self.connection.event(POLL_SECONDS)
                if event is None:
                    supply.again.extend(self._take_back_overdue())
                elif event.ticket in self._out:  # otherwise it is late, and the chunk was given out anew
                    chunk = self._out.pop(event.ticket)
                    receipt, reason = self._read_answer(chunk, event)
                    self._answered, self._patience = time.monotonic(), 1
                    if receipt:
                        self.longest = max(self.longest, receipt.seconds)
                        yield receipt
                    else:
                        self._note_loss(chunk, reason)
                        supply.again.append(chunk)
        if supply.failure:
            raise supply.failure

    def _room(self) -> int:
        """Chunks to have out at once. One if there are no workers: clusters start workers for tasks that wait.

        No more than there are slots: Dask assigns a waiting task to a worker that need not be the first to be free.
        """
        return max(min(self.connection.slots, self.jobs or self.connection.slots), 1)

    def _give_out(self, chunk: Chunk) -> None:
        self._tickets += 1
        self._out[self._tickets] = chunk
        arguments = (__version__, str(self.attempt), self._setup, pickle.dumps(chunk))
        self.connection.order(Order(self._tickets, arguments))

    def _read_answer(self, chunk: Chunk, event: Event) -> tuple[Receipt | None, str]:
        """A receipt with its full path, or None and the reason."""
        if event.error:
            raise BatchgenError(
                f"{self.connection.where} cannot run batchgen's tasks ({event.error}); all nodes need this batchgen, "
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
        is_of_chunk = (receipt.chunk, receipt.input_rows) == (chunk.index, chunk.n_rows)
        if not is_of_chunk or not _PART.fullmatch(reply.receipt.path) or _size(Path(receipt.path)) != reply.size:
            return None, f"{receipt.path} is not the part of {reply.size} bytes that node {reply.host} wrote"
        return receipt, ""

    def _note_loss(self, chunk: Chunk, reason: str) -> None:
        self._losses[chunk.index] += 1
        if self._losses[chunk.index] >= MAX_LOSSES:
            raise BatchgenError(
                f"{chunk.words}: lost {MAX_LOSSES} times, the last time "
                f"because {reason}; if workers do not live long enough for a chunk, lower {say('chunk_rows')} and add "
                f"{say('restart')}. Finished chunks are kept: run the same command to resume."
            )
        logger.warning("chunk %d is lost and done again: %s", chunk.index, reason)

    def _take_back_overdue(self) -> Iterator[Chunk]:
        """All chunks that are out, to give them out anew, if no answer came for far longer than a chunk takes.

        The engine may count on a node whose file system hangs. Or a node still searches for rows that hang: so each
        time it has twice as long.
        """
        patience = max(STALL_SECONDS, 10 * self.longest) * self._patience
        is_known = self.longest and self.connection.slots  # before the first chunk is done, its time is unknown
        if not is_known or time.monotonic() - self._answered < patience:
            return
        self._answered, self._patience = time.monotonic(), 2 * self._patience
        logger.warning(
            "%s: no chunk done for %.0f s; all chunks that are out are given out anew", self.connection.where, patience
        )
        for ticket in list(self._out):
            self.connection.order(Order(ticket))
            yield self._out.pop(ticket)

    def _waits_in_vain(self) -> bool:
        """Whether the deadline is over and no answer will come soon. Warns now and then if there are no workers."""
        now = time.monotonic()
        if self.connection.slots:
            self._workers_seen = now
        elif now - self._workers_seen > NO_WORKERS_SECONDS:
            self._workers_seen = now
            logger.warning("%s has no workers; waiting for some", self.connection.where)
        grace = max(GRACE_SECONDS, 2 * self.longest) if self.connection.slots else 0.0
        return self.deadline.is_over(-grace)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
