"""pool.py: a row that ends its workers fails; a worker that dies for another reason costs only time."""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchgen.errors import BatchgenError, OutputError
from batchgen.input import prompts as prompts_module
from batchgen.input import validation
from batchgen.job import Job, ScoreInput
from batchgen.output.ledger import Ledger, work_directory
from batchgen.run import run_job
from batchgen.types import Begun, SamplingParams
from batchgen.workers import blame, pool
from batchgen.workers.marker import read_sightings
from batchgen.workers.supply import Deadline
from tests.support import poison
from tests.support.jobs import change, make_job
from tests.support.models import write_byte_model

pytestmark = pytest.mark.processes

PARAMS = SamplingParams(max_tokens=10, temperature=0.8, ignore_eos=True)


@pytest.fixture
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("pool")


@pytest.fixture
def job(folder, monkeypatch):
    """Make a job of 60 rows, some of which may be poison: {row: its first word}. The workers stay for other tests."""
    monkeypatch.setattr(pool, "run_chunk", poison.run_chunk)
    return partial(poisoned_job, folder)


def poisoned_job(folder: Path, words: dict[int, str], **changes) -> Job:
    model = folder / "bytes" if (folder / "bytes").exists() else write_byte_model(folder / "bytes")
    path = folder / "prompts.jsonl"
    lines = [json.dumps({"prompt": f"{words.get(row, 'row')} {row}", "k": [row]}) + "\n" for row in range(60)]
    path.write_text("".join(lines))
    (folder / "out").mkdir(exist_ok=True)
    values = {"jobs": 2, "chunk_rows": 15, "row_timeout": 2.0} | changes
    return make_job(path, folder / "out" / "out.parquet", str(model), PARAMS, status=False, **values)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Job:
    """A job with three failed rows, and a kept column; its files stay as they are."""
    words = {17: "kill-first", 40: "raise-first", 41: "raise-last"}
    this = poisoned_job(tmp_path_factory.mktemp("finished"), words, jobs=1, keep=("k",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "run_chunk", poison.run_chunk)
        patch.setattr(blame, "SAME_STEP", 1)
        assert run_job(this).failed == 3
    return this


@pytest.fixture
def failed(finished, tmp_path) -> Job:
    """This job with a copy of its output. There is no poison from here on."""
    shutil.copy(finished.output.path, tmp_path)
    return change(finished, out=tmp_path / "out.parquet")


@pytest.fixture
def one_trial(monkeypatch):
    """A row fails when it has ended one worker alone: each costs a second."""
    monkeypatch.setattr(blame, "SAME_STEP", 1)


def deaths(folder: Path) -> Counter[str]:
    path = folder / poison.DEATHS
    return Counter(path.read_text().split() if path.exists() else [])


def rows_of(job: Job) -> list[dict]:
    return pq.read_table(job.output.path).to_pylist()


# ---- rows that end their workers


def test_a_row_that_ends_every_worker_fails(job, folder, monkeypatch):
    monkeypatch.setattr(pool, "POLL_SECONDS", 0.1)
    monkeypatch.setattr(blame, "SAME_STEP", 2)  # the test of the log has the real number
    ends = {
        "kill-first": (r"its worker died \(SIGKILL\(-9\)\)", 3),
        "raise-first": ("its worker raised ValueError: no good: raise-first", 3),
        "hang-first": (r"its worker took no step for 0\.5 s \(--row-timeout\)", 3),
        "memory-first": (r"its worker died \(out of memory\)", 3),
        "kill-last": (r"its worker died \(SIGKILL\(-9\)\)", 3),
        "kill-middle": (r"its worker died \(SIGKILL\(-9\)\)", 4),
    }
    words = {10 * n + 7: word for n, word in enumerate(ends)}
    this = job(words, chunk_rows=10, row_timeout=0.5, jobs=1)
    summary = run_job(this)
    rows = rows_of(this)
    assert [row["row"] for row in rows] == list(range(60))
    assert {row["row"] for row in rows if row["status"] == "failed"} == words.keys()
    for n, word in words.items():
        assert re.match(rf"prompts.jsonl:{n + 1}: {ends[word][0]}, also with this row alone; --retry", rows[n]["error"])
        assert rows[n]["prompt"] == f"{word} {n}"
        assert rows[n]["prompt_tokens"] == len(rows[n]["prompt"])
        assert rows[n]["completion"] is None
    assert (summary.ok, summary.failed, summary.exit_code) == (54, 6, 3)
    assert deaths(folder) == {word: times for word, (_, times) in ends.items()}
    assert os.listdir(this.output.path.parent) == ["out.parquet"]


@pytest.mark.usefixtures("one_trial")
def test_a_row_that_ends_the_worker_that_scores_it_fails(job):
    this = job({3: "kill-first"}, jobs=1)
    this = replace(this, input=ScoreInput(this.input.files, text_column="prompt"))
    summary = run_job(this)
    rows = rows_of(this)
    assert [row["row"] for row in rows] == list(range(60))
    assert {row["row"] for row in rows if row["status"] == "failed"} == {3}
    assert rows[3]["text"] == "kill-first 3"
    assert summary.scores.tokens == sum(len(row["text"]) for row in rows if row["status"] == "ok")
    assert "its worker died" in rows[3]["error"]


@pytest.mark.usefixtures("one_trial")
def test_all_such_rows_of_a_chunk_are_found(job, folder, monkeypatch):
    monkeypatch.setattr(prompts_module, "TOGETHER", 1)  # the first three are in one chunk
    words = {3: "exit-first", 4: "kill-last", 5: "raise-first", 50: "kill-first"}
    this = job(words)
    assert run_job(this).failed == 4
    assert {row["row"] for row in rows_of(this) if row["status"] == "failed"} == set(words)
    assert max(deaths(folder).values()) <= 3  # the third if the chunk was begun again before its turn alone came
    assert deaths(folder).total() < 2 * len(words)  # in one trial: fewer than two each


@pytest.mark.usefixtures("one_trial")
def test_rows_that_an_older_run_has_begun_are_tried_as_others_are(job, monkeypatch):
    """A row that ends its worker fails, and those that are tried with it become what they become without it."""
    this = job({3: "kill-first", 17: "kill-first-once"}, jobs=1, token_ids=True)
    with pytest.MonkeyPatch.context() as undisturbed:
        undisturbed.setattr(pool, "run_chunk", pool_run_chunk)
        run_job(this)
    expected = rows_of(this)
    n_begun = {row["row"]: max(row["completion_tokens"] - 1 - row["row"] % 3, 0) for row in expected}

    def make_check(*args):
        check = validation.make_check(*args)

        def begin(request):
            ids = tuple(expected[request.row]["completion_token_ids"])[: n_begun[request.row]]
            return replace(check(request), begun=(Begun(0, ids),))

        return begin

    monkeypatch.setattr("batchgen.run.make_check", make_check)
    assert run_job(this).failed == 1
    rows = rows_of(this)
    assert rows.pop(3)["status"] == "failed"
    assert rows == expected[:3] + expected[4:]


# ---- workers that die for another reason


@pytest.mark.parametrize("word", ["kill-first-once", "kill-middle-once", "memory-first-once", "raise-last-once"])
def test_the_output_is_the_same_if_a_worker_dies_once(job, folder, word):
    this = job({17: word}, jobs=1)
    with pytest.MonkeyPatch.context() as undisturbed:
        undisturbed.setattr(pool, "run_chunk", pool_run_chunk)
        run_job(this)
    expected = this.output.path.read_bytes()
    summary = run_job(this)
    assert this.output.path.read_bytes() == expected
    assert (summary.ok, summary.exit_code) == (60, 0)
    assert word in deaths(folder)


pool_run_chunk = pool.run_chunk


def test_the_output_is_the_same_if_workers_are_killed(job, folder):
    this = job({}, chunk_rows=5)
    run_job(this)
    expected = this.output.path.read_bytes()
    killed = []

    def kill_some() -> None:
        paths: list[Path] = []
        while len(killed) < 3:
            with suppress(FileNotFoundError):  # the run has not begun, or has just ended
                paths = list(work_directory(this.output.path).glob("attempt-*"))
            for path in paths:
                for sighting in read_sightings(path):
                    if sighting.running and sighting.pid not in killed:
                        os.kill(sighting.pid, signal.SIGKILL)
                        killed.append(sighting.pid)
            if done.is_set():
                return

    done = threading.Event()
    killer = threading.Thread(target=kill_some)
    killer.start()
    try:
        assert run_job(this).exit_code == 0
    finally:
        done.set()
        killer.join()
    assert killed
    assert this.output.path.read_bytes() == expected


# ---- losses without a cause


def test_if_workers_keep_dying_the_run_ends_and_keeps_what_is_done(job, monkeypatch):
    monkeypatch.setattr(pool, "run_chunk", dies_at_once)
    this = job({})
    with pytest.raises(
        BatchgenError, match=r"5 workers were lost in a row.*; the last died .* lower --jobs\. Finished chunks are kept"
    ) as error:
        run_job(this)
    assert error.value.exit_code == 1
    cure(monkeypatch)
    assert run_job(this).ok == 60


@pytest.mark.usefixtures("one_trial")
def test_if_every_row_ends_its_worker_no_row_is_blamed(job, folder, monkeypatch):
    monkeypatch.setattr(blame, "MAX_FAILED", 2)
    this = job(dict.fromkeys(range(60), "raise-first"), chunk_rows=30)
    with pytest.raises(BatchgenError, match="no row was identified as the cause"):
        run_job(this)
    assert deaths(folder).total() <= 5


def dies_at_once(*_: object) -> None:
    os._exit(1)


def test_a_worker_that_cannot_write_ends_the_run_with_its_own_error(job, monkeypatch):
    monkeypatch.setattr(pool, "run_chunk", cannot_write)
    with pytest.raises(OutputError, match="no space"):
        run_job(job({}))


def cannot_write(*_: object) -> None:
    raise OutputError("part: no space")


@pytest.mark.skipif(sys.platform != "linux", reason="the state of a process is Linux's")
def test_a_process_that_is_stopped_waits_and_one_that_runs_or_is_gone_does_not():
    with subprocess.Popen(["sleep", "60"]) as process:
        os.kill(process.pid, signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        assert pool._is_waiting(process.pid)
        process.kill()
    assert not pool._is_waiting(process.pid)
    assert not pool._is_waiting(os.getpid())


# ---- failed rows are tried again


def cure(monkeypatch) -> None:
    """No poison from here on."""
    monkeypatch.setattr(pool, "run_chunk", pool_run_chunk)


def test_retry_failed_tries_only_the_failed_rows_and_changes_no_other(failed):
    before, seen = rows_of(failed), []
    summary = run_job(change(failed, retry_failed=True), on_progress=seen.append)
    after = rows_of(failed)
    assert [row["row"] for row in after if row != before[row["row"]]] == [17, 40, 41]
    assert {row["status"] for row in after} == {"ok"}
    assert (summary.ok, summary.failed, summary.exit_code, summary.resumed) == (60, 0, 0, 57)
    assert (seen[-1].rows, seen[-1].rows_in_all) == (3, 3)
    assert os.listdir(failed.output.path.parent) == ["out.parquet"]


def test_a_failed_row_is_copied_from_an_older_output_in_which_it_is_ok(failed):
    older = change(failed, out=failed.output.path.with_name("older.parquet"))
    run_job(older)
    summary = run_job(change(failed, retry_failed=True, reuse=(str(older.output.path),)))
    assert (summary.reused, summary.reuses) == (3, False)  # the line about reuse counts all rows of a run
    assert rows_of(failed) == rows_of(older)


@pytest.mark.usefixtures("one_trial")
def test_a_row_that_fails_again_can_be_retried_again(job, monkeypatch):
    this = job({17: "raise-first", 40: "raise-first-once"}, jobs=1)
    run_job(this)
    again = change(this, retry_failed=True)
    summary = run_job(again)
    assert (summary.ok, summary.failed) == (59, 1)
    cure(monkeypatch)
    assert run_job(again).exit_code == 0
    bytes_before = this.output.path.read_bytes()
    assert run_job(again).ok == 60  # nothing left to do
    assert this.output.path.read_bytes() == bytes_before


def test_kept_columns_stay_with_rows_that_fail_and_are_retried(failed):
    assert [row["k"] for row in rows_of(failed)] == [[n] for n in range(60)]
    assert run_job(change(failed, retry_failed=True)).failed == 0
    assert [row["k"] for row in rows_of(failed)] == [[n] for n in range(60)]


def test_retry_failed_makes_what_an_undisturbed_run_makes(failed):
    run_job(change(failed, retry_failed=True))
    retried = pq.read_table(failed.output.path)
    run_job(failed)
    assert retried.equals(pq.read_table(failed.output.path), check_metadata=True)


def test_an_interrupted_retry_does_not_block_another_run(failed, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("batchgen.output.retried.RetriedFile.publish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_job(change(failed, retry_failed=True))
    assert work_directory(failed.output.path).exists()
    assert (run_job(failed).ok, os.listdir(failed.output.path.parent)) == (60, ["out.parquet"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"params": SamplingParams(max_tokens=11)},
            "had --max-tokens .* --max-tokens 11, .*; give the options that made it",
        ),
        ({"output": Path("other.jsonl")}, "--retry-failed wants a finished .parquet file"),
        ({"output": Path("missing.parquet")}, "no such file; run without --retry-failed first"),
        ({"output": Path("foreign.parquet")}, "has no metadata under 'batchgen'"),
        ({"output": Path("alien.parquet")}, "has no metadata under 'batchgen'"),
        ({"output": Path("selected.parquet")}, "has no column 'status'; it was changed: take the file as batchgen"),
        ({"output": Path("torn.parquet")}, "not a Parquet file, or a damaged one"),
    ],
)
def test_only_a_finished_output_of_the_same_options_can_be_retried(failed, changes, message):
    out = failed.output.path.parent
    pq.write_table(pq.read_table(failed.output.path).replace_schema_metadata(None), out / "foreign.parquet")
    pq.write_table(pa.table({"x": [1]}), out / "alien.parquet")
    pq.write_table(pq.read_table(failed.output.path).drop_columns("status"), out / "selected.parquet")
    (out / "torn.parquet").write_bytes(failed.output.path.read_bytes()[:-10])
    if "output" in changes:
        changes = {"output": out / changes["output"]}
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(BatchgenError, match=message):
        run_job(change(failed, retry_failed=True, **changes))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


# ---- the log


def test_the_log_names_the_lost_chunk_and_the_failed_row(job, folder, caplog):
    with caplog.at_level(logging.WARNING):
        run_job(job({17: "kill-first"}, jobs=1))
    assert deaths(folder) == {"kill-first": 6}
    assert "chunk 1: its worker died (SIGKILL(-9)); it is done again, after" in caplog.text
    assert "prompts.jsonl:18: its worker died" in caplog.text


# ---- chunks given out


def test_no_chunk_waits_for_a_worker_before_one_is_done(job, monkeypatch):
    """How long a chunk takes is not known then: at a time limit the run would end two chunks later, not one."""
    taken: list[int] = []
    at_commit: list[int] = []
    commit = Ledger.commit
    monkeypatch.setattr(Ledger, "commit", lambda *args: (at_commit.append(len(taken)), commit(*args))[1])
    limit = Deadline.limit

    def count(deadline, chunks, longest):
        return ((taken.append(chunk.index), chunk)[1] for chunk in limit(deadline, chunks, longest))

    monkeypatch.setattr(Deadline, "limit", count)
    assert run_job(job({}, time_limit=1000.0)).ok == 60
    assert (at_commit[0], taken) == (2, [0, 1, 2, 3])


def test_idle_workers_are_killed_at_the_end_of_their_process(job, monkeypatch):
    """Asked to end, as loky asks them, each takes half a second."""
    at_exit: list = []
    monkeypatch.setattr(threading, "_register_atexit", at_exit.append)
    pool._end_idle_at_exit.cache_clear()
    run_job(job({}))
    [workers] = [list(executor._processes) for _, executor in pool._idle[os.getpid()]]
    [end] = at_exit
    end()
    assert workers
    assert not any(map(pool._is_alive, workers))
    pool._end_idle_at_exit.cache_clear()  # the next run registers it
