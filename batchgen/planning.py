"""Makes a plan: rows per chunk, workers that fit into memory, precision."""

import hashlib
import logging
import os
import platform
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TypeVar

import joblib

from batchgen import __version__
from batchgen.engine.limits import MAX_BATCH, check_limits, kv_bytes_per_token, layer_index, words_of_small
from batchgen.errors import BatchgenError, UsageError
from batchgen.gpt2.config import GPT2Config
from batchgen.input.grouping import share_out
from batchgen.input.parameters import ASKING, LOGPROBS, is_asked
from batchgen.input.prompts import Facts
from batchgen.input.validation import Check, check_shots
from batchgen.job import EmbedOptions, InputOptions, Job, ScoreOptions, TaskOptions
from batchgen.models.model import Model
from batchgen.options import say, show_shard
from batchgen.plan import Plan, task_fields
from batchgen.selection import Selection, select_rows
from batchgen.text.guided import installed_version, pattern_of, try_out
from batchgen.types import MAX_LOGPROBS, Chunk, Precision, Rejected, Request, SamplingParams, TokenizedRequest

MIN_CHUNK_ROWS = 16  # starting a process costs more than generating so few rows
MAX_CHUNK_ROWS = 512  # a lost worker costs at most this much work; longer chunks gain nothing
FULL_BATCH_ROWS = 192  # in smaller chunks the matrix products have too few rows to run at full speed
ROUNDS = 4  # chunks per worker, if there are enough rows: a chunk of long rows then does not leave the others idle
BYTES_OF_PROMPT = 10  # of the input, that cost as much as a generated token
BYTES_OF_TOKEN = 4  # of the input, that are a token to read
MAX_CHUNK_TOKENS = 2**17  # to read, where nothing is generated: as much work as MAX_CHUNK_ROWS of completions
MAX_CHUNK_TOPS = 2**21  # likeliest tokens that a worker holds until its chunk is written: 400 bytes each
SLOW_CORE = 50e9  # operations in a second
NOMINAL_JOBS = 4  # of a cluster that has no workers yet
KV_BYTES = 768 * 2**20  # with twice as much, float32 is 1 % faster
WORKER_BYTES = 400 * 2**20  # a worker's interpreter, libraries and work buffers
UNKNOWN_MEMORY = 2**40  # on a system that does not report its memory, the number of workers is not limited by it

logger = logging.getLogger(__name__)

Row = TypeVar("Row")


# ---- chunks


def auto_chunk_rows(rows: int, jobs: int, n: int = 1) -> int:
    """Rows per chunk so that all workers end together; the work of a row is its n samples.

    rows=12, jobs=2 -> 12; rows=192, jobs=2 -> 96; rows=1_000, jobs=2 -> 250; rows=100_000, jobs=2 -> 511;
    rows=12, jobs=2, n=100 -> 2
    """
    if n > 1:
        return max(auto_chunk_rows(rows * n, jobs) // n, 1)
    rounds = max(-(-rows // (jobs * MAX_CHUNK_ROWS)), min(ROUNDS, rows // (jobs * FULL_BATCH_ROWS)), 1)
    chunks = max(min(jobs * rounds, rows // MIN_CHUNK_ROWS), 1)
    up = max(-(-rows // chunks), 1)
    return up if n_chunks(rows, up) >= min(jobs, chunks, rows) else rows // chunks  # no worker is left without one


def rows_to_read(task: TaskOptions, row_bytes: float, n_ctx: int) -> int:
    """Rows of a chunk, at most, of which nothing but the reading costs time.

    800 bytes a row -> 655; 400,000 bytes, n_ctx 1024, stride 1024 -> 1
    """
    tokens = max(row_bytes / BYTES_OF_TOKEN, 1)
    if isinstance(task, ScoreOptions) and task.stride and tokens > n_ctx:  # the windows of a text overlap
        tokens *= n_ctx / task.stride
    return max(int(MAX_CHUNK_TOKENS / tokens), 1)


def rows_to_hold(params: SamplingParams, asks: frozenset[str], row_bytes: float, n_ctx: int) -> int:
    """Rows of a chunk, at most, whose log-probabilities a worker holds; asks: of ASKING, what rows may have themselves.

    prompt_logprobs 100, 4,000 bytes a row -> 20; 400 bytes a row -> 207; logprobs 100, max_tokens 40 -> 519
    """
    asks |= {name for name in ASKING if is_asked(name, params)}
    if asks >= {"logprobs", "echo"}:  # in OpenAI's lines
        asks |= {"prompt_logprobs"}
    tokens = {"logprobs": params.max_tokens, "prompt_logprobs": row_bytes / BYTES_OF_TOKEN}
    held = 1.0
    for name in asks.intersection(LOGPROBS):
        given = getattr(params, name)
        held += params.n * min(tokens[name], n_ctx) * (1 + (MAX_LOGPROBS if given is None else given))
    return max(int(MAX_CHUNK_TOPS / held), 1)


def rows_within(seconds: float, tokens: float, model_bytes: int) -> int:
    """Rows of so many tokens that a slow core does in this time; not measured, so that a plan fits any machine.

    124M, 40 tokens a row: 2 s -> 10 rows
    """
    operations = tokens * model_bytes / 2  # two for each weight of four bytes
    return max(int(seconds * SLOW_CORE / operations), 1)


def n_chunks(rows: int, chunk_rows: int) -> int:
    return -(-rows // chunk_rows)


def plan_chunks(items: Iterable[TokenizedRequest | Rejected], chunk_rows: int, together: int = 1) -> Iterator[Chunk]:
    """Cut the rows into chunks of up to chunk_rows, `together` of them at a time; with 1, they are in order."""
    rows = iter(items)
    index = 0
    while window := tuple(islice(rows, chunk_rows * together)):
        for members in share_out(window, n_chunks(len(window), chunk_rows), chunk_rows):
            yield Chunk(index, tuple(window[member] for member in members))
            index += 1


# ---- cores and memory


def available_jobs() -> int:
    """The cores that this process may use, counting affinity and cgroups (joblib)."""
    try:
        return int(joblib.cpu_count())
    except ValueError as error:
        name = "LOKY_MAX_CPU_COUNT"
        raise UsageError(f"{name}={os.environ.get(name)} is no number of cores; give one, or unset it") from error


def default_kv_bytes(config: GPT2Config, precision: Precision) -> int:
    """Memory for the keys and values of one worker: a fixed amount, so that a plan does not depend on the machine.

    It holds about 70 sequences of 124M at 150 tokens each, 140 in int8; never less than four sequences of full length.
    """
    return max(KV_BYTES, 4 * (config.n_ctx + 64) * kv_bytes_per_token(config, precision))


def within_memory(check: Check, config: GPT2Config, precision: Precision, kv_bytes: int) -> Check:
    """A check that also rejects a row whose beams have no room in a worker's memory for keys and values."""
    per_token = kv_bytes_per_token(config, precision)

    def checked(request: Request | Rejected) -> TokenizedRequest | Rejected:
        item = check(request)
        if isinstance(item, Rejected) or not item.params.searches:
            return item
        longest = max(len(ids) for _, ids in item.prompts)
        small = words_of_small(longest, item.params, kv_bytes // per_token, per_token)
        return item.set_aside(small, "rejected") if small else item

    return checked


def fitting_jobs(kv_bytes: int, model_bytes: int) -> int:
    """The cores that this process may use, or fewer if only fewer workers fit into the free memory."""
    free = available_memory() - model_bytes
    return max(1, min(available_jobs(), free // (kv_bytes + WORKER_BYTES)))


def fitting_slots(kv_bytes: int | None, model: Model) -> int:
    """Workers that fit if each has so much memory for keys and values, or the default."""
    return fitting_jobs(kv_bytes or default_kv_bytes(model.config, model.precision), model.bytes)


def check_memory(model: Model) -> None:
    """Refuse a model that does not fit into the free memory even with one worker and one sequence."""
    sequence = (model.config.n_ctx + 64) * kv_bytes_per_token(model.config, model.precision)
    needed, free = model.bytes + WORKER_BYTES + sequence, available_memory()
    if needed > free:
        raise BatchgenError(
            f"model {model.name} needs {needed / 1e9:.1f} GB of memory ({model.bytes / 1e9:.1f} of weights in "
            f"{model.precision}, {sequence / 1e9:.1f} for one full sequence, the rest a worker's own), and "
            f"{free / 1e9:.1f} GB are free; free some, or use a smaller model"
        )


def available_memory() -> int:
    """Bytes that are free without swapping: MemAvailable, or less if a cgroup limits this process."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return UNKNOWN_MEMORY
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    return min(free, left_of_cgroup(Path("/sys/fs/cgroup")))


def left_of_cgroup(group: Path) -> int:
    """Bytes up to a cgroup's limit (version 2); the kernel frees cached files on demand, so they do not count."""
    limit, used, stat = group / "memory.max", group / "memory.current", group / "memory.stat"
    if not (limit.exists() and used.exists() and (text := limit.read_text().strip()).isdigit()):
        return UNKNOWN_MEMORY
    fields = dict(line.split() for line in stat.read_text().splitlines()) if stat.exists() else {}
    cached = int(fields.get("inactive_file", 0)) + int(fields.get("active_file", 0))
    return max(int(text) - max(int(used.read_text()) - cached, 0), 0)


# ---- the plan


@dataclass(frozen=True, slots=True)
class Setting:
    """What a plan depends on besides the job, its input and its model."""

    rows: int  # to generate: fewer than the input's in a retry
    slots: int  # chunks that can be done at once; 0: not known yet
    format: str  # of the output: parquet, jsonl or dataset


def fit_task(task: TaskOptions | None, config: GPT2Config) -> TaskOptions | None:
    """The task with the stride or the layer that it comes to with this model; UsageError for one that it lacks.

    n_ctx 1024, n_layer 12: stride None -> 1024; layer -1 -> 12
    """
    if isinstance(task, ScoreOptions) and task.kind == "text":
        stride = task.stride or config.n_ctx
        if stride > config.n_ctx:
            raise UsageError(f"{say('stride', stride)} is out of range (1 to {config.n_ctx}, the model's n_ctx)")
        return replace(task, stride=stride)
    if isinstance(task, EmbedOptions):
        return replace(task, layer=layer_index(task.layer, config))
    return task


def select(job: Job, facts: Facts) -> Selection:
    """The rows of the input that the job does; a warning if there are none."""
    input = job.input
    seed, shard = job.sampling.seed, input.shard
    found = select_rows(facts.rows, input.skip_rows, input.limit, input.sample, seed=seed, shard=shard)
    if facts.rows and not len(found):
        asked = (("skip_rows", input.skip_rows or None), ("shard", show_shard(shard)))
        words = " and ".join(say(name, value) for name, value in asked if value is not None)
        logger.warning("note: of the input's %s rows, none is left by %s", f"{facts.rows:,}", words)
    return found


def _check_job(job: Job, facts: Facts, model: Model) -> None:
    """Raise what every row would be rejected for."""
    if job.task is None and pattern_of(job.sampling):
        try_out(job.sampling, model.load_tokenizer())
    if facts.before:
        check_shots(facts.before, model.load_tokenizer(), model.config.n_ctx, job.policy)


def make_plan(job: Job, facts: Facts, model: Model, setting: Setting) -> tuple[Plan, frozenset[str]]:
    """The plan of a job, and the names of its fields that nobody asked for."""
    _check_job(job, facts, model)
    chunk_rows, batch_size, kv_bytes = _sizes(job, facts, model, setting)
    by_fields = not {"csv", "tsv"}.isdisjoint(facts.formats)  # other inputs do not depend on how fields are written
    plan = Plan(
        batchgen=__version__,
        regex=version("regex"),
        llguidance=installed_version() if pattern_of(job.sampling) not in (None, "choices") else "",
        numpy=version("numpy"),
        python=platform.python_version(),
        pyarrow=version("pyarrow"),
        portable=True,
        precision=model.precision,
        input=facts.sha256,
        input_formats=facts.formats,
        rows=facts.rows,
        files=facts.files,
        names=facts.names,
        delimiter=job.input.delimiter if by_fields else "auto",
        quotes=job.input.quotes if by_fields else "yes",
        model=model.name,
        model_hash=model.hash,
        parameters=job.sampling,
        **asdict(job.policy),
        **task_fields(job.input, fit_task(job.task, model.config)),
        format=setting.format,
        token_ids=job.output.token_ids,
        **{name: getattr(job.output, name) for name in ("mean_logprob", "repetition", "drop_duplicates", "rejects")},
        **_rows_and_prompts(job.input, facts),  # type: ignore[arg-type]
        share_prefixes=job.work.share_prefixes,
        chunk_rows=chunk_rows,
        batch_size=batch_size,
        kv_bytes=kv_bytes,
    )
    return plan, frozenset(name for name in ("chunk_rows", "batch_size", "kv_bytes") if getattr(job.work, name) is None)


def _rows_and_prompts(input: InputOptions, facts: Facts) -> dict[str, object]:
    """The fields of a plan that say which rows are done, and what is read of them."""
    names = ("prompt_column", "id_column", "keep", "row_params", "skip_rows", "limit", "sample", "seed_by")
    of_shots = ("n_shots", "shots_column", "shots_end")
    return {
        **{name: getattr(input, name) for name in names + of_shots},
        "shard": show_shard(input.shard),
        "template": facts.template,
        "shots": hashlib.sha256(facts.before.encode()).hexdigest()[:16] if facts.before else None,
    }


def _sizes(job: Job, facts: Facts, model: Model, setting: Setting) -> tuple[int, int, int]:
    """Rows of a chunk, sequences in flight, bytes for keys and values: as asked for, or automatic."""
    work = job.work
    jobs = work.jobs or setting.slots or NOMINAL_JOBS
    width = max(job.sampling.n, job.sampling.num_beams)
    chunk_rows = work.chunk_rows or auto_chunk_rows(setting.rows, jobs, width)
    row_bytes, n_ctx = facts.bytes / max(facts.rows, 1), model.config.n_ctx
    if not work.chunk_rows:
        most = (
            rows_to_read(job.task, row_bytes, n_ctx)
            if job.task
            else rows_to_hold(job.sampling, facts.asks, row_bytes, n_ctx)
        )
        chunk_rows = min(chunk_rows, most)
    if work.time_limit and not work.chunk_rows:  # several chunks should end within it
        tokens = width * job.sampling.max_tokens + row_bytes / BYTES_OF_PROMPT
        chunk_rows = min(chunk_rows, rows_within(work.time_limit / ROUNDS, tokens, model.bytes))
    batch_size = work.batch_size or MAX_BATCH
    kv_bytes = work.kv_bytes or default_kv_bytes(model.config, model.precision)
    check_limits(model.config, model.precision, kv_bytes, batch_size)
    return chunk_rows, batch_size, kv_bytes
