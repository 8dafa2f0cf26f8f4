"""metrics.py: --metrics FILE.prom is text that Prometheus reads, and true whatever becomes of the run."""

import os
import re
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchgen.errors import BatchgenError, BusyError, InputError, OutputError, UsageError
from batchgen.job import Job
from batchgen.output.ledger import open_ledger
from batchgen.output.metrics import MetricsFile, to_text
from batchgen.run import run_job
from batchgen.types import SamplingParams
from batchgen.workers.supply import Deadline
from tests.support.command import batchgen
from tests.support.jobs import change_job, make_watched_job
from tests.support.models import write_byte_model

LABEL = re.compile(r'(\w+)="((?:[^"\\\n]|\\["\\n])*)"(?:,|$)')
SERIES = re.compile(r"([a-z_]+)\{(.*)\} (\S+)")
Series = dict[tuple[str, frozenset[tuple[str, str]]], float]


def parse(text: str) -> Series:
    """Every series, by the rules of the text format: HELP, TYPE, then the family's series, each of them once."""
    found: Series = {}
    family = kind = ""
    families = set()
    for line in text.removesuffix("\n").split("\n"):
        if match := re.fullmatch(r"# (HELP|TYPE) (\S+) (.+)", line):
            if match[1] == "HELP":
                assert match[2] not in families
                families.add(family := match[2])
            else:
                assert match[2] == family
                kind = match[3]
                assert kind in ("gauge", "counter")
                assert (kind == "counter") == family.endswith("_total")
            continue
        name, labels, value = (SERIES.fullmatch(line) or pytest.fail(line)).groups()
        assert name == family
        assert "".join(match[0] for match in LABEL.finditer(labels)) == labels
        pairs = [(match[1], re.sub(r"\\(.)", lambda m: {"n": "\n"}.get(m[1], m[1]), match[2])) for match in
                 LABEL.finditer(labels)]  # fmt: skip
        key = (name, frozenset(pairs))
        assert key not in found
        found[key] = float(value)
    return found


def read(path: Path) -> dict[str, Any]:
    """The series by name without prefix; those with a state or status as name:value."""
    values = {}
    for (name, labels), value in parse(path.read_text()).items():
        one = dict(labels)
        assert Path(one["output"]).is_absolute() or "://" in one["output"]
        end = one.get("state") or one.get("status")
        values[name.removeprefix("batchgen_") + (f":{end}" if end else "")] = value
    states = [name.partition(":")[2] for name, value in values.items() if name.startswith("run_state:") and value]
    assert len(states) == 1
    return values | {"state": states[0]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_model(tmp_path_factory.mktemp("metrics") / "bytes")


@pytest.fixture
def job(tmp_path: Path, model: Path) -> Job:
    return make_watched_job(tmp_path, model, metrics=tmp_path / "m.prom")


# ---- the text format


@given(st.text(), st.text())
def test_any_label_comes_back(output: str, model: str) -> None:
    labels = {"output": output.encode(errors="replace").decode(), "model": model.encode(errors="replace").decode()}
    found = parse(to_text(labels, {"state": "running"}, 1.5, None))
    assert found["batchgen_info", frozenset(labels.items())] == 1


def test_a_path_that_is_not_utf8_is_still_text() -> None:
    text = to_text({"output": os.fsdecode(b"/a\xff"), "model": "m"}, {"state": "failed"}, 1.0, 2.0)
    assert 'output="/a\N{REPLACEMENT CHARACTER}"' in text
    parse(text.encode().decode())


def test_what_is_not_known_is_absent() -> None:
    text = to_text({"output": "o"}, {"state": "running", "eta_seconds": None, "exit_code": None}, 1.0, None)
    names = {name for name, _ in parse(text)}
    assert names == {"batchgen_info", "batchgen_run_state", "batchgen_updated_timestamp_seconds"}


# ---- a run


def test_no_counter_goes_down(job: Job, tmp_path: Path) -> None:
    """The tokens of rows that fail later are in no row at the end."""
    file = MetricsFile.open(job)
    for tokens in (5, 40, 30):
        file.write({"state": "running", "completion_tokens": tokens, "rows_done": tokens})
    now = read(tmp_path / "m.prom")
    assert (now["completion_tokens_total"], now["input_rows_done"]) == (40, 30)


@pytest.mark.parametrize("status", [True, False])
def test_metrics_of_a_run_agree_with_its_summary(job: Job, tmp_path: Path, status: bool) -> None:
    done = run_job(change_job(job, status=status))
    now = read(tmp_path / "m.prom")
    assert now["state"] == "finished"
    assert (now["rows:ok"], now["rows:rejected"], now["rows:failed"]) == (done.ok, done.rejected, done.failed)
    assert (now["input_rows"], now["input_rows_done"], now["exit_code"]) == (5, 5, done.exit_code)
    assert (now["prompt_tokens_total"], now["completion_tokens_total"]) == (done.prompt_tokens, done.completion_tokens)
    assert now["last_success_timestamp_seconds"] >= now["start_timestamp_seconds"]
    assert "eta_seconds" not in now
    assert stat.S_IMODE((tmp_path / "m.prom").stat().st_mode) == 0o644
    assert sorted(path.name for path in tmp_path.glob(".*")) == []


def test_the_file_is_readable_by_others_whatever_the_umask(job: Job, tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        run_job(job)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "m.prom").stat().st_mode) == 0o644
    assert stat.S_IMODE((tmp_path / "c.parquet").stat().st_mode) == 0o600


def test_failures_keep_the_time_of_the_last_success(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is stopped, one that cannot begin, one that is refused; a complete output is a success again."""

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    run_job(job)
    success = read(tmp_path / "m.prom")["last_success_timestamp_seconds"]
    other = change_job(job, sampling=SamplingParams(max_tokens=3))
    with pytest.raises(UsageError, match="is complete"):
        run_job(other)
    refused = read(tmp_path / "m.prom")
    assert (refused["state"], refused["exit_code"], refused["last_success_timestamp_seconds"]) == ("failed", 2, success)
    with pytest.raises(InputError):
        run_job(change_job(job, input=tmp_path / "no.jsonl"))
    assert read(tmp_path / "m.prom")["exit_code"] == 1
    with monkeypatch.context() as patch:
        patch.setattr(Deadline, "check_complete", dies)
        with pytest.raises(KeyboardInterrupt):
            run_job(change_job(other, overwrite=True))
    stopped = read(tmp_path / "m.prom")
    assert (stopped["state"], stopped["exit_code"], stopped["input_rows_done"]) == ("stopped", 130, 5)
    assert stopped["last_success_timestamp_seconds"] == success
    assert run_job(other).resumed == 5
    assert run_job(other).complete
    again = read(tmp_path / "m.prom")
    assert (again["state"], again["rows:ok"], again["exit_code"]) == ("finished", 4, 3)
    assert again["last_success_timestamp_seconds"] > success


def test_a_run_of_nothing_but_rejects_is_no_success(job: Job, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": ""}\n')
    assert run_job(job).exit_code == 4
    assert "last_success_timestamp_seconds" not in read(tmp_path / "m.prom")


def test_a_run_that_is_refused_leaves_the_metrics_of_the_one_that_lives(job: Job, tmp_path: Path) -> None:
    run_job(job)
    before = (tmp_path / "m.prom").read_bytes()
    with open_ledger(tmp_path / "c.parquet"), pytest.raises(BusyError):
        run_job(job)
    assert (tmp_path / "m.prom").read_bytes() == before


def test_metrics_that_cannot_be_written_end_no_run(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder that goes away during the run: one warning, and the output is complete."""
    monkeypatch.setattr("batchgen.output.metrics.replacing", lambda *_, **__: (tmp_path / "no" / "file").open("wb"))
    assert run_job(job).exit_code == 3
    assert caplog.messages.count(f"{tmp_path}/m.prom: the metrics cannot be written: No such file or directory") == 1


# ---- the place


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("m.txt", "does not end in .prom"),
        ("p.prom", "a file that batchgen did not write"),
        ("folder.prom", "not a file"),
        ("link.prom", "a symbolic link, which would be replaced"),
        ("no/m.prom", "no such folder; create it"),
        ("p.jsonl/m.prom", "not a folder|Not a directory"),
        ("c.parquet.batchgen/m.prom", "no such folder"),
    ],
)
def test_a_file_that_must_not_be_written_is_refused_before_any_work(
    job: Job, tmp_path: Path, name: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "p.prom").write_text("node_load1 3\n")
    (tmp_path / "folder.prom").mkdir()
    (tmp_path / "link.prom").symlink_to("m.prom")
    before = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises((OutputError, UsageError), match=words) as caught:
        run_job(change_job(job, metrics=tmp_path / name))
    assert "--metrics" in str(caught.value)
    assert not caplog.records  # one line is enough
    assert {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_file_in_the_input_or_the_output_is_refused(job: Job, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (tmp_path / "p.jsonl").rename(folder / "p.jsonl")
    with pytest.raises(OutputError, match="in the way of the input"):
        run_job(change_job(job, input=folder, metrics=folder / "m.prom"))
    (tmp_path / "d").mkdir()
    with pytest.raises(BatchgenError, match="in the way of the output"):
        run_job(change_job(job, input=folder, output=f"{tmp_path}/d/", metrics=tmp_path / "d" / "m.prom"))


def test_one_file_for_both_is_refused(job: Job, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--metrics and --lineage name one file"):
        run_job(change_job(job, lineage=tmp_path / "m.prom"))


def test_the_output_of_an_address_has_no_keys(job: Job) -> None:
    labels = MetricsFile.open(change_job(job, output="s3://KEY:SECRET@bucket/c.parquet")).labels
    assert labels["output"] == "s3://bucket/c.parquet"


def test_standard_output_has_no_metrics(tmp_path: Path, model: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    done = batchgen("generate", "p.jsonl", "-o", "-", "--model", model, "--metrics", "m.prom", folder=tmp_path)
    assert done.returncode == 2
    assert b"-o -: --metrics and --lineage name the output" in done.stderr
