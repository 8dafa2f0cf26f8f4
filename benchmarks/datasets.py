"""Datasets that grow: rows taken over, shards merged, a run looked at: python -m benchmarks.datasets [--rows N].

The old output, the shards and the unfinished run are written as a run writes them, but with made-up completions:
nothing is generated, and only the commands count. Each is timed as a user starts it, from its start to its end, and its
memory is the peak of all its processes together. Then the law: eight shards, merged, are one run in every byte of every
column, here with completions that are generated.

Needs Linux, and for a million rows about 2 GB in the folder for temporary files.
"""

import argparse
import hashlib
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from batchgen import __version__
from batchgen.engine.sequence import Completion
from batchgen.input.kept import kept_columns
from batchgen.input.prompts import Cut, Prompts
from batchgen.input.validation import make_check
from batchgen.job import InputOptions, Job, WorkOptions
from batchgen.models.model import Model
from batchgen.output.ledger import open_ledger
from batchgen.output.outputs import open_output
from batchgen.output.parts import with_receipt, write_part
from batchgen.planning import Setting, make_plan, select
from batchgen.text.tokenizer import Tokenizer
from batchgen.types import Chunk, OutputRow, Precision, SamplingParams, TokenizedRequest
from batchgen.workers.complete import completed_row, to_prompts
from batchgen.workers.worker import make_receipt
from benchmarks.machine import available_cores, clean_environment, instruction_sets, processor, without_blas_variables
from benchmarks.systems import run_logged

SHARDS = 8
ROWS_OF_PART = 20
NEW_ROWS = 100  # of a grown input
TEXTS = 64  # made-up completions
LIMIT = 1800.0  # seconds of a command
SAMPLING = SamplingParams(max_tokens=32, temperature=0.8, seed=1)
OPTIONS = ("--max-tokens", "32", "--temperature", "0.8", "--seed", "1")
LAW = ("--n", "2", "--max-tokens", "16", "--temperature", "0.9", "--top-p", "0.95", "--seed", "7")
PARTS = ("reuse", "merge", "peek", "law")


# ---- runs whose completions are made up


class Writer:
    """Rows with made-up completions, which the tokenizer could have written."""

    def __init__(self, tokenizer: Tokenizer, sampling: SamplingParams) -> None:
        self.tokenizer, self.sampling = tokenizer, sampling
        rng = np.random.default_rng(0)
        self.texts = [tuple(map(int, rng.integers(0, 256, sampling.max_tokens))) for _ in range(TEXTS)]

    def rows(self, chunk: Chunk) -> list[OutputRow]:
        return [row for item in chunk.items if isinstance(item, TokenizedRequest) for row in self._rows_of(item)]

    def _rows_of(self, request: TokenizedRequest) -> Iterator[OutputRow]:
        (prompt,) = to_prompts(request, self.tokenizer)
        for sample, seed in enumerate(prompt.seeds):
            made = Completion(request.row, sample, self.texts[(request.row + sample) % TEXTS], "length")
            yield completed_row(request, made, self.tokenizer, seed, self.sampling)


@contextmanager
def made_up_run(job: Job) -> Iterator[Callable[[], None]]:
    """Hold a run of the job with all its chunks committed; what it yields publishes the output."""
    prompts, model = Prompts.open(job.input), Model.open(job.model)
    tokenizer = model.load_tokenizer()
    output, facts = open_output(job, prompts, lambda: tokenizer), prompts.scan()
    rows = output.rows_to_do(select(job, facts))
    writer = Writer(tokenizer, job.sampling)
    with open_ledger(output.path) as ledger:
        plan = output.claim(ledger, *make_plan(job, facts, model, Setting(rows.count, 1, output.format)), False)
        columns = output.columns(facts, plan, model.config.n_embd)
        check = make_check(tokenizer, model.config.n_ctx, job.policy, plan.options())
        cut = Cut.for_output(plan.format, plan.chunk_rows, rows.numbers)
        for chunk in prompts.chunks(facts, job.sampling, check, cut):
            path, made = ledger.attempt / f"{chunk.index}.parquet", writer.rows(chunk)
            receipt = make_receipt(chunk, made, path, plan.digest)
            schema = with_receipt(columns.schema(kept_columns(chunk, ()).schema), receipt)
            ledger.commit(replace(receipt, sha256=write_part(made, path, schema)))
        yield lambda: output.publish(ledger, plan, columns.schema(facts.kept), rows.count)


def make_output(job: Job) -> Path:
    with made_up_run(job) as publish:
        publish()
    return Path(job.output.path)


def write_prompts(path: Path, rows: int) -> Path:
    with open(path, "w", encoding="utf-8") as file:
        for row in range(rows):
            file.write(json.dumps({"prompt": f"The {row}. daughter of the king said", "id": f"row-{row}"}) + "\n")
    return path


# ---- commands


@dataclass(frozen=True, slots=True)
class Done:
    """A command from its start to its end; memory in bytes."""

    what: str
    rows: int
    seconds: float
    peak: int

    @property
    def line(self) -> str:
        rows, rate = (f"{self.rows:,}", f"{self.rows / self.seconds:,.0f}") if self.rows else ("", "")
        return f"| {self.what} | {rows} | {self.seconds:.2f} | {rate} | {self.peak / 2**20:,.0f} |"


def run(what: str, rows: int, *arguments: object, folder: Path) -> Done:
    """Run batchgen; a command that fails ends the benchmark with its last words."""
    command = [sys.executable, "-m", "batchgen", *map(str, arguments)]
    begin = time.perf_counter()
    _, peak = run_logged(command, folder / "log", clean_environment(), LIMIT)
    return Done(what, rows, time.perf_counter() - begin, peak)


def generate(what: str, rows: int, prompts: Path, out: Path, *options: object, jobs: int) -> Done:
    quiet = ("--jobs", jobs, "--progress", "none", "--show", "0", "--no-status")
    return run(what, rows, "generate", prompts, "-o", out, *quiet, *options, folder=out.parent)


def digests(path: Path, rows: int | None = None) -> dict[str, str]:
    """By column, the hash of its bytes in Arrow's format, of the first rows."""
    table, found = pq.read_table(path), {}
    first = pa.array(np.arange(table.num_rows if rows is None else rows))
    for name in table.column_names:
        one = table.select([name]).take(first).combine_chunks()  # a slice would be written with more than its own bytes
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, one.schema.remove_metadata()) as stream:
            stream.write_table(one)
        found[name] = hashlib.sha256(sink.getvalue()).hexdigest()
    return found


def check_same(a: Path, b: Path, rows: int | None = None) -> int:
    """The number of columns, which must all be the same bytes."""
    first, second = digests(a, rows), digests(b, rows)
    differing = [name for name in first | second if first.get(name) != second.get(name)]
    if differing:
        raise SystemExit(f"{a.name} and {b.name} differ in {', '.join(differing)}")
    return len(first)


# ---- what is measured


def measure_reuse(folder: Path, args: argparse.Namespace) -> Iterator[str]:
    """A tenth of the rows, then all: memory must not grow with them. NEW_ROWS more at the end are generated."""
    for rows in (args.rows // 10, args.rows):
        old = make_output(Job(write_prompts(folder / "old.jsonl", rows), folder / "old.parquet", sampling=SAMPLING))
        grown, out = write_prompts(folder / "new.jsonl", rows + NEW_ROWS), folder / "new.parquet"
        what = f"`generate --reuse`: {NEW_ROWS} rows are new"
        yield generate(what, rows, grown, out, *OPTIONS, "--reuse", old, jobs=args.jobs).line
        check_same(old, out, rows)
        for path in (old, out):
            path.unlink()


def measure_merge(folder: Path, args: argparse.Namespace) -> Iterator[str]:
    prompts = write_prompts(folder / "prompts.jsonl", args.rows)
    (folder / "shards").mkdir()
    shards = [
        make_output(
            Job(InputOptions(prompts, shard=(k, SHARDS)), folder / "shards" / f"{k}.parquet", sampling=SAMPLING)
        )
        for k in range(1, SHARDS + 1)
    ]
    out = folder / "merged.parquet"
    yield run(f"`merge` of {SHARDS} shards", args.rows, "merge", *shards, "-o", out, folder=folder).line
    check_same(out, make_output(Job(prompts, folder / "whole.parquet", sampling=SAMPLING)))


def measure_peek(folder: Path, args: argparse.Namespace) -> Iterator[str]:
    rows = args.parts * ROWS_OF_PART
    out = folder / "unfinished.parquet"
    prompts = write_prompts(folder / "prompts.jsonl", rows)
    with made_up_run(Job(prompts, out, sampling=SAMPLING, work=WorkOptions(chunk_rows=ROWS_OF_PART))):
        for options in (["--table"], ["--json", "--rows", "10"], ["--json", "--row", str(rows // 2)]):
            what = f"`peek {' '.join(options)}`: {args.parts:,} parts"
            yield run(what, 0, "peek", out, *options, folder=folder).line


def prove_shards(folder: Path, args: argparse.Namespace) -> Iterator[str]:
    """One run, and SHARDS runs that are merged."""
    prompts = write_prompts(folder / "prompts.jsonl", args.prompts)
    for precision in get_args(Precision):
        options = (*LAW, "--precision", precision)
        whole, out = folder / f"{precision}.parquet", folder / f"{precision}-merged.parquet"
        yield generate(f"one run, {precision}", args.prompts, prompts, whole, *options, jobs=args.jobs).line
        shards = [folder / f"{precision}-{k}.parquet" for k in range(1, SHARDS + 1)]
        for k, shard in enumerate(shards, 1):
            generate("", args.prompts, prompts, shard, *options, "--shard", f"{k}/{SHARDS}", jobs=args.jobs)
        run("", args.prompts, "merge", *shards, "-o", out, folder=folder)
        columns = check_same(whole, out)
        yield f"| {SHARDS} shards of it, merged: all {columns} columns are the same bytes | {args.prompts:,} | | | |"


MEASURES: dict[str, Callable[[Path, argparse.Namespace], Iterator[str]]] = dict(
    zip(PARTS, (measure_reuse, measure_merge, measure_peek, prove_shards), strict=True)
)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.datasets", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("parts_to_do", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--rows", type=int, default=1_000_000, help="of reuse and merge")
    parser.add_argument("--parts", type=int, default=10_000, help="of the run that peek looks at")
    parser.add_argument("--prompts", type=int, default=2_000, help="of the law, two samples each")
    parser.add_argument("--jobs", type=int, default=available_cores())
    args = parser.parse_args(arguments)
    if unknown := [name for name in args.parts_to_do if name not in PARTS]:
        parser.error(f"{unknown[0]!r} is not one of {', '.join(PARTS)}")
    return args


def main(arguments: list[str]) -> None:
    args = parse(arguments)
    versions: dict[str, Any] = {"batchgen": __version__, "pyarrow": pa.__version__, "Python": platform.python_version()}
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    print(f"{processor()} ({instruction_sets()}), {args.jobs} of {available_cores()} cores; {named}\n")
    print("| | rows | s | rows/s | peak MB |\n|---|--:|--:|--:|--:|", flush=True)
    for name in args.parts_to_do or PARTS:
        with TemporaryDirectory() as folder:
            for line in MEASURES[name](Path(folder), args):
                print(line, flush=True)


if __name__ == "__main__":
    without_blas_variables("benchmarks.datasets")
    main(sys.argv[1:])
