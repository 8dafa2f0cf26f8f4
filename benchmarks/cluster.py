"""The cost of a cluster, compared with one machine's own processes: python -m benchmarks.cluster.

Two tables. The first is about a minute of work on the model tales by one worker and by two, on each backend; ratios
are to loky with as many workers in the same run of this program. The second is chunks of one row with almost no work:
the cost of a chunk, from giving it out to its commit, as the difference between many chunks and few; and the memory of
the run and of its client process at the end of both. The program starts and stops the clusters, on loopback.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.machine import describe
from benchmarks.memory import tree
from tests.support.clusters import DaskCluster, MissingError, RayCluster
from tests.support.models import write_byte_model

ROOT = Path(__file__).parents[1]
BACKENDS = ("loky", "dask", "ray")
MAX_TOKENS = 200
CALIBRATION_ROWS = 256
CHUNKS_A_WORKER = 16
FEW = 200  # chunks


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of the whole command, and of its work: from giving out the first chunk to committing the last."""

    command: float
    work: float
    rss: dict[str, int]  # peak in bytes, of the run and of its client process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of work on loky with one worker; 0: no table")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--chunks", type=int, default=2000, help="of the second table; 0: no table")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS)
    options = parser.parse_args()
    print(describe(max(options.workers)))
    with tempfile.TemporaryDirectory(prefix="batchgen-cluster-") as name:
        folder = Path(name)
        if options.seconds:
            scaling(folder, options.seconds, options.workers, options.backends)
        if options.chunks:
            cost_of_a_chunk(folder, options.chunks, max(options.workers), options.backends)


def scaling(folder: Path, seconds: float, workers: list[int], backends: list[str]) -> None:
    rate = CALIBRATION_ROWS / run(folder, "loky", 1, *tales(folder, CALIBRATION_ROWS, CALIBRATION_ROWS)).work
    print("\n| workers | backend | rows | work s | to loky | command s | to loky |\n|--:|---|--:|--:|--:|--:|--:|")
    for n in workers:
        rows = round(rate * seconds * n)
        arguments = tales(folder, rows, -(-rows // (CHUNKS_A_WORKER * n)))
        base: Timing | None = None
        for backend in backends:
            with cluster(folder, backend, n) as where:
                timing = run(folder, backend, n, *arguments, *where)
            base = base or timing
            ratios = timing.work / base.work, timing.command / base.command
            print(
                f"| {n} | {backend} | {rows:,} | {timing.work:.2f} | {ratios[0]:.3f} | {timing.command:.2f} | "
                f"{ratios[1]:.3f} |",
                flush=True,
            )


def cost_of_a_chunk(folder: Path, chunks: int, workers: int, backends: list[str]) -> None:
    model = write_byte_model(folder / "bytes")
    print(f"\n| backend | ms a chunk ({workers} workers) | run MB | client MB | after chunks |\n|---|--:|--:|--:|--:|")
    for backend in backends:
        with cluster(folder, backend, workers) as where:
            timings = {}
            for n in (FEW, FEW + chunks):
                arguments = [prompts(folder, n), "--model", model, "--max-tokens", 1, "--chunk-rows", 1]
                timings[n] = run(folder, backend, workers, *arguments, *where)
                cost = f"{1000 * (timings[n].work - timings[FEW].work) / chunks:.2f}" if n > FEW else ""
                own, client = (timings[n].rss[who] / 1e6 for who in ("run", "client"))
                print(f"| {backend} | {cost} | {own:.0f} | {client:.0f} | {n:,} |", flush=True)


def tales(folder: Path, rows: int, chunk_rows: int) -> list[object]:
    limits = ["--max-tokens", MAX_TOKENS, "--ignore-eos", "--chunk-rows", chunk_rows]
    return [prompts(folder, rows), "--model", "tales", *limits]


def prompts(folder: Path, rows: int) -> Path:
    path = folder / f"{rows}.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Once there were {row} brothers"}) + "\n" for row in range(rows)))
    return path


@contextmanager
def cluster(folder: Path, backend: str, workers: int) -> Iterator[list[str]]:
    """Start a cluster; yields its options of the command line."""
    if backend == "loky":
        yield []
        return
    kind = {"dask": DaskCluster, "ray": RayCluster}[backend]
    try:
        running = kind(folder / f"{backend}-{workers}-{time.monotonic_ns()}", workers)
    except MissingError as reason:
        sys.exit(f"{backend}: {reason}")
    try:
        yield running.options
    finally:
        running.stop()


def run(folder: Path, backend: str, workers: int, *arguments: object) -> Timing:
    """One batchgen generate in a process of its own."""
    out = folder / f"out-{backend}.parquet"
    start = [sys.executable, "-m", "batchgen", "generate"]
    command = [*start, *arguments, "-o", out, "--jobs", workers, "--quiet", "--overwrite"]
    started = time.monotonic()
    process = subprocess.Popen(
        [str(word) for word in command],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    rss = {"run": 0, "client": 0}
    while process.poll() is None:
        for pid in tree(process.pid):
            who = "run" if pid == process.pid else "client" if is_client(pid) else "worker"
            rss[who] = max(rss.get(who, 0), resident_bytes(pid))
        try:
            process.wait(0.25)
        except subprocess.TimeoutExpired:
            continue
    seconds = time.monotonic() - started
    if process.returncode:
        sys.exit(f"{backend}: {process.communicate()[1]}")
    status = json.loads(Path(f"{out}.status.json").read_text())
    return Timing(seconds, status["seconds"], rss)


def is_client(pid: int) -> bool:
    try:
        return b"batchgen.workers.cluster.driver" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def resident_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


if __name__ == "__main__":
    main()
