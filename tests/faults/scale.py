"""What all this costs: memory of ten million rows and of 100,000 chunks, and time of an undisturbed run."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
from threadpoolctl import threadpool_limits

from batchgen.engine.engine import Engine
from batchgen.input.readers import scan_input
from batchgen.models.registry import find_model
from batchgen.models.shards import load_manifest
from batchgen.output.ledger import open_ledger, work_directory
from batchgen.output.schema import output_schema
from batchgen.output.writer import merge_parts, write_part
from batchgen.planning import plan_chunks
from batchgen.progress import StatusFile, status_path
from batchgen.run import Job, Model, columns, make_plan, reporting, run_metadata, validated, worker_setup
from batchgen.text.tokenizer import Tokenizer
from batchgen.types import Chunk, OutputRow, SamplingParams, TokenizedRequest
from batchgen.workers.worker import completed_row, loaded, run_chunk, to_prompts
from tests.faults.bench import Bench, Run

GROWTH_BYTES = 64 * 2**20
OVERHEAD = 0.02


@dataclass(frozen=True, slots=True)
class Measured:
    """Of one run with the stub model: the parent's peak of resident memory, and seconds."""

    peak: int
    planned: float
    total: float


def ten_million_rows(bench: Bench) -> str:
    """The parent's memory with a tenth of the rows and with all of them."""
    rows = 10_000_000 if bench.full else 20_000
    few, many = _measure(bench, rows // 10), _measure(bench, rows)
    growth = many.peak - few.peak
    assert growth < GROWTH_BYTES, f"{growth / 2**20:.0f} MB more for ten times the rows"
    return f"{_shown(rows // 10, few)}; {_shown(rows, many)}: {growth / 2**20:+.0f} MB"


def hundred_thousand_chunks(bench: Bench) -> str:
    """The parent's memory with a tenth of the chunks and with all of them: one row each, committed, not merged."""
    chunks = 100_000 if bench.full else 500
    few, many = (_measure(bench, n, chunk_rows=1, dataset=True) for n in (chunks // 10, chunks))
    growth = many.peak - few.peak
    assert growth < GROWTH_BYTES, f"{growth / 2**20:.0f} MB more for ten times the chunks"
    return f"{_shown(chunks // 10, few)}; {_shown(chunks, many)}: {growth / 2**20:+.0f} MB"


def _shown(rows: int, measured: Measured) -> str:
    peak, planned, total = measured.peak / 2**20, measured.planned, measured.total
    return f"{rows:,} rows: peak {peak:.0f} MB, planned in {planned:.1f} s, {total:.0f} s in all"


def _measure(bench: Bench, rows: int, *, chunk_rows: int = 512, dataset: bool = False) -> Measured:
    path = bench.new_folder() / "prompts.jsonl"
    with open(path, "w") as file:
        for row in range(rows):
            file.write(f'{{"prompt": "{row % 1000} times", "id": {row}}}\n')
    out = bench.new_output(suffix="" if dataset else ".parquet")
    more = ["--format", "dataset"] if dataset else []
    run = bench.start(out, "--chunk-rows", str(chunk_rows), *more, prompts=path, driver="stubbed")
    peak, planned = 0, 0.0
    while run.process.poll() is None:
        peak = max(peak, _peak_bytes(run))
        if not planned and (work_directory(out) / "plan.json").exists():
            planned = time.monotonic() - run.started
        time.sleep(0.05)
    assert run.finish() == 0, run.said
    assert sum(pq.read_metadata(part).num_rows for part in (out.glob("*.parquet") if dataset else [out])) == rows
    bench.forget(out)
    path.unlink()
    return Measured(peak, planned, run.seconds)


def _peak_bytes(run: Run) -> int:
    """The most that the parent has ever held (VmHWM); 0 once it is over."""
    try:
        lines = Path(f"/proc/{run.pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


# ---- time


class _Clock:
    """Seconds of named pieces of work, the fastest of each: what others do on the machine does not count."""

    def __init__(self) -> None:
        self.pieces: dict[object, float] = {}

    @property
    def seconds(self) -> float:
        return sum(self.pieces.values())

    def time(self, piece: object, work: Callable[[], object]) -> object:
        started = time.perf_counter()
        result = work()
        self.pieces[piece] = min(time.perf_counter() - started, self.pieces.get(piece, float("inf")))
        return result


def _bare_rows(chunk: Chunk, engine: Engine, tokenizer: Tokenizer, params: SamplingParams) -> list[OutputRow]:
    requests = {item.row: item for item in chunk.items if isinstance(item, TokenizedRequest)}
    prompts = [prompt for request in requests.values() for prompt in to_prompts(request, tokenizer)]
    seeds = {prompt.row: prompt.seeds[0] for prompt in prompts}
    done = [completed_row(requests[c.row], c, tokenizer, seeds[c.row], params) for c in engine.generate(prompts)]
    return sorted(done, key=lambda row: row.row)


def overhead(bench: Bench) -> str:
    """The same chunks of `tales` by the bare engine and as a worker does them, turn by turn in one process.

    Bare: the engine, the text of its tokens, one Parquet file at the end. Whole: that with the work directory, its
    plan, the worker's marker, a part with its fsyncs and hashes for every chunk, commits, progress, status, merge and
    clearing up.
    """
    rounds, chunk_rows, n_chunks = (5, 511, 4) if bench.full else (1, 16, 2)  # 511: as planned for 100,000 rows
    path = bench.new_folder() / "prompts.jsonl"
    lines = [json.dumps({"prompt": f"The king said to his {row}. daughter"}) for row in range(chunk_rows * n_chunks)]
    path.write_text("\n".join(lines))
    params = SamplingParams(max_tokens=40, temperature=0.8)
    job = Job(path, bench.new_output(), "tales", params, jobs=1, chunk_rows=chunk_rows)
    directory = find_model("tales")
    model = Model(directory, load_manifest(directory))
    bare, whole = _Clock(), _Clock()
    with threadpool_limits(1, user_api="blas"):
        for i in range(rounds):
            _take_turns(job, model, bare, whole, first=i % 2)
    share = 1 - bare.seconds / whole.seconds
    assert share < (OVERHEAD if bench.full else 1), f"{share:.1%} of {whole.seconds:.1f} s"
    times = f"{whole.seconds:.1f} s, bare {bare.seconds:.1f} s"
    return f"{share:.2%} of wall time ({times}; {n_chunks} chunks of {chunk_rows} rows, the fastest of {rounds} each)"


def _take_turns(job: Job, model: Model, bare: _Clock, whole: _Clock, first: int) -> None:
    facts = scan_input(job.input)
    plan, automatic = make_plan(job, model, facts, facts.rows)
    chunks = list(plan_chunks(validated(job, model), job.chunk_rows or 1))
    schema = output_schema()
    rows = []
    ledgers = open_ledger(job.output)
    ledger = whole.time("lock", ledgers.__enter__)
    plan = whole.time("plan", lambda: ledger.settle(plan, automatic, restart=False))
    setup = worker_setup(job, model, plan, columns(job, facts))
    engine, tokenizer = loaded(setup)
    status = StatusFile(status_path(job.output), str(job.output))

    def as_a_worker(chunk) -> None:
        with reporting(lambda _: None, status, ledger, facts.rows):
            ledger.commit(run_chunk(setup, chunk, str(ledger.attempt)))

    for i, chunk in enumerate(chunks):
        for turn in (i + first, i + first + 1):
            if turn % 2:
                rows += bare.time(i, lambda chunk=chunk: _bare_rows(chunk, engine, tokenizer, job.params))
            else:
                whole.time(i, lambda chunk=chunk: as_a_worker(chunk))
    whole.time("merge", lambda: merge_parts(ledger.parts(), job.output, schema, run_metadata(plan), facts.rows))
    whole.time("clear", lambda: ledgers.__exit__(None, None, None))
    bare.time("write", lambda: write_part(rows, job.output.with_name("bare.parquet"), schema))
    assert pq.read_table(job.output).equals(pq.read_table(job.output.with_name("bare.parquet")))
    job.output.with_name("bare.parquet").unlink()
