"""Who does the chunks of a run: this machine's worker processes, or a cluster. open_workers chooses."""

import multiprocessing
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from batchgen.errors import UsageError
from batchgen.job import WorkOptions
from batchgen.models.model import Model
from batchgen.options import flags_in_use
from batchgen.output.schema import Columns
from batchgen.plan import Plan
from batchgen.planning import fitting_slots
from batchgen.types import Chunk, Receipt
from batchgen.workers.cluster.connection import Connection, connect
from batchgen.workers.cluster.messages import NodeSetup
from batchgen.workers.cluster.pool import ClusterPool
from batchgen.workers.pool import Pool
from batchgen.workers.supply import Deadline
from batchgen.workers.worker import WorkerSetup


@dataclass(slots=True, kw_only=True)
class Workers(ABC):
    """Who does the chunks: this machine's pool, or a cluster."""

    options: WorkOptions
    model: Model
    attempt: Path
    stack: ExitStack  # closes a run that is not at its end
    jobs: int = 0  # chunks that `run` does at once, at most

    @property
    @abstractmethod
    def slots(self) -> int:
        """Chunks that can be done at once; 0: a cluster without workers yet."""

    @abstractmethod
    def run(
        self, plan: Plan, columns: Columns, chunks: Iterator[Chunk], n_chunks: int, deadline: Deadline
    ) -> Iterator[Receipt]:
        """Do the n_chunks chunks, as many as the deadline allows; yields their receipts as they come."""


def worker_setup(model: Model, plan: Plan, columns: Columns) -> WorkerSetup:
    """What the worker processes of a run are sent."""
    return WorkerSetup(
        model=str(model.directory.resolve()),
        model_hash=plan.model_hash,
        model_files=model.files_hash,
        precision=plan.precision,
        kv_bytes=plan.kv_bytes,
        max_batch=plan.batch_size,
        share_prefixes=plan.share_prefixes,
        columns=columns,
        params=plan.parameters,
        task=plan.options(),
        parent=os.getpid(),
        plan=plan.digest,
    )


class LocalWorkers(Workers):
    """Worker processes of this machine."""

    @property
    def slots(self) -> int:
        return fitting_slots(self.options.kv_bytes, self.model)

    def run(
        self, plan: Plan, columns: Columns, chunks: Iterator[Chunk], n_chunks: int, deadline: Deadline
    ) -> Iterator[Receipt]:
        jobs = self.options.jobs or fitting_slots(plan.kv_bytes, self.model)
        self.jobs = max(min(jobs, n_chunks), 1)
        pool = Pool(worker_setup(self.model, plan, columns), self.attempt, self.jobs, self.options.row_timeout)
        receipts = pool.receipts(deadline.limit(chunks, lambda: pool.longest))
        return self.stack.enter_context(closing(receipts))


@dataclass(slots=True, kw_only=True)
class ClusterWorkers(Workers):
    """Workers of a Dask or Ray cluster."""

    connection: Connection

    @property
    def slots(self) -> int:
        return self.connection.slots

    def run(
        self, plan: Plan, columns: Columns, chunks: Iterator[Chunk], n_chunks: int, deadline: Deadline
    ) -> Iterator[Receipt]:
        options = self.options
        self.jobs = max(min(options.jobs or self.slots, n_chunks), 1)
        setup = NodeSetup(
            worker=worker_setup(self.model, plan, columns),
            attempt=str(self.attempt.absolute()),
            regex=plan.regex,
            model_cache=str(options.model_cache.absolute()) if options.model_cache else None,
            row_timeout=options.row_timeout,
            flags=flags_in_use(),
        )
        pool = ClusterPool(self.connection, setup, options.jobs, deadline)
        receipts = pool.receipts(deadline.limit(chunks, lambda: pool.longest))
        return self.stack.enter_context(closing(receipts))


def refuse_daemon() -> None:
    """Raise UsageError in a process that Python lets start no others; they would die with it."""
    if multiprocessing.current_process().daemon:
        what = "a daemonic process, such as a worker of multiprocessing.Pool, can start no workers"
        raise UsageError(f"{what}; use concurrent.futures.ProcessPoolExecutor, or a process with daemon=False")


@contextmanager
def open_workers(options: WorkOptions, model: Model, attempt: Path) -> Iterator[Workers]:
    """The workers of a run, which write into the directory `attempt`. When the block ends, so does the run."""
    with ExitStack() as stack:
        if options.backend == "loky":
            refuse_daemon()
            yield LocalWorkers(options=options, model=model, attempt=attempt, stack=stack)
        else:
            address = options.scheduler or options.address or "auto"
            connection = stack.enter_context(connect(options.backend, address))
            yield ClusterWorkers(options=options, model=model, attempt=attempt, stack=stack, connection=connection)
