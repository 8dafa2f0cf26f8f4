"""python -m batchgen.workers.cluster.node VERSION PARENT: a node's side of a run, started by task.py for each task.

It does chunks with a Pool of one worker, which may be killed, hang or run out of memory as on one machine. The marker
lies on the node's own disk, parts in a directory of this process under the attempt's, whose name is used once, because
the engine may run a task twice.
"""

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
from batchgen.engine.limits import kv_bytes_per_token, tokens_needed
from batchgen.errors import BatchgenError, OutputError
from batchgen.files import lock, sync_path, temporary_path
from batchgen.gpt2.config import GPT2Config
from batchgen.models.model import Model
from batchgen.options import say, use_flags
from batchgen.planning import WORKER_BYTES, available_memory
from batchgen.types import Chunk
from batchgen.workers.cluster.lease import LeaseWatch
from batchgen.workers.cluster.messages import NodeSetup, Reply, receive, send, take_streams
from batchgen.workers.pool import Pool
from batchgen.workers.worker import WorkerSetup

WATCH_SECONDS = 1.0
MAX_WARNINGS = 50  # of one chunk
HOST = socket.gethostname()


# ---- the node's own disk


def private_folder() -> Path:
    """A folder on the node's own disk that only this user can write to."""
    path = Path(tempfile.gettempdir(), f"batchgen-{os.getuid()}")
    path.mkdir(0o700, exist_ok=True)
    if path.lstat().st_uid != os.getuid() or path.lstat().st_mode & 0o022:
        raise BatchgenError(f"{path}: another user owns it or can write to it; remove it, or set TMPDIR")
    return path


@contextmanager
def lock_here(what: str) -> Iterator[BinaryIO]:
    """Hold this node's lock on something; yields a file for notes to the next holder."""
    path = private_folder() / hashlib.sha256(what.encode()).hexdigest()[:16]
    with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), "r+b") as file:
        lock(file.fileno(), wait=True)
        yield file


def make_marker_folder() -> Path:
    """A new folder for markers; removes those of node processes that were killed."""
    with lock_here("private folders"):
        for path in private_folder().glob("node-*"):
            with suppress(OSError), open(path / "lock", "rb") as other:
                if lock(other.fileno()):
                    shutil.rmtree(path)
        path = Path(tempfile.mkdtemp(prefix="node-", dir=private_folder()))
        lock(os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC))  # as long as this process lives
    return path


# ---- what a node must have


def check_regex(setup: NodeSetup) -> None:
    """The Unicode tables of regex decide where words are cut, so which tokens a prompt has."""
    if (found := version("regex")) != setup.regex and setup.regex:
        raise BatchgenError(
            f"this node has regex {found}, and the run was planned with {setup.regex}; install the same"
        )


def check_memory(setup: WorkerSetup, config: GPT2Config) -> None:
    """Refuse to start a worker that would be killed for lack of memory, and lose its chunk again and again."""
    most = setup.max_batch * tokens_needed(config.n_ctx, 0) * kv_bytes_per_token(config, setup.precision)
    needed, free = min(setup.kv_bytes, most) + WORKER_BYTES, available_memory()
    if needed > free:
        raise BatchgenError(
            f"{free / 1e9:.1f} GB of memory are free, and one more worker needs up to {needed / 1e9:.1f}; start fewer "
            f"of the engine's workers, or lower {say('kv_bytes')}"
        )


def prepare_model(setup: NodeSetup) -> Model:
    """The model to map; every shard is read and checked once per run and node, and again if it was replaced."""
    source, wanted = Path(setup.worker.model), setup.worker.model_hash
    directory = Path(setup.model_cache, wanted) if setup.model_cache else source
    with lock_here(str(directory)) as note:
        if setup.model_cache and not directory.exists():
            copy_model(source, directory, wanted)
        model = Model.load(directory, wanted, setup.worker.precision)
        checked = f"{setup.attempt} {model.files_hash}".encode()
        if note.read() != checked:
            model.verify()
            note.seek(0)
            note.truncate()
            note.write(checked)
    return model


def copy_model(source: Path, directory: Path, wanted: str) -> None:
    """Copy a model to the node's cache; the copy gets its name when it is complete and verified."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(directory)
    if temporary.exists():  # of a copy that was interrupted: a lock excludes others
        shutil.rmtree(temporary)
    try:
        shutil.copytree(source, temporary)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = error.args[0][0][2] if isinstance(error, shutil.Error) else error
        raise OutputError(
            f"{directory}: the model cannot be copied there ({reason}); make room, or choose another "
            f"{say('model_cache')}"
        ) from error
    Model.load(temporary, wanted).verify()  # another model may have taken its place meanwhile
    os.rename(temporary, directory)


def check_run(planned_with: str, data: bytes) -> None:
    """Refuse a run of another batchgen, or one whose attempt this node does not see; data is a pickled NodeSetup."""
    if planned_with != __version__:  # then a pickled record may be something else here
        raise BatchgenError(f"this node has batchgen {__version__}, and the run {planned_with}; install the same")
    attempt = Path(pickle.loads(data).attempt)
    if not attempt.is_dir():
        raise OutputError(
            f"{attempt}: no such folder on this node; the output must be on a file system that all nodes share, under "
            "the same path"
        )


# ---- chunks


class Node:
    """A worker for one run, on a node that was checked."""

    def __init__(self, setup: NodeSetup, private: Path) -> None:
        """private is a directory on the node's own disk. Raises BatchgenError if the node is unfit for the run."""
        self.attempt = Path(setup.attempt)
        check_regex(setup)
        model = prepare_model(setup)
        check_memory(setup.worker, model.config)
        self.folder = self.attempt / f"node-{HOST}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.folder.mkdir()
        worker = replace(
            setup.worker,
            model=str(model.directory),
            model_files=model.files_hash,
            parent=os.getpid(),
            markers=str(private),
        )
        self._pool = Pool(worker, self.folder, 1, setup.row_timeout)
        self._done = 0

    def complete(self, chunk: Chunk) -> Reply:
        """Complete and write the chunk; raises what Pool does."""
        [receipt] = self._pool.receipts(iter([chunk]))  # to its end: the worker stays for the next chunk
        self._done += 1
        path = self.folder / f"{chunk.index:08d}-{self._done}.parquet"
        os.replace(receipt.path, path)
        sync_path(self.folder)
        relative = str(path.relative_to(self.attempt))
        return Reply(HOST, receipt=replace(receipt, path=relative), size=path.stat().st_size)


class _Warnings(logging.Handler):
    """Keeps the pool's warnings for the run's own log."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if len(self._lines) < MAX_WARNINGS:
            self._lines.append(record.getMessage())

    def take(self) -> tuple[str, ...]:
        lines, self._lines = tuple(self._lines), []
        return lines


def name_node(error: Exception) -> BatchgenError:
    """The error that ends the run, with this node's name."""
    if isinstance(error, BatchgenError):
        return type(error)(f"node {HOST}: {error}")
    if isinstance(error, OSError):
        return OutputError(f"node {HOST}: {error.filename}: {error.strerror or error}")
    traceback.print_exc()  # a bug: the engine's log has all of it
    return BatchgenError(f"node {HOST}: {type(error).__name__}: {error}")


def serve(calls: BinaryIO, answers: BinaryIO, setup: NodeSetup, private: Path) -> None:
    """Do chunks until the engine's worker closes the pipe."""
    warnings, node = _Warnings(), None
    logging.getLogger("batchgen").addHandler(warnings)
    while True:
        chunk: Chunk = pickle.loads(receive(calls))
        try:
            node = node or Node(setup, private)
            reply = node.complete(chunk)
        except OSError as error:  # this node's disk or mount; a part that cannot be written is an OutputError
            node, reply = None, Reply(HOST, lost=str(name_node(error)))
        except Exception as error:
            reply = Reply(HOST, error=name_node(error))
        send(answers, pickle.dumps(replace(reply, warnings=warnings.take())))


# ---- the process


def leave(private: Path) -> NoReturn:
    """End now: the worker gets SIGKILL when this process ends, and nothing waits for its chunk."""
    shutil.rmtree(private, ignore_errors=True)
    os._exit(0)


def watch(parent: int, attempt: Path, private: Path) -> None:
    """End this process with its parent and with the run, even in the middle of a chunk."""
    lease = LeaseWatch(attempt)
    while True:
        time.sleep(WATCH_SECONDS)
        reason = "the engine's worker is gone" if os.getppid() != parent else lease.end_reason()
        if reason:
            sys.stderr.write(f"batchgen: node process {os.getpid()} ends: {reason}\n")
            leave(private)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    planned_with, parent = sys.argv[1], int(sys.argv[2])
    calls, answers = take_streams()
    with suppress(EOFError, BrokenPipeError):
        data = receive(calls)
        try:
            check_run(planned_with, data)
            private = make_marker_folder()
        except (BatchgenError, OSError) as error:
            receive(calls)  # the first chunk
            send(answers, pickle.dumps(Reply(HOST, error=name_node(error))))
            return
        setup: NodeSetup = pickle.loads(data)
        use_flags(setup.flags)
        threading.Thread(target=watch, args=(parent, Path(setup.attempt), private), daemon=True).start()
        with suppress(EOFError, BrokenPipeError):
            serve(calls, answers, setup, private)
        leave(private)


if __name__ == "__main__":
    main()
