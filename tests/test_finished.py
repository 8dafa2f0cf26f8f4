"""finished.py: a finished output is not lost by a slip, whatever kind it is of."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchgen import run as run_module
from batchgen.errors import BatchgenError, BusyError, InputError, OutputError, UsageError
from batchgen.job import Job
from batchgen.output.dataset import Dataset
from batchgen.output.file import FileOutput
from batchgen.output.ledger import open_ledger, work_directory
from batchgen.output.reading import read_plan
from batchgen.progress import status_path
from batchgen.review.forecast import forecast_job
from batchgen.review.replay import replay
from batchgen.review.report.page import write_report
from batchgen.run import run_job
from batchgen.types import SamplingParams
from batchgen.workers.supply import Deadline
from tests.support.jobs import change_job, make_job
from tests.support.models import write_byte_model

LOCAL = ["c.parquet", "c.jsonl", "answers.jsonl", "d/"]
STORES = ["s3://out/deep/c.parquet", "s3://out/deep/c.jsonl", "s3://out/deep/d/"]
ALL = [*LOCAL, *STORES]


@pytest.fixture(scope="module")
def store(store_server: Any) -> Any:
    return store_server


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_model(tmp_path_factory.mktemp("finished") / "bytes")


@pytest.fixture(params=ALL)
def job(request: pytest.FixtureRequest, tmp_path: Path, model: Path) -> Job:
    """A job of 5 rows, one of which is rejected, for each kind of output; nothing may be replaced."""
    remote = request.param in STORES
    if remote:
        request.getfixturevalue("store").clear()
    return make(tmp_path, model, request.param)


def make(folder: Path, model: Path, name: str, **options: Any) -> Job:
    lines: list[Any] = [{"id": f"r{i}", "prompt": f"a {i}" * (i != 3)} for i in range(5)]
    if name == "answers.jsonl":
        lines = [{"custom_id": line["id"], "method": "POST", "url": "/v1/completions", "body": line} for line in lines]
        for line in lines:
            del line["body"]["id"]
    (folder / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    remote = "://" in name
    own = {"overwrite": False, "jobs": 1, "chunk_rows": 2, "work_dir": folder if remote else None}
    params = SamplingParams(max_tokens=4)
    return make_job(folder / "p.jsonl", name if remote else f"{folder}/{name}", model, params, **own | options)


def everything(job: Job, request: pytest.FixtureRequest) -> dict[str, Any]:
    """Every file of the folder, by its bytes and time, and every object of the store."""
    folder = Path(str(job.input.files[0])).parent
    found: dict[str, Any] = {
        str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()
    }
    if str(job.output.path).startswith("s3"):
        found |= request.getfixturevalue("store").objects()
    return found


def local(job: Job) -> Path:
    return Path(job.output.path)


def dies(*_: object) -> None:
    raise KeyboardInterrupt


def interrupt(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a job until all of its chunks are done, and end it there."""
    with monkeypatch.context() as patch:
        patch.setattr(Deadline, "check_complete", dies)
        with pytest.raises(KeyboardInterrupt):
            run_job(job)


# ---- the same job again


def test_the_same_job_over_its_finished_output_says_so_and_changes_nothing(
    job: Job, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run_job(job)
    before = everything(job, request)
    monkeypatch.setattr(run_module, "open_workers", dies)  # nothing is generated
    again = run_job(job)
    assert again.complete
    assert not first.complete
    assert (again.statuses, again.input_rows, again.exit_code) == (first.statuses, 5, 3)
    assert again.statuses == {"ok": 4, "rejected": 1, "failed": 0, "dropped": 0}
    assert everything(job, request) == before


def test_another_batchgen_or_regex_does_not_make_it_another_job(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make(tmp_path, model, "c.parquet")
    with monkeypatch.context() as patch:
        patch.setattr("batchgen.planning.version", lambda _: "0.1")
        patch.setattr("batchgen.planning.__version__", "0.1")
        run_job(job)
    assert run_job(job).complete


# ---- another job


def test_finished_output_replaced(job: Job, request: pytest.FixtureRequest) -> None:
    """Another input, parameter or option under the same name is refused by what differs, and nothing is changed."""
    run_job(job)
    before = everything(job, request)
    other = Path(str(job.input.files[0])).with_name("other.jsonl")
    other.write_bytes(Path(str(job.input.files[0])).read_bytes().splitlines()[0])
    for change, said in (
        ({"input": other}, "other.jsonl is not the input that it had"),
        ({"sampling": SamplingParams(max_tokens=3)}, "it had --max-tokens 4, and this has --max-tokens 3"),
        ({"trim": True}, "it had no --trim, and this has --trim"),
        ({"precision": "int8"}, "it had --precision float32, and this has --precision int8"),
        ({"sampling": SamplingParams(max_tokens=3), "restart": True}, "--max-tokens 3"),
    ):
        with pytest.raises(UsageError, match=said) as caught:
            run_job(change_job(job, **change))
        assert "is complete: " in str(caught.value)
        assert str(caught.value).endswith("choose another name for the output, or pass --overwrite to replace it")
    other.unlink()
    assert everything(job, request) == before


def test_another_model_is_refused(tmp_path: Path, model: Path) -> None:
    run_job(make(tmp_path, model, "c.parquet"))
    other = write_byte_model(tmp_path / "other", seed=9)
    with pytest.raises(UsageError, match="model"):
        run_job(make(tmp_path, other, "c.parquet"))


def test_overwrite_replaces(job: Job, request: pytest.FixtureRequest) -> None:
    run_job(job)
    before = everything(job, request)
    shorter = change_job(job, sampling=SamplingParams(max_tokens=3), overwrite=True)
    assert not run_job(shorter).complete
    after = everything(job, request)
    assert {name for name in after if not name.endswith(".parquet")} == {
        name for name in before if not name.endswith(".parquet")
    }
    assert before != after
    assert run_job(change_job(shorter, overwrite=False)).complete
    assert not run_job(shorter).complete  # also its own


# ---- what batchgen did not write


@pytest.mark.parametrize("name", ["c.parquet", "c.jsonl", "s3://out/c.jsonl"])
def test_a_file_that_is_not_batchgens_own_is_refused(
    tmp_path: Path, model: Path, name: str, request: pytest.FixtureRequest
) -> None:
    job = make(tmp_path, model, name)
    if name.startswith("s3"):
        request.getfixturevalue("store").put("c.jsonl", b"mine")
    elif name == "c.parquet":
        pq.write_table(pa.table({"prompt": ["mine"]}), local(job))
    else:
        local(job).write_text("mine")
    before = everything(job, request)
    with pytest.raises(OutputError, match="not a complete output of batchgen: .*; choose another name .* --overwrite"):
        run_job(job)
    assert everything(job, request) == before
    assert run_job(change_job(job, overwrite=True)).ok == 4
    assert run_job(job).complete


def test_json_lines_that_were_changed_are_not_complete(tmp_path: Path, model: Path) -> None:
    job = make(tmp_path, model, "c.jsonl")
    run_job(job)
    local(job).write_bytes(local(job).read_bytes()[:-20])
    with pytest.raises(OutputError, match="it is not the file that c.jsonl.plan.json was written for"):
        run_job(job)
    (tmp_path / "c.jsonl.plan.json").write_text("[]")
    with pytest.raises(OutputError, match="not a plan of this version"):
        run_job(job)


def test_a_dataset_that_lacks_a_part_is_not_complete(
    tmp_path: Path, model: Path, store: Any, request: pytest.FixtureRequest
) -> None:
    job = make(tmp_path, model, "d/")
    run_job(job)
    min(local(job).glob("*.parquet")).unlink()
    with pytest.raises(OutputError, match="holds 3 input rows, and its metadata says 5"):
        run_job(job)
    store.clear()
    job = make(tmp_path, model, "s3://out/d/")
    run_job(job)
    key = min(key for key in store.objects() if key.endswith(".parquet"))
    store.s3.delete_object(Bucket="out", Key=key)
    with pytest.raises(OutputError, match="1 of its 3 parts are not as it says"):
        run_job(job)


def test_an_empty_file_is_nothing_to_lose(tmp_path: Path, model: Path) -> None:
    (tmp_path / "c.parquet").touch()
    assert run_job(make(tmp_path, model, "c.parquet")).ok == 4


@pytest.mark.parametrize("job", ALL, indirect=True)
def test_an_output_without_an_ok_row_is_nothing_to_lose(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """As docs/cron.md says of exit code 4: correct the option, and run again."""
    wrong = change_job(job, sampling=SamplingParams(max_tokens=100_000))
    assert run_job(wrong).exit_code == 4
    assert run_job(wrong).complete
    interrupt(job, monkeypatch)
    assert run_job(job).ok == 4
    with pytest.raises(UsageError, match="is complete"):
        run_job(wrong)


@pytest.mark.parametrize("job", LOCAL, indirect=True)
def test_plan_says_what_generate_would_do_with_the_output(
    job: Job, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = change_job(job, sampling=SamplingParams(max_tokens=3))
    assert not forecast_job(job, measure_time=False).is_complete
    interrupt(job, monkeypatch)
    assert not forecast_job(job, measure_time=False).is_complete
    with pytest.raises(UsageError, match="run it as before, or pass --restart"):
        forecast_job(other, measure_time=False)
    forecast_job(change_job(other, restart=True), measure_time=False)
    run_job(job)
    before = everything(job, request)
    assert forecast_job(job, measure_time=False).is_complete
    with pytest.raises(UsageError, match="is complete: it had --max-tokens 4"):
        forecast_job(other, measure_time=False)
    assert not forecast_job(change_job(other, overwrite=True), measure_time=False).is_complete
    assert everything(job, request) == before


def test_a_folder_of_other_files_is_never_replaced(tmp_path: Path, model: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="something other than a dataset"):
        run_job(make(tmp_path, model, "d/", overwrite=True))


# ---- interrupted runs


@pytest.mark.parametrize("name", ["c.parquet", "c.jsonl", "d/", "s3://out/c.parquet", "s3://out/d/"])
def test_an_interrupted_run_that_may_replace_an_older_output_is_resumed_without_asking_again(
    tmp_path: Path, model: Path, name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name.startswith("s3"):
        request.getfixturevalue("store").clear()
    job = make(tmp_path, model, name)
    run_job(job)
    before = everything(job, request)
    longer = change_job(job, sampling=SamplingParams(max_tokens=6))
    interrupt(change_job(longer, overwrite=True), monkeypatch)
    kept = {key: value for key, value in before.items() if not key.endswith(".json")}
    assert kept.items() <= everything(job, request).items()
    with pytest.raises(UsageError, match="had --max-tokens 6, and this has --max-tokens 4; .* --restart"):
        run_job(job)  # which would discard what is done
    summary = run_job(longer)
    assert (summary.complete, summary.resumed) == (False, 5)
    assert run_job(longer).complete


def test_a_restart_discards_the_interrupted_run_and_not_the_output(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make(tmp_path, model, "c.parquet")
    run_job(job)
    longer = change_job(job, sampling=SamplingParams(max_tokens=6), overwrite=True)
    interrupt(longer, monkeypatch)
    with pytest.raises(UsageError, match="is complete: it had --max-tokens 4, and this has --max-tokens 6"):
        run_job(change_job(longer, overwrite=False, restart=True))
    assert work_directory(local(job)).exists()  # refused: nothing was discarded
    assert run_job(change_job(job, restart=True)).complete
    assert not work_directory(local(job)).exists()


@pytest.mark.parametrize("name", LOCAL)
def test_a_run_that_was_killed_when_it_had_only_to_clear_up_is_complete(
    tmp_path: Path, model: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make(tmp_path, model, name)
    kind = Dataset if name == "d/" else FileOutput
    publish = kind.publish
    with monkeypatch.context() as patch:
        patch.setattr(kind, "publish", lambda *args: (publish(*args), dies()))
        with pytest.raises(KeyboardInterrupt):
            run_job(job)
    assert work_directory(local(job)).exists()
    assert run_job(job).complete
    assert not work_directory(local(job)).exists()


@pytest.mark.parametrize("name", ["c.parquet", "d/"])
def test_what_takes_the_name_while_a_run_is_stopped_is_not_replaced(
    tmp_path: Path, model: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make(tmp_path, model, name)
    interrupt(job, monkeypatch)
    if name == "d/":
        local(job).mkdir()
        (local(job) / "x").write_text("mine")
    else:
        local(job).write_text("mine")
    with pytest.raises(OutputError, match="batchgen"):
        run_job(job)
    assert len(list(work_directory(local(job)).glob("parts/*"))) == 3


# ---- failed rows again


def test_retry_of_nothing(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--retry-failed of an output without failed rows leaves output, status, timeline and report as they are."""
    job = make(tmp_path, model, "c.parquet")
    run_job(job)
    write_report(local(job), tmp_path / "c.html")
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir() if path.is_file()}
    assert json.loads(status_path(local(job)).read_text())["timeline"]
    monkeypatch.setattr(run_module, "open_workers", dies)
    for overwrite in (False, True):
        summary = run_job(change_job(job, retry_failed=True, overwrite=overwrite))
        assert (summary.complete, summary.exit_code) == (True, 3)
    after = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir() if path.is_file()}
    assert after == before
    with pytest.raises(UsageError, match="it had --max-tokens 4, and this has --max-tokens 3"):
        run_job(change_job(job, retry_failed=True, sampling=SamplingParams(max_tokens=3)))


def test_a_retry_waits_for_an_unfinished_run(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make(tmp_path, model, "c.parquet")
    retry = change_job(job, retry_failed=True)
    interrupt(job, monkeypatch)
    with pytest.raises(BusyError, match="not finished yet"):
        run_job(retry)
    run_job(job)
    interrupt(change_job(job, overwrite=True, sampling=SamplingParams(max_tokens=6)), monkeypatch)
    with pytest.raises(BusyError, match="an unfinished run is to replace this file; resume it first") as caught:
        run_job(retry)
    assert caught.value.exit_code == 75


# ---- the status of a run that has nothing to watch


def status_of(job: Job) -> dict[str, Any]:
    status: dict[str, Any] = json.loads(status_path(local(job)).read_text())
    return status


@pytest.mark.parametrize("name", ["c.parquet", "d/"])
def test_the_status_says_why_a_run_could_not_begin(
    tmp_path: Path, model: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And how far the run is, as the night before left it; a finished output's status stays as it is."""
    job = make(tmp_path, model, name)
    interrupt(job, monkeypatch)
    before = status_of(job)
    (tmp_path / "p.jsonl").rename(tmp_path / "away.jsonl")
    with pytest.raises(InputError) as caught:
        run_job(job)
    after = status_of(job)
    assert (after["state"], after["exit_code"], after["error"]) == ("failed", 1, str(caught.value))
    assert (after["rows_done"], after["rows"], after["timeline"]) == (5, 5, before["timeline"])
    (tmp_path / "away.jsonl").rename(tmp_path / "p.jsonl")
    with pytest.raises(UsageError, match="it had --max-tokens 4"):
        run_job(change_job(job, sampling=SamplingParams(max_tokens=3)))
    assert status_of(job)["exit_code"] == 2
    assert run_job(job).exit_code == 3
    finished = status_of(job)
    assert finished["state"] == "finished"
    with pytest.raises(UsageError, match="is complete"):
        run_job(change_job(job, sampling=SamplingParams(max_tokens=3)))
    assert status_of(job) == finished
    with pytest.raises(InputError):
        run_job(change_job(job, input=tmp_path / "no.jsonl", overwrite=True))
    assert status_of(job)["state"] == "failed"
    assert run_job(job).complete
    assert (status_of(job)["state"], status_of(job)["exit_code"], status_of(job)["error"]) == ("finished", 3, None)


def test_a_run_that_cannot_begin_leaves_the_status_of_another_that_lives(tmp_path: Path, model: Path) -> None:
    job = make(tmp_path, model, "c.parquet")
    run_job(job)
    with open_ledger(local(job)):
        status_path(local(job)).write_text('{"state": "running"}')
        for bad in (job, change_job(job, input=tmp_path / "no.jsonl")):
            with pytest.raises((BusyError, InputError)):
                run_job(bad)
        assert status_of(job) == {"state": "running"}


def test_a_run_that_cannot_begin_makes_no_status_where_none_was(tmp_path: Path, model: Path) -> None:
    with pytest.raises(InputError):
        run_job(change_job(make(tmp_path, model, "c.parquet"), input=tmp_path / "no.jsonl"))
    assert not status_path(tmp_path / "c.parquet").exists()


@pytest.mark.parametrize("name", ["", ".", "/", "..", "s3://", "s3://x", "no/such/folder.parquet", "o" * 300])
def test_a_place_that_cannot_be_is_refused_in_words(tmp_path: Path, model: Path, name: str) -> None:
    with pytest.raises(BatchgenError):
        run_job(change_job(make(tmp_path, model, "c.parquet"), output=name))


# ---- datasets


def test_a_trailing_slash_or_a_dataset_that_is_there_makes_a_dataset(tmp_path: Path, model: Path) -> None:
    job = make(tmp_path, model, "d/")
    run_job(job)
    assert (tmp_path / "d" / "_SUCCESS").exists()
    assert run_job(change_job(job, output=tmp_path / "d")).complete
    assert run_job(change_job(job, output=str(tmp_path / "d"), output_format="dataset")).complete


def test_a_dataset_without_a_part_is_read_as_one(tmp_path: Path, model: Path) -> None:
    """Of an input without rows; if its parts were deleted, it is not complete. Its name may be that of a file."""
    empty = change_job(make(tmp_path, model, "d.jsonl/"), output=f"{tmp_path}/d.jsonl/")
    (tmp_path / "p.jsonl").write_text("")
    run_job(empty)
    assert run_job(empty).complete
    write_report(local(empty), tmp_path / "d.html")
    assert "<html" in (tmp_path / "d.html").read_text()
    with pytest.raises(BatchgenError, match="none of its 0 rows is ok"):
        replay(local(empty), 3, seed=1, model=str(model))
    job = make(tmp_path, model, "d/")
    run_job(job)
    for part in local(job).glob("*.parquet"):
        part.unlink()
    with pytest.raises(OutputError, match="holds 0 input rows, and its metadata says 5"):
        run_job(job)


def test_datasets_are_verified_and_reported_on(tmp_path: Path, model: Path, store: Any) -> None:
    run_job(make(tmp_path, model, "d/"))
    run_job(make(tmp_path, model, "c.parquet"))
    path, file = tmp_path / "d", tmp_path / "c.parquet"
    assert read_plan(path) == replace(read_plan(file), format="dataset")
    done, as_file = (replay(one, 3, seed=1, model=str(model)) for one in (path, file))
    assert (done.compared, done.samples, done.differences) == (3, 3, ())
    assert (done.rows, done.ok, done.columns) == (as_file.rows, as_file.ok, as_file.columns)
    for one in (path, file):
        write_report(one, tmp_path / f"{one.name}.html")
    page, of_file = ((tmp_path / f"{name}.html").read_text() for name in ("d", "c.parquet"))
    assert page.count('class="text"') == of_file.count('class="text"')
    assert "4 completions, drawn from all" in page
    store.clear()
    run_job(make(tmp_path, model, "s3://out/e/"))
    (tmp_path / "e").mkdir()
    for name, data in store.objects("e/").items():  # downloaded
        (tmp_path / "e" / name).write_bytes(data)
    assert read_plan(tmp_path / "e") == read_plan(path)
    assert replay(tmp_path / "e", 3, seed=1, model=str(model)).differences == ()
    max(path.glob("*.parquet")).unlink()
    for look in (lambda: write_report(path, tmp_path / "x.html"), lambda: replay(path, 3, 1, str(model))):
        with pytest.raises(BatchgenError, match="holds 4"):
            look()
