"""batchgen report: the outcome of a run, as one HTML page."""

from pathlib import Path
from typing import Annotated

import typer

from batchgen.errors import UsageError
from batchgen.jobs import report as terminal
from batchgen.output.store import refuse_address
from batchgen.review.report.compare import write_comparison
from batchgen.review.report.page import write_report


def report(
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="A Parquet file or dataset that batchgen wrote.")],
    other: Annotated[str | None, typer.Argument(metavar="OUTPUT2", help="Another one, to compare the two.")] = None,
    page: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where the page goes; without it, beside OUTPUT as .html.")
    ] = None,
) -> None:
    """Write a report on OUTPUT: lengths, speed, rejects, samples and how to make it again, as one HTML page.

    With a second output, the page compares the two: what was asked for, what came out, and the rows that differ.

    The page is self-contained: no network, no scripts. The speed is read from OUTPUT.status.json, if the run left one.

    Example: batchgen report completions.parquet -o report.html
    """
    texts = [output] if other is None else [output, other]
    for text in texts:
        refuse_address(text, "a report")
        if not Path(text).name:
            raise UsageError(f"{text!r} is not a file name; name a Parquet file or a dataset that batchgen wrote")
    paths = [Path(text) for text in texts]
    if other is None:
        page = page or page_beside(paths[0])
        write_report(paths[0], page)
    else:
        page = page or paths[0].with_name(f"{paths[0].stem}-{paths[1].stem}.html")
        write_comparison((paths[0], paths[1]), page)
    with terminal.to_whoever_reads():
        typer.echo(f"report: {terminal.one_line(str(page))}")


def page_beside(output: Path) -> Path:
    return output.with_suffix(".html")
