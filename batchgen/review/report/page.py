"""The report on an output as one HTML page: counts, plots, rejects, samples, and how to make it again."""

import shlex
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from batchgen.errors import OutputError, UsageError
from batchgen.files import replace_file
from batchgen.output.reading import check_rows, read_plan
from batchgen.plan import Plan
from batchgen.review.report import plots
from batchgen.review.report.counts import SHOWN_REJECTS, Counts, Row, RunStatus, count_output, percentile, read_status
from batchgen.review.report.markup import Markup, element, join, visible
from batchgen.review.report.measures import Doubles, Measured, describe, measure_output
from batchgen.types import STATUSES, Kind

MOST_ID, MOST_PROMPT, MOST_COMPLETION, MOST_ERROR = 100, 600, 2_000, 400  # characters that are shown
MOST_KINDS = 12  # reasons in a table

# No scripts and nothing from other hosts, even if a text in the page contains markup.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_VOID = Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">')


@dataclass(frozen=True, slots=True)
class Words:
    """What a page calls what a run reads and makes; an empty one is not shown."""

    made: str
    inputs: str = "rows"
    read: str = ""
    tokens: str = ""
    read_length: str = ""
    length: str = ""


_SCORE = Words(
    "score", read="tokens before", tokens="scored tokens", read_length="Tokens before", length="Scored tokens"
)
WORDS: dict[Kind, Words] = {
    "generate": Words(
        *("completion", "prompts", "prompt tokens", "completion tokens", "Prompt length", "Completion length")
    ),
    "text": replace(_SCORE, read="", read_length=""),
    "completion": _SCORE,
    "choices": _SCORE,
    "embed": Words("vector", read="tokens", read_length="Length of texts"),
}


def write_report(path: Path, out: Path) -> None:
    """Write the report on an output as one HTML file, whole or not at all; equal outputs give equal pages."""
    check_page(path, out)
    write_page(out, render(path))


def write_page(out: Path, page: str) -> None:
    try:
        replace_file(out, page.encode("utf-8"))
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(f"{out}: cannot be written: {reason}; make room or choose another path") from error


def _is_page(out: Path) -> bool:
    """Whether a file is a report, or empty: nothing is lost with it."""
    with open(out, "rb") as file:
        start = file.read(1000)
    return not start or _POLICY.encode() in start


def check_page(path: Path, out: Path) -> None:
    """Refuse, before any work, a page that cannot be drawn or must not be written to this path."""
    plots.check_plotting()
    if path.suffix.lower() == ".jsonl" and not path.is_dir():
        raise UsageError(f"{path}: a report needs metadata, which JSON lines lack; write the output as .parquet")
    if out.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"{out}: the suffix {out.suffix!r} is not .html; name the page so")
    if out.is_dir() or out.is_symlink():
        what = "a directory" if out.is_dir() else "a symbolic link, which would be replaced"
        raise OutputError(f"{out}: {what}; name a file")
    if path.exists() and out.exists() and out.samefile(path):
        raise UsageError(f"{out}: is the output itself; choose another name for the page")
    if out.is_file() and not _is_page(out):
        raise OutputError(f"{out}: a file that is no report of batchgen; choose another name, or move it away")
    if not out.parent.is_dir():
        raise OutputError(f"{out}: {out.parent} is not a folder; create it (mkdir -p) or choose another")


def render(path: Path) -> str:
    """The whole page about one output."""
    plan = read_plan(path)
    measured = None if plan.task == "generate" else measure_output(path, plan)
    counts = measured.counts if measured else count_output(path)
    if path.is_dir():
        check_rows(path, plan, counts.input_rows)  # a part may be missing
    status = read_status(path, counts)
    words = WORDS[plan.kind]
    return document(
        path.name,
        element("p", visible(origin(plan, status)), class_="soft"),
        *overview(counts, status, words, measured.totals if measured else {}),
        element("div", *figures(counts, status, words, measured), class_="grid"),
        *rejects(counts, words),
        *(measured_samples(measured) if measured else samples(counts)),
        *facts(plan),
        *reproduce(plan, path),
    )


def document(name: str, *content: Markup) -> str:
    """A page of this name."""
    title = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)
    head = element(
        "head",
        _VOID,
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
        element("title", title),
        element("style", Markup(Path(__file__).with_name("report.css").read_text(encoding="utf-8"))),
    )
    body = element("body", element("h1", visible(name)), *content)
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def origin(plan: Plan, status: RunStatus) -> str:
    """What was completed, by which model, when and where."""
    files = ", ".join(status.input[:3]) + (f" and {len(status.input) - 3} more" if len(status.input) > 3 else "")
    when = f"{status.started[:16].replace('T', ' ')} UTC" if status.started else ""
    rows = f"{len(plan.selection):,} of the input's {plan.rows:,} rows" if plan.is_part else ""
    known = (
        f"input: {files}" if files else "",
        rows,
        f"model: {plan.model}",
        when,
        status.host and f"on {status.host}",
    )
    return "; ".join(part for part in known if part)


def overview(counts: Counts, status: RunStatus, words: Words, totals: dict[str, str]) -> Iterator[Markup]:
    """The outcome of the run, in a line and a few numbers; those of its last part apart."""
    shown = [status for status in STATUSES if status != "dropped" or counts.statuses[status]]
    parts = [f"{counts.statuses[status]:,} {status}" for status in shown]
    left_out = f"; {counts.left_out:,} of them are left out of the output" if counts.left_out else ""
    line = f"{counts.rows:,} rows from {counts.input_rows:,} {words.inputs}: {', '.join(parts)}{left_out}."
    is_good = counts.rows == counts.statuses["ok"] + counts.statuses["dropped"]
    yield element("p", line, class_="good" if is_good else "bad")
    whole = {
        words.inputs: f"{counts.input_rows:,}",
        f"{words.made}s": f"{counts.statuses['ok']:,}",
        words.read: f"{_total(counts.prompt_tokens):,}",
        words.tokens: f"{_total(counts.completion_tokens):,}",
    }
    whole = {name: number for name, number in whole.items() if name} | totals
    if counts.mean_logprob is not None:
        whole["mean log-probability"] = f"{counts.mean_logprob:.3f}"
    whole |= {f"mean of {name}": f"{mean:.3f}" for name, mean in counts.means.items()}
    last = {}
    if status.timeline:
        seconds, _, tokens = status.timeline[-1]
        last = {"tokens/s": f"{tokens / seconds:,.0f}"} if words.tokens else {}
        last["run time"] = duration(seconds)
    if not status.resumed:
        whole, last = whole | last, {}
    yield _cards(whole)
    if last:
        rest = (
            f"The last part of the run, which resumed it; earlier parts did {status.resumed:,} of the {words.inputs}:"
        )
        yield element("p", rest, class_="soft")
        done = {words.inputs: f"{counts.input_rows - status.resumed:,}", words.tokens: f"{tokens:,}"}
        yield _cards({name: number for name, number in done.items() if name} | last)


def _cards(numbers: dict[str, str]) -> Markup:
    cells = [element("div", element("b", number), name, class_="card soft") for name, number in numbers.items()]
    return element("div", *cells, class_="numbers")


def _total(counter: Counter[int]) -> int:
    return sum(tokens * rows for tokens, rows in counter.items())


def duration(seconds: float) -> str:
    """4.2 s, 3 min 20 s, 5 h 3 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def figures(counts: Counts, status: RunStatus, words: Words, measured: Measured | None) -> Iterator[Markup]:
    """The plots, each with a heading; a sentence instead of a plot without data."""
    nothing = element("p", "No row is ok, so there is nothing to count.", class_="soft")
    for name, unit, tokens in (
        (words.read_length, words.inputs, counts.prompt_tokens),
        (words.length, f"{words.made}s", counts.completion_tokens),
    ):
        if name:
            plot = join(plots.token_histogram(tokens, name, unit), spread(tokens)) if tokens else nothing
            yield figure(name, plot)
    if measured:
        name, values = measured.measure.name, measured.values
        plot = join(plots.histogram(values, name, "rows"), quantiles(values)) if len(values) else nothing
        yield figure(name, plot)
    absent = "Not known: the run's status file (OUTPUT.status.json, beside the output) is missing or has no timeline."
    which = "Of the last part of the run. " if status.resumed else ""
    note = element("p", f"{which}A {words.made}'s tokens are counted when it ends.", class_="soft")
    plot = join(plots.speed(status.timeline), note) if status.timeline else element("p", absent, class_="soft")
    if words.tokens:
        yield figure("Speed", plot)
    if not measured:
        reasons = tally(counts.finish_reasons, "why", "completions") if counts.finish_reasons else nothing
        yield figure("How completions ended", reasons)


def spread(tokens: Counter[int]) -> Markup:
    """Mean and percentiles of counted numbers of tokens."""
    named = ((5, "5 %"), (25, "25 %"), (50, "median"), (75, "75 %"), (95, "95 %"), (99, "99 %"))
    values = ", ".join(f"{name} {percentile(tokens, percent):,}" for percent, name in named)
    text = f"mean {_total(tokens) / tokens.total():,.1f}; {min(tokens):,} to {max(tokens):,}; {values}"
    return element("p", text, class_="soft")


def quantiles(values: Doubles) -> Markup:
    """Mean and percentiles of measures."""
    named = ((0, "lowest"), (5, "5 %"), (25, "25 %"), (50, "median"), (75, "75 %"), (95, "95 %"), (100, "highest"))
    found = np.percentile(values, [percent for percent, _ in named])
    parts = [f"{name} {value:,.4g}" for (_, name), value in zip(named, found, strict=True)]
    return element("p", f"mean {values.mean():,.4g}; {', '.join(parts)}", class_="soft")


def figure(name: str, content: Markup) -> Markup:
    return element("figure", element("h3", name), content, class_="card")


def tally(counter: Counter[str], name: str, unit: str) -> Markup:
    """A table with a bar per row: the most frequent kinds, and all others together."""
    shown = counter.most_common(MOST_KINDS)
    others = counter.total() - sum(number for _, number in shown)
    if others:
        shown.append(("others", others))
    most = max(number for _, number in shown)
    header = element("tr", element("th", name), element("th", unit, class_="n"), element("th", "", class_="bar"))
    rows = [
        element(
            "tr",
            element("td", visible(short(kind, MOST_ERROR))),
            element("td", f"{number:,}", class_="n"),
            element("td", element("span", style=f"width:{100 * number / most:.1f}%"), class_="bar"),
        )
        for kind, number in shown
    ]
    return element("table", header, *rows)


def rejects(counts: Counts, words: Words) -> Iterator[Markup]:
    """Why rows have no completion, or no score, and the first such rows."""
    if not counts.reasons:
        return
    reasons = Counter({f"{reason.place}: {reason.text}": reason.rows for reason in counts.reasons.values()})
    total = reasons.total()
    yield element("h2", f"Rows without a {words.made}: {total:,}")
    yield element("div", tally(reasons, "why: the first of each kind", "rows"), class_="card")
    header = element("tr", element("th", "row", class_="n"), element("th", "id"), element("th", "why"))
    listed = element("table", header, *map(reject, counts.rejects))
    which = f"The first {SHOWN_REJECTS} of them" if total > SHOWN_REJECTS else "All of them"
    yield element("details", element("summary", which, class_="soft"), element("div", listed, class_="card"))


def reject(row: Row) -> Markup:
    why = short(str(row["error"] or ""), MOST_ERROR)
    return element(
        "tr",
        element("td", f"{row['row']}", class_="n"),
        element("td", visible(short(str(row["id"] or ""), MOST_ID))),
        element("td", visible(why if row["status"] == "rejected" else f"{row['status']}: {why}")),
    )


def samples(counts: Counts) -> Iterator[Markup]:
    """Some completions, drawn from all, each after the end of its prompt; then those that are unlike the others."""
    if not counts.samples:
        return
    yield element("h2", f"{len(counts.samples)} completions, drawn from all")
    yield element("div", *map(sample, counts.samples), class_="samples")
    yield from _folded("The shortest completions", map(sample, counts.shortest))
    if counts.least_likely:
        yield from _folded("The least likely completions, by mean log-probability", map(sample, counts.least_likely))
    if counts.repeated:
        share = f"{100 * counts.repeated / counts.statuses['ok']:.1f} %"
        name = f"Repeated completions: {counts.repeated:,} ({share}) equal one of an earlier row; the most frequent"
        yield from _folded(name, (sample(row, f"{often:,} times: ") for often, row in counts.most_repeated))


def measured_samples(measured: Measured) -> Iterator[Markup]:
    """Some rows, drawn from all, each with its scores; then those with the lowest and with the highest measure."""
    rows = measured.counts.samples
    if not rows:
        return
    yield element("h2", f"{len(rows)} rows, drawn from all")
    yield element("div", *map(measured_sample, rows), class_="samples")
    yield from _folded(measured.measure.low, map(measured_sample, measured.lowest))
    yield from _folded(measured.measure.high, map(measured_sample, measured.highest))


def _folded(name: str, cards: Iterable[Markup]) -> Iterator[Markup]:
    yield element("details", element("summary", name, class_="soft"), element("div", *cards, class_="samples"))


def sample(row: Row, before: str = "") -> Markup:
    name = f"row {row['row']}, sample {row['sample']}, {row['completion_tokens']} tokens, {row['finish_reason']}"
    return card(row, before, name, row["completion"])


def measured_sample(row: Row, before: str = "") -> Markup:
    """A text, a prompt with its completion, or with its best choice."""
    choices, best = row.get("choices"), row.get("best")
    if isinstance(choices, list) and isinstance(best, int):
        return card(row, before, describe(row), "".join(choices[best : best + 1]))
    return card(row, before, describe(row), row.get("completion"))


def card(row: Row, before: str, name: str, completion: object) -> Markup:
    """A row: its name, its prompt or text, and what follows."""
    if row["id"] is not None:
        name = f"{short(str(row['id']), MOST_ID)}: {name}"
    completion = str(completion or "")
    shown = visible(short(completion, MOST_COMPLETION)) if completion else element("i", "(empty)", class_="soft")
    text = row.get("text", row.get("prompt"))
    prompt = element("span", visible(short_left(str(text or ""), MOST_PROMPT)), class_="prompt")
    shown = Markup("") if "text" in row else shown
    head = element("div", visible(before + name), class_="soft")
    return element("div", head, element("p", prompt, shown, class_="text"), class_="card")


def short(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text) - limit:,} characters more)"


def short_left(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"({len(text) - limit:,} characters before) …{text[-limit:]}"


def facts(plan: Plan) -> Iterator[Markup]:
    """Every value of the plan."""
    values = plan.to_json()
    values |= values.pop("parameters")
    yield element("h2", "How it was made")
    rows = [
        element(
            "tr", element("th", visible(short(key, 100))), element("td", visible(short(value_text(value), MOST_ERROR)))
        )
        for key, value in sorted(values.items())
    ]
    yield element("div", element("table", *rows), class_="card facts")


def value_text(value: object) -> str:
    words = {True: "yes", False: "no", None: "none"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


def reproduce(plan: Plan, path: Path) -> Iterator[Markup]:
    """The command that makes the output again, and the one that checks it."""
    yield element("h2", "To make it again")
    yield element("pre", element("code", visible(plan.command_line(output=path.name))), class_="card")
    note = f"INPUT is the file of {plan.rows} rows with sha256 {plan.input}. "
    note += (
        "With the same batchgen and regex, the rows are the same bit for bit on any machine."
        if plan.portable
        else f"With batchgen {plan.batchgen} the bits of a row depend on the processor; later versions make others."
    )
    yield element("p", visible(note), class_="soft")
    yield element("p", "This command generates some of its rows again and compares them:")
    check = shlex.join(["batchgen", "verify", path.name, "--rows", "20"])
    yield element("pre", element("code", visible(check)), class_="card")
