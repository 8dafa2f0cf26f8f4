"""batchgen as `batchgen generate` runs it: chunks of prompts to worker processes, parts on disk, receipts back."""

import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen import __version__
from batchgen.engine.limits import MAX_BATCH
from batchgen.gpt2.machine_code import prepare_kernels
from batchgen.input.grouping import TOGETHER
from batchgen.models.model import Model
from batchgen.output.schema import Columns
from batchgen.planning import auto_chunk_rows, default_kv_bytes, plan_chunks
from batchgen.types import Chunk, Receipt, SamplingParams, TokenizedRequest
from batchgen.workers.marker import read_sightings
from batchgen.workers.pool import Pool
from batchgen.workers.worker import WorkerSetup
from benchmarks.peers.protocol import Completions, Job, Ready, Task, first_token, serve


class Workers:
    """The part of run_job between the plan and the merge: chunks to a pool, parts in a folder."""

    def __init__(self, job: Job) -> None:
        precision = job.options["precision"]
        self.job, model = job, Model.load(Path(job.model), precision=precision)
        prepare_kernels()
        self.tokenizer = model.load_tokenizer()
        self.setup = WorkerSetup(
            model=str(model.directory.resolve()),
            model_hash=model.hash,
            model_files=model.files_hash,  # as a run does, which has verified them
            kv_bytes=default_kv_bytes(model.config, precision),
            precision=precision,
            max_batch=MAX_BATCH,
            share_prefixes=True,
            columns=Columns(token_ids=True),
            params=SamplingParams(),
            parent=os.getpid(),
        )
        self.started: dict[str, float] = {}  # seconds of the first task, which generates one token

    def complete(self, task: Task) -> Completions:
        with tempfile.TemporaryDirectory(dir=self.job.scratch) as attempt:
            chunk_rows = auto_chunk_rows(len(task.prompts), self.job.jobs, task.n)
            receipts = self.run(plan_chunks(self.requests(task), chunk_rows, TOGETHER), Path(attempt))
            columns = ["row", "sample", "completion_token_ids"]
            table = pa.concat_tables(pq.read_table(receipt.path, columns=columns) for receipt in receipts)
            rows = table.sort_by([("row", "ascending"), ("sample", "ascending")])
            return rows.column("completion_token_ids").to_pylist()  # type: ignore[no-any-return]

    def run(self, chunks: Iterator[Chunk], attempt: Path) -> list[Receipt]:
        start = time.perf_counter()
        with ThreadPoolExecutor(1) as watcher:
            first_row = None if self.started else watcher.submit(wait_for_a_row, attempt)
            receipts = list(Pool(self.setup, attempt, self.job.jobs).receipts(chunks))
            if first_row:
                self.started = {
                    "worker_first_token_s": first_row.result() - start,
                    "worker_first_part_s": time.perf_counter() - start,
                }
        return sorted(receipts, key=lambda receipt: receipt.chunk)

    def requests(self, task: Task) -> Iterator[TokenizedRequest]:
        params = SamplingParams(
            max_tokens=task.max_tokens,
            temperature=task.temperature,
            top_k=task.top_k,
            top_p=task.top_p,
            n=task.n,
            ignore_eos=True,
        )
        for row, ids in enumerate(task.prompts):
            yield TokenizedRequest(row, f"prompts:{row + 1}", None, self.tokenizer.decode(ids), tuple(ids), params)

    def warm_up(self) -> dict[str, float]:
        """Generate one token for each of a few prompts, in chunks of one row, until every worker has done a chunk."""
        tiny = Task(first_token(self.job.task).prompts * 2 * self.job.jobs, 1)
        with tempfile.TemporaryDirectory(dir=self.job.scratch) as attempt:
            while len(list(Path(attempt).glob("worker-*"))) < self.job.jobs:
                self.run(plan_chunks(self.requests(tiny), 1), Path(attempt))
        return self.started


def wait_for_a_row(attempt: Path) -> float:
    """time.perf_counter() when a worker's marker first counts a completed row."""
    deadline = time.perf_counter() + 60
    while not any(sighting.rows for sighting in read_sightings(attempt)):
        if time.perf_counter() > deadline:
            raise TimeoutError("no worker has completed a row in 60 s")
        time.sleep(0.002)
    return time.perf_counter()


def load(job: Job) -> Ready:
    workers = Workers(job)
    chunk_rows = auto_chunk_rows(len(job.task.prompts), job.jobs, job.task.n)
    return Ready(
        complete=workers.complete,
        version=f"{__version__}, {workers.setup.precision}",
        settings=f"{job.jobs} {'workers' if job.jobs > 1 else 'worker'}, chunks of {chunk_rows} rows",
        warm_up=workers.warm_up,
    )


if __name__ == "__main__":
    serve(load)
