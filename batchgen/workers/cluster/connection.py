"""A connection to a scheduler of Dask or Ray: a driver process (driver.py), orders to it, events from it."""

import pickle
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from queue import Empty, SimpleQueue
from typing import IO

from batchgen.errors import BatchgenError, StoppedError, UsageError
from batchgen.options import say
from batchgen.workers.cluster.messages import (
    CONNECT_SECONDS,
    IMPORT_SECONDS,
    Event,
    Order,
    environment_of_python,
    receive,
    send,
)
from batchgen.workers.pool import no_interrupts_to_workers

SILENCE_SECONDS = 20.0  # a scheduler that sends nothing for so long is lost


@dataclass(frozen=True, slots=True)
class Engine:
    """How errors speak of an engine."""

    module: str
    command: str  # starts a cluster
    option: str  # names a cluster


ENGINES = {
    "dask": Engine("distributed", "dask scheduler", "scheduler"),
    "ray": Engine("ray", "ray start --head", "address"),
}


class Connection:
    """A driver process and the threads that speak to it."""

    def __init__(self, backend: str, address: str) -> None:
        self.backend, self.address = backend, address
        self.where = f"{backend} at {address}"
        self.slots = 0
        self._heard = self._asked = time.monotonic()
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._orders: SimpleQueue[Order | None] = SimpleQueue()
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as the driver writes to it
        command = [sys.executable, "-m", "batchgen.workers.cluster.driver", backend, address]
        with no_interrupts_to_workers():
            self._driver = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, env=environment_of_python()
            )
            self._listener = threading.Thread(target=self._listen, daemon=True)
            self._listener.start()
            threading.Thread(target=self._speak, daemon=True).start()

    def _listen(self) -> None:
        assert self._driver.stdout is not None
        with suppress(EOFError, OSError, ValueError):
            while True:
                event: Event = pickle.loads(receive(self._driver.stdout))
                self._heard = time.monotonic()
                self._events.put(event)
        self._events.put(Event(error=f"its client ended{self._last_line()}"))

    def _speak(self) -> None:
        """In a thread: a driver that hangs in its engine stops reading, and that must not stop this process."""
        assert self._driver.stdin is not None
        with suppress(OSError, ValueError):
            while order := self._orders.get():
                send(self._driver.stdin, pickle.dumps(order))

    def _last_line(self) -> str:
        """The last line of the driver's log."""
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").split("\n")
        words = [line.strip() for line in lines if line.strip()]
        return f" ({words[-1][:200]})" if words else ""

    def order(self, order: Order) -> None:
        self._orders.put(order)

    def event(self, seconds: float) -> Event | None:
        """The next event of a ticket; None if none comes in time. Raises StoppedError if the scheduler is lost."""
        now, before = time.monotonic(), self._asked
        self._asked = now
        if now - before > SILENCE_SECONDS / 2:  # this process was stopped, and receives only now what was sent
            self._heard = now
        try:
            event = self._events.get(timeout=seconds)
        except Empty:
            silence = now - self._heard  # not of the time now: this process may have been stopped since
            if silence <= SILENCE_SECONDS:
                return None
            event = Event(error=f"it sent nothing for {silence:.0f} s")
        if event.ticket:
            return event
        if event.error:
            raise StoppedError(
                f"{self.where} is lost: {event.error}; finished chunks are kept: run the same command to resume"
            )
        self.slots = event.slots
        return None

    def wait_for_answer(self) -> None:
        """Wait until the scheduler answers; BatchgenError, with the reason, if it does not."""
        try:
            event = self._events.get(timeout=IMPORT_SECONDS + CONNECT_SECONDS)
        except Empty:
            event = Event(error=f"its client did not start within {IMPORT_SECONDS:.0f} s")
        if event.error:
            engine = ENGINES[self.backend]
            raise BatchgenError(
                f"{say('backend', self.backend)}: no cluster at {self.address} ({event.error}); start one with "
                f"`{engine.command}`, or give its address with {say(engine.option)}"
            )
        self.slots = event.slots

    def close(self) -> None:
        """Kill the driver: the engine notices, and cancels the tasks that it has not begun."""
        self._orders.put(None)
        self._driver.kill()
        self._driver.wait()
        self._listener.join()  # it reads to the end
        for stream in (self._driver.stdin, self._driver.stdout, self._log):
            with suppress(OSError):  # an order that was not sent
                if stream is not None:
                    stream.close()


@contextmanager
def connect(backend: str, address: str) -> Iterator[Connection]:
    """A connection while the block runs.

    If no cluster answers, the exit code is 1, not 75: a script that repeats a command after 75 would try a mistyped
    address for ever.
    """
    if find_spec(ENGINES[backend].module) is None:
        remedy = f"install it with: pip install {ENGINES[backend].module}"
        raise UsageError(f"{say('backend', backend)}: {backend} is not installed here; {remedy}")
    connection = Connection(backend, address)
    try:
        connection.wait_for_answer()
        yield connection
    finally:
        connection.close()
