"""What the processes of a cluster run send each other, and how it goes through a pipe."""

import os
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import IO, BinaryIO

from batchgen.errors import BatchgenError
from batchgen.types import Receipt
from batchgen.workers.worker import WorkerSetup

IMPORT_SECONDS = 40.0  # for an engine's client to be loaded
CONNECT_SECONDS = 8.0  # for the engine to answer
_LENGTH = struct.Struct("!Q")


@dataclass(frozen=True, slots=True)
class NodeSetup:
    """What a node process needs for a run, and what it must have. Paths are on the shared file system."""

    worker: WorkerSetup
    attempt: str
    regex: str = ""  # version; empty: unknown
    model_cache: str | None = None  # a directory of the node's own
    row_timeout: float | None = None
    flags: Mapping[str, tuple[str, str | None]] = field(default_factory=dict)  # for options.use_flags


@dataclass(frozen=True, slots=True)
class Reply:
    """The outcome of a chunk: a receipt, an error that ends the run, or neither: then the chunk is done again."""

    host: str
    receipt: Receipt | None = None  # its path is relative to the attempt's directory
    size: int = 0  # of the part, in bytes
    error: BatchgenError | None = None
    lost: str = ""  # why there is neither
    warnings: tuple[str, ...] = ()  # for the run's own log


@dataclass(frozen=True, slots=True)
class Order:
    """To the driver: a chunk (the arguments of do_chunk); or a ticket to cancel; or, with ticket 0, the run's lease."""

    ticket: int
    arguments: tuple[str, str, bytes, bytes] | None = None
    lease: str = ""


@dataclass(frozen=True, slots=True)
class Event:
    """From the driver: of a ticket, a pickled Reply or why it is lost; of none (0), the number of slots."""

    ticket: int = 0
    reply: bytes = b""
    lost: str = ""
    error: str = ""  # ends the run: the task cannot run at all, or (ticket 0) there is no connection
    slots: int = 0


def environment_of_python() -> dict[str, str]:
    """For a process that finds modules where this one does, and not first in its current folder."""
    path = os.pathsep.join(path or os.getcwd() for path in sys.path)
    return os.environ | {"PYTHONSAFEPATH": "1", "PYTHONPATH": path}


def send(stream: IO[bytes], data: bytes) -> None:
    stream.write(_LENGTH.pack(len(data)) + data)
    stream.flush()


def receive(stream: IO[bytes]) -> bytes:
    """The next message; EOFError if the other end is gone."""
    (length,) = _LENGTH.unpack(_read(stream, _LENGTH.size))
    return _read(stream, length)


def _read(stream: IO[bytes], length: int) -> bytes:
    data = stream.read(length)
    if len(data) < length:
        raise EOFError
    return data


def take_streams() -> tuple[BinaryIO, BinaryIO]:
    """Standard input and output, for messages alone: all other output goes to standard error."""
    incoming, outgoing = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return incoming, outgoing
