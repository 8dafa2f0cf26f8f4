"""The numbers of a report, counted in one pass over an output: 32 bytes for each completion."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from batchgen.files import JsonObject
from batchgen.output.reading import read_batches, read_left_out, read_rows_at
from batchgen.output.rows import statuses_of
from batchgen.progress import read_status as read_values
from batchgen.progress import status_path
from batchgen.types import MAX_REASON, MEASURED, STATUSES, Reason, add_reasons

T = TypeVar("T")
Row: TypeAlias = dict[str, object]  # an output row, by column
Timeline = list[tuple[float, int, int]]

SHOWN_REJECTS = 50
SHOWN_SAMPLES = 20
SHOWN_EXTREMES = 5  # the shortest completions, the least likely, the most repeated
LOGPROBS = "logprobs"  # a column that an output may lack
COUNTED = (
    *("row", "sample", "id", "completion", "prompt_tokens", "completion_tokens", "finish_reason", "status", "error"),
    *(LOGPROBS, *MEASURED),
)
SAMPLED = ("row", "sample", "id", "prompt", "completion", "completion_tokens", "finish_reason")
_END = ("seconds", "rows_done", "completion_tokens")  # in the status file: the last point
_PLACE = re.compile(r"\A(.*?:(?:row )?\d+): ", re.DOTALL)  # p.jsonl:7, p.parquet:row 7


@dataclass(slots=True)
class Counts:
    """Counts of output rows; prompt_tokens and completion_tokens count rows by number of tokens."""

    statuses: Counter[str] = field(default_factory=Counter)
    finish_reasons: Counter[str] = field(default_factory=Counter)
    reasons: dict[str, Reason] = field(default_factory=dict)  # why rows were rejected or failed, by kind
    prompt_tokens: Counter[int] = field(default_factory=Counter)  # of ok rows' prompts, each counted once
    completion_tokens: Counter[int] = field(default_factory=Counter)  # of ok rows
    input_rows: int = 0
    repeated: int = 0  # completions that an earlier row has too
    mean_logprob: float | None = None  # of all tokens of ok rows, if the output has log-probabilities
    means: dict[str, float] = field(default_factory=dict)  # over the ok rows, of the columns of MEASURED that are there
    rejects: list[Row] = field(default_factory=list)  # the first ones
    left_out: int = 0  # output rows that the run left out; they count too
    last_row: int = -1  # that was counted
    samples: list[Row] = field(default_factory=list)  # some of the ok rows
    shortest: list[Row] = field(default_factory=list)
    least_likely: list[Row] = field(default_factory=list)  # by mean log-probability of a token
    most_repeated: list[tuple[int, Row]] = field(default_factory=list)  # how often, and the first such row

    @property
    def rows(self) -> int:
        return self.statuses.total()


def count_output(path: Path) -> Counts:
    """Count an output's rows, and pick rows to show. Raises InputError for a damaged file."""
    counts, rng = Counts(), np.random.default_rng(0)  # the draw of samples is the same every time
    drawn, shortest, least_likely = Smallest(SHOWN_SAMPLES), Smallest(SHOWN_EXTREMES), Smallest(SHOWN_EXTREMES)
    repeats, likelihood = _Repeats(), _Likelihood()
    measured: dict[str, list[npt.NDArray[np.float64]]] = {name: [] for name in MEASURED}
    start = 0
    for batch in read_batches(path, COUNTED):
        ok = count_rows(batch, counts)
        completed, positions = batch.take(ok), start + ok
        drawn.enter(rng.random(len(ok)), positions)
        shortest.enter(completed["completion_tokens"].fill_null(0).to_numpy(zero_copy_only=False), positions)
        repeats.enter(completed["completion"], positions)
        if LOGPROBS in batch.schema.names:
            least_likely.enter(likelihood.means(completed[LOGPROBS]), positions)
        for name in {*MEASURED} & {*batch.schema.names}:
            measured[name].append(completed[name].drop_null().to_numpy(zero_copy_only=False))
        start += len(batch)

    def rows_at(chosen: Smallest) -> list[Row]:
        return read_in_order(path, chosen.positions, SAMPLED)

    counts.samples = read_rows_at(path, sorted(drawn.positions.tolist()), SAMPLED)
    counts.shortest, counts.least_likely = rows_at(shortest), rows_at(least_likely)
    counts.repeated, often, first = repeats.result()
    counts.most_repeated = list(zip(often.tolist(), read_in_order(path, first, SAMPLED), strict=True))
    counts.mean_logprob = likelihood.mean
    found = {name: np.concatenate([np.zeros(0), *values]) for name, values in measured.items()}
    counts.means = {name: float(values.mean()) for name, values in found.items() if len(values)}
    count_left_out(path, counts)
    return counts


def read_in_order(path: Path, positions: npt.NDArray[np.int64], columns: Sequence[str]) -> list[Row]:
    """The rows at some positions, in the order of the positions given."""
    ascending = sorted(positions.tolist())
    rows = dict(zip(ascending, read_rows_at(path, ascending, columns), strict=True))
    return [rows[position] for position in positions.tolist()]


class Smallest:
    """The positions of the n smallest keys that enter, smallest first, the first of equal ones first."""

    def __init__(self, n: int) -> None:
        self._n = n
        self.positions, self._keys = np.zeros(0, np.int64), np.zeros(0)

    def enter(self, keys: npt.NDArray[np.float64], positions: npt.NDArray[np.int64]) -> None:
        keys = np.concatenate([self._keys, keys])
        best = np.argsort(keys, kind="stable")[: self._n]
        self.positions, self._keys = np.concatenate([self.positions, positions])[best], keys[best]


class _Repeats:
    """Finds equal completions by their hashes."""

    def __init__(self) -> None:
        self._hashes: list[npt.NDArray[np.int64]] = []
        self._positions: list[npt.NDArray[np.int64]] = []

    def enter(self, completions: pa.Array, positions: npt.NDArray[np.int64]) -> None:
        self._hashes.append(np.fromiter(map(hash, completions.to_pylist()), np.int64, len(completions)))
        self._positions.append(positions)

    def result(self) -> tuple[int, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """How many completions are repetitions; of the most repeated: how often each is there, and where first."""
        hashes = np.concatenate([np.zeros(0, np.int64), *self._hashes])
        positions = np.concatenate([np.zeros(0, np.int64), *self._positions])
        _, first, often = np.unique(hashes, return_index=True, return_counts=True)
        most = [i for i in np.lexsort((first, -often))[:SHOWN_EXTREMES] if often[i] > 1]
        return len(hashes) - len(often), often[most], positions[first[most]]


class _Likelihood:
    """Mean log-probabilities of tokens: of each completion, and of all."""

    def __init__(self) -> None:
        self._sum, self._tokens = 0.0, 0

    @property
    def mean(self) -> float | None:
        return self._sum / self._tokens if self._tokens else None

    def means(self, logprobs: pa.Array) -> npt.NDArray[np.float64]:
        """[n_rows] from a list of each token's; infinity for a row without, so that it is never among the smallest."""
        lengths = pc.list_value_length(logprobs).fill_null(0).to_numpy(zero_copy_only=False)
        values = pc.list_flatten(logprobs).to_numpy(zero_copy_only=False).astype(np.float64)
        self._sum, self._tokens = self._sum + float(values.sum()), self._tokens + len(values)
        sums = np.bincount(np.repeat(np.arange(len(lengths)), lengths), values, len(lengths))
        return np.where(lengths > 0, sums / np.maximum(lengths, 1), np.inf)


def count_rows(batch: pa.RecordBatch, counts: Counts) -> npt.NDArray[np.int64]:
    """Add a record batch to the counts; returns the positions of its ok rows. Scores lack columns of completions."""
    numbers = batch["row"].to_numpy()
    first = pa.array(np.diff(numbers, prepend=counts.last_row) != 0)
    ok = pc.fill_null(pc.equal(batch["status"], "ok"), False)
    counts.input_rows += pc.sum(first).as_py() or 0
    counts.last_row = int(numbers[-1]) if len(numbers) else counts.last_row
    _tally(counts.statuses, batch["status"])
    if "prompt_tokens" in batch.schema.names:
        _tally(counts.prompt_tokens, batch["prompt_tokens"].filter(pc.and_(ok, first)))
    if "completion_tokens" in batch.schema.names:
        _tally(counts.finish_reasons, batch["finish_reason"].filter(ok))
        _tally(counts.completion_tokens, batch["completion_tokens"].filter(ok))
    unmade = pc.invert(pc.is_in(batch["status"], pa.array(["ok", "dropped"])))  # what is dropped was asked for
    if pc.any(unmade).as_py():
        _count_rejects(batch.filter(unmade), counts)
    return np.flatnonzero(ok.to_numpy(zero_copy_only=False))


def count_left_out(path: Path, counts: Counts) -> None:
    """Add the rows that are not in the output because they are rejected or dropped."""
    left_out = read_left_out(path)
    counts.input_rows += left_out["rows"]
    counts.statuses += statuses_of(left_out)
    counts.left_out = statuses_of(left_out).total()


def _count_rejects(batch: pa.RecordBatch, counts: Counts) -> None:
    for row in batch.select(["row", "error"]).to_pylist():
        error = row["error"] or "no reason is given"
        place = _PLACE.match(error)
        text = error[place.end() if place else 0 :][:MAX_REASON]
        add_reasons(counts.reasons, [Reason(1, row["row"], place[1] if place else f"row {row['row']}", text)])
    room = SHOWN_REJECTS - len(counts.rejects)
    counts.rejects += batch.slice(0, room).to_pylist()


def _tally(counter: Counter[T], values: pa.Array) -> None:
    for pair in values.drop_null().value_counts():
        counter[pair["values"].as_py()] += pair["counts"].as_py()


def percentile(counter: Counter[int], percent: float) -> int:
    """The smallest number that at least so many percent of what was counted do not exceed."""
    numbers = sorted(counter)
    below = np.cumsum([counter[number] for number in numbers])
    return numbers[int(np.searchsorted(below, percent / 100 * below[-1]))]


# ---- the status file


@dataclass(frozen=True, slots=True)
class RunStatus:
    """What the status file beside an output says of the run: of its last part, if it was interrupted and resumed."""

    timeline: Timeline | None = None  # [seconds since the start, rows, completion tokens] so far
    resumed: int = 0  # input rows that earlier parts of the run had done
    input: tuple[str, ...] = ()
    started: str = ""
    host: str = ""


def read_status(path: Path, counts: Counts) -> RunStatus:
    """Read the status file; what it lacks, or all of it if its counts are not those of this output, is absent."""
    status = read_values(status_path(path))
    if any(status.get(name, counts.statuses[name]) != counts.statuses[name] for name in STATUSES):
        return RunStatus()
    files = status.get("input", [])
    resumed = status.get("rows_resumed", 0)
    return RunStatus(
        _timeline(status),
        resumed if isinstance(resumed, int) and 0 <= resumed <= counts.input_rows else 0,
        tuple(str(file) for file in files) if isinstance(files, list) else (),
        *(str(status.get(name, "")) for name in ("started", "host")),
    )


def _timeline(status: JsonObject) -> Timeline | None:
    """The timeline and the end of the run; None if it is not one."""
    try:
        end = [[status[key] for key in _END]] if all(key in status for key in _END) else []
        points = [(float(seconds), int(rows), int(tokens)) for seconds, rows, tokens in [*status["timeline"], *end]]
    except (ValueError, KeyError, TypeError, OverflowError):
        return None
    limit = 2**53
    rising = all(a[0] <= b[0] and a[2] <= b[2] for a, b in pairwise(points))
    sane = all(0 <= seconds < limit and 0 <= tokens < limit for seconds, _, tokens in points)
    return points if sane and rising and len(points) > 1 and points[-1][0] > points[0][0] else None
