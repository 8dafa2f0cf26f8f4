"""What a worker process does: one chunk in, one part on disk, a receipt back.

A worker is sent paths and small records and keeps the model that it mapped for the next chunk. Which process
runs a chunk makes no difference to what it writes.
"""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from batchgen.checkpoint.shards import load_manifest, load_params
from batchgen.engine.engine import Engine
from batchgen.engine.sequence import Completion, Prompt, sample_seeds
from batchgen.ledger import with_receipt
from batchgen.records.schema import output_schema
from batchgen.records.writer import write_part
from batchgen.tokenizer import Tokenizer
from batchgen.types import Chunk, OutputRow, Receipt, Rejected, TokenizedRequest

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class WorkerSetup:
    """All that a worker needs besides its chunk."""

    model: str
    kv_bytes: int
    max_batch: int
    share_prefixes: bool
    token_ids: bool
    logprobs: bool
    parent: int  # process id: a worker does not outlive it


class Progress:
    """A worker's running count in a file of three int64: rows done, tokens in, tokens out; the parent adds them up."""

    def __init__(self, directory: Path) -> None:
        path = directory / f"progress-{os.getpid()}"
        path.touch()
        if path.stat().st_size == 0:
            path.write_bytes(bytes(24))
        self.counts = np.memmap(path, np.int64, "r+", shape=(3,))

    def add(self, rows: int, prompt_tokens: int, completion_tokens: int) -> None:
        self.counts += (rows, prompt_tokens, completion_tokens)


def read_progress(directory: Path) -> tuple[int, int, int]:
    """Rows done, tokens in and tokens out of all workers of an attempt so far."""
    total = np.zeros(3, np.int64)
    for path in directory.glob("progress-*"):
        counts = np.frombuffer(path.read_bytes()[:24], np.int64)
        if len(counts) == 3:
            total += counts
    return int(total[0]), int(total[1]), int(total[2])


@lru_cache(maxsize=1)
def _loaded(setup: WorkerSetup) -> tuple[Engine, Tokenizer]:
    """Map the model, once a process; one BLAS thread, as two would change bits and slow two workers manyfold."""
    threadpool_limits(1, user_api="blas")
    directory = Path(setup.model)
    manifest = load_manifest(directory)
    tokenizer = Tokenizer.load(directory)
    engine = Engine(
        load_params(directory, manifest),
        manifest.config,
        eos_id=tokenizer.eos_id,
        kv_bytes=setup.kv_bytes,
        max_batch=setup.max_batch,
        share_prefixes=setup.share_prefixes,
    )
    return engine, tokenizer


def become_worker(parent: int) -> None:
    """First of all in a new process: leave Ctrl-C to the parent (a process id), and die when the parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the call
            os._exit(1)


def run_chunk(setup: WorkerSetup, chunk: Chunk, attempt: str) -> Receipt:
    """Generate one chunk and write it as a part into the attempt's directory."""
    started = time.monotonic()
    engine, tokenizer = _loaded(setup)
    directory = Path(attempt)
    rows = complete_chunk(chunk, engine, tokenizer, Progress(directory))
    path = directory / f"{chunk.index:08d}.parquet"
    path.unlink(missing_ok=True)
    generated = [row for row in rows if row.status == "ok"]
    receipt = Receipt(
        chunk=chunk.index,
        path=str(path),
        sha256="",
        input_rows=len(chunk.items),
        rows=len(rows),
        ok=len(generated),
        rejected=sum(row.status == "rejected" for row in rows),
        failed=0,
        prompt_tokens=sum(row.prompt_tokens or 0 for row in generated),
        completion_tokens=sum(row.completion_tokens or 0 for row in generated),
    )
    schema = output_schema(token_ids=setup.token_ids, logprobs=setup.logprobs)
    sha256 = write_part(rows, path, with_receipt(schema, receipt))
    return receipt.finished(sha256, time.monotonic() - started)


def complete_chunk(chunk: Chunk, engine: Engine, tokenizer: Tokenizer, progress: Progress) -> list[OutputRow]:
    """The chunk's output rows in order: every sample of every request, and a row for each rejected one."""
    requests = {item.row: item for item in chunk.items if isinstance(item, TokenizedRequest)}
    rows = {(item.row, 0): rejected_row(item) for item in chunk.items if isinstance(item, Rejected)}
    progress.add(len(rows), 0, 0)
    prompts = [to_prompt(request) for request in requests.values()]
    seeds = {prompt.row: prompt.seeds for prompt in prompts}
    for completion in engine.generate(prompts):
        request = requests[completion.row]
        row = completed_row(request, completion, tokenizer, seeds[completion.row])
        rows[completion.row, completion.sample] = row
        progress.add(int(completion.sample == 0), len(request.prompt_token_ids), len(completion.token_ids))
    return [rows[key] for key in sorted(rows)]


def to_prompt(request: TokenizedRequest) -> Prompt:
    params = request.params
    return Prompt(request.row, request.prompt_token_ids, params, sample_seeds(params.seed, request.row, params.n))


def rejected_row(item: Rejected) -> OutputRow:
    return OutputRow(
        row=item.row,
        sample=0,
        id=item.id,
        prompt=item.prompt,
        completion=None,
        prompt_tokens=item.prompt_tokens,
        completion_tokens=None,
        finish_reason=None,
        status="rejected",
        error=item.error,
        seed=None,
    )


def completed_row(
    request: TokenizedRequest, completion: Completion, tokenizer: Tokenizer, seeds: Sequence[int]
) -> OutputRow:
    return OutputRow(
        row=request.row,
        sample=completion.sample,
        id=request.id,
        prompt=request.prompt,
        completion=tokenizer.decode(completion.token_ids),
        prompt_tokens=len(request.prompt_token_ids),
        completion_tokens=len(completion.token_ids),
        finish_reason=completion.finish_reason,
        status="ok",
        error=None,
        seed=None if request.params.greedy else seeds[completion.sample],
        completion_token_ids=completion.token_ids,
        logprobs=completion.logprobs,
    )
