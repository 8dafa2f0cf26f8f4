"""What would happen on a thousand workers with a billion rows: python -m benchmarks.simulate_cluster.

Nothing here runs on a cluster. benchmarks/simulation.py plays a run event by event; what one step costs was measured
on one machine (--measure measures anew) or is assumed (--parameters says which). Every parameter of the simulation is
an option, such as --workers 500 --commit-s 0.02. --validate holds the simulation against real runs of this machine.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from benchmarks.simulate_check import check, check_asleep
from benchmarks.simulate_costs import measure
from benchmarks.simulation import ASSUMED, CHOSEN, MEASURED, Cluster, Result, basis_of, simulate

MACHINE = "2 cores of an Intel Xeon (AVX-512), ext4 on a virtual disk, shared with other work, 2026-11-25"

# Seconds, of the same machine and by --measure: what a run does before and after its chunks.
SCAN_S = 1.2e-6  # a row counted and hashed
READ_S = 6.2e-6  # a row read
STOCK_PART_S, STOCK_ROW_S = 1.4e-4, 1.7e-7  # a part hashed and its receipt read, when a run goes on
MERGE_PART_S, MERGE_ROW_S = 8.2e-4, 1.9e-6
UNLINK_S = 7e-6
PART_BYTES_PER_ROW = 197
LEDGER_BYTES = 149  # that the parent keeps of a committed chunk
LISTING_BYTES = 275  # that it needs of a part, all at once, when it takes stock of them
OPEN_S = 2e-3  # assumed: to open, or remove, a file of a shared file system that is in no cache

# Cost of a row by rows a chunk, beside chunks of 192: few rows leave matrix products short of work (measured, 124M).
FILL = {16: 1.82, 64: 1.14, 192: 1.0}

TALES_ROW_S = 0.025  # of tales, a model of 11 MB
HOUR = 3600.0


def fill(chunk_rows: int) -> float:
    """What a row costs in chunks of this size, beside one in a chunk of 192 rows or more."""
    return float(np.interp(np.log(chunk_rows), np.log(list(FILL)), list(FILL.values())))


def sized(c: Cluster, chunk_rows: int, **changes: Any) -> Cluster:
    """The cluster with chunks of another size, and rows that cost what they do in those."""
    row_s = changes.pop("row_s", c.row_s) * fill(chunk_rows) / fill(c.chunk_rows)
    return replace(c, chunk_rows=chunk_rows, row_s=row_s, **changes)


# ---- around the chunks


@dataclass(frozen=True, slots=True)
class Around:
    """Seconds before and after the chunks, all of the parent alone; and its memory in bytes."""

    scan: float
    merge: float
    remove: float
    stock: float  # of the parts, when a run goes on
    reread: float  # of rows that are done, read again when a run goes on
    memory: float  # of committed chunks
    listing: float  # besides, when a run goes on


def around(c: Cluster) -> Around:
    return Around(
        scan=c.rows * SCAN_S,
        merge=c.chunks * (MERGE_PART_S + OPEN_S) + c.rows * MERGE_ROW_S,
        remove=c.chunks * (UNLINK_S + OPEN_S),
        stock=c.chunks * (STOCK_PART_S + OPEN_S) + c.rows * STOCK_ROW_S,
        reread=c.rows * READ_S,
        memory=c.chunks * LEDGER_BYTES,
        listing=c.chunks * LISTING_BYTES,
    )


# ---- tables


def duration(seconds: float) -> str:
    for unit, size in (("d", 86400.0), ("h", HOUR), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["--:"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def steady(c: Cluster, chunks_a_worker: int = 20) -> Result:
    """A run just long enough to tell its rate."""
    return simulate(replace(c, rows=c.workers * c.chunk_rows * chunks_a_worker))


def rate(result: Result) -> float:
    """Rows/s at which chunks were given out in the second half: without the start, and the end without new chunks."""
    c = result.cluster
    return (c.chunks - 1 - c.chunks // 2) * c.chunk_rows / (result.last_given - result.half_given)


def possible_rate(result: Result) -> float:
    """Rows/s of the workers if they never waited, nor failed."""
    return result.cluster.rows / result.ideal


def the_run(base: Cluster) -> str:
    result, rest = simulate(base), around(base)
    c, r = base, result
    all_workers = r.makespan * c.workers
    lines = [
        f"{c.rows:,} rows, {c.chunks:,} chunks of {c.chunk_rows}, {c.workers:,} workers",
        f"makespan {duration(r.makespan)}, ideal {duration(r.ideal)}: {r.efficiency:.1%}",
        f"chunks lost {r.losses:,}; results that came twice {r.twice}; "
        f"commits a chunk: {min(r.commits)} to {max(r.commits)}",
        "",
    ]
    shares = {
        "workers: generating": r.useful,
        "workers: work that was lost": r.wasted,
        "workers: writing parts": r.writing,
        "workers: starting": r.starting,
        "workers: down": r.down,
        "workers: without a chunk": r.idle,
    }
    rows = [[name, f"{seconds / all_workers:.3%}"] for name, seconds in shares.items()]
    rows += [
        ["parent: reading, tokenizing, sending", f"{r.giving_out / r.makespan:.2%}"],
        ["parent: committing", f"{r.committing / r.makespan:.2%}"],
        ["parent: looking which are done", f"{r.looking / r.makespan:.2%}"],
        ["scheduler", f"{r.handling / r.makespan:.2%}"],
    ]
    lines += [table(["where the time goes", "of the makespan"], rows), ""]
    lines += [
        f"before: scan {duration(rest.scan)}; after: merge {duration(rest.merge)}, remove {duration(rest.remove)} "
        "(--format dataset: neither)",
        f"parent's memory for the ledger: {rest.memory / 1e6:,.0f} MB",
    ]
    return "\n".join(lines)


def parent_bound(base: Cluster) -> str:
    rows = []
    for model, row_s in (("124M", base.row_s), ("tales", TALES_ROW_S)):
        for workers in (1, 10, 100, 1000, 2000, 5000, 10_000):
            c = replace(base, workers=workers, row_s=row_s, row_spread_s=row_s * base.row_spread_s / base.row_s)
            r = steady(c)
            rows.append(
                [
                    model,
                    f"{workers:,}",
                    f"{possible_rate(r):,.0f}",
                    f"{rate(r):,.0f}",
                    f"{min(rate(r) / possible_rate(r), 1):.0%}",
                    f"{(r.giving_out / r.makespan):.0%}",
                    f"{r.committing / r.makespan:.0%}",
                    f"{r.handling / r.makespan:.0%}",
                ]
            )
    header = ["model", "workers", "rows/s they can", "rows/s done", "of it", "parent gives out", "commits", "scheduler"]
    return table(header, rows)


def commit_bound(base: Cluster) -> str:
    sizes = (64, 128, 256, 512, 2048, 8192)
    rows = []
    for workers in (1000, 3000):
        for commit_s in (0.0002, 0.004, 0.02, 0.1):
            runs = [steady(sized(base, n, workers=workers, commit_s=commit_s)) for n in sizes]
            rows.append(
                [f"{workers:,}", f"{commit_s * 1e3:g} ms", *(f"{min(rate(r) / possible_rate(r), 1):.0%}" for r in runs)]
            )
    return table(["workers", "commit", *(f"{n} rows" for n in sizes)], rows)


def look_ahead(base: Cluster) -> str:
    ahead = (0, 1, 10, 100, 1000)
    rows = []
    for workers in (1000, 3000, 4000):
        runs = [steady(replace(base, workers=workers, look_ahead=k)) for k in ahead]
        rows.append([f"{workers:,}", *(f"{min(rate(r) / possible_rate(r), 1):.1%}" for r in runs)])
    return table(["workers", *(f"{k} ahead" for k in ahead)], rows)


def many_files(base: Cluster) -> str:
    rows = []
    for n in (64, 128, 512, 2048, 8192, 32_768):
        c = sized(base, n)
        a = around(c)
        rows.append(
            [
                f"{n:,}",
                f"{c.chunks:,}",
                f"{PART_BYTES_PER_ROW * n / 1e6:.2f} MB",
                f"{a.memory / 1e6:,.0f} MB",
                f"{a.listing / 1e6:,.0f} MB",
                duration(a.stock),
                duration(a.reread),
                duration(a.merge),
                duration(a.remove),
                duration(n * c.row_s),
            ]
        )
    header = ["chunk rows", "parts", "a part", "ledger", "listing", "take stock", "read again", "merge", "remove"]
    header.append("a chunk takes")
    return table(header, rows)


def the_end(base: Cluster) -> str:
    sizes = (64, 128, 256, 512, 2048, 8192)
    rows = []
    for n in (100_000, 1_000_000, 10_000_000, 100_000_000):
        runs = [simulate(sized(base, size, rows=n)) for size in sizes]
        rows.append([f"{n:,}", duration(runs[0].ideal), *(f"{r.efficiency:.0%}" for r in runs)])
    return table(["rows", "ideal", *(f"{n} rows" for n in sizes)], rows)


def merging(base: Cluster) -> str:
    rows = []
    for n in (1_000_000, 10_000_000, 100_000_000, 1_000_000_000, 10_000_000_000):
        c = replace(base, rows=n)
        a = around(c)
        run = n * c.row_s / c.workers
        rows.append([f"{n:,}", duration(a.scan), duration(run), duration(a.merge), f"{a.merge / run:.1%}"])
    return table(["rows", "scan", "chunks, ideal", "merge", "merge beside that"], rows)


def failures(base: Cluster) -> str:
    sizes = (64, 512, 2048, 8192)
    rows = []
    for mtbf in (1, 10, 100, 1000):
        changed = replace(base, worker_mtbf_s=mtbf * HOUR, node_mtbf_s=0.0)
        runs = [simulate(sized(changed, n, rows=base.workers * 8192 * 6)) for n in sizes]
        for what, of in (
            ("lost", lambda r: f"{r.wasted / (r.makespan * r.cluster.workers):.1%}"),
            ("makespan", lambda r: f"{r.makespan / r.ideal:.2f} x ideal"),
        ):
            rows.append([f"{mtbf:,} h", what, *map(of, runs)])
    return table(["a worker's MTBF", "", *(f"{n} rows" for n in sizes)], rows)


def limits(base: Cluster) -> str:
    """Where the parent, or the scheduler, has no time left; and what the simulation says below and above that."""
    rows = []
    for what, c in (
        ("as it is", base),
        ("chunks of 64", sized(base, 64)),
        ("chunks of 4096", sized(base, 4096)),
        ("commits of 100 ms", replace(base, commit_s=0.1)),
        ("... chunks of 4096", sized(base, 4096, commit_s=0.1)),
        ("scheduler 10 ms", replace(base, scheduler_s=0.01)),
        ("validation 4 times as fast", replace(base, validate_s=base.validate_s / 4)),
    ):
        most = most_workers(c)
        below, above = (steady(replace(c, workers=max(round(most * f), 1)), 10) for f in (0.7, 1.3))
        rows.append(
            [
                what,
                f"{most:,}",
                bound_by(c, most),
                f"{min(rate(below) / possible_rate(below), 1):.0%}",
                f"{min(rate(above) / possible_rate(above), 1):.0%}",
            ]
        )
    return table(["", "workers at the limit", "set by", "rate at 0.7 of it", "rate at 1.3 of it"], rows)


def parts_of_the_load(c: Cluster) -> dict[str, float]:
    """Seconds a second that all workers ask of what there is one of."""
    chunks_per_s = c.workers / (c.chunk_rows * c.row_s)
    return {
        "parent: giving out": chunks_per_s * c.give_out_s,
        "parent: committing": chunks_per_s * c.commit_s,
        "parent: looking": chunks_per_s * c.wait_s * (c.workers + c.look_ahead),
        "scheduler": chunks_per_s * c.handle_s,
    }


def most_workers(c: Cluster) -> int:
    """So many as the parent, or the scheduler, can just keep busy."""

    def overloaded(workers: int) -> bool:
        load = parts_of_the_load(replace(c, workers=workers))
        return load["scheduler"] > 1 or sum(load.values()) - load["scheduler"] > 1

    low, high = 1, 10_000_000
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if overloaded(middle) else (middle, high)
    return low


def bound_by(c: Cluster, workers: int) -> str:
    load = parts_of_the_load(replace(c, workers=workers))
    if load["scheduler"] > 0.99:
        return "scheduler"
    return max((name for name in load if name != "scheduler"), key=lambda name: load[name])


TABLES: dict[str, tuple[str, Callable[[Cluster], str]]] = {
    "run": ("The run", the_run),
    "limits": ("What breaks first, and at how many workers", limits),
    "parent": ("Workers and the one parent", parent_bound),
    "commit": ("Commits, one after another: share of the workers' rate, by rows a chunk", commit_bound),
    "ahead": ("Chunks given out ahead: share of the workers' rate", look_ahead),
    "files": ("Files in one directory: what they cost the parent", many_files),
    "end": ("The end, when chunks run out: ideal beside makespan, by rows a chunk", the_end),
    "merge": ("Merging", merging),
    "failures": ("Workers that die, by rows a chunk", failures),
}


# ---- held against real runs


def checked(found: Iterable[tuple[int, int, int, float, float]]) -> str:
    rows = []
    for jobs, prompts, chunk_rows, real, simulated in found:
        seconds = [f"{real:.1f} s", f"{simulated:.1f} s", f"{simulated / real - 1:+.1%}"]
        rows.append([str(jobs), f"{prompts:,}", str(chunk_rows), *seconds])
    return table(["workers", "prompts", "chunk rows", "real", "simulated", ""], rows)


# ---- the command


def shown_parameters(c: Cluster) -> str:
    rows = []
    for basis in (CHOSEN, MEASURED, ASSUMED):
        for f in fields(Cluster):
            if basis_of(f.name)[0] == basis:
                rows.append([f"`--{f.name.replace('_', '-')}`", f"{getattr(c, f.name):g}", basis, basis_of(f.name)[1]])
    return f"Measured on {MACHINE}.\n\n" + table(["option", "value", "", "meaning"], rows)


def parse_arguments(words: Sequence[str] | None = None) -> tuple[argparse.Namespace, Cluster]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(TABLES), help=f"tables: {','.join(TABLES)}")
    parser.add_argument("--parameters", action="store_true", help="say what was measured and what is assumed, and end")
    parser.add_argument("--measure", action="store_true", help="measure this machine, and end (two minutes)")
    parser.add_argument("--large", action="store_true", help="with it: 124M's shape, and 100,000 files in a directory")
    parser.add_argument("--validate", action="store_true", help="hold simulated runs against real ones, and end")
    parser.add_argument("--repeat", type=int, default=2, help="real runs of each, the best counts")
    for f in fields(Cluster):
        basis, meaning = basis_of(f.name)
        name = f"--{f.name.replace('_', '-')}"
        parser.add_argument(name, type=type(f.default), default=f.default, help=f"{basis}: {meaning} ({f.default:g})")
    args = parser.parse_args(words)
    unknown = set(args.only.split(",")) - TABLES.keys()
    if unknown:
        parser.error(f"--only: {', '.join(sorted(unknown))}: there are {', '.join(TABLES)}")
    return args, Cluster(**{f.name: getattr(args, f.name) for f in fields(Cluster)})


def main() -> None:
    args, cluster = parse_arguments()
    if args.measure:
        print(json.dumps(measure(args.large), indent=1))
    elif args.parameters:
        print(shown_parameters(cluster))
    elif args.validate:
        print(f"## Workers that sleep\n\n{checked(check_asleep())}\n\n## tales\n", flush=True)
        print(checked(check(args.repeat)))
    else:
        for name in args.only.split(","):
            title, make = TABLES[name]
            print(f"## {title}\n\n{make(cluster)}\n", flush=True)


if __name__ == "__main__":
    main()
