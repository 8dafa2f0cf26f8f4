"""A small file in the attempt's directory that says that the run lives, for node processes anywhere on the cluster.

The run changes its content every few seconds, and removes it at its end. A node process ends when it is gone, or has
not changed for a minute by its own clock: the run is over, its machine is dead, or this node is cut off. Only content
is looked at, by opening the file: times and clocks of a shared file system are not to be relied on.
"""

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from batchgen.workers.pool import no_interrupts_to_workers

logger = logging.getLogger(__name__)

NAME = "lease"
REFRESH_SECONDS = 5.0
STALE_SECONDS = 60.0


@contextmanager
def held_lease(attempt: Path) -> Iterator[Path]:
    """Keep the lease fresh while the block runs, from a thread."""
    path, over = attempt / NAME, threading.Event()

    def refresh() -> None:
        beat = 0
        while not over.wait(REFRESH_SECONDS):
            beat += 1
            with suppress(OSError):  # a full disk ends the run where it writes something that matters
                _write(path, beat)

    path.touch()
    _write(path, 0)
    keeper = threading.Thread(target=refresh, daemon=True)
    with no_interrupts_to_workers():
        keeper.start()
    try:
        yield path
    finally:
        over.set()
        keeper.join()
        with suppress(OSError):
            path.unlink()


def _write(path: Path, beat: int) -> None:
    """In place and of one length, so that it needs no room on a full disk."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(descriptor, b"%020d" % beat, 0)
    finally:
        os.close(descriptor)


class Watch:
    """A node's view of the lease."""

    def __init__(self, attempt: Path, stale: float = STALE_SECONDS) -> None:
        self._path, self._stale = attempt / NAME, stale
        self._content, self._since = b"", time.monotonic()

    def ended(self) -> str:
        """Why there is nothing more to do here; empty while the run lives."""
        now = time.monotonic()
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return "the run is over"
        except OSError:  # the file system does not answer, or knows the directory no more
            content = self._content
        if content != self._content:
            self._content, self._since = content, now
        return f"no sign of the run for {self._stale:g} s" if now - self._since > self._stale else ""
