"""batchgen plan: what a run would do, and how long it would take; writes no output."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated

import typer

from batchgen.job import (
    DEFAULT_MODEL,
    WORK,
    EmbedOptions,
    InputOptions,
    Job,
    OutputOptions,
    Policy,
    ScoreInput,
    ScoreOptions,
    WorkOptions,
)
from batchgen.jobs import options, report
from batchgen.jobs.flatten import flatten
from batchgen.jobs.running import check_standard_output, report_page
from batchgen.options import say
from batchgen.review.forecast import Forecast, forecast_job
from batchgen.types import SamplingParams

BINS = 12
BAR = 40  # characters of the longest
SHOWN_END = 150  # characters of a prompt's beginning and of its end

NO_OUTPUT = OutputOptions("")
_EQUAL = {"generate": "greedy requests are generated", "score": "passages are scored", "embed": "texts are embedded"}

Time = Annotated[
    bool, typer.Option(help="Measure the work for some seconds to forecast the time.", rich_help_panel=WORK)
]


@flatten()
def plan(
    *,
    input: InputOptions,
    output: OutputOptions = NO_OUTPUT,
    sampling: SamplingParams,
    policy: Policy,
    work: WorkOptions,
    model: options.Model = DEFAULT_MODEL,
    time: Time = True,
    shown: options.Shown,
) -> None:
    """Say what generate would do with INPUT: rows, rejects, lengths, chunks, memory, time. Writes no output.

    It takes every option of generate; an --output is checked too. The last lines are the first prompts, as the model
    reads them. Exit code 0: every row can be generated; 3: some would be rejected; 4: all would be rejected.

    `batchgen plan score` and `batchgen plan embed` say the same of the commands score and embed.

    Example: batchgen plan prompts.jsonl --model 124M --max-tokens 64
    """
    print_forecast(Job(input, output, model, sampling, policy, work), time, shown)


@flatten(*options.NOT_OF_SCORE)
def plan_score(
    *,
    input: ScoreInput,
    output: OutputOptions = NO_OUTPUT,
    task: ScoreOptions,
    policy: Policy,
    work: WorkOptions,
    model: options.Model = DEFAULT_MODEL,
    time: Time = True,
    shown: options.Shown,
) -> None:
    """Say what score would do with INPUT: rows, rejects, lengths, chunks, memory, time. Writes no output.

    It takes every option of score. The last lines are the first rows, as the model reads them: what is only read, and
    after each | what is scored.

    Example: batchgen plan score texts.jsonl --text-column text --model 124M
    """
    print_forecast(Job(replace(input, task=task), output, model, policy=policy, work=work), time, shown)


@flatten(*options.NOT_OF_EMBED)
def plan_embed(
    *,
    input: ScoreInput,
    output: OutputOptions = NO_OUTPUT,
    task: EmbedOptions,
    policy: Policy,
    work: WorkOptions,
    model: options.Model = DEFAULT_MODEL,
    time: Time = True,
    shown: options.Shown,
) -> None:
    """Say what embed would do with INPUT: rows, rejects, lengths, chunks, memory, time. Writes no output.

    It takes every option of embed. The last lines are the first texts, as the model reads them.

    Example: batchgen plan embed texts.jsonl --model 124M
    """
    print_forecast(Job(replace(input, task=task), output, model, policy=policy, work=work), time, shown)


def print_forecast(job: Job, time: bool, shown: options.Shown) -> None:
    """Check the output, forecast, print; raises the exit code."""
    if job.output.path:
        check_standard_output(job)
    if job.output.path and shown.html_report:
        report_page(job)
    if report.is_stdout(job):
        job = replace(job, output=NO_OUTPUT)
    forecast = forecast_job(job, measure_time=time, show=shown.show)
    if not shown.quiet:
        with report.to_whoever_reads():
            for line in lines(forecast):
                typer.echo(report.one_line(line))
    raise typer.Exit(forecast.exit_code)


def lines(forecast: Forecast) -> Iterator[str]:
    """The forecast, line by line."""
    if forecast.is_complete:
        makes = f"{say('overwrite', True)} makes the output again, as follows"
        yield f"complete: {forecast.task} has nothing to do; {makes}"
    rejected = forecast.rows - forecast.ok - forecast.dropped
    dropped = f", {forecast.dropped:,} to be dropped" if forecast.dropped else ""
    part = f" of the input's {forecast.input_rows:,}" if forecast.rows < forecast.input_rows else ""
    yield (
        f"rows: {forecast.rows:,}{part}: {forecast.ok:,} to {forecast.task}, {rejected:,} to be rejected{dropped}; "
        f"{counted(forecast.output_rows, 'output row')}"
    )
    for reject in sorted(forecast.rejects.values(), key=lambda reject: -reject.rows):
        more = ", ..." if reject.rows > len(reject.places) else ""
        yield f"  {reject.rows:>6,}  {reject.example}  [{', '.join(reject.places)}{more}]"
    if forecast.reuses:
        generated = forecast.ok - forecast.reused - forecast.extended
        yield (
            f"reuse: {forecast.reused:,} rows would be copied, {forecast.extended:,} extended, "
            f"{generated:,} generated anew"
        )
    yield from report.parameter_lines(forecast.row_parameters)
    if forecast.lengths:
        yield from length_lines(forecast.lengths, "prompt tokens" if forecast.task == "generate" else "tokens of rows")
    if forecast.scored:
        yield f"scored: {forecast.scored:,} of these tokens"
    if forecast.shared_tokens or forecast.duplicates:
        yield (
            f"shared: {forecast.shared_tokens:,} prompt tokens are read once instead of several times; "
            f"{forecast.duplicates:,} equal {_EQUAL[forecast.task]} once"
        )
    yield (
        f"work: {counted(len(forecast.chunks), 'chunk')} of up to {forecast.chunk_rows:,} rows; "
        f"{counted(forecast.jobs, 'job')}, up to {forecast.max_batch:,} sequences in flight in each"
    )
    yield f"memory: up to {forecast.memory / 2**30:.1f} GiB, the model's {forecast.precision} weights in it once"
    if forecast.seconds is not None:
        yield time_line(forecast, forecast.seconds)
    if forecast.first:
        yield ""
    for shown in forecast.first:
        windows = f" in {shown.windows} windows, the first" if shown.windows > 1 else ""
        yield f"[{shown.name}] {counted(shown.tokens, 'token')}{windows}: {' | '.join(map(both_ends, shown.texts))}"


def time_line(forecast: Forecast, seconds: float) -> str:
    """How long a run would take, for the tokens that it generates, or reads."""
    tokens = forecast.completion_tokens or forecast.tokens
    return (
        f"time: about {duration(seconds)} for {tokens:,.0f} tokens ({tokens / max(seconds, 1e-9):,.0f} tokens/s), "
        f"as measured here in {forecast.measured_in:.0f} s"
    )


def both_ends(text: str) -> str:
    """Quoted, so that spaces show; of a long prompt, its beginning, and the end that a completion continues."""
    return repr(text) if len(text) <= 2 * SHOWN_END else f"{text[:SHOWN_END]!r} ... {text[-SHOWN_END:]!r}"


def counted(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def length_lines(lengths: Counter[int], name: str = "prompt tokens") -> Iterator[str]:
    """A histogram of the prompts' lengths, or of the rows'."""
    rows, total = lengths.total(), sum(length * n for length, n in lengths.items())
    yield (
        f"{name}: {total:,}; {min(lengths):,} to {max(lengths):,}, median {median(lengths):,}, mean {total / rows:,.0f}"
    )
    low, high = min(lengths), max(lengths)
    width = max(-(-(high - low + 1) // BINS), 1)
    bins = Counter({start: 0 for start in range(low, high + 1, width)})
    for length, n in lengths.items():
        bins[low + (length - low) // width * width] += n
    most = max(bins.values())
    for start, n in sorted(bins.items()):
        bar = "█" * round(BAR * n / most) or ("▏" if n else "")
        yield f"  {start:>5,}-{min(start + width - 1, high):<5,} {bar} {n:,}"


def median(lengths: Counter[int]) -> int:
    left = (lengths.total() + 1) // 2
    for length in sorted(lengths):
        left -= lengths[length]
        if left <= 0:
            return length
    raise ValueError("the median of nothing")


def duration(seconds: float) -> str:
    """42 s, 7 min 5 s, 3 h 20 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"
