"""Real clusters of two workers on loopback, in their own sessions, and their processes, for tests that kill them."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]
START_SECONDS = 90.0  # on a machine that is busy
PATIENCE = 90.0


class MissingError(Exception):
    """A cluster cannot be started here; the text says why."""


def wait_for(condition: Callable[[], object], seconds: float = PATIENCE) -> bool:
    """Wait until the condition holds, at most so many seconds: many times what it takes."""
    until = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < until:
        time.sleep(0.05)
    return bool(value)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


class Cluster:
    """What both kinds share. Their processes are found by their session and by TMPDIR, which children inherit."""

    backend: str
    option: str
    address: str

    def __init__(self, folder: Path, **variables: str) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        path = f"{ROOT / 'tests' / 'support' / 'cluster_site'}:{ROOT}"
        self.environment = os.environ | {"TMPDIR": str(folder), "PYTHONPATH": path} | variables
        self.started: list[subprocess.Popen[bytes]] = []

    @property
    def options(self) -> list[str]:
        return ["--backend", self.backend, self.option, self.address]

    def start(self, *command: str, before: tuple[str, ...] = (), **variables: str) -> subprocess.Popen[bytes]:
        with open(self.folder / f"log-{len(self.started)}", "wb") as log:
            process = subprocess.Popen(
                [*before, sys.executable, "-m", *command],
                env=self.environment | variables,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=self.folder,
            )
        self.started.append(process)
        return process

    def log(self) -> str:
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.folder.glob("log-*")))

    def processes(self, word: str = "") -> list[int]:
        """Those with this word in their command line."""
        mine, sessions = f"TMPDIR={self.folder}".encode(), {process.pid for process in self.started}
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                state, _, _, session = (path / "stat").read_text().rpartition(")")[2].split()[:4]
                environment, command = (path / "environ").read_bytes(), (path / "cmdline").read_bytes()
            except OSError:  # it has ended
                continue
            ours = mine in environment.split(b"\0") or int(session) in sessions
            if ours and state not in "ZX" and word.encode() in command:
                found.append(int(path.name))
        return found

    def nodes(self) -> list[int]:
        """batchgen's node processes."""
        return self.processes("batchgen.workers.cluster.node")

    def engine_workers(self) -> list[int]:
        """The engine's own worker processes with a chunk of a run."""
        found = set()
        for pid in self.nodes():
            try:
                found.add(parent_of(pid))
            except OSError:
                continue
        return sorted(found - {1})

    def generating(self) -> list[int]:
        """batchgen's workers: the processes that hold the model."""
        return self.processes("LokyProcess")

    def stop(self) -> None:
        for pid in self.processes():
            kill(pid)
        for process in self.started:
            process.kill()
            process.wait()
        assert wait_for(lambda: not self.processes(), 20), self.processes()


class DaskCluster(Cluster):
    """A scheduler and two workers, each with a nanny that restarts it."""

    backend, option = "dask", "--scheduler"

    def __init__(self, folder: Path, workers: int = 2, **variables: str) -> None:
        if find_spec("distributed") is None:
            raise MissingError("Dask is not installed")
        super().__init__(folder, DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED="False", **variables)
        self.port = free_port()
        self.address = f"tcp://127.0.0.1:{self.port}"
        where = ["--host", "127.0.0.1", "--port", str(self.port), "--no-dashboard"]
        self.scheduler = self.start("distributed.cli.dask_scheduler", *where, "--no-show")
        assert wait_for(lambda: "Scheduler at" in self.log(), START_SECONDS), self.log()
        if workers:
            self.add_workers(workers)
            assert wait_for(lambda: self.log().count("Starting established connection") >= workers, START_SECONDS), (
                self.log()
            )

    def add_workers(self, workers: int, threads: int = 1, **variables: str) -> None:
        options = ["--nworkers", str(workers), "--nthreads", str(threads), "--no-dashboard", "--host", "127.0.0.1"]
        self.start("distributed.cli.dask_worker", self.address, *options, **variables)


class RayCluster(Cluster):
    """A head with two CPUs."""

    backend, option = "ray", "--address"

    def __init__(self, folder: Path, workers: int = 2, **variables: str) -> None:
        if find_spec("ray") is None:
            raise MissingError("Ray is not installed")
        super().__init__(folder, RAY_USAGE_STATS_ENABLED="0", RAY_DISABLE_IMPORT_WARNING="1", **variables)
        self.port = 6000 + free_port() % 3000  # Ray keeps 10002 to 19999 for its workers
        self.address = f"127.0.0.1:{self.port}"
        sockets = Path("/tmp", f"bg-ray-{os.getpid()}-{self.port}")  # Ray's sockets need a short path
        options = ["--node-ip-address", "127.0.0.1", "--port", str(self.port), "--num-cpus", str(workers)]
        options += ["--include-dashboard", "false", "--disable-usage-stats", "--object-store-memory", "80000000"]
        options += ["--ray-client-server-port", str(9000 + self.port % 900), "--temp-dir", str(sockets), "--block"]
        self.sockets = sockets
        head = self.start("ray.scripts.scripts", "start", "--head", *options)
        if not wait_for(lambda: "Ray runtime started" in self.log() or head.poll() is not None, START_SECONDS) or (
            head.poll() is not None
        ):
            self.stop()
            raise MissingError(f"ray start: {self.log()[-300:]}")

    def head_processes(self) -> list[int]:
        return self.processes("gcs_server") + self.processes("raylet")

    def stop(self) -> None:
        super().stop()
        shutil.rmtree(self.sockets, ignore_errors=True)
