"""The costs of keeping the promises: memory of ten million rows and of 100,000 chunks, and time."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pyarrow.parquet as pq

from batchgen.engine.engine import Engine
from batchgen.input.prompts import Cut, Prompts
from batchgen.input.validation import make_check
from batchgen.job import Job, WorkOptions
from batchgen.models.model import Model
from batchgen.output.ledger import open_ledger, work_directory
from batchgen.output.outputs import open_output
from batchgen.output.parts import write_part
from batchgen.planning import Setting, make_plan
from batchgen.progress import reporting
from batchgen.selection import Selection
from batchgen.text.tokenizer import Tokenizer
from batchgen.types import Chunk, OutputRow, SamplingParams, TokenizedRequest
from batchgen.workers.complete import completed_row, to_prompts
from batchgen.workers.watch import make_reporter
from batchgen.workers.worker import load_engine, run_chunk
from batchgen.workers.workers import worker_setup
from tests.faults.bench import Bench, Run

GROWTH_BYTES = 64 * 2**20
OVERHEAD = 0.02

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Measured:
    """A run with the stub model: the parent's peak of resident memory in bytes, seconds until the plan, and in all."""

    peak: int
    planned: float
    total: float


def measure_rows(bench: Bench) -> str:
    """The parent's memory with a tenth of the rows and with all rows."""
    rows = 10_000_000 if bench.full else 10_000
    few, many = _measure(bench, rows // 10), _measure(bench, rows)
    growth = many.peak - few.peak
    assert growth < GROWTH_BYTES, f"{growth / 2**20:.0f} MB more for ten times the rows"
    return f"{_show(rows // 10, few)}; {_show(rows, many)}: {growth / 2**20:+.0f} MB"


def measure_chunks(bench: Bench) -> str:
    """The parent's memory with a tenth of the chunks and with all chunks: one row each, committed, not merged."""
    chunks = 100_000 if bench.full else 300
    few, many = (_measure(bench, n, chunk_rows=1, dataset=True) for n in (chunks // 10, chunks))
    growth = many.peak - few.peak
    assert growth < GROWTH_BYTES, f"{growth / 2**20:.0f} MB more for ten times the chunks"
    return f"{_show(chunks // 10, few)}; {_show(chunks, many)}: {growth / 2**20:+.0f} MB"


def _show(rows: int, measured: Measured) -> str:
    peak, planned, total = measured.peak / 2**20, measured.planned, measured.total
    return f"{rows:,} rows: peak {peak:.0f} MB, planned in {planned:.1f} s, {total:.0f} s in all"


def _measure(bench: Bench, rows: int, *, chunk_rows: int = 512, dataset: bool = False) -> Measured:
    path = bench.new_folder() / "prompts.jsonl"
    with open(path, "w") as file:
        for row in range(rows):
            file.write(f'{{"prompt": "{row % 1000} times", "id": {row}}}\n')
    out = bench.new_output(suffix="" if dataset else ".parquet")
    more, jobs = ["--format", "dataset"] if dataset else [], 2 if bench.full else 1
    run = bench.start(out, "--chunk-rows", str(chunk_rows), *more, jobs=jobs, prompts=path, driver="run_stub")
    peak, planned = 0, 0.0
    while run.process.poll() is None:
        peak = max(peak, _peak_bytes(run))
        if not planned and (work_directory(out) / "plan.json").exists():
            planned = time.monotonic() - run.started
        time.sleep(0.05)
    assert run.finish() == 0, run.said
    assert sum(pq.read_metadata(part).num_rows for part in (out.glob("*.parquet") if dataset else [out])) == rows
    bench.remove(out)
    path.unlink()
    return Measured(peak, planned, run.seconds)


def _peak_bytes(run: Run) -> int:
    """The parent's peak so far (VmHWM); 0 once it has ended."""
    try:
        lines = Path(f"/proc/{run.pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


# ---- time


class Clock:
    """Seconds of pieces of work, of each the fastest: other work on the machine then does not count."""

    def __init__(self) -> None:
        self.pieces: dict[object, float] = {}

    @property
    def seconds(self) -> float:
        return sum(self.pieces.values())

    def time(self, piece: object, work: Callable[[], T]) -> T:
        """Do the work of a piece on the clock."""
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


def measure_overhead(bench: Bench) -> str:
    """The same chunks of `tales` by the bare engine and as a run does them, in turn in one process.

    Bare: the engine, the text of its tokens, one Parquet file at the end. Whole: that with the work directory, its
    plan, the worker's marker, for every chunk a part that is synced, hashed and committed, progress, status, merge
    and clearing up.
    """
    rounds, chunk_rows, n_chunks = (5, 511, 4) if bench.full else (1, 16, 2)  # 511: as planned for 100,000 rows
    path = bench.new_folder() / "prompts.jsonl"
    lines = [json.dumps({"prompt": f"The king said to his {row}. daughter"}) for row in range(chunk_rows * n_chunks)]
    path.write_text("\n".join(lines))
    sampling = SamplingParams(max_tokens=40, temperature=0.8)
    job = Job(path, bench.new_output(), "tales", sampling, work=WorkOptions(jobs=1, chunk_rows=chunk_rows))
    bare, whole = Clock(), Clock()
    for i in range(rounds):
        _take_turns(job, Model.open(job.model), bare, whole, first=i % 2)
    share = 1 - bare.seconds / whole.seconds
    assert share < (OVERHEAD if bench.full else 1), f"{share:.1%} of {whole.seconds:.1f} s"
    times = f"{whole.seconds:.1f} s, bare {bare.seconds:.1f} s"
    return f"{share:.2%} of wall time ({times}; {n_chunks} chunks of {chunk_rows} rows, the fastest of {rounds} each)"


def _take_turns(job: Job, model: Model, bare: Clock, whole: Clock, first: int) -> None:
    """One round: the steps of run_job in this process, and beside each chunk the bare engine with the same chunk."""
    prompts = Prompts.open(job.input)
    output = open_output(job, prompts, model.load_tokenizer)
    facts = prompts.scan()
    rows = output.rows_to_do(Selection(range(facts.rows)))
    asked = make_plan(job, facts, model, Setting(rows.count, 1, output.format))
    held = open_ledger(output.path)
    ledger = whole.time("lock", held.__enter__)
    plan = whole.time("plan", lambda: output.claim(ledger, *asked, job.work.restart))
    columns = output.columns(facts, plan, model.config.n_embd)
    setup = worker_setup(model, plan, columns)
    engine, tokenizer, _ = load_engine(setup)
    check = make_check(tokenizer, model.config.n_ctx, job.policy)
    cut = Cut.for_output(output.format, plan.chunk_rows, rows.numbers)
    reporter = make_reporter(job, prompts, output, ledger, rows, lambda _: None)
    schema, done = columns.schema(facts.kept), []

    def do_as_a_run(chunk: Chunk) -> None:
        with reporting(reporter):
            ledger.commit(run_chunk(setup, chunk, str(ledger.attempt)))

    for i, chunk in enumerate(prompts.chunks(facts, job.sampling, check, cut)):
        for turn in (i + first, i + first + 1):
            if turn % 2:
                done += bare.time(i, lambda chunk=chunk: _bare_rows(chunk, engine, tokenizer, job.sampling))
            else:
                whole.time(i, lambda chunk=chunk: do_as_a_run(chunk))
    whole.time("merge", lambda: output.publish(ledger, plan, schema, facts.rows))
    whole.time("clear", lambda: held.__exit__(None, None, None))
    bare_path = output.path.with_name("bare.parquet")
    done.sort(key=lambda row: (row.row, row.sample))
    bare.time("write", lambda: write_part(done, bare_path, schema))
    assert pq.read_table(output.path).equals(pq.read_table(bare_path))
    bare_path.unlink()
