"""Output of the commands: a summary and some rows at the end; texts made safe for a terminal."""

import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa

from batchgen.errors import OutputError
from batchgen.files import JsonObject as Row
from batchgen.job import Job
from batchgen.output.parts import open_parquet
from batchgen.progress import Scores, Summary, to_follow, words_of
from batchgen.types import Kind, RowParameters

STDOUT = Path("-")
REASONSSHOWN = 8
CHOICESSHOWN = 8  # of a row
# columns to show, besides row, id, status and error
SHOWN: dict[Kind, tuple[str, ...]] = {
    "generate": ("prompt", "completion"),
    "text": ("text", "tokens", "perplexity"),
    "completion": ("prompt", "completion", "logprob", "greedy"),
    "choices": ("prompt", "choices", "logprobs", "best"),
    "embed": ("text", "prompt_tokens"),
}


@contextmanager
def to_whoever_reads() -> Iterator[None]:
    """Print about a finished job; a reader that has gone away (`| head -1`) does not change how the job ended."""
    try:
        yield
        sys.stdout.flush()
    except OSError:
        discard_stdout()


def is_stdout(job: Job) -> bool:
    return str(job.output.path) == str(STDOUT)


@contextmanager
def destination(job: Job) -> Iterator[Job]:
    """The job to run; for output `-`, one into a temporary file that is copied to standard output if it ends well."""
    if not is_stdout(job):
        yield job
        return
    with TemporaryDirectory(prefix="batchgen-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "stdout.jsonl"
        to_follow[str(path)] = "nothing is kept of a run to standard output; name a file for one that resumes"
        yield replace(job, output=replace(job.output, path=path, status=False))
        _copy_to_stdout(path)


def _copy_to_stdout(path: Path) -> None:
    with to_stdout("; name a file instead"), open(path, "rb") as file:
        shutil.copyfileobj(file, sys.stdout.buffer)


@contextmanager
def to_stdout(remedy: str = "") -> Iterator[None]:
    """Print; a reader that has gone away (`| head -1`) ends it well."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        discard_stdout()
    except OSError as error:
        discard_stdout()
        raise OutputError(f"-: standard output cannot be written: {error.strerror}{remedy}") from error


def discard_stdout() -> None:
    """Send standard output to /dev/null, so that it is not flushed again at exit."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def one_line(text: str) -> str:
    r"""Escape unprintable characters (a line feed becomes \n): nothing breaks the line or moves the cursor."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def harmless(text: str) -> str:
    """Text of many lines, without control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def summary_lines(summary: Summary) -> Iterator[str]:
    """Rows by status, tokens and speed, where the output is."""
    samples = "" if summary.rows == summary.input_rows else f" from {summary.input_rows:,} prompts"
    resumed = f" ({summary.resumed:,} of them by an earlier run)" if summary.resumed else ""
    dropped = f", {summary.dropped:,} dropped" if summary.dropped else ""
    left_out = f"; {summary.left_out:,} of them are left out of the output" if summary.left_out else ""
    yield (
        f"{summary.rows:,} rows{samples}: {summary.ok:,} ok, {summary.rejected:,} rejected, "
        f"{summary.failed:,} failed{dropped}{resumed}{left_out}"
    )
    for reason in summary.reasons[:REASONSSHOWN]:
        more = ", ..." if reason.rows > 1 else ""
        yield one_line(f"  {reason.rows:>6,}  {reason.text}  [{reason.place}{more}]")
    if left := sum(reason.rows for reason in summary.reasons[REASONSSHOWN:]):
        yield f"  {left:>6,}  for other reasons: the column error has them"
    if summary.complete:
        yield "complete: there was nothing to do, and nothing was changed; --overwrite makes it again"
        yield f"output: {one_line(str(summary.output))}"
        return
    if summary.reuses:
        copied = f"{summary.reused:,} rows copied, {summary.extended:,} extended"
        yield f"reuse: {copied}, {summary.anew:,} generated anew"
    if summary.scores:
        yield from score_lines(summary.scores)
    speed = f"{summary.tokens / max(summary.seconds, 1e-9):,.0f} tokens/s"
    jobs = f"{summary.jobs} job{'s' if summary.jobs > 1 else ''}"
    yield f"{_work(summary)} in {summary.seconds:.1f} s: {speed} ({jobs}; {summary.precision})"
    if summary.space_ends:
        what = "1 prompt ends" if summary.space_ends == 1 else f"{summary.space_ends:,} prompts end"
        remedy = "--heal joins it to the next word, --trim removes it"
        yield f"note: {what} in a space, from which GPT-2 continues badly; {remedy}"
    if summary.special_texts:
        what = "1 prompt has" if summary.special_texts == 1 else f"{summary.special_texts:,} prompts have"
        yield f"note: {what} special tokens, such as <|endoftext|>, as text; --special-tokens parse makes them tokens"
    yield from parameter_lines(summary.row_parameters)
    yield f"output: {one_line(str(summary.output))}"


def merge_lines(summary: Summary, shards: int) -> Iterator[str]:
    """Rows by status, and where the output of so many shards is."""
    if summary.complete:
        yield from summary_lines(summary)
        return
    yield next(summary_lines(replace(summary, resumed=0)))
    yield f"merged: {shards:,} shard{'' if shards == 1 else 's'}"
    yield f"output: {one_line(str(summary.output))}"


def _work(summary: Summary) -> str:
    """The tokens of this run; of scores and embeddings, all that were read count for its speed."""
    if summary.task == "generate":
        return f"{summary.prompt_tokens:,} tokens in, {summary.completion_tokens:,} out"
    scored = f", {summary.completion_tokens:,} of them scored," if summary.task == "score" else ""
    return f"{summary.tokens:,} tokens read{scored}"


def score_lines(scores: Scores) -> Iterator[str]:
    """What the scores of all rows come to."""
    found = scores.measures()
    if "perplexity" in found:
        by_byte = f", {found['bits_per_byte']:.4f} bits per byte" if "bits_per_byte" in found else ""
        yield f"perplexity {found['perplexity']:,.3f}{by_byte} ({scores.tokens:,} tokens, {scores.bytes:,} bytes)"
    if "logprob" in found:
        greedy = f"{scores.greedy:,} of {scores.rows:,} greedy"
        yield f"log-probability {found['logprob']:,.3f}, {found['mean_logprob']:,.3f} a row; {greedy}"
    if scores.answered:
        each = (found[name] for name in ("accuracy", "accuracy_by_token", "accuracy_by_byte"))
        names = "{:.2%}, by token {:.2%}, by byte {:.2%}".format(*each)
        yield f"accuracy {names} ({scores.answered:,} rows with an answer)"


def parameter_lines(found: RowParameters) -> Iterator[str]:
    """Which columns of the input are parameters, and which are not although they have the names of some."""
    if names := ", ".join(sorted(found.taken)):
        what = (
            f"columns {names} are taken as parameters"
            if len(found.taken) > 1
            else f"column {names} is taken as a parameter"
        )
        yield f"note: {what}; --no-row-params ignores {'them' if len(found.taken) > 1 else 'it'}"
    for escape, rows in found.escaped.items():
        where = "1 row" if rows == 1 else f"{rows:,} rows"
        yield f"note: {escape} in the stop strings of {where} is a backslash and a letter; write the character itself"
    for folder in found.folders[:3]:
        yield f"note: the folder {folder} is no parameter here; for that, name a folder above it or quote the pattern"
    if names := ", ".join(found.results):
        yield f"note: the input is an output of batchgen, with its results in {names}: they are not taken as parameters"


def sample_lines(output: Path, n: int, kind: Kind = "generate") -> Iterator[str]:
    """The first n rows of the output, a paragraph each; the output is complete, whether they can be shown or not."""
    try:
        rows = _first_rows(output, n, SHOWN[kind])
    except (OSError, ValueError, pa.ArrowException) as error:
        yield one_line(f"note: the first rows cannot be shown ({words_of(error)})")
        return
    yield from (row_line(row, kind) for row in rows)


def row_line(row: Row, kind: Kind) -> str:
    """An output row in short: which one it is, and what came out."""
    name = row["id"] if row["id"] is not None else f"row {row.get('row', '?')}"
    what = _outcome(row, kind) if row["status"] == "ok" else f"{row['status']}: {printable(row['error'] or '')}"
    return f"[{printable(name)}] {what}"


def _outcome(row: Row, kind: Kind) -> str:
    """What an ok row says; the best of its choices first."""
    if kind == "text":
        return f"perplexity {row['perplexity']:,.2f} ({row['tokens']:,} tokens): {printable(row['text'])}"
    if kind == "embed":
        return f"{row['prompt_tokens']:,} tokens: {printable(row['text'])}"
    if kind == "choices":
        scored = list(zip(row["choices"], row["logprobs"], strict=True))
        scored.insert(0, scored.pop(row["best"]))
        found = "; ".join(f"{printable(text.strip(), 80)} ({logprob:.2f})" for text, logprob in scored[:CHOICESSHOWN])
        more = f"; ... and {len(scored) - CHOICESSHOWN:,} more" if len(scored) > CHOICESSHOWN else ""
        return f"{printable(row['prompt'])} -> {found}{more}"
    scores = f" ({row['logprob']:.2f}{', greedy' if row['greedy'] else ''})" if kind == "completion" else ""
    return f"{printable(row['prompt'])} ->{printable(row['completion'])}{scores}"


def _first_rows(output: Path, n: int, columns: Sequence[str]) -> list[Row]:
    if output.is_dir():
        output = min(output.glob("*.parquet"), default=output)
    if output.suffix.lower() == ".jsonl":
        with open(output, encoding="utf-8") as file:
            lines = [json.loads(line) for line in islice(file, n)]
        return list(islice((row for line in lines for row in rows_of_line(line)), n))
    with open(output, "rb") as raw, open_parquet(raw) as table:
        names = ["row", "id", "status", "error", *columns]
        rows: list[Row] = next(table.iter_batches(n, columns=names, use_threads=False)).to_pylist()
    return rows


def rows_of_line(line: Row) -> list[Row]:
    """A line is a row; an OpenAI answer is a row for each of its choices, which do not hold the prompt."""
    if "row" in line:  # OpenAI answers have none; a row may carry a custom_id
        return [line]
    row = {"id": line["custom_id"], "status": "ok", "prompt": "..."}
    if line["response"] is None:
        return [row | {"status": line["error"]["code"], "error": line["error"]["message"]}]
    body = line["response"]["body"]
    if "error" in body:
        return [row | {"status": "rejected", "error": body["error"]["message"]}]
    return [row | {"completion": choice["text"]} for choice in body["choices"]]


def printable(text: str, limit: int = 400) -> str:
    """One line of bounded length, without control characters."""
    shown = "".join(c if c.isprintable() else " " for c in text[: limit + 1])
    return shown if len(shown) <= limit else shown[:limit] + "..."
