"""python -m batchgen.workers.cluster.driver BACKEND ADDRESS: the one process with an engine's client in it.

Ray may abort the process that called it, and both engines put threads, signal handlers and their logs into it: here
they trouble nobody. Standard input brings Orders and standard output takes Events, pickled; when the input ends, so
does this process, and the engine cancels what it had asked for.
"""

import os
import pickle
import re
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from batchgen.workers.cluster.messages import CONNECT_SECONDS, Event, Order, own_streams, receive, send
from batchgen.workers.cluster.task import do_chunk

LOOK_SECONDS = 2.0  # between two looks at how many workers there are


Tell = Callable[[Event], None]


def knock(address: str) -> None:
    """OSError where nobody listens: both engines would try again for a long time."""
    if match := re.fullmatch(r"(?:(?:tcp|tls|ray)://)?\[?([^/]+?)\]?:(\d+)", address):
        socket.create_connection((match[1], int(match[2])), CONNECT_SECONDS).close()


class Dask:
    """A client of a Dask scheduler."""

    def __init__(self, address: str) -> None:
        import distributed

        if address.endswith(".json") and not Path(address).exists():  # Dask would wait for it
            raise FileNotFoundError(f"no scheduler file {address}")
        knock(address)
        where = {"scheduler_file": address} if address.endswith(".json") else {"address": address}
        self._client = distributed.Client(**where, timeout=CONNECT_SECONDS, set_as_default=False, name="batchgen")
        self._killed = distributed.scheduler.KilledWorker
        self._name = f"batchgen-{uuid.uuid4().hex}"
        self._futures: dict[int, Any] = {}  # what nobody holds, Dask cancels

    def slots(self) -> int:
        """One a thread."""
        return sum(self._client.nthreads().values())

    def submit(self, ticket: int, arguments: tuple[Any, ...], tell: Tell) -> None:
        future = self._client.submit(do_chunk, *arguments, key=f"{self._name}-{ticket}", pure=False)
        self._futures[ticket] = future
        future.add_done_callback(lambda _: self._done(ticket, tell))

    def _done(self, ticket: int, tell: Tell) -> None:
        future = self._futures.pop(ticket, None)
        if future is None:  # given up
            return
        fault = lambda error: future.status == "error" and not isinstance(error, self._killed)  # noqa: E731
        event = outcome(ticket, future.result, fault)
        tell(event if not event.lost or self._client.status == "running" else Event(error="the connection broke"))

    def give_up(self, ticket: int) -> None:
        if future := self._futures.pop(ticket, None):
            future.cancel(force=True)


class Ray:
    """A driver in a Ray cluster."""

    def __init__(self, address: str) -> None:
        import ray

        self._ray = ray
        knock(address)
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Ray has put a handler there
        self._task = ray.remote(num_cpus=1, max_retries=0)(do_chunk)
        self._tasks: dict[int, Any] = {}

    def slots(self) -> int:
        """One a CPU."""
        return int(self._ray.cluster_resources().get("CPU", 0))

    def submit(self, ticket: int, arguments: tuple[Any, ...], tell: Tell) -> None:
        self._tasks[ticket] = self._task.remote(*arguments)
        self._tasks[ticket].future().add_done_callback(lambda future: self._done(ticket, future.result, tell))

    def _done(self, ticket: int, result: Callable[[], bytes], tell: Tell) -> None:
        if self._tasks.pop(ticket, None) is None:  # given up
            return
        fault = lambda error: isinstance(error, self._ray.exceptions.RayTaskError)  # noqa: E731
        tell(outcome(ticket, result, fault))

    def give_up(self, ticket: int) -> None:
        if task := self._tasks.pop(ticket, None):
            self._ray.cancel(task)


def outcome(ticket: int, result: Callable[[], bytes], is_fault: Callable[[Exception], bool]) -> Event:
    """What has become of a task. A fault is its own, and would come again; with anything else the task is lost."""
    try:
        return Event(ticket, reply=result())
    except Exception as error:
        return Event(ticket, error=in_short(error)) if is_fault(error) else Event(ticket, lost=in_short(error))


def in_short(error: BaseException) -> str:
    """The last line of a message of many, where Ray and Dask put the reason."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1][:300] if lines else 'no reason given'}"


ENGINES: dict[str, Callable[[str], Dask | Ray]] = {"dask": Dask, "ray": Ray}


def look(engine: Dask | Ray, tell: Tell) -> None:
    """Tell how many slots there are, again and again; where the engine no longer answers, nothing is told."""
    while True:
        try:
            slots = engine.slots()
        except Exception as error:
            sys.stderr.write(f"batchgen: {in_short(error)}\n")
        else:
            tell(Event(slots=slots))
        time.sleep(LOOK_SECONDS)


def serve(orders: BinaryIO, engine: Dask | Ray, tell: Tell) -> str:
    """Hand on the chunks until there are no more; returns the run's lease."""
    lease = ""
    while True:
        try:
            order: Order = pickle.loads(receive(orders))
        except EOFError:
            return lease
        lease = order.lease or lease
        if order.arguments:
            engine.submit(order.ticket, order.arguments, tell)
        elif order.ticket:
            engine.give_up(order.ticket)


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the run decides when it is over
    backend, address = sys.argv[1:]
    orders, events = own_streams()
    lock = threading.Lock()

    def tell(event: Event) -> None:
        with lock:
            send(events, pickle.dumps(event))

    try:
        engine = ENGINES[backend](address)
        tell(Event(slots=engine.slots()))
    except Exception as error:
        tell(Event(error=in_short(error)))
        os._exit(1)
    threading.Thread(target=look, args=(engine, tell), daemon=True).start()
    lease = serve(orders, engine, tell)
    if lease:  # it is still there where the run was killed: the nodes are to know
        Path(lease).unlink(missing_ok=True)
    os._exit(0)  # an engine that is gone would be waited for


if __name__ == "__main__":
    main()
