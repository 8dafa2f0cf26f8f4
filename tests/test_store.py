"""store.py, upload.py: an output in a store is complete or absent, even if a run is killed. The store is moto's."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pytest

from batchgen.errors import BatchgenError, BusyError, InputError, OutputError, UsageError
from batchgen.job import Job
from batchgen.jobs import cli
from batchgen.output import store as object_store
from batchgen.output import upload
from batchgen.output.store import parse_address
from batchgen.run import run_job
from batchgen.types import SamplingParams
from tests.support.jobs import change, make_job
from tests.support.models import write_byte_model

pytest.importorskip("moto.server", reason="moto[server] is not installed (pip install '.[dev]')")
pytest.importorskip("obstore", reason="obstore is not installed (pip install '.[store]')")

from tests.support.store_server import Proxy, serving

ROOT = Path(__file__).parents[1]
N = 40  # rows, in chunks of 4
PIECE = 2**20  # the least that a piece of an upload can be in a test


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    lines = [json.dumps({"prompt": f"p{n}", "id": n}) for n in range(N - 1)] + ["no JSON"]
    (folder / "p.jsonl").write_text("\n".join(lines))
    write_byte_model(folder / "bytes")
    return folder


@pytest.fixture(scope="module")
def servers() -> Iterator[Proxy]:
    with serving() as proxy:
        yield proxy


@pytest.fixture
def store(servers: Proxy) -> Iterator[Proxy]:
    """The server, with no object in it."""
    servers.reset()
    yield servers
    servers.reset()
    servers.clear()


@pytest.fixture
def job(folder: Path, tmp_path: Path) -> Job:
    params = SamplingParams(max_tokens=5, temperature=0.8)
    options = {"work_dir": tmp_path, "status": False, "jobs": 1, "chunk_rows": 4}
    return make_job(folder / "p.jsonl", "s3://out/april/", str(folder / "bytes"), params, **options)


def work_dir(job: Job) -> Path:
    assert job.output.work_dir
    return job.output.work_dir


def to_file(job: Job, name: str) -> Job:
    return change(job, out=f"s3://out/{name}")


def locally(job: Job, name: str) -> Path:
    """The same run with an output here."""
    path = work_dir(job) / name
    run_job(change(job, out=path, work_dir=None, dataset="." not in name))
    return path


def command(job: Job) -> subprocess.Popen[str]:
    """The same run as a command."""
    arguments = ["generate", *job.input.files, "-o", job.output.path, "--work-dir", work_dir(job), "--model", job.model]
    arguments += ["--max-tokens", 5, "--temperature", 0.8, "--jobs", 1, "--chunk-rows", 4, "--show", 0]
    arguments += ["--overwrite"] * job.output.overwrite
    line = [sys.executable, "-m", "batchgen", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def die() -> None:
    raise KeyboardInterrupt


def held_at(store: Proxy, number: int, ending: str = ".parquet") -> threading.Event:
    """Hold up the put of this number and all later ones; the event is set when that put arrives."""
    reached = threading.Event()

    def rule(method: str, path: str) -> int | None:
        if (
            method == "PUT"
            and ending in path
            and len([p for m, p in store.seen if m == "PUT" and ending in p]) >= number
        ):
            reached.set()
            time.sleep(2)
            return 0
        return None

    store.rule = rule
    return reached


# ---- what is written


def test_a_dataset_is_that_of_a_local_run_and_its_success_file_lists_it(job: Job, store: Proxy, tmp_path: Path) -> None:
    local = locally(job, "local")
    summary = run_job(job)
    found = store.objects("april/")
    assert (summary.rows, summary.exit_code, summary.output) == (N, 3, "s3://out/april/")
    success = json.loads(found.pop("_SUCCESS"))
    assert found == {path.name: path.read_bytes() for path in local.glob("*.parquet")}
    plan = json.loads((local / "_SUCCESS").read_bytes())
    assert {key: success[key] for key in plan} == plan
    assert [(part["name"], part["rows"], part["bytes"]) for part in success["parts"]] == [
        (name, 4, len(found[name])) for name in sorted(found)
    ]
    assert all(part["sha256"].startswith(part["name"][9:25]) for part in success["parts"])
    assert store.puts("")[-1] == "_SUCCESS"
    assert success["statuses"] == {"ok": summary.ok, "rejected": summary.rejected, "failed": 0, "dropped": 0}
    assert sorted(os.listdir(tmp_path)) == ["local"]


def test_a_dataset_is_read_as_one_table(job: Job, store: Proxy, tmp_path: Path) -> None:
    run_job(job)
    rows = ds.dataset("s3://out/april/").to_table().sort_by("row")
    assert rows.equals(ds.dataset(locally(job, "local")).to_table().sort_by("row"))


@pytest.mark.parametrize("name", ["x.parquet", "x y.jsonl"])
def test_one_object_has_the_bytes_of_a_local_file(job: Job, store: Proxy, name: str) -> None:
    local = locally(job, f"local-{name}").read_bytes()
    store.put(f"deep/{name}", b"previous")
    run_job(to_file(job, f"deep/{name}".replace(" ", "%20")))
    assert store.objects() == {f"deep/{name}": local}


def test_an_object_of_several_pieces_is_whole(
    job: Job, store: Proxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(object_store, "PIECE_BYTES", 6 * PIECE)  # of S3, at least 5 MiB but for the last
    (tmp_path / "big").write_bytes(os.urandom(20 * PIECE))
    there = object_store.open_store(parse_address("s3://out/big"))
    upload.publish_file(there, tmp_path / "big")
    assert store.objects()["big"] == (tmp_path / "big").read_bytes()


# ---- a run or a store that fails


def test_a_run_killed_while_it_uploads_sends_no_part_twice(job: Job, store: Proxy, tmp_path: Path) -> None:
    reached = held_at(store, 4)
    run = command(job)
    assert reached.wait(60)
    time.sleep(0.3)  # until it has noted what is there
    run.kill()
    run.communicate()
    there = store.objects("april/")
    assert "_SUCCESS" not in there
    there.pop("_RUN")
    assert 0 < len(there) < N // 4
    store.reset()
    again = command(job)
    _, err = again.communicate(timeout=120)
    assert (again.returncode, err) == (3, "")
    assert not set(store.puts()) & there.keys()
    found = store.objects("april/")
    found.pop("_SUCCESS")
    assert found == {path.name: path.read_bytes() for path in locally(job, "local").glob("*.parquet")}
    assert sorted(os.listdir(tmp_path)) == ["april.status.json", "local"]


def test_a_run_killed_at_its_success_file_puts_it_when_resumed(job: Job, store: Proxy) -> None:
    reached = held_at(store, 0, "_SUCCESS")
    run = command(job)
    assert reached.wait(60)
    run.kill()
    run.communicate()
    store.reset()
    there = store.objects("april/")
    assert "_SUCCESS" not in there
    run_job(job)
    assert store.puts() == []
    assert store.objects("april/").keys() == there.keys() - {"_RUN"} | {"_SUCCESS"}


def test_a_run_killed_after_its_success_file_finds_it_when_resumed(
    job: Job, store: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(object_store.Store, "delete", lambda self, names: names == ["_RUN"] and dies())
        with pytest.raises(KeyboardInterrupt):
            run_job(job)
    before = store.objects("april/")
    assert {"_RUN", "_SUCCESS"} <= before.keys()
    store.reset()
    assert run_job(job).resumed == N
    assert store.objects("april/") == {name: before[name] for name in before if name[0] == "0" or name == "_SUCCESS"}
    assert store.puts() == []


@pytest.mark.parametrize("name", ["x.parquet", "x.jsonl"])
def test_one_object_is_never_there_in_part(job: Job, store: Proxy, name: str) -> None:
    store.put(name, b"previous")
    reached = held_at(store, 0, f"/{name}")
    run = command(to_file(job, name))
    assert reached.wait(60)
    assert store.objects() == {name: b"previous"}
    run.kill()
    run.communicate()
    assert store.objects() == {name: b"previous"}
    store.reset()
    run_job(to_file(job, name))
    assert store.objects()[name] == locally(job, f"local-{name}").read_bytes()


@pytest.mark.parametrize("status", [0, 503])
def test_an_upload_that_fails_in_the_middle_is_never_seen(
    job: Job, store: Proxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: int
) -> None:
    monkeypatch.setattr(object_store, "PIECE_BYTES", 6 * PIECE)
    (tmp_path / "big").write_bytes(os.urandom(20 * PIECE))
    store.put("big", b"previous")
    store.rule = lambda method, path: status if "partNumber=3" in path else None
    there = object_store.open_store(parse_address("s3://out/big"), retries=1)
    with pytest.raises(OutputError, match=r"^s3://out/big: "):
        upload.publish_file(there, tmp_path / "big")
    assert store.objects() == {"big": b"previous"}
    assert any(method == "DELETE" and "uploadId=" in path for method, path in store.seen)  # it is aborted there too


def test_a_signal_does_not_wait_for_the_store(job: Job, store: Proxy) -> None:
    reached = held_at(store, 2)
    run = command(job)
    assert reached.wait(60)
    run.send_signal(signal.SIGTERM)
    _, err = run.communicate(timeout=10)
    assert run.returncode == 143
    assert re.fullmatch(r"batchgen: terminated: .* rows are kept; run the same command again to resume\n", err)
    store.reset()
    assert run_job(job).resumed == N


@pytest.mark.parametrize("status", [0, 503])
def test_requests_are_repeated_if_a_store_fails_for_a_while(job: Job, store: Proxy, status: int) -> None:
    store.rule = lambda method, path: status if len(store.seen) % 3 == 0 else None
    run_job(job)
    assert len(store.objects("april/")) == N // 4 + 1


def test_finished_chunks_are_kept_if_a_store_fails_for_good(
    job: Job, store: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store.open_store, "__kwdefaults__", {"retries": 1})
    store.rule = lambda method, path: 503 if method == "PUT" and path.endswith(".parquet") else None
    with pytest.raises(OutputError) as caught:
        run_job(job)
    text = str(caught.value)
    assert "s3://out/april/: the test says so (SlowDown); what is finished is kept in" in text
    assert text.endswith("april.batchgen: run the same command again to resume")
    assert "\n" not in text
    store.reset()
    assert run_job(job).resumed == N


def test_a_part_that_is_damaged_in_the_store_is_sent_again(
    job: Job, store: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    damaged: list[str] = []

    def rule(method: str, path: str) -> int | None:
        parts = store.puts()
        if method == "GET" and "list-type" in path and len(set(parts)) >= N // 4 and not damaged:  # some sent twice
            damaged.append(parts[3])
            store.rule = lambda method, path: None
            name = f"april/{parts[3]}"
            store.put(name, b"x" * len(store.objects()[name]))
        return None

    store.rule = rule
    run_job(job)
    assert store.puts().count(damaged[0]) >= 2
    assert "1 parts are not as they were sent" in caplog.text
    assert store.objects("april/")[damaged[0]][:4] == b"PAR1"


def test_parts_of_a_discarded_run_are_not_in_the_dataset(
    job: Job, store: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(object_store.Store, "create", lambda self, name, data: dies() if name == "_SUCCESS" else data)
        with pytest.raises(KeyboardInterrupt):
            run_job(job)
    before = store.objects("april/")
    run_job(change(job, restart=True, params=replace(job.sampling, seed=9)))
    after = store.objects("april/")
    assert len(after) == N // 4 + 1
    assert len(before.keys() & after.keys()) <= 1  # at most the part that holds nothing drawn


@pytest.mark.parametrize("name", ["april/", "april.parquet"])
def test_rows_are_copied_from_a_store_also_to_replace_what_they_come_from(
    job: Job, store: Proxy, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    params = replace(job.sampling, n=2)
    local = locally(change(job, params=params), f"local{Path(name).suffix}")
    first = change(job, out=f"s3://out/{name}")
    again = change(first, params=params, reuse=(f"s3://out/{name}",))
    run_job(first)
    with monkeypatch.context() as patch:  # it dies between the first new part and the end
        patch.setattr(object_store.Store, "create", lambda self, name, data: die() if name == "_SUCCESS" else data)
        patch.setattr(upload, "write_note", lambda stored: die())
        with pytest.raises(KeyboardInterrupt):
            run_job(again)
    summary = run_job(again)
    assert (summary.resumed, summary.reused + summary.extended) == (summary.rows, N - 1)
    assert ds.dataset(f"s3://out/{name}").to_table().sort_by("row").equals(ds.dataset(local).to_table().sort_by("row"))


@pytest.mark.parametrize("status", [0, 403])
def test_an_older_output_that_a_store_does_not_give_is_not_called_damaged(
    job: Job, store: Proxy, tmp_path: Path, status: int
) -> None:
    run_job(job)
    part = store.puts()[-1]
    store.rule = lambda method, path: status if method == "GET" and part in path else None
    with pytest.raises(InputError, match=f"^s3://out/april/{part}: cannot be copied to .*: AWS Error "):
        run_job(change(job, out=tmp_path / "new.parquet", work_dir=None, reuse=("s3://out/april/",)))


def test_work_for_one_address_is_not_resumed_for_another(job: Job, store: Proxy, monkeypatch: Any) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(upload, "publish_dataset", lambda *_: (_ for _ in ()).throw(BatchgenError("stopped")))
        with pytest.raises(BatchgenError, match="stopped"):
            run_job(job)
    with pytest.raises(
        BusyError, match="the work there is for s3://out/april/; resume that run, or choose another --work-dir"
    ):
        run_job(change(job, out="s3://out/other/april/"))
    monkeypatch.chdir(work_dir(job))
    with pytest.raises(BusyError, match="the work there is for s3://out/april/; resume that run, or choose another"):
        run_job(change(job, out="april/", work_dir=None))
    assert run_job(job).resumed == N


# ---- two runs


def test_of_two_runs_the_second_is_refused_before_it_works(job: Job, store: Proxy, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = change(job, work_dir=tmp_path / "other")
    reached = held_at(store, 2)
    run = command(job)
    assert reached.wait(60)
    with pytest.raises(BusyError, match=r"^s3://out/april/: another run writes there \(.*/april.batchgen on "):
        run_job(change(other, model="no such model"))
    run.kill()
    run.communicate()
    store.reset()
    with pytest.raises(BusyError, match="resume that run, or, if it is gone for good, delete what is below"):
        run_job(other)
    run_job(job)
    assert run_job(change(other, overwrite=False)).complete
    assert os.listdir(tmp_path / "other") == []


def test_one_of_two_runs_that_begin_together_gets_the_prefix(job: Job, store: Proxy, tmp_path: Path) -> None:
    both = threading.Barrier(2)

    def rule(method: str, path: str) -> int | None:
        if (method, path) == ("PUT", "/out/april/_RUN") and store.puts("_RUN") == [] and not both.broken:
            both.wait(30)
            both.abort()
        return None

    store.rule = rule
    (tmp_path / "other").mkdir()
    other = change(job, work_dir=tmp_path / "other")
    runs = [command(job), command(other)]
    errors = [run.communicate(timeout=120)[1] for run in runs]
    assert sorted(run.returncode for run in runs) == [3, 75]
    (line,) = [error for error in errors if error]
    assert line.startswith("batchgen: s3://out/april/: another run writes there (")
    assert len(store.objects("april/")) == N // 4 + 1


def test_a_success_file_that_another_run_put_first_stays(
    job: Job, store: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = json.dumps({"run": "theirs", "parts": []}).encode()
    was = upload.send_parts

    def slowly(*arguments: Any) -> Any:
        sent = was(*arguments)
        store.put("april/_SUCCESS", theirs)
        return sent

    monkeypatch.setattr(upload, "send_parts", slowly)
    with pytest.raises(OutputError, match="another run has completed a dataset there first"):
        run_job(job)
    found = store.objects("april/")
    assert found.pop("_SUCCESS") == theirs
    assert found.keys() == {"_RUN"}  # ours would be read with theirs


@pytest.mark.parametrize("how", ["ignored", "refused", "switched off"])
def test_a_store_without_conditions_is_listed_first(
    job: Job, store: Proxy, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, how: str
) -> None:
    monkeypatch.setattr(object_store.open_store, "__kwdefaults__", {"retries": 0})
    if how == "ignored":
        store.drop = "if-none-match"
    elif how == "refused":
        store.refuse = "if-none-match"
    else:
        monkeypatch.setenv("AWS_CONDITIONAL_PUT", "disabled")
    run_job(job)
    assert "this store has no conditional put: no other run may write there meanwhile" in caplog.text
    assert len(store.objects("april/")) == N // 4 + 1
    other = change(job, work_dir=tmp_path / "other", overwrite=False)
    (tmp_path / "other").mkdir()
    assert run_job(other).complete


# ---- before the run


def refused(job: Job) -> str:
    with pytest.raises((OutputError, UsageError, BusyError)) as caught:
        run_job(change(job, model="no such model"))  # which is looked for later
    assert "\n" not in str(caught.value)
    assert not list(work_dir(job).glob("*.batchgen"))
    return str(caught.value)


def test_objects_that_are_not_of_a_dataset_are_left_alone(job: Job, store: Proxy) -> None:
    store.put("april/notes.txt", b"mine")
    assert "something other than a dataset of batchgen is there (notes.txt); choose another prefix" in refused(job)
    store.put("april2/00000000-0123456789abcdef.parquet", b"mine")
    assert "1 parts of a run that did not end are there" in refused(change(job, out="s3://out/april2/"))
    assert store.objects() == {"april/notes.txt": b"mine", "april2/00000000-0123456789abcdef.parquet": b"mine"}


@pytest.mark.parametrize("name", ["april/", "x.parquet"])
def test_a_bucket_that_is_not_there_is_one_line(job: Job, store: Proxy, name: str) -> None:
    line = refused(change(job, out=f"s3://nowhere/{name}"))
    assert line == f"s3://nowhere/{name}: there is no such bucket; create it or check its name"


@pytest.mark.parametrize("method", ["PUT", "GET", "POST"])  # POST deletes
def test_a_missing_permission_is_an_error_of_one_line(job: Job, store: Proxy, method: str) -> None:
    store.rule = lambda m, path: 403 if m == method else None
    assert refused(job) == (
        "s3://out/april/: not permitted: the test says so (AccessDenied); "
        "batchgen needs to list, get, put and delete there"
    )


def test_missing_keys_are_an_error_of_one_line(job: Job, store: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    assert "no credentials were found; set AWS_ACCESS_KEY_ID" in refused(job)


def test_keys_of_a_profile_are_used(job: Job, store: Proxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    (tmp_path / "keys").write_text("[default]\naws_access_key_id = test\naws_secret_access_key = test\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "keys"))
    assert run_job(job).rows == N


def test_a_store_that_does_not_answer_is_an_error_of_one_line(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ENDPOINT_URL": "http://127.0.0.1:9", "ACCESS_KEY_ID": "k", "SECRET_ACCESS_KEY": "s"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    assert "the store does not answer; check AWS_ENDPOINT_URL and the network" in refused(job)


@pytest.mark.parametrize(
    ("address", "line"),
    [
        ("s3://out/april", "neither a file nor a dataset: a file ends in .parquet or .jsonl, and a dataset in /"),
        ("s3:///april/", "not an address that can be written"),
        ("hdfs://out/april/", "not an address that can be written; use s3://bucket/"),
        ("s3://out/april/?colour=red", "'colour' is not an option of an address"),
        ("abfs://container/april/", "Account must be specified; check the address"),
    ],
)
def test_what_is_no_address_is_one_line(job: Job, address: str, line: str) -> None:
    assert line in refused(change(job, out=address))


def test_options_of_local_files_are_refused(job: Job, store: Proxy) -> None:
    assert "--retry-failed is for an output that is a local file" in refused(
        change(to_file(job, "x.parquet"), retry_failed=True)
    )
    store.put("p.jsonl", b'{"prompt": "a"}\n')
    assert "this is the input" in refused(change(to_file(job, "p.jsonl"), files="s3://out/p.jsonl"))
    assert not store.puts("x.parquet")


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["report", "s3://k:s@out/x.parquet"], 2, "s3://out/x.parquet: a report is of a local file; download it first"),
        (["verify", "s3://out/april/"], 2, "s3://out/april/: a verification is of a local file; download it first"),
        (["generate", "p.jsonl", "-o", "x.parquet", "--work-dir", "."], 2, "--work-dir: a local output keeps its work"),
        (
            ["generate", "p.jsonl", "-o", "s3://out/x.parquet", "--report"],
            2,
            "--report: a report is about a local output",
        ),
    ],
)
def test_commands_for_local_files_refuse_an_address(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    folder: Path,
    arguments: list[str],
    code: int,
    line: str,
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(cli, "_handle_signals", lambda: None)
    monkeypatch.setattr(cli, "log_for_people", lambda: None)
    monkeypatch.setattr(sys, "argv", ["batchgen", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == code
    assert capsys.readouterr().err.startswith(f"batchgen: {line}")


def test_without_obstore_the_line_says_how_to_install_it(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    assert refused(job).endswith("needs obstore, which is not installed; install it with: pip install obstore")


# ---- addresses


def test_keys_in_an_address_are_used_and_not_shown(
    job: Job, store: Proxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    options = f"region=eu-central-1&scheme=http&endpoint_override={store.url.removeprefix('http://')}"
    keyed = change(job, out=f"s3://me:hi%2Fdden@out/april/?{options}", status=True)
    assert run_job(keyed).output == "s3://out/april/"
    assert "dden" not in (tmp_path / "april.status.json").read_text()
    assert "me:" not in refused(change(keyed, out=f"s3://me:hidden@nowhere/x.parquet?{options}"))


@pytest.mark.parametrize(
    ("address", "dataset", "url", "name", "last"),
    [
        ("s3://b/x/y/", False, "s3://b/x/y", "", "y"),
        ("s3://b/x/y.parquet", False, "s3://b/x", "y.parquet", "y.parquet"),
        ("s3://b/x/y.parquet", True, "s3://b/x/y.parquet", "", "y.parquet"),
        ("S3://b/", False, "s3://b/", "", "b"),
        ("s3://b", False, "s3://b/", "", "b"),
        ("s3://b/a%20b.jsonl", False, "s3://b/", "a b.jsonl", "a b.jsonl"),
        ("gs://b/x/", False, "gs://b/x", "", "x"),
        ("abfs://c@a.dfs.core.windows.net/x/", False, "abfs://c@a.dfs.core.windows.net/x", "", "x"),
    ],
)
def test_an_address_is_a_prefix_or_a_name_in_one(address: str, dataset: bool, url: str, name: str, last: str) -> None:
    found = parse_address(address, dataset=dataset)
    assert (found.url, found.name, found.last) == (url, name, last)
