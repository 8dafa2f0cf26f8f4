"""Two outputs beside each other on one page: what was asked for, what came out, and the rows that differ."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from batchgen.output.reading import read_batches, read_plan
from batchgen.plan import Plan
from batchgen.review.report.counts import Counts, Row, count_output, percentile, read_status
from batchgen.review.report.markup import Markup, element, visible
from batchgen.review.report.page import MOST_ERROR, check_page, document, origin, sample, short, value_text, write_page

SHOWN_DIFFERENCES = 10
_COLUMNS = ("row", "sample", "id", "prompt", "completion", "completion_tokens", "finish_reason", "status")


@dataclass(slots=True)
class Common:
    """The rows that two outputs both have, by row and sample."""

    rows: int = 0
    equal: int = 0  # of rows, those with the same status and completion
    first: list[tuple[Row, Row]] = field(default_factory=list)  # rows that differ, SHOWN_DIFFERENCES at most


def write_comparison(paths: tuple[Path, Path], out: Path) -> None:
    """Write the page on two outputs, whole or not at all; raises what write_report does."""
    for path in paths:
        check_page(path, out)
    write_page(out, render_comparison(paths))


def render_comparison(paths: tuple[Path, Path]) -> str:
    """The whole page. Raises InputError if one of them is not an output of batchgen."""
    plans = read_plan(paths[0]), read_plan(paths[1])
    counts = count_output(paths[0]), count_output(paths[1])
    lines = [
        element("p", visible(f"{letter}: {path.name}; {origin(plan, read_status(path, count))}"), class_="soft")
        for letter, path, plan, count in zip("AB", paths, plans, counts, strict=True)
    ]
    return document(
        f"{paths[0].name} and {paths[1].name}",
        *lines,
        *_table("What came out", list(_numbers(*counts))),
        *_table("What differs in how they were made", _differences(*plans)),
        *_rows(plans, paths),
    )


def _table(heading: str, rows: list[tuple[str, str, str]]) -> Iterator[Markup]:
    yield element("h2", heading)
    if not rows:
        yield element("p", "Nothing.", class_="soft")
        return
    header = element("tr", *(element("th", name) for name in ("", "A", "B")))
    cells = [[element("td", visible(short(text, MOST_ERROR))) for text in row] for row in rows]
    yield element("div", element("table", header, *(element("tr", *row) for row in cells)), class_="card")


def _numbers(a: Counts, b: Counts) -> Iterator[tuple[str, str, str]]:
    def both(name: str, one: object, other: object) -> tuple[str, str, str]:
        first, second = (f"{value:,}" if isinstance(value, int) else str(value) for value in (one, other))
        return name, first, second

    yield both("prompts", a.input_rows, b.input_rows)
    for status in ("ok", "rejected", "failed"):
        yield both(status, a.statuses[status], b.statuses[status])
    for reason in sorted(a.finish_reasons | b.finish_reasons):
        yield both(f"ended by {reason}", a.finish_reasons[reason], b.finish_reasons[reason])
    lengths = a.completion_tokens, b.completion_tokens
    yield both("completion tokens", *(sum(tokens * rows for tokens, rows in one.items()) for one in lengths))
    for percent in (5, 50, 95):
        name = "median" if percent == 50 else f"{percent} %"
        yield both(f"tokens of a completion, {name}", *(percentile(one, percent) if one else "none" for one in lengths))
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
    if plans[0].input != plans[1].input:
        yield element("p", "The inputs differ, so rows of the same number are not compared.", class_="soft")
        return
    common = compare_rows(*paths)
    yield element("p", f"{common.equal:,} of {common.rows:,} rows that both have are the same.")
    cards = [sample(row, f"{letter}: ") for pair in common.first for letter, row in zip("AB", pair, strict=True)]
    yield element("div", *cards, class_="samples")


def compare_rows(a: Path, b: Path) -> Common:
    """Walk through two outputs side by side; both are in the order of row and sample."""
    common = Common()
    ones, others = _keyed_rows(a), _keyed_rows(b)
    one, other = next(ones, None), next(others, None)
    while one and other:
        if one[0] == other[0]:
            common.rows += 1
            same = all(one[1][name] == other[1][name] for name in ("status", "completion"))
            common.equal += same
            if not same and len(common.first) < SHOWN_DIFFERENCES:
                common.first.append((one[1], other[1]))
        key = one[0]
        if key <= other[0]:
            one = next(ones, None)
        if key >= other[0]:
            other = next(others, None)
    return common


def _keyed_rows(path: Path) -> Iterator[tuple[tuple[int, int], Row]]:
    for batch in read_batches(path, _COLUMNS):
        for row in batch.to_pylist():
            yield (row["row"], row["sample"]), row
