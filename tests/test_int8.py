"""int8.py: weights rounded once, mapped by every worker, and never taken for another model's."""

import json
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batchgen.errors import ModelError
from batchgen.files import sha256_of
from batchgen.gpt2.weights import to_int8
from batchgen.models import int8
from batchgen.models.model import Model, make_default
from batchgen.models.shards import Description, load_manifest, load_tensors, write_model, write_npy
from batchgen.models.verify import verify_model
from tests.support.models import BYTES, rewrite_tensor, write_byte_model

CONFIG = replace(BYTES, n_inner=33)  # so that rows and columns fill neither panels nor groups


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = write_byte_model(tmp_path_factory.mktemp("int8") / "bytes", CONFIG)
    Model.load(model, precision="int8")
    return model


@pytest.fixture
def model(written: Path, tmp_path: Path) -> Path:
    """A model that has its weights in int8 too."""
    return Path(shutil.copytree(written, tmp_path / "bytes"))


def flip(path: Path, position: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_mapped_weights_are_the_rounded_ones_and_begin_at_a_cache_line(model: Path) -> None:
    opened = Model.load(model)
    found, params = opened.with_precision("int8").load_weights(), opened.load_params()
    assert found.precision == "int8"
    mapped: list[tuple[Any, Any]] = [(found.lm_head, {"w": params["lm_head"], "b": np.zeros(257, np.float32)})]
    for block, given in zip(found.blocks, params["blocks"], strict=True):
        np.testing.assert_array_equal(block.ln_1["g"], given["ln_1"]["g"])
        mapped += [(block.c_attn, given["attn"]["c_attn"]), (block.attn_proj, given["attn"]["c_proj"])]
        mapped += [(block.c_fc, given["mlp"]["c_fc"]), (block.mlp_proj, given["mlp"]["c_proj"])]
    for mine, linear in mapped:
        theirs = to_int8(**linear, inverse=mine.inverse, offset=mine.offset)
        for field in fields(mine):
            array = getattr(mine, field.name)
            np.testing.assert_array_equal(array, getattr(theirs, field.name))
            assert array.dtype == getattr(theirs, field.name).dtype
            assert array.ctypes.data % 64 == 0
            assert not array.flags.writeable


def test_they_are_made_once_and_are_the_same_files_when_made_again(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = contents(model / "int8")
    first = Model.load(model, precision="int8")
    assert caplog.records == []
    shutil.rmtree(model / "int8")
    (model / ".int8.tmp" / "new").mkdir(parents=True)  # of a process that was killed
    second = Model.load(model, precision="int8")
    assert [record.message for record in caplog.records] == ["rounding the weights of bytes to int8, once"]
    assert contents(model / "int8") == before
    assert not (model / ".int8.tmp").exists()
    assert (first.hash, first.files_hash != second.files_hash) == (second.hash, True)


def test_a_model_in_int8_names_the_bytes_that_a_worker_maps(model: Path) -> None:
    opened = Model.load(model)
    in_int8 = opened.with_precision("int8")
    tensors = opened.manifest.tensors.values()
    folder = sum(path.stat().st_size for path in (model / "int8").glob("*.npy"))
    assert opened.bytes == sum((model / shard.file).stat().st_size for shard in tensors)
    assert in_int8.bytes == folder + sum((model / s.file).stat().st_size for s in tensors if not s.in_panels)
    assert in_int8.with_precision("float32") == opened
    assert (opened.precision, in_int8.precision) == ("float32", "int8")
    assert opened.files_hash != in_int8.files_hash


@pytest.mark.parametrize("name", ["lm_head.panels.npy", "h1.mlp.c_proj.w.panels.npy", "scale.npy", "offset.npy"])
def test_damage_is_named_before_a_row_and_the_remedy_works(model: Path, name: str) -> None:
    path = model / "int8" / name
    flip(path)
    opened = Model.load(model, precision="int8")
    remedy = f"; remove {model / 'int8'}: it is made again"
    with pytest.raises(ModelError, match=f"int8/{name}: is damaged .*{remedy}"):
        opened.verify()
    with pytest.raises(ModelError, match=f"int8/{name}: is damaged .*{remedy}"):
        list(verify_model(Model.load(model)))  # of the model in float32 too
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match=f"int8/{name}: .*truncated, {remedy[2:]}"):
        Model.load(model).with_precision("int8").load_weights()
    path.unlink()
    with pytest.raises(ModelError, match=f"int8/{name}: is missing{remedy}"):
        Model.load(model, precision="int8")
    shutil.rmtree(model / "int8")
    Model.load(model, precision="int8").verify()


def test_weights_replaced_while_they_are_in_use_are_refused(model: Path) -> None:
    opened = Model.load(model, precision="int8")
    opened.check_unchanged()
    flip(model / "int8" / "scale.npy")
    for use in (opened.check_unchanged, opened.verify, opened.load_weights):
        with pytest.raises(ModelError, match=r"int8/scale\.npy: was replaced or changed while the model is in use"):
            use()


def test_damaged_float32_weights_are_named_and_not_rounded(model: Path) -> None:
    shutil.rmtree(model / "int8")
    flip(model / "h0.attn.c_attn.w.panels.npy", 200)
    with pytest.raises(ModelError, match=r"h0\.attn\.c_attn\.w\.panels\.npy: is damaged"):
        Model.load(model, precision="int8")
    assert not (model / "int8").exists()
    assert not (model / ".int8.tmp").exists()


def set_values(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda found: found.update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_values(files=[]), "files: expected an object, found a list of 0"),
        (set_values(files={}), "files: .* is missing"),
        (set_values(more=1), "unknown key 'more'"),
        (lambda found: found.pop("model"), "'model' is missing"),
        (lambda found: found["files"].update({"../x.npy": "0" * 64}), r"files: unknown key '\.\./x\.npy'"),
        (lambda found: found["files"].update({"scale.npy": "0"}), r"files: scale\.npy: expected 64 hex digits"),
    ],
)
def test_a_manifest_that_lies_gives_one_line(change: Callable[[Any], object], message: str, model: Path) -> None:
    path = model / "int8" / "int8.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(ModelError, match=rf"int8\.json: {message}.*; remove .*int8: it is made again") as caught:
        Model.load(model, precision="int8")
    assert "\n" not in str(caught.value)


def test_weights_of_another_model_or_recipe_are_made_again(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(model / "int8")
    rewrite_tensor(model, "h0/mlp/c_fc/w", lambda array: array.__setitem__((3, 4), 9))
    Model.load(model, precision="int8").verify()
    assert contents(model / "int8") != before
    before = contents(model / "int8")
    monkeypatch.setattr(int8, "RECIPE", int8.RECIPE + 1)
    Model.load(model, precision="int8").verify()
    changed = {name for name, data in contents(model / "int8").items() if data != before[name]}
    assert changed == {"int8.json"}


def test_verify_rounds_the_weights_again(model: Path) -> None:
    assert any(line.startswith("int8: 14 files have the sha256") for line in verify_model(Model.load(model)))
    path = model / "int8" / "h1.mlp.c_fc.w.panels.npy"
    panels = np.load(path)
    panels[0, 3, 5, 1] += 1
    path.unlink()
    write_npy(path, panels)
    values = json.loads((path.parent / "int8.json").read_text())
    values["files"][path.name] = sha256_of(path)
    (path.parent / "int8.json").write_text(json.dumps(values))
    with pytest.raises(ModelError, match=r"h1\.mlp\.c_fc\.w\.panels\.npy: is not h1/mlp/c_fc/w rounded to int8"):
        list(verify_model(Model.load(model)))


def test_a_models_default_is_what_a_job_gets_that_names_no_precision(model: Path) -> None:
    digest = Model.load(model).hash
    for precision in ("int8", "float32", "int8"):
        make_default(model, precision)
        opened = Model.load(model)
        assert (opened.precision, opened.load_weights().precision, opened.hash) == (precision, precision, digest)
        assert load_manifest(model).precision == precision
    assert Model.load(model, precision="float32").load_weights().precision == "float32"


def test_a_model_that_takes_the_place_of_another_has_none_of_its_int8_weights(model: Path) -> None:
    other = write_byte_model(model.with_name("other"), CONFIG, seed=1)
    write_model(model, Description("bytes", CONFIG, {}), load_tensors(other).items(), tokenizer_dir=other, replace=True)
    assert not (model / "int8").exists()
