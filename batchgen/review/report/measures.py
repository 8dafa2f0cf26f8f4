"""The numbers of a report on scores or embeddings, counted in one pass: totals, a measure of each row, rows to show."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from batchgen.output.reading import read_batches, read_rows_at
from batchgen.plan import Plan
from batchgen.progress import perplexity
from batchgen.review.report.counts import (
    SHOWN_SAMPLES,
    Counts,
    Row,
    Smallest,
    count_left_out,
    count_rows,
    read_in_order,
)
from batchgen.types import Kind

Doubles: TypeAlias = npt.NDArray[np.float64]
SHOWN_ENDS = 10  # rows with the lowest measure, and with the highest
SHOWN_CHOICES = 20
_ROW = ("row", "sample", "id", "status", "error", "prompt_tokens")
_BEST = {"accuracy": "best", "accuracy by token": "best_by_token", "accuracy by byte": "best_by_byte"}


@dataclass(frozen=True, slots=True)
class Measure:
    """What the rows of an output are ordered by: `of` makes it of the columns, [n_rows], NaN for a row without."""

    name: str
    low: str  # the rows with the lowest, as a heading
    high: str
    columns: tuple[str, ...]  # what is read for it, and shown
    of: Callable[[pa.RecordBatch], Doubles]


@dataclass(slots=True)
class Measured:
    """What an output holds; completion_tokens of its counts are the scored ones."""

    measure: Measure
    counts: Counts = field(default_factory=Counts)
    totals: dict[str, str] = field(default_factory=dict)
    values: Doubles = field(default_factory=lambda: np.zeros(0))  # the measure of ok rows that have one
    lowest: list[Row] = field(default_factory=list)
    highest: list[Row] = field(default_factory=list)


def measure_output(path: Path, plan: Plan) -> Measured:
    """Count an output's rows, measure the ok ones, and pick rows to show. Raises InputError for a damaged file."""
    measure = MEASURES[plan.kind]
    measured, rng = Measured(measure), np.random.default_rng(0)  # the draw of samples is the same every time
    drawn, lowest, highest = Smallest(SHOWN_SAMPLES), Smallest(SHOWN_ENDS), Smallest(SHOWN_ENDS)
    sums: Counter[str] = Counter()
    values, start = [measured.values], 0
    for batch in read_batches(path, (*_ROW, *measure.columns)):
        ok = count_rows(batch, measured.counts)
        rows, positions = batch.take(ok), start + ok
        measured.counts.completion_tokens.update(_scored_tokens(rows))
        found = measure.of(rows)
        has_one = np.isfinite(found)
        values.append(found[has_one])
        lowest.enter(found[has_one], positions[has_one])
        highest.enter(-found[has_one], positions[has_one])
        drawn.enter(rng.random(len(ok)), positions)
        _add(sums, rows)
        start += len(batch)
    count_left_out(path, measured.counts)
    measured.values = np.concatenate(values)
    measured.totals = dict(_totals(sums))
    shown = (*_ROW, "text" if plan.text_column else "prompt", *measure.columns)
    measured.counts.samples = read_rows_at(path, sorted(drawn.positions.tolist()), shown)
    measured.lowest = read_in_order(path, lowest.positions, shown)
    measured.highest = read_in_order(path, highest.positions, shown)
    return measured


# ---- totals


def _scored_tokens(rows: pa.RecordBatch) -> list[int]:
    """Of each row: of its text or completion, or of all its choices; none of an embedding."""
    if "choice_tokens" in rows.schema.names:
        return [sum(tokens or ()) for tokens in rows["choice_tokens"].to_pylist()]
    return rows["tokens"].drop_null().to_pylist() if "tokens" in rows.schema.names else []


def _add(sums: Counter[str], rows: pa.RecordBatch) -> None:
    """Add what the totals are made of."""
    names = rows.schema.names
    for name in {"nats", "bytes", "logprob", "tokens", "greedy"} & {*names}:
        sums[name] += pc.sum(rows[name]).as_py() or 0
    sums["rows"] += len(rows)
    if "answer" in names:
        sums["answers"] += len(rows) - rows["answer"].null_count
        for name, best in _BEST.items():
            sums[name] += pc.sum(pc.equal(rows[best], rows["answer"])).as_py() or 0


def _totals(sums: Counter[str]) -> Iterator[tuple[str, str]]:
    """Numbers about all ok rows, by name."""
    if sums["tokens"]:
        nats = sums["nats"] - sums["logprob"]
        yield "perplexity", f"{perplexity(nats, sums['tokens']):,.2f}"
    if sums["bytes"]:
        yield "bits per byte", f"{sums['nats'] / math.log(2) / sums['bytes']:,.4f}"
    if "greedy" in sums and sums["rows"]:
        yield "wholly greedy", f"{100 * sums['greedy'] / sums['rows']:.1f} %"
    if sums["answers"]:
        for name in _BEST:
            yield name, f"{100 * sums[name] / sums['answers']:.1f} %"


# ---- measures


def _doubles(column: pa.Array) -> Doubles:
    """NaN for null."""
    return np.asarray(column.cast(pa.float64()).to_numpy(zero_copy_only=False), np.float64)


def _per_token(rows: pa.RecordBatch) -> Doubles:
    tokens = _doubles(rows["tokens"])
    return _doubles(rows["logprob"]) / np.where(tokens > 0, tokens, np.nan)


def _certainty(rows: pa.RecordBatch) -> Doubles:
    """The probability of the best choice, if one of the choices is what follows."""
    return np.array([_share_of_best(values or []) for values in rows["logprobs"].to_pylist()], np.float64)


def _share_of_best(logprobs: list[float]) -> float:
    """[-1, -1] -> 0.5"""
    values = np.array(logprobs, np.float64)
    return float(1 / np.exp(values - values.max()).sum()) if len(values) and np.isfinite(values).all() else math.nan


def _norms(rows: pa.RecordBatch) -> Doubles:
    lengths = pc.list_value_length(rows["embedding"]).fill_null(0).to_numpy(zero_copy_only=False)
    values = _doubles(pc.list_flatten(rows["embedding"]))
    squares = np.bincount(np.repeat(np.arange(len(lengths)), lengths), values**2, len(lengths))
    return np.where(lengths > 0, np.sqrt(squares), np.nan)


_BITS = ("tokens", "bytes", "nats", "bits_per_byte", "perplexity")
_CHOICES = ("choices", "choice_tokens", "logprobs", "answer", *_BEST.values())
MEASURES: dict[Kind, Measure] = {
    "text": Measure(
        "Bits per byte",
        "The texts with the fewest bits per byte",
        "The texts with the most",
        _BITS,
        lambda rows: _doubles(rows["bits_per_byte"]),
    ),
    "completion": Measure(
        "Log-probability of a token, mean of a row",
        "The least likely completions",
        "The likeliest completions",
        ("completion", "tokens", "logprob", "greedy"),
        _per_token,
    ),
    "choices": Measure(
        "Probability of the best choice, among the choices",
        "The least certain choices",
        "The most certain choices",
        _CHOICES,
        _certainty,
    ),
    "embed": Measure("Norm of a vector", "The shortest vectors", "The longest vectors", ("embedding",), _norms),
}


def describe(row: Row) -> str:
    """The scores of a row in words."""
    words = [f"row {row['row']}"]
    if row.get("tokens") is not None:
        words.append(f"{row['tokens']} tokens")
    for name in ("logprob", "bits_per_byte", "perplexity"):
        if isinstance(value := row.get(name), float):
            words.append(f"{name.replace('_', ' ')} {value:,.4g}")
    if row.get("greedy"):
        words.append("greedy")
    if isinstance(vector := row.get("embedding"), list):
        words.append(f"norm {np.linalg.norm(np.array(vector, np.float64)):,.4g}")
    if isinstance(logprobs := row.get("logprobs"), list):
        words.append("logprobs " + ", ".join(f"{value:,.4g}" for value in logprobs[:SHOWN_CHOICES]))
        words.append(f"best {row.get('best')}")
    if row.get("answer") is not None:
        words.append(f"right {row['answer']}")
    return ", ".join(words)
