"""Two outputs beside each other on one page: what was asked for, what came out, and the rows that differ."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from batchgen.output.reading import read_batches, read_plan
from batchgen.plan import Plan
from batchgen.review.report.counts import Counts, Row, count_output, percentile, read_status
from batchgen.review.report.markup import Markup, element, visible
from batchgen.review.report.measures import MEASURES, Doubles, Measure, measure_output
from batchgen.review.report.page import (
    MOST_ERROR,
    WORDS,
    Words,
    check_page,
    document,
    measured_sample,
    origin,
    sample,
    short,
    value_text,
    write_page,
)
from batchgen.types import STATUSES

SHOWN_DIFFERENCES = 10
_ROW = ("row", "sample", "id", "status")
_COMPLETION = ("prompt", "completion", "completion_tokens", "finish_reason")


@dataclass(slots=True)
class Common:
    """The rows that two outputs both have, by row and sample."""

    rows: int = 0
    equal: int = 0  # of rows, those with the same status and completion, or scores
    first: list[tuple[Row, Row]] = field(default_factory=list)  # rows that differ, SHOWN_DIFFERENCES at most


def write_comparison(paths: tuple[Path, Path], out: Path) -> None:
    """Write the page on two outputs, whole or not at all; raises what write_report does."""
    for path in paths:
        check_page(path, out)
    write_page(out, render_comparison(paths))


def render_comparison(paths: tuple[Path, Path]) -> str:
    """The whole page. Raises InputError if one of them is not an output of batchgen."""
    plans = read_plan(paths[0]), read_plan(paths[1])
    (a, totals_a), (b, totals_b) = (_count(path, plan) for path, plan in zip(paths, plans, strict=True))
    totals = [(name, totals_a.get(name, ""), totals_b.get(name, "")) for name in {**totals_a, **totals_b}]
    lines = [
        element("p", visible(f"{letter}: {path.name}; {origin(plan, read_status(path, count))}"), class_="soft")
        for letter, path, plan, count in zip("AB", paths, plans, (a, b), strict=True)
    ]
    return document(
        f"{paths[0].name} and {paths[1].name}",
        *lines,
        *_table("What came out", [*_numbers(a, b, WORDS[plans[0].kind]), *totals]),
        *_table("What differs in how they were made", _differences(*plans)),
        *_rows(plans, paths),
    )


def _count(path: Path, plan: Plan) -> tuple[Counts, dict[str, str]]:
    if plan.task == "generate":
        return count_output(path), {}
    measured = measure_output(path, plan)
    return measured.counts, measured.totals


def _table(heading: str, rows: list[tuple[str, str, str]]) -> Iterator[Markup]:
    yield element("h2", heading)
    if not rows:
        yield element("p", "Nothing.", class_="soft")
        return
    header = element("tr", *(element("th", name) for name in ("", "A", "B")))
    cells = [[element("td", visible(short(text, MOST_ERROR))) for text in row] for row in rows]
    yield element("div", element("table", header, *(element("tr", *row) for row in cells)), class_="card")


def _numbers(a: Counts, b: Counts, words: Words) -> Iterator[tuple[str, str, str]]:
    def both(name: str, one: object, other: object) -> tuple[str, str, str]:
        first, second = (f"{value:,}" if isinstance(value, int) else str(value) for value in (one, other))
        return name, first, second

    yield both(words.inputs, a.input_rows, b.input_rows)
    for status in (status for status in STATUSES if status != "dropped" or a.statuses[status] + b.statuses[status]):
        yield both(status, a.statuses[status], b.statuses[status])
    for reason in sorted(a.finish_reasons | b.finish_reasons):
        yield both(f"ended by {reason}", a.finish_reasons[reason], b.finish_reasons[reason])
    lengths = a.completion_tokens, b.completion_tokens
    if words.tokens:
        yield both(words.tokens, *(sum(tokens * rows for tokens, rows in one.items()) for one in lengths))
    for percent in (5, 50, 95) if words.tokens else ():
        name = "median" if percent == 50 else f"{percent} %"
        tokens = (percentile(one, percent) if one else "none" for one in lengths)
        yield both(f"tokens of a {words.made}, {name}", *tokens)
    if words.made == "completion":
        yield both("repeated completions", a.repeated, b.repeated)
    means = [one.mean_logprob for one in (a, b)]
    if means != [None, None]:
        yield both("mean log-probability", *("none" if mean is None else f"{mean:.3f}" for mean in means))


def _differences(a: Plan, b: Plan) -> list[tuple[str, str, str]]:
    """The values of the plans that differ."""
    values = [plan.to_json() for plan in (a, b)]
    one, other = (value | value.pop("parameters") for value in values)
    keys = [key for key in sorted(one.keys() | other.keys()) if one.get(key) != other.get(key)]
    return [(key, value_text(one.get(key)), value_text(other.get(key))) for key in keys]


def _rows(plans: tuple[Plan, Plan], paths: tuple[Path, Path]) -> Iterator[Markup]:
    yield element("h2", "Row by row")
    if plans[0].input != plans[1].input or plans[0].kind != plans[1].kind:
        what = "inputs" if plans[0].input != plans[1].input else "tasks"
        yield element("p", f"The {what} differ, so rows of the same number are not compared.", class_="soft")
        return
    measure = MEASURES.get(plans[0].kind)
    text = "text" if plans[0].text_column else "prompt"
    columns = (text, *measure.columns) if measure else _COMPLETION
    common = compare_rows(*paths, columns, measure.columns if measure else ("completion",))
    yield element("p", f"{common.equal:,} of {common.rows:,} rows that both have are the same.")
    if measure and len(moved := _list_moves(paths, measure)):
        words = f"{measure.name}: the two differ by {moved.mean():,.3g} on average, by {moved.max():,.3g} at most."
        yield element("p", words)
    card = measured_sample if measure else sample
    cards = [card(row, f"{letter}: ") for pair in common.first for letter, row in zip("AB", pair, strict=True)]
    yield element("div", *cards, class_="samples")


def _list_moves(paths: tuple[Path, Path], measure: Measure) -> Doubles:
    """By how much the measure of each row that both have differs."""
    (rows, values), (others, their_values) = (_measure_rows(path, measure) for path in paths)
    _, ours, theirs = np.intersect1d(rows, others, assume_unique=True, return_indices=True)
    moved = np.abs(values[ours] - their_values[theirs])
    return moved[np.isfinite(moved)]


def _measure_rows(path: Path, measure: Measure) -> tuple[Doubles, Doubles]:
    """The numbers of all rows, and their measure."""
    pairs = [(batch["row"], measure.of(batch)) for batch in read_batches(path, ("row", *measure.columns))]
    numbers = [rows.to_numpy().astype(np.float64) for rows, _ in pairs]
    return np.concatenate([np.zeros(0), *numbers]), np.concatenate([np.zeros(0), *(values for _, values in pairs)])


def compare_rows(
    a: Path, b: Path, columns: Sequence[str] = _COMPLETION, compared: Sequence[str] = ("completion",)
) -> Common:
    """Walk through two outputs side by side; both are in the order of row and sample."""
    common = Common()
    ones, others = (_keyed_rows(path, (*_ROW, *columns)) for path in (a, b))
    one, other = next(ones, None), next(others, None)
    while one and other:
        if one[0] == other[0]:
            common.rows += 1
            same = all(one[1].get(name) == other[1].get(name) for name in ("status", *compared))
            common.equal += same
            if not same and len(common.first) < SHOWN_DIFFERENCES:
                common.first.append((one[1], other[1]))
        key = one[0]
        if key <= other[0]:
            one = next(ones, None)
        if key >= other[0]:
            other = next(others, None)
    return common


def _keyed_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[tuple[int, int], Row]]:
    for batch in read_batches(path, columns):
        for row in batch.to_pylist():
            yield (row["row"], row["sample"]), row
