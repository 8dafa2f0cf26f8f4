"""Checkpoints of either kind made into model directories; and OpenAI's, through TensorFlow, a tensor at a time."""

import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from batchgen.errors import ModelError
from batchgen.gpt2.config import GPT2Config
from batchgen.gpt2.params import Array, nest
from batchgen.models.bundle import check_index
from batchgen.models.huggingface import CONFIG, convert_hf_checkpoint
from batchgen.models.shards import (
    OnProgress,
    counted,
    file_sha256,
    open_file,
    parse_config,
    read_json,
    short,
    write_model,
)

INDEX, DATA = ".index", ".data-00000-of-00001"
_PREFIX = "model.ckpt"
_QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0", "CUDA_VISIBLE_DEVICES": "-1"}
_REMEDY = "download the checkpoint again"
_OTHER_MODEL = f"hparams.json is of another model, or {_REMEDY}"
_NEEDS_TENSORFLOW = "reading a TensorFlow checkpoint needs TensorFlow; install it with: pip install tensorflow-cpu"


def convert_checkpoint(
    src: Path, dst: Path, *, name: str, replace: bool = False, on_progress: OnProgress | None = None
) -> None:
    """Convert what src holds, a Hugging Face GPT-2 or OpenAI's TensorFlow checkpoint, into the model directory dst."""
    if not os.path.isdir(src):
        raise ModelError(f"{src}: is not a directory; give the one that holds the checkpoint's files")
    convert = convert_hf_checkpoint if os.path.lexists(src / CONFIG) else convert_tf_checkpoint
    convert(src, dst, name=name, replace=replace, on_progress=on_progress)


def convert_tf_checkpoint(
    src: Path,
    dst: Path,
    *,
    name: str,
    replace: bool = False,
    source: Mapping[str, str] | None = None,
    on_progress: OnProgress | None = None,
) -> None:
    """Convert a checkpoint directory as OpenAI publishes it into the model directory dst.

    Reads hparams.json, the checkpoint's index and data, and the vocabulary; needs not much more memory
    than TensorFlow itself and the largest tensor. Raises ModelError, with the file, on anything missing
    or damaged; dst is then as it was. source: what else the manifest is to say of where it comes from.
    """
    prefix = find_checkpoint(src)
    config = read_hparams(src / "hparams.json")
    known = {"format": "TensorFlow checkpoint", "index_sha256": file_sha256(Path(f"{prefix}{INDEX}"))}
    tensors = counted(read_tf_tensors(prefix, config), len(config.tensor_shapes()), on_progress)
    write_model(dst, config, tensors, name=name, source=known | dict(source or {}), tokenizer_dir=src, replace=replace)


def load_gpt2_params_from_tf_ckpt(tf_ckpt_path: str, hparams: dict[str, Any]) -> dict[str, Any]:
    """Read a whole checkpoint into picoGPT's nested dict; picoGPT's function, its arguments and its result.

    tf_ckpt_path: the files' common prefix, `models/124M/model.ckpt`; hparams: hparams.json as a dict.
    """
    config = parse_config(hparams)
    return dict(nest(dict(read_tf_tensors(Path(tf_ckpt_path), config)), config.n_layer))


def find_checkpoint(src: Path) -> Path:
    """Return the prefix of src's checkpoint files, `src/model.ckpt`, having seen that they are there.

    The text file `checkpoint` may give them another name, but never another directory: what it says of
    directories is where its writer had them, or an attack.
    """
    if not os.path.isdir(src):
        raise ModelError(f"{src}: is not a directory; give the one that holds the checkpoint's files")
    prefix = src.absolute() / _checkpoint_name(src / "checkpoint")
    needed = [prefix.name + INDEX, prefix.name + DATA, "hparams.json"]
    missing = [name for name in needed if not os.path.isfile(src / name)]
    if missing:
        raise ModelError(f"{src}: {', '.join(missing)} not found; {_REMEDY}, all seven files of it")
    return prefix


def _checkpoint_name(path: Path) -> str:
    """Read the last part of `model_checkpoint_path: "/somewhere/model.ckpt"`; without the file, model.ckpt."""
    if not os.path.exists(path):
        return _PREFIX
    with open_file(path) as file:
        text = file.read(2**16).decode(errors="replace")
    found = re.search(r'^model_checkpoint_path: *"(?:.*[/\\])?([A-Za-z0-9_][A-Za-z0-9._-]*)"', text, re.MULTILINE)
    if not found:
        raise ModelError(f'{path}: has no line `model_checkpoint_path: "{_PREFIX}"`; {_REMEDY}')
    return found[1]


def read_hparams(path: Path) -> GPT2Config:
    values = read_json(path, limit=2**16)
    if not isinstance(values, dict):
        raise ModelError(f"{path}: expected an object, found {short(values)}; {_REMEDY}")
    try:
        return parse_config(values)
    except ModelError as error:
        raise ModelError(f"{path}: {short(error)}; {_REMEDY}") from error


def read_tf_tensors(prefix: Path, config: GPT2Config) -> Iterator[tuple[str, Array]]:
    """Yield (name, array) for each of config.tensor_shapes(), in that order, one in memory at a time.

    `model/h0/attn/c_attn/w` of shape [1, 768, 2304] -> `h0/attn/c_attn/w` of shape [768, 2304].
    """
    tensorflow = _import_tensorflow()
    check_index(Path(f"{prefix}{INDEX}"), Path(f"{prefix}{DATA}"))
    with _reading(f"{prefix}{INDEX}"):
        reader = tensorflow.compat.v1.train.NewCheckpointReader(str(prefix))
        shapes, dtypes = reader.get_variable_to_shape_map(), reader.get_variable_to_dtype_map()
    _check_names(prefix, set(shapes), config)
    for name, shape in config.tensor_shapes().items():
        variable = f"model/{name}"
        _check_variable(f"{prefix}: {variable}", shapes[variable], dtypes[variable].name, shape)
        with _reading(f"{prefix}{DATA}: {variable}"):
            array = reader.get_tensor(variable)
        yield name, array.reshape(shape)


def _import_tensorflow() -> Any:
    """Import TensorFlow, here and nowhere else."""
    try:
        with _quiet():
            import tensorflow

            return tensorflow
    except ModuleNotFoundError as error:
        raise ModelError(_NEEDS_TENSORFLOW) from error
    except Exception as error:  # an installation whose parts do not fit together raises anything
        raise ModelError(f"{_NEEDS_TENSORFLOW} (the one here fails: {_reason(error)})") from error


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Turn what TensorFlow raises, kinds that cannot be named without importing it, into ModelError."""
    try:
        yield
    except Exception as error:
        raise ModelError(f"{what} cannot be read ({_reason(error)}); {_REMEDY}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep TensorFlow from reporting on the machine while it is imported; it only has to read a file."""
    before = {name: os.environ.get(name) for name in _QUIET}
    os.environ |= _QUIET
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _check_names(prefix: Path, found: set[str], config: GPT2Config) -> None:
    expected = {f"model/{name}" for name in config.tensor_shapes()}
    for words, names in (("lacks", expected - found), ("has an unexpected", found - expected)):
        if names:
            raise ModelError(f"{prefix}: {words} {short(min(names))}; {_OTHER_MODEL}")


def _check_variable(where: str, found: list[int], dtype: str, shape: tuple[int, ...]) -> None:
    """Check a variable against the config but for dimensions of one, which OpenAI's weights have in front."""
    if [size for size in found if size != 1] != [size for size in shape if size != 1]:
        raise ModelError(f"{where}: expected shape {list(shape)}, found {list(found)}; {_OTHER_MODEL}")
    if dtype != "float32":
        raise ModelError(f"{where}: expected float32, found {dtype}; {_REMEDY}")


def _reason(error: Exception) -> str:
    """Take the first line of what TensorFlow says."""
    return short(ValueError((str(error).splitlines() or [type(error).__name__])[0]))
