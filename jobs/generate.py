"""batchgen generate: prompts in, completions out."""

import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import typer

from batchgen.errors import UsageError
from batchgen.job import DEFAULT_MODEL, InputOptions, Job, OutputOptions, Policy, WorkOptions
from batchgen.jobs import options, report
from batchgen.jobs.fetch import fetch_shown, is_to_be_fetched
from batchgen.jobs.flatten import flatten
from batchgen.jobs.html_report import page_beside
from batchgen.jobs.progress import ProgressStyle, showing_progress
from batchgen.models.model import Model
from batchgen.output.store import is_address
from batchgen.progress import Summary, to_follow
from batchgen.review.report.page import check_page, write_report
from batchgen.run import run_job
from batchgen.types import SamplingParams

logger = logging.getLogger(__name__)


@flatten()
def generate(
    input: InputOptions,
    output: OutputOptions,
    sampling: SamplingParams,
    policy: Policy,
    work: WorkOptions,
    model: options.Model = DEFAULT_MODEL,
    fetch: options.Fetch = True,
    html_report: options.Report = False,
    progress: options.Progress = "auto",
    log_json: options.LogJson = False,
    quiet: options.Quiet = False,
    show: options.Show = 3,
) -> None:
    """Complete every prompt of INPUT; the output has a row for every row of INPUT, in input order.

    To resume an interrupted run, run the same command again; over its own finished output, it says that it is complete.
    What another job made is only replaced with --overwrite. Exit code 0: every row ok; 3: some rows were rejected or
    failed, the output says why; 4: all of them were; 1: the job could not run; 2: usage; 75: run again later.

    Example: batchgen generate prompts.jsonl -o completions.parquet --max-tokens 64 --temperature 0.8
    """
    job = Job(input, output, model, sampling, policy, work)
    check_standard_output(job)
    page = report_page(job) if html_report else None
    to_follow.update({str(Path(output.path)): ""} if page else {})
    style = "none" if quiet else progress
    with report.destination(job) as written, showing_progress(style) as on_progress:
        summary = run_job(written, on_progress=on_progress, open_model=open_or_fetch(style) if fetch else Model.open)
    if report.is_stdout(job):
        summary = replace(summary, output=report.STDOUT)
    if page:
        write_report(Path(output.path), page)
        to_follow.clear()
    if not quiet:
        with report.to_whoever_reads():
            _print_summary(summary, show, page)
    logger.info("finished", extra={"values": {"exit_code": summary.exit_code} | summary.statuses})
    sys.exit(summary.exit_code)


def check_standard_output(job: Job) -> None:
    """Refuse what cannot go to standard output."""
    if report.is_stdout(job) and job.work.backend != "loky":
        raise UsageError("-o -: a cluster's nodes write to a folder that all share; name a file there")
    if report.is_stdout(job) and sys.__stdout__ is None:
        raise UsageError("-o -: standard output is closed; name a file, or redirect it: > completions.jsonl")
    if report.is_stdout(job) and job.output.format == "dataset":
        raise UsageError("-o -: a dataset is a folder of files; name one, such as completions/")


def report_page(job: Job) -> Path:
    """Where the report of a job goes; refuses a job that can have none."""
    path = str(job.output.path)
    if is_address(path) or report.is_stdout(job):
        raise UsageError("--report: a report is about a local output; leave it out, or name a .parquet file")
    page = page_beside(Path(path))
    check_page(Path(path), page)
    return page


def open_or_fetch(style: ProgressStyle) -> Callable[[str], Model]:
    """Open a model, after fetching it if it is one of OpenAI's that is not here yet."""

    def open_model(name: str) -> Model:
        if is_to_be_fetched(name):
            fetch_shown(name, style)
        return Model.open(name)

    return open_model


def _print_summary(summary: Summary, show: int, page: Path | None) -> None:
    to_stdout = summary.output == report.STDOUT
    for line in report.summary_lines(summary):
        typer.echo(line, err=to_stdout)
    if page:
        typer.echo(f"report: {report.one_line(str(page))}")
    if show and summary.rows and not to_stdout and isinstance(summary.output, Path):
        typer.echo("")
        for line in report.sample_lines(summary.output, show):
            typer.echo(line)
