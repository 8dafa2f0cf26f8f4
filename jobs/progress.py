"""Progress on standard error while a run lives."""

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from typing import Literal

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from batchgen.jobs.logs import is_json
from batchgen.progress import OnProgress, Progress

logger = logging.getLogger(__name__)

ProgressStyle = Literal["auto", "bar", "plain", "none"]

PLAIN_SECONDS = 10.0
MOST_WORKERS = 8  # shown, one line each


@contextmanager
def showing_progress(style: ProgressStyle) -> Iterator[OnProgress | None]:
    """Yield a function that shows progress on standard error: a bar on a terminal, else a line every ten seconds."""
    style = style_here(style)
    if style == "none":
        yield None
    elif style == "plain":
        yield _plain()
    else:
        with _bar() as show:
            yield show


def style_here(style: ProgressStyle) -> ProgressStyle:
    """Resolve `auto`: a bar if it can be drawn, else lines."""
    if style != "auto":
        return style
    drawable = sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and not is_json()
    return "bar" if drawable else "plain"


@contextmanager
def _bar() -> Iterator[OnProgress]:
    console = Console(stderr=True)
    live = Live(console=console, transient=True, auto_refresh=False)

    def show(now: Progress) -> None:
        if not live.is_started:  # not before: a model may be fetched first, with a bar of its own
            live.start()
        line = Table.grid(padding=(0, 1))
        bar = ProgressBar(max(now.rows_in_all, 1), now.rows, width=max(10, min(40, console.width - 55)))
        rows = f"{now.rows:,}/{now.rows_in_all:,} rows"
        line.add_row(bar, rows, Text(_rate(now), "green"), Text(_left(now), "cyan"))
        workers = [Text(text, "dim") for text in worker_lines(now)]
        live.update(Group(line, *workers), refresh=True)

    try:
        yield show
    finally:
        live.stop()


def _plain() -> OnProgress:
    last = time.monotonic()

    def show(now: Progress) -> None:
        nonlocal last
        clock = time.monotonic()
        if clock - last < PLAIN_SECONDS:
            return
        last = clock
        parts = [f"{now.rows:,} of {now.rows_in_all:,} rows", _rate(now), _left(now)]
        text = ", ".join(part for part in parts if part)
        if is_json():
            logger.info("%s", text, extra={"values": asdict(now)})
        else:
            print(text, file=sys.stderr, flush=True)  # noqa: T201

    return show


def _rate(now: Progress) -> str:
    return f"{now.tokens / now.seconds:,.0f} tokens/s" if now.tokens else ""


def _left(now: Progress) -> str:
    if now.eta_seconds is None or now.rows == now.rows_in_all:
        return ""
    return f"{timedelta(seconds=round(now.eta_seconds))} left"


def worker_lines(now: Progress) -> list[str]:
    """One line for each of the first workers."""
    lines = []
    for number, worker in enumerate(now.workers[:MOST_WORKERS], start=1):
        doing = "idle"
        if worker.chunk is not None:
            doing = f"chunk {worker.chunk}: {worker.rows:,} rows done, {worker.in_flight:,} samples in flight"
        lines.append(f"worker {number}  {doing}")
    if len(now.workers) > MOST_WORKERS:
        lines.append(f"and {len(now.workers) - MOST_WORKERS} more workers")
    return lines
