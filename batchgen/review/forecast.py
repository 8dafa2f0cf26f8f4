"""What a run would do, without doing it: rows, rejects, chunks, memory, and how long it would take.

The time is a sum over chunks of costs measured on this machine with rows of the input itself:

    seconds = prompt * (prompt tokens read) + step * (decode steps) + sequence * (tokens generated)
              + scored * (tokens scored)

A decode step costs `step` for reading the weights, however many sequences it serves, and `sequence` for each of them.
"""

import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterable
from concurrent.futures import wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from batchgen.engine.limits import kv_bytes_per_token
from batchgen.engine.sequence import Prompt, Sequence, expand, expand_texts
from batchgen.errors import BatchgenError
from batchgen.gpt2.machine_code import prepare_kernels
from batchgen.input.prompts import Cut
from batchgen.input.shots import open_prompts
from batchgen.input.validation import make_check
from batchgen.job import EmbedOptions, Job, ScoreOptions, TaskOptions
from batchgen.models.model import Model
from batchgen.options import say
from batchgen.output.finished import find_finished
from batchgen.output.ledger import Ledger
from batchgen.output.outputs import Output, open_output
from batchgen.output.reused import read_older
from batchgen.output.rows import Rows
from batchgen.output.schema import Columns, choose_columns
from batchgen.plan import Plan
from batchgen.planning import WORKER_BYTES, Setting, check_memory, fitting_slots, make_plan, select, within_memory
from batchgen.text.tokenizer import Tokenizer
from batchgen.types import Chunk, Precision, Reason, Rejected, RowParameters, Task, TokenizedRequest
from batchgen.workers.complete import asked_params, samples_of, to_prompts
from batchgen.workers.outlook import Lengths
from batchgen.workers.pool import end_workers, exit_codes, keep_executor, no_interrupts_to_workers, take_executor
from batchgen.workers.score import to_prompts as to_scored
from batchgen.workers.worker import WorkerSetup, load_engine
from batchgen.workers.workers import worker_setup

SAMPLE_ROWS = 256  # evenly spread over the input
PLACES_SHOWN = 8
MEASURED_STEPS = 6
MEASURED_TOKENS = 4096  # that are read, if nothing is generated; or those of one row


@dataclass(frozen=True, slots=True)
class ChunkCost:
    """The work of one chunk."""

    prompt_tokens: int  # to be read: shared ones once
    samples: int
    max_tokens: int  # of the longest
    sum_max_tokens: int
    scored: int = 0  # tokens, each of them with a row of logits


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds, measured in one worker while all workers run."""

    prompt: float  # per prompt token
    step: float  # per decode step
    sequence: float  # per sequence in a decode step
    stop: float  # the probability that a sequence ends at a token
    scored: float = 0.0  # per scored token

    def expected_tokens(self, max_tokens: float) -> float:
        return Lengths(max_tokens, self.stop).expected()

    def seconds(self, chunk: ChunkCost, max_batch: int) -> float:
        if not chunk.samples:
            return 0.0
        mean = chunk.sum_max_tokens / chunk.samples
        generated = chunk.samples * self.expected_tokens(mean)
        longest = Lengths(chunk.max_tokens, self.stop).longest(chunk.samples)
        steps = max(longest, generated / max_batch)
        read = self.prompt * chunk.prompt_tokens + self.scored * chunk.scored
        return read + self.step * steps + self.sequence * generated


@dataclass(slots=True)
class Reject:
    """Rows that are rejected for one reason."""

    example: str
    rows: int = 0
    places: list[str] = field(default_factory=list)  # the first ones


@dataclass(frozen=True, slots=True)
class Shown:
    """One of the first prompts, as the model reads it."""

    name: str  # its id, or `row 0`
    tokens: int
    texts: tuple[str, ...]  # the prompt, and what is scored after it: its completion, its choices, the first window
    windows: int = 1  # of a text


@dataclass(slots=True)
class Forecast:
    """What `batchgen plan` prints."""

    row_parameters: RowParameters = field(default_factory=RowParameters)
    task: Task = "generate"
    rows: int = 0
    input_rows: int = 0  # of which those are done
    rejects: dict[str, Reject] = field(default_factory=dict)  # by reason, without what it quotes
    dropped: int = 0  # rows that repeat the prompt of an earlier one
    lengths: Counter[int] = field(default_factory=Counter)  # prompt tokens, and those that are scored -> rows
    scored: int = 0  # tokens, also of rows whose equals are scored once
    shared_tokens: int = 0
    duplicates: int = 0
    chunks: list[ChunkCost] = field(default_factory=list)
    chunk_rows: int = 0
    jobs: int = 0
    max_batch: int = 0
    memory: int = 0  # bytes, at most
    seconds: float | None = None
    completion_tokens: float = 0.0
    measured_in: float = 0.0
    precision: Precision = "float32"
    output_rows: int = 0
    reuses: bool = False  # older outputs are named, and of so many input rows
    reused: int = 0  # all samples would be copied from them,
    extended: int = 0  # or some, or they would be continued
    first: list[Shown] = field(default_factory=list)
    is_complete: bool = False  # the output: a run has nothing to do

    @property
    def ok(self) -> int:
        return self.lengths.total() + self.reused

    @property
    def tokens(self) -> int:
        """Of all rows that are ok, read or scored."""
        return sum(length * n for length, n in self.lengths.items())

    @property
    def exit_code(self) -> int:
        """That of a run in which no row fails."""
        if not self.rejects:
            return 0
        return 3 if self.ok else 4


def forecast_job(job: Job, *, measure_time: bool = True, show: int = 0) -> Forecast:
    """Read the whole input as a run would, measure a few of its rows, and keep the first prompts; writes no output."""
    prompts = open_prompts(job.input, job.sampling.seed, spool=Path(tempfile.gettempdir()))
    output = open_output(job, prompts, lambda: model.load_tokenizer()) if job.output.path else None
    model = Model.open(job.model, job.work.precision)
    check_memory(model)
    facts = prompts.scan()
    selection = select(job, facts)
    rows = output.rows_to_do(selection) if output else Rows(len(selection), selection, len(selection))
    setting = Setting(rows.count, fitting_slots(job.work.kv_bytes, model), output.format if output else "parquet")
    plan, automatic = make_plan(job, facts, model, setting)
    forecast = Forecast(prompts.row_parameters, plan.task, chunk_rows=plan.chunk_rows, precision=plan.precision)
    forecast.input_rows = facts.rows
    forecast.reuses = bool(job.work.reuse)
    schema = choose_columns(prompts, facts, plan, 0).schema()
    digests, older = read_older(job.work.reuse, plan, schema, Path(tempfile.gettempdir()))
    plan = replace(plan, reuse=digests)
    if output and not (job.output.retry_failed and rows.count):
        forecast.is_complete = is_finished(output, job, plan, automatic)
    sample: list[TokenizedRequest] = []
    tokenizer = model.load_tokenizer()
    check = make_check(tokenizer, model.config.n_ctx, *plan.rules())
    check = within_memory(check, model.config, plan.precision, plan.kv_bytes)
    cut = Cut.for_output(plan.format, plan.chunk_rows, rows.numbers, drop_prompts=plan.drops("prompt"))
    for chunk in prompts.chunks(facts, job.sampling, check, cut, older):
        count_copied(chunk, forecast)
        for item in chunk.items:
            count_row(item, forecast, sample, max(rows.count // SAMPLE_ROWS, 1))
            show_first(item, forecast, show, tokenizer)
        forecast.chunks.append(chunk_cost(chunk, forecast, share=plan.share_prefixes, task=plan.options()))
    if not plan.rejects:
        forecast.output_rows -= forecast.rows - forecast.ok
    add_memory(forecast, job, plan, model)
    if measure_time and sample:
        columns = Columns(logprobs=job.sampling.logprobs is not None, kind=plan.kind)
        add_time(forecast, worker_setup(model, plan, columns), sample)
    return forecast


def is_finished(output: Output, job: Job, plan: Plan, automatic: frozenset[str]) -> bool:
    """Whether a run would find the output complete; the BatchgenError with which it would refuse another job's."""
    overwrite = job.output.overwrite and not job.output.retry_failed
    ledger = Ledger(output.path, where=output.where, overwrite=overwrite)
    ledger.refuse_other()
    if find_finished(output, ledger, plan, automatic, job.work.restart) is not None:
        return True
    ledger.find_resumed(plan, automatic, job.work.restart)
    return False


def count_copied(chunk: Chunk, forecast: Forecast) -> None:
    """Count the rows of a chunk that are copied as a whole, and those that are continued."""
    if chunk.reused:
        forecast.reused += chunk.reused.rows
        forecast.rows += chunk.reused.rows
        forecast.output_rows += chunk.reused.samples
    forecast.extended += sum(isinstance(item, TokenizedRequest) and item.begun is not None for item in chunk.items)


def count_row(
    item: TokenizedRequest | Rejected, forecast: Forecast, sample: list[TokenizedRequest], every: int
) -> None:
    """Count a row in the forecast, and keep every n-th in the sample."""
    forecast.rows += 1
    if isinstance(item, Rejected) and item.status == "dropped":
        forecast.dropped += 1
        forecast.output_rows += 1
    elif isinstance(item, Rejected):
        reason = Reason.of(item.row, item.place, item.error)
        places = forecast.rejects.setdefault(reason.kind, Reject(reason.text))
        places.rows += 1
        if len(places.places) < PLACES_SHOWN:
            places.places.append(item.place)
        forecast.output_rows += 1
    else:
        forecast.output_rows += len(item.prompts) * item.params.n if item.begun is None else len(item.begun)
        scored = sum(len(one.scored_ids) for one in item.passages)
        forecast.lengths[len(item.prompt_token_ids) + scored] += 1
        forecast.scored += scored
        if (forecast.rows - 1) % every == 0 and len(sample) < SAMPLE_ROWS:
            sample.append(item)


def show_first(item: TokenizedRequest | Rejected, forecast: Forecast, show: int, tokenizer: Tokenizer) -> None:
    """Keep the text of the first prompts: of their tokens, so cut and trimmed as they are."""
    if isinstance(item, TokenizedRequest) and len(forecast.first) < show:
        name = f"row {item.row}" if item.id is None else item.id
        windows = 1 if item.targets else max(len(item.passages), 1)
        scored = [one.scored_ids for one in (item.passages if item.targets else item.passages[:1])]
        texts = tuple(tokenizer.decode(ids) for ids in (item.prompt_token_ids, *scored))
        tokens = len(item.prompt_token_ids) + sum(len(one.scored_ids) for one in item.passages)
        forecast.first.append(Shown(name, tokens, texts, windows))


def list_prompts(request: TokenizedRequest, task: TaskOptions | None) -> list[Prompt]:
    """What is read of a row, in the engine's form, without what changes no work."""
    if isinstance(task, ScoreOptions):
        return to_scored(request)
    params, begun = asked_params(request), request.begun
    scored = None if task or params.prompt_logprobs is None else 1
    n = 1 if params.greedy and begun is None else params.n
    return [
        Prompt(request.row, ids, params, (0,) * n, first, scored=scored, begun=own)
        for first, (_, ids) in zip(range(0, len(request.prompts) * n, n), request.prompts, strict=True)
        if (own := samples_of(begun, first, n)) != ()
    ]


def list_sequences(prompts: Iterable[Prompt], task: TaskOptions | None) -> list[Sequence]:
    """What the engine does for the prompts of a chunk: equal ones once."""
    if isinstance(task, EmbedOptions):
        return [*expand_texts(prompts, task.pool)]
    return [sequence for sequence in expand(list(prompts)) if sequence.read]


def chunk_cost(chunk: Chunk, forecast: Forecast, *, share: bool, task: TaskOptions | None = None) -> ChunkCost:
    """The work that the engine would have with a chunk: equal requests once, shared beginnings of prompts once."""
    from batchgen.engine.scheduler import group_sequences  # with the kernels, which many commands never need

    requests = [item for item in chunk.items if isinstance(item, TokenizedRequest)]
    prompts = [prompt for request in requests for prompt in list_prompts(request, task)]
    sequences = list_sequences(prompts, task)
    distinct = {(id(sequence.prompt), sequence.read) for sequence in sequences}
    _, read = group_sequences(sequences, share)
    forecast.duplicates += len(prompts) - len({prompt for prompt, _ in distinct})
    forecast.shared_tokens += sum(len(ids) for _, ids in distinct) - read
    scored = sum(len(sequence.scored) for sequence in sequences)
    lengths = [sequence.n_left for sequence in sequences for _ in range(sequence.width)]
    return ChunkCost(read, len(lengths), max(lengths, default=0), sum(lengths), scored)


def add_memory(forecast: Forecast, job: Job, plan: Plan, model: Model) -> None:
    """Workers, sequences in flight and memory, from the mean length of a row."""
    per_token = kv_bytes_per_token(model.config, plan.precision)
    mean = forecast.tokens / max(forecast.lengths.total(), 1) + job.sampling.max_tokens
    if job.task:  # a row may have several passages
        read, passages = (sum(getattr(c, name) for c in forecast.chunks) for name in ("prompt_tokens", "samples"))
        mean = max(read / max(passages, 1), 1)
    forecast.max_batch = max(min(plan.batch_size, plan.kv_bytes // int(per_token * mean)), 1)
    forecast.jobs = max(min(job.work.jobs or fitting_slots(plan.kv_bytes, model), len(forecast.chunks)), 1)
    in_flight = min(forecast.max_batch, max((c.samples for c in forecast.chunks), default=0))
    kv_bytes = min(plan.kv_bytes, int(in_flight * mean * per_token))
    forecast.memory = model.bytes + forecast.jobs * (WORKER_BYTES + kv_bytes) + WORKER_BYTES


# ---- time


def add_time(forecast: Forecast, setup: WorkerSetup, sample: list[TokenizedRequest]) -> None:
    """Measure the sample in as many workers as a run would have, and add up the chunks."""
    started = time.monotonic()
    paces = measure_in_workers(forecast, setup, sample)
    pace = Pace(*(float(np.mean([getattr(p, name) for p in paces])) for name in Pace.__slots__))
    forecast.measured_in = time.monotonic() - started
    free = [0.0] * forecast.jobs  # when each worker has finished its chunks so far
    for chunk in forecast.chunks:
        first = free.index(min(free))
        free[first] += pace.seconds(chunk, forecast.max_batch)
        if chunk.sum_max_tokens:
            mean = chunk.sum_max_tokens / chunk.samples
            forecast.completion_tokens += chunk.samples * pace.expected_tokens(mean)
    forecast.seconds = max(free)


def measure_in_workers(forecast: Forecast, setup: WorkerSetup, sample: list[TokenizedRequest]) -> list[Pace]:
    executor = take_executor(forecast.jobs)
    with no_interrupts_to_workers():
        in_flight = max(min(forecast.max_batch, max(c.samples for c in forecast.chunks), len(sample)), 1)
        in_flight = len(sample) if setup.task else in_flight
        futures = [executor.submit(measure, setup, sample[:in_flight]) for _ in range(forecast.jobs)]
    try:
        wait(futures)
        paces = [future.result() for future in futures]
    except BrokenProcessPool as error:
        end_workers(executor)
        remedy = f"if memory ran out, lower {say('jobs')}, or pass --no-time"
        raise BatchgenError(f"a worker died while it measured rows{exit_codes(error)}; {remedy}") from error
    except BaseException:
        end_workers(executor)
        raise
    keep_executor(forecast.jobs, executor)
    return paces


def measure(setup: WorkerSetup, requests: list[TokenizedRequest]) -> Pace:
    """In a worker: read the prompts and generate a few tokens of each, of all together and then of a quarter."""
    if setup.task:
        return measure_reading(setup, setup.task, requests)
    time_steps(setup, requests[:2])  # the first pass does more than later ones
    many = time_steps(setup, requests)
    few = time_steps(setup, requests[: max(len(requests) // 4, 1)])
    decode = [(step.running, step.seconds) for step in (*many, *few) if not step.reading]
    sequence, step = _fit_line(decode)
    reading = sum(max(s.seconds - s.running * sequence, 0.0) for s in many if s.reading)
    cost = chunk_cost(Chunk(0, tuple(requests)), Forecast(), share=setup.share_prefixes)
    stops, drawn = sum(s.stops for s in many), sum(s.drawn for s in many)
    return Pace(reading / max(cost.prompt_tokens, 1), step, sequence, stops / max(drawn, 1))


def measure_reading(setup: WorkerSetup, task: TaskOptions, requests: list[TokenizedRequest]) -> Pace:
    """In a worker: read some rows, and then again with only the last token of each passage scored."""
    tokens = sum(len(prompt.token_ids) for request in requests for prompt in list_prompts(request, task))
    few = requests[:: max(-(-tokens // MEASURED_TOKENS), 1)]
    prompts = [prompt for request in few for prompt in list_prompts(request, task)]
    time_reading(setup, prompts[:1])  # the first pass does more than later ones
    seconds, read = time_reading(setup, prompts)
    lasts = [replace(prompt, scored=len(prompt.token_ids) - 1) for prompt in prompts if prompt.scored]
    scored = sum(len(prompt.token_ids) - (prompt.scored or 0) for prompt in prompts) if lasts else 0
    per_token = 0.0
    if scored >= 2 * len(lasts) > 0:  # else they are a part of reading
        less, read_again = time_reading(setup, lasts)
        ratio = read / max(read_again, 1)
        apart = scored - len(lasts) * ratio
        per_token = max((seconds - less * ratio) / apart, 0.0) if apart > scored / 2 else 0.0
    return Pace(max(seconds - per_token * scored, 0.0) / max(read, 1), 0.0, 0.0, 0.0, per_token)


def time_reading(setup: WorkerSetup, prompts: list[Prompt]) -> tuple[float, int]:
    """Seconds, and the tokens that were read in them."""
    prepare_kernels()
    engine, _, _ = load_engine(setup)
    before, started = engine.work.read, time.perf_counter()
    if isinstance(setup.task, EmbedOptions):
        deque(engine.embed(prompts, setup.task.layer, setup.task.pool), 0)
    else:
        deque(engine.generate(prompts), 0)
    return time.perf_counter() - started, engine.work.read - before


def _fit_line(decode: list[tuple[int, float]]) -> tuple[float, float]:
    """Seconds per running sequence, and for the step itself: a line through (sequences, seconds)."""
    if not decode:  # rows of one token, which prefill already gives
        return 0.0, 0.0
    counts, times = (np.array(values, float) for values in zip(*decode, strict=True))
    if len(set(counts)) == 1:
        return 0.0, float(times.mean())
    sequence, step = np.polyfit(counts, times, 1)
    return max(float(sequence), 0.0), max(float(step), 0.0)


@dataclass(frozen=True, slots=True)
class TimedStep:
    """One step of the engine; `reading` if it also read prompts."""

    reading: bool
    running: int
    seconds: float
    drawn: int  # tokens, first ones of sequences included
    stops: int  # sequences that ended before their max_tokens


def time_steps(setup: WorkerSetup, requests: list[TokenizedRequest]) -> list[TimedStep]:
    """Time steps until MEASURED_STEPS of them have followed the last prompt, or until nothing is left."""
    prepare_kernels()
    engine, tokenizer, _ = load_engine(setup)
    prompts = [prompt for request in requests for prompt in to_prompts(request, tokenizer)]
    result: list[TimedStep] = []
    left = MEASURED_STEPS
    with closing(engine.steps(prompts)) as steps:  # type: ignore[type-var]
        before, started = copy(engine.work), time.perf_counter()
        for _ in steps:
            seconds, work = time.perf_counter() - started, copy(engine.work)
            drawn, reading = work.generated - before.generated, work.read > before.read
            running = drawn - (work.started - before.started)
            result.append(TimedStep(reading, running, seconds, drawn, work.stopped - before.stopped))
            left -= not reading
            if not left:
                break
            before, started = work, time.perf_counter()
    return result
