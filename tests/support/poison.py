"""Poison: prompts that kill, hang or break their worker. run_chunk replaces pool.run_chunk.

Workers import it by name, so it must be a module. The first word of a prompt says what happens, and when:
at its first step, in the middle of its decoding, or when it is written down; once only, or every time.
"""

import os
import signal
import time
from functools import partial
from pathlib import Path

from batchgen.types import Chunk, Receipt
from batchgen.workers import worker
from batchgen.workers.marker import Marker

DEATHS = "deaths"  # a file beside the model: a line for each death


def run_chunk(setup: worker.WorkerSetup, chunk: Chunk, attempt: str) -> Receipt:
    words = {item.row: (item.prompt or "").partition(" ")[0] for item in chunk.items}
    seen: dict[int, int] = {}

    def set_in_flight(self: Marker, suspects: list[int], running: list[int] = ()) -> None:  # type: ignore[assignment]
        _SET_IN_FLIGHT(self, suspects, running)
        for row in (*suspects, *running):
            seen[row] = seen.get(row, 0) + 1
            when = "first" if seen[row] == 1 else "middle" if row in running and seen[row] == 5 else "last"
            if when == "last" and (row in running or len(suspects) > 1):
                continue
            act(words.get(row, ""), when, partial(record, Path(setup.model).parent / DEATHS, words.get(row, "")))

    Marker.set_in_flight = set_in_flight  # type: ignore[method-assign]
    try:
        return worker.run_chunk(setup, chunk, attempt)
    finally:
        Marker.set_in_flight = _SET_IN_FLIGHT  # type: ignore[method-assign]  # the worker stays for other tests


_SET_IN_FLIGHT = Marker.set_in_flight


def act(word: str, when: str, record) -> None:
    what, _, moment = word.partition("-")
    moment, _, once = moment.partition("-")
    if moment != when or what not in ("kill", "hang", "raise", "memory", "exit") or (not record() and once):
        return
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "exit":
        os._exit(7)
    elif what == "hang":
        time.sleep(1000)
    elif what == "memory":
        raise MemoryError
    else:
        raise ValueError(f"no good: {word}")


def record(path: Path, word: str) -> bool:
    """Count a death; returns whether it is the first of this word."""
    first = not path.exists() or word not in path.read_text().split()
    with open(path, "a", encoding="utf-8") as file:
        file.write(f"{word}\n")
    return first
