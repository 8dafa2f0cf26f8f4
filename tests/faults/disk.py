"""Disks that are full, fail, limit the size of files, or are read-only."""

import random
import subprocess
import textwrap
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.output.ledger import work_directory
from tests.faults.bench import PREVIOUS, Bench, Skipped, count_parts, find_tool
from tests.faults.kills import WRITES, Call, calls_of_run, choose


def fail_each_call(bench: Bench) -> str:
    """EIO or ENOSPC at every write, fsync, rename and mkdir of the parent, one in each run."""
    calls = calls_of_run(bench, WRITES)
    ends = {0: 0, 1: 0}  # exit code: runs
    for i, call in enumerate(choose(bench, calls, 2)):
        error = ("EIO", "ENOSPC")[i % 2]
        ends[_fail_at(bench, call, error)] += 1
    names = sorted({call.name for call in calls})
    return (
        f"{sum(ends.values())} errors ({', '.join(names)}): {ends[1]} ended with exit 1 and one line, {ends[0]} made "
        "no difference; outputs intact, all resumed to identical bytes"
    )


def _fail_at(bench: Bench, call: Call, error: str) -> int:
    out = bench.new_output(PREVIOUS)
    run = bench.start(out, before=call.inject(f"error={error}"), jobs=1)
    code = run.finish()
    assert code in (0, 1), (call, error, code, run.said)
    if code == 1:
        bench.assert_one_line(run)
    bench.assert_intact(out, PREVIOUS)
    bench.assert_resumes(out, jobs=1)
    bench.remove(out)
    return code


def damage_parts(bench: Bench) -> str:
    """A part that is committed already is changed, emptied, removed or exchanged for another while the run goes on."""
    ways = ["flip", "empty", "remove", "exchange"]
    cases = [(way, suffix) for way in ways for suffix in (".parquet", ".dataset")] * 2
    for i, (way, suffix) in enumerate(cases if bench.full else cases[:2]):
        out = bench.new_output(suffix=suffix)
        options = ["--format", "dataset"] if suffix == ".dataset" else []
        run = bench.start(out, *options)
        run.until(lambda out=out: count_parts(out) >= 2)
        part = _damage(work_directory(out) / "parts", way, random.Random(i))
        assert run.finish() == 1, (way, run.said)
        bench.assert_one_line(run)
        assert part.name in run.said[0], (way, run.said)
        assert not out.exists(), f"published with a damaged part ({way})"
        run = bench.start(out, *options)
        assert run.finish() == 0, run.said
        table = pq.read_table(pa.BufferReader(bench.expected))
        assert pq.read_table(out).equals(table), f"other rows ({way})"
        bench.assert_alone(out)
        bench.remove(out)
    return f"{i + 1} parts: exit 1 with one line that names the part, nothing published; made again, identical rows"


def _damage(parts: Path, way: str, rng: random.Random) -> Path:
    """Damage one of the parts; returns it."""
    part, other = rng.sample(sorted(parts.iterdir()), 2)
    data = bytearray(part.read_bytes())
    if way == "flip":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        part.write_bytes(data)
    elif way == "empty":
        part.write_bytes(b"")
    elif way == "remove":
        part.unlink()
    else:
        part.write_bytes(other.read_bytes())
    return part


def fail_worker_fsync(bench: Bench) -> str:
    """The n-th fsync of every process fails, so also that of a worker's part."""
    times = 8 if bench.full else 1
    for n in range(2, times + 2):
        error = ("ENOSPC", "EIO")[n % 2]
        strace = [find_tool("strace"), "-f", "-q", "-o", "/dev/null", "-e", "trace=fsync"]
        out = bench.new_output()
        run = bench.start(out, before=[*strace, "-e", f"inject=fsync:error={error}:when={n}"])
        code = run.finish()
        assert code in (0, 1), (n, code, run.said)
        if code == 1:
            bench.assert_one_line(run)
        bench.assert_intact(out)
        bench.assert_resumes(out)
        bench.remove(out)
    return f"{times} errors: exit 1 with one line, all resumed to identical bytes"


def limit_file_size(bench: Bench) -> str:
    """RLIMIT_FSIZE, as `ulimit -f` or a quota sets it: no file grows beyond some number of bytes."""
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
        bench.assert_resumes(out)
        bench.remove(out)
    assert failed
    return f"{len(limits)} limits, {failed} reached: exit 1 with one line, all resumed to identical bytes"


def fill_disk(bench: Bench) -> str:
    """A disk that is full in the first run, and has room in the second."""
    sizes = [20, 40, 80, 120, 160, 200, 240, 280] if bench.full else [120]
    reached = 0
    for kib in sizes:
        out = bench.folder / "disk" / "out.parquet"
        first, said, second = run_in_namespace(
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
    return f"{len(sizes)} sizes, {reached} too small: exit 1 with one line; with room, the next run finishes"


def refuse_read_only_folder(bench: Bench) -> str:
    """A folder on a read-only mount: root cannot write there either."""
    out = bench.folder / "disk" / "out.parquet"
    (code, said) = run_in_namespace(
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
    return "exit 1 with one line, before any model is looked up"


def run_in_namespace(bench: Bench, script: str, out: Path) -> list[int]:
    """Run a shell script with mounts of its own; "$@" is the run. Returns the numbers that the script prints."""
    out.parent.mkdir(exist_ok=True)
    inside = [find_tool("unshare"), "--user", "--map-root-user", "--mount"]
    if subprocess.run([*inside, "true"], capture_output=True).returncode != 0:
        raise Skipped("this system has no user namespaces")
    command = map(str, bench.command(out))
    words = [*inside, "sh", "-c", textwrap.dedent(script), "sh", *command]
    done = subprocess.run(words, env=bench.environment, capture_output=True, text=True, timeout=300)
    assert not done.stderr, done.stderr
    return [int(word) for word in done.stdout.split()]
