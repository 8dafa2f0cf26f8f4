"""workers.py: this machine's processes do a run's chunks, and end with the block. supply.py: which chunk is next."""

import time
from dataclasses import replace
from pathlib import Path

import pytest

from batchgen.errors import InputError, StoppedError, UsageError
from batchgen.job import WorkOptions
from batchgen.models.model import Model
from batchgen.output.schema import Columns
from batchgen.plan import Plan
from batchgen.planning import default_kv_bytes, fitting_jobs
from batchgen.types import Chunk, Rejected, SamplingParams, TokenizedRequest
from batchgen.workers import pool
from batchgen.workers.supply import END_OF_ALLOCATION, MARGIN_SECONDS, Deadline, Supply
from batchgen.workers.worker import WorkerSetup
from batchgen.workers.workers import open_workers, worker_setup
from tests.support.models import write_byte_model
from tests.support.plans import plan_for

PARAMS = SamplingParams(max_tokens=4)


def request(row: int) -> TokenizedRequest:
    return TokenizedRequest(row, f"p:{row}", None, "row", (114, 111, 119), PARAMS)


def chunk(index: int) -> Chunk:
    return Chunk(index, (request(2 * index), request(2 * index + 1)))


def rejected(index: int) -> Chunk:
    return Chunk(index, (Rejected(index, f"p:{index}", None, None, "no"),))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    return Model.open(str(write_byte_model(tmp_path_factory.mktemp("workers") / "bytes")))


@pytest.fixture
def plan(model) -> Plan:
    return plan_for(model, PARAMS)


# ---- who does the chunks


def test_a_worker_is_set_up_as_the_plan_says(model, plan):
    setup = worker_setup(model, plan, Columns(logprobs=True))
    assert isinstance(setup, WorkerSetup)
    assert (setup.max_batch, setup.kv_bytes, setup.share_prefixes) == (8, 2**26, False)
    assert (setup.params, setup.columns) == (PARAMS, Columns(logprobs=True))
    assert setup.precision == "float32"
    assert worker_setup(model, replace(plan, precision="int8"), Columns()).precision == "int8"
    assert (setup.model, setup.model_hash) == (str(model.directory.resolve()), model.hash)


def test_this_machine_has_a_slot_for_each_worker_that_fits(model, tmp_path):
    with open_workers(WorkOptions(), model, tmp_path) as workers:
        assert workers.slots == fitting_jobs(default_kv_bytes(model.config, "float32"), model.bytes)
    with open_workers(WorkOptions(kv_bytes=2**50, jobs=8), model, tmp_path) as workers:
        assert workers.slots == 1


@pytest.mark.processes
@pytest.mark.parametrize(("jobs", "n", "used"), [(2, 5, 2), (2, 1, 1), (3, 0, 1)])
def test_no_more_processes_start_than_there_are_chunks(model, plan, tmp_path, jobs, n, used):
    with open_workers(WorkOptions(jobs=jobs), model, tmp_path) as workers:
        receipts = list(workers.run(plan, Columns(), map(chunk, range(n)), n, Deadline(None)))
        assert sorted(receipt.chunk for receipt in receipts) == list(range(n))
        assert all(Path(receipt.path).parent == tmp_path for receipt in receipts)
        assert workers.jobs == used
    assert len(list(tmp_path.glob("worker-*"))) <= used


@pytest.mark.processes
def test_a_run_that_is_left_in_the_middle_ends_its_workers(model, plan, tmp_path):
    with open_workers(WorkOptions(jobs=2), model, tmp_path) as workers:
        next(iter(workers.run(plan, Columns(), map(chunk, range(100)), 100, Deadline(None))))
        pids = [int(path.name.partition("-")[2]) for path in tmp_path.glob("worker-*")]
        assert any(map(pool._is_alive, pids))
    assert not any(map(pool._is_alive, pids))


@pytest.mark.processes
def test_no_chunk_is_taken_after_the_deadline(model, plan, tmp_path):
    with open_workers(WorkOptions(jobs=1), model, tmp_path) as workers:
        assert list(workers.run(plan, Columns(), map(chunk, range(100)), 100, Deadline(0.0))) == []


# ---- which chunk is next, and until when


def test_chunks_that_are_done_again_come_first():
    supply = Supply(map(rejected, range(2)))
    assert supply.take().index == 0
    supply.again.append(rejected(7))
    assert [taken.index for taken in iter(supply.take, None)] == [7, 1]


def test_an_input_that_breaks_off_gives_no_more_chunks_and_its_error():
    def chunks():
        yield rejected(0)
        raise InputError("damaged")

    supply = Supply(chunks())
    assert supply.take().index == 0
    assert supply.take() is None
    assert str(supply.failure) == "damaged"
    supply.again.append(rejected(0))
    assert supply.take().index == 0


def test_a_deadline_is_over_when_its_seconds_are(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    deadline, never = Deadline(10.0), Deadline(None)
    for now, margin, over in [(100, 0, False), (109, 0, False), (111, 0, True), (105, 6, True), (111, -2, False)]:  # noqa: B007
        assert deadline.is_over(margin) == over
        assert not never.is_over(margin)


def test_chunks_are_given_out_while_two_of_the_longest_fit(monkeypatch):
    now, longest = 0.0, 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    chunks = Deadline(10.0).limit(map(rejected, range(9)), lambda: longest)
    assert next(chunks).index == 0
    now, longest = 4.0, 2.9
    assert next(chunks).index == 1
    longest = 3.1
    assert list(chunks) == []


# ---- the end of an allocation

NOW = 1_764_302_400  # 2025-11-28 04:00:00 UTC


@pytest.fixture
def ends(monkeypatch):
    """Sets when the Slurm job of this process ends, in seconds from NOW or as a text."""
    monkeypatch.setattr(time, "time", lambda: float(NOW))

    def set_end(value) -> None:
        monkeypatch.setenv(END_OF_ALLOCATION, value if isinstance(value, str) else str(NOW + value))

    return set_end


def test_without_a_time_limit_a_run_stops_a_minute_before_its_allocation_ends(ends, caplog):
    ends(3600)
    assert Deadline.find(None).seconds == 3600 - MARGIN_SECONDS
    assert [record.getMessage() for record in caplog.records] == [
        "note: the allocation ends at 2025-11-28 05:00:00 UTC; the run stops 60 s before; --time-limit overrides it"
    ]


def test_a_time_limit_that_was_given_holds_and_outside_of_slurm_there_is_none(ends, monkeypatch, caplog):
    ends(3600)
    assert Deadline.find(7200.0).seconds == 7200
    ends("")
    assert Deadline.find(None).seconds is None
    monkeypatch.delenv(END_OF_ALLOCATION)
    assert Deadline.find(None).seconds is None
    assert not caplog.records


def test_every_end_that_slurm_can_name_is_a_time_limit_that_a_job_can_have(ends):
    ends("253402300799")  # in the year 9999
    assert WorkOptions(time_limit=Deadline.find(None).seconds)


@pytest.mark.parametrize("text", ["soon", "-1", "1e9", "1.5", "999999999999", "9" * 400, "1 2"])
def test_an_end_that_is_no_time_is_refused(ends, text):
    ends(text)
    with pytest.raises(UsageError, match="^SLURM_JOB_END_TIME=.* is no time in seconds since 1970; unset it, or give"):
        Deadline.find(None)
    assert Deadline.find(5.0).seconds == 5


def test_an_end_that_is_past_or_too_near_is_refused(ends):
    ends(0)
    with pytest.raises(UsageError, match=f"={NOW} is past .the allocation ends at 2025-11-28 04:00:00 UTC.; unset it"):
        Deadline.find(None)
    ends(60)
    with pytest.raises(StoppedError, match="a run stops 60 s before it; nothing was done: run the same command in"):
        Deadline.find(None)
