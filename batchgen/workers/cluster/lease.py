"""A small file in the attempt's directory that shows node processes anywhere on the cluster that the run lives.

The run changes its content every few seconds, and removes it at its end. A node process ends when it is gone, or has
not changed for a minute by the node's own clock. Its content counts: times of a shared file system are not reliable.
"""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from batchgen.workers.pool import no_interrupts_to_workers

NAME = "lease"
REFRESH_SECONDS = 5.0
STALE_SECONDS = 60.0


@contextmanager
def hold_lease(attempt: Path) -> Iterator[Path]:
    """Keep the lease fresh from a thread while the block runs."""
    path, over = attempt / NAME, threading.Event()

    def refresh() -> None:
        beat = 0
        while not over.wait(REFRESH_SECONDS):
            beat += 1
            with suppress(OSError):  # if the disk is full, the run ends when it writes a part
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
    """In place and always of the same length, so that it needs no space on a full disk."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(descriptor, b"%020d" % beat, 0)
    finally:
        os.close(descriptor)


class LeaseWatch:
    """A node's view of the lease."""

    def __init__(self, attempt: Path, stale: float = STALE_SECONDS) -> None:
        self._path, self._stale = attempt / NAME, stale
        self._content, self._since = b"", time.monotonic()

    def end_reason(self) -> str:
        """Why there is nothing more to do; empty while the run lives."""
        now = time.monotonic()
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return "the run is over"
        except OSError:  # the file system does not answer, or its handle is stale
            content = self._content
        if content != self._content:
            self._content, self._since = content, now
        return f"no sign of the run for {self._stale:g} s" if now - self._since > self._stale else ""
