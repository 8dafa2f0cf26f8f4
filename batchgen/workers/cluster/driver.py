"""python -m batchgen.workers.cluster.driver BACKEND ADDRESS: the only process that has an engine's client in it.

Ray may abort the process that called it, and both engines put threads, signal handlers and their logs into it. It reads
pickled Orders and writes Events; when its input ends, so does this process, and the engine cancels its tasks.
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
from importlib import import_module
from pathlib import Path
from typing import BinaryIO, TypeAlias

from batchgen.workers.cluster.messages import CONNECT_SECONDS, Event, Order, receive, send, take_streams
from batchgen.workers.cluster.task import do_chunk

LOOK_SECONDS = 2.0  # between two looks at the number of slots

Arguments: TypeAlias = tuple[str, str, bytes, bytes]  # of do_chunk
Emit: TypeAlias = Callable[[Event], None]


def check_port(address: str) -> None:
    """OSError if nobody listens there: both engines would retry for a long time."""
    if match := re.fullmatch(r"(?:(?:tcp|tls|ray)://)?\[?([^/]+?)\]?:(\d+)", address):
        socket.create_connection((match[1], int(match[2])), CONNECT_SECONDS).close()


def last_line(error: BaseException) -> str:
    """The last line of an error: Ray and Dask put the reason there."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1][:300] if lines else 'no reason given'}"


def outcome(ticket: int, result: Callable[[], bytes], is_fault: Callable[[Exception], bool]) -> Event:
    """The event of a task that ended. A fault is the task's own and would come again; with another error it is lost."""
    try:
        return Event(ticket, reply=result())
    except Exception as error:
        return Event(ticket, error=last_line(error)) if is_fault(error) else Event(ticket, lost=last_line(error))


class Dask:
    """A client of a Dask scheduler."""

    def __init__(self, address: str) -> None:
        import distributed

        if address.endswith(".json") and not Path(address).exists():  # Dask would wait for it
            raise FileNotFoundError(f"no scheduler file {address}")
        check_port(address)
        where = {"scheduler_file": address} if address.endswith(".json") else {"address": address}
        self._client = distributed.Client(**where, timeout=CONNECT_SECONDS, set_as_default=False, name="batchgen")
        self._killed = distributed.scheduler.KilledWorker
        self._name = f"batchgen-{uuid.uuid4().hex}"
        self._futures: dict[int, distributed.Future] = {}  # Dask cancels a task whose future is not referenced

    def slots(self) -> int:
        """One per thread."""
        return sum(self._client.nthreads().values())

    def submit(self, ticket: int, arguments: Arguments, emit: Emit) -> None:
        future = self._client.submit(do_chunk, *arguments, key=f"{self._name}-{ticket}", pure=False)
        self._futures[ticket] = future
        future.add_done_callback(lambda _: self._finish(ticket, emit))

    def _finish(self, ticket: int, emit: Emit) -> None:
        future = self._futures.pop(ticket, None)
        if future is None:  # cancelled
            return
        is_fault = lambda error: future.status == "error" and not isinstance(error, self._killed)  # noqa: E731
        event = outcome(ticket, future.result, is_fault)
        emit(event if not event.lost or self._client.status == "running" else Event(error="the connection broke"))

    def cancel(self, ticket: int) -> None:
        if future := self._futures.pop(ticket, None):
            future.cancel(force=True)


class Ray:
    """A driver in a Ray cluster."""

    def __init__(self, address: str) -> None:
        import ray

        self._ray = ray
        check_port(address)
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Ray has set a handler
        self._task = ray.remote(num_cpus=1, max_retries=0)(do_chunk)
        self._tasks: dict[int, ray.ObjectRef] = {}

    def slots(self) -> int:
        """One per CPU."""
        return int(self._ray.cluster_resources().get("CPU", 0))

    def submit(self, ticket: int, arguments: Arguments, emit: Emit) -> None:
        self._tasks[ticket] = self._task.remote(*arguments)
        self._tasks[ticket].future().add_done_callback(lambda future: self._finish(ticket, future.result, emit))

    def _finish(self, ticket: int, result: Callable[[], bytes], emit: Emit) -> None:
        if self._tasks.pop(ticket, None) is None:  # cancelled
            return
        is_fault = lambda error: isinstance(error, self._ray.exceptions.RayTaskError)  # noqa: E731
        emit(outcome(ticket, result, is_fault))

    def cancel(self, ticket: int) -> None:
        if task := self._tasks.pop(ticket, None):
            self._ray.cancel(task)


ENGINES: dict[str, Callable[[str], Dask | Ray]] = {"dask": Dask, "ray": Ray}


def report_slots(engine: Dask | Ray, emit: Emit) -> None:
    """Report the number of slots again and again, as long as the engine answers."""
    while True:
        try:
            slots = engine.slots()
        except Exception as error:
            sys.stderr.write(f"batchgen: {last_line(error)}\n")
        else:
            emit(Event(slots=slots))
        time.sleep(LOOK_SECONDS)


def serve(orders: BinaryIO, engine: Dask | Ray, emit: Emit) -> str:
    """Carry out orders until there are no more; returns the path of the run's lease."""
    lease = ""
    while True:
        try:
            order: Order = pickle.loads(receive(orders))
        except EOFError:
            return lease
        lease = order.lease or lease
        if order.arguments:
            engine.submit(order.ticket, order.arguments, emit)
        elif order.ticket:
            engine.cancel(order.ticket)


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # this process ends with the run
    backend, address = sys.argv[1:]
    orders, events = take_streams()
    lock = threading.Lock()

    def emit(event: Event) -> None:
        with lock:
            send(events, pickle.dumps(event))

    def give_up() -> None:
        """Ray would go on for half a minute."""
        emit(Event(error=f"no answer within {CONNECT_SECONDS:.0f} s"))
        os._exit(1)

    try:
        import_module("distributed" if backend == "dask" else "ray")
        patience = threading.Timer(CONNECT_SECONDS, give_up)
        patience.start()
        engine = ENGINES[backend](address)
        emit(Event(slots=engine.slots()))
        patience.cancel()
    except Exception as error:
        emit(Event(error=last_line(error)))
        os._exit(1)
    threading.Thread(target=report_slots, args=(engine, emit), daemon=True).start()
    lease = serve(orders, engine, emit)
    if lease:  # it is still there if the run was killed: without it the nodes stop
        Path(lease).unlink(missing_ok=True)
    os._exit(0)  # without waiting for an engine that is gone


if __name__ == "__main__":
    main()
