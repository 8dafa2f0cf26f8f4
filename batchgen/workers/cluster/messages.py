"""What the processes of a cluster run say to each other, and how it goes through a pipe."""

import os
import struct
import sys
from dataclasses import dataclass
from typing import IO, Any, BinaryIO

from batchgen.errors import BatchgenError
from batchgen.types import Receipt
from batchgen.workers.worker import WorkerSetup

CONNECT_SECONDS = 20.0  # for an engine to answer
_LENGTH = struct.Struct("!Q")


@dataclass(frozen=True, slots=True)
class NodeSetup:
    """What a node process must be for a run, and what it works with. Paths are on the shared file system."""

    worker: WorkerSetup
    attempt: str
    numpy: str  # version
    blas: str  # Blas.kernels
    model_cache: str | None = None  # a directory of the node's own
    row_timeout: float | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """What became of a chunk: a receipt, an error that ends the run, or neither, where it is to be done again.

    The receipt's path is relative to the attempt's directory, and size is that of the part in bytes.
    """

    host: str
    receipt: Receipt | None = None
    size: int = 0
    error: BatchgenError | None = None
    lost: str = ""  # why
    warnings: tuple[str, ...] = ()  # for the run's own log


@dataclass(frozen=True, slots=True)
class Order:
    """A chunk for the cluster: the arguments of do_chunk. Without any: the lease to remove when the run is dead, or a
    ticket that is no longer waited for."""

    ticket: int
    arguments: tuple[Any, ...] = ()
    lease: str = ""


@dataclass(frozen=True, slots=True)
class Event:
    """What the engine says: of a ticket, a pickled Reply, or why it was lost; of none, how many slots there are.

    error is what ends the run: the task could not run at all, or (without a ticket) there is no connection.
    """

    ticket: int | None = None
    reply: bytes = b""
    lost: str = ""
    error: str = ""
    slots: int = 0


def send(stream: IO[bytes], data: bytes) -> None:
    stream.write(_LENGTH.pack(len(data)) + data)
    stream.flush()


def receive(stream: IO[bytes]) -> bytes:
    """The next message; EOFError where the other end is gone."""
    (length,) = _LENGTH.unpack(_read(stream, _LENGTH.size))
    return _read(stream, length)


def _read(stream: IO[bytes], length: int) -> bytes:
    data = stream.read(length)
    if len(data) < length:
        raise EOFError
    return data


def own_streams() -> tuple[BinaryIO, BinaryIO]:
    """Standard input and output for messages alone: what else is printed goes to standard error."""
    incoming, outgoing = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return incoming, outgoing
