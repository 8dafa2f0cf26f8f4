"""Simulated runs beside real ones of this machine: what benchmarks.simulate_cluster --validate prints.

The simulation is told what a row costs and how long a worker takes to start, as two real runs with chunks of 100 rows
say, and by how much the engine alone is slower or faster in chunks of other sizes; then it foretells runs of another
length, with chunks of those sizes. Where other work is on the machine that says little. So there is a second check, of
all but the engine: workers that sleep, as long as they are told, and so can be more than there are cores.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from threadpoolctl import threadpool_limits

from batchgen.jobs import cli
from batchgen.models.registry import find_model
from batchgen.models.shards import load_manifest
from batchgen.output.schema import output_schema
from batchgen.output.writer import write_part
from batchgen.progress import status_path
from batchgen.text.tokenizer import Tokenizer
from batchgen.types import Chunk, OutputRow, Receipt, SamplingParams, TokenizedRequest
from batchgen.workers import pool, worker
from batchgen.workers.worker import WorkerSetup, map_engine, to_prompts
from benchmarks.machine import clean_environment
from benchmarks.simulate_costs import best
from benchmarks.simulation import Cluster, simulate
from benchmarks.systems import ROOT

SHORT, LONG, CHUNK_ROWS = 500, 1500, 100  # of the runs that the simulation is told of
PROMPTS, CHUNK_SIZES = 2000, (25, 50, 100, 250, 667)  # of those that it foretells
SLEEP = "SIMULATE_CHECK_SLEEP"  # seconds a row
LOG = "SIMULATE_CHECK_LOG"  # the file that sleeping workers write


def line(row: int) -> str:
    return f"The king said to his {row}. daughter"


def real_run(
    prompts: int, jobs: int, chunk_rows: int, more: Sequence[str] = (), asleep: float | None = None
) -> tuple[float, list[float]]:
    """Seconds of a run of tales in a process of its own, from the start of its workers to the last commit.

    With `asleep` there is no model: a worker sleeps so many seconds for each row. The seconds are then those from the
    first worker's first chunk to the end of the last, and beside them is when each worker came to its first.
    """
    with tempfile.TemporaryDirectory(prefix="batchgen-check-") as name:
        path, out, log = Path(name) / "prompts.jsonl", Path(name) / "out", Path(name) / "log"
        path.write_text("\n".join(json.dumps({"prompt": line(row)}) for row in range(prompts)), encoding="utf-8")
        start = ["-m", "batchgen"] if asleep is None else ["-c", f"from {__name__} import sleeping; sleeping()"]
        sizes = ["--jobs", str(jobs), "--chunk-rows", str(chunk_rows), "--max-tokens", "40", "--temperature", "0.8"]
        command = [sys.executable, *start, "generate", str(path), "-o", str(out), "--model", "tales", *sizes]
        environment = clean_environment() | {"PYTHONPATH": str(ROOT), SLEEP: str(asleep), LOG: str(log)}
        command += ["--format", "dataset", "--show", "0", *more]
        subprocess.run(command, check=True, env=environment, cwd=name, capture_output=True)
        seconds = float(json.loads(status_path(out).read_text(encoding="utf-8"))["seconds"])
        return (seconds, []) if asleep is None else _logged(log)


def _logged(log: Path) -> tuple[float, list[float]]:
    """Lines are a worker's process id, and when it began a chunk and ended it."""
    first: dict[str, float] = {}
    last = 0.0
    for words in map(str.split, log.read_text(encoding="utf-8").splitlines()):
        pid, began, ended = words[0], float(words[1]), float(words[2])
        first[pid], last = min(began, first.get(pid, began)), max(ended, last)
    start = min(first.values())
    return last - start, [at - start for at in first.values()]


# ---- workers that sleep: started in place of the command line, with batchgen unchanged


def sleeping() -> None:
    pool.run_chunk = sleeping_chunk
    cli.main()


def sleeping_chunk(setup: WorkerSetup, chunk: Chunk, attempt: str) -> Receipt:
    worker.complete_chunk = sleeping_rows
    return worker.run_chunk(setup, chunk, attempt)


@cache
def warm_up() -> None:
    """The first part that a process writes takes it a quarter of a second, which belongs to its start."""
    with tempfile.TemporaryDirectory() as name:
        write_part([], Path(name) / "part.parquet", output_schema())


def sleeping_rows(chunk: Chunk, *_: object) -> list[OutputRow]:
    warm_up()
    began = time.time()
    time.sleep(float(os.environ[SLEEP]) * len(chunk.items))
    with open(os.environ[LOG], "a", encoding="utf-8") as log:
        log.write(f"{os.getpid()} {began} {time.time()}\n")
    rows = []
    for item in chunk.items:
        assert isinstance(item, TokenizedRequest)
        n = len(item.prompt_token_ids)
        rows.append(OutputRow(item.row, 0, item.id, item.prompt, "", n, 0, "stop", "ok", None, None))
    return rows


# ---- the checks


def engine_costs(sizes: Sequence[int], rounds: int) -> dict[int, float]:
    """Seconds of the processor a row, by rows a chunk, of the engine alone on these prompts."""
    directory = find_model("tales")
    tokenizer = Tokenizer.load(directory)
    engine = map_engine(directory, load_manifest(directory), tokenizer)
    params = SamplingParams(max_tokens=40, temperature=0.8)
    items = [
        TokenizedRequest(n, "", None, line(n), tuple(tokenizer.encode(line(n))), params) for n in range(max(sizes))
    ]
    prompts = [prompt for item in items for prompt in to_prompts(item, tokenizer)]
    with threadpool_limits(1, user_api="blas"):
        return {n: best(lambda n=n: list(engine.generate(prompts[:n])), rounds) / n for n in sizes}


def told_of(short: float, long: float, jobs: int) -> Cluster:
    """A cluster of this machine, without what it does not have; short and long are seconds of the two runs."""
    row_s = (long - short) * jobs / (LONG - SHORT)
    return Cluster(
        rows=LONG,
        chunk_rows=CHUNK_ROWS,
        workers=jobs,
        workers_per_node=jobs,
        row_s=row_s,
        row_spread_s=0.0,
        startup_s=max(short - SHORT * row_s / jobs, 0.0),
        node_spread=0.0,
        straggler_share=0.0,
        worker_mtbf_s=0.0,
        node_mtbf_s=0.0,
        write_s=0.0,  # is in what a row costs
        commit_s=1.5e-4,
        scheduler_s=0.0,
    )


def check(repeat: int, more: Sequence[str] = ()) -> list[tuple[int, int, int, float, float]]:
    """Workers, prompts, rows a chunk, real seconds (the best of `repeat`) and simulated ones."""
    costs = engine_costs((CHUNK_ROWS, *CHUNK_SIZES), 3)
    rows = []
    for jobs in (1, 2):
        real = lambda n, size, jobs=jobs: min(real_run(n, jobs, size, more)[0] for _ in range(repeat))  # noqa: E731
        cluster = told_of(real(SHORT, CHUNK_ROWS), real(LONG, CHUNK_ROWS), jobs)
        for size in CHUNK_SIZES:
            row_s = cluster.row_s * costs[size] / costs[CHUNK_ROWS]
            foretold = simulate(replace(cluster, rows=PROMPTS, chunk_rows=size, row_s=row_s)).makespan
            rows.append((jobs, PROMPTS, size, real(PROMPTS, size), foretold))
    return rows


def check_asleep(jobs: int = 16, row_s: float = 0.02) -> list[tuple[int, int, int, float, float]]:
    """The same of workers that sleep; when each of them came is told, as on few cores that is now sooner, now later."""
    rows = []
    for prompts, chunk_rows in ((16_000, 10), (16_000, 50), (16_000, 200), (16_000, 667), (4_000, 200)):
        real, starts = real_run(prompts, jobs, chunk_rows, asleep=row_s)
        cluster = replace(told_of(0.0, 0.0, jobs), rows=prompts, chunk_rows=chunk_rows, row_s=row_s, write_s=4e-3)
        rows.append((jobs, prompts, chunk_rows, real, simulate(cluster, starts).makespan))
    return rows
