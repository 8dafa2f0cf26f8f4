"""Looking at an output while its run works: its state, and its rows, each once, wherever they are at that moment."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from batchgen.errors import BatchgenError, BusyError, InputError, StoppedError
from batchgen.files import JsonObject as Row
from batchgen.options import say
from batchgen.output.ledger import work_directory
from batchgen.progress import read_status, status_path
from batchgen.review.committed import Lines, MovedError, Source, Target, find
from batchgen.types import STATUSES, Kind

Phase = Literal["missing", "beginning", "running", "killed", "stopped", "failed", "unknown", "finished"]

STALE_SECONDS = 10.0  # without a new status, which a run writes every second
POLL_SECONDS = 0.5  # between two looks for new parts
GRACE_SECONDS = 3.0  # from the begin of a look on, for a run that somebody starts at the same time
RESUME = "run the same command again to resume"


@dataclass(frozen=True, slots=True)
class State:
    """How far a run is, from its status file and what is on disk; None and 0 are not known."""

    phase: Phase
    rows: int = 0  # of the input, that the output will hold
    rows_done: int | None = None
    statuses: Counter[str] = field(default_factory=Counter)  # of output rows that are committed
    eta_seconds: float | None = None
    silent_seconds: float = 0.0  # since the last status
    error: str = ""


class _Seen:
    """Which rows were shown, by a byte for each input row, so that none is shown twice wherever it is read again."""

    def __init__(self) -> None:
        self.rows: npt.NDArray[np.bool_] = np.zeros(1024, np.bool_)
        self.last = (-1, -1)  # row and sample: some of its samples may be to come

    def is_new(self, row: Row) -> bool:
        """Whether a row was not shown before; from now on it was."""
        number, sample = row["row"], row["sample"]
        if number >= len(self.rows):
            self.rows = np.concatenate([self.rows, np.zeros(max(len(self.rows), number), np.bool_)])
        if self.rows[number] and (number != self.last[0] or sample <= self.last[1]):
            return False
        self.rows[number], self.last = True, (number, sample)
        return True


class Peek:
    """One look at an output, or a longer one; the run that makes it never notices."""

    def __init__(self, target: Target, columns: Sequence[str] = ()) -> None:
        self.target, self.columns = target, tuple(columns)
        self.damaged: dict[str, None] = {}  # what could not be shown, in words
        self._seen = _Seen()
        self.kind: Kind = "generate"  # of the rows, as far as it is known
        self._digest = ""  # of the plan whose rows are shown
        self._has_shown = False

    def find(self) -> Source:
        """Where the rows are now; InputError if there is no such output, or another run makes another one."""
        source = self._find()
        if source is None:
            what = "no such output, and no work of an unfinished run beside it"
            more = f" or {say('work_dir')}" if self.target.address else ""
            raise InputError(f"{self.target.where}: {what}; check the name{more}, or wait for a run with --follow")
        return source

    def state(self, source: Source | None = None) -> State:
        return _state_of(self.target, source or find(self.target))

    def newest(self, n: int) -> list[Row]:
        """The last n rows of an output; of an unfinished one, some that were committed last."""
        return self._steadily(lambda source: source.newest(n, self.columns, self._note))

    def find_row(self, number: int) -> list[Row]:
        """The samples of one input row; none if it is not done yet."""
        return self._steadily(lambda source: source.find_row(number, self.columns, self._note))

    def committed(self) -> Iterator[list[Row]]:
        """All rows that are there now, in the order of the input, some at a time."""
        while True:
            try:
                yield from self._new(self.find())
                return
            except MovedError:  # what was shown is left out where it is now
                self.damaged.clear()

    def follow(self) -> Iterator[list[Row]]:
        """Rows as they are committed, part by part, until the run is over; no rows at all after a look for more.

        Raises StoppedError if the run ended and is not finished.
        """
        done: set[str] = set()
        begun = time.monotonic()
        while True:
            state = self.state()  # before the rows: what is committed now was committed by then
            source = self._find()
            try:
                if source is not None:
                    yield from self._new(source, done)
            except MovedError:
                continue
            if source is not None and source.finished:
                return
            is_late = time.monotonic() - begun >= GRACE_SECONDS
            if is_late and state.phase in ("killed", "stopped", "failed"):
                raise _ended(self.target, state)
            yield []
            time.sleep(POLL_SECONDS)

    def _new(self, source: Source, done: set[str] | None = None) -> Iterator[list[Row]]:
        """The rows that were not shown, in the order of the input; with done, of the parts that are not in it."""
        if isinstance(source, Lines) or source.finished or done is None:
            self.damaged.clear()  # parts that were damaged may have been made again
            for rows in source.read_all(self.columns, self._note):
                yield self._only_new(rows)
            return
        for name in source.names:
            if name not in done:
                for rows in source.read(name, self.columns, self._note):
                    yield self._only_new(rows)
                done.add(name)

    def _only_new(self, rows: list[Row]) -> list[Row]:
        if rows and "row" not in rows[0]:  # answers to an OpenAI batch file
            if self._has_shown:
                what = "it is complete now, as answers to an OpenAI batch file, which are no rows"
                raise BusyError(f"{self.target.where}: {what}; read the file, or peek again")
            return rows
        self._has_shown = self._has_shown or bool(rows)
        return [row for row in rows if self._seen.is_new(row)]

    def _steadily(self, read: Callable[[Source], list[Row]]) -> list[Row]:
        while True:
            try:
                return read(self.find())
            except MovedError:
                continue

    def _note(self, error: Exception) -> None:
        self.damaged[str(error)] = None

    def _find(self) -> Source | None:
        source = find(self.target)
        if source is not None and source.plan is not None:
            if self._digest not in ("", source.plan.digest):
                raise BusyError(f"{self.target.where}: another run makes another output there by now; peek again")
            self._digest, self.kind = source.plan.digest, source.plan.kind
        return source


def _ended(target: Target, state: State) -> BatchgenError:
    if state.phase == "failed":
        return BatchgenError(f"{target.where}: the run failed: {state.error or 'no error is known'}")
    return StoppedError(f"{target.where}: the run was {state.phase}; its committed rows are kept: {RESUME}")


# ---- the state


def _state_of(target: Target, source: Source | None) -> State:
    status = read_status(status_path(target.path))
    counts = Counter[str]({name: _number(status.get(name)) for name in STATUSES})
    rows = len(source.plan.selection) if source and source.plan else _number(status.get("rows"))
    if source is None:
        return State("missing")
    if source.finished:
        known = source.statuses or (counts if status.get("state") == "finished" else Counter())
        return State("finished", rows, rows, known)
    if source.plan is None:
        return State("beginning")
    phase, silent = _phase(target, status)
    done = _number(status["rows_done"]) if "rows_done" in status else None
    eta = status.get("eta_seconds") if phase == "running" else None
    return State(phase, rows, done, counts, eta, silent, str(status.get("error") or ""))


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0


def _phase(target: Target, status: Mapping[str, object]) -> tuple[Phase, float]:
    """The phase of a run that has not published its output, and for how long it has been silent."""
    said, is_held = status.get("state"), _is_held(target)
    if not said:  # --no-status
        has_attempt = any(work_directory(target.path).glob("attempt-*"))  # a run that ends in order removes its own
        return ("running" if is_held else "unknown" if has_attempt else "stopped"), 0.0
    if said in ("stopped", "failed"):
        return ("beginning" if is_held else said), 0.0
    silent = _seconds_since(status.get("updated"))
    if silent <= STALE_SECONDS:
        return "running", 0.0
    return ("running" if is_held else "killed"), silent


def _is_held(target: Target) -> bool:
    """Whether a run of this machine holds the work directory, by the kernel's list: to try the lock would be to take
    it, and a run that begins at that moment would be refused.
    """
    try:
        inode = (work_directory(target.path) / "lock").stat().st_ino
        lines = Path("/proc/locks").read_text("ascii").splitlines()
    except (OSError, ValueError):
        return False
    return any(" FLOCK " in line and f":{inode} " in line for line in lines)


def _seconds_since(text: object) -> float:
    try:
        return (datetime.now(UTC) - datetime.fromisoformat(str(text))).total_seconds()
    except (ValueError, TypeError):
        return 0.0
