"""batchgen doctor: looks at what a run needs of this machine."""

import sys

import typer

from batchgen.jobs import report
from batchgen.review.doctor import examine


def doctor() -> None:
    """Look at processor, kernels, cores, memory, models and versions, and say what holds a run back.

    Lines begin with ok, note (worth knowing) or BROKEN. Exit code 1: something is broken.

    Example: batchgen doctor
    """
    broken = False
    with report.to_whoever_reads():
        for finding in examine():
            broken |= finding.state == "broken"
            mark = "BROKEN" if finding.state == "broken" else finding.state
            typer.echo(f"{mark:6}  {finding.name:9}  {report.one_line(finding.text)}")
    sys.exit(1 if broken else 0)
