"""What all cases use: a small model, prompts, the output of an undisturbed run, and runs to disturb."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from batchgen.gpt2.config import GPT2Config
from batchgen.output.ledger import work_directory
from tests.support.models import write_byte_model

ROOT = Path(__file__).parents[2]
SMALL = GPT2Config(n_vocab=257, n_ctx=128, n_embd=64, n_head=2, n_layer=2)
ROWS = 120
OPTIONS = ["--chunk-rows", "15", "--max-tokens", "16", "--temperature", "0.7", "--show", "0"]
PREVIOUS = b"the version before"
PATIENCE = 60.0  # seconds, if the case is not about time

Command = Sequence[str | Path]


class Skipped(Exception):
    """A tool that causes this fault is missing here; the text says which."""


def wait_for(condition: Callable[[], object], seconds: float) -> bool:
    """Whether the condition became true in time."""
    until = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < until:
        time.sleep(0.01)
    return bool(value)


def processes_of(session: int) -> list[int]:
    """The live processes of a session, except loky's tracker of semaphores, which ends by itself."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, its_session = (path / "stat").read_text().rpartition(")")[2].split()[:4]
            command = (path / "cmdline").read_bytes()
        except OSError:  # it has ended
            continue
        if int(its_session) == session and state not in "ZX" and b"resource_tracker" not in command:
            found.append(int(path.name))
    return found


class Run:
    """One process `batchgen generate`, in a session of its own; `said` is its standard error, once it has ended."""

    def __init__(self, command: Command, environment: dict[str, str], file_limit: int | None = None) -> None:
        self.started = time.monotonic()
        limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (file_limit, file_limit)) if file_limit else None
        self.process = subprocess.Popen(
            [str(word) for word in command],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=limit,
        )
        self.said: list[str] = []

    @property
    def pid(self) -> int:
        return self.process.pid

    def workers(self) -> list[int]:
        """Its worker processes."""
        found = []
        for pid in processes_of(self.pid):
            try:
                if b"LokyProcess" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(pid)
            except OSError:
                continue
        return found

    def until(self, condition: Callable[[], object]) -> None:
        """Wait until the condition is true; AssertionError if the run ends before."""
        assert wait_for(lambda: condition() or self.process.poll() is not None, PATIENCE), "it never became true"
        assert self.process.poll() is None, f"the run has ended: {self.finish()} {self.said}"

    def finish(self, seconds: float = PATIENCE) -> int:
        """Wait for the end; returns the exit code.

        `said` leaves out the warnings of loky's tracker about what it removed after a killed process.
        """
        try:
            _, err = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.kill_all()
            raise AssertionError(f"still running after {seconds:.0f} s") from None
        self.seconds = time.monotonic() - self.started
        self.said = [line for line in err.splitlines() if not re.search(r"resource_tracker|warnings\.warn", line)]
        return self.process.returncode

    def kill_all(self) -> None:
        """End a run that a case no longer waits for, and all its processes."""
        for pid in {self.pid, *processes_of(self.pid)}:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.communicate()

    def wait_for_processes(self, seconds: float) -> float:
        """Wait until all its processes have ended; returns the seconds, AssertionError beyond the limit."""
        started = time.monotonic()
        assert wait_for(lambda: not processes_of(self.pid), seconds), f"still alive: {processes_of(self.pid)}"
        return time.monotonic() - started


class Bench:
    """A folder with a model and prompts; with `full`, cases repeat more often and check times."""

    def __init__(self, folder: Path, *, full: bool) -> None:
        self.folder, self.full = folder, full
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self.environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "TMPDIR": str(self.temporary),
            "BATCHGEN_MODELS": str(folder / "models"),
            "PYTHONWARNINGS": "default",
        }
        self.model = write_byte_model(folder / "model", SMALL)
        self.prompts = folder / "prompts.jsonl"
        lines = [json.dumps({"prompt": "abcdefghij"[row % 10] * (1 + row % 40), "id": row}) for row in range(ROWS)]
        self.prompts.write_text("\n".join(lines) + "\n")
        self.n_folders = 0
        out = self.new_output()
        run = self.start(out)
        assert run.finish() == 0, run.said
        self.expected, self.seconds = out.read_bytes(), run.seconds

    def limit(self, seconds: float) -> float:
        """The limit in the full suite; in the short one, on a busy machine, only a hang is an error."""
        return seconds if self.full else PATIENCE

    def new_folder(self) -> Path:
        self.n_folders += 1
        folder = self.folder / f"{self.n_folders}"
        folder.mkdir()
        return folder

    def new_output(self, previous: bytes | None = None, suffix: str = ".parquet") -> Path:
        """An output path in a folder of its own."""
        out = self.new_folder() / f"out{suffix}"
        if previous is not None:
            out.write_bytes(previous)
        return out

    def command(
        self, out: Path, *more: str | Path, jobs: int = 2, prompts: Path | None = None, driver: str = ""
    ) -> list[str | Path]:
        """A command line; options in `more` replace the usual ones. A driver is a function of drivers.py."""
        start = ["-c", f"from tests.faults import drivers; drivers.{driver}()"] if driver else ["-m", "batchgen"]
        usual = [*OPTIONS, "--model", self.model, "--jobs", str(jobs), "--overwrite"]
        return [sys.executable, *start, "generate", prompts or self.prompts, "-o", out, *usual, *more]

    def start(
        self,
        out: Path,
        *more: str | Path,
        before: Command = (),
        environment: dict[str, str] | None = None,
        file_limit: int | None = None,
        jobs: int = 2,
        prompts: Path | None = None,
        driver: str = "",
    ) -> Run:
        """Start a run; `before` is a command that runs it, such as strace."""
        command = [*before, *self.command(out, *more, jobs=jobs, prompts=prompts, driver=driver)]
        return Run(command, self.environment | (environment or {}), file_limit)

    # ---- what must hold

    def assert_intact(self, out: Path, previous: bytes | None = None, expected: bytes | None = None) -> None:
        """The output is absent, the previous version, or the complete new file."""
        found = out.read_bytes() if out.exists() else None
        assert found in (previous, expected or self.expected), f"{out}: neither the previous nor the new version"

    def assert_finished(self, out: Path, expected: bytes | None = None) -> None:
        """The output is complete, and nothing is left beside it."""
        assert out.read_bytes() == (expected or self.expected), f"{out}: differs from the output of an undisturbed run"
        self.assert_alone(out)

    def assert_alone(self, out: Path) -> None:
        """Only the status file is beside the output."""
        left = set(os.listdir(out.parent)) - {out.name, f"{out.name}.status.json"}
        assert not left, f"left behind: {sorted(left)}"

    def assert_one_line(self, run: Run) -> None:
        """The run has written one line, its error, to standard error."""
        assert len(run.said) == 1, f"said {len(run.said)} lines: {run.said}"
        assert run.said[0].startswith("batchgen: "), run.said

    def assert_resumes(self, out: Path, *more: str | Path, jobs: int = 2) -> None:
        """The same command, undisturbed, finishes with the bytes of an undisturbed run."""
        run = self.start(out, *more, jobs=jobs if self.full else 1)
        assert run.finish() == 0, run.said
        self.assert_finished(out)

    def count_semaphores(self, pids: Sequence[int]) -> int:
        """How many semaphores of killed runs are left, which may be few; TMPDIR must be empty.

        loky's tracker removes the semaphores that are registered with it. loky makes a semaphore and then registers
        it: a kill between the two leaves 32 bytes in /dev/shm.
        """
        names = {f"-{pid}-" for pid in pids} | {f"_{pid}_" for pid in pids}
        left = lambda: [p for p in os.listdir("/dev/shm") if any(name in p for name in names)]  # noqa: E731
        assert wait_for(lambda: not os.listdir(self.temporary), PATIENCE), (
            f"left in TMPDIR: {os.listdir(self.temporary)}"
        )
        if not Path("/dev/shm").is_dir() or wait_for(lambda: not left(), PATIENCE):
            return 0
        stay = left()
        assert len(stay) <= max(len(pids) // 50, 1), f"left in /dev/shm: {stay}"
        return len(stay)

    def remove(self, out: Path) -> None:
        """Remove the folder of an output."""
        shutil.rmtree(out.parent)


def find_tool(tool: str) -> str:
    """The tool's path; Skipped if it is missing."""
    found = shutil.which(tool)
    if found is None:
        raise Skipped(f"{tool} is not installed")
    return found


def count_parts(out: Path) -> int:
    """The committed parts of an unfinished output."""
    return len(list((work_directory(out) / "parts").glob("*-*")))
