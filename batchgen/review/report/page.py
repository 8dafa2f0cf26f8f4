"""The report as a page: what was run, how it went, what came out, and how to have it again."""

import os
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from batchgen.errors import OutputError, UsageError
from batchgen.output.reading import read_run
from batchgen.review.report import plots
from batchgen.review.report.counts import SHOWN_REJECTS, Counts, Timeline, count_output, read_timeline
from batchgen.review.report.markup import Markup, element, join, visible
from batchgen.types import SamplingParams

MOST_ID, MOST_PROMPT, MOST_COMPLETION, MOST_ERROR = 100, 600, 2_000, 400  # characters that are shown
MOST_KINDS = 12  # of reasons

# Neither scripts nor anything from elsewhere, whatever a text in the page may say.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_VOID = Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">')


def write_report(path: Path, out: Path) -> Path:
    """Write the report on the output at `path` as one HTML file, whole or not at all; equal outputs, equal pages.

    Raises InputError where the output is not one of batchgen's, OutputError where `out` cannot be written, and
    BatchgenError where the plotting library is not installed.
    """
    check_page(path, out)
    page = render(path)
    temporary = out.with_name(f".{out.name}.batchgen-tmp")
    try:
        temporary.write_text(page, encoding="utf-8")
        os.replace(temporary, out)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        reason = error.strerror or error
        raise OutputError(f"{out}: cannot be written: {reason}; make room or choose another path") from error
    return out


def check_page(path: Path, out: Path) -> None:
    """Refuse, before any work, a page that could not be drawn or must not be put where it was asked for."""
    plots.check_plotting()
    if path.suffix.lower() == ".jsonl":
        raise UsageError(f"{path}: JSON lines have no place for what a report tells; write the output as .parquet")
    if out.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"{out}: the suffix {out.suffix!r} is not .html; name the page so")
    if out.is_dir() or out.is_symlink():
        what = "a directory" if out.is_dir() else "a symbolic link, which would be replaced"
        raise OutputError(f"{out}: {what}; name a file")
    if path.exists() and out.exists() and out.samefile(path):
        raise UsageError(f"{out}: is what the report is about; name the page otherwise")
    if not out.parent.is_dir():
        raise OutputError(f"{out}: {out.parent} is no folder; create it (mkdir -p) or choose another")


def render(path: Path) -> str:
    """The whole page."""
    run = read_run(path)
    counts = count_output(path)
    timeline = read_timeline(path, counts)
    title = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in path.name)
    head = element(
        "head",
        _VOID,
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
        element("title", title),
        element("style", Markup(Path(__file__).with_name("report.css").read_text(encoding="utf-8"))),
    )
    body = element(
        "body",
        element("h1", visible(path.name)),
        *overview(run, counts, timeline),
        element("div", *figures(counts, timeline), class_="grid"),
        *rejects(counts),
        *samples(counts),
        *facts(run, path),
        *reproduce(run, path),
    )
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def overview(run: dict[str, Any], counts: Counts, timeline: Timeline | None) -> Iterator[Markup]:
    """What the run came to, in a line and a few numbers."""
    parts = [f"{counts.statuses[status]:,} {status}" for status in ("ok", "rejected", "failed")]
    line = f"{counts.rows:,} rows from {counts.input_rows:,} prompts: {', '.join(parts)}."
    yield element("p", line, class_="good" if counts.rows == counts.statuses["ok"] else "bad")
    numbers = {
        "prompts": f"{counts.input_rows:,}",
        "completions": f"{counts.statuses['ok']:,}",
        "prompt tokens": f"{_total(counts.prompt_tokens):,}",
        "completion tokens": f"{_total(counts.completion_tokens):,}",
    }
    if timeline:
        seconds, _, tokens = timeline[-1]
        numbers["tokens/s"] = f"{tokens / seconds:,.0f}"
        numbers["run time"] = duration(seconds)
    cells = [element("div", element("b", number), name, class_="card soft") for name, number in numbers.items()]
    yield element("div", *cells, class_="numbers")


def _total(counter: Counter[int]) -> int:
    return sum(tokens * rows for tokens, rows in counter.items())


def duration(seconds: float) -> str:
    """As one would say it: 4.2 s, 3 min 20 s, 5 h 3 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def figures(counts: Counts, timeline: Timeline | None) -> Iterator[Markup]:
    """The plots, each with a heading, and a sentence in the place of those that cannot be drawn."""
    nothing = element("p", "No row is ok, so there is nothing to count.", class_="soft")
    for name, unit, tokens in (
        ("Prompt length", "prompts", counts.prompt_tokens),
        ("Completion length", "completions", counts.completion_tokens),
    ):
        yield figure(name, plots.token_histogram(tokens, name, unit) if tokens else nothing)
    absent = (
        "Not known: the run's status file (OUTPUT.status.json, beside the output) is not there, or has no timeline."
    )
    note = element("p", "A completion's tokens count when it ends.", class_="soft")
    yield figure("Speed", join(plots.speed(timeline), note) if timeline else element("p", absent, class_="soft"))
    reasons = tally(counts.finish_reasons, "why", "completions") if counts.finish_reasons else nothing
    yield figure("How completions ended", reasons)


def figure(name: str, content: Markup) -> Markup:
    return element("figure", element("h3", name), content, class_="card")


def tally(counter: Counter[str], name: str, unit: str) -> Markup:
    """A table with a bar for each: the most frequent, and the others together."""
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


def rejects(counts: Counts) -> Iterator[Markup]:
    """Why rows have no completion, and the first of these."""
    if not counts.reasons:
        return
    total = counts.reasons.total()
    yield element("h2", f"Rows without a completion: {total:,}")
    yield element("div", tally(counts.reasons, "why", "rows"), class_="card")
    header = element("tr", element("th", "row", class_="n"), element("th", "id"), element("th", "why"))
    listed = element("table", header, *map(reject, counts.rejects))
    which = f"The first {SHOWN_REJECTS} of them" if total > SHOWN_REJECTS else "All of them"
    yield element("details", element("summary", which, class_="soft"), element("div", listed, class_="card"))


def reject(row: dict[str, Any]) -> Markup:
    why = short(row["error"] or "", MOST_ERROR)
    return element(
        "tr",
        element("td", f"{row['row']}", class_="n"),
        element("td", visible(short(row["id"] or "", MOST_ID))),
        element("td", visible(why if row["status"] == "rejected" else f"{row['status']}: {why}")),
    )


def samples(counts: Counts) -> Iterator[Markup]:
    """Some completions, drawn from all, after the ends of their prompts."""
    if not counts.samples:
        return
    yield element("h2", f"{len(counts.samples)} completions, drawn from all")
    yield element("div", *map(sample, counts.samples), class_="samples")


def sample(row: dict[str, Any]) -> Markup:
    name = f"row {row['row']}, sample {row['sample']}, {row['finish_reason']}"
    if row["id"] is not None:
        name = f"{short(row['id'], MOST_ID)}: {name}"
    completion = row["completion"] or ""
    shown = visible(short(completion, MOST_COMPLETION)) if completion else element("i", "(empty)", class_="soft")
    prompt = element("span", visible(short_left(row["prompt"] or "", MOST_PROMPT)), class_="prompt")
    return element(
        "div", element("div", visible(name), class_="soft"), element("p", prompt, shown, class_="text"), class_="card"
    )


def short(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text) - limit:,} characters more)"


def short_left(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"({len(text) - limit:,} characters before) …{text[-limit:]}"


def facts(run: dict[str, Any], path: Path) -> Iterator[Markup]:
    """Everything that the metadata says, as it says it."""
    values = {key: value for key, value in run.items() if key != "parameters"}
    parameters = run.get("parameters")
    if isinstance(parameters, dict):
        values |= parameters
    yield element("h2", "How it was made")
    rows = [
        element("tr", element("th", visible(short(key, 100))), element("td", visible(short(_value(value), MOST_ERROR))))
        for key, value in sorted(values.items())
    ]
    yield element("div", element("table", *rows), class_="card facts")


def _value(value: Any) -> str:
    words = {True: "yes", False: "no", None: "none"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


def reproduce(run: dict[str, Any], path: Path) -> Iterator[Markup]:
    """The command that makes the output again, and the one that checks it."""
    yield element("h2", "To have it again")
    command = shlex.join(generate_command(run, path))
    yield element("pre", element("code", visible(command)), class_="card")
    note = f"INPUT is the file of {run.get('rows')} rows with sha256 {run.get('input')}. "
    note += (
        "Its rows come out bit for bit the same where batch_invariant is yes and batchgen, numpy and blas are as above."
        if run.get("batch_invariant")
        else "Its rows depend on the company that they are generated in: the same chunks and batches give the same."
    )
    yield element("p", visible(note), class_="soft")
    yield element("p", "Some of its rows are generated again, and compared, by")
    check = shlex.join(["batchgen", "verify", path.name, "--rows", "20"])
    yield element("pre", element("code", visible(check)), class_="card")


def generate_command(run: dict[str, Any], path: Path) -> list[str]:
    """`batchgen generate` with the options that are not their defaults."""
    command = ["batchgen", "generate", "INPUT", "-o", path.name, "--model", str(run.get("model"))]
    for key, default in (
        ("prompt_column", "prompt"),
        ("id_column", "id"),
        ("on_too_long", "reject"),
        ("empty_prompt", "reject"),
    ):
        if run.get(key, default) != default:
            command += [_option(key), str(run[key])]
    parameters = run.get("parameters")
    defaults = SamplingParams().as_dict()
    for name, value in sorted(parameters.items()) if isinstance(parameters, dict) else ():
        if _listed(value) != _listed(defaults.get(name)):
            command += _arguments(name, value)
    if run.get("token_ids"):
        command.append("--output-token-ids")
    if not run.get("batch_invariant"):
        kept = {"chunk_rows": "chunk_rows", "batch_size": "batch_size", "kv_bytes": "kv_memory"}
        command += [word for key, name in kept.items() if key in run for word in (_option(name), str(run[key]))]
    return command


def _arguments(name: str, value: Any) -> list[str]:
    """A parameter on the command line: ignore_eos=True -> --ignore-eos; stop=("a", "b") -> --stop a --stop b."""
    if isinstance(value, bool):
        return [_option(name)] if value else []
    values = value if isinstance(value, list) else [value]
    return [word for item in values for word in (_option(name), str(item))]


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _listed(value: Any) -> Any:
    return [_listed(item) for item in value] if isinstance(value, list | tuple) else value
