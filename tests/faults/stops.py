"""Signals, time limits, the status file, and many runs at once."""

import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path

from batchgen.output.ledger import work_directory
from tests.faults import drivers
from tests.faults.bench import PATIENCE, PREVIOUS, ROWS, Bench, Run, count_parts, wait_for
from tests.faults.kills import CHANGES, calls_of_run, choose
from tests.faults.poison import ROW_TIMEOUT, Poison

STOP_SECONDS = 5.0
BUSY_SECONDS = 1.0
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}

Send = Callable[[int, int], None]


def send_signals(bench: Bench) -> str:
    """SIGTERM and SIGINT, to the process and to its group, at random moments."""
    rng = random.Random(3)
    slowest = 0.0
    stopped = finished = 0
    ways = list(product(CODES, (os.kill, os.killpg)))
    for number, send in ways * 10 if bench.full else ways[1:3]:
        out = bench.new_output(PREVIOUS)
        run = bench.start(out)
        run.until(work_directory(out).exists)
        time.sleep(rng.uniform(0.0, bench.seconds / 3))
        committed = count_parts(out)
        ended, seconds = _stop(bench, run, send, number)
        assert ended in (CODES[number], 0), (ended, run.said)
        if ended:
            bench.assert_one_line(run)
            assert count_parts(out) >= committed or out.read_bytes() == bench.expected, "a committed part is gone"
            slowest, stopped = max(slowest, seconds), stopped + 1
        else:
            finished += 1
        bench.assert_intact(out, PREVIOUS)
        bench.assert_resumes(out)
        bench.remove(out)
    assert stopped, "none was in time"
    return f"{stopped} ended with 143 or 130 in {slowest:.1f} s at most, all resumed; {finished} had just finished"


def send_signals_at_the_end(bench: Bench) -> str:
    """SIGTERM at each rename, fsync, unlink, mkdir and rmdir from the one that publishes the output on."""
    calls = calls_of_run(bench, CHANGES)
    renames = [i for i, call in enumerate(calls) if call.name.startswith("rename")]
    first = max(i for i in renames if "/.out.parquet.batchgen-tmp" in calls[i].text)
    codes = Counter[int]()
    for call in choose(bench, calls[first:], 3):
        out = bench.new_output(PREVIOUS)
        run = bench.start(out, before=call.inject("signal=TERM"), jobs=1)
        code = run.finish()
        bench.assert_one_line(run)
        bench.assert_intact(out, PREVIOUS)
        assert code == (0 if out.read_bytes() == bench.expected else 143), (call, code, run.said)
        state = json.loads(out.with_name(f"{out.name}.status.json").read_text())
        assert (state["state"], state["exit_code"]) == ("finished" if code == 0 else "stopped", code), (call, state)
        bench.assert_resumes(out, jobs=1)
        bench.remove(out)
        codes[code] += 1
    return f"{codes.total()} signals: {codes[0]} with exit 0, finished, {codes[143]} with 143; the next run cleared up"


def send_signals_while_workers_hang(bench: Bench) -> str:
    """A worker that hangs does not delay the end, and after a second signal the run does not wait at all."""
    slowest = {1: 0.0, 2: 0.0}
    for number, code in CODES.items() if bench.full else [(signal.SIGTERM, 143)]:
        for signals in (1, 2):
            out, poison = bench.new_output(), Poison(bench, {5: "hang", 100: "hang"})
            run = bench.start(out, driver="run_poisoned", environment=poison.environment)
            run.until(poison.deaths)
            time.sleep(0.3)
            if signals == 2:
                os.kill(run.pid, number)
                time.sleep(0.2)
            ended, seconds = _stop(bench, run, os.kill, number)
            assert ended == code, (ended, run.said)
            slowest[signals] = max(slowest[signals], seconds)
            bench.assert_resumes(out)
            bench.remove(out)
    assert slowest[2] < bench.limit(1.0), f"a second signal took {slowest[2]:.1f} s"
    return f"ended in {slowest[1]:.1f} s at most, in {slowest[2]:.2f} s after a second signal; all resumed"


def _stop(bench: Bench, run: Run, send: Send, number: int) -> tuple[int, float]:
    """Send the signal; returns the exit code, and the seconds until the last process is gone."""
    started = time.monotonic()
    try:
        send(run.pid, number)
    except ProcessLookupError:  # it has just ended by itself
        return run.finish(), 0.0
    code = run.finish(bench.limit(STOP_SECONDS))
    run.wait_for_processes(bench.limit(STOP_SECONDS))
    return code, time.monotonic() - started


def stop_and_continue(bench: Bench) -> str:
    """SIGSTOP for longer than --row-timeout, then SIGCONT: to a worker, to the parent, to all processes."""
    ways: dict[str, Callable[[Run], list[int]]] = {
        "a worker": lambda run: run.workers()[:1],
        "the parent": lambda run: [run.pid],
        "all": lambda run: [run.pid, *run.workers()],
    }
    for select in ways.values():
        out = bench.new_output()
        environment = {drivers.FOLDER: str(bench.new_folder()), drivers.SECONDS: "0.05"}
        timeout = ["--row-timeout", f"{ROW_TIMEOUT}s"]
        run = bench.start(out, *timeout, driver="run_slow", environment=environment)
        run.until(lambda run=run, out=out: count_parts(out) and run.workers())
        pids = select(run)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(3 * ROW_TIMEOUT)
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        assert run.finish() == 0, run.said
        assert "worker" not in " ".join(run.said), run.said
        bench.assert_finished(out)
    return f"{', '.join(ways)}, for {3 * ROW_TIMEOUT} s with --row-timeout {ROW_TIMEOUT}s: exit 0, identical"


def reach_time_limits(bench: Bench) -> str:
    """Runs with --time-limit of a second or two, one after another until the output is complete."""
    out = bench.new_output(PREVIOUS)
    lines = bench.prompts.read_text() * 4
    prompts = bench.new_folder() / "prompts.jsonl"
    prompts.write_text(lines)
    undisturbed = bench.new_output()
    assert bench.start(undisturbed, prompts=prompts).finish() == 0
    expected = undisturbed.read_bytes()
    limit = bench.seconds / 2
    codes = []
    while not codes or codes[-1] == 75:
        run = bench.start(out, "--time-limit", f"{limit:.1f}s", prompts=prompts)
        codes.append(run.finish())
        if codes[-1] == 75:
            bench.assert_one_line(run)
        bench.assert_intact(out, PREVIOUS, expected)
        limit *= 1.3
    assert codes[-1] == 0, (codes, run.said)
    assert len(codes) > 1, "no time limit was reached"
    bench.assert_finished(out, expected)
    return f"exit {', '.join(map(str, codes))}; identical"


def read_status(bench: Bench) -> str:
    """Read the status file while it is rewritten, after SIGKILL, and at the end."""
    out = bench.new_output()
    path = out.with_name(f"{out.name}.status.json")
    run = bench.start(out, "--max-tokens", "80")
    run.until(path.exists)
    ages, reads = [], 0
    while run.process.poll() is None:
        try:
            status = json.loads(path.read_text())
            ages.append(time.time() - path.stat().st_mtime)
        except ValueError:
            raise AssertionError("half a status file") from None
        reads += 1
        assert status["state"] in ("running", "finished"), status
        time.sleep(0.002)
    assert run.finish() == 0, run.said
    status = json.loads(path.read_text())
    assert (status["state"], status["exit_code"], status["ok"]) == ("finished", 0, ROWS), status
    assert max(ages) < bench.limit(2.0), f"{max(ages):.1f} s old"
    run = bench.start(out)
    run.until(lambda: json.loads(path.read_text())["state"] == "running")
    os.kill(run.pid, signal.SIGKILL)
    run.finish()
    assert json.loads(path.read_text())["state"] == "running"
    bench.assert_resumes(out)
    return f"complete each of {reads:,} times, {max(ages):.1f} s old at most; with the exit code at the end"


def start_twenty(bench: Bench) -> str:
    """Twenty starts on one output; a row holds the run that begins until the others have ended."""
    starts = 20 if bench.full else 5
    out, poison = bench.new_output(), Poison(bench, {5: "hold"})
    runs = [bench.start(out, driver="run_poisoned", environment=poison.environment) for _ in range(starts)]
    try:
        assert wait_for(lambda: sum(map(_is_over, runs)) == starts - 1, PATIENCE), "all but one should have ended"
        together = time.monotonic() - runs[0].started
        slowest = max(_cpu_seconds(run) for run in runs if _is_over(run))
        before = _names(work_directory(out))
        late = bench.start(out)
        assert late.finish() == 75, late.said
        assert _names(work_directory(out)) == before
    finally:
        poison.release()
    codes = Counter(run.finish() for run in runs)
    assert codes == {75: starts - 1, 0: 1}, codes
    for run in runs:
        assert run.process.returncode == 0 or "another run holds it" in " ".join(run.said), run.said
    bench.assert_finished(out)
    assert slowest < bench.limit(BUSY_SECONDS), f"a refused run took {slowest:.2f} s of processor time"
    return (
        f"1 ran, {starts - 1} exit 75 with {slowest:.2f} s of processor time at most ({together:.1f} s for all starts "
        f"together); one more was refused in {late.seconds:.2f} s"
    )


def _is_over(run: Run) -> bool:
    """Whether it has ended; it is not reaped, so that its times can still be read."""
    return run.process.returncode is not None or bool(
        os.waitid(os.P_PID, run.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
    )


def _cpu_seconds(run: Run) -> float:
    """The processor time of a run that has ended and is not reaped."""
    fields = Path(f"/proc/{run.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
