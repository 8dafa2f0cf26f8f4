"""An input that is swapped for another at random moments of a run: every row is of the bytes that the plan names."""

import io
import json
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from batchgen.errors import BatchgenError
from batchgen.input import formats, parquet, sources
from batchgen.job import Job, WorkOptions
from batchgen.models.model import Model
from batchgen.output.ledger import work_directory
from batchgen.run import run_job
from batchgen.types import SamplingParams
from batchgen.workers import pool
from tests.faults.bench import Bench, wait_for

ROWS = 160
CHUNK_ROWS = 8
BLOCK_BYTES = 2**13  # a small file is then read as a large one is: in many blocks, while chunks are made
MOMENTS = ("before the scan", "in the scan", "between chunks", "at a worker's start")
FORMATS = ("jsonl", "csv", "parquet")
COMPARED = ["row", "id", "prompt", "completion", "status"]

Rows = list[dict[str, object]]


def _contents(format_: str, word: str) -> bytes:
    """A file of prompts with this word, and of padding, so that its rows are in many blocks."""
    rng = random.Random(word)
    ids, prompts = [f"{n}" for n in range(ROWS)], [f"{word} {n % 7}" for n in range(ROWS)]
    padding = [rng.randbytes(400).hex() for _ in range(ROWS)]
    table, file = pa.table({"id": ids, "prompt": prompts, "padding": padding}), io.BytesIO()
    if format_ == "jsonl":
        return b"".join(json.dumps(row).encode() + b"\n" for row in table.to_pylist())
    if format_ == "csv":
        pyarrow.csv.write_csv(table, file)
    else:
        pq.write_table(table, file, row_group_size=CHUNK_ROWS, compression="none", use_dictionary=False)
    return file.getvalue()


@dataclass(slots=True)
class Swap:
    """Puts other bytes in the place of a file at a moment of a run, as people do, and perhaps the first ones back."""

    path: Path
    own: bytes = field(repr=False)
    other: bytes = field(repr=False)
    plan: Path  # of the run, which is there once the scan is over
    moment: str
    rng: random.Random
    seconds: float  # of a whole run
    is_put_back: bool = False
    opened: threading.Event = field(default_factory=threading.Event)  # the input is found; the scan comes next

    def put(self, data: bytes) -> None:
        way = self.rng.choice(["in place", "anew", "by rename"])
        if way == "by rename":
            new = self.path.with_name("new")
            new.write_bytes(data)
            os.replace(new, self.path)
            return
        with open(self.path, "r+b" if way == "in place" else "wb") as file:
            file.write(data)
            file.truncate()

    def run(self) -> None:
        """Wait for the moment and swap; the body of a thread."""
        self.opened.wait(10)
        if self.moment == "in the scan":
            time.sleep(self.rng.uniform(0.0, 0.02))
        elif self.moment != "before the scan":
            wait_for(self.plan.exists, 10)
            time.sleep(self.rng.uniform(0.0, self.seconds))
        stamp = self.path.stat()
        self.put(self.other)
        if self.is_put_back:
            time.sleep(self.rng.choice([0.0, self.rng.uniform(0.0, self.seconds / 2)]))
            self.put(self.own)
            if self.rng.random() < 0.5:  # as cp --preserve does
                os.utime(self.path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))


def _read(path: Path) -> Rows:
    rows: Rows = pq.read_table(path, columns=COMPARED).to_pylist()
    return rows


def _run(job: Job, on_open: Callable[[], object] = lambda: None) -> str:
    """Run the job; returns the error that it ends with, or nothing."""

    def open_model(name: str) -> Model:
        on_open()
        return Model.open(name)

    try:
        run_job(job, open_model=open_model)
    except BatchgenError as error:
        return str(error)
    return ""


def swap_inputs(bench: Bench) -> str:
    """Swap an input at random moments: the output is that of one of the two files, or the file is named in an error."""
    times, chosen = (201, FORMATS) if bench.full else (1, FORMATS[:1])
    rng, counts = random.Random(15), Counter[str]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "BUFFER_BYTES", BLOCK_BYTES)
        patch.setattr(formats, "BATCH_BYTES", BLOCK_BYTES)
        patch.setattr(parquet, "BATCH_BYTES", BLOCK_BYTES)
        for format_ in chosen:
            folder = bench.new_folder()
            path, out = folder / f"p.{format_}", folder / "o.parquet"
            work = WorkOptions(jobs=2, chunk_rows=CHUNK_ROWS, kv_bytes=2**26)
            job = Job(path, out, str(bench.model), SamplingParams(max_tokens=24, temperature=0.7), work=work)
            files: list[tuple[bytes, Rows]] = []
            for word in ("first", "other"):
                path.write_bytes(_contents(format_, word))
                started = time.monotonic()
                assert not _run(job)
                seconds = time.monotonic() - started
                files.append((path.read_bytes(), _read(out)))
                out.unlink()
            for n in range(times // len(chosen)):
                moment, plan = MOMENTS[n % len(MOMENTS) if bench.full else 2], work_directory(out) / "plan.json"
                swap = Swap(path, files[0][0], files[1][0], plan, moment, rng, seconds, rng.random() < 0.6)
                counts[f"{moment} {_swap_once(job, swap, files)}"] += 1
    moments = [(moment, counts[f"{moment} True"], counts[f"{moment} False"]) for moment in MOMENTS]
    ends = ", ".join(f"{one}: {refused} refused by name, {right} right" for one, refused, right in moments)
    return f"{counts.total()} swaps; {ends}"


def _swap_once(job: Job, swap: Swap, files: list[tuple[bytes, Rows]]) -> bool:
    """Run the job while its input is swapped, then to its end; returns whether the swap was noticed."""
    out = Path(job.output.path)
    swap.path.write_bytes(swap.own)
    if swap.moment == "at a worker's start":
        pool.end_idle()
    thread = threading.Thread(target=swap.run)
    thread.start()
    error = _run(job, swap.opened.set)
    thread.join()
    is_noticed = bool(error)
    for data, _ in files:  # the one that the plan is of finishes the run
        if error:
            assert swap.path.name in error, error
            assert not out.exists()
            swap.path.write_bytes(data)
            error = _run(job)
    assert not error, error
    assert _read(out) in [rows for _, rows in files], f"{swap}: the rows are of neither file"
    out.unlink()
    return is_noticed
