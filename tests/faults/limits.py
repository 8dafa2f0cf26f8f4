"""Few processes, few open files, no shared memory: each run ends by itself, with one line or with the output."""

import os

from tests.faults.bench import PREVIOUS, Bench, Command, find_tool
from tests.faults.disk import run_in_namespace

USER = 47_011  # no one's, so that nothing else counts


def limit_processes(bench: Bench) -> str:
    """RLIMIT_NPROC from 1 upward: processes and threads together. It is not for root, so another user runs it."""
    some = ["--inh-caps=-all,+dac_override", "--ambient-caps=-all,+dac_override"]
    user = [find_tool("setpriv"), "--reuid", str(USER), "--regid", str(USER), "--clear-groups", *some]
    return _raise_limit(bench, "nproc", range(1, 30), user if os.geteuid() == 0 else ["unshare", "--user", "-r"])


def limit_open_files(bench: Bench) -> str:
    """RLIMIT_NOFILE from 6 upward; with fewer, no Python starts."""
    return _raise_limit(bench, "nofile", range(6, 120, 3), [])


def _raise_limit(bench: Bench, name: str, limits: range, before: Command) -> str:
    """Raise a limit until three runs succeed; each run before ends with exit 1 and one line."""
    prlimit, worked, refused = find_tool("prlimit"), 0, 0
    for limit in limits if bench.full else limits[:2]:
        out = bench.new_output(PREVIOUS)
        run = bench.start(out, before=[*before, prlimit, f"--{name}={limit}"])
        code = run.finish()
        assert code in (0, 1), (name, limit, code, run.said)
        if code == 1:
            bench.assert_one_line(run)
            assert not worked, (name, limit, run.said)
            refused += 1
        bench.assert_intact(out, PREVIOUS)
        bench.assert_resumes(out)
        bench.remove(out)
        worked += code == 0
        if worked == 3:
            break
    assert refused
    assert worked == 3 or not bench.full
    return f"{refused} limits below what it needs: exit 1 with one line, all resumed to identical bytes"


def fill_shared_memory(bench: Bench) -> str:
    """Shared memory of so many KiB: semaphores are made in it."""
    sizes = [4, 8, 16, 20, 24, 32, 64, 128] if bench.full else [8]
    refused = 0
    for kib in sizes:
        out = bench.new_output()
        said = bench.folder / "said"
        script = f"""
            mount -t tmpfs -o size={kib}k none /dev/shm
            "$@" > /dev/null 2> {said}; echo $?
            cat {said} | wc -l
            """
        code, lines = run_in_namespace(bench, script, out)
        # With just enough room for the run, joblib warns in a worker that it has none for a semaphore of its own.
        assert code == 0 or (code, lines) == (1, 1), (kib, code, said.read_text())
        assert code == 0 or "/dev/shm" in said.read_text(), said.read_text()
        refused += code
        bench.assert_resumes(out)
    assert refused
    return f"{len(sizes)} sizes, {refused} too small: exit 1 with one line, all resumed to identical bytes"
