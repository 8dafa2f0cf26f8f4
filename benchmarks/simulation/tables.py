"""The tables of docs/scaling.md. Each is a function of a cluster; its docstring is the title."""

from dataclasses import replace
from math import inf

from benchmarks.simulation.model import OTHER_ACTIVITIES, WORKER_ACTIVITIES, Cluster, Run, simulate

SIZES = (64, 128, 256, 512, 2048, 8192)  # rows of a chunk
TALES_ROW_S = 0.025  # measured: a row of tales, a model of 11 MB
PART_ROW_BYTES = 197  # measured: size of a part, for each row
LEDGER_BYTES, LISTING_BYTES = 149, 275  # measured: memory for a committed part; for a part that a resumed run lists


def duration(seconds: float) -> str:
    units = {"d": 86400.0, "h": 3600.0, "min": 60.0}
    unit, size = next(((unit, size) for unit, size in units.items() if seconds >= 2 * size), ("s", 1.0))
    return f"{seconds / size:.1f} {unit}"


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["--:"] * len(header), *rows])


def steady(c: Cluster) -> Run:
    """A run just long enough to show its rate."""
    return simulate(replace(c, rows=c.workers * c.chunk_rows * 20))


def run(c: Cluster) -> str:
    """The run"""
    r = simulate(c)
    rows = [[f"workers: {name}", f"{r.spent[name] / r.now / c.workers:.3%}"] for name in WORKER_ACTIVITIES]
    rows += [[name, f"{r.spent[name] / r.now:.2%}"] for name in OTHER_ACTIVITIES]
    scan, merge, remove = (duration(c.outside_s(name)) for name in ("scan", "merge", "remove parts"))
    return f"""{c.rows:,} rows, {c.chunks:,} chunks of {c.chunk_rows}, {c.workers:,} workers
makespan {duration(r.now)}, ideal {duration(r.ideal)}: {r.ideal / r.now:.1%}
{r.losses:,} chunks lost and done again

{table(["time spent on", "of the makespan"], rows)}

before: scan {scan}; after: merge {merge}, remove parts {remove} (--format dataset: neither)
memory of the parent for the ledger: {c.chunks * LEDGER_BYTES / 1e6:,.0f} MB"""


def load_of(c: Cluster) -> list[float]:
    """Seconds of sending, committing, checking and scheduling that workers cause in each second if they never wait."""
    chunks_per_s = c.workers / (c.chunk_rows * c.mean_row_s)
    return [chunks_per_s * s for s in (c.send_s, c.commit_s, c.wait_s * (c.workers + c.look_ahead), c.schedule_s)]


def most_workers(c: Cluster) -> int:
    """The number of workers that the parent and the scheduler can just keep busy."""
    loads = (load_of(replace(c, workers=n)) for n in range(1, 10_000_000))
    return next(n for n, (*parent, scheduler) in enumerate(loads) if max(sum(parent), scheduler) > 1)


def limits(base: Cluster) -> str:
    """What breaks first, and at how many workers"""
    smaller, larger, slow, fast = {"chunk_rows": 64}, {"chunk_rows": 4096}, {"commit_s": 0.1}, {"validate_s": 1e-5}
    rows = []
    for changes in ({}, smaller, larger, slow, slow | larger, {"scheduler_s": 0.01}, fast):
        c = replace(base, **changes)
        name = " ".join(f"--{key.replace('_', '-')} {value:g}" for key, value in changes.items())
        c = replace(c, workers=most_workers(c))
        rows.append([name or "defaults", f"{c.workers:,}", *(f"{load:.0%}" for load in load_of(c))])
    return table(["", "workers at the limit", *OTHER_ACTIVITIES], rows)


def parent(base: Cluster) -> str:
    """(a) The parent"""
    rows = []
    for model, row_s in (("124M", base.row_s), ("tales", TALES_ROW_S)):
        for workers in (1, 10, 100, 1000, 2000, 5000, 10_000):
            spread_s = row_s * base.row_spread_s / base.row_s
            r = steady(replace(base, workers=workers, row_s=row_s, row_spread_s=spread_s))
            rate = r.rate_share * r.cluster.rows / r.ideal
            shares = [r.rate_share, *(r.spent[name] / r.now for name in OTHER_ACTIVITIES)]
            rows.append([model, f"{workers:,}", f"{rate:,.0f}", *(f"{share:.0%}" for share in shares)])
    return table(["model", "workers", "rows/s", "of what they can do", *OTHER_ACTIVITIES], rows)


def commits(base: Cluster) -> str:
    """(b) Commits"""
    rows = []
    for workers, commit_s in ((n, s) for n in (1000, 3000) for s in (0.0002, 0.004, 0.02, 0.1)):
        runs = (steady(replace(base, chunk_rows=n, workers=workers, commit_s=commit_s)) for n in SIZES)
        rows.append([f"{workers:,}", f"{commit_s * 1e3:g} ms", *(f"{r.rate_share:.0%}" for r in runs)])
    return table(["workers", "commit", *(f"{n} rows" for n in SIZES)], rows)


def files(base: Cluster) -> str:
    """(c) Many files"""
    rows, work = [], ("check parts", "read again", "merge", "remove parts")
    for n in (64, 128, 512, 2048, 8192, 32_768):
        c = replace(base, chunk_rows=n)
        memory = (f"{c.chunks * size / 1e6:,.0f} MB" for size in (LEDGER_BYTES, LISTING_BYTES))
        seconds = [*(c.outside_s(name) for name in work), n * c.mean_row_s]
        rows.append([f"{n:,}", f"{c.chunks:,}", f"{PART_ROW_BYTES * n / 1e6:.2f} MB", *memory, *map(duration, seconds)])
    return table(["chunk rows", "parts", "a part", "ledger", "listing", *work, "a chunk takes"], rows)


def end(base: Cluster) -> str:
    """(d) The end"""
    rows = []
    for n in (100_000, 1_000_000, 10_000_000, 100_000_000):
        runs = [simulate(replace(base, chunk_rows=size, rows=n)) for size in SIZES]
        rows.append([f"{n:,}", duration(runs[0].ideal), *(f"{r.ideal / r.now:.0%}" for r in runs)])
    return table(["rows", "ideal", *(f"{n} rows" for n in SIZES)], rows)


def losses(base: Cluster) -> str:
    """(e) Lost workers"""
    sizes, rows = (64, 512, 2048, 8192), []
    for hours in (1, 10, 100, 1000):
        c = replace(base, rows=base.workers * 8192 * 6, worker_mtbf_s=hours * 3600.0, node_mtbf_s=inf)
        runs = [simulate(replace(c, chunk_rows=n)) for n in sizes]
        rows.append([f"{hours:,} h", "lost work", *(f"{r.spent['lost work'] / r.now / c.workers:.1%}" for r in runs)])
        rows.append([f"{hours:,} h", "makespan", *(f"{r.now / r.ideal:.2f} x ideal" for r in runs)])
    return table(["a worker's MTBF", "", *(f"{n} rows" for n in sizes)], rows)
