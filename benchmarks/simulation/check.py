"""Simulated runs beside real runs of this machine, which should do nothing else meanwhile.

Two real runs with chunks of 100 rows say what a row and the start of workers cost here; the engine without workers says
what a row costs in chunks of other sizes, relative to that. From these the simulation predicts longer runs.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from math import inf
from pathlib import Path
from time import process_time
from timeit import repeat

from batchgen import Generator
from benchmarks.simulation.model import Cluster, simulate
from benchmarks.simulation.tables import table

WORKERS, CHUNK_ROWS, SHORT, LONG = 2, 100, 500, 1500  # of the two runs; SHORT and LONG are numbers of rows
ROWS, SIZES = 2000, (25, 50, 100, 250, 667)  # of the predicted runs; SIZES are rows of a chunk
PROMPTS = [f"The king said to his {row}. daughter" for row in range(ROWS)]
RUN = ("--format=dataset", "--show=0", "--max-tokens=40", "--temperature=0.8")


def run_real(rows: int, chunk_rows: int) -> float:
    """Seconds of a run of tales from the start of its workers to the last commit, by its status file."""
    with tempfile.TemporaryDirectory(prefix="batchgen-check-") as folder:
        prompts, out = Path(folder, "prompts.jsonl"), Path(folder, "out")
        prompts.write_text("\n".join(json.dumps({"prompt": text}) for text in PROMPTS[:rows]), encoding="utf-8")
        command = [sys.executable, "-m", "batchgen", "generate", prompts, f"--output={out}", *RUN]
        command += [f"--jobs={WORKERS}", f"--chunk-rows={chunk_rows}"]
        subprocess.run(command, check=True, cwd=Path(__file__).parents[2], capture_output=True)
        return json.loads(Path(folder, "out.status.json").read_text(encoding="utf-8"))["seconds"]


def measure_costs() -> dict[int, float]:
    """Seconds of the processor for a row by rows of a chunk, without workers; the best of three."""
    generator = Generator("tales")
    work = {n: lambda n=n: generator.generate(PROMPTS[:n], max_tokens=40, temperature=0.8) for n in SIZES}
    return {n: min(repeat(work[n], timer=process_time, repeat=3, number=1)) / n for n in SIZES}


def fit(short_s: float, long_s: float) -> Cluster:
    """This machine, from the seconds of the two runs; the cost of a row includes its share of a part."""
    row_s = (long_s - short_s) * WORKERS / (LONG - SHORT)
    start = {"row_s": row_s, "startup_s": max(short_s - SHORT * row_s / WORKERS, 0.0)}
    equal = {"row_spread_s": 0.0, "node_spread": 0.0, "straggler_share": 0.0, "worker_mtbf_s": inf, "node_mtbf_s": inf}
    cheap = {"write_s": 0.0, "commit_s": 1.5e-4, "scheduler_s": 0.0}
    return Cluster(LONG, CHUNK_ROWS, WORKERS, WORKERS, relative_cost=((CHUNK_ROWS, 1.0),), **start, **equal, **cheap)


def real(_: Cluster) -> str:
    """The simulation beside real runs of this machine"""
    costs, rows = measure_costs(), []
    relative_cost = tuple((n, cost / costs[CHUNK_ROWS]) for n, cost in costs.items())
    c = replace(fit(run_real(SHORT, CHUNK_ROWS), run_real(LONG, CHUNK_ROWS)), rows=ROWS, relative_cost=relative_cost)
    for n in SIZES:
        seconds, predicted = run_real(ROWS, n), simulate(replace(c, chunk_rows=n)).now
        rows.append([f"{ROWS:,}", f"{n}", f"{seconds:.1f} s", f"{predicted:.1f} s", f"{predicted / seconds - 1:+.1%}"])
    return table(["prompts", "chunk rows", "real", "simulated", ""], rows)
