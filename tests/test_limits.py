"""limits.py: what the system refuses is named, wherever it is found; no row, part or folder is blamed for it."""

import errno
import multiprocessing
import os
import signal
import sys
import threading
from collections import defaultdict
from pathlib import Path

import pyarrow as pa
import pytest

from batchgen.errors import BatchgenError, OutputError, UsageError
from batchgen.jobs.running import check_standard_output
from batchgen.limits import reached_limit, reason_of
from batchgen.output import parts
from batchgen.output.ledger import open_ledger
from batchgen.output.place import output_errors
from batchgen.output.schema import Columns
from batchgen.planning import available_jobs
from batchgen.run import run_job
from batchgen.workers import pool, worker
from tests.support.jobs import make_job
from tests.support.models import write_byte_model
from tests.test_worker import MIXED, setup

pytestmark = pytest.mark.processes

NO_THREAD = RuntimeError("can't start new thread")  # of Python
NO_ARROW_THREAD = pa.ArrowException("Unknown error: Failed to launch worker thread: Resource temporarily unavailable")


def refusing(error: Exception):
    def refuse(*_: object, **__: object) -> None:
        raise error

    return refuse


@pytest.fixture
def job(tmp_path: Path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "Once"}\n')
    model = write_byte_model(tmp_path / "bytes")
    (tmp_path / "out").mkdir()
    return make_job(tmp_path / "p.jsonl", tmp_path / "out" / "o.parquet", model, jobs=1, status=False)


@pytest.mark.parametrize(
    ("error", "limit"),
    [
        (NO_THREAD, "threads and processes"),
        (NO_ARROW_THREAD, "threads and processes"),
        (BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)), "threads and processes"),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE), "a.jsonl"), "open files"),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), "out of memory"),
        (MemoryError(), "out of memory"),
        (RuntimeError("cannot join thread before it is started"), None),
        (FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "a.jsonl"), None),
        (BatchgenError("a: Resource temporarily unavailable"), None),
    ],
)
def test_a_limit_is_told_from_other_errors(error, limit):
    found = reached_limit(error)
    assert (found is None) == (limit is None)
    assert limit is None or limit in found
    assert limit is None or reason_of(error) == found


# ---- nothing else is blamed


def test_a_thread_that_cannot_start_is_no_damaged_part(tmp_path, monkeypatch):
    schema = Columns().schema()
    sha256 = parts.write_part([], tmp_path / "part.parquet", schema)
    part = (tmp_path / "part.parquet").rename(tmp_path / parts.part_name(0, sha256))
    monkeypatch.setattr(parts.pq.ParquetFile, "iter_batches", refusing(NO_ARROW_THREAD))
    with pytest.raises(pa.ArrowException, match="Failed to launch"):
        list(parts.read_parts([part], schema))


def test_parts_are_read_without_a_thread(tmp_path, monkeypatch):
    """pyarrow would start one at the first read, if it has none yet, so what is asked of it is looked at."""
    asked = {}
    monkeypatch.setattr(parts.pq, "ParquetFile", lambda raw, **options: asked.update(options))
    with open(os.devnull, "rb") as raw:
        parts.open_parquet(raw)
    assert asked["pre_buffer"] is False


def test_a_row_is_not_failed_for_a_thread_that_cannot_start(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "rows_of_chunk", refusing(NO_THREAD))
    with pytest.raises(BlockingIOError):  # which ends the run
        worker.run_chunk(setup(write_byte_model(tmp_path / "bytes")), MIXED, str(tmp_path))


@pytest.mark.parametrize("error", [NO_THREAD, NO_ARROW_THREAD, BlockingIOError(errno.EAGAIN, "no")])
def test_the_folder_of_the_output_is_not_blamed_for_what_has_no_name(tmp_path, error):
    with pytest.raises(OutputError, match="^the limit on threads .*; run again"), open_ledger(tmp_path / "o.parquet"):
        raise error


def test_other_errors_pass_the_ledger_as_they_are(tmp_path):
    with pytest.raises(RuntimeError, match="a bug"), open_ledger(tmp_path / "o.parquet"):
        raise RuntimeError("a bug")


def test_a_limit_on_open_files_is_not_an_output_that_cannot_be_written(tmp_path):
    with pytest.raises(OSError, match="Too many open files"), output_errors(tmp_path / "o.parquet"):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


# ---- processes


@pytest.fixture(autouse=True)
def no_idle_workers(monkeypatch):
    """Each run starts its own: none of a run before."""
    monkeypatch.setattr(pool, "_idle", defaultdict(list))


def test_a_worker_that_cannot_be_started_names_the_limit(job, monkeypatch):
    """loky cannot end an executor whose thread never started."""
    start = threading.Thread.start
    names = iter(["QueueFeederThread", "ExecutorManagerThread"])
    for name in names:

        def refuse(thread: threading.Thread, name: str = name) -> None:
            if thread.name == name:
                raise NO_THREAD
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(BatchgenError, match="a worker process cannot be started: the limit on threads and proc"):
            run_job(job)


@pytest.mark.skipif(sys.platform != "linux", reason="threads are found in /proc")
def test_a_worker_has_one_thread_and_leaves_the_terminals_signals_to_the_command(monkeypatch):
    """BLAS and pyarrow would start more, which nobody uses, in each of as many workers as there are cores."""
    executor = pool.take_executor(1)
    try:
        with pool.starting_workers():
            threads = executor.submit(os.listdir, "/proc/self/task")
            mask = executor.submit(signal.pthread_sigmask, signal.SIG_BLOCK, ())
        assert len(threads.result()) == 1
        assert {signal.SIGINT, signal.SIGHUP} <= mask.result()  # which a terminal sends to all processes
    finally:
        pool.end_workers(executor)


def test_no_room_for_semaphores_names_shared_memory(job, monkeypatch):
    monkeypatch.setattr(pool, "ProcessPoolExecutor", refusing(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    with pytest.raises(BatchgenError, match=r"cannot be started: No space left .*\(/dev/shm\).* chunks are kept"):
        run_job(job)


def test_a_current_folder_that_is_gone_is_named(job, monkeypatch):
    """loky asks for it when it starts a process."""
    monkeypatch.setattr(pool, "ProcessPoolExecutor", refusing(OSError(errno.ENOENT, os.strerror(errno.ENOENT))))
    with pytest.raises(BatchgenError, match="cannot be started: No such file .*: the current folder was removed"):
        run_job(job)


def test_a_run_whose_manager_has_died_ends(job, monkeypatch):
    """loky's thread that gives chunks to the workers; without it no chunk would ever end."""
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # pytest's takes it for an error of this test
    monkeypatch.setattr(
        "joblib.externals.loky.process_executor._ExecutorManagerThread.add_call_item_to_queue", refusing(SystemExit())
    )
    with pytest.raises(BatchgenError, match="the thread that gives chunks to the workers has ended, .* are kept"):
        run_job(job)


def test_an_executor_whose_manager_has_died_is_not_taken_again(monkeypatch):
    """The remedy is to run again, also in the same process, where an executor waits for the next run."""
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    executor = pool.take_executor(1)
    with monkeypatch.context() as patch:
        thread = "joblib.externals.loky.process_executor._ExecutorManagerThread"
        patch.setattr(f"{thread}.add_call_item_to_queue", refusing(SystemExit()))
        executor.submit(int)
        executor._executor_manager_thread.join(60)
    assert pool.has_lost_manager(executor)
    pool.keep_executor(1, executor)
    other = pool.take_executor(1)
    pool.end_workers(other)
    assert other is not executor


def test_a_daemonic_process_is_refused_and_leaves_nothing(job, monkeypatch):
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)  # as in multiprocessing.Pool
    with pytest.raises(UsageError, match="a daemonic process, .* use concurrent.futures.ProcessPoolExecutor"):
        run_job(job)
    assert os.listdir(job.output.path.parent) == []


def test_rows_do_not_go_to_a_standard_output_that_is_closed(monkeypatch):
    monkeypatch.setattr(sys, "__stdout__", None)  # as Python has it after `>&-`
    with pytest.raises(UsageError, match="-o -: standard output is closed; name a file"):
        check_standard_output(make_job("p.jsonl", "-"))


# ---- remedies


def test_a_full_disk_keeps_what_is_done_in_its_place(tmp_path):
    """Another path would begin anew."""
    (tmp_path / "part.parquet").touch()
    with pytest.raises(OutputError, match="make room .* run the same command again: finished chunks are kept") as found:
        parts.write_part([], tmp_path / "part.parquet", Columns().schema())
    assert "another" not in str(found.value)


def test_a_number_of_cores_that_is_none_is_named(monkeypatch):
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "abc")
    with pytest.raises(UsageError, match="LOKY_MAX_CPU_COUNT=abc is no number of cores; give one, or unset it"):
        available_jobs()
