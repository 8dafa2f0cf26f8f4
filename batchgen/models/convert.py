"""Convert a checkpoint to a model directory: Hugging Face's by huggingface.py, OpenAI's here through TensorFlow."""

import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from batchgen.errors import ModelError
from batchgen.gpt2.config import GPT2Config
from batchgen.gpt2.params import Array, nest
from batchgen.models.checkpoint_index import check_index
from batchgen.models.huggingface import CONFIG, convert_hf_checkpoint
from batchgen.models.shards import (
    Description,
    OnProgress,
    file_sha256,
    library_errors,
    listed,
    open_file,
    parse_config,
    read_json,
    show,
    write_model,
)
from batchgen.models.tokenizer_files import load_vocabulary

logger = logging.getLogger(__name__)

INDEX, DATA = ".index", ".data-00000-of-00001"
_PREFIX = "model.ckpt"
_QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0", "CUDA_VISIBLE_DEVICES": "-1"}
_REMEDY = "download the checkpoint again"
_OTHER_MODEL = f"hparams.json belongs to another model, or {_REMEDY}"
_NEEDS_TENSORFLOW = "reading a TensorFlow checkpoint needs TensorFlow; install it with: pip install tensorflow-cpu"


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what TensorFlow prints about the machine when it is imported."""
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


def _import_tensorflow() -> ModuleType:
    """Import TensorFlow; nothing else in batchgen does."""
    try:
        with _quiet():
            import tensorflow

            return tensorflow  # type: ignore[no-any-return]
    except ModuleNotFoundError as error:
        raise ModelError(_NEEDS_TENSORFLOW) from error
    except Exception as error:  # an installation with parts that do not fit together raises anything
        raise ModelError(f"{_NEEDS_TENSORFLOW} (the installed one fails: {show(error)})") from error


def _checkpoint_name(path: Path) -> str:
    """The last part of `model_checkpoint_path: "/somewhere/model.ckpt"` in `path`; without the file, model.ckpt."""
    if not os.path.exists(path):
        return _PREFIX
    with open_file(path) as file:
        text = file.read(2**16).decode(errors="replace")
    found = re.search(r'^model_checkpoint_path: *"(?:.*[/\\])?([A-Za-z0-9_][A-Za-z0-9._-]*)"', text, re.MULTILINE)
    if not found:
        raise ModelError(f'{path}: has no line `model_checkpoint_path: "{_PREFIX}"`; {_REMEDY}')
    return found[1]


def find_checkpoint(src: Path) -> Path:
    """Return the common prefix of src's checkpoint files, `src/model.ckpt`; ModelError if a file is missing.

    The text file `checkpoint` may give another name. Its directory is ignored: that is the writer's own, or an attack.
    """
    if not os.path.isdir(src):
        raise ModelError(f"{src}: is not a directory; give the one that holds the checkpoint's files")
    prefix = src.absolute() / _checkpoint_name(src / "checkpoint")
    needed = [prefix.name + INDEX, prefix.name + DATA, "hparams.json"]
    missing = [name for name in needed if not os.path.isfile(src / name)]
    if missing:
        raise ModelError(f"{src}: {', '.join(missing)} not found; {_REMEDY}, with all its seven files")
    return prefix


def read_hparams(path: Path) -> GPT2Config:
    """Read hparams.json; ModelError names the file and the value at fault."""
    values = read_json(path, limit=2**16)
    try:
        return parse_config(values)
    except ModelError as error:
        raise ModelError(f"{path}: {show(error)}; {_REMEDY}") from error


def read_tf_tensors(prefix: Path, config: GPT2Config) -> Iterator[tuple[str, Array]]:
    """Yield (name, array) for each of config.tensor_shapes(), in that order, one in memory at a time.

    `model/h0/attn/c_attn/w` of shape [1, 768, 2304] -> `h0/attn/c_attn/w` of shape [768, 2304].
    """
    tensorflow = _import_tensorflow()
    check_index(Path(f"{prefix}{INDEX}"), Path(f"{prefix}{DATA}"))
    with library_errors(f"{prefix}{INDEX}", _REMEDY):
        reader = tensorflow.compat.v1.train.NewCheckpointReader(str(prefix))
        shapes, dtypes = reader.get_variable_to_shape_map(), reader.get_variable_to_dtype_map()
    expected = {f"model/{name}" for name in config.tensor_shapes()}
    others = shapes.keys() - expected
    # a slot is model/wte/Adam; made within the scope of the model, it is model/model/wte/Adam
    owners = {name: re.sub(r"^(model/)+", "model/", name).rpartition("/")[0] for name in others}
    odd = {name for name, owner in owners.items() if name.startswith("model/") and owner not in expected}
    for problem, names in (("lacks", expected - shapes.keys()), ("has an unexpected", odd)):
        if names:
            raise ModelError(f"{prefix}: {problem} {show(min(names))}; {_OTHER_MODEL}")
    if others:  # an optimizer's counters, such as global_step, and its slots, such as model/wte/Adam
        logger.warning("%s: left out, because it is no weight of the model: %s", prefix, listed(others))
    for name, shape in config.tensor_shapes().items():
        variable = f"model/{name}"
        found, dtype = list(shapes[variable]), dtypes[variable].name
        # OpenAI's linear weights have a dimension of 1 in front.
        if [size for size in found if size != 1] != [size for size in shape if size != 1]:
            raise ModelError(f"{prefix}: {variable}: expected shape {list(shape)}, found {found}; {_OTHER_MODEL}")
        if dtype != "float32":
            raise ModelError(f"{prefix}: {variable}: expected float32, found {dtype}; {_REMEDY}")
        with library_errors(f"{prefix}{DATA}: {variable}", _REMEDY):
            array = reader.get_tensor(variable)
        yield name, array.reshape(shape)


def load_gpt2_params_from_tf_ckpt(tf_ckpt_path: str, hparams: dict[str, object]) -> dict[str, object]:
    """Read a whole checkpoint into nested dicts: picoGPT's function, with its arguments and its result."""
    config = parse_config(hparams)
    return dict(nest(dict(read_tf_tensors(Path(tf_ckpt_path), config)), config.n_layer))


def convert_tf_checkpoint(
    src: Path,
    dst: Path,
    *,
    name: str,
    replace: bool = False,
    source: Mapping[str, str] | None = None,
    on_progress: OnProgress | None = None,
) -> None:
    """Convert a checkpoint as OpenAI publishes it into the model directory dst; ModelError leaves dst as it was."""
    prefix = find_checkpoint(src)
    config = read_hparams(src / "hparams.json")
    load_vocabulary(src, config.n_vocab, src)
    origin = {"format": "TensorFlow checkpoint", "index_sha256": file_sha256(Path(f"{prefix}{INDEX}"))}
    description = Description(name, config, origin | dict(source or {}))
    tensors = read_tf_tensors(prefix, config)
    write_model(dst, description, tensors, tokenizer_dir=src, replace=replace, on_progress=on_progress)


def convert_checkpoint(
    src: Path, dst: Path, *, name: str, replace: bool = False, on_progress: OnProgress | None = None
) -> None:
    """Convert the checkpoint in src, Hugging Face's or OpenAI's TensorFlow checkpoint, into the model directory dst."""
    is_hf = os.path.lexists(src / CONFIG) or any(src.glob("*.safetensors"))
    convert = convert_hf_checkpoint if is_hf else convert_tf_checkpoint
    convert(src, dst, name=name, replace=replace, on_progress=on_progress)
