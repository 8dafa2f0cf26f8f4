import json
import os
from pathlib import Path

import pytest

from batchgen.errors import ModelError
from batchgen.gpt2.config import GPT2Config
from batchgen.models import registry
from batchgen.models.registry import find_model, list_models, model_destination, model_roots, models_dir
from batchgen.models.shards import Description, load_manifest, model_hash, write_model
from tests.support.tensors import random_tensors

CONFIG = GPT2Config(n_vocab=50, n_ctx=16, n_embd=8, n_head=2, n_layer=2)


@pytest.fixture(autouse=True)
def roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Three empty roots and an empty working directory."""
    folders = {name: tmp_path / name for name in ("own", "cache", "embedded", "cwd")}
    for folder in folders.values():
        folder.mkdir()
    monkeypatch.setenv("BATCHGEN_MODELS", str(folders["own"]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folders["cache"]))
    monkeypatch.setattr(registry, "_embedded", lambda: folders["embedded"])
    monkeypatch.chdir(folders["cwd"])
    return folders | {"cache": folders["cache"] / "batchgen" / "models"}


def _write(directory: Path, seed: int = 0) -> Path:
    vocabulary = directory.parent / ".vocabulary"
    vocabulary.mkdir(parents=True, exist_ok=True)
    (vocabulary / "encoder.json").write_text("{}")
    (vocabulary / "vocab.bpe").write_text("")
    description = Description("x", CONFIG, {"seed": str(seed)})
    write_model(directory, description, random_tensors(CONFIG, seed).items(), tokenizer_dir=vocabulary)
    return directory


def test_a_name_is_looked_up_in_the_roots_in_order(roots: dict[str, Path]) -> None:
    for root in ("embedded", "cache", "own"):
        _write(roots[root] / "mine")
        assert find_model("mine") == roots[root] / "mine"


def test_a_folder_without_a_manifest_does_not_hide_a_model(roots: dict[str, Path]) -> None:
    (roots["own"] / "mine").mkdir()
    _write(roots["embedded"] / "mine")
    assert find_model("mine") == roots["embedded"] / "mine"
    assert [(info.path, info.error) for info in list_models()] == [(roots["embedded"] / "mine", None)]


def test_a_text_with_a_separator_is_a_path(roots: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = _write(roots["cwd"] / "local")
    assert find_model("./local") == Path("local")
    assert find_model(str(model)) == model
    assert find_model("local") == Path("local")
    monkeypatch.setenv("HOME", str(roots["cwd"]))
    assert find_model("~/local") == model
    with pytest.raises(ModelError, match=r"nowhere: is not a model"):
        find_model("./nowhere")


@pytest.mark.parametrize("name", ["", ".hidden", "a b", "a\0", "a\n", "\ud800", "ä", "x" * 101, "a:b"])
def test_a_bare_name_cannot_leave_its_folder(name: str) -> None:
    for function in (find_model, model_destination):
        with pytest.raises(ModelError, match="use up to 100 letters, digits"):
            function(name)


@pytest.mark.parametrize("name", [".", "..", "../own", "/", "a/../.."])
def test_a_path_that_is_not_a_model_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match="is not a model"):
        find_model(name)


def test_the_error_for_an_unknown_name_lists_the_known_and_the_nearest(roots: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match=r"unknown model 'tales' \(known: none\)"):
        find_model("tales")
    _write(roots["embedded"] / "tales")
    (roots["own"] / "broken").mkdir()
    with pytest.raises(ModelError, match=r"unknown model 'Tale'; did you mean 'tales'\? \(known: tales\)"):
        find_model("Tale")
    with pytest.raises(ModelError, match=r"unknown model '124m'; did you mean '124M'\?"):
        find_model("124m")


@pytest.mark.parametrize("name", ["124M", "355M", "774M", "1558M"])
def test_the_error_for_an_openai_model_says_how_to_get_it(name: str) -> None:
    with pytest.raises(ModelError, match=f"batchgen convert SRC {name}"):
        find_model(name)


def test_list_models_describes_a_model(roots: dict[str, Path]) -> None:
    path = _write(roots["own"] / "mine", seed=7)
    (info,) = list_models()
    assert (info.name, info.path, info.config, info.error) == ("mine", path, CONFIG, None)
    assert info.source == {"seed": "7"}
    assert info.hash == model_hash(load_manifest(path))
    assert info.parameters == sum(array.size for name, array in random_tensors(CONFIG).items() if name != "lm_head")
    assert info.bytes == sum(file.stat().st_size for file in path.iterdir() if file.name != "manifest.json")


def test_broken_models_are_listed_with_their_error(roots: dict[str, Path]) -> None:
    (roots["own"] / "empty").mkdir()
    (roots["own"] / ".hidden").mkdir()
    (roots["own"] / "file").write_text("")
    (_write(roots["own"] / "short") / "wpe.npy").write_bytes(b"")
    manifest = _write(roots["own"] / "wrong") / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 9}))
    errors = {info.name: info.error or "" for info in list_models()}
    assert errors.keys() == {"empty", "short", "wrong"}
    assert "is not a model" in errors["empty"]
    assert "wpe.npy: expected a version 1.0 .npy file" in errors["short"]
    assert "format is 9" in errors["wrong"]


def test_new_models_go_to_the_users_folder(roots: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    assert model_destination("124M") == models_dir() / "124M" == roots["own"] / "124M"
    assert model_destination("./124M") == Path("124M")
    monkeypatch.delenv("BATCHGEN_MODELS")
    assert models_dir() == roots["cache"]
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(roots["cwd"]))
    assert models_dir() == roots["cwd"] / ".cache" / "batchgen" / "models"


def test_an_empty_variable_counts_as_unset(roots: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHGEN_MODELS", "")
    assert model_roots() == [roots["cache"], roots["embedded"]]


def test_without_a_home_directory_the_embedded_models_are_found(
    roots: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BATCHGEN_MODELS")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    _write(roots["embedded"] / "tales")
    assert find_model("tales") == roots["embedded"] / "tales"
    with pytest.raises(ModelError, match="set BATCHGEN_MODELS"):
        models_dir()
