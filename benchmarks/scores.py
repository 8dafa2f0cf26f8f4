"""Scores of given texts, beside transformers' and CTranslate2's: python -m benchmarks.scores [--texts N].

A random model of 124M's shape scores texts of random words, each of them one token, after <|endoftext|>. batchgen is
`batchgen score` as a user starts it: its time is that of the whole command. The time of a peer, in a process and an
environment of its own, is that of its forward passes: it is given token ids, and its start does not count. "float32 is"
and "int8 is" say how many times as fast batchgen is in these precisions; the difference is the largest of a token's
log-probability from batchgen's in float32. Then multiple choice: rows with one long prompt in common, with the prompt
shared and not.

Needs Linux. Models, environments and logs are kept in .bench/, as those of bench.py.
"""

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from batchgen import __version__
from batchgen.models.model import Model
from batchgen.text.tokenizer import END_OF_TEXT, Tokenizer
from batchgen.types import Precision
from benchmarks.machine import available_cores, clean_environment, describe, without_blas_variables
from benchmarks.models import batchgen_model
from benchmarks.peers.scoring import LogProbs, ScoreJob, Texts
from benchmarks.systems import ROOT, SYSTEMS, MissingError, Options, install, peer_environment, run_logged

PRECISIONS = get_args(Precision)
PREFIX, QUESTION, CHOICE, N_CHOICES = 800, 20, 5, 4  # tokens of a row of multiple choice
TUNING = 32  # texts
SCRIPTS = {  # of a peer: its script, and the settings that are tried on a few texts
    "transformers-float32": (
        "score_transformers",
        [{"processes": 2, "batch_size": 8}, {"processes": 2, "batch_size": 4}, {"processes": 1, "batch_size": 8}],
    ),
    "ct2-float32": ("score_ctranslate2", [{"inter_threads": n, "max_batch_size": 8} for n in (2, 1)]),
    "ct2-int8": ("score_ctranslate2", [{"inter_threads": n, "max_batch_size": 8} for n in (2, 1)]),
}


@dataclass(slots=True)
class Measured:
    """The result of one system."""

    system: str
    texts: int = 0
    tokens: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0
    log_probs: LogProbs = field(default_factory=list)
    settings: str = ""
    missing: str = ""

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


class Words:
    """Texts of random words, each of which is one token with the space before it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.rng = tokenizer, np.random.default_rng(0)
        named = ((token, id) for token, id in tokenizer.encoder.items() if re.fullmatch("Ġ[a-z]{2,}", token))
        self.ids = [id for token, id in named if tokenizer.encode(f" {token[1:]}") == [id]]

    def text(self, n: int) -> str:
        text: str = self.tokenizer.decode(self.rng.choice(self.ids, n).tolist())
        return text

    def tokens(self, text: str) -> list[int]:
        return [self.tokenizer.encoder[END_OF_TEXT], *self.tokenizer.encode(text)]


def main() -> None:
    args = parse_arguments()
    without_blas_variables("benchmarks.scores")
    args.cache = args.cache.resolve()
    args.cache.mkdir(parents=True, exist_ok=True)
    print(f"{describe(args.jobs)}; batchgen {__version__}\n", flush=True)
    with tempfile.TemporaryDirectory(dir=args.cache) as scratch:
        words = Words(Model.load(batchgen_model(args.cache)).load_tokenizer())
        print("\n".join(compare_texts(words, args, Path(scratch))), flush=True)
        print("\n".join(compare_choices(words, args, Path(scratch))), flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--peer-texts", type=int, help="of these, for the peers; default: all")
    parser.add_argument("--length", type=int, default=200, help="tokens of a text")
    parser.add_argument("--rows", type=int, default=50, help="rows of multiple choice; 0: none")
    parser.add_argument("--peers", default=",".join(SCRIPTS), help="of these; empty: none")
    parser.add_argument("--jobs", type=int, default=available_cores(), help="cores for each system")
    parser.add_argument("--limit", type=float, default=1800, help="end a system after this many seconds")
    tune = "try a peer's settings on a few texts, or take the first"
    parser.add_argument("--tune", action=argparse.BooleanOptionalAction, default=True, help=tune)
    parser.add_argument("--cache", type=Path, default=ROOT / ".bench")
    return parser.parse_args()


# --- texts -----------------------------------------------------------------------------------------------------


def compare_texts(words: Words, args: argparse.Namespace, scratch: Path) -> Iterator[str]:
    texts = [words.text(args.length) for _ in range(args.texts)]
    ids = [words.tokens(text) for text in texts]
    assert {len(tokens) for tokens in ids} == {1 + args.length}
    rows = write_rows(scratch / "texts.jsonl", [{"text": text} for text in texts])
    few = write_rows(scratch / "few.jsonl", [{"text": text} for text in texts[: 4 * args.jobs]])
    found = [score_texts(rows, few, precision, args) for precision in PRECISIONS]
    peers = filter(None, args.peers.split(","))
    found += [score_peer(name, ids[: args.peer_texts], args, scratch) for name in peers]
    yield f"Texts of {args.length} tokens, all scored, {args.jobs} cores\n"
    yield "| system | texts | texts/s | tokens/s | float32 is | int8 is | peak GiB | difference | settings |"
    yield "|---" + "|--:" * 7 + "|---|"
    yield from (cells(row, found[: len(PRECISIONS)]) for row in found)


def score_texts(rows: Path, few: Path, precision: Precision, args: argparse.Namespace) -> Measured:
    try:
        run_batchgen(few, precision, [], args)  # at the first use weights are rounded and kernels compiled
        done = run_batchgen(rows, precision, ["--per-token"], args)
    except MissingError as error:
        return report(Measured(f"batchgen {precision}", missing=str(error)))
    tokens = sum(done.table["tokens"].to_pylist())
    log_probs = done.table["token_logprobs"].to_pylist()
    settings = f"batchgen score --jobs {args.jobs}, all of it"
    return report(
        Measured(f"batchgen {precision}", len(done.table), tokens, done.seconds, done.peak_bytes, log_probs, settings)
    )


def score_peer(name: str, texts: Texts, args: argparse.Namespace, scratch: Path) -> Measured:
    try:
        install(SYSTEMS[name], args.cache)
        answer, peak = run_peer(name, texts, best_options(name, texts, args, scratch), args, scratch)
    except MissingError as error:
        return report(Measured(name, missing=str(error)))
    tokens = sum(map(len, answer["log_probs"]))
    settings = f"{answer['version']}; {answer['settings']}"
    return report(Measured(name, len(texts), tokens, answer["seconds"], peak, answer["log_probs"], settings))


def best_options(name: str, texts: Texts, args: argparse.Namespace, scratch: Path) -> Options:
    """The fastest settings for a few texts."""
    choices = [SYSTEMS[name].options | options for options in SCRIPTS[name][1]]
    if not args.tune:
        return choices[0]
    seconds = [run_peer(name, texts[:TUNING], options, args, scratch)[0]["seconds"] for options in choices]
    return choices[seconds.index(min(seconds))]


def run_peer(
    name: str, texts: Texts, options: Options, args: argparse.Namespace, scratch: Path
) -> tuple[dict[str, Any], int]:
    """The answer of a peer's script, and its peak memory."""
    system, path = SYSTEMS[name], scratch / f"{name}.json"
    ScoreJob(str(system.model(system, args.cache)), texts, args.jobs, options).write(path)
    command = [str(system.python(args.cache)), "-m", f"benchmarks.peers.{SCRIPTS[name][0]}", str(path)]
    log = args.cache / "logs" / f"scores-{name}.log"
    output, peak = run_logged(command, log, peer_environment(system, args.jobs, args.cache), args.limit)
    return json.loads(output), peak


def report(row: Measured) -> Measured:
    done = f"missing: {row.missing}" if row.missing else f"{row.texts} texts, {row.rate:,.0f} tokens/s"
    print(f"{row.system}: {done}", file=sys.stderr, flush=True)
    return row


def cells(row: Measured, ours: list[Measured]) -> str:
    """A line of the table; `ours` is batchgen in each precision."""
    if row.missing:
        return f"| {row.system} | missing |{' |' * 6} {row.missing.replace('|', '/')} |"
    times = (f"{our.rate / row.rate:.2f}x" if our.rate else "" for our in ours)
    values = (
        row.system,
        f"{row.texts:,}",
        f"{row.texts / row.seconds:.1f}",
        f"{row.rate:,.0f}",
        *times,
        f"{row.peak_bytes / 2**30:.2f}",
        largest_difference(ours[0], row),
        row.settings,
    )
    return f"| {' | '.join(values)} |"


def largest_difference(a: Measured, b: Measured) -> str:
    """Of a token's log-probability; a system may have scored the first of the texts alone."""
    if a is b or a.missing:
        return ""
    pairs = zip(a.log_probs, b.log_probs, strict=False)
    return f"{max(float(np.abs(np.subtract(x, y)).max()) for x, y in pairs):.1e}"


# --- multiple choice -------------------------------------------------------------------------------------------


def compare_choices(words: Words, args: argparse.Namespace, scratch: Path) -> Iterator[str]:
    if not args.rows:
        return
    prefix = words.text(PREFIX)
    rows = [
        {"prompt": prefix + words.text(QUESTION), "choices": [words.text(CHOICE) for _ in range(N_CHOICES)]}
        for _ in range(args.rows)
    ]
    path = write_rows(scratch / "choices.jsonl", rows)
    yield (
        f"\n{args.rows} rows of {N_CHOICES} choices of {CHOICE} tokens; prompts of {PREFIX} tokens that all have and "
        f"{QUESTION} of their own; `batchgen score --jobs {args.jobs}`\n"
    )
    yield "| | shared, s (run) | --no-share-prefixes, s (run) | shared is (run) | same bits |\n|---|--:|--:|--:|---|"
    for precision in PRECISIONS:
        yield choices_line(path, precision, args)


def choices_line(rows: Path, precision: Precision, args: argparse.Namespace) -> str:
    options = ["--choices-column", "choices", "--per-token"]
    try:
        shared = run_batchgen(rows, precision, options, args)
        alone = run_batchgen(rows, precision, [*options, "--no-share-prefixes"], args)
    except MissingError as error:
        return f"| {precision} | missing: {str(error).replace('|', '/')} | | | |"
    times = (f"{done.seconds:.1f} ({done.run_seconds:.1f})" for done in (shared, alone))
    faster = f"{alone.seconds / shared.seconds:.1f}x ({alone.run_seconds / shared.run_seconds:.1f}x)"
    return f"| {precision} | {' | '.join(times)} | {faster} | {'yes' if shared.table.equals(alone.table) else 'no'} |"


# --- batchgen --------------------------------------------------------------------------------------------------


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


@dataclass(frozen=True, slots=True)
class Done:
    """One command, from its start to its end."""

    table: pa.Table  # its output
    seconds: float
    run_seconds: float  # according to its status file
    peak_bytes: int  # of its processes together


def run_batchgen(rows: Path, precision: Precision, options: list[str], args: argparse.Namespace) -> Done:
    """Run `batchgen score`; raises MissingError with the reason if it fails, or if a row has no scores."""
    with tempfile.TemporaryDirectory(dir=args.cache) as folder:
        output = Path(folder, "scores.parquet")
        command = [sys.executable, "-m", "batchgen", "score", str(rows), "-o", str(output), *options]
        command += ["--model", str(batchgen_model(args.cache)), "--precision", precision, "--jobs", str(args.jobs)]
        log = args.cache / "logs" / f"scores-batchgen-{precision}.log"
        start = time.perf_counter()
        _, peak = run_logged(command, log, clean_environment(), args.limit)
        seconds = time.perf_counter() - start
        status = json.loads(Path(f"{output}.status.json").read_text(encoding="utf-8"))
        return Done(pq.read_table(output), seconds, status["seconds"], peak)


if __name__ == "__main__":
    main()
