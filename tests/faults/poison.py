"""Rows that kill, hang or fail their worker, every time or once."""

import json
import os
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq

from batchgen.workers.blame import SAME_STEP
from tests.faults import drivers
from tests.faults.bench import Bench

ROW_TIMEOUT = 2


class Poison:
    """The misdeeds of rows in runs with the driver `run_poisoned`, and how often each was done."""

    def __init__(self, bench: Bench, rows: dict[int, str]) -> None:
        self.folder = bench.new_folder()
        pairs = " ".join(f"{row}:{what}" for row, what in rows.items())
        self.environment = {drivers.POISON: pairs, drivers.FOLDER: str(self.folder)}

    def deaths(self) -> Counter[int]:
        """row -> how often it did its misdeed"""
        return Counter(int(name.partition("-")[0]) for name in os.listdir(self.folder) if "-" in name)

    def release(self) -> None:
        """End the misdeed `hold`."""
        (self.folder / "released").touch()


def kill_worker_once(bench: Bench) -> str:
    """A worker that dies, exits, raises or runs out of memory in the middle, but not when its rows are tried again."""
    misdeeds = ["kill", "kill@3", "exit", "raise", "exhaust", "exhaust@5", "starve"]
    for what in misdeeds:
        word, _, step = what.partition("@")
        poison = Poison(bench, {37: f"{word}-once@{step or 1}"})
        out = bench.new_output()
        run = bench.start(out, driver="run_poisoned", environment=poison.environment)
        assert run.finish() == 0, run.said
        assert poison.deaths()[37] == 1
        bench.assert_finished(out)
        bench.remove(out)
    return f"{len(misdeeds)} ways ({', '.join(misdeeds)}): exit 0, all identical"


def poison_rows(bench: Bench) -> str:
    """Five rows in a thousand that end their worker every time."""
    n = 1000 if bench.full else 100
    rows = {n // 50: "kill", n // 50 + 1: "raise", n // 3: "exit", n // 2: "exhaust", n - 1: "kill"}
    rows = rows if bench.full else {n // 50: "kill", n // 3: "raise"}
    prompts = _prompts(bench, n)
    undisturbed, out, poison = bench.new_output(), bench.new_output(), Poison(bench, rows)
    options = ["--chunk-rows", "50"]  # a new worker costs about a second: the run must take longer than a few of these
    options += ["--model", "tales", "--max-tokens", "80", "--ignore-eos"] if bench.full else []
    before = bench.start(undisturbed, *options, prompts=prompts)
    assert before.finish(600) == 0, before.said
    run = bench.start(out, *options, prompts=prompts, driver="run_poisoned", environment=poison.environment)
    assert run.finish(600) == 3, run.said
    _assert_failed(bench, out, undisturbed, set(rows))
    deaths = poison.deaths()
    assert max(deaths.values()) <= 1 + SAME_STEP, deaths
    assert run.seconds < (3 if bench.full else 100) * before.seconds, (run.seconds, before.seconds)
    return (
        f"{n} rows, {n - len(rows)} ok, {len(rows)} failed, deaths {sorted(deaths.values())}, exit 3, "
        f"{run.seconds:.1f} s, undisturbed {before.seconds:.1f} s"
    )


def hang_rows(bench: Bench) -> str:
    """Rows whose step never ends, with --row-timeout."""
    rows = {20: "hang", 77: "hang@4"} if bench.full else {20: "hang"}
    prompts = _prompts(bench, 100)
    undisturbed, out, poison = bench.new_output(), bench.new_output(), Poison(bench, rows)
    assert bench.start(undisturbed, prompts=prompts).finish() == 0
    timeout = ["--row-timeout", f"{ROW_TIMEOUT}s"]
    run = bench.start(out, *timeout, prompts=prompts, driver="run_poisoned", environment=poison.environment)
    assert run.finish(2 * 60) == 3, run.said
    _assert_failed(bench, out, undisturbed, set(rows))
    deaths = sorted(poison.deaths().values())
    return f"{len(rows)} of 100 rows failed after {ROW_TIMEOUT} s each time, deaths {deaths}, exit 3"


def slow_down_disk(bench: Bench) -> str:
    """Each fsync of a worker takes longer than --row-timeout."""
    out, environment = bench.new_output(), {drivers.SECONDS: str(3 * ROW_TIMEOUT)}
    options = ["--row-timeout", f"{ROW_TIMEOUT}s"]
    run = bench.start(out, *options, driver="run_on_slow_disk", environment=environment)
    assert run.finish(2 * 60) == 0, run.said
    assert "worker" not in " ".join(run.said), run.said
    bench.assert_finished(out)
    return f"{3 * ROW_TIMEOUT} s each, with --row-timeout {ROW_TIMEOUT}s: exit 0, identical, no worker lost"


def retry_failed(bench: Bench) -> str:
    """--retry-failed of an output with failed rows: one fails again, then none."""
    rows = {3: "kill", 20: "raise", 70: "exit"}
    prompts = _prompts(bench, 100)
    undisturbed, out, poison = bench.new_output(), bench.new_output(), Poison(bench, rows)
    assert bench.start(undisturbed, prompts=prompts).finish() == 0
    run = bench.start(out, prompts=prompts, driver="run_poisoned", environment=poison.environment)
    assert run.finish() == 3, run.said
    _assert_failed(bench, out, undisturbed, set(rows))
    fewer = Poison(bench, {20: "raise"})
    run = bench.start(out, "--retry-failed", prompts=prompts, driver="run_poisoned", environment=fewer.environment)
    assert run.finish() == 3, run.said
    _assert_failed(bench, out, undisturbed, {20})
    run = bench.start(out, "--retry-failed", prompts=prompts)
    assert run.finish() == 0, run.said
    _assert_failed(bench, out, undisturbed, set())
    return "3 failed, 1 of them again, then none; all rows as undisturbed"


def _prompts(bench: Bench, n: int) -> Path:
    path = bench.new_folder() / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{row} " * (1 + row % 9)}) + "\n" for row in range(n)))
    return path


def _assert_failed(bench: Bench, out: Path, undisturbed: Path, rows: set[int]) -> None:
    """These rows have failed, with a reason; all others are as in an undisturbed run."""
    bench.assert_alone(out)
    found, expected = pq.read_table(out).to_pylist(), pq.read_table(undisturbed).to_pylist()
    assert {row["row"] for row in found if row["status"] == "failed"} == rows
    for row, other in zip(found, expected, strict=True):
        if row["row"] in rows:
            assert row["completion"] is None
            assert row["error"], row
            assert "\n" not in row["error"], row["error"]
        else:
            assert row == other, f"row {row['row']} differs"
