"""python -m batchgen.workers.cluster.node VERSION PARENT: a node's side of a run. task.py starts one for each task.

It does chunks as one machine does, with a Pool of one worker, so that all that holds there of rows, memory and BLAS
holds here: the worker can be killed, hang or run out of memory, and this process finds the row. Markers lie on the
node's own disk, parts in a directory of this process's own under the attempt's, each under a name that is used once.
"""

import fcntl
import hashlib
import logging
import os
import pickle
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO, NoReturn

from batchgen import __version__
from batchgen.engine.engine import kv_bytes_per_token
from batchgen.engine.probe import blas_info
from batchgen.engine.scheduler import tokens_needed
from batchgen.errors import BatchgenError, ModelError, OutputError
from batchgen.files import sync_path
from batchgen.gpt2.config import GPT2Config
from batchgen.models.shards import load_manifest, model_hash, verify_shards
from batchgen.planning import WORKER_BYTES, available_memory
from batchgen.types import Chunk
from batchgen.workers.cluster.lease import Watch
from batchgen.workers.cluster.messages import NodeSetup, Reply, own_streams, receive, send
from batchgen.workers.pool import Pool
from batchgen.workers.worker import WorkerSetup

WATCH_SECONDS = 1.0
MAX_WARNINGS = 50  # of one chunk
HOST = socket.gethostname()


class Node:
    """A worker for one run, on a node that was looked at."""

    def __init__(self, setup: NodeSetup, private: Path) -> None:
        """private is a directory on the node's own disk. Raises BatchgenError where rows of this node would not do."""
        self.attempt = Path(setup.attempt)
        check_versions(setup)
        model = model_here(setup)
        check_room(setup.worker, load_manifest(model).config)
        self.folder = self.attempt / f"node-{HOST}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.folder.mkdir()
        worker = replace(setup.worker, model=str(model), parent=os.getpid(), markers=str(private))
        self._pool = Pool(worker, self.folder, 1, setup.row_timeout)
        self._done = 0

    def complete(self, chunk: Chunk) -> Reply:
        """Generate and write the chunk; raises what Pool does."""
        [receipt] = self._pool.receipts(iter([chunk]))  # to its end: the worker stays for the next
        self._done += 1
        path = self.folder / f"{chunk.index:08d}-{self._done}.parquet"
        os.replace(receipt.path, path)  # what was told of once is not written again, whatever the engine asks for
        sync_path(self.folder)
        relative = str(path.relative_to(self.attempt))
        return Reply(HOST, receipt=replace(receipt, path=relative), size=path.stat().st_size)


# ---- what a node must be


def check_versions(setup: NodeSetup) -> None:
    """Rows have the same bits only from the same NumPy and the same kernels of its BLAS."""
    numpy, kernels = version("numpy"), blas_info().kernels
    if numpy != setup.numpy:
        raise BatchgenError(f"NumPy {numpy} there, and {setup.numpy} where the run was planned; install the same")
    if kernels != setup.blas:
        raise BatchgenError(
            f"its BLAS is {kernels!r}, and {setup.blas!r} where the run was planned: rows would differ in their last "
            "bits; start the workers and this command with the same OPENBLAS_CORETYPE, such as Haswell"
        )


def check_room(setup: WorkerSetup, config: GPT2Config) -> None:
    """A worker that is killed for lack of memory would cost its chunk, again and again."""
    most = setup.max_batch * tokens_needed(config.n_ctx, 0) * kv_bytes_per_token(config)
    needed, free = min(setup.kv_bytes, most) + WORKER_BYTES, available_memory()
    if needed > free:
        raise BatchgenError(
            f"{free / 1e9:.1f} GB of memory are free there, and one more worker takes up to {needed / 1e9:.1f}; start "
            "fewer of the engine's workers, or give less --kv-memory"
        )


def model_here(setup: NodeSetup) -> Path:
    """The model's directory to map, with every shard read and found right once a run and node."""
    source, wanted = Path(setup.worker.model), setup.worker.model_hash
    directory = Path(setup.model_cache, wanted) if setup.model_cache else source
    with only_one_here(str(directory)) as note:
        if setup.model_cache and not directory.exists():
            copy_model(source, directory)
        found = model_hash(load_manifest(directory))
        if found != wanted:
            raise ModelError(f"{directory}: model {found} is there, and the run is of {wanted}; copy that one there")
        seen = f"{setup.attempt} {wanted}".encode()
        if note.read() != seen:
            verify_shards(directory)
            note.seek(0)
            note.truncate()
            note.write(seen)
    return directory


def copy_model(source: Path, directory: Path) -> None:
    """Copy a model to the node's cache; it has its name there only when it is whole and right."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.with_name(f".{directory.name}.tmp")
    if temporary.exists():  # of a copy that was cut short: a lock keeps others out
        shutil.rmtree(temporary)
    try:
        shutil.copytree(source, temporary)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = error.args[0][0][2] if isinstance(error, shutil.Error) else error
        raise OutputError(
            f"{directory}: the model cannot be copied there ({reason}); make room, or choose another --model-cache"
        ) from error
    verify_shards(temporary)
    os.rename(temporary, directory)


@contextmanager
def only_one_here(what: str) -> Iterator[BinaryIO]:
    """Hold this node's lock on something, with a file that says what the last holder has left there."""
    path = private_folder() / hashlib.sha256(what.encode()).hexdigest()[:16]
    with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def private_folder() -> Path:
    """A folder on the node's own disk that this user alone can write to."""
    path = Path(tempfile.gettempdir(), f"batchgen-{os.getuid()}")
    path.mkdir(0o700, exist_ok=True)
    if path.lstat().st_uid != os.getuid() or path.lstat().st_mode & 0o022:
        raise BatchgenError(f"{path}: it is another's, or others can write there; remove it, or set TMPDIR")
    return path


def new_private_folder() -> Path:
    """For markers; those of node processes that were killed are cleared away."""
    with only_one_here("private folders"):
        for path in private_folder().glob("node-*"):
            with suppress(OSError), open(path / "lock", "rb") as other:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path)
        path = Path(tempfile.mkdtemp(prefix="node-", dir=private_folder()))
        fcntl.flock(os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC), fcntl.LOCK_EX)  # for life
    return path


# ---- the process


class _Warnings(logging.Handler):
    """Keeps what the pool has to say for the run's own log."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if len(self._lines) < MAX_WARNINGS:
            self._lines.append(record.getMessage())

    def take(self) -> tuple[str, ...]:
        lines, self._lines = tuple(self._lines), []
        return lines


def serve(calls: BinaryIO, answers: BinaryIO, setup: NodeSetup, private: Path) -> None:
    """Do chunks until there are no more."""
    warnings, node = _Warnings(), None
    logging.getLogger("batchgen").addHandler(warnings)
    while True:
        chunk: Chunk = pickle.loads(receive(calls))
        try:
            node = node or Node(setup, private)
            reply = node.complete(chunk)
        except OSError as error:  # of this node: its disk, its mount; a part that cannot be written is an OutputError
            node, reply = None, Reply(HOST, lost=str(for_the_run(error)))
        except Exception as error:
            reply = Reply(HOST, error=for_the_run(error))
        send(answers, pickle.dumps(replace(reply, warnings=warnings.take())))


def for_the_run(error: Exception) -> BatchgenError:
    """What ends the run, in words that name this node."""
    if isinstance(error, BatchgenError):
        return type(error)(f"node {HOST}: {error}")
    if isinstance(error, OSError):
        return OutputError(f"node {HOST}: {error.filename}: {error.strerror or error}")
    traceback.print_exc()  # a fault of this program: all of it is in the engine's log
    return BatchgenError(f"node {HOST}: {type(error).__name__}: {error}")


def watch(parent: int, attempt: Path, private: Path) -> None:
    """End this process with its parent, and with the run, whatever its worker is doing."""
    lease = Watch(attempt)
    while True:
        time.sleep(WATCH_SECONDS)
        reason = "the engine's worker is gone" if os.getppid() != parent else lease.ended()
        if reason:
            sys.stderr.write(f"batchgen: node process {os.getpid()} ends: {reason}\n")
            leave(private)


def leave(private: Path) -> NoReturn:
    """Now: the worker gets SIGKILL as this process ends, and nobody waits for what it was doing."""
    shutil.rmtree(private, ignore_errors=True)
    os._exit(0)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asked, parent = sys.argv[1], int(sys.argv[2])
    calls, answers = own_streams()
    try:
        data = receive(calls)
        if wrong := why_not(asked, data):
            receive(calls)
            send(answers, pickle.dumps(Reply(HOST, error=for_the_run(wrong))))
            return
        setup: NodeSetup = pickle.loads(data)
        try:
            private = new_private_folder()
        except (BatchgenError, OSError) as error:
            receive(calls)
            send(answers, pickle.dumps(Reply(HOST, error=for_the_run(error))))
            return
    except EOFError:
        return
    watcher = threading.Thread(target=watch, args=(parent, Path(setup.attempt), private), daemon=True)
    watcher.start()
    try:
        serve(calls, answers, setup, private)
    except (EOFError, BrokenPipeError):
        leave(private)


def why_not(asked: str, data: bytes) -> BatchgenError | None:
    """What keeps this node from so much as watching the run."""
    if asked != __version__:  # what is pickled there may be something else here
        return BatchgenError(f"batchgen {__version__} there, and {asked} where the run was started; install the same")
    attempt = Path(pickle.loads(data).attempt)
    if attempt.is_dir():
        return None
    return OutputError(
        f"{attempt}: no such folder there; the output must be on a file system that all nodes share, under the same "
        "path"
    )


if __name__ == "__main__":
    main()
