import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from batchgen.errors import ModelError, UsageError
from batchgen.jobs.cli import app
from batchgen.models import fetch, openai
from batchgen.models.convert import read_hparams
from batchgen.models.download import Patience
from batchgen.models.fetch import base_url, download_gpt2_files, fetch_model, load_encoder_hparams_and_params
from batchgen.models.openai import DATA, FILES, INDEX, FetchProgress
from batchgen.models.registry import list_models
from batchgen.models.shards import Description, load_manifest, load_params, verify_shards, write_model
from batchgen.models.string_map import read_string_map
from tests.support.fault_server import FaultServer, both, claim, drop, stall, status
from tests.support.models import BYTES, sharp_tensors, write_byte_vocabulary
from tests.support.tensors import random_tensors
from tests.test_convert import REPOSITORY, needs_tensorflow

QUICK = Patience(connect=5, read=5, tries=3, first_wait=0.001, longest_wait=0.01)
TENSORS = sharp_tensors(BYTES)
ZEROS = bytes(300_000)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The seven files of a tiny model; its data is not a checkpoint, because _convert replaces TensorFlow."""
    directory = write_byte_vocabulary(tmp_path_factory.mktemp("published") / "124M")
    files = {path.name: path.read_bytes() for path in directory.iterdir()}
    files["hparams.json"] = json.dumps(BYTES.as_dict()).encode()
    files["checkpoint"] = b'model_checkpoint_path: "model.ckpt"\n'
    return files | {DATA: ZEROS, INDEX: b"index", "model.ckpt.meta": b"meta"}


def _convert(src: Path, dst: Path, *, name: str, replace: bool, source: dict[str, str], on_progress: Any) -> None:
    assert (src / DATA).read_bytes() == ZEROS
    if on_progress:
        on_progress(1, 1)
    tensors = {name: array for name, array in TENSORS.items() if name != "lm_head"}
    description = Description(name, read_hparams(src / "hparams.json"), source)
    write_model(dst, description, tensors.items(), tokenizer_dir=src, replace=replace)


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[int | None, str | None]]:
    """What is known of the tiny model's files; a test may change it."""
    found: dict[str, tuple[int | None, str | None]] = {DATA: (len(ZEROS), None)}
    monkeypatch.setattr(fetch, "CONFIGS", {"124M": BYTES, "355M": BYTES})
    monkeypatch.setattr(fetch, "known_file", lambda size, name: found.get(name, (None, None)))
    monkeypatch.setattr(fetch, "convert_tf_checkpoint", _convert)
    return found


@pytest.fixture
def server(published: dict[str, bytes], known: object, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultServer]:
    with FaultServer({f"/gpt-2/124M/{name}": data for name, data in published.items()}) as running:
        monkeypatch.setenv("BATCHGEN_MIRROR", running.url("/gpt-2/"))
        yield running


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BATCHGEN_MODELS", str(tmp_path / "models"))
    return tmp_path / "models"


def get(**options: Any) -> Path:
    return fetch_model("124M", patience=QUICK, **options)


def asked(server: FaultServer) -> dict[str, int]:
    return {path.rpartition("/")[2]: len(requests) for path, requests in server.requests.items()}


# --- a fetch -----------------------------------------------------------------------------------------


def test_addresses_files_and_hashes_are_those_of_picogpt_and_openai(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BATCHGEN_MIRROR")
    found = fetch.remotes_of("124M", base_url(), {})
    assert {remote.url for remote in found.values()} == {
        f"https://openaipublic.blob.core.windows.net/gpt-2/models/124M/{name}"
        for name in ("checkpoint", "encoder.json", "hparams.json", "model.ckpt.data-00000-of-00001")
        + ("model.ckpt.index", "model.ckpt.meta", "vocab.bpe")
    }
    text = 'model_checkpoint_path: "model.ckpt"\nall_model_checkpoint_paths: "model.ckpt"\n'
    hparams = '{\n  "n_vocab": 50257,\n  "n_ctx": 1024,\n  "n_embd": 768,\n  "n_head": 12,\n  "n_layer": 12\n}\n'
    for name, data in (("checkpoint", text.encode()), ("hparams.json", hparams.encode())):
        assert (found[name].size, found[name].sha256) == (len(data), hashlib.sha256(data).hexdigest())
    for size, config in openai.CONFIGS.items():
        parameters = sum(array.size for name, array in _shapes(config) if name != "lm_head")
        assert fetch.remotes_of(size, base_url(), {})[DATA].size == 4 * parameters


def _shapes(config: Any) -> Iterator[tuple[str, Any]]:
    for name, shape in config.tensor_shapes().items():
        yield name, np.broadcast_to(np.float32(0), shape)


def test_a_fetch_leaves_the_model_and_nothing_else(server: FaultServer, models: Path) -> None:
    directory = get()
    assert directory == models / "124M"
    verify_shards(directory)
    manifest = load_manifest(directory)
    assert manifest.source["model"] == "OpenAI's 124M"
    assert manifest.source["from"] == server.url("/gpt-2")
    assert manifest.source["data_sha256"] == hashlib.sha256(ZEROS).hexdigest()
    assert {path.name for path in models.iterdir()} == {"124M", ".downloads", "fetched.json"}
    assert [path.name for path in (models / ".downloads").iterdir()] == ["124M.lock"]
    assert asked(server) == dict.fromkeys(FILES, 1)
    assert [info.name for info in list_models() if info.path.parent == models] == ["124M"]


def test_a_second_fetch_requests_nothing(server: FaultServer, models: Path) -> None:
    inode = get().stat().st_ino
    assert get().stat().st_ino == inode
    assert asked(server) == dict.fromkeys(FILES, 1)
    assert get(again=True, keep_download=True).stat().st_ino != inode
    assert asked(server) == dict.fromkeys(FILES, 2)
    assert {path.name for path in (models / ".downloads" / "124M").iterdir()} == set(FILES)


def test_an_interrupted_fetch_resumes(server: FaultServer, models: Path) -> None:
    server.always[f"/gpt-2/124M/{DATA}"] = drop(after=100_000)
    server.faults[f"/gpt-2/124M/{DATA}"] = [drop(after=100_000), status(403)]
    with pytest.raises(ModelError, match=f"{DATA}: is refused"):
        get()
    assert not (models / "124M").exists()
    server.always.clear()
    get()
    ranges = [request.headers.get("range") for request in server.requests[f"/gpt-2/124M/{DATA}"]]
    assert ranges == [None, "bytes=100000-", "bytes=100000-"]


def test_one_failure_stops_the_other_downloads_and_is_reported(server: FaultServer, models: Path) -> None:
    server.always[f"/gpt-2/124M/{DATA}"] = stall(after=100_000)
    server.always["/gpt-2/124M/encoder.json"] = status(404)
    with pytest.raises(ModelError, match="encoder.json: does not exist"):
        fetch_model("124M", patience=Patience(read=0.3, tries=3))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fetch-")]


def test_progress_counts_bytes_and_then_shards(server: FaultServer, models: Path) -> None:
    calls: list[FetchProgress] = []
    get(on_progress=calls.append)
    total = sum(map(len, server.files.values()))
    assert [call.phase for call in calls] == sorted((call.phase for call in calls), reverse=True)
    assert [call for call in calls if call.phase == "download"][-1] == FetchProgress("download", total, total)
    assert calls[-1] == FetchProgress("convert", 1, 1)


# --- refusals -----------------------------------------------------------------------------------------


def test_a_known_hash_is_checked_on_every_mirror(server: FaultServer, models: Path, known: dict[str, Any]) -> None:
    known["vocab.bpe"] = (None, "0" * 64)
    with pytest.raises(ModelError, match=f"vocab.bpe: expected sha256 {'0' * 64} .OpenAI's., found"):
        get()
    assert not (models / "124M").exists()
    assert not (models / "fetched.json").exists()


def test_a_file_that_changes_after_its_first_download_is_refused(server: FaultServer, models: Path) -> None:
    get()
    recorded = read_string_map(models / "fetched.json")
    assert recorded == {f"124M/{path[12:]}": hashlib.sha256(data).hexdigest() for path, data in server.files.items()}
    server.files["/gpt-2/124M/model.ckpt.meta"] = b"other"
    with pytest.raises(ModelError, match="model.ckpt.meta: expected sha256 .*recorded in fetched.json by the first"):
        get(again=True)
    verify_shards(models / "124M")
    assert read_string_map(models / "fetched.json") == recorded


def test_a_failed_conversion_records_no_hashes(
    server: FaultServer, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ModelError("no checkpoint")

    monkeypatch.setattr(fetch, "convert_tf_checkpoint", fail)
    with pytest.raises(ModelError, match="no checkpoint"):
        get()
    assert not (models / "fetched.json").exists()


def test_a_damaged_download_is_named_as_the_model_and_downloaded_again(
    server: FaultServer, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(src: Path, *_: object, **__: object) -> None:
        raise ModelError(f"{src / INDEX} cannot be read (x); download the checkpoint again")

    remedy = r"download the checkpoint again \(the downloaded files are removed; run the same command again\)$"
    with monkeypatch.context() as patched:
        patched.setattr(fetch, "convert_tf_checkpoint", fail)
        with pytest.raises(ModelError, match=rf"^124M/model\.ckpt\.index cannot be read \(x\); {remedy}"):
            get()
    assert get() == models / "124M"
    assert asked(server)[INDEX] == 2


def test_hparams_of_another_model_are_refused(server: FaultServer, models: Path) -> None:
    server.files["/gpt-2/124M/hparams.json"] = json.dumps(BYTES.as_dict() | {"n_head": 4}).encode()
    with pytest.raises(ModelError, match="hparams.json of 124M: expected .*'n_head': 2.*found .*'n_head': 4"):
        get()


def test_a_full_disk_is_found_before_the_download(
    server: FaultServer, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda path: os.terminal_size((1, 1)) and _Usage(free=10**6))
    with pytest.raises(
        ModelError, match=r"models: 124M needs 0.1 GB .*and 0.0 GB are free; make room, or set BATCHGEN"
    ):
        get()
    assert asked(server) == {}


class _Usage:
    def __init__(self, free: int) -> None:
        self.free = free


@pytest.mark.parametrize("size", ["", "125M", "../124M", "124m", "124M/"])
def test_a_size_that_openai_did_not_publish_is_refused(size: str, models: Path) -> None:
    for function in (fetch_model, lambda size: download_gpt2_files(size, models)):
        with pytest.raises(UsageError, match="choose from 124M, 355M, 774M, 1558M"):
            function(size)
    assert not models.exists()


@pytest.mark.parametrize(
    "url", ["host/path", "ftp://host", "https://", "file:///a", "https://h/?q", "https://h:x/", "x y"]
)
def test_a_mirror_is_an_http_address(url: str) -> None:
    with pytest.raises(UsageError, match="give it as https://host/path"):
        base_url(url)


def test_the_mirror_is_the_argument_else_the_variable_else_openai(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BATCHGEN_MIRROR", raising=False)
    assert base_url() == openai.BASE_URL
    monkeypatch.setenv("BATCHGEN_MIRROR", "http://mirror.example/gpt-2/")
    assert base_url() == "http://mirror.example/gpt-2"
    assert base_url("https://other.example") == "https://other.example"


def test_a_downloads_folder_that_is_a_link_is_refused(server: FaultServer, models: Path, tmp_path: Path) -> None:
    models.mkdir()
    (models / ".downloads").symlink_to(tmp_path)
    with pytest.raises(ModelError, match=r"\.downloads: is a link, belongs to another user, or is writable by others"):
        get()
    (models / ".downloads").unlink()
    (models / ".downloads").mkdir()
    (models / ".downloads").chmod(0o777)
    with pytest.raises(ModelError, match=r"\.downloads: is a link"):
        get()


# --- parallel fetches ---------------------------------------------------------------------------------------------


def test_a_second_fetch_waits_and_finds_the_model(server: FaultServer, models: Path) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(get())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [models / "124M"] * 3
    assert asked(server) == dict.fromkeys(FILES, 1)


# --- picoGPT's functions -------------------------------------------------------------------------------------


def test_download_gpt2_files_downloads_the_seven_files(server: FaultServer, tmp_path: Path) -> None:
    download_gpt2_files("124M", tmp_path / "model")
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == {
        path.rpartition("/")[2]: data for path, data in server.files.items()
    }


def test_a_converted_model_loads_with_picogpts_keys(server: FaultServer, models: Path) -> None:
    get()
    encoder, hparams, params = load_encoder_hparams_and_params("124M", models)
    assert encoder.decode(encoder.encode("abc")) == "abc"
    assert hparams == BYTES.as_dict()
    assert params.keys() == {"wte", "wpe", "blocks", "ln_f"}


# --- the commands --------------------------------------------------------------------------------------------


def test_generate_fetches_a_missing_model_unless_no_fetch(server: FaultServer, models: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "abc"}\n')
    arguments = ["generate", str(prompts), "-o", str(tmp_path / "out.parquet"), "--model", "124M", "--jobs", "1"]
    result = CliRunner().invoke(app, [*arguments, "--no-fetch"])
    assert isinstance(result.exception, ModelError)
    assert "model 124M is not here; fetch it with: batchgen fetch 124M" in str(result.exception)
    assert not models.exists()
    result = CliRunner().invoke(app, ["generate", str(tmp_path / "none.jsonl"), *arguments[2:]])
    assert "none.jsonl" in str(result.exception)
    assert asked(server) == {}
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "1 rows: 1 ok" in result.output
    assert asked(server) == dict.fromkeys(FILES, 1)
    listed = CliRunner().invoke(app, ["models"]).output
    assert "OpenAI's 124M" in listed
    assert "Not here: 355M, 774M, 1558M (OpenAI). To get one: batchgen fetch 355M" in listed


def test_an_interrupt_ends_a_fetch_immediately_and_keeps_the_received_bytes(models: Path) -> None:
    with FaultServer({f"/124M/{name}": bytes(100_000) for name in FILES}) as server:
        for name in FILES:
            server.always[f"/124M/{name}"] = both(claim(497_759_232), stall(50_000)) if name == DATA else stall(0)
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "BATCHGEN_MODELS": str(models)}
        command = [sys.executable, "-m", "batchgen", "fetch", "124M", "--mirror", server.url()]
        child = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        part = models / ".downloads" / "124M" / f"{DATA}.part"
        while child.poll() is None and not (part.exists() and part.stat().st_size == 50_000):
            time.sleep(0.01)
        child.send_signal(signal.SIGINT)
        child.communicate(timeout=20)  # less than the 30 s for which a read waits
    assert child.returncode == 130
    assert part.stat().st_size == 50_000


def test_fetch_reports_progress(server: FaultServer, models: Path) -> None:
    result = CliRunner().invoke(app, ["fetch", "124M", "--progress", "plain"])
    assert result.exit_code == 0, result.output
    assert "124M: 0.3 of 0.3 MB" in result.output
    assert "124M: 1 of 1 tensors converted" in result.output
    assert f"{models / '124M'}: ready; use it with --model 124M" in result.output
    result = CliRunner().invoke(
        app, ["fetch", "124M", "--again", "--progress", "bar", "--mirror", server.url("/gpt-2")]
    )
    assert result.exit_code == 0, result.output


def test_only_openais_models_are_fetched(server: FaultServer, models: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "abc"}\n')
    result = CliRunner().invoke(app, ["generate", str(prompts), "-o", str(tmp_path / "o.parquet"), "--model", "mine"])
    assert "unknown model 'mine'" in str(result.exception)
    assert asked(server) == {}


def test_importing_the_commands_imports_no_network_library_and_no_framework() -> None:
    code = (
        "import sys, batchgen.jobs.cli, batchgen.run\n"
        "found = {'requests', 'urllib3', 'tensorflow', 'safetensors', 'torch'} & set(sys.modules)\n"
        "assert not found, found"
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


# --- with TensorFlow -----------------------------------------------------------------------------------------


@needs_tensorflow
def test_fetch_converts_a_checkpoint_through_tensorflow(
    tmp_path: Path, models: Path, known: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from batchgen.models.convert import convert_tf_checkpoint
    from tests.test_convert import CONFIG, TINY, _write_checkpoints

    monkeypatch.setattr(fetch, "convert_tf_checkpoint", convert_tf_checkpoint)
    monkeypatch.setattr(fetch, "CONFIGS", {"355M": CONFIG})
    src = tmp_path / "src"
    _write_checkpoints(TINY, 3, src)
    known.clear()
    with FaultServer({f"/355M/{path.name}": path.read_bytes() for path in src.iterdir()}) as server:
        server.faults[f"/355M/{DATA}"] = [drop(after=1000), status(503)]
        directory = fetch_model("355M", mirror=server.url(), patience=QUICK)
        expected = random_tensors(CONFIG, seed=3)
        np.testing.assert_array_equal(load_params(directory)["wte"], expected["wte"])
        (tmp_path / "pico").mkdir()
        monkeypatch.setenv("BATCHGEN_MIRROR", server.url())
        _, hparams, params = load_encoder_hparams_and_params("355M", tmp_path / "pico")
    assert hparams == TINY
    np.testing.assert_array_equal(params["blocks"][1]["mlp"]["c_fc"]["w"], expected["h1/mlp/c_fc/w"])
