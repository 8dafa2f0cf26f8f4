"""How far a run is, for people and for machines: Progress, and the status file beside the output.

completions.parquet.status.json is one JSON object, replaced as a whole, so that a reader never sees half of it. It
is rewritten about every second while the run lives, and says at the end how it ended; one that says `running` and is
older than a few seconds is of a run that was killed.
"""

import errno
import json
import logging
import os
import socket
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from batchgen.files import STATUS_SUFFIX

logger = logging.getLogger(__name__)

State = Literal["running", "finished", "stopped", "failed"]

INTERVAL_SECONDS = 1.0
DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)  # of which the run itself will tell
MAX_POINTS = 200  # of the timeline


@dataclass(frozen=True, slots=True)
class WorkerState:
    """What a worker is on: a chunk (None: idle), rows of it that are done, samples in flight."""

    pid: int
    chunk: int | None
    rows: int
    in_flight: int


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is: rows of the input in all, tokens and seconds of this run alone."""

    rows: int
    rows_in_all: int
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    resumed_rows: int = 0  # of rows, those of earlier runs
    workers: tuple[WorkerState, ...] = ()

    @property
    def eta_seconds(self) -> float | None:
        """Seconds still to go at this run's pace."""
        new = self.rows - self.resumed_rows
        return (self.rows_in_all - self.rows) * self.seconds / new if new else None


def status_path(out: Path) -> Path:
    return out.with_name(out.name + STATUS_SUFFIX)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(slots=True)
class StatusFile:
    """Writes one run's status. Where it cannot be written, that is logged once and the run goes on."""

    path: Path | None  # None: nowhere
    output: str
    started: str = field(default_factory=_now)
    timeline: list[tuple[float, int, int]] = field(default_factory=list)  # seconds, rows, completion tokens
    _step: float = INTERVAL_SECONDS  # between the timeline's points
    _written: float = float("-inf")
    _last: Progress = Progress(0, 0, 0, 0, 0.0)

    def update(self, now: Progress, counts: Counter[str]) -> None:
        """Take note of how far the run is, and write it when it is time."""
        self._last = now
        if not self.timeline or now.seconds - self.timeline[-1][0] >= self._step:
            self.timeline.append((round(now.seconds, 3), now.rows, now.completion_tokens))
        if len(self.timeline) > MAX_POINTS:
            self.timeline, self._step = self.timeline[::2], 2 * self._step
        if time.monotonic() - self._written >= INTERVAL_SECONDS:
            self._write("running", counts, None, None)

    def finish(self, state: State, counts: Counter[str], exit_code: int, error: str | None) -> None:
        self._write(state, counts, exit_code, error)

    def _write(self, state: State, counts: Counter[str], exit_code: int | None, error: str | None) -> None:
        if self.path is None:
            return
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        try:
            values = self._values(state, counts, exit_code, error)
            lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in values.items())
            temporary.write_text(f"{{\n{lines}\n}}\n", "utf-8")
            os.replace(temporary, self.path)
        except OSError as reason:
            level = logging.INFO if reason.errno in DISK_TROUBLE else logging.WARNING
            logger.log(level, "%s: the status is no longer written: %s", self.path, reason.strerror or reason)
            self.path = None
        self._written = time.monotonic()

    def _values(self, state: State, counts: Counter[str], exit_code: int | None, error: str | None) -> dict[str, Any]:
        now = self._last
        eta = now.eta_seconds if state == "running" else None
        return {
            "state": state,
            "exit_code": exit_code,
            "error": error,
            "output": self.output,
            "rows_done": now.rows,
            "rows": now.rows_in_all,
            "rows_resumed": now.resumed_rows,
            **{status: counts[status] for status in ("ok", "rejected", "failed")},
            "prompt_tokens": now.prompt_tokens,
            "completion_tokens": now.completion_tokens,
            "seconds": round(now.seconds, 3),
            "tokens_per_second": round(now.completion_tokens / now.seconds, 1) if now.seconds else 0.0,
            "eta_seconds": None if eta is None else round(eta, 1),
            "started": self.started,
            "updated": _now(),
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "timeline": self.timeline,
        }
