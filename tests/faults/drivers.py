"""The command line with something wrong inside: started in place of it, by `python -c`, with batchgen unchanged.

Workers import what they are sent by its name, and so come upon the same wrongs.
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
from batchgen.workers.worker import WorkerSetup

POISON = "FAULTS_POISON"  # what rows do: `3:kill 17:hang 40:raise@4 50:kill-once`, @4 at their fourth step
FOLDER = "FAULTS_FOLDER"  # a file `3-...` in it for every time that row 3 did it; `released` ends those that hold

# ---- rows that kill, hang or fail


def poisoned() -> None:
    """Some rows misbehave in a step that the engine takes with them."""
    pool.run_chunk = poisoned_chunk
    cli.main()


def poisoned_chunk(setup: WorkerSetup, chunk: Chunk, attempt: str) -> Receipt:
    Engine.steps = _poisoned_steps
    return worker.run_chunk(setup, chunk, attempt)


_steps = Engine.steps


def _poisoned_steps(self: Any, prompts: Any, on_step: Any = None, *more: Any) -> Any:
    poison = {int(row): what for row, what in (pair.split(":") for pair in os.environ[POISON].split())}
    taken: Counter[int] = Counter()

    def poisoned_step(starting: Sequence[int], running: Sequence[int]) -> None:
        if on_step:
            on_step(starting, running)
        for row in {*starting, *running} & poison.keys():
            what, _, step = poison[row].partition("@")
            taken[row] += 1
            if taken[row] == int(step or 1):
                _misbehave(row, what)

    return _steps(self, prompts, poisoned_step, *more)


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
    raise ValueError("a row that no model can bear\nin two lines")


def _exhaust() -> None:
    """Ask for more memory than there is."""
    before = _starve()
    try:
        np.ones(2**30)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _starve() -> tuple[int, int]:
    """From here on there is no more memory than this process has; returns the limits that were."""
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

# ---- a model that is none


def stubbed() -> None:
    """Every row is complete at once: what remains is reading, validating, planning, committing and merging."""
    pool.run_chunk = stub_chunk
    cli.main()


def stub_chunk(setup: WorkerSetup, chunk: Chunk, attempt: str) -> Receipt:
    worker.complete_chunk = _stub_rows
    return worker.run_chunk(setup, chunk, attempt)


def _stub_rows(chunk: Chunk, *_: object) -> list[OutputRow]:
    return [worker.unfinished_row(item) if isinstance(item, Rejected) else _stub_row(item) for item in chunk.items]


def _stub_row(item: Any) -> OutputRow:
    n = len(item.prompt_token_ids)
    return OutputRow(item.row, 0, item.id, item.prompt, "", n, 0, "stop", "ok", None, None)
