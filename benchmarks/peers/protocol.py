"""The protocol between bench.py and the scripts beside this file; standard library only, as all environments use it.

A script is started with the path of a job, a JSON file. It loads its model, generates one token for one prompt
(start-up ends there), warms up, does the whole task, and prints one JSON object.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

Prompts = list[list[int]]
Completions = list[list[int]]  # every sample of the first prompt, then of the second ...

Rates = dict[str, dict[str, float]]  # of products.py: library -> rows -> GF/s

LONG_RUN = 120.0  # seconds after which a task is not repeated


@dataclass(frozen=True, slots=True)
class Task:
    """Generate n samples of exactly max_tokens tokens for every prompt; temperature 0 is greedy."""

    prompts: Prompts
    max_tokens: int
    n: int = 1
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    shared_prefix: int = 0  # tokens that all prompts start with

    @property
    def new_tokens(self) -> int:
        return len(self.prompts) * self.n * self.max_tokens

    def part(self, step: int, max_tokens: int) -> "Task":
        """Every step-th prompt in the order of length, with fewer new tokens."""
        prompts = sorted(self.prompts, key=len)[step // 2 :: step]
        return replace(self, prompts=prompts, max_tokens=min(max_tokens, self.max_tokens))


@dataclass(frozen=True, slots=True)
class Job:
    """One run of one system."""

    model: str
    task: Task
    jobs: int  # cores to use
    repeat: int
    scratch: str
    options: dict[str, Any] = field(default_factory=dict)
    started: float = 0.0  # time.time() at which the process was started

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @staticmethod
    def read(path: Path) -> "Job":
        values = json.loads(path.read_text(encoding="utf-8"))
        return Job(**{**values, "task": Task(**values["task"])})


@dataclass(frozen=True, slots=True)
class Ready:
    """A loaded system; `complete` reuses nothing of an earlier call."""

    complete: Callable[[Task], Completions]
    version: str
    settings: str
    warm_up: Callable[[], dict[str, float]] | None = None  # returns seconds to report


Load = Callable[[Job], Ready]


def serve(load: Load) -> None:
    """Do the job that the command line names, and print the answer."""
    answer = private_stdout()
    job = Job.read(Path(sys.argv[1]))
    print(json.dumps(measure(load, job)), file=answer, flush=True)


def private_stdout() -> TextIO:
    """Standard output, for the answer alone; what libraries print then goes to standard error."""
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answer


def measure(load: Load, job: Job) -> dict[str, Any]:
    ready = load(job)
    check(first_token(job.task), ready.complete(first_token(job.task)))
    startup = time.time() - job.started
    reported = ready.warm_up() if ready.warm_up else {}
    if not ready.warm_up:
        ready.complete(job.task.part(max(len(job.task.prompts) // 8, 1), 4))
    seconds: list[float] = []
    while len(seconds) < job.repeat and sum(seconds) < LONG_RUN:
        completions, elapsed = timed(ready, job.task)
        seconds.append(elapsed)
    return {
        "seconds": seconds,
        "startup_s": startup,
        "first_tokens": [ids[0] for ids in completions],
        "version": ready.version,
        "settings": ready.settings,
        "reported": reported,
    }


def timed(ready: Ready, task: Task) -> tuple[Completions, float]:
    start = time.perf_counter()
    completions = ready.complete(task)
    elapsed = time.perf_counter() - start
    check(task, completions)
    return completions, elapsed


def first_token(task: Task) -> Task:
    return replace(task, prompts=[min(task.prompts, key=len)], max_tokens=1, n=1)


def check(task: Task, completions: Completions) -> None:
    """Raise ValueError unless the completions have the numbers of samples and tokens that the task asks for."""
    lengths = {len(ids) for ids in completions}
    if len(completions) != len(task.prompts) * task.n or lengths != {task.max_tokens}:
        raise ValueError(
            f"asked for {len(task.prompts) * task.n} completions of {task.max_tokens} tokens, "
            f"got {len(completions)} of {sorted(lengths)[:5]}"
        )


def batches(task: Task, size: int) -> list[list[int]]:
    """The prompts' numbers, sorted by length, longest first, and cut into batches of `size`."""
    order = sorted(range(len(task.prompts)), key=lambda i: -len(task.prompts[i]))
    return [order[first : first + size] for first in range(0, len(order), size)]
