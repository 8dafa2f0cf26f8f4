"""batchgen report: the outcome of a run, as one HTML page."""

from pathlib import Path
from typing import Annotated

import typer

from batchgen.errors import UsageError
from batchgen.jobs import report as terminal
from batchgen.output.store import refuse_address
from batchgen.review.report.page import write_report


def report(
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="A Parquet file that batchgen wrote.")],
    page: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where the page goes; without it, beside OUTPUT as .html.")
    ] = None,
) -> None:
    """Write a report on OUTPUT: lengths, speed, rejects, samples and how to make it again, as one HTML page.

    The page is self-contained: no network, no scripts. The speed is read from OUTPUT.status.json, if the run left one.

    Example: batchgen report completions.parquet -o report.html
    """
    refuse_address(output, "a report")
    if not Path(output).name:
        raise UsageError(f"{output!r} is not a file name; name a Parquet file that batchgen wrote")
    page = page or page_beside(Path(output))
    write_report(Path(output), page)
    with terminal.to_whoever_reads():
        typer.echo(f"report: {terminal.one_line(str(page))}")


def page_beside(output: Path) -> Path:
    return output.with_suffix(".html")
