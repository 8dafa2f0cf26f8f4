"""A job from its first line to its last: read, validate, plan, generate, commit, merge."""

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

from batchgen import __version__
from batchgen.checkpoint.registry import DEFAULT_MODEL, find_model
from batchgen.checkpoint.shards import Manifest, load_manifest, load_params, model_hash, verify_shards
from batchgen.engine.engine import MAX_BATCH, check_limits
from batchgen.engine.probe import blas_info, is_batch_invariant
from batchgen.errors import BatchgenError
from batchgen.ledger import Ledger, open_ledger
from batchgen.planner import auto_chunk_rows, check_memory, default_kv_bytes, fitting_jobs, n_chunks, plan_chunks
from batchgen.pool import Pool
from batchgen.records.readers import DEFAULT_ID_COLUMN, InputFacts, check_input, read_requests, scan_input
from batchgen.records.schema import output_schema
from batchgen.records.writer import check_output, merge_parts
from batchgen.tokenizer import Tokenizer
from batchgen.types import Receipt, Rejected, SamplingParams, TokenizedRequest
from batchgen.validation import EmptyPrompt, OnTooLong, validate
from batchgen.worker import WorkerSetup, read_sightings

logger = logging.getLogger(__name__)

NOMINAL_JOBS = 4  # cuts the input where rows depend on their company, so that --jobs does not change them


@dataclass(frozen=True, slots=True)
class Job:
    """All that one run is asked to do; None is automatic."""

    input: Path
    output: Path
    model: str = DEFAULT_MODEL
    params: SamplingParams = SamplingParams()
    prompt_column: str = "prompt"
    id_column: str = DEFAULT_ID_COLUMN
    on_too_long: OnTooLong = "reject"
    empty_prompt: EmptyPrompt = "reject"
    jobs: int | None = None
    batch_size: int | None = None
    chunk_rows: int | None = None
    kv_bytes: int | None = None  # of one worker
    share_prefixes: bool = True
    token_ids: bool = False
    require_invariant: bool = False
    restart: bool = False
    row_timeout: float | None = None  # seconds without a step, after which a worker is taken for hung


@dataclass(frozen=True, slots=True)
class Model:
    """A model that was found; nothing of it is in memory."""

    directory: Path
    manifest: Manifest

    @property
    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.directory.glob("*.npy"))


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is: rows of the input, tokens of this run."""

    rows: int
    rows_in_all: int
    prompt_tokens: int
    completion_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Summary:
    """What became of a finished run; counts are of output rows, tokens and seconds of this run alone."""

    output: Path
    input_rows: int
    ok: int
    rejected: int
    failed: int
    resumed: int  # output rows that an earlier run had finished
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    jobs: int
    blas: str

    @property
    def rows(self) -> int:
        return self.ok + self.rejected + self.failed

    @property
    def exit_code(self) -> int:
        return 0 if self.rows == self.ok else 3


OnProgress = Callable[[Progress], None]


def run_job(job: Job, on_progress: OnProgress | None = None) -> Summary:
    """Complete every prompt of job.input into job.output, going on where an interrupted run of it stopped.

    Every input row is accounted for by at least one output row, in input order. Raises a BatchgenError, whose
    text is for the user, where the job as a whole cannot run; nothing finished is lost by that, or by a kill.
    """
    check_input(job.input, job.prompt_column, job.id_column)
    check_output(job.output, [job.input])
    directory = find_model(job.model)
    model = Model(directory, load_manifest(directory))
    check_memory(job.model, model.manifest.config, model.bytes)
    with open_ledger(job.output) as ledger:
        verify_shards(model.directory)
        facts = scan_input(job.input)
        plan = ledger.settle(*make_plan(job, model, facts), restart=job.restart)
        done = list(ledger.receipts.values())
        setup = worker_setup(job, model, plan)
        missing = n_chunks(facts.rows, plan["chunk_rows"]) - len(done)
        jobs = max(min(job.jobs or fitting_jobs(plan["kv_bytes"], model.bytes), missing), 1)
        chunks = (c for c in plan_chunks(validated(job, model), plan["chunk_rows"]) if c.index not in ledger.receipts)
        started = time.monotonic()
        pool = Pool(setup, ledger.attempt, jobs, job.row_timeout)
        with reporting(on_progress, ledger, facts.rows), closing(pool.receipts(chunks)) as receipts:
            for receipt in receipts:
                ledger.commit(receipt)
        summary = summarise(job, facts, ledger, done, time.monotonic() - started, jobs)
        schema = output_schema(token_ids=job.token_ids, logprobs=job.params.logprobs is not None)
        merge_parts(ledger.parts(), job.output, schema, run_metadata(plan), summary.rows)
    return summary


def make_plan(job: Job, model: Model, facts: InputFacts) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the output depends on, with None where it is automatic; and the automatic values."""
    config = model.manifest.config
    kv_bytes = default_kv_bytes(config)
    check_limits(config, job.kv_bytes or kv_bytes, job.batch_size or MAX_BATCH)
    params = load_params(model.directory, model.manifest)
    with threadpool_limits(1, user_api="blas"):  # as in a worker
        invariant = is_batch_invariant(params, config)
    blas = blas_info()
    if job.require_invariant and not invariant:
        variable = "OPENBLAS_CORETYPE"
        remedy = f"unset {variable}" if variable in os.environ else "use a machine with AVX-512, or do without"
        raise BatchgenError(f"--require-invariant: {blas} rounds a row differently in other company; {remedy}")
    plan = {
        "batchgen": __version__,
        "input": facts.sha256,
        "rows": facts.rows,
        "prompt_column": job.prompt_column,
        "id_column": job.id_column,
        "model": model.manifest.name,
        "model_hash": model_hash(model.manifest),
        "parameters": job.params.as_dict(),
        "on_too_long": job.on_too_long,
        "empty_prompt": job.empty_prompt,
        "token_ids": job.token_ids,
        "numpy": version("numpy"),
        "blas": f"{blas.name} {blas.version} {blas.core_type}",
        "batch_invariant": invariant,
        "chunk_rows": job.chunk_rows,
        "batch_size": job.batch_size,
        "kv_bytes": job.kv_bytes,
        "share_prefixes": job.share_prefixes,
    }
    jobs = (job.jobs or fitting_jobs(job.kv_bytes or kv_bytes, model.bytes)) if invariant else NOMINAL_JOBS
    automatic = {
        "chunk_rows": auto_chunk_rows(facts.rows, jobs, job.params.n),
        "batch_size": MAX_BATCH,
        "kv_bytes": kv_bytes,
    }
    return plan, automatic


def validated(job: Job, model: Model) -> Iterator[TokenizedRequest | Rejected]:
    """Every row of the input, in tokens and known to fit, or rejected."""
    tokenizer = Tokenizer.load(model.directory)
    n_ctx = model.manifest.config.n_ctx
    requests = read_requests(job.input, prompt_column=job.prompt_column, id_column=job.id_column, params=job.params)
    for request in requests:
        yield validate(request, tokenizer, n_ctx, job.on_too_long, job.empty_prompt)


def worker_setup(job: Job, model: Model, plan: dict[str, Any]) -> WorkerSetup:
    return WorkerSetup(
        model=str(model.directory.resolve()),
        model_hash=plan["model_hash"],
        kv_bytes=plan["kv_bytes"],
        max_batch=plan["batch_size"],
        share_prefixes=plan["share_prefixes"],
        token_ids=job.token_ids,
        logprobs=job.params.logprobs is not None,
        parent=os.getpid(),
    )


@contextmanager
def reporting(on_progress: OnProgress | None, ledger: Ledger, rows_in_all: int) -> Iterator[None]:
    """Call on_progress a few times a second, from a thread, while the block runs, and once at its end.

    What only shows how far a run is does not end it: an exception in on_progress is logged, and it is not called again.
    """
    if on_progress is None:
        yield
        return
    resumed = set(ledger.receipts)
    started, over = time.monotonic(), threading.Event()

    def report() -> None:
        now = progress_now(ledger, resumed, rows_in_all, time.monotonic() - started)
        try:
            on_progress(now)
        except Exception as error:
            logger.warning("progress is no longer shown: %r", error)
            over.set()

    def watch() -> None:
        while not over.wait(0.25):
            report()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        if not over.is_set():
            over.set()
            watcher.join()
            report()


def progress_now(ledger: Ledger, resumed: set[int], rows_in_all: int, seconds: float) -> Progress:
    """What is committed, and what the workers say of the chunks that are not; tokens are of this run alone."""
    receipts = dict(ledger.receipts)
    new = [receipt for chunk, receipt in receipts.items() if chunk not in resumed]
    now = [s for s in read_sightings(ledger.attempt) if s.chunk is not None and s.chunk not in receipts]
    return Progress(
        rows=sum(receipt.input_rows for receipt in receipts.values()) + sum(s.rows for s in now),
        rows_in_all=rows_in_all,
        prompt_tokens=sum(r.prompt_tokens for r in new) + sum(s.prompt_tokens for s in now),
        completion_tokens=sum(r.completion_tokens for r in new) + sum(s.completion_tokens for s in now),
        seconds=seconds,
    )


def summarise(job: Job, facts: InputFacts, ledger: Ledger, done: list[Receipt], seconds: float, jobs: int) -> Summary:
    """Add up the receipts; `done` are those of earlier runs. Raises BatchgenError if a row is missing."""
    receipts = list(ledger.receipts.values())
    input_rows = sum(receipt.input_rows for receipt in receipts)
    if input_rows != facts.rows:
        raise BatchgenError(
            f"{job.input}: {facts.rows} rows were counted and {input_rows} were done; was it changed meanwhile? "
            "run again with --restart"
        )
    return Summary(
        output=job.output,
        input_rows=facts.rows,
        ok=sum(receipt.ok for receipt in receipts),
        rejected=sum(receipt.rejected for receipt in receipts),
        failed=sum(receipt.failed for receipt in receipts),
        resumed=sum(receipt.rows for receipt in done),
        prompt_tokens=sum(r.prompt_tokens for r in receipts) - sum(r.prompt_tokens for r in done),
        completion_tokens=sum(r.completion_tokens for r in receipts) - sum(r.completion_tokens for r in done),
        seconds=seconds,
        jobs=jobs,
        blas=str(replace(blas_info(), threads=1)),
    )


def run_metadata(plan: dict[str, Any]) -> dict[str, str]:
    """The run manifest, for the output file's own metadata: what makes these rows again."""
    return {"batchgen": json.dumps(plan, sort_keys=True)}
