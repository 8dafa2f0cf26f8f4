"""Simulated runs beside real ones of this machine: what benchmarks.simulate_cluster --validate prints.

The simulation is told what a row costs and how long a worker takes to start, as two real runs with chunks of 100 rows
say; then it foretells runs of another length, with chunks of other sizes.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from batchgen.status import status_path
from benchmarks.machine import clean_environment
from benchmarks.simulation import Cluster, simulate
from benchmarks.systems import ROOT

SHORT, LONG, CHUNK_ROWS = 500, 1500, 100  # of the runs that the simulation is told of
FORETOLD = ((2000, 25), (2000, 50), (2000, 100), (2000, 250), (2000, 667))


def real_run(prompts: int, jobs: int, chunk_rows: int, more: Sequence[str] = ()) -> float:
    """Seconds of a run of tales in a process of its own, from the start of its workers to the last commit."""
    with tempfile.TemporaryDirectory(prefix="batchgen-check-") as name:
        path, out = Path(name) / "prompts.jsonl", Path(name) / "out"
        lines = (json.dumps({"prompt": f"The king said to his {row}. daughter"}) for row in range(prompts))
        path.write_text("\n".join(lines), encoding="utf-8")
        sizes = ["--jobs", str(jobs), "--chunk-rows", str(chunk_rows), "--max-tokens", "40", "--temperature", "0.8"]
        command = [sys.executable, "-m", "jobs.cli", "generate", str(path), "-o", str(out), "--model", "tales"]
        command += [*sizes, "--format", "dataset", "--show", "0", *more]
        environment = clean_environment() | {"PYTHONPATH": str(ROOT)}
        subprocess.run(command, check=True, env=environment, cwd=name, capture_output=True)
        return float(json.loads(status_path(out).read_text(encoding="utf-8"))["seconds"])


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
    rows = []
    for jobs in (1, 2):
        best = lambda n, size, jobs=jobs: min(real_run(n, jobs, size, more) for _ in range(repeat))  # noqa: E731
        cluster = told_of(best(SHORT, CHUNK_ROWS), best(LONG, CHUNK_ROWS), jobs)
        for prompts, chunk_rows in FORETOLD:
            foretold = simulate(replace(cluster, rows=prompts, chunk_rows=chunk_rows)).makespan
            rows.append((jobs, prompts, chunk_rows, best(prompts, chunk_rows), foretold))
    return rows
