"""progress.py: progress adds up, and the status file is one whole JSON object that says how the run ended."""

import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from batchgen import progress
from batchgen.errors import OutputError, StoppedError
from batchgen.progress import (
    MAX_POINTS,
    SIGNALS,
    Progress,
    Reporter,
    StatusFile,
    WorkerState,
    exit_code_of,
    outcome,
    reporting,
    status_path,
    to_follow,
    words_of,
)
from batchgen.workers.marker import Phase, Sighting
from batchgen.workers.outlook import add_progress
from batchgen.workers.supply import Deadline

COUNTS = Counter(input_rows=30, ok=5, rejected=2, failed=1)


# ---- adding up


def sighting(chunk: int, rows: int, in_flight: tuple[int, ...] = ()) -> Sighting:
    return Sighting(100 + chunk, 0, Phase.ROWS, chunk, rows, 10 * rows, 20 * rows, in_flight, ())


def test_progress_is_what_is_committed_and_what_workers_report_of_other_chunks():
    done = Counter(input_rows=64, prompt_tokens=640, completion_tokens=1280)
    resumed = Counter(input_rows=32, prompt_tokens=320, completion_tokens=640)
    now = add_progress(done, resumed, [sighting(1, 32), sighting(2, 5, (70, 71))], {0, 1}, 260)
    assert (now.rows, now.rows_in_all, now.resumed_rows) == (69, 260, 32)
    assert (now.prompt_tokens, now.completion_tokens) == (320 + 50, 640 + 100)
    assert now.workers == (WorkerState(101, 1, 32, 0), WorkerState(102, 2, 5, 2))


def test_progress_counts_no_row_twice():
    """A chunk that is done again after its worker died is in two markers."""
    assert add_progress(Counter(input_rows=30), Counter(), [sighting(1, 9), sighting(1, 9)], {0}, 40).rows == 40


def test_a_summary_adds_the_rows_that_a_retry_leaves():
    counts = Counter(rows=6, ok=4, rejected=0, failed=2, prompt_tokens=90, completion_tokens=60, space_ends=1)
    resumed = Counter(rows=2, prompt_tokens=30, completion_tokens=20)
    reporter = Reporter(lambda _: Progress(0, 0, 0, 0, 0.0), counts, resumed, StatusFile(None, "o"))
    summary = reporter.summarise("o", 19, Counter(ok=9, rejected=1, dropped=3), jobs=1, precision="int8")
    assert (summary.statuses, summary.rows) == ({"ok": 13, "rejected": 1, "failed": 2, "dropped": 3}, 19)
    assert (summary.resumed, summary.prompt_tokens, summary.completion_tokens, summary.space_ends) == (15, 60, 40, 1)
    assert summary.exit_code == 3
    assert replace(summary, rejected=0, failed=0).exit_code == 0  # what is dropped was asked for
    assert (summary.left_out, replace(summary, has_rejects=False).left_out) == (0, 4)
    assert replace(summary, ok=0).exit_code == 4
    assert replace(summary, ok=0, rejected=0, failed=0).exit_code == 0


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OutputError("no room"), 1),
        (StoppedError("time"), 75),
        (ValueError("a bug"), 1),
        (KeyboardInterrupt(), 130),
        (SystemExit(143), 143),
        (SystemExit("text"), 1),
    ],
)
def test_an_exception_is_an_exit_code(error, code):
    assert exit_code_of(error) == code


# ---- the status file


@pytest.fixture
def status(tmp_path, monkeypatch) -> StatusFile:
    monkeypatch.setattr(progress, "INTERVAL_SECONDS", 0.0)
    return StatusFile(tmp_path / "o.parquet.status.json", "o.parquet")


def read(status: StatusFile) -> dict:
    assert status.path is not None
    return json.loads(status.path.read_text())


def test_the_status_file_is_beside_the_output():
    assert status_path(Path("a/o.parquet")) == Path("a/o.parquet.status.json")


def test_a_running_job_says_how_far_it_is_and_how_long_it_will_take(status):
    status.update(Progress(30, 90, 600, 300, 10.0, resumed_rows=10, eta_seconds=30.0), COUNTS)
    now = read(status)
    assert (now["state"], now["exit_code"], now["error"]) == ("running", None, None)
    assert (now["rows_done"], now["rows"], now["rows_resumed"]) == (30, 90, 10)
    assert (now["ok"], now["rejected"], now["failed"]) == (5, 2, 1)
    assert (now["tokens_per_second"], now["eta_seconds"]) == (30.0, 30.0)


def test_before_the_first_row_there_is_no_estimate(status):
    status.update(Progress(10, 90, 0, 0, 0.0, resumed_rows=10), COUNTS)
    assert (read(status)["eta_seconds"], read(status)["tokens_per_second"]) == (None, 0.0)


def test_the_end_is_kept(status):
    status.update(Progress(90, 90, 600, 300, 10.0), COUNTS)
    status.write("finished", COUNTS, 3)
    end = read(status)
    assert (end["state"], end["exit_code"], end["rows_done"], end["eta_seconds"]) == ("finished", 3, 90, None)


def test_the_timeline_covers_the_whole_run_in_few_points(status):
    for second in range(5000):
        status.update(Progress(second, 5000, 0, second * 7, float(second)), COUNTS)
    timeline = read(status)["timeline"]
    assert len(timeline) <= MAX_POINTS
    assert timeline[0] == [0.0, 0, 0]
    assert timeline[-1][0] > 4900
    steps = {after[0] - before[0] for before, after in zip(timeline, timeline[1:], strict=False)}
    assert len(steps) == 1


def test_the_status_is_written_once_a_second_at_most(tmp_path):
    status = StatusFile(tmp_path / "s.json", "o")
    for rows in range(100):
        status.update(Progress(rows, 100, 0, 0, 0.01 * rows), COUNTS)
    assert read(status)["rows_done"] == 0


def test_a_status_that_cannot_be_written_is_logged_once_and_the_run_continues(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(progress, "INTERVAL_SECONDS", 0.0)
    status = StatusFile(tmp_path / "nowhere" / "s.json", "o")
    for rows in range(3):
        status.update(Progress(rows, 3, 0, 0, 1.0), COUNTS)
    assert len(caplog.records) == 1
    assert "the status cannot be written: No such file" in caplog.text
    (tmp_path / "nowhere").mkdir()  # a disk that was full for a moment
    status.write("finished", COUNTS, 0)
    assert read(status)["state"] == "finished"


def test_a_status_that_is_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "s.json")
    assert progress.read_status(tmp_path / "s.json") == {}


def test_without_a_path_nothing_is_written(tmp_path):
    status = StatusFile(None, "o")
    status.update(Progress(1, 3, 0, 0, 1.0), COUNTS)
    status.write("finished", COUNTS, 0)
    assert list(tmp_path.iterdir()) == []


# ---- reporting


def test_reports_never_go_back_and_a_broken_listener_is_called_once(status, caplog):
    looks = iter([Progress(40, 90, 0, 800, 0.0), Progress(32, 90, 0, 640, 0.0), Progress(90, 90, 0, 1800, 0.0)])
    calls = []

    def broken(now: Progress) -> None:
        calls.append(now)
        raise BrokenPipeError("the terminal is gone")

    reporter = Reporter(lambda _: next(looks), COUNTS, Counter(), status, broken)
    seen = []
    for _ in range(3):
        reporter.report()
        seen.append((read(status)["rows_done"], read(status)["completion_tokens"]))
    assert seen == [(40, 800), (40, 800), (90, 1800)]
    assert len(calls) == 1
    assert "progress is no longer shown" in caplog.text


def test_the_end_has_the_counts_of_the_rows_whatever_was_seen_before(status):
    """A step also counts tokens that no row has: stop tokens, those of beams that are left, of a row that fails."""
    looks = iter([Progress(40, 90, 0, 1850, 0.0), Progress(90, 90, 0, 1800, 0.0)])
    reporter = Reporter(lambda _: next(looks), COUNTS, Counter(), status)
    with reporting(reporter):
        reporter.report()
        reporter.summarise("o.parquet", 90, Counter(), 1, "")
        reporter.is_published = lambda: True
    assert (read(status)["rows_done"], read(status)["completion_tokens"]) == (90, 1800)


@pytest.mark.parametrize(
    ("error", "state", "code"),
    [
        (StoppedError("time"), "stopped", 75),
        (OutputError("no room"), "failed", 1),
        (SystemExit(143), "stopped", 143),
        (KeyboardInterrupt(), "stopped", 130),
        (MemoryError("8 GB"), "failed", 1),
        (ValueError(), "failed", 1),
    ],
)
def test_the_status_has_the_words_of_standard_error(status, error, state, code):
    reporter = Reporter(lambda _: Progress(32, 90, 0, 640, 0.0), COUNTS, Counter(), status)
    with pytest.raises(type(error)), reporting(reporter):
        raise error
    end = read(status)
    assert (end["state"], end["exit_code"], end["rows_done"]) == (state, code, 32)
    assert end["error"] == words_of(error)
    if code in SIGNALS:
        assert end["error"] == f"{SIGNALS[code]}: 30 of 90 rows are kept; run the same command again to resume"


@pytest.mark.parametrize(
    ("error", "state", "code"),
    [(SystemExit(143), "finished", 3), (KeyboardInterrupt(), "finished", 3), (OutputError("no room"), "failed", 1)],
)
def test_a_signal_after_the_output_is_complete_does_not_change_how_the_run_ended(status, error, state, code):
    published = []
    reporter = Reporter(lambda _: Progress(90, 90, 0, 640, 0.0), COUNTS, Counter(), status)
    reporter.is_published = lambda: bool(published)
    with reporting(reporter):
        reporter.summarise("o.parquet", 90, Counter(), 1, "")
    assert outcome() is None
    published.append(True)
    with pytest.raises(type(error)), reporting(reporter):
        raise error
    end = read(status)
    assert (end["state"], end["exit_code"]) == (state, code)
    assert words_of(SystemExit(143)) == "terminated: the output is complete: o.parquet"
    assert outcome().exit_code == 3
    to_follow["o.parquet"] = ""
    assert outcome() is None  # the command has more to write
    to_follow.clear()


def test_a_run_of_which_nothing_is_kept_says_so_when_it_is_stopped(status, monkeypatch):
    monkeypatch.setitem(to_follow, "o.parquet", "nothing is kept")
    reporter = Reporter(lambda _: Progress(32, 90, 0, 640, 0.0), COUNTS, Counter(), status)
    with pytest.raises(KeyboardInterrupt), reporting(reporter):
        raise KeyboardInterrupt
    assert read(status)["error"] == "interrupted: nothing is kept"


def test_a_retry_that_is_stopped_does_not_say_that_it_resumes(status):
    """The next one begins anew: see Ledger.unfinished."""
    reporter = Reporter(lambda _: Progress(32, 90, 0, 640, 0.0), COUNTS, Counter(), status, is_retry=True)
    with pytest.raises(KeyboardInterrupt), reporting(reporter):
        raise KeyboardInterrupt
    assert read(status)["error"] == (
        "interrupted: the output is as it was; run the same command again, which begins the retry anew"
    )
    with pytest.raises(StoppedError, match="30 of 90 rows are done; a retry begins anew each time: raise it"):
        Deadline(1.0).check_complete(reporter, 90)
    with pytest.raises(StoppedError, match="^it ends: 30 of 90 rows are done; a retry .* ask for a longer one"):
        Deadline(1.0, "it ends").check_complete(reporter, 90)
