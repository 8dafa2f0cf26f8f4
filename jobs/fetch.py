"""batchgen fetch: download, check and convert one of OpenAI's models."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import TransferSpeedColumn as SpeedColumn

from batchgen.errors import ModelError
from batchgen.jobs.progress import PLAIN_SECONDS, ProgressStyle, style_here
from batchgen.models.model import make_default
from batchgen.models.openai import SIZES, FetchProgress
from batchgen.models.registry import find_model
from batchgen.types import Precision

OnFetch = Callable[[FetchProgress], None]

PRECISION_HELP = "Make this the precision of jobs that name none; int8 rounds the weights once."


def fetch(
    size: Annotated[str, typer.Argument(metavar="SIZE", help=f"One of {', '.join(SIZES)}.")],
    mirror: Annotated[
        str | None,
        typer.Option(envvar="BATCHGEN_MIRROR", help="Another address with the same files; their hashes are checked."),
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Fetch an existing model again and replace it.")] = False,
    keep_download: Annotated[
        bool, typer.Option("--keep-download", help="Keep the downloaded checkpoint after the conversion.")
    ] = False,
    precision: Annotated[Precision | None, typer.Option(help=PRECISION_HELP)] = None,
    progress: Annotated[ProgressStyle, typer.Option(help="A bar, lines, or nothing.")] = "auto",
) -> None:
    """Download one of OpenAI's GPT-2s, check it and convert it; `--model SIZE` then works.

    The same command resumes an interrupted fetch.

    Example: batchgen fetch 124M
    """
    directory = fetch_shown(size, progress, mirror=mirror, again=again, keep_download=keep_download)
    if precision:
        make_default(directory, precision)
    typer.echo(f"{directory}: ready; use it with --model {size}")


def is_to_be_fetched(name: str) -> bool:
    """Whether a model is one of OpenAI's and does not exist here yet."""
    try:
        find_model(name)
    except ModelError:
        return name in SIZES
    return False


def fetch_shown(
    size: str, progress: ProgressStyle, *, mirror: str | None = None, again: bool = False, keep_download: bool = False
) -> Path:
    """Fetch a model and show the progress on standard error."""
    from batchgen.models.fetch import fetch_model  # here: it imports requests

    typer.echo(f"batchgen: fetching {size}", err=True)
    with fetch_progress(size, progress) as show:
        return fetch_model(size, mirror=mirror, again=again, keep_download=keep_download, on_progress=show)


@contextmanager
def fetch_progress(name: str, style: ProgressStyle) -> Iterator[OnFetch | None]:
    """Yield a function that shows a fetch: a bar on a terminal, else a line every ten seconds; None to show nothing."""
    style = style_here(style)
    if style == "none":
        yield None
    elif style == "plain":
        yield _Plain(name)
    else:
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), SpeedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
            yield _Bar(name, bar)


@contextmanager
def convert_progress(name: str, style: ProgressStyle) -> Iterator[Callable[[int, int], None] | None]:
    """Like fetch_progress, for a conversion alone."""
    with fetch_progress(name, style) as show:
        yield (lambda done, total: show(FetchProgress("convert", done, total))) if show else None


class _Bar:
    """A bar of the bytes downloaded, then one of the tensors converted."""

    def __init__(self, name: str, bar: Progress) -> None:
        self.name, self.bar = name, bar
        self.task: TaskID | None = None
        self.phase = ""

    def __call__(self, now: FetchProgress) -> None:
        if now.phase == "convert":
            if self.phase != "convert":
                if self.task is not None:
                    self.bar.remove_task(self.task)
                columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
                self.bar.columns = columns
                self.task = self.bar.add_task(f"{self.name}: converting", total=now.total)
        elif self.task is None:  # without the bytes of earlier attempts in its speed
            self.task = self.bar.add_task(f"{self.name}: downloading", total=now.total, completed=now.done)
        self.phase = now.phase
        assert self.task is not None
        self.bar.update(self.task, completed=now.done, total=now.total)


class _Plain:
    """A line every PLAIN_SECONDS, and one at the end of each phase."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.phase, self.first, self.started, self.last = "", 0, 0.0, 0.0

    def __call__(self, now: FetchProgress) -> None:
        clock = time.monotonic()
        if now.phase != self.phase:
            self.phase, self.first, self.started, self.last = now.phase, now.done, clock, clock
        if clock - self.last < PLAIN_SECONDS and now.done != now.total:
            return
        self.last = clock
        print(f"{self.name}: {self._line(now, clock - self.started)}", file=sys.stderr, flush=True)  # noqa: T201

    def _line(self, now: FetchProgress, seconds: float) -> str:
        if now.phase == "convert":
            return f"{now.done} of {now.total} tensors converted"
        rate = (now.done - self.first) / max(seconds, 1e-3)
        left = f", {(now.total - now.done) / rate:,.0f} s left" if rate and now.done < now.total else ""
        return f"{now.done / 1e6:,.1f} of {now.total / 1e6:,.1f} MB, {rate / 1e6:,.1f} MB/s{left}"
