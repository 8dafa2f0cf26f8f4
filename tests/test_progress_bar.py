"""jobs/progress.py: a bar with the workers on a terminal, lines elsewhere, nothing if that is asked for."""

import json
import os
import pty
import re
import select
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

from typer.testing import CliRunner

from batchgen.jobs import progress
from batchgen.jobs.cli import app
from batchgen.jobs.progress import MOST_WORKERS, showing_progress, style_here, worker_lines
from batchgen.progress import Progress, WorkerState
from tests.support.models import write_byte_model


def now(rows: int, seconds: float, workers: int = 0) -> Progress:
    busy = [WorkerState(100 + i, 7 if i else None, 5, 3) for i in range(workers)]
    left = (1000 - rows) * seconds / rows if rows else None
    return Progress(rows, 1000, 10 * rows, 20 * rows, seconds, workers=tuple(busy), eta_seconds=left)


@contextmanager
def terminal(monkeypatch) -> Iterator[Callable[[], str]]:
    """Standard error as a terminal of 100 columns; yields a way to read what was written to it."""
    parent, child = pty.openpty()
    with monkeypatch.context() as patch, open(child, "w") as stream:
        patch.setenv("COLUMNS", "100")
        patch.setenv("TERM", "xterm-256color")
        patch.setattr("sys.stderr", stream)

        def written() -> str:
            stream.flush()
            data = b""
            while select.select([parent], [], [], 0.2)[0]:  # a terminal returns its text in pieces
                data += os.read(parent, 100_000)
            return data.decode()

        yield written
    os.close(parent)


def test_a_terminal_has_a_bar_and_anything_else_lines(monkeypatch):
    with terminal(monkeypatch):
        assert style_here("auto") == "bar"
        assert style_here("none") == "none"
        monkeypatch.setenv("TERM", "dumb")
        assert style_here("auto") == "plain"
    monkeypatch.setenv("TERM", "xterm")
    with open(os.devnull, "w") as nowhere:
        monkeypatch.setattr("sys.stderr", nowhere)
        assert style_here("auto") == "plain"


def test_the_bar_shows_rows_speed_time_and_workers_and_is_erased_at_the_end(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    with terminal(monkeypatch) as written:
        with showing_progress("bar") as show:
            show(now(100, 10))
            show(now(200, 20, workers=2))
        shown = written()
    assert re.search(r"200/1,000 rows.*200 tokens/s.*0:01:20 left", shown)
    assert "worker 1  idle" in shown
    assert "worker 2  chunk 7: 5 rows done, 3 samples in flight" in shown
    assert shown.endswith("\x1b[1A\x1b[2K")
    assert "\x1b[32m" in shown


def test_no_color_means_no_colors(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    with terminal(monkeypatch) as written:
        with showing_progress("bar") as show:
            show(now(100, 10, workers=2))
        shown = written()
    assert "100/1,000 rows" in shown
    assert not re.search(r"\x1b\[[0-9;]*(3|4|9|10)[0-7]m", shown)


def test_lines_come_every_ten_seconds(capsys, monkeypatch):
    clock = iter([0.0, 1.0, 9.9, 10.1, 12.0, 25.0])
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock, 25.0)))
    with showing_progress("plain") as show:
        for rows in (0, 50, 100, 150, 200):
            show(now(rows, rows / 10))
    assert capsys.readouterr().err.splitlines() == [
        "100 of 1,000 rows, 200 tokens/s, 0:01:30 left",
        "200 of 1,000 rows, 200 tokens/s, 0:01:20 left",
    ]


def test_a_run_without_rows_can_be_shown(monkeypatch):
    with terminal(monkeypatch) as written:
        with showing_progress("bar") as show:
            show(Progress(0, 0, 0, 0, 0.0))
        assert "0/0 rows" in written()


def test_most_of_many_workers_are_only_counted():
    lines = worker_lines(now(1, 1, workers=MOST_WORKERS + 3))
    assert len(lines) == MOST_WORKERS + 1
    assert lines[-1] == "and 3 more workers"


def test_quiet_prints_nothing_and_changes_nothing_else(tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "Once"}) + "\nnot JSON\n")
    command = ["generate", str(tmp_path / "p.jsonl"), "--model", str(write_byte_model(tmp_path / "m"))]
    for option in ("--quiet", "-q"):
        done = CliRunner().invoke(
            app, [*command, "-o", str(tmp_path / f"{option}.parquet"), option, "--progress", "bar"]
        )
        assert (done.exit_code, done.stdout, done.stderr) == (3, "", "")
    loud = CliRunner().invoke(app, [*command, "-o", str(tmp_path / "loud.parquet")])
    assert (tmp_path / "-q.parquet").read_bytes() == (tmp_path / "loud.parquet").read_bytes()
    assert loud.stdout
