"""The model is replaced at random moments, while workers die: no output has rows of two models or a false hash."""

import json
import os
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from batchgen.models.model import Model
from batchgen.output.ledger import work_directory
from tests.faults.bench import PATIENCE, SMALL, Bench, Run, count_parts, wait_for
from tests.faults.kills import kill
from tests.support.models import write_byte_model

OPTIONS = ["--chunk-rows", "4", "--max-tokens", "64"]  # 30 chunks, so that there are moments between two
SWAPS_OF_A_RUN = 4


@dataclass(slots=True)
class Models:
    """A place for a model, and two models of equal names and sizes, which take turns there."""

    place: Path
    sources: tuple[Path, Path]
    turn: int = 0
    n_aside: int = 0

    def put(self, turn: int) -> None:
        """As convert --replace, fetch --again and mv do: the other directory comes by a rename."""
        new = self.place.with_name("new")
        shutil.copytree(self.sources[turn], new)
        if self.place.exists():
            self.n_aside += 1
            self.place.rename(self.place.with_name(f"aside-{self.n_aside}"))
        new.rename(self.place)
        self.turn = turn

    def put_files(self, turn: int) -> None:
        """File by file, each by a rename: for a moment the directory has files of both."""
        for path in sorted(self.sources[turn].iterdir()):
            shutil.copyfile(path, self.place / ".copy")
            os.replace(self.place / ".copy", self.place / path.name)
        self.turn = turn

    def write_over(self, turn: int) -> None:
        """As cp does: into the files that are there, which workers have mapped."""
        for path in sorted(self.sources[turn].iterdir()):
            shutil.copyfile(path, self.place / path.name)
        self.turn = turn


def swap_models(bench: Bench) -> str:
    """Swap the model up to four times in a run, and kill a worker after each swap, so that another one starts."""
    times = 200 if bench.full else 1
    rng = random.Random(5)
    sources = bench.folder / "model", write_byte_model(bench.new_folder() / "model", SMALL, seed=1)
    expected = cache(lambda turn: _undisturbed(bench, sources[turn]))
    moments: Counter[str] = Counter()
    ends: Counter[str] = Counter()
    kills = 0
    while moments.total() < times:
        models = Models(bench.new_folder() / "model", sources)
        models.put(0)
        out = bench.new_output()
        run = _start(bench, models.place, out)
        for _ in range(min(times - moments.total(), SWAPS_OF_A_RUN)):
            kills += _swap(rng, run, models, out, moments)
        end = _end(bench, models, out, expected, run)
        ends[end] += 1
        if end == "refused":  # with the model that it has begun with, the same command goes on
            models.put(_begun_with(out, sources))
            assert _end(bench, models, out, expected, _start(bench, models.place, out)) == "right", "not resumed"
        bench.remove(out)
        shutil.rmtree(models.place.parent)
    when = ", ".join(f"{n} {moment}" for moment, n in sorted(moments.items()))
    counts = f"{ends['right']} runs right, {ends['refused']} refused by name and then resumed"
    how = f"{moments.total()} swaps ({when}), {kills} workers killed"
    return f"{how}: {counts}; every output is one model's, under its hash"


def _start(bench: Bench, model: Path, out: Path) -> Run:
    return bench.start(out, *(OPTIONS if bench.full else ()), "--model", str(model))


def _undisturbed(bench: Bench, source: Path) -> bytes:
    if source == bench.model and not bench.full:
        return bench.expected
    out = bench.new_output()
    run = _start(bench, source, out)
    assert run.finish() == 0, run.said
    return out.read_bytes()


def _swap(rng: random.Random, run: Run, models: Models, out: Path, counts: Counter[str]) -> bool:
    """One swap at a random moment, unless the run ends before; returns whether a worker was killed after it."""
    has_ended = lambda: run.process.poll() is not None  # noqa: E731
    parts = count_parts(out) + rng.randint(0, 6) if work_directory(out).exists() else 0
    moments: dict[str, Callable[[], object]] = {
        "while it starts": lambda: True,
        "at its scan": work_directory(out).exists,
        "at a worker's start": run.workers,
        "between chunks": lambda: count_parts(out) >= parts > 0,
    }
    moment = rng.choice([*moments])
    wait_for(lambda: moments[moment]() or has_ended(), PATIENCE)
    wait_for(has_ended, rng.uniform(0.0, 0.1))
    if has_ended():
        return False
    how = rng.choice([models.put, models.put, models.put_files, models.write_over])
    how(1 - models.turn)
    counts[moment] += 1
    workers = run.workers()
    return bool(workers) and kill(rng.choice(workers))


def _end(bench: Bench, models: Models, out: Path, expected: Callable[[int], bytes], run: Run) -> str:
    """right: the output is that of one of the models; refused: the error names the model, and there is no output."""
    code = run.finish()
    if code == 0:
        made = out.read_bytes()
        assert any(made == expected(turn) for turn in (0, 1)), "an output of neither model, or under the other's hash"
        bench.assert_alone(out)
        return "right"
    assert not out.exists()
    if code != -signal.SIGBUS:  # a file was written over that the run itself had mapped
        assert code == 1, (code, run.said)
        assert str(models.place) in run.said[-1], run.said
    return "refused"


def _begun_with(out: Path, sources: tuple[Path, Path]) -> int:
    """The model of the run's plan; the first if it has none yet."""
    plan = work_directory(out) / "plan.json"
    return int(plan.exists() and json.loads(plan.read_bytes())["model_hash"] == Model.load(sources[1]).hash)
