"""Addresses: objects are read like local files. The store is a local one, from moto."""

import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchgen.errors import InputError
from batchgen.input import sources
from batchgen.input.sources import find_sources
from batchgen.run import run_job
from batchgen.types import SamplingParams
from tests.support.inputs import open_prompts, read, refusal, scan
from tests.support.jobs import make_job
from tests.support.models import write_byte_model

moto_server = pytest.importorskip("moto.server", reason="moto[server] is not installed (pip install '.[dev]')")
boto3 = pytest.importorskip("boto3", reason="boto3, which moto needs, is not installed")

PARAMS = SamplingParams(max_tokens=3)
LINES = b"".join(json.dumps({"prompt": f"p{n}"}).encode() + b"\n" for n in range(5))


def parquet(**columns: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


OBJECTS = {
    "a.jsonl": LINES,
    "in/b.jsonl.gz": gzip.compress(LINES),
    "in/c.jsonl.zst": pa.compress(LINES, codec="zstd", asbytes=True),
    "in/d e.csv": b"prompt\nOnce\n",
    "in/_SUCCESS": b"",
    "set/lang=de/0.parquet": parquet(prompt=["Es war"], k=[2]),
    "set/lang=en/0.parquet": parquet(prompt=["Once", "upon"], k=[0, 1]),
    "lake/table/lang=en/0.parquet": parquet(prompt=["removed"]),
    "lake/table/_delta_log/0.json": b"{}",
    "bad/cut.jsonl.gz": gzip.compress(LINES)[:30],
}


@pytest.fixture(scope="module")
def store() -> Iterator[Any]:
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }.items():
            patch.setenv(name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="prompts")
        for key, data in OBJECTS.items():
            client.put_object(Bucket="prompts", Key=key, Body=data)
        yield client
        client.close()
    server.stop()


@pytest.mark.usefixtures("store")
def test_objects_are_read_like_files_and_opened_three_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    open_remote = sources._RemoteFile.open

    def count(file: Any) -> Any:
        opened.append(file.path)
        return open_remote(file)

    monkeypatch.setattr(sources._RemoteFile, "open", count)
    for key in ("a.jsonl", "in/b.jsonl.gz", "in/c.jsonl.zst", "set/lang=en/0.parquet"):
        path = tmp_path / Path(key).name
        path.write_bytes(OBJECTS[key])
        opened.clear()
        prompts = open_prompts(f"s3://prompts/{key}")
        assert prompts.scan() == scan(path)
        assert list(prompts.requests(PARAMS)) == read(path, PARAMS)
        assert opened == [f"prompts/{key}"] * 3


@pytest.mark.usefixtures("store")
def test_directories_and_patterns_are_their_objects_sorted() -> None:
    assert [source.where for source in find_sources("s3://prompts/in")] == [
        "s3://prompts/in/b.jsonl.gz",
        "s3://prompts/in/c.jsonl.zst",
        "s3://prompts/in/d e.csv",
    ]
    assert [source.name for source in find_sources("s3://prompts/*/*.jsonl.*")] == [
        "cut.jsonl.gz",
        "b.jsonl.gz",
        "c.jsonl.zst",
    ]
    assert [source.name for source in find_sources(["s3://prompts/in/d%20e.csv", "s3://prompts/**/a.jsonl"])] == [
        "d e.csv",
        "a.jsonl",
    ]


@pytest.mark.usefixtures("store")
def test_a_partitioned_dataset_is_completed_with_what_its_folders_say(tmp_path: Path) -> None:
    model = write_byte_model(tmp_path / "bytes")
    job = make_job("s3://prompts/set/", tmp_path / "o.parquet", str(model), PARAMS, keep=("lang", "k"), jobs=1)
    assert run_job(job).ok == 3
    table = pq.read_table(job.output.path)
    assert table.select(["prompt", "lang", "k"]).to_pylist() == [
        {"prompt": "Es war", "lang": "de", "k": 2},
        {"prompt": "Once", "lang": "en", "k": 0},
        {"prompt": "upon", "lang": "en", "k": 1},
    ]


def test_an_object_that_changes_meanwhile_is_noticed_by_its_bytes(store: Any) -> None:
    store.put_object(Bucket="prompts", Key="changing.jsonl", Body=LINES)
    prompts = open_prompts("s3://prompts/changing.jsonl")
    facts = prompts.scan()
    store.put_object(Bucket="prompts", Key="changing.jsonl", Body=LINES.swapcase())  # as long, in the same second
    for read_again in (prompts.scan, lambda: next(prompts.requests(PARAMS))):
        with pytest.raises(InputError, match=r"^s3://prompts/changing.jsonl: the file was changed while it was being"):
            read_again()
    store.put_object(Bucket="prompts", Key="changing.jsonl", Body=LINES)
    assert prompts.scan() == facts
    assert len(list(prompts.requests(PARAMS))) == facts.rows


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize(
    ("uri", "what"),
    [
        ("s3://prompts/nothing.jsonl", "no such file, directory or match"),
        ("s3://prompts/in/*.parquet", "no such file, directory or match"),
        ("s3://nowhere/a.jsonl", "no such file, directory or match"),
        ("s3://prompts/bad/cut.jsonl.gz", "bad/cut.jsonl.gz: not a gzip file, or a damaged one"),
    ],
)
def test_what_cannot_be_read_is_named(uri: str, what: str) -> None:
    with pytest.raises(InputError) as caught:
        open_prompts(uri).scan()
    assert what in str(caught.value)
    assert "\n" not in str(caught.value)


def test_keys_in_an_address_are_not_shown(store: Any) -> None:
    endpoint = store.meta.endpoint_url.removeprefix("http://")
    secret = f"s3://me:hidden@prompts/a.jsonl?scheme=http&endpoint_override={endpoint}"
    assert [source.where for source in find_sources(secret)] == ["s3://prompts/a.jsonl"]
    with pytest.raises(InputError) as caught:
        find_sources(secret.replace("a.jsonl", "b.jsonl"))
    assert str(caught.value).startswith("s3://prompts/b.jsonl: no such file")


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize(
    "given", ["", "/table", "/table/lang=en", "/table/lang=en/0.parquet", "/*/*/*.parquet", "/table/lang=en/*.parquet"]
)
def test_a_table_in_a_store_is_refused_by_name_however_it_is_given(given: str) -> None:
    error = refusal(f"s3://prompts/lake{given}")
    assert error.startswith("s3://prompts/lake/table: this is a Delta table")
    assert 'scan_delta("s3://prompts/lake/table")' in error
