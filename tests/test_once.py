"""once.py: an older model is packed by the first process that opens it, wherever it may write."""

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batchgen import files
from batchgen.errors import ModelError
from batchgen.models import shards
from batchgen.models.model import Model
from batchgen.models.registry import list_models
from batchgen.models.shards import load_manifest, load_tensors, verify_shards
from tests.support.models import rewrite_tensor, unpack_model, write_byte_model

LockFolder = Callable[[Path], None]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack_model(write_byte_model(tmp_path_factory.mktemp("older") / "bytes"))


@pytest.fixture
def older(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of format 1, in a folder that is not the user's folder of models."""
    monkeypatch.setenv("BATCHGEN_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Path(shutil.copytree(written, tmp_path / "bytes"))


@pytest.fixture
def refuse_writing(monkeypatch: pytest.MonkeyPatch) -> LockFolder:
    """Make a folder read-only, for root too."""
    refused: list[Path] = []
    open_path, mkdir = Path.open, Path.mkdir

    def check(path: Path) -> None:
        if any(path.is_relative_to(folder) for folder in refused):
            raise PermissionError(13, "Permission denied")

    def opened(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        if mode != "rb":
            check(path)
        return open_path(path, mode, *args, **options)

    def made(path: Path, *args: Any, **options: Any) -> None:
        if not path.exists():
            check(path)
        mkdir(path, *args, **options)

    monkeypatch.setattr(Path, "open", opened)
    monkeypatch.setattr(Path, "mkdir", made)
    return refused.append


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_an_older_model_is_packed_once_and_is_the_same_model(older: Path, caplog: pytest.LogCaptureFixture) -> None:
    before, tensors = load_manifest(older), load_tensors(older)
    (older / "README.md").write_text("mine")
    (older / "notes").mkdir()
    (older / "lm_head.panels.npy").write_text("of a process that was killed")
    model = Model.load(older)
    assert [record.message for record in caplog.records] == ["packing the weights of bytes, once"]
    assert (before.is_packed, model.manifest.is_packed) == (False, True)
    assert model.hash == shards.model_hash(before)
    model.verify()
    for name, found in load_tensors(older).items():
        np.testing.assert_array_equal(found, tensors[name])
    assert names(older) == {shard.file for shard in model.manifest.tensors.values()} | {
        *("manifest.json", "encoder.json", "vocab.bpe", "README.md", "notes")
    }
    assert names(older.parent) == {"bytes"}
    assert Model.load(older).files_hash == model.files_hash
    assert len(caplog.records) == 1


def test_of_processes_that_start_together_one_packs(older: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, pack = [], shards._pack_in_place

    def count(*given: Any) -> None:
        packed.append(given)
        pack(*given)

    monkeypatch.setattr(shards, "_pack_in_place", count)
    models: list[Model] = []
    threads = [threading.Thread(target=lambda: models.append(Model.load(older))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(packed) == 1
    assert len({model.files_hash for model in models}) == 1
    assert len(models) == 4


def test_a_model_that_cannot_be_written_is_packed_into_the_users_folder(
    older: Path, tmp_path: Path, refuse_writing: LockFolder, caplog: pytest.LogCaptureFixture
) -> None:
    before = names(older)
    refuse_writing(older)
    model = Model.load(older)
    assert len(caplog.records) == 1
    assert model.directory == older
    assert model.packed == tmp_path / "models" / ".packed" / model.hash
    model.verify()
    model.load_tokenizer()
    assert model.load_weights().lm_head.panels.shape == (5, 32, 64)
    assert model.with_precision("int8").load_weights().precision == "int8"
    assert names(older) == before
    assert names(model.packed) >= {"manifest.json", "int8", "encoder.json"}
    assert Model.load(older).files_hash == model.files_hash  # found, not made again
    assert [info.name for info in list_models() if "packed" in info.name] == []


def test_a_damaged_copy_in_the_users_folder_is_named_and_its_remedy_works(
    older: Path, refuse_writing: LockFolder
) -> None:
    refuse_writing(older)
    copy = Model.load(older).packed
    path = copy / "h0.mlp.c_fc.w.panels.npy"
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)
    with pytest.raises(ModelError, match=rf"{path.name}: is damaged .*; remove {copy}: it is made again"):
        Model.load(older).verify()
    path.unlink()
    with pytest.raises(ModelError, match=rf"{path.name}: is missing; remove {copy}: it is made again"):
        Model.load(older)
    (copy / "manifest.json").write_text("{")
    with pytest.raises(ModelError, match=rf"manifest.json: is not JSON .*; remove {copy}: it is made again"):
        Model.load(older)
    shutil.rmtree(copy)
    Model.load(older).verify()


def test_without_a_place_to_write_there_is_one_line_with_a_remedy(
    older: Path, tmp_path: Path, refuse_writing: LockFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = names(older)
    for folder in (older, tmp_path / "models", tmp_path / "cache"):
        refuse_writing(folder)
    with pytest.raises(
        ModelError, match="there is no place to write .*bytes: Permission denied.*set BATCHGEN_MODELS"
    ) as caught:
        Model.load(older)
    assert "\n" not in str(caught.value)
    assert names(older) == before
    monkeypatch.setenv("BATCHGEN_MODELS", str(tmp_path / "elsewhere"))
    Model.load(older).verify()


def test_damaged_weights_are_named_and_not_packed(older: Path) -> None:
    path = older / "h1.mlp.c_fc.w.npy"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    before = names(older)
    with pytest.raises(ModelError, match=rf"{path.name}: is damaged .expected sha256"):
        Model.load(older)
    assert names(older) == before


def test_a_disk_that_is_full_leaves_the_older_model(older: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = names(older)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ModelError, match="No space left on device"):
        Model.load(older)
    assert names(older) == before
    assert not load_manifest(older).is_packed
    verify_shards(older)


def test_packing_that_is_interrupted_after_its_last_step_leaves_a_model(
    older: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(files, "sync_path", interrupted)  # the manifest has been replaced
        with pytest.raises(KeyboardInterrupt):
            Model.load(older)
    Model.load(older).verify()


def test_a_file_of_the_model_with_the_name_of_a_packed_one_is_not_overwritten(older: Path) -> None:
    manifest = json.loads((older / "manifest.json").read_text())
    (older / "wpe.npy").rename(older / "lm_head.panels.npy")
    manifest["tensors"]["wpe"]["file"] = "lm_head.panels.npy"
    (older / "manifest.json").write_text(json.dumps(manifest))
    model = Model.load(older)
    assert model.packed != older
    model.verify()
    verify_shards(older)


def test_an_older_model_whose_head_is_not_the_embedding_is_packed_as_it_is(older: Path) -> None:
    """verify names it, as before."""
    rewrite_tensor(older, "lm_head", lambda array: array.__setitem__((3, 4), 9))
    digest = shards.model_hash(load_manifest(older))
    assert Model.load(older).hash == digest
