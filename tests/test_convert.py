import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from batchgen.errors import ModelError
from batchgen.gpt2.config import GPT2Config
from batchgen.models import convert
from batchgen.models.convert import convert_tf_checkpoint, load_gpt2_params_from_tf_ckpt, read_tf_tensors
from batchgen.models.shards import load_manifest, load_params, load_tensors, model_hash, verify_shards
from tests.support.tensors import random_tensors

REPOSITORY = Path(__file__).resolve().parents[1]
TINY = {"n_vocab": 50, "n_ctx": 16, "n_embd": 8, "n_head": 2, "n_layer": 2}
GPT2_124M = {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12}
CONFIG = GPT2Config(**TINY)
INDEX, DATA, META = "model.ckpt.index", "model.ckpt.data-00000-of-00001", "model.ckpt.meta"
PUBLISHED = {"checkpoint", "encoder.json", "hparams.json", DATA, INDEX, META, "vocab.bpe"}

needs_tensorflow = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is None, reason="tensorflow is not installed (pip install tensorflow-cpu)"
)


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with this repository on its path; TensorFlow, which prints, runs only in such processes."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done


def _write_checkpoints(hparams: dict[str, int], seed: int, *directories: Path) -> None:
    """The second one as saved in training. TensorFlow takes seconds to start, so that one process writes both."""
    for directory in directories:
        directory.mkdir()
    code = "import json, pathlib, sys; from tests.support.write_tf_checkpoint import main\n"
    code += "for directory, training in zip(sys.argv[3:], ('', '--training')):\n"
    code += "    main(pathlib.Path(directory), json.loads(sys.argv[1]), int(sys.argv[2]), training)"
    _python("-c", code, json.dumps(hparams), str(seed), *map(str, directories))


def _assert_holds(model: Path, tensors: dict[str, Any]) -> None:
    for name, found in load_tensors(model).items():
        np.testing.assert_array_equal(found.view("u4"), tensors[name].view("u4"), err_msg=name)


@pytest.fixture(scope="module")
def written_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tf")
    _write_checkpoints(TINY, 1, folder / "tiny", folder / "training")
    return folder / "tiny"


@pytest.fixture
def src(written_checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(written_checkpoint, tmp_path / "src")


@pytest.fixture
def plain_src(tmp_path: Path) -> Path:
    """A directory with the seven files, whose index and data are empty."""
    directory = tmp_path / "src"
    directory.mkdir()
    for name in PUBLISHED:
        (directory / name).write_text("")
    (directory / "checkpoint").write_text('model_checkpoint_path: "model.ckpt"\n')
    (directory / "hparams.json").write_text(json.dumps(TINY))
    (directory / "encoder.json").write_text('{"<|endoftext|>": 0}')
    return directory


# --- checkpoints written by TensorFlow ------------------------------------------------------------------


@needs_tensorflow
def test_a_converted_checkpoint_holds_its_weights_bit_for_bit(src: Path, tmp_path: Path) -> None:
    assert {path.name for path in src.iterdir()} == PUBLISHED
    convert_tf_checkpoint(src, tmp_path / "tiny", name="tiny")
    verify_shards(tmp_path / "tiny")
    _assert_holds(tmp_path / "tiny", random_tensors(CONFIG, seed=1))
    manifest = load_manifest(tmp_path / "tiny")
    assert (manifest.name, manifest.config) == ("tiny", CONFIG)
    assert manifest.source["format"] == "TensorFlow checkpoint"
    for name in ("encoder.json", "vocab.bpe"):
        assert (tmp_path / "tiny" / name).read_bytes() == (src / name).read_bytes()


@needs_tensorflow
def test_a_checkpoint_saved_in_training_converts_to_the_same_model(written_checkpoint: Path, tmp_path: Path) -> None:
    """With Adam's slots and counters, an int64 step and strings, as tf.train.Saver saves all variables."""
    convert_tf_checkpoint(written_checkpoint.with_name("training"), tmp_path / "tiny", name="tiny")
    _assert_holds(tmp_path / "tiny", random_tensors(CONFIG, seed=1))


@needs_tensorflow
def test_converting_twice_gives_the_same_model(src: Path, tmp_path: Path) -> None:
    for name in ("a", "b", "a"):
        convert_tf_checkpoint(src, tmp_path / name, name=name)
    assert len({model_hash(load_manifest(tmp_path / name)) for name in "ab"}) == 1


@needs_tensorflow
def test_picogpts_function_returns_picogpts_dicts(src: Path) -> None:
    params = load_gpt2_params_from_tf_ckpt(str(src / "model.ckpt"), TINY)
    tensors = random_tensors(CONFIG, seed=1)
    assert params.keys() == {"blocks", "wte", "wpe", "ln_f"}
    assert len(params["blocks"]) == 2
    assert {key: set(value) for key, value in params["blocks"][0].items()} == {
        "ln_1": {"g", "b"},
        "attn": {"c_attn", "c_proj"},
        "ln_2": {"g", "b"},
        "mlp": {"c_fc", "c_proj"},
    }
    assert params["blocks"][1]["attn"]["c_attn"]["w"].shape == (8, 24)
    np.testing.assert_array_equal(params["blocks"][1]["attn"]["c_attn"]["w"], tensors["h1/attn/c_attn/w"])
    np.testing.assert_array_equal(params["ln_f"]["b"], tensors["ln_f/b"])


@needs_tensorflow
@pytest.mark.parametrize("place", ["{other}/model.ckpt", "../other/model.ckpt", "..\\\\other\\\\model.ckpt"])
def test_a_checkpoint_file_with_another_directory_is_not_followed(place: str, src: Path, tmp_path: Path) -> None:
    other = shutil.copytree(src, tmp_path / "other")
    for name in (INDEX, DATA):
        (other / name).write_text("not to be opened")
    (src / "checkpoint").write_text(f'model_checkpoint_path: "{place.format(other=other)}"\n')
    convert_tf_checkpoint(src, tmp_path / "tiny", name="tiny")
    _assert_holds(tmp_path / "tiny", random_tensors(CONFIG, seed=1))


@needs_tensorflow
def test_a_checkpoint_of_another_name_is_found_through_its_checkpoint_file(src: Path, tmp_path: Path) -> None:
    for name in (INDEX, DATA):
        (src / name).rename(src / name.replace("model.ckpt", "model-1000"))
    (src / "checkpoint").write_text('model_checkpoint_path: "/home/someone/run1/model-1000"\n')
    convert_tf_checkpoint(src, tmp_path / "tiny", name="tiny")
    _assert_holds(tmp_path / "tiny", random_tensors(CONFIG, seed=1))


@needs_tensorflow
def test_files_used_only_for_training_may_be_absent(src: Path, tmp_path: Path) -> None:
    for name in ("checkpoint", META):
        (src / name).unlink()
    convert_tf_checkpoint(src, tmp_path / "tiny", name="tiny")
    verify_shards(tmp_path / "tiny")


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


@needs_tensorflow
@pytest.mark.parametrize("name", [INDEX, DATA])
@pytest.mark.parametrize("damage", [_cut, _flip, _empty])
def test_a_damaged_checkpoint_is_refused_and_leaves_nothing(damage: Any, name: str, src: Path, tmp_path: Path) -> None:
    damage(src / name)
    with pytest.raises(ModelError, match=f"{name}.* cannot be read .*download the checkpoint again") as caught:
        convert_tf_checkpoint(src, tmp_path / "tiny", name="tiny")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


@needs_tensorflow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layer": 3}, "lacks 'model/h2/"),
        ({"n_layer": 1}, "has an unexpected 'model/h1/"),
        ({"n_layer": 2**24}, r"hparams\.json: config: n_layer is 16777216; it must be a whole number"),
        (
            {"n_embd": 16},
            r"model/wte: expected shape \[50, 16\], found \[50, 8\]; hparams.json belongs to another model",
        ),
        ({"n_ctx": 8}, r"model/wpe: expected shape \[8, 8\], found \[16, 8\]"),
    ],
)
def test_hparams_of_another_model_are_refused(change: dict[str, int], message: str, src: Path, tmp_path: Path) -> None:
    (src / "hparams.json").write_text(json.dumps(TINY | change))
    with pytest.raises(ModelError, match=message):
        convert_tf_checkpoint(src, tmp_path / "tiny", name="tiny")
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


@needs_tensorflow
def test_a_checkpoint_of_124ms_true_shape_converts_bit_for_bit_in_silence_and_little_memory(tmp_path: Path) -> None:
    src, dst = tmp_path / "src", tmp_path / "124M"
    try:
        _write_checkpoints(GPT2_124M, 2, src)
        assert (src / DATA).stat().st_size == 497_759_232  # as OpenAI's
        assert (src / INDEX).stat().st_size == 5_215
        code = (
            "import os, sys, pathlib; from batchgen.models.convert import convert_tf_checkpoint\n"
            "before = dict(os.environ)\n"
            "convert_tf_checkpoint(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), name='124M')\n"
            "assert dict(os.environ) == before\n"
            "print(pathlib.Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"
        )
        done = _python("-W", "error", "-c", code, str(src), str(dst))
        peak_kb = int(done.stdout)
        assert done.stderr == ""
        assert peak_kb < 1_500_000  # not held in memory at once: the weights with the transposed copy are 650 MB
        _assert_holds(dst, random_tensors(GPT2Config(**GPT2_124M), seed=2))
        assert load_params(dst)["lm_head"].shape == (768, 50257)
    finally:
        shutil.rmtree(src, ignore_errors=True)
        shutil.rmtree(dst, ignore_errors=True)


# --- refusals before TensorFlow is imported ---------------------------------------------------------


@pytest.mark.parametrize("name", ["hparams.json", INDEX, DATA])
def test_a_missing_file_is_named_with_the_remedy(name: str, plain_src: Path, tmp_path: Path) -> None:
    (plain_src / name).unlink()
    with pytest.raises(ModelError, match=f"src: {name} not found; download the checkpoint again"):
        convert_tf_checkpoint(plain_src, tmp_path / "tiny", name="tiny")


@pytest.mark.parametrize("name", ["encoder.json", "vocab.bpe"])
def test_a_missing_vocabulary_is_named(name: str, plain_src: Path, tmp_path: Path) -> None:
    (plain_src / name).unlink()
    with pytest.raises(ModelError, match="src: no vocabulary, neither encoder.json"):
        convert_tf_checkpoint(plain_src, tmp_path / "tiny", name="tiny")


def test_a_source_that_is_not_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere: is not a directory"):
        convert_tf_checkpoint(tmp_path / "nowhere", tmp_path / "tiny", name="tiny")


@pytest.mark.parametrize("text", ["", "model_checkpoint_path: model.ckpt", 'model_checkpoint_path: ".."', "\0" * 99])
def test_a_checkpoint_file_without_a_plain_name_is_refused(text: str, plain_src: Path, tmp_path: Path) -> None:
    (plain_src / "checkpoint").write_text(text)
    with pytest.raises(ModelError, match="checkpoint: has no line `model_checkpoint_path"):
        convert_tf_checkpoint(plain_src, tmp_path / "tiny", name="tiny")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ("[]", "expected an object, found a list of 0"),
        ("{}", "config: 'n_vocab' is missing"),
        (json.dumps(TINY | {"n_head": 3}), "n_embd 8 is not a multiple of n_head 3"),
        (json.dumps(TINY | {"n_head": "2"}), "n_head: expected a whole number, found '2'"),
        ("[" * 60_000, "is not JSON"),
        (" " * 70_000, "is larger than 65536 bytes"),
    ],
)
def test_bad_hparams_are_refused_with_place_and_value(text: str, message: str, plain_src: Path, tmp_path: Path) -> None:
    (plain_src / "hparams.json").write_text(text)
    with pytest.raises(ModelError, match=f"hparams.json: .*{message}"):
        convert_tf_checkpoint(plain_src, tmp_path / "tiny", name="tiny")


def test_an_occupied_destination_is_refused_before_tensorflow_is_imported(
    plain_src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "_import_tensorflow", lambda: pytest.fail("TensorFlow was imported"))
    with pytest.raises(ModelError, match="exists, and is not a model"):
        convert_tf_checkpoint(plain_src, plain_src, name="tiny")


def test_without_tensorflow_the_error_says_how_to_install_it(
    plain_src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(ModelError, match="pip install tensorflow-cpu"):
        convert_tf_checkpoint(plain_src, tmp_path / "tiny", name="tiny")
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


# --- unusual variables, from a fake of TensorFlow's reader --------------


class FakeReader:
    def __init__(self, variables: dict[str, Any]) -> None:
        self.variables = variables

    def get_variable_to_shape_map(self) -> dict[str, list[int]]:
        return {name: list(array.shape) for name, array in self.variables.items()}

    def get_variable_to_dtype_map(self) -> dict[str, Any]:
        return {name: array.dtype for name, array in self.variables.items()}

    def get_tensor(self, name: str) -> Any:
        return self.variables[name]


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The variables of a fake checkpoint; a test changes them before it reads them."""
    tensors = random_tensors(CONFIG)
    del tensors["lm_head"]
    made = {f"model/{name}": array[None] if array.ndim == 2 else array for name, array in tensors.items()}
    train = SimpleNamespace(NewCheckpointReader=lambda prefix: FakeReader(made))
    fake = SimpleNamespace(compat=SimpleNamespace(v1=SimpleNamespace(train=train)))
    monkeypatch.setattr(convert, "_import_tensorflow", lambda: fake)
    monkeypatch.setattr(convert, "check_index", lambda index, data: None)
    return made


def test_leading_dimensions_of_one_are_removed(variables: dict[str, Any]) -> None:
    found = {name: array.shape for name, array in read_tf_tensors(Path("model.ckpt"), CONFIG)}
    assert found == CONFIG.tensor_shapes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model/wpe": np.zeros((16, 8), "f8")}, "model/wpe: expected float32, found float64"),
        ({"model/wpe": np.zeros((8, 16), "f4")}, r"model/wpe: expected shape \[16, 8\], found \[8, 16\]"),
        ({"model/wpe": np.full((16, 8), np.nan, "f4")}, "tensor wpe: holds nan"),
        ({"model/wpe": None, "model/extra": np.zeros(3)}, "lacks 'model/wpe'"),
        ({"model/h2/ln_1/g": np.zeros(8, "f4")}, "has an unexpected 'model/h2/ln_1/g'"),
        ({"model/lm_head/w": np.zeros((8, 50), "f4")}, "has an unexpected 'model/lm_head/w'"),
    ],
)
def test_an_unexpected_variable_is_named(
    change: dict[str, Any], message: str, variables: dict[str, Any], plain_src: Path, tmp_path: Path
) -> None:
    variables.update(change)
    for name in [name for name, array in variables.items() if array is None]:
        del variables[name]
    with pytest.raises(ModelError, match=message):
        convert_tf_checkpoint(plain_src, tmp_path / "tiny", name="tiny")
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_an_optimizers_slots_and_counters_are_left_out_and_named(
    variables: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    names = {
        "global_step": "i8",
        "beta1_power": "f4",
        "model/model/wte/Adam": "f4",
        "model/h0/attn/c_attn/w/Adam_1": "f4",
    }
    variables.update({name: np.zeros(3, dtype) for name, dtype in names.items()})
    assert dict(read_tf_tensors(Path("model.ckpt"), CONFIG)).keys() == CONFIG.tensor_shapes().keys()
    named = "'beta1_power', 'global_step', 'model/h0/attn/c_attn/w/Adam_1', 'model/model/wte/Adam'"
    assert caplog.messages == [f"model.ckpt: left out, because it is no weight of the model: {named}"]
