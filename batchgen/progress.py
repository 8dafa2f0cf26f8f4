"""How far a run is, for people and for machines: progress, the status file beside the output, and the summary.

completions.parquet.status.json is one JSON object, replaced as a whole about every second. At the end it has the state
in which the run ended; if it says `running` and is older than a few seconds, the run was killed.
"""

import errno
import json
import logging
import math
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from batchgen.files import STATUS_SUFFIX, JsonObject, read_object, replace_file
from batchgen.limits import reached_limit
from batchgen.types import STATUSES, Kind, Reason, RowParameters, Task, task_of

logger = logging.getLogger(__name__)

State = Literal["running", "finished", "stopped", "failed"]

LOOK_SECONDS = 0.25  # between two looks at the workers
INTERVAL_SECONDS = 1.0  # between two writings of the status file
DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)  # reported by the run itself
MAX_POINTS = 200  # of the timeline
MAX_EXPONENT = 709  # of math.exp


@dataclass(frozen=True, slots=True)
class WorkerState:
    """One worker: its chunk (None: idle), the rows of it that are done, the samples in flight."""

    pid: int
    chunk: int | None
    rows: int
    in_flight: int


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is: rows of the input in all, tokens and seconds of this attempt alone."""

    rows: int
    rows_in_all: int
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    resumed_rows: int = 0  # of rows, those of earlier attempts
    workers: tuple[WorkerState, ...] = ()
    eta_seconds: float | None = None  # left, at this attempt's pace; see workers/outlook.py
    task: Task = "generate"

    @property
    def tokens(self) -> int:
        """What speed is measured in."""
        return tokens_of(self.task, self.prompt_tokens, self.completion_tokens)


def tokens_of(task: Task, prompt_tokens: int, completion_tokens: int) -> int:
    """The tokens of a run that its speed counts: the generated ones; all that are read, if none are generated."""
    return completion_tokens + (prompt_tokens if task != "generate" else 0)


@dataclass(frozen=True, slots=True)
class Scores:
    """What the scores of all rows come to, in all attempts."""

    kind: Kind
    rows: int  # that are ok
    tokens: int
    nats: float = 0.0  # of texts and completions
    bytes: int = 0  # of texts, in UTF-8
    greedy: int = 0  # completions of which every token was the likeliest
    answered: int = 0  # rows with choices of which the input names the right one, and those of them that chose it
    right: int = 0
    right_by_token: int = 0
    right_by_byte: int = 0

    @classmethod
    def of(cls, kind: Kind, counts: Counter[str]) -> "Scores":
        """Of a ledger's counts."""
        same = ("greedy", "answered", "right", "right_by_token", "right_by_byte")
        return cls(
            kind=kind,
            rows=counts["ok"],
            tokens=counts["completion_tokens"],
            nats=counts["nanonats"] / 1e9,
            bytes=counts["scored_bytes"],
            **{name: counts[name] for name in same},
        )

    def measures(self) -> dict[str, float]:
        """By name, what people compare; without those that there is nothing for."""
        found: dict[str, float] = {}
        if self.kind == "text" and self.tokens:
            found["nats"] = self.nats
            found["perplexity"] = perplexity(self.nats, self.tokens)
        if self.kind == "text" and self.bytes:
            found["bits_per_byte"] = self.nats / math.log(2) / self.bytes
        if self.kind == "completion" and self.rows:
            found |= {"logprob": -self.nats, "mean_logprob": -self.nats / self.rows, "greedy": self.greedy / self.rows}
        if self.answered:
            right = {"accuracy": self.right, "by_token": self.right_by_token, "by_byte": self.right_by_byte}
            found |= {
                name if name == "accuracy" else f"accuracy_{name}": n / self.answered for name, n in right.items()
            }
        return found


def perplexity(nats: float, tokens: int) -> float:
    """By token; infinite where a number of 64 bits ends."""
    return math.exp(nats / tokens) if nats / tokens < MAX_EXPONENT else math.inf


OnProgress = Callable[[Progress], None]
Observer = Callable[[Mapping[str, object]], None]  # called with the values of each status


@dataclass(frozen=True, slots=True)
class Summary:
    """The outcome of a finished run; counts are of output rows, tokens and seconds of this attempt alone."""

    output: Path | str  # a str is an address
    input_rows: int
    ok: int
    rejected: int
    failed: int
    resumed: int  # output rows of earlier attempts
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    jobs: int
    precision: str
    space_ends: int = 0  # input rows whose prompt ends in a space
    special_texts: int = 0  # and whose prompt holds a special token, read as text
    reasons: tuple[Reason, ...] = ()  # why input rows are rejected or failed, most frequent first
    row_parameters: RowParameters = field(default_factory=RowParameters)
    complete: bool = False  # the output was complete before this run, which has changed nothing
    task: Task = "generate"
    scores: Scores | None = None  # of a run that scored all rows of the output
    dropped: int = 0
    has_rejects: bool = True  # the output has the rejected and dropped rows too
    reuses: bool = False  # older outputs were named, and of so many input rows
    reused: int = 0  # all samples are copied from them,
    extended: int = 0  # or some are, or were continued
    anew: int = 0  # nothing of them is copied, and they were generated

    @classmethod
    def of_complete(cls, output: Path | str, input_rows: int, statuses: Counter[str]) -> "Summary":
        """Of a run that had nothing to do."""
        counts = {status: statuses[status] for status in STATUSES}
        work = {"prompt_tokens": 0, "completion_tokens": 0, "seconds": 0.0, "jobs": 0, "precision": ""}
        return cls(output, input_rows, **counts, resumed=statuses.total(), **work, complete=True)  # type: ignore[arg-type]

    @property
    def tokens(self) -> int:
        """What speed is measured in."""
        return tokens_of(self.task, self.prompt_tokens, self.completion_tokens)

    @property
    def rows(self) -> int:
        return self.ok + self.rejected + self.failed + self.dropped

    @property
    def statuses(self) -> dict[str, int]:
        return {status: getattr(self, status) for status in STATUSES}

    @property
    def left_out(self) -> int:
        """Output rows that are counted and not in the output."""
        return 0 if self.has_rejects else self.rejected + self.dropped

    @property
    def exit_code(self) -> int:
        """0: every row is ok, or dropped, as was asked for; 3: some are not; 4: there are rows, and none is ok."""
        if self.rows == self.ok + self.dropped:
            return 0
        return 3 if self.ok else 4


# ---- the status file


def status_path(out: Path) -> Path:
    return out.with_name(out.name + STATUS_SUFFIX)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _replace_status(path: Path, values: Mapping[str, object]) -> None:
    lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in values.items())
    replace_file(path, f"{{\n{lines}\n}}\n".encode(), durable=False)


def read_status(path: Path) -> JsonObject:
    """What a status file says; nothing if it is missing or damaged."""
    try:
        return read_object(path.read_bytes() if path.is_file() else None)
    except OSError:
        return {}


def correct_status(path: Path, **values: object) -> None:
    """Change what an earlier run's status file says, for a run that has nothing to watch."""
    if old := read_status(path):
        with suppress(OSError):
            _replace_status(path, old | values | {"eta_seconds": None, "updated": _now()})


@dataclass(slots=True)
class StatusFile:
    """Writes one run's status. If it cannot be written, that is logged once, and the next writing is tried again.

    Its observers get the same values, also if there is no such file.
    """

    path: Path | None  # None: nowhere
    output: str
    input: tuple[str, ...] = ()  # as it was named
    reasons: Mapping[str, Reason] = field(default_factory=dict)  # the ledger's, which grows
    started: str = field(default_factory=_now)
    scores: dict[str, object] = field(default_factory=dict)  # known at the end
    timeline: list[tuple[float, int, int]] = field(default_factory=list)  # seconds, rows, Progress.tokens
    observers: tuple[Observer, ...] = ()
    _step: float = INTERVAL_SECONDS  # between the timeline's points
    _written: float = float("-inf")
    _has_failed: bool = False
    _last: Progress = Progress(0, 0, 0, 0, 0.0)

    def update(self, now: Progress, counts: Counter[str]) -> None:
        """Record how far the run is, and write it if the interval has passed."""
        self._last = now
        if not self.timeline or now.seconds - self.timeline[-1][0] >= self._step:
            self.timeline.append((round(now.seconds, 3), now.rows, now.tokens))
        if len(self.timeline) > MAX_POINTS:
            self.timeline, self._step = self.timeline[::2], 2 * self._step
        if time.monotonic() - self._written >= INTERVAL_SECONDS:
            self.write("running", counts)

    def write(self, state: State, counts: Counter[str], exit_code: int | None = None, error: str | None = None) -> None:
        values = {"state": state, "exit_code": exit_code, "error": error, **self._values(state, counts), **self.scores}
        self._written = time.monotonic()
        for observer in self.observers:
            observer(values)
        if self.path is None:
            return
        try:
            _replace_status(self.path, values)
        except OSError as reason:
            level = logging.INFO if reason.errno in DISK_TROUBLE else logging.WARNING
            if not self._has_failed:
                logger.log(level, "%s: the status cannot be written: %s", self.path, reason.strerror or reason)
            self._has_failed = True

    def _values(self, state: State, counts: Counter[str]) -> dict[str, object]:
        now = self._last
        eta = now.eta_seconds if state == "running" else None
        return {
            "input": self.input,
            "output": self.output,
            "rows_done": now.rows,
            "rows": now.rows_in_all,
            "rows_resumed": now.resumed_rows,
            **{status: counts[status] for status in STATUSES},
            "reasons": [{"rows": one.rows, "first": one.place, "reason": one.text} for one in sort(self.reasons)],
            **({"task": now.task} if now.task != "generate" else {}),
            **{name: counts[name] for name in ("reused", "extended") if counts[name]},
            "prompt_tokens": now.prompt_tokens,
            "completion_tokens": now.completion_tokens,
            "seconds": round(now.seconds, 3),
            "tokens_per_second": round(now.tokens / now.seconds, 1) if now.seconds else 0.0,
            "eta_seconds": None if eta is None else round(eta, 1),
            "started": self.started,
            "updated": _now(),
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "timeline": self.timeline,
        }


def sort(reasons: Mapping[str, Reason]) -> tuple[Reason, ...]:
    """Most frequent first, then in the order of the input."""
    return tuple(sorted(list(reasons.values()), key=lambda reason: (-reason.rows, reason.row)))


SIGNALS = {129: "hung up", 130: "interrupted", 143: "terminated"}  # by exit code: 128 + the signal's number
watched: "list[Reporter]" = []  # the run of this process, until the next
to_follow: dict[str, str] = {}  # outputs after which the command has more to write, and what a stop leaves of one


def outcome() -> "Summary | None":
    """The summary of the run of this process, once its output is complete: a signal no longer changes how it ended."""
    done = watched[-1].outcome if watched else None
    return None if done is None or str(done.output) in to_follow else done


def words_of_stop(code: int) -> str:
    """The line of a command that ends by a signal, and how many rows are kept if it is a run."""
    if complete := outcome():
        return f"{SIGNALS[code]}: the output is complete: {complete.output}"
    if watched and watched[-1].is_retry:
        return f"{SIGNALS[code]}: the output is as it was; run the same command again, which begins the retry anew"
    if watched and (left := to_follow.get(watched[-1].status.output)):
        return f"{SIGNALS[code]}: {left}"
    kept = f": {watched[-1].kept}" if watched else ""
    return f"{SIGNALS[code]}{kept}; run the same command again to resume"


def words_of(error: BaseException) -> str:
    """The line of a command that ends with this exception."""
    if limit := reached_limit(error):
        return limit
    if (code := exit_code_of(error)) in SIGNALS:
        return words_of_stop(code)
    return str(error) or type(error).__name__


def exit_code_of(error: BaseException) -> int:
    """The exit code of a command that ends with this exception."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    return 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)


def state_of(error: BaseException) -> State:
    """The state in which this exception leaves a run."""
    return "stopped" if exit_code_of(error) in (75, *SIGNALS) else "failed"


# ---- reporting


@dataclass(slots=True)
class Reporter:
    """Looks at a run from a thread and hands what it sees to the status file and to on_progress."""

    look: Callable[[float], Progress]  # after so many seconds of the attempt
    counts: Counter[str]  # the ledger's, of what is committed
    resumed: Counter[str]  # of counts, those of earlier attempts
    status: StatusFile
    on_progress: OnProgress | None = None
    row_parameters: RowParameters = field(default_factory=RowParameters)
    is_retry: bool = False  # which is never resumed
    kind: Kind = "generate"
    is_published: Callable[[], bool] = lambda: False  # whether the output is complete
    merged: Counter[str] = field(default_factory=Counter)  # the ledger's: output rows of a merged file, by status
    has_rejects: bool = True  # see Summary
    reuses: bool = False  # older outputs were named
    started: float = field(default_factory=time.monotonic)
    _last: Progress | None = None
    _summary: Summary | None = None

    @property
    def outcome(self) -> Summary | None:
        """The summary, once the output is complete; rows may have been dropped when they were merged."""
        if self._summary is None or not self.is_published():
            return None
        final = {status: self.merged[status] for status in STATUSES} if self.merged else {}
        return replace(self._summary, **final)  # type: ignore[arg-type]

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def kept(self) -> str:
        """What a run that ends now leaves for the next."""
        rows = f" of {self._last.rows_in_all:,}" if self._last else ""
        return f"{self.counts['input_rows']:,}{rows} rows are kept"

    def summarise(
        self, output: Path | str, input_rows: int, staying: Counter[str], jobs: int, precision: str
    ) -> Summary:
        """The summary, when all is committed; `staying` counts by status the output rows that a retry leaves."""
        counts, resumed = self.counts, self.resumed
        is_scored = task_of(self.kind) == "score" and not self.is_retry  # a retry does not read the rows that stay
        scores = Scores.of(self.kind, counts) if is_scored else None
        not_anew = sum(counts[name] for name in ("reused", "extended", "rejected", "failed", "dropped"))
        self.status.scores = {"scores": scores.measures()} if scores else {}
        self._summary = Summary(
            output=output,
            input_rows=input_rows,
            ok=counts["ok"] + staying["ok"],
            rejected=counts["rejected"] + staying["rejected"],
            failed=counts["failed"],
            dropped=counts["dropped"] + staying["dropped"],
            has_rejects=self.has_rejects,
            resumed=resumed["rows"] + staying["ok"] + staying["rejected"] + staying["dropped"],
            prompt_tokens=counts["prompt_tokens"] - resumed["prompt_tokens"],
            completion_tokens=counts["completion_tokens"] - resumed["completion_tokens"],
            seconds=self.seconds,
            jobs=jobs,
            precision=precision,
            space_ends=counts["space_ends"],
            special_texts=counts["special_texts"],
            reasons=sort(self.status.reasons),
            row_parameters=self.row_parameters,
            task=task_of(self.kind),
            scores=scores,
            reuses=self.reuses and not self.is_retry,  # of which most rows are neither copied nor generated
            reused=counts["reused"],
            extended=counts["extended"],
            anew=max(input_rows - not_anew, 0),
        )
        return self._summary

    def finish(self, error: BaseException | None) -> None:
        """Record in the status file how the run ended: with this error, which is no signal after its output."""
        if (done := self.outcome) and not isinstance(error, Exception):
            self.status.scores |= {"left_out": done.left_out} if done.left_out else {}
            self.status.write("finished", Counter(done.statuses), done.exit_code)
        elif error:
            self.status.write(state_of(error), self.counts, exit_code_of(error), words_of(error))

    def report(self, *, is_last: bool = False) -> None:
        """Look once. An exception in on_progress is logged, and it is not called again: the run goes on."""
        now = self.look(self.seconds)
        if (last := self._last) and not is_last:  # in the end exact counts win: a step counts more than rows get
            # A worker that has begun its next chunk no longer counts the one that is about to be committed.
            counted = ("rows", "prompt_tokens", "completion_tokens")
            now = replace(now, **{name: max(getattr(now, name), getattr(last, name)) for name in counted})
        self._last = now
        self.status.update(now, self.counts)
        if self.on_progress is None:
            return
        try:
            self.on_progress(now)
        except Exception as error:
            logger.warning("progress is no longer shown: %r", error)
            self.on_progress = None

    def watch(self, over: threading.Event) -> None:
        """Report every LOOK_SECONDS until `over` is set."""
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # so that it waits while the main thread blocks it
        while not over.wait(LOOK_SECONDS):
            self.report()


@contextmanager
def reporting(reporter: Reporter) -> Iterator[Reporter]:
    """Report while the block runs and once at its end; if it ends badly, the status file has the error."""
    over = threading.Event()
    watcher = threading.Thread(target=reporter.watch, args=(over,), daemon=True)
    watched[:] = [reporter]
    try:
        watcher.start()
        try:
            yield reporter
        finally:
            over.set()
            watcher.join()
            reporter.report(is_last=True)
        reporter.finish(None)
    except BaseException as error:
        reporter.finish(error)
        raise
