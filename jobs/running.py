"""A job run for people: its model fetched, progress on standard error, then the summary, and its exit code."""

import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import typer

from batchgen.errors import UsageError
from batchgen.job import Job
from batchgen.jobs import report
from batchgen.jobs.fetch import fetch_shown, is_to_be_fetched
from batchgen.jobs.html_report import page_beside
from batchgen.jobs.options import Shown
from batchgen.jobs.progress import ProgressStyle, showing_progress
from batchgen.models.model import Model
from batchgen.output.store import is_address
from batchgen.progress import Summary, to_follow
from batchgen.review.report.page import check_page, write_report
from batchgen.run import run_job
from batchgen.types import Kind

logger = logging.getLogger(__name__)


def run_shown(job: Job, shown: Shown) -> NoReturn:
    """Run the job and end with its exit code."""
    check_standard_output(job)
    page = report_page(job) if shown.html_report else None
    style = "none" if shown.quiet else shown.progress
    open_model = open_or_fetch(style) if shown.fetch else Model.open
    to_follow.update({str(Path(job.output.path)): ""} if page else {})
    with report.destination(job) as written, showing_progress(style) as on_progress:
        summary = run_job(written, on_progress=on_progress, open_model=open_model)
    if report.is_stdout(job):
        summary = replace(summary, output=report.STDOUT)
    if page:
        write_report(Path(job.output.path), page)
        to_follow.clear()
    if not shown.quiet:
        with report.to_whoever_reads():
            _print_summary(summary, job.kind, shown.show, page)
    logger.info("finished", extra={"values": {"exit_code": summary.exit_code} | summary.statuses})
    sys.exit(summary.exit_code)


def check_standard_output(job: Job) -> None:
    """Refuse what cannot go to standard output."""
    if report.is_stdout(job) and job.work.backend != "loky":
        raise UsageError("-o -: a cluster's nodes write to a folder that all share; name a file there")
    if report.is_stdout(job) and sys.__stdout__ is None:
        raise UsageError("-o -: standard output is closed; name a file, or redirect it: > completions.jsonl")
    if report.is_stdout(job) and (job.output.metrics or job.output.lineage):
        raise UsageError("-o -: --metrics and --lineage name the output; name a file, or leave them out")
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


def _print_summary(summary: Summary, kind: Kind, show: int, page: Path | None) -> None:
    to_stdout = summary.output == report.STDOUT
    for line in report.summary_lines(summary):
        typer.echo(line, err=to_stdout)
    if page:
        typer.echo(f"report: {report.one_line(str(page))}")
    if show and summary.rows and not to_stdout and isinstance(summary.output, Path):
        typer.echo("")
        for line in report.sample_lines(summary.output, show, kind):
            typer.echo(line)
