"""Start the command line with faults inside, by `python -c`; the code of batchgen is unchanged.

A worker imports the function that it is sent by its name: a function of this module brings the faults to workers.
"""

import os
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from batchgen.engine.engine import Engine
from batchgen.jobs import cli
from batchgen.types import Chunk, OutputRow, Receipt, Rejected
from batchgen.workers import pool, worker
from batchgen.workers.complete import unfinished_row
from batchgen.workers.worker import WorkerSetup

POISON = "FAULTS_POISON"  # misdeeds of rows: `3:kill 17:hang 40:raise@4 50:kill-once`; @4: in the row's fourth step
FOLDER = "FAULTS_FOLDER"  # gets a file `3-...` for each misdeed of row 3; the file `released` ends the misdeed `hold`
SECONDS = "FAULTS_SECONDS"  # of each step, or of each fsync of a worker

_steps = Engine.steps


def _taking_steps(
    before_step: Callable[[set[int]], None], engine: Engine, prompts: Any, on_step: Any, more: Any
) -> Any:
    """The engine's steps; before_step is called with the rows of each, once the engine's own on_step was."""

    def call_both(starting: Sequence[int], running: Sequence[int], reading: Sequence[int]) -> None:
        if on_step:
            on_step(starting, running, reading)
        before_step({*starting, *running, *reading})

    return _steps(engine, prompts, call_both, *more)


# ---- rows that kill, hang or fail


def run_poisoned() -> None:
    """Run the command line; some rows misbehave in a step of the engine."""
    pool.run_chunk = run_poisoned_chunk
    cli.main()


def run_poisoned_chunk(setup: WorkerSetup, chunk: Chunk, attempt: str) -> Receipt:
    Engine.steps = _take_poisoned_steps
    return worker.run_chunk(setup, chunk, attempt)


def _take_poisoned_steps(self: Any, prompts: Any, on_step: Any = None, *more: Any) -> Any:
    poison = {int(row): what for row, what in (pair.split(":") for pair in os.environ[POISON].split())}
    taken: Counter[int] = Counter()

    def misbehave(rows: set[int]) -> None:
        for row in rows & poison.keys():
            what, _, step = poison[row].partition("@")
            taken[row] += 1
            if taken[row] == int(step or 1):
                _misbehave(row, what)

    return _taking_steps(misbehave, self, prompts, on_step, more)


def _misbehave(row: int, what: str) -> None:
    folder = Path(os.environ[FOLDER])
    if what.endswith("-once") and list(folder.glob(f"{row}-*")):
        return
    (folder / f"{row}-{os.getpid()}-{time.monotonic_ns()}").touch()
    MISDEEDS[what.removesuffix("-once")]()


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _exit() -> None:
    os._exit(7)


def _raise() -> None:
    raise ValueError("this row cannot be completed\nin two lines")


def _exhaust() -> None:
    """Allocate more memory than there is."""
    before = _starve()
    try:
        np.ones(2**30)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _starve() -> tuple[int, int]:
    """Limit the process to the memory that it has now; returns the limits before."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**20, before[1]))
    return before


def _hang() -> None:
    time.sleep(3600)


def _hold() -> None:
    while not (Path(os.environ[FOLDER]) / "released").exists():
        time.sleep(0.05)


MISDEEDS: dict[str, Callable[[], object]] = {
    "kill": _kill,
    "exit": _exit,
    "raise": _raise,
    "exhaust": _exhaust,
    "starve": _starve,
    "hang": _hang,
    "hold": _hold,
}

# ---- slow workers


def run_slow() -> None:
    """Run the command line; each step takes SECONDS. FOLDER gets a file for each worker that tries rows alone."""
    pool.run_chunk = run_slow_chunk
    cli.main()


def run_slow_chunk(setup: WorkerSetup, chunk: Chunk, attempt: str) -> Receipt:
    Engine.steps = _take_slow_steps
    if setup.max_batch == 1:
        Path(os.environ[FOLDER], str(os.getpid())).touch()
    return worker.run_chunk(setup, chunk, attempt)


def _take_slow_steps(self: Any, prompts: Any, on_step: Any = None, *more: Any) -> Any:
    return _taking_steps(lambda _: time.sleep(float(os.environ[SECONDS])), self, prompts, on_step, more)


def run_on_slow_disk() -> None:
    """Run the command line; each fsync of a worker takes SECONDS."""
    pool.run_chunk = run_chunk_on_slow_disk
    cli.main()


def run_chunk_on_slow_disk(setup: WorkerSetup, chunk: Chunk, attempt: str) -> Receipt:
    os.fsync = _slow_fsync
    return worker.run_chunk(setup, chunk, attempt)


def _slow_fsync(descriptor: int) -> None:
    time.sleep(float(os.environ[SECONDS]))
    _fsync(descriptor)


_fsync = os.fsync

# ---- a stub for the model


def run_stub() -> None:
    """Run the command line; rows are not generated. The rest remains: read, validate, plan, commit, merge."""
    pool.run_chunk = run_stub_chunk
    cli.main()


def run_stub_chunk(setup: WorkerSetup, chunk: Chunk, attempt: str) -> Receipt:
    worker.rows_of_chunk = _make_rows
    return worker.run_chunk(setup, chunk, attempt)


def _make_rows(chunk: Chunk, *_: object) -> list[OutputRow]:
    return [unfinished_row(item, OutputRow) if isinstance(item, Rejected) else _make_row(item) for item in chunk.items]


def _make_row(item: Any) -> OutputRow:
    n = len(item.prompt_token_ids)
    return OutputRow(item.row, 0, item.id, item.prompt, "", n, 0, "stop", "ok", None, None)
