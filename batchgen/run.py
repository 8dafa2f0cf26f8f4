"""A job from its first line to its last: read, validate, plan, generate, commit, merge."""

import json
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from threadpoolctl import threadpool_limits

from batchgen import __version__
from batchgen.engine.engine import MAX_BATCH, check_limits
from batchgen.engine.probe import blas_info, is_batch_invariant
from batchgen.errors import BatchgenError, OutputError, StoppedError, UsageError
from batchgen.input.kept import kept_schema, with_kept
from batchgen.input.readers import DEFAULT_ID_COLUMN, InputFacts, check_input, read_requests, scan_input
from batchgen.input.sources import InputFormat, Inputs, Source, find_sources, local_paths
from batchgen.input.validation import EmptyPrompt, OnTooLong, validate
from batchgen.models.registry import DEFAULT_MODEL, find_model
from batchgen.models.shards import Manifest, load_manifest, load_params, model_hash, verify_shards
from batchgen.output.ledger import Ledger, open_ledger, refuse_changes, run_name
from batchgen.output.openai import batch_writer
from batchgen.output.retry import failed_rows, read_manifest, with_rows_replaced
from batchgen.output.schema import check_keep, output_schema
from batchgen.output.store import (
    REMEDY,
    Address,
    Store,
    check_store,
    claim_prefix,
    open_store,
    parse_address,
    publish_dataset,
    publish_file,
)
from batchgen.output.writer import (
    METADATA_KEY,
    SUFFIXES,
    LinesWriter,
    check_folder,
    check_output,
    is_json_lines,
    merge_parts,
    write_json_lines,
    write_output,
)
from batchgen.planning import auto_chunk_rows, check_memory, cut, default_kv_bytes, fitting_jobs, n_chunks
from batchgen.progress import Progress, StatusFile, WorkerState
from batchgen.text.tokenizer import Tokenizer
from batchgen.types import Chunk, Rejected, Request, SamplingParams, TokenizedRequest
from batchgen.workers.cluster.messages import NodeSetup
from batchgen.workers.cluster.pool import Cluster, ClusterPool, connected
from batchgen.workers.pool import Pool, no_interrupts_to_workers
from batchgen.workers.worker import WorkerSetup, read_sightings

logger = logging.getLogger(__name__)

Backend = Literal["loky", "dask", "ray"]

NOMINAL_JOBS = 4  # cuts the input where rows depend on their company, so that --jobs does not change them


@dataclass(frozen=True, slots=True)
class Job:
    """All that one run is asked to do; None is automatic."""

    input: Inputs
    output: Path
    model: str = DEFAULT_MODEL
    params: SamplingParams = SamplingParams()
    prompt_column: str = "prompt"
    id_column: str = DEFAULT_ID_COLUMN
    input_format: InputFormat = "auto"
    keep: tuple[str, ...] = ()  # columns of the input that the output carries
    on_too_long: OnTooLong = "reject"
    empty_prompt: EmptyPrompt = "reject"
    trim: bool = False  # spaces at a prompt's end
    row_params: bool = True  # parameters in a row win over params
    jobs: int | None = None
    batch_size: int | None = None
    chunk_rows: int | None = None
    kv_bytes: int | None = None  # of one worker
    share_prefixes: bool = True
    token_ids: bool = False
    require_invariant: bool = False
    restart: bool = False
    row_timeout: float | None = None  # seconds without a step, after which a worker is taken for hung
    time_limit: float | None = None  # seconds, after which StoppedError
    dataset: bool = False  # the output is a folder of the parts
    retry_failed: bool = False
    status: Path | None = None  # where to keep the status file
    destination: str | None = None  # in an object store; the work is kept beside `output` as ever
    backend: Backend = "loky"  # loky is this machine alone
    address: str | None = None  # of the cluster's scheduler; None is Ray's own choice
    model_cache: Path | None = None  # a directory of each node, where the model is copied to


@dataclass(frozen=True, slots=True)
class Model:
    """A model that was found; nothing of it is in memory."""

    directory: Path
    manifest: Manifest

    @property
    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.directory.glob("*.npy"))


@dataclass(frozen=True, slots=True)
class Summary:
    """What became of a finished run; counts are of output rows, tokens and seconds of this run alone."""

    output: Path | str  # a str is an address
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
    space_ends: int = 0  # input rows with a prompt that ends in a space

    @property
    def rows(self) -> int:
        return self.ok + self.rejected + self.failed

    @property
    def statuses(self) -> dict[str, int]:
        return {"ok": self.ok, "rejected": self.rejected, "failed": self.failed}

    @property
    def exit_code(self) -> int:
        return 0 if self.rows == self.ok else 3


OnProgress = Callable[[Progress], None]


def run_job(job: Job, on_progress: OnProgress | None = None) -> Summary:
    """Complete every prompt of job.input into job.output, going on where an interrupted run of it stopped.

    Every input row is accounted for by at least one output row, in input order. Raises a BatchgenError, whose
    text is for the user, where the job as a whole cannot run; nothing finished is lost by that, or by a kill.
    """
    until = time.monotonic() + job.time_limit if job.time_limit else None
    job = checked(job)
    model = named_model(job)
    with open_ledger(job.output) as ledger, cluster_of(job) as cluster:
        check_memory(job.model, model.manifest.config, model.bytes)  # another run may have it, and the output too
        verify_shards(model.directory)
        facts, kept = scan_input(job.input), kept_schema(job.input, job.keep)
        retry = find_failed(job) if job.retry_failed else None
        plan = settle(job, model, facts, ledger, retry, cluster.slots if cluster else None)
        store = claimed(job, ledger, plan)
        resumed = ledger.counts.copy()
        rows = len(retry.rows) if retry else facts.rows
        missing = n_chunks(rows, plan["chunk_rows"]) - len(ledger.committed)
        here = cluster.slots if cluster else fitting_jobs(plan["kv_bytes"], model.bytes)
        jobs = max(min(job.jobs or here, missing), 1)
        chunks = with_kept(chunks_to_do(job, model, plan, ledger, retry), job.input, kept)
        setup = worker_setup(job, model, plan, columns(job, facts))
        pool: Pool | ClusterPool = (
            ClusterPool(cluster, node_setup(job, setup, plan, ledger), job.jobs, until)
            if cluster
            else Pool(setup, ledger.attempt, jobs, job.row_timeout)
        )
        started = time.monotonic()
        with recorded(job, ledger) as status, reporting(on_progress, status, ledger, rows):
            with closing(pool.receipts(in_time(chunks, until, pool))) as receipts:
                for receipt in receipts:
                    ledger.commit(receipt)
            check_done(job, rows, ledger.counts - resumed, ledger.counts)
            summary = summarise(job, facts, ledger, resumed, time.monotonic() - started, jobs, retry)
            publish(job, model, facts, ledger, plan, summary, retry, kept, store)
        status.finish("finished", Counter(summary.statuses), summary.exit_code, None)
    return summary


def checked(job: Job) -> Job:
    """The job with its input found; refuses, before any work, an input or output that cannot be."""
    check_backend(job)
    check_keep(job.keep)
    sources = check_input(
        job.input,
        job.prompt_column,
        job.id_column,
        keep=job.keep,
        input_format=job.input_format,
        own_params=job.row_params,
        spool=job.output.parent,
    )
    if job.destination is None:
        check_output(job.output, local_paths(sources), dataset=job.dataset)
        return replace(job, input=sources)
    address = parse_address(job.destination, dataset=job.dataset)
    check_address(address, sources)
    if job.retry_failed:
        remedy = "download the file, retry its rows there, and upload it"
        raise UsageError(f"{address.where}: --retry-failed is for an output that is a local file; {remedy}")
    check_folder(job.output, local_paths(sources))
    check_store(address, run_name(job.output))
    return replace(job, input=sources, dataset=not address.name)


def check_address(address: Address, sources: Sequence[Source]) -> None:
    """What can be said of it without asking the store."""
    if address.name and Path(address.name).suffix.lower() not in SUFFIXES:
        remedy = f"a file ends in {' or '.join(SUFFIXES)}, and a dataset in /"
        raise UsageError(f"{address.where}: neither a file nor a dataset: {remedy}")
    if address.where in [source.where for source in sources]:
        raise OutputError(f"{address.where}: this is the input; choose another name for the output")


def claimed(job: Job, ledger: Ledger, plan: dict[str, Any]) -> Store | None:
    """The store of an output that goes to one; its prefix, if it is a dataset, is from here on this run's alone."""
    if job.destination is None:
        return None
    store = open_store(parse_address(job.destination, dataset=job.dataset))
    ledger.keep_to(store.where)
    if job.dataset:
        claim_prefix(store, ledger.run_name(), ledger.directory, plan)
    return store


def check_backend(job: Job) -> None:
    if job.backend == "dask" and not job.address:
        raise UsageError("--backend dask: which cluster? give --scheduler tcp://HOST:8786, or its scheduler file")
    if job.backend == "loky" and (job.address or job.model_cache):
        option = "--model-cache" if job.model_cache else "a scheduler's address"
        raise UsageError(f"{option} is for a cluster; add --backend dask or --backend ray")


def cluster_of(job: Job) -> AbstractContextManager[Cluster | None]:
    """The cluster that does the work, or None for this machine alone."""
    return nullcontext() if job.backend == "loky" else connected(job.backend, job.address or "auto")


def named_model(job: Job) -> Model:
    directory = find_model(job.model)
    return Model(directory, load_manifest(directory))


def in_time(chunks: Iterator[Chunk], until: float | None, pool: Pool | ClusterPool) -> Iterator[Chunk]:
    """Give out chunks only while they are likely to be done by `until`; what is under way then ends well.

    A chunk that is given out first waits for a worker, about as long as it will take.
    """
    for chunk in chunks:
        if until is not None and time.monotonic() + 2 * pool.longest > until:
            return
        yield chunk


def check_done(job: Job, rows: int, new: Counter[str], counts: Counter[str]) -> None:
    """Raise StoppedError where the time was over, and BatchgenError where a row is missing."""
    done = counts["input_rows"]
    if done == rows:
        return
    if job.time_limit is not None and done < rows:
        remedy = "run the same command again to go on" if new["input_rows"] else "nothing was done: give it more"
        raise StoppedError(f"--time-limit {job.time_limit:g} s: {done:,} of {rows:,} rows are done; {remedy}")
    raise BatchgenError(
        f"input: {rows} rows were counted and {done} were done; was it changed meanwhile? run again with --restart"
    )


@dataclass(frozen=True, slots=True)
class Retry:
    """A finished output whose failed rows are to be tried again."""

    rows: frozenset[int]
    statuses: Counter[str]  # of its output rows
    manifest: dict[str, Any]


def find_failed(job: Job) -> Retry:
    if job.dataset or job.output.suffix.lower() != ".parquet":
        raise UsageError(f"{job.output}: --retry-failed wants a finished .parquet file, which says how it was made")
    manifest = read_manifest(job.output)
    rows, statuses = failed_rows(job.output)
    return Retry(frozenset(rows), statuses, manifest)


def settle(
    job: Job, model: Model, facts: InputFacts, ledger: Ledger, retry: Retry | None, slots: int | None
) -> dict[str, Any]:
    """The plan that holds: this run's, or that of the one to go on with. slots are a cluster's."""
    plan, automatic = make_plan(job, model, facts, len(retry.rows) if retry else facts.rows, slots)
    plan["format"] = "dataset" if job.dataset else job.output.suffix.lower().lstrip(".")
    # A retry is of few rows: it is begun again where one was interrupted, and stands in no other run's way.
    restart = job.restart or bool((ledger.read_plan() or {}).get("retry"))
    if retry is None:
        return ledger.settle(plan, automatic, restart=restart)
    remedy = "give the options that made it, with its batchgen, NumPy and BLAS"
    refuse_changes(str(job.output), retry.manifest, plan, remedy)
    return ledger.settle(plan | {"retry": True}, automatic, restart=restart)


def publish(
    job: Job,
    model: Model,
    facts: InputFacts,
    ledger: Ledger,
    plan: dict[str, Any],
    summary: Summary,
    retry: Retry | None,
    kept: Any,
    store: Store | None,
) -> None:
    """Make the committed parts the output."""
    schema = output_schema(**columns(job, facts), kept=kept)
    if job.dataset and store:
        with kept_here(ledger):
            publish_dataset(store, list(ledger.parts()), plan, ledger.run_name(), ledger.sent)
    elif job.dataset:
        ledger.publish_dataset(plan)
    elif retry is None:
        lines = lines_writer(job, model, facts, plan)
        out = ledger.attempt / job.output.name if store else job.output
        merge_parts(ledger.parts(), out, schema, run_metadata(plan), summary.rows, lines)
        if store:
            with kept_here(ledger):
                publish_file(store, out)
    elif retry.rows:
        rows = with_rows_replaced(job.output, ledger.parts())
        write_output(rows, job.output, schema, run_metadata(retry.manifest), summary.rows)


@contextmanager
def kept_here(ledger: Ledger) -> Iterator[None]:
    """Have a store's error say that nothing finished is lost."""
    try:
        yield
    except OutputError as error:
        raise OutputError(f"{error}; what is finished is kept in {ledger.directory}: {REMEDY}") from error


def columns(job: Job, facts: InputFacts) -> dict[str, bool]:
    """Which columns the output has besides those that it always has: for the whole job, before the first row."""
    if facts.openai and is_json_lines(job.output) and job.keep:
        raise UsageError("--keep: OpenAI's lines have no place for other columns; name the output .parquet")
    logprobs = job.params.logprobs is not None or (facts.logprobs and (job.row_params or facts.openai))
    named = facts.openai and is_json_lines(job.output) and logprobs  # OpenAI's lines say each token's text
    return {"token_ids": job.token_ids or named, "logprobs": logprobs, "prompt_index": facts.openai}


def lines_writer(job: Job, model: Model, facts: InputFacts, plan: dict[str, Any]) -> LinesWriter:
    """How JSON lines are written: an OpenAI batch file is answered in its own shape."""
    if facts.openai and is_json_lines(job.output):
        return batch_writer(plan, Tokenizer.load(model.directory))
    return write_json_lines


def make_plan(
    job: Job, model: Model, facts: InputFacts, rows: int, slots: int | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the output depends on, with None where it is automatic; and the automatic values."""
    config = model.manifest.config
    kv_bytes = default_kv_bytes(config)
    check_limits(config, kv_bytes if job.kv_bytes is None else job.kv_bytes, job.batch_size or MAX_BATCH)
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
        "input_formats": sorted({source.format for source in find_sources(job.input)}),
        "rows": facts.rows,
        "prompt_column": job.prompt_column,
        "id_column": job.id_column,
        "keep": job.keep,
        "model": model.manifest.name,
        "model_hash": model_hash(model.manifest),
        "parameters": job.params.as_dict(),
        "on_too_long": job.on_too_long,
        "empty_prompt": job.empty_prompt,
        "trim": job.trim,
        "row_params": job.row_params,
        "token_ids": job.token_ids,
        "numpy": version("numpy"),
        "blas": blas.kernels,
        "batch_invariant": invariant,
        "chunk_rows": job.chunk_rows,
        "batch_size": job.batch_size,
        "kv_bytes": job.kv_bytes,
        "share_prefixes": job.share_prefixes,
    }
    here = fitting_jobs(job.kv_bytes or kv_bytes, model.bytes) if slots is None else slots or NOMINAL_JOBS
    jobs = (job.jobs or here) if invariant else NOMINAL_JOBS
    automatic = {
        "chunk_rows": auto_chunk_rows(rows, jobs, job.params.n),
        "batch_size": MAX_BATCH,
        "kv_bytes": kv_bytes,
    }
    return json.loads(json.dumps(plan)), automatic  # as it will be read back: tuples are lists


def requests(job: Job) -> Iterator[Request | Rejected]:
    """Every row of the input, read and not looked at."""
    return read_requests(
        job.input,
        prompt_column=job.prompt_column,
        id_column=job.id_column,
        params=job.params,
        own_params=job.row_params,
    )


def validation(job: Job, model: Model) -> Callable[[Request | Rejected], TokenizedRequest | Rejected]:
    """What makes a row of the input one in tokens that is known to fit, or a rejected one."""
    tokenizer = Tokenizer.load(model.directory)
    n_ctx = model.manifest.config.n_ctx
    return lambda request: validate(request, tokenizer, n_ctx, job.on_too_long, job.empty_prompt, job.trim)


def validated(job: Job, model: Model) -> Iterator[TokenizedRequest | Rejected]:
    """Every row of the input, in tokens and known to fit, or rejected."""
    return map(validation(job, model), requests(job))


def chunks_to_do(job: Job, model: Model, plan: dict[str, Any], ledger: Ledger, retry: Retry | None) -> Iterator[Chunk]:
    """The chunks that are not committed. Rows of the others are only counted: tokenizing takes most of the time."""
    rows = (request for request in requests(job) if retry is None or request.row in retry.rows)
    check = validation(job, model)
    for index, members in enumerate(cut(rows, plan["chunk_rows"])):
        if index not in ledger.committed:
            yield Chunk(index, tuple(map(check, members)))


def worker_setup(job: Job, model: Model, plan: dict[str, Any], columns: dict[str, bool]) -> WorkerSetup:
    return WorkerSetup(
        model=str(model.directory.resolve()),
        model_hash=plan["model_hash"],
        kv_bytes=plan["kv_bytes"],
        max_batch=plan["batch_size"],
        share_prefixes=plan["share_prefixes"],
        **columns,
        markers=None,
        params=job.params,
        parent=os.getpid(),
    )


def node_setup(job: Job, setup: WorkerSetup, plan: dict[str, Any], ledger: Ledger) -> NodeSetup:
    return NodeSetup(
        worker=setup,
        attempt=str(ledger.attempt.absolute()),
        numpy=plan["numpy"],
        blas=plan["blas"],
        model_cache=str(job.model_cache.absolute()) if job.model_cache else None,
        row_timeout=job.row_timeout,
    )


@contextmanager
def recorded(job: Job, ledger: Ledger) -> Iterator[StatusFile]:
    """Keep the status file while the block runs, and have it say so if that ends badly."""
    status = StatusFile(job.status, shown_output(job))
    try:
        yield status
    except BaseException as error:
        code = exit_code_of(error)
        text = str(error) if isinstance(error, Exception) else type(error).__name__
        status.finish("stopped" if code in (75, 130, 143) else "failed", ledger.counts, code, text)
        raise


def shown_output(job: Job) -> str:
    return parse_address(job.destination).where if job.destination else str(job.output)


def exit_code_of(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    return 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)


@contextmanager
def reporting(on_progress: OnProgress | None, status: StatusFile, ledger: Ledger, rows_in_all: int) -> Iterator[None]:
    """Tell on_progress and the status file a few times a second, from a thread, while the block runs, and at its end.

    What only shows how far a run is does not end it: an exception in on_progress is logged, and it is not called again.
    """
    resumed = ledger.counts.copy()
    started, over = time.monotonic(), threading.Event()
    listeners = [on_progress] if on_progress else []

    last = Progress(0, rows_in_all, 0, 0, 0.0)

    def report() -> None:
        nonlocal last
        now = progress_now(ledger, resumed, rows_in_all, time.monotonic() - started)
        # A worker that has begun its next chunk no longer counts the one that is about to be committed.
        rows, tokens = max(now.rows, last.rows), max(now.completion_tokens, last.completion_tokens)
        last = now = replace(now, rows=rows, completion_tokens=tokens)
        status.update(now, ledger.counts)
        try:
            for listener in listeners:
                listener(now)
        except Exception as error:
            logger.warning("progress is no longer shown: %r", error)
            listeners.clear()

    def watch() -> None:
        while not over.wait(0.25):
            report()

    watcher = threading.Thread(target=watch, daemon=True)
    with no_interrupts_to_workers():  # nor to this thread, so that they wait while the main thread blocks them
        watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
        report()


def progress_now(ledger: Ledger, resumed: Counter[str], rows_in_all: int, seconds: float) -> Progress:
    """What is committed, and what the workers say of the chunks that are not; tokens are of this run alone."""
    sightings = read_sightings(ledger.attempt)  # before the counts: what is committed meanwhile is counted there
    now = [sighting for sighting in sightings if sighting.chunk not in ledger.committed]
    counts = ledger.counts.copy()
    return Progress(
        rows=min(counts["input_rows"] + sum(s.rows for s in now), rows_in_all),
        rows_in_all=rows_in_all,
        prompt_tokens=counts["prompt_tokens"] - resumed["prompt_tokens"] + sum(s.prompt_tokens for s in now),
        completion_tokens=counts["completion_tokens"]
        - resumed["completion_tokens"]
        + sum(s.completion_tokens for s in now),
        seconds=seconds,
        resumed_rows=resumed["input_rows"],
        workers=tuple(WorkerState(s.pid, s.chunk, s.rows, len(s.in_flight)) for s in sightings),
    )


def summarise(
    job: Job, facts: InputFacts, ledger: Ledger, resumed: Counter[str], seconds: float, jobs: int, retry: Retry | None
) -> Summary:
    """Add up what was done; `resumed` by earlier runs, and with `retry` the rows that were not tried again."""
    counts = ledger.counts
    before = retry.statuses if retry else Counter()
    return Summary(
        output=shown_output(job) if job.destination else job.output,
        input_rows=facts.rows,
        ok=counts["ok"] + before["ok"],
        rejected=counts["rejected"] + before["rejected"],
        failed=counts["failed"],
        resumed=resumed["rows"] + before["ok"] + before["rejected"],
        prompt_tokens=counts["prompt_tokens"] - resumed["prompt_tokens"],
        completion_tokens=counts["completion_tokens"] - resumed["completion_tokens"],
        seconds=seconds,
        jobs=jobs,
        blas=str(replace(blas_info(), threads=1)),
        space_ends=counts["space_ends"],
    )


def run_metadata(plan: dict[str, Any]) -> dict[str, str]:
    """The run manifest, for the output file's own metadata: what makes these rows again."""
    return {METADATA_KEY: json.dumps(plan, sort_keys=True)}
