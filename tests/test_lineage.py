"""lineage.py: --lineage FILE has a run's events as OpenLineage's specification 2-0-2 has them."""

import json
import uuid
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from batchgen.errors import OutputError, StoppedError
from batchgen.files import sha256_of
from batchgen.job import Job
from batchgen.output.lineage import Lineage, append_line, name_dataset, read_parent
from batchgen.output.reading import read_plan
from batchgen.run import run_job
from batchgen.workers.supply import Deadline
from tests.support.jobs import change_job, make_watched_job
from tests.support.models import write_byte_model

RUN = "5d35afce-a4ae-4658-b295-ce3ddc4dcd9e"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_model(tmp_path_factory.mktemp("lineage") / "bytes")


@pytest.fixture
def job(tmp_path: Path, model: Path) -> Job:
    return make_watched_job(tmp_path, model, lineage=tmp_path / "l.jsonl")


def read(path: Path) -> list[dict[str, Any]]:
    """The events, each checked against what the specification requires of any."""
    events = [json.loads(line) for line in path.read_text().splitlines()]
    for event in events:
        check(event)
    return events


def check(event: dict[str, Any]) -> None:
    assert event.keys() == {"eventTime", "eventType", "producer", "schemaURL", "run", "job", "inputs", "outputs"}
    assert event["schemaURL"] == "https://openlineage.io/spec/2-0-2/OpenLineage.json#/$defs/RunEvent"
    assert datetime.fromisoformat(event["eventTime"]).utcoffset() is not None
    assert event["eventType"] in ("START", "COMPLETE", "FAIL", "ABORT")
    assert str(uuid.UUID(event["run"]["runId"])) == event["run"]["runId"]
    assert {"processing_engine", "batchgen_plan"} <= event["run"]["facets"].keys()
    assert event["job"].keys() == {"namespace", "name", "facets"}
    for dataset in (*event["inputs"], *event["outputs"]):
        assert all(isinstance(dataset[name], str) and dataset[name] for name in ("namespace", "name"))
    for facet in facets(event):
        assert facet["_producer"] == event["producer"]
        assert facet["_schemaURL"].startswith("https://openlineage.io/spec/")


def facets(value: Any) -> list[dict[str, Any]]:
    """Every object that is in one called facets, inputFacets or outputFacets."""
    if isinstance(value, list):
        return [facet for one in value for facet in facets(one)]
    if not isinstance(value, dict):
        return []
    own = [facet for name in value if name.lower().endswith("facets") for facet in value[name].values()]
    return own + [facet for one in value.values() for facet in facets(one)]


def of_a_run(events: list[dict[str, Any]], *types: str) -> None:
    assert [event["eventType"] for event in events] == list(types)
    assert len({event["run"]["runId"] for event in events}) == 1
    assert len({(event["job"]["namespace"], event["job"]["name"]) for event in events}) == 1


# ---- the events of runs


@pytest.mark.parametrize("name", ["c.parquet", "c.jsonl", "d/"])
def test_a_run_has_a_start_and_an_end(job: Job, tmp_path: Path, name: str) -> None:
    out = tmp_path / name
    done = run_job(change_job(job, output=f"{tmp_path}/{name}", chunk_rows=2))
    events = read(tmp_path / "l.jsonl")
    of_a_run(events, "START", "COMPLETE")
    start, end = events
    assert end["job"]["name"] == f"generate:{out}"
    [input] = end["inputs"]
    assert (input["namespace"], input["name"]) == ("file", str(tmp_path / "p.jsonl"))
    assert input["facets"]["version"]["datasetVersion"] == sha256_of(tmp_path / "p.jsonl")
    statistics = input["inputFacets"]["inputStatistics"]
    assert (statistics["rowCount"], statistics["size"]) == (5, (tmp_path / "p.jsonl").stat().st_size)
    [output] = end["outputs"]
    assert (output["namespace"], output["name"]) == ("file", str(out))
    written = output["outputFacets"]["outputStatistics"]
    files = list(out.glob("*.parquet")) if out.is_dir() else [out]
    sizes = [file.stat().st_size for file in files]
    assert (written["rowCount"], written["size"], written["fileCount"]) == (done.rows, sum(sizes), len(files))
    if name != "c.jsonl":
        columns = [(one.name, str(one.type)) for one in pq.read_schema(files[0])]
        assert [(one["name"], one["type"]) for one in output["facets"]["schema"]["fields"]] == columns
        plan = read_plan(out)
        facet = end["run"]["facets"]["batchgen_plan"]
        assert (facet["digest"], facet["modelHash"]) == (plan.digest, plan.model_hash)
        assert facet["parameters"] == json.loads(json.dumps(plan.parameters.as_dict()))
    outcome = end["run"]["facets"]["batchgen_outcome"]
    assert (outcome["ok"], outcome["rejected"], outcome["exitCode"]) == (4, 1, 3)
    assert "batchgen_outcome" not in start["run"]["facets"]
    assert "outputFacets" not in start["outputs"][0]


def test_a_run_that_is_stopped_or_fails_and_the_one_that_resumes_it(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has its own id, and all of them one job."""
    ends = [
        (StoppedError("in time"), "ABORT"),
        (KeyboardInterrupt(), "ABORT"),
        (OutputError("disk"), "FAIL"),
        (ValueError("a bug"), "FAIL"),
    ]
    for error, _ in ends:

        def dies(*_: object, error: BaseException = error) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(Deadline, "check_complete", dies)
            with pytest.raises(type(error)):
                run_job(job)
    assert run_job(job).resumed == 5
    events = read(tmp_path / "l.jsonl")
    for i, end in enumerate([*(kind for _, kind in ends), "COMPLETE"]):
        of_a_run(events[2 * i : 2 * i + 2], "START", end)
    assert len({event["run"]["runId"] for event in events}) == 5
    assert len({event["job"]["name"] for event in events}) == 1
    messages = [event["run"]["facets"].get("errorMessage", {}).get("message") for event in events[1::2]]
    assert messages[0] == "in time"
    assert messages[1].startswith("interrupted: 5 of 5 rows are kept")
    assert messages[2:] == ["disk", "a bug", None]


def test_a_complete_output_is_no_run(job: Job, tmp_path: Path) -> None:
    run_job(job)
    assert run_job(job).complete
    assert len(read(tmp_path / "l.jsonl")) == 2


def test_several_inputs_have_a_version_each(job: Job, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"prompt": "b"}\n')
    run_job(change_job(job, input=(tmp_path / "p.jsonl", tmp_path / "q.jsonl")))
    inputs = read(tmp_path / "l.jsonl")[1]["inputs"]
    versions = [one["facets"]["version"]["datasetVersion"] for one in inputs]
    assert versions == [sha256_of(tmp_path / name)[:16] for name in ("p.jsonl", "q.jsonl")]


@pytest.mark.parametrize("task", ["score", "embed"])
def test_other_tasks_have_events_too(job: Job, tmp_path: Path, model: Path, task: str) -> None:
    from batchgen.job import EmbedOptions, ScoreOptions

    (tmp_path / "t.jsonl").write_text('{"text": "abc"}\n')
    options: dict[str, Any] = {"task": ScoreOptions() if task == "score" else EmbedOptions(), "jobs": 1}
    run_job(tmp_path / "t.jsonl", tmp_path / "s.parquet", model=model, lineage=tmp_path / "l.jsonl", **options)
    events = read(tmp_path / "l.jsonl")
    of_a_run(events, "START", "COMPLETE")
    assert events[0]["job"]["name"].startswith(f"{task}:")


def test_namespace_and_parent_come_from_the_environment(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RUN
    monkeypatch.setenv("OPENLINEAGE_NAMESPACE", "nightly")
    monkeypatch.setenv("OPENLINEAGE_PARENT_ID", f"airflow/dag.task/{run}")
    run_job(job)
    for event in read(tmp_path / "l.jsonl"):
        assert event["job"]["namespace"] == "nightly"
        parent = event["run"]["facets"]["parent"]
        assert (parent["run"], parent["job"]) == ({"runId": run}, {"namespace": "airflow", "name": "dag.task"})


@pytest.mark.parametrize("text", ["", "x", "a/b", "a/b/c", f"/b/{RUN}", f"a//{RUN}"])
def test_a_parent_that_is_none_is_left_out(text: str) -> None:
    assert read_parent(text) == {}


@pytest.mark.parametrize(
    ("where", "namespace", "name"),
    [
        ("/a/b.jsonl", "file", "/a/b.jsonl"),
        ("s3://bucket/a/b.jsonl", "s3://bucket", "a/b.jsonl"),
        ("gs://bucket/d/", "gs://bucket", "d"),
        ("file:///a/b", "file", "/a/b"),
    ],
)
def test_datasets_are_named_as_the_specification_names_them(where: str, namespace: str, name: str) -> None:
    assert name_dataset(where) == (namespace, name)


# ---- the file


def test_events_are_appended_after_a_line_that_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    append_line(path, {"a": 1})
    with path.open("ab") as file:
        file.write(b'{"cut')
    append_line(path, {"b": "\udcff"})
    assert path.read_text().splitlines() == ['{"a": 1}', '{"cut', '{"b": "?"}']


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("p.jsonl", "in the way of the input"),
        ("notes.jsonl", "its first line is no event"),
        ("no/l.jsonl", "no such folder; create it"),
        ("folder", "not a file"),
        ("c.parquet", "in the way of the output"),
        ("c.parquet.status.json", "in the way of the output"),
    ],
)
def test_a_file_that_must_not_be_written_is_refused_before_any_work(
    job: Job, tmp_path: Path, name: str, words: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "notes.jsonl").write_text('{"a": 1}\n')
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputError, match=words) as caught:
        run_job(change_job(job, lineage=tmp_path / name))
    assert "--lineage" in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_end_that_cannot_be_written_does_not_lose_the_output(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start = Lineage.start

    def starts(self: Lineage) -> None:
        start(self)
        self.path = tmp_path / "gone" / "l.jsonl"

    monkeypatch.setattr(Lineage, "start", starts)
    assert run_job(job).exit_code == 3
    [message] = [message for message in caplog.messages if "cannot be written" in message]
    assert "the event COMPLETE of run" in message
    assert (tmp_path / "c.parquet").exists()
