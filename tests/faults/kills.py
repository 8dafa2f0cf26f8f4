"""SIGKILL: of the parent and of workers at random moments, and of the parent at each step of commit and merge."""

import os
import random
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.output.ledger import work_directory
from tests.faults.bench import PATIENCE, PREVIOUS, Bench, Skipped, need, parts, wait_for

ORPHAN_SECONDS = 2.0
CHANGES = ("rename", "renameat", "renameat2", "fsync", "fdatasync", "unlink", "unlinkat", "rmdir", "mkdir", "mkdirat")


@dataclass(slots=True)
class Killer:
    """Kills runs at random moments, as often as it has kills left."""

    bench: Bench
    rng: random.Random
    left: int
    pids: list[int] = field(default_factory=list)
    slowest: float = 0.0  # seconds that a worker outlived its parent

    def let_through(self, out: Path, check: Callable[[], None], *options: str, jobs: int = 2) -> None:
        """Start it again and again, killing it, until it ends by itself; check what is there after each kill."""
        while True:
            run = self.bench.start(out, *options, jobs=jobs)
            delay = self.rng.uniform(0.0, 1.2 * self.bench.seconds)
            if not self.left or wait_for(lambda run=run: run.process.poll() is not None, delay):
                assert run.finish() == 0, run.said
                return
            os.kill(run.pid, signal.SIGKILL)
            lived = run.gone_after(self.bench.limit(ORPHAN_SECONDS))
            code = run.finish()
            if code == 0:  # it was a moment too late
                return
            assert code == -signal.SIGKILL, (code, run.said)
            self.left -= 1
            self.pids.append(run.pid)
            self.slowest = max(self.slowest, lived)
            check()


def parent_at_random(bench: Bench) -> str:
    """Kill it again and again until it gets through, over a previous version and over none."""
    killer = Killer(bench, random.Random(1), 200 if bench.full else 3)
    outputs = 0
    while killer.left or not outputs:
        previous = PREVIOUS if outputs % 2 else None
        out = bench.new_output(previous)
        check = partial(bench.assert_intact, out, previous)
        killer.let_through(out, check, jobs=1 + outputs // 2 % 2)
        bench.assert_finished(out)
        bench.forget(out)
        outputs += 1
    left = bench.left_in_memory(killer.pids)
    kills, slowest = len(killer.pids), killer.slowest
    return (
        f"{kills} kills, {outputs} outputs identical; the last worker gone after {slowest:.2f} s at most; "
        f"{left} of loky's semaphores left"
    )


def dataset_at_random(bench: Bench) -> str:
    """The same with --format dataset, where the output is a folder: over nothing, and over an earlier dataset."""
    killer = Killer(bench, random.Random(8), 50 if bench.full else 2)
    out = bench.new_output(suffix=".dataset")
    whole: dict[str, bytes] = {}
    rounds = 0

    def check() -> None:
        if out.exists():
            assert (out / "_SUCCESS").exists(), "half a dataset"
            assert not whole or _files(out) == whole, "neither the old nor the new dataset"

    while killer.left or rounds < 2:
        killer.let_through(out, check, "--format", "dataset")
        whole = whole or _files(out)
        assert _files(out) == whole
        bench.assert_alone(out)
        rounds += 1
    assert pq.read_table(out).equals(pq.read_table(pa.BufferReader(bench.expected)))
    return f"{len(killer.pids)} kills, {rounds} datasets identical, each complete or not there"


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def workers_at_random(bench: Bench) -> str:
    """Kill one of two workers, up to three times a run."""
    times = 100 if bench.full else 2
    rng = random.Random(2)
    killed = runs = 0
    while killed < times:
        out = bench.new_output()
        run = bench.start(out)
        for _ in range(min(rng.randint(1, 3), times - killed)):
            wait_for(lambda run=run: run.workers() or run.process.poll() is not None, PATIENCE)
            wait_for(lambda run=run: run.process.poll() is not None, rng.uniform(0.0, bench.seconds / 2))
            if workers := run.workers():
                killed += _kill(rng.choice(workers))
        assert run.finish() == 0, run.said
        bench.assert_finished(out)
        assert not run.workers()
        bench.forget(out)
        runs += 1
    return f"{killed} kills in {runs} runs: exit 0, all identical"


def _kill(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


# ---- at each system call


@dataclass(frozen=True, slots=True)
class Call:
    """The n-th call of its name by a process's main thread."""

    name: str
    n: int
    text: str

    def inject(self, what: str) -> list[str]:
        """The command that makes `what` happen at this call, and nowhere else: only the main thread is traced."""
        wrong = f"inject={self.name}:{what}:when={self.n}"
        return [need("strace"), "-q", "-o", os.devnull, "-e", f"trace={self.name}", "-e", wrong]


def calls_of(bench: Bench, out: Path, names: tuple[str, ...]) -> list[Call]:
    """What an undisturbed run's main thread calls on files of the output's folder, in order."""
    log = bench.folder / "strace.log"
    traced = ",".join(f"?{name}" for name in names)  # ?: not every architecture has all of them
    before = [need("strace"), "-q", "-y", "-s", "4096", "-o", log, "-e", f"trace={traced}"]
    run = bench.start(out, before=before, jobs=1)
    if run.finish() != 0:
        raise Skipped(f"strace cannot trace here: {' '.join(run.said)[:100]}")
    counts: dict[str, int] = {}
    calls = []
    for line in log.read_text(errors="replace").splitlines():
        if match := re.match(r"(?:\d+ +)?(\w+)\(", line):
            name = match[1]
            counts[name] = counts.get(name, 0) + 1
            if str(out.parent) in line:
                calls.append(Call(name, counts[name], line))
    assert len(calls) > 10, "strace saw no run"
    return calls


def chosen(bench: Bench, calls: list[Call], few: int) -> list[Call]:
    """All of them, or a few that are spread over them all."""
    return calls if bench.full else calls[:: -(-len(calls) // few)]


def parent_at_each_change(bench: Bench) -> str:
    """At every rename, fsync, unlink, mkdir and rmdir of a run, and of one that goes on with an interrupted one."""
    calls = calls_of(bench, bench.new_output(), CHANGES)
    times = _kill_at(bench, chosen(bench, calls, 3), lambda: bench.new_output(PREVIOUS))
    if bench.full:
        times += _kill_at(bench, _resumed_calls(bench), lambda: _interrupted(bench))
    names = sorted({call.name for call in calls})
    return f"{times} kills, each at its own call ({', '.join(names)}): I holds, all gone on with to identical bytes"


def _kill_at(bench: Bench, calls: list[Call], prepare: Callable[[], Path]) -> int:
    for call in calls:
        out = prepare()
        previous = out.read_bytes() if out.exists() else None
        run = bench.start(out, before=call.inject("signal=KILL"), jobs=1)
        assert run.finish() == -signal.SIGKILL, (call, run.said)
        run.gone_after(PATIENCE)
        bench.assert_intact(out, previous)
        bench.assert_goes_on(out, jobs=1)
        bench.forget(out)
    return len(calls)


def _interrupted(bench: Bench) -> Path:
    """An output of which a killed run has left some parts and an attempt, always the same."""
    saved = bench.folder / "interrupted"
    out = bench.new_output()
    if not saved.exists():
        run = bench.start(out)
        run.until(lambda: parts(out) >= 3)
        os.kill(run.pid, signal.SIGKILL)
        run.finish()
        run.gone_after(PATIENCE)
        shutil.copytree(work_directory(out), saved)
    else:
        shutil.copytree(saved, work_directory(out))
    return out


def _resumed_calls(bench: Bench) -> list[Call]:
    return calls_of(bench, _interrupted(bench), CHANGES)


def a_worker_at_each_fsync(bench: Bench) -> str:
    """The n-th fsync of a worker kills it: its part is written and not yet told of."""
    runs, killed = 12 if bench.full else 1, 0
    log = bench.folder / "strace.log"
    for n in range(1, runs + 1):
        out = bench.new_output()
        run = bench.start(out)
        run.until(run.workers)
        wrong = ["-e", "trace=fsync", "-e", f"inject=fsync:signal=KILL:when={1 + n % 3}"]
        strace = [need("strace"), "-f", "-q", "-o", log, *wrong, "-p", str(run.workers()[0])]
        tracer = subprocess.Popen(strace, stderr=subprocess.DEVNULL)
        assert run.finish() == 0, run.said
        tracer.terminate()
        tracer.wait()
        killed += "killed by SIGKILL" in log.read_text()
        bench.assert_finished(out)
        bench.forget(out)
    assert killed, "none was killed"
    return f"{killed} kills in {runs} runs: exit 0, all identical"
