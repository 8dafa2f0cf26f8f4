"""Peak memory of a process and its descendants, by Linux's proportional set size: shared pages count once."""

import threading
import time
from collections import defaultdict
from pathlib import Path

PROC = Path("/proc")
SHARE_OF_TIME = 0.02  # reading it walks page tables, which must not slow the measured processes


class PeakMemory:
    """Samples a process and its descendants a few times a second while the `with` block runs."""

    def __init__(self, pid: int) -> None:
        self.pid, self.peak = pid, 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        pause = 0.0
        while not self._over.wait(pause):
            start = time.perf_counter()
            self.peak = max(self.peak, sum(map(proportional_bytes, tree(self.pid))))
            pause = max(0.25, (time.perf_counter() - start) / SHARE_OF_TIME)


def tree(pid: int) -> list[int]:
    """The process and its descendants."""
    children: dict[int, list[int]] = defaultdict(list)
    for stat in PROC.glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):  # it has ended
            continue
        children[parent].append(int(stat.parent.name))
    found = [pid]
    for process in found:
        found.extend(children[process])
    return found


def proportional_bytes(pid: int) -> int:
    try:
        lines = (PROC / str(pid) / "smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
