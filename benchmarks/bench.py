"""Compare batchgen with other systems, on the same prompts and numbers of tokens: python -m benchmarks.bench.

Each system runs in a process and a virtual environment of its own, one after another, with its best settings;
systems.py lists the settings that are tried on a slice of a workload. tokens/s counts the generated tokens of a whole
run on all cores, without start-up (from process start to the first token), which has its own column; the best of
--repeat runs counts. "float32 is" and "int8 is" say how many times as fast batchgen is in these precisions. Peak memory
is that of all the system's processes together; shared pages count once. "first token" is the share of greedy
completions that begin with the token of batchgen in float32: it shows that all do the same work.

Needs Linux. Models, environments, the best settings, logs and results are kept in .bench/.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.machine import available_cores, clean_environment, describe, processor, sgemm_peak
from benchmarks.systems import ROOT, SYSTEMS, Choices, MissingError, Options, System, install, run_system
from benchmarks.workloads import KINDS, Workload, make_workload

HEADER = ["system", "tokens/s", "float32 is", "int8 is", "start-up s", "peak GiB", "first token", "settings"]
ALIGN = ["-", "-:", "-:", "-:", "-:", "-:", "-:", "-"]
EXTRAS = {
    "breakdown": "The engine alone, one process",
    "products": "Products with weights, one core",
}
OURS = {precision: f"batchgen-{precision}" for precision in ("float32", "int8")}


@dataclass(slots=True)
class Row:
    """The result of one system on one workload."""

    workload: str
    system: str
    tokens_per_s: float = 0.0
    seconds: list[float] = field(default_factory=list)
    startup_s: float = 0.0
    peak_bytes: int = 0
    first_tokens: list[int] = field(default_factory=list)
    version: str = ""
    settings: str = ""
    tried: dict[str, float | str] = field(default_factory=dict)
    reported: dict[str, float] = field(default_factory=dict)
    missing: str = ""  # why there is no result


def main() -> None:
    args = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that started processes are ended
    cache = args.cache.resolve()
    cache.mkdir(parents=True, exist_ok=True)
    (cache / ".gitignore").write_text("*\n", encoding="utf-8")
    machine = describe(args.jobs)
    print(machine, flush=True)
    report, rows = [machine, ""], []
    for name in args.only:
        workload = make_workload(name, args.scale)
        measured = [measure(SYSTEMS[system], workload, args, cache) for system in args.systems]
        rows += measured
        report += section(workload, measured, sgemm_peak(args.jobs)[0], args.jobs)
        save(cache, report, machine, rows)
    for module, title in EXTRAS.items() if args.breakdown else ():
        report += [f"## {title}", "", run_module(module)]
        save(cache, report, machine, rows)
    if args.scores:
        report += ["## Scores of given texts", "", run_module("scores", f"--jobs={args.jobs}", f"--cache={cache}")]
        save(cache, report, machine, rows)
    print("\n" + "\n".join(report))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=names_from(KINDS), default=list(KINDS), help=",".join(KINDS))
    parser.add_argument("--systems", type=names_from(SYSTEMS), default=list(SYSTEMS), help=",".join(SYSTEMS))
    parser.add_argument("--scale", type=float, default=1.0, help="multiply the number of prompts by this")
    parser.add_argument("--jobs", type=int, default=available_cores(), help="cores for each system")
    parser.add_argument("--repeat", type=int, default=2, help="runs of each, the best counts; long ones run once")
    parser.add_argument("--limit", type=float, default=1800, help="end a system after this many seconds")
    tune = "try settings on a slice of the workload, or take the first"
    parser.add_argument("--tune", action=argparse.BooleanOptionalAction, default=True, help=tune)
    parser.add_argument("--breakdown", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--scores", action="store_true", help="also scores of given texts (benchmarks.scores)")
    parser.add_argument("--cache", type=Path, default=ROOT / ".bench")
    return parser.parse_args()


def names_from(known: dict[str, Any]) -> Any:
    def names(text: str) -> list[str]:
        chosen = text.split(",")
        for name in chosen:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
        return chosen

    return names


def measure(system: System, workload: Workload, args: argparse.Namespace, cache: Path) -> Row:
    """Measure a system; if it fails, the row has the reason."""
    row = Row(workload.name, system.name)
    try:
        install(system, cache)
        options, row.tried = best_options(system, workload, args, cache)
        result = run_system(system, workload, options, args.jobs, args.repeat, cache, args.limit)
    except MissingError as error:
        row.missing = str(error)
        print(f"{row.workload} {row.system}: missing: {row.missing}", file=sys.stderr, flush=True)
        return row
    row.seconds, row.startup_s, row.peak_bytes = result["seconds"], result["startup_s"], result["peak_bytes"]
    row.tokens_per_s = workload.task.new_tokens / min(row.seconds)
    row.first_tokens = [] if workload.task.temperature else result["first_tokens"]
    row.version, row.settings, row.reported = result["version"], result["settings"], result["reported"]
    print(f"{row.workload} {row.system}: {row.tokens_per_s:,.1f} tokens/s", file=sys.stderr, flush=True)
    return row


def best_options(
    system: System, workload: Workload, args: argparse.Namespace, cache: Path
) -> tuple[Options, dict[str, float | str]]:
    """The system's fastest settings for such a workload, and the seconds of all tried; tuned.json keeps both."""
    choices = system.choices(workload, args.jobs)
    first = {option: values[0] for option, values in choices.items()}
    if not args.tune or all(len(values) == 1 for values in choices.values()):
        return first, {}
    path = cache / "tuned.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    key = json.dumps([processor(), args.jobs, workload.like, system.name, choices])
    if key not in known:
        known[key] = tune(system, workload, choices, args, cache)
        path.write_text(json.dumps(known, indent=1), encoding="utf-8")
    best, tried = known[key]
    return best, tried


def tune(
    system: System, workload: Workload, choices: Choices, args: argparse.Namespace, cache: Path
) -> tuple[Options, dict[str, float | str]]:
    """Try one option after the other, on a slice of the workload; settings that are much slower are ended early."""
    part = workload.slice(args.jobs)
    best = {option: values[0] for option, values in choices.items()}
    changes = [{option: value} for option, values in choices.items() for value in values[1:]]
    tried: dict[str, float | str] = {}
    fastest, limit = float("inf"), args.limit
    for change in [{}, *changes]:
        options, started = best | change, time.monotonic()
        try:
            seconds = min(run_system(system, part, options, args.jobs, 1, cache, limit)["seconds"])
            tried[json.dumps(options)] = round(seconds, 2)
        except MissingError as error:  # too slow, too much memory, or refused: other settings may work
            tried[json.dumps(options)] = failure = str(error)
            continue
        if seconds < fastest:
            best, fastest = options, seconds
            limit = min(args.limit, 1.25 * (time.monotonic() - started) + 5)  # start-up, the same for all, is in it
    if fastest == float("inf"):
        raise MissingError(failure)
    return best, tried


def run_module(module: str, *options: str) -> str:
    command = [sys.executable, "-m", f"benchmarks.{module}", *options]
    done = subprocess.run(command, cwd=ROOT, env=clean_environment(), stdout=subprocess.PIPE, text=True)
    return done.stdout if not done.returncode else f"missing: exit status {done.returncode}\n"


# --- the report ------------------------------------------------------------------------------------------------


def section(workload: Workload, rows: list[Row], sgemm: float, jobs: int) -> list[str]:
    """A workload's heading and table, as Markdown."""
    by_name = {row.system: row for row in rows}
    ours = [by_name.get(name) for name in OURS.values()]
    table = [cells(row, ours) for row in rows]
    lines = [f"## {workload.name}: {workload.line}", "", *markdown_table(table), ""]
    return [*lines, " ".join(remarks(by_name, sgemm, jobs)), ""]


def remarks(by_name: dict[str, Row], sgemm: float, jobs: int) -> Iterator[str]:
    for precision, name in OURS.items():
        ours, one = by_name.get(name), by_name.get(f"{name}-1-job")
        if ours and one and ours.tokens_per_s and one.tokens_per_s:
            yield f"In {precision}, {jobs} workers are {ours.tokens_per_s / one.tokens_per_s:.2f}x one."
        if ours and ours.reported:
            yield (
                f"A worker's start to its first token in {precision}: {ours.reported['worker_first_token_s']:.2f} s, "
                f"to its first part on disk: {ours.reported['worker_first_part_s']:.2f} s."
            )
    yield f"sgemm just after this workload: {sgemm:,.0f} GF/s."


def cells(row: Row, ours: list[Row | None]) -> list[str]:
    """A line of the table; `ours` is batchgen in each precision."""
    if row.missing:
        return [row.system, "missing", "", "", "", "", "", row.missing.replace("|", "/")]
    return [
        row.system,
        f"{row.tokens_per_s:,.0f}" if row.tokens_per_s >= 100 else f"{row.tokens_per_s:.1f}",
        *(f"{our.tokens_per_s / row.tokens_per_s:.2f}x" if our and our.tokens_per_s else "" for our in ours),
        f"{row.startup_s:.1f}",
        f"{row.peak_bytes / 2**30:.2f}",
        agreement(row, ours[0]),
        f"{row.version}; {row.settings}",
    ]


def agreement(row: Row, ours: Row | None) -> str:
    if not ours or not row.first_tokens or len(ours.first_tokens) != len(row.first_tokens):
        return ""
    same = sum(a == b for a, b in zip(row.first_tokens, ours.first_tokens, strict=True))
    return f"{same / len(row.first_tokens):.0%}"


def markdown_table(rows: list[list[str]]) -> list[str]:
    """A table with aligned columns, readable as text too."""
    widths = [max(len(row[column]) for row in [HEADER, *rows]) for column in range(len(HEADER))]
    widths[-1] = len(HEADER[-1])  # the last column is long, and nothing follows it

    def line(values: list[str]) -> str:
        padded = [
            value.rjust(width) if align == "-:" else value.ljust(width)
            for value, width, align in zip(values, widths, ALIGN, strict=True)
        ]
        return f"| {' | '.join(padded)} |"

    rule = [("-" * (width - 1)) + align[-1] for width, align in zip(widths, ALIGN, strict=True)]
    return [line(HEADER), line(rule), *map(line, rows)]


def save(cache: Path, report: list[str], machine: str, rows: list[Row]) -> None:
    """Write the results so far, so that an interrupted run keeps them."""
    (cache / "results.md").write_text("\n".join(report) + "\n", encoding="utf-8")
    values = {"machine": machine, "rows": [asdict(row) for row in rows]}
    (cache / "results.json").write_text(json.dumps(values, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
