"""Disks that are full, failing, limited or read-only."""

import subprocess
import textwrap
from pathlib import Path

from tests.faults.bench import PREVIOUS, Bench, Skipped, need
from tests.faults.kills import Call, calls_of, chosen

WRITES = ("write", "pwrite64", "fsync", "fdatasync", "rename", "renameat", "renameat2", "mkdir", "mkdirat")


def error_at_each_call(bench: Bench) -> str:
    """EIO and ENOSPC at every write, fsync, rename and mkdir of the parent, one at a time."""
    calls = calls_of(bench, bench.new_output(), WRITES)
    ends = {0: 0, 1: 0}
    for i, call in enumerate(chosen(bench, calls, 3)):
        error = ("EIO", "ENOSPC")[i % 2]
        ends[_fail_at(bench, call, error)] += 1
    names = sorted({call.name for call in calls})
    return (
        f"{sum(ends.values())} errors ({', '.join(names)}): {ends[1]} ended with exit 1 and one line, {ends[0]} made "
        "no difference; I holds, all gone on with to identical bytes"
    )


def _fail_at(bench: Bench, call: Call, error: str) -> int:
    out = bench.new_output(PREVIOUS)
    run = bench.start(out, before=call.inject(f"error={error}"), jobs=1)
    code = run.finish()
    assert code in (0, 1), (call, error, code, run.said)
    if code == 1:
        bench.assert_one_line(run)
    bench.assert_intact(out, PREVIOUS)
    bench.assert_goes_on(out, jobs=1)
    bench.forget(out)
    return code


def error_at_fsync_of_a_worker(bench: Bench) -> str:
    """The N-th fsync of every process, workers among them: the part itself cannot be made safe."""
    times = 8 if bench.full else 1
    for n in range(2, times + 2):
        error = ("ENOSPC", "EIO")[n % 2]
        strace = [need("strace"), "-f", "-q", "-o", "/dev/null", "-e", "trace=fsync"]
        out = bench.new_output()
        run = bench.start(out, before=[*strace, "-e", f"inject=fsync:error={error}:when={n}"])
        code = run.finish()
        assert code in (0, 1), (n, code, run.said)
        if code == 1:
            bench.assert_one_line(run)
        bench.assert_intact(out)
        bench.assert_goes_on(out)
        bench.forget(out)
    return f"{times} errors: exit 1 with one line, all gone on with to identical bytes"


def file_size_limit(bench: Bench) -> str:
    """RLIMIT_FSIZE, as `ulimit -f` or a quota sets it: no file grows beyond so many bytes."""
    limits = [64, 300, 1000, 2000, 4000, 6000, 10_000, 20_000, 70_000]
    limits = limits if bench.full else limits[3:4]
    failed = 0
    for limit in limits:
        out = bench.new_output(PREVIOUS)
        run = bench.start(out, file_limit=limit)
        code = run.finish()
        assert code in (0, 1), (limit, code, run.said)
        if code == 1:
            bench.assert_one_line(run)
            failed += 1
        bench.assert_intact(out, PREVIOUS)
        bench.assert_goes_on(out)
        bench.forget(out)
    assert failed
    return f"{len(limits)} limits, {failed} reached: exit 1 with one line, all gone on with to identical bytes"


def small_tmpfs(bench: Bench) -> str:
    """A disk that is full for the first run, and has room for the second."""
    sizes = [20, 40, 80, 120, 160, 200, 240, 280] if bench.full else [120]
    reached = 0
    for kib in sizes:
        out = bench.folder / "disk" / "out.parquet"
        first, said, second = _in_a_namespace(
            bench,
            f"""
            mount -t tmpfs -o size={kib}k none {out.parent}
            "$@" > /dev/null 2> {bench.folder}/said; echo $?
            cat {bench.folder}/said | wc -l
            mount -o remount,size=64m {out.parent}
            "$@" > /dev/null 2>> {bench.folder}/said; echo $?
            ls -A {out.parent} | grep -v -x -e out.parquet -e out.parquet.status.json >&2
            cp {out} {bench.folder}/copied.parquet
            """,
            out,
        )
        assert second == 0, (kib, (bench.folder / "said").read_text())
        assert first in (0, 1), (kib, first)
        assert said == first, (kib, (bench.folder / "said").read_text())
        reached += first
        assert (bench.folder / "copied.parquet").read_bytes() == bench.expected
    assert reached
    return f"{len(sizes)} sizes, {reached} too small: exit 1 with one line, finished by the next run once there is room"


def read_only(bench: Bench) -> str:
    """A folder on a read-only mount, where root too may not write."""
    out = bench.folder / "disk" / "out.parquet"
    (code, said) = _in_a_namespace(
        bench,
        f"""
        mount --bind {out.parent} {out.parent}
        mount -o remount,bind,ro {out.parent}
        "$@" > /dev/null 2> {bench.folder}/said; echo $?
        cat {bench.folder}/said | wc -l
        """,
        out,
    )
    line = (bench.folder / "said").read_text()
    assert (code, said) == (1, 1), line
    assert "Read-only file system" in line, line
    return "exit 1 with one line, before any model was looked for"


def _in_a_namespace(bench: Bench, script: str, out: Path) -> list[int]:
    """Run a shell script whose mounts nobody else sees; "$@" is the run. Returns the numbers that it prints."""
    out.parent.mkdir(exist_ok=True)
    inside = [need("unshare"), "--user", "--map-root-user", "--mount"]
    if subprocess.run([*inside, "true"], capture_output=True).returncode != 0:
        raise Skipped("this system gives no user namespaces")
    command = map(str, bench.command(out))
    words = [*inside, "sh", "-c", textwrap.dedent(script), "sh", *command]
    done = subprocess.run(words, env=bench.environment, capture_output=True, text=True, timeout=300)
    assert not done.stderr, done.stderr
    return [int(word) for word in done.stdout.split()]
