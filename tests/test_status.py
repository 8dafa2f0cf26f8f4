"""status.py: one JSON object that is always whole, and says at the end how the run ended."""

import json
from collections import Counter
from pathlib import Path

import pytest

from batchgen import progress as status_module
from batchgen.progress import MAX_POINTS, Progress, StatusFile, status_path

COUNTS = Counter(ok=5, rejected=2, failed=1)


@pytest.fixture
def status(tmp_path, monkeypatch) -> StatusFile:
    monkeypatch.setattr(status_module, "INTERVAL_SECONDS", 0.0)
    return StatusFile(tmp_path / "o.parquet.status.json", "o.parquet")


def read(status: StatusFile) -> dict:
    assert status.path is not None
    return json.loads(status.path.read_text())


def test_it_stands_beside_the_output():
    assert status_path(Path("a/o.parquet")) == Path("a/o.parquet.status.json")


def test_a_running_job_says_how_far_it_is_and_how_long_it_will_take(status):
    status.update(Progress(30, 90, 600, 300, 10.0, resumed_rows=10), COUNTS)
    now = read(status)
    assert (now["state"], now["exit_code"], now["error"]) == ("running", None, None)
    assert (now["rows_done"], now["rows"], now["rows_resumed"]) == (30, 90, 10)
    assert (now["ok"], now["rejected"], now["failed"]) == (5, 2, 1)
    assert (now["tokens_per_second"], now["eta_seconds"]) == (30.0, 30.0)  # 20 rows in 10 s, 60 to go


def test_before_the_first_row_there_is_no_estimate(status):
    status.update(Progress(10, 90, 0, 0, 0.0, resumed_rows=10), COUNTS)
    assert (read(status)["eta_seconds"], read(status)["tokens_per_second"]) == (None, 0.0)


def test_the_end_is_kept(status):
    status.update(Progress(90, 90, 600, 300, 10.0), COUNTS)
    status.finish("finished", COUNTS, 3, None)
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


def test_it_is_not_written_more_often_than_every_second(tmp_path):
    status = StatusFile(tmp_path / "s.json", "o")
    for rows in range(100):
        status.update(Progress(rows, 100, 0, 0, 0.01 * rows), COUNTS)
    assert read(status)["rows_done"] == 0


def test_a_status_that_cannot_be_written_is_told_once_and_ends_nothing(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(status_module, "INTERVAL_SECONDS", 0.0)
    status = StatusFile(tmp_path / "nowhere" / "s.json", "o")
    for rows in range(3):
        status.update(Progress(rows, 3, 0, 0, 1.0), COUNTS)
    status.finish("finished", COUNTS, 0, None)
    assert len(caplog.records) == 1
    assert "the status is no longer written: No such file" in caplog.text


def test_without_a_path_nothing_is_written(tmp_path):
    status = StatusFile(None, "o")
    status.update(Progress(1, 3, 0, 0, 1.0), COUNTS)
    status.finish("finished", COUNTS, 0, None)
    assert list(tmp_path.iterdir()) == []
