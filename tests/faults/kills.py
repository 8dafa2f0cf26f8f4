"""SIGKILL: to the parent and to workers at random moments, and to the parent at each system call of a run."""

import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.output.ledger import work_directory
from batchgen.workers.marker import Phase, read_sightings
from tests.faults import drivers
from tests.faults.bench import PATIENCE, PREVIOUS, Bench, Run, Skipped, count_parts, find_tool, wait_for

ORPHAN_SECONDS = 2.0
CHANGES = ("rename", "renameat", "renameat2", "fsync", "fdatasync", "unlink", "unlinkat", "rmdir", "mkdir", "mkdirat")
WRITES = ("write", "pwrite64", "fsync", "fdatasync", "rename", "renameat", "renameat2", "mkdir", "mkdirat")


@dataclass(slots=True)
class Killer:
    """Kills runs at random moments, until it has done all its kills."""

    bench: Bench
    rng: random.Random
    left: int  # kills to do
    pids: list[int] = field(default_factory=list)
    slowest: float = 0.0  # seconds, at most, that a worker outlives its parent

    def run(self, out: Path, check: Callable[[], None], *options: str, jobs: int = 2) -> None:
        """Start a run and kill it, again and again, until it ends by itself; check the output after each kill."""
        while True:
            run = self.bench.start(out, *options, jobs=jobs)
            delay = self.rng.uniform(0.0, 1.2 * self.bench.seconds)
            if not self.left or wait_for(lambda run=run: run.process.poll() is not None, delay):
                assert run.finish() == 0, run.said
                return
            os.kill(run.pid, signal.SIGKILL)
            lived = run.wait_for_processes(self.bench.limit(ORPHAN_SECONDS))
            code = run.finish()
            if code == 0:  # it had ended just before the kill
                return
            assert code == -signal.SIGKILL, (code, run.said)
            self.left -= 1
            self.pids.append(run.pid)
            self.slowest = max(self.slowest, lived)
            check()


def kill_parent(bench: Bench) -> str:
    """Kill the parent again and again until the run finishes, over a previous version and over none."""
    killer = Killer(bench, random.Random(1), 200 if bench.full else 2)
    outputs = 0
    while killer.left or not outputs:
        previous = PREVIOUS if outputs % 2 else None
        out = bench.new_output(previous)
        check = partial(bench.assert_intact, out, previous)
        killer.run(out, check, jobs=1 + outputs // 2 % 2)
        bench.assert_finished(out)
        bench.remove(out)
        outputs += 1
    left = bench.count_semaphores(killer.pids)
    kills, slowest = len(killer.pids), killer.slowest
    return (
        f"{kills} kills, {outputs} outputs identical; all workers gone after {slowest:.2f} s at most; "
        f"{left} of loky's semaphores left"
    )


def kill_parent_of_dataset(bench: Bench) -> str:
    """The same with --format dataset: over nothing, and over an earlier dataset."""
    killer = Killer(bench, random.Random(8), 50 if bench.full else 2)
    out = bench.new_output(suffix=".dataset")
    complete: dict[str, bytes] = {}
    rounds = 0

    def check() -> None:
        if out.exists():
            assert (out / "_SUCCESS").exists(), "half a dataset"
            assert not complete or _read(out) == complete, "neither the old nor the new dataset"

    while killer.left or rounds < 2:
        killer.run(out, check, "--format", "dataset")
        complete = complete or _read(out)
        assert _read(out) == complete
        bench.assert_alone(out)
        rounds += 1
    assert pq.read_table(out).equals(pq.read_table(pa.BufferReader(bench.expected)))
    return f"{len(killer.pids)} kills, {rounds} datasets identical, each complete or absent"


def _read(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def kill_workers(bench: Bench) -> str:
    """Kill one of two workers, up to three times in a run."""
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
                killed += kill(rng.choice(workers))
        assert run.finish() == 0, run.said
        bench.assert_finished(out)
        assert not run.workers()
        bench.remove(out)
        runs += 1
    return f"{killed} kills in {runs} runs: exit 0, all identical"


def kill(pid: int) -> bool:
    """Whether the process was still there."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def kill_all_workers(bench: Bench) -> str:
    """Kill most workers, those that try rows alone too, at random moments: runs may end, and no row fails."""
    times = 300 if bench.full else 6
    rng, tries, out = random.Random(4), bench.new_folder(), bench.new_output()
    killed: dict[int, bool] = {}  # process id -> whether it was at rows
    ends: Counter[int] = Counter()
    code = -1
    while len(killed) < times or code:
        environment = {drivers.FOLDER: str(tries), drivers.SECONDS: "0.02"}
        run = bench.start(out, driver="run_slow", environment=environment, jobs=1)
        known: set[int] = set()
        while run.process.poll() is None:
            for pid in set(run.workers()) - known:
                known.add(pid)
                if len(killed) < times and rng.random() < 0.6:
                    killed |= _kill_at_random(run, out, pid, rng, bench.seconds)
            time.sleep(0.05)
        code = run.finish()
        ends[code] += 1
        assert code == 0 or (code == 1 and "no row was identified" in " ".join(run.said)), (code, run.said)
        if code == 0:
            bench.assert_finished(out)
            bench.remove(out)
            out = bench.new_output()
    trials = [pid for pid in killed if (tries / str(pid)).exists()]
    return (
        f"{len(killed)} kills, {len(trials)} of them of workers that tried rows alone, {sum(killed.values())} in a "
        f"step: {ends[0]} runs exit 0, identical; {ends[1]} exit 1 and resumed; no row failed"
    )


def _kill_at_random(run: Run, out: Path, pid: int, rng: random.Random, seconds: float) -> dict[int, bool]:
    """Kill a worker at a random moment of its first seconds; empty if it ends before."""

    def is_at_rows() -> bool:
        sightings = [seen for attempt in work_directory(out).glob("attempt-*") for seen in read_sightings(attempt)]
        return any(seen.pid == pid and seen.phase == Phase.ROWS for seen in sightings)

    is_over = lambda: pid not in run.workers()  # noqa: E731
    wait_for(is_over, rng.uniform(0.0, seconds))
    is_in_step = is_at_rows()
    return {pid: is_in_step} if kill(pid) else {}


# ---- at each system call


@dataclass(frozen=True, slots=True)
class Call:
    """The n-th system call of its name by a process's main thread."""

    name: str
    n: int
    text: str

    def inject(self, what: str) -> list[str]:
        """The command that injects `what` at this call and at no other: strace traces only the main thread."""
        fault = f"inject={self.name}:{what}:when={self.n}"
        return [find_tool("strace"), "-q", "-o", os.devnull, "-e", f"trace={self.name}", "-e", fault]


def trace_calls(bench: Bench, out: Path, names: tuple[str, ...]) -> list[Call]:
    """The calls of an undisturbed run's main thread on files in the output's folder, in order."""
    log = bench.folder / "strace.log"
    traced = ",".join(f"?{name}" for name in names)  # ?: not every architecture has all of them
    before = [find_tool("strace"), "-q", "-y", "-s", "4096", "-o", log, "-e", f"trace={traced}"]
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
    assert len(calls) > 10, "strace has traced no run"
    return calls


@cache
def _calls_of_run(bench: Bench) -> list[Call]:
    return trace_calls(bench, bench.new_output(), (*CHANGES, *WRITES))


def calls_of_run(bench: Bench, names: tuple[str, ...]) -> list[Call]:
    """Those of these names in an undisturbed run, which is traced once for all cases."""
    return [call for call in _calls_of_run(bench) if call.name in names]


def choose(bench: Bench, calls: list[Call], few: int) -> list[Call]:
    """All calls, or in the short suite a few, evenly spaced, of which the last is the run's last."""
    return calls if bench.full else calls[:: -(len(calls) // few)][:few]


def kill_parent_at_each_call(bench: Bench) -> str:
    """Kill it at every rename, fsync, unlink, mkdir and rmdir of a run, and of a run that resumes another."""
    calls = calls_of_run(bench, CHANGES)
    times = _kill_at(bench, choose(bench, calls, 2), lambda: bench.new_output(PREVIOUS))
    if bench.full:
        resumed = trace_calls(bench, _interrupt(bench), CHANGES)
        times += _kill_at(bench, resumed, lambda: _interrupt(bench))
    names = sorted({call.name for call in calls})
    return f"{times} kills, each at another call ({', '.join(names)}): outputs intact, all resumed to identical bytes"


def _kill_at(bench: Bench, calls: list[Call], prepare: Callable[[], Path]) -> int:
    for call in calls:
        out = prepare()
        previous = out.read_bytes() if out.exists() else None
        run = bench.start(out, before=call.inject("signal=KILL"), jobs=1)
        assert run.finish() == -signal.SIGKILL, (call, run.said)
        run.wait_for_processes(PATIENCE)
        bench.assert_intact(out, previous)
        bench.assert_resumes(out, jobs=1)
        bench.remove(out)
    return len(calls)


def _interrupt(bench: Bench) -> Path:
    """An output with the work directory of a killed run, which has some parts and an attempt, always the same."""
    saved = bench.folder / "interrupted"
    out = bench.new_output()
    if not saved.exists():
        run = bench.start(out)
        run.until(lambda: count_parts(out) >= 3)
        os.kill(run.pid, signal.SIGKILL)
        run.finish()
        run.wait_for_processes(PATIENCE)
        shutil.copytree(work_directory(out), saved)
    else:
        shutil.copytree(saved, work_directory(out))
    return out


def kill_worker_at_fsync(bench: Bench) -> str:
    """The n-th fsync of a worker kills it: its part is written, and its receipt is not sent yet."""
    runs, killed = 12 if bench.full else 1, 0
    log = bench.folder / "strace.log"
    for n in range(runs):
        out = bench.new_output()
        run = bench.start(out)
        run.until(run.workers)
        fault = ["-e", "trace=fsync", "-e", f"inject=fsync:signal=KILL:when={1 + n % 3}"]
        strace = [find_tool("strace"), "-f", "-q", "-o", log, *fault, "-p", str(run.workers()[0])]
        tracer = subprocess.Popen(strace, stderr=subprocess.DEVNULL)
        assert run.finish() == 0, run.said
        tracer.terminate()
        tracer.wait()
        killed += "killed by SIGKILL" in log.read_text()
        bench.assert_finished(out)
        bench.remove(out)
    assert killed, "none was killed"
    return f"{killed} kills in {runs} runs: exit 0, all identical"
