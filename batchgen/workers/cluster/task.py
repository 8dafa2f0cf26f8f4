"""What runs in an engine's own worker: it hands a chunk to a node process, waits, and returns the reply.

Node processes stay for the next chunk of their run, one for each thread here, and end with the run or this process.
"""

import os
import pickle
import socket
import subprocess
import sys
import threading
from collections import defaultdict
from contextlib import suppress

from batchgen.workers.cluster.messages import Reply, environment_of_python, receive, send

_lock = threading.Lock()
_idle: dict[str, list["_NodeProcess"]] = defaultdict(list)  # by attempt


class _NodeProcess:
    """A `python -m batchgen.workers.cluster.node` and the pipes to it."""

    def __init__(self, version: str, setup: bytes) -> None:
        command = [sys.executable, "-m", "batchgen.workers.cluster.node", version, str(os.getpid())]
        environment = environment_of_python()
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        self.setup: bytes | None = setup  # None: sent

    def ask(self, chunk: bytes) -> bytes:
        """The reply to a chunk; EOFError or OSError if the process is gone."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if self.setup is not None:
            send(self.process.stdin, self.setup)
            self.setup = None
        send(self.process.stdin, chunk)
        return receive(self.process.stdout)

    def end(self, patience: float = 0.0) -> int:
        """Kill it if it does not end in `patience` seconds; its worker dies with it. Returns its exit code."""
        try:
            self.process.wait(patience)
        except subprocess.TimeoutExpired:
            self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            with suppress(OSError):  # data that was not sent
                if pipe is not None:
                    pipe.close()
        return self.process.wait()


def _take_idle(attempt: str) -> _NodeProcess | None:
    """An idle node process of this run; processes that have ended are forgotten."""
    with _lock:
        for key, nodes in list(_idle.items()):
            _idle[key] = [node for node in nodes if node.process.poll() is None]
            if not _idle[key]:
                del _idle[key]
        return _idle[attempt].pop() if attempt in _idle else None


def do_chunk(version: str, attempt: str, setup: bytes, chunk: bytes) -> bytes:
    """A pickled Reply; setup is a NodeSetup and chunk a Chunk, both pickled by a batchgen of that version."""
    host = socket.gethostname()
    try:
        node = _take_idle(attempt) or _NodeProcess(version, setup)
    except OSError as error:  # no memory or no process left; another node may have some
        return pickle.dumps(Reply(host, lost=f"no process can be started on {host}: {error.strerror}"))
    try:
        reply = node.ask(chunk)
    except (EOFError, OSError):
        code = node.end(patience=5.0)
        return pickle.dumps(Reply(host, lost=f"its node process on {host} ended (exit code {code}; see its log)"))
    except BaseException:
        node.end()
        raise
    with _lock:
        _idle[attempt].append(node)
    return reply
