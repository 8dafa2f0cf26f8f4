"""How the work is cut: contiguous rows of the input into chunks, and how many workers at once."""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TypeVar

import joblib

from batchgen.engine.engine import kv_bytes_per_token
from batchgen.errors import BatchgenError
from batchgen.gpt2.config import GPT2Config
from batchgen.types import Chunk, Rejected, TokenizedRequest

MIN_CHUNK_ROWS = 16  # starting a process costs more than so few rows
MAX_CHUNK_ROWS = 512  # a lost worker costs at most this much work; more in flight gain nothing
FULL_BATCH_ROWS = 192  # chunks of fewer rows leave the matrix products short of work
ROUNDS = 4  # chunks a worker, where there is enough: long rows in one chunk then do not leave the others idle
KV_BYTES = 1536 * 2**20
WORKER_BYTES = 400 * 2**20  # a worker's interpreter, libraries and work buffers
UNKNOWN_MEMORY = 2**40  # where the system does not tell, memory is not what limits the number of workers

Row = TypeVar("Row")


def available_jobs() -> int:
    """The cores that this process may use: affinity and cgroup counted (joblib)."""
    return int(joblib.cpu_count())


def auto_chunk_rows(rows: int, jobs: int, n: int = 1) -> int:
    """Rows a chunk so that all workers end together; the work of a row is its n samples.

    rows=12, jobs=2 -> 12; rows=192, jobs=2 -> 96; rows=1_000, jobs=2 -> 250; rows=100_000, jobs=2 -> 511;
    rows=12, jobs=2, n=100 -> 2
    """
    if n > 1:
        return max(auto_chunk_rows(rows * n, jobs) // n, 1)
    rounds = max(-(-rows // (jobs * MAX_CHUNK_ROWS)), min(ROUNDS, rows // (jobs * FULL_BATCH_ROWS)), 1)
    chunks = max(min(jobs * rounds, rows // MIN_CHUNK_ROWS), 1)
    return max(-(-rows // chunks), 1)


def n_chunks(rows: int, chunk_rows: int) -> int:
    return -(-rows // chunk_rows)


def default_kv_bytes(config: GPT2Config) -> int:
    """Keys and values that one worker may hold: a fixed amount, so that a plan does not depend on the machine.

    About 130 sequences of 124M at 150 tokens each; never less than four sequences of full length.
    """
    return max(KV_BYTES, 4 * (config.n_ctx + 64) * kv_bytes_per_token(config))


def fitting_jobs(kv_bytes: int, model_bytes: int) -> int:
    """The cores that this process may use, or as many workers as fit into the memory that is free."""
    free = available_memory() - model_bytes
    return max(1, min(available_jobs(), free // (kv_bytes + WORKER_BYTES)))


def check_memory(name: str, config: GPT2Config, model_bytes: int) -> None:
    """Refuse a model that cannot work in the memory that is free, were it with one worker and one sequence."""
    sequence = (config.n_ctx + 64) * kv_bytes_per_token(config)
    needed, free = model_bytes + WORKER_BYTES + sequence, available_memory()
    if needed > free:
        raise BatchgenError(
            f"model {name} needs {needed / 1e9:.1f} GB of memory ({model_bytes / 1e9:.1f} of weights, "
            f"{sequence / 1e9:.1f} for one full sequence, the rest a worker's own), and {free / 1e9:.1f} GB are free; "
            "free some, or use a smaller model"
        )


def available_memory() -> int:
    """Bytes that can still be had without swapping: MemAvailable, or what is left of a cgroup's limit."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return UNKNOWN_MEMORY
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    return min(free, left_of_cgroup(Path("/sys/fs/cgroup")))


def left_of_cgroup(group: Path) -> int:
    """Bytes up to a cgroup's limit (version 2); files that the kernel keeps in memory give way, and do not count."""
    limit, used, stat = group / "memory.max", group / "memory.current", group / "memory.stat"
    if not (limit.exists() and used.exists() and (text := limit.read_text().strip()).isdigit()):
        return UNKNOWN_MEMORY
    fields = dict(line.split() for line in stat.read_text().splitlines()) if stat.exists() else {}
    cached = int(fields.get("inactive_file", 0)) + int(fields.get("active_file", 0))
    return max(int(text) - max(int(used.read_text()) - cached, 0), 0)


def cut(rows: Iterable[Row], chunk_rows: int) -> Iterator[tuple[Row, ...]]:
    """chunk_rows of them at a time, in order; the last may be fewer."""
    rows = iter(rows)
    while members := tuple(islice(rows, chunk_rows)):
        yield members


def plan_chunks(items: Iterable[TokenizedRequest | Rejected], chunk_rows: int) -> Iterator[Chunk]:
    """Cut the rows, in order, into chunks of chunk_rows; the last may be shorter."""
    return (Chunk(index, members) for index, members in enumerate(cut(items, chunk_rows)))
