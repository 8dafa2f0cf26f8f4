"""The numbers of a report, counted in one pass over an output: memory does not grow with its rows."""

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from batchgen.files import STATUS_SUFFIX
from batchgen.output.reading import read_batches, read_rows_at

T = TypeVar("T")
Row: TypeAlias = dict[str, object]  # an output row, by column
Timeline = list[tuple[float, int, int]]

SHOWN_REJECTS = 50
SHOWN_SAMPLES = 20
COUNTED = ("row", "sample", "id", "prompt_tokens", "completion_tokens", "finish_reason", "status", "error")
SAMPLED = ("row", "sample", "id", "prompt", "completion", "finish_reason")
OTHER = "other reasons"
_MOST_REASONS = 1_000  # counted apart; another program's file may have one for every row
_LONGEST_REASON = 200
_END = ("seconds", "rows_done", "completion_tokens")  # in the status file: the last point
_PLACE = re.compile(r"\A.*?:(?:row )?\d+: ", re.DOTALL)  # p.jsonl:7, p.parquet:row 7
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_QUOTED = re.compile(r"'[^']{20,}'")


@dataclass(slots=True)
class Counts:
    """Counts of output rows; prompt_tokens and completion_tokens count rows by number of tokens."""

    statuses: Counter[str] = field(default_factory=Counter)
    finish_reasons: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)  # why rows were rejected or failed
    prompt_tokens: Counter[int] = field(default_factory=Counter)  # of ok rows' prompts, each counted once
    completion_tokens: Counter[int] = field(default_factory=Counter)  # of ok rows
    input_rows: int = 0
    rejects: list[Row] = field(default_factory=list)  # the first ones
    samples: list[Row] = field(default_factory=list)  # some of the ok rows

    @property
    def rows(self) -> int:
        return self.statuses.total()


def count_output(path: Path) -> Counts:
    """Count an output's rows, and pick rejects and samples to show. Raises InputError for a damaged file."""
    counts, lottery = Counts(), _Lottery(SHOWN_SAMPLES)
    start = 0
    for batch in read_batches(path, COUNTED):
        lottery.enter(start + _count(batch, counts))
        start += len(batch)
    counts.samples = read_rows_at(path, sorted(lottery.drawn.tolist()), SAMPLED)
    return counts


class _Lottery:
    """Draws n of the positions that enter, each with the same chance; the draw is the same every time."""

    def __init__(self, n: int) -> None:
        self._n, self._rng = n, np.random.default_rng(0)
        self.drawn, self._keys = np.zeros(0, np.int64), np.zeros(0)

    def enter(self, positions: npt.NDArray[np.int64]) -> None:
        keys = np.concatenate([self._keys, self._rng.random(len(positions))])
        best = np.argsort(keys)[: self._n]
        self.drawn, self._keys = np.concatenate([self.drawn, positions])[best], keys[best]


def _count(batch: pa.RecordBatch, counts: Counts) -> npt.NDArray[np.int64]:
    """Add a record batch to the counts; returns the positions of its ok rows."""
    first = pc.fill_null(pc.equal(batch["sample"], 0), False)
    ok = pc.fill_null(pc.equal(batch["status"], "ok"), False)
    counts.input_rows += pc.sum(first).as_py() or 0
    _tally(counts.statuses, batch["status"])
    _tally(counts.finish_reasons, batch["finish_reason"].filter(ok))
    _tally(counts.prompt_tokens, batch["prompt_tokens"].filter(pc.and_(ok, first)))
    _tally(counts.completion_tokens, batch["completion_tokens"].filter(ok))
    if not pc.all(ok).as_py():
        _count_rejects(batch.filter(pc.invert(ok)), counts)
    return np.flatnonzero(ok.to_numpy(zero_copy_only=False))


def _count_rejects(batch: pa.RecordBatch, counts: Counts) -> None:
    for error in batch["error"].to_pylist():
        reason = reason_of(error or "no reason is given")
        counts.reasons[reason if reason in counts.reasons or len(counts.reasons) < _MOST_REASONS else OTHER] += 1
    room = SHOWN_REJECTS - len(counts.rejects)
    counts.rejects += batch.slice(0, room).to_pylist()


def _tally(counter: Counter[T], values: pa.Array) -> None:
    for pair in values.drop_null().value_counts():
        counter[pair["values"].as_py()] += pair["counts"].as_py()


def reason_of(error: str) -> str:
    """The kind of an error: its text without the place, numbers, long quotations and the remedy.

    "p.jsonl:7: 200 prompt tokens + 12 max_tokens exceed n_ctx 128; lower max_tokens" ->
    "N prompt tokens + N max_tokens exceed n_ctx N"
    """
    reason = _PLACE.sub("", error[: 4 * _LONGEST_REASON], count=1).split(";")[0]
    return _NUMBER.sub("N", _QUOTED.sub("'...'", reason))[:_LONGEST_REASON]


def read_timeline(path: Path, counts: Counts) -> Timeline | None:
    """[seconds since the start, rows, completion tokens] so far, from the status file beside the output.

    None if there is no such file, if it has no timeline, or if its counts are not those of this output.
    """
    try:
        status = json.loads(path.with_name(path.name + STATUS_SUFFIX).read_bytes())
        end = [tuple(status[key] for key in _END)] if all(key in status for key in _END) else []
        points = [(float(seconds), int(rows), int(tokens)) for seconds, rows, tokens in [*status["timeline"], *end]]
    except (OSError, ValueError, RecursionError, KeyError, TypeError, OverflowError):
        return None
    if any(status.get(name, counts.statuses[name]) != counts.statuses[name] for name in ("ok", "rejected", "failed")):
        return None
    limit = 2**53
    rising = all(a[0] <= b[0] and a[2] <= b[2] for a, b in pairwise(points))
    sane = all(0 <= seconds < limit and 0 <= tokens < limit for seconds, _, tokens in points)
    return points if sane and rising and len(points) > 1 and points[-1][0] > points[0][0] else None
