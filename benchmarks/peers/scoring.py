"""The protocol between scores.py and the scripts beside this file; standard library only, as all environments use it.

A script is started with the path of a job, a JSON file. It loads its model, scores a few texts to warm up, then all of
them, and prints one JSON object.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.peers.protocol import private_stdout

Texts = list[list[int]]  # token ids; the first is read, the others are read and scored
LogProbs = list[list[float]]  # of the others


@dataclass(frozen=True, slots=True)
class ScoreJob:
    """One run of one system."""

    model: str
    texts: Texts
    jobs: int  # cores to use
    options: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @staticmethod
    def read(path: Path) -> "ScoreJob":
        return ScoreJob(**json.loads(path.read_text(encoding="utf-8")))


@dataclass(frozen=True, slots=True)
class Scorer:
    """A loaded system."""

    score: Callable[[Texts], LogProbs]
    version: str
    settings: str


def serve(load: Callable[[ScoreJob], Scorer]) -> None:
    """Do the job that the command line names, and print the answer."""
    answer = private_stdout()
    job = ScoreJob.read(Path(sys.argv[1]))
    print(json.dumps(measure(load, job)), file=answer, flush=True)


def measure(load: Callable[[ScoreJob], Scorer], job: ScoreJob) -> dict[str, Any]:
    scorer = load(job)
    scorer.score(job.texts[: 8 * job.jobs])
    start = time.perf_counter()
    log_probs = scorer.score(job.texts)
    seconds = time.perf_counter() - start
    if [len(values) for values in log_probs] != [len(ids) - 1 for ids in job.texts]:
        raise ValueError("not one log-probability for each token after a text's first")
    return {"seconds": seconds, "log_probs": log_probs, "version": scorer.version, "settings": scorer.settings}


def batches(texts: Texts, size: int) -> list[list[int]]:
    """The texts' numbers, the longest first, in batches of `size`."""
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    return [order[first : first + size] for first in range(0, len(order), size)]
