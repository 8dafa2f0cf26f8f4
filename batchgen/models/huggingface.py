"""Convert a Hugging Face GPT-2 directory to a model directory, one tensor in memory at a time.

Such a directory holds `config.json`, `model.safetensors` (or several files and an index) and a tokenizer. Each
difference from OpenAI's models is computed exactly or refused by name; nothing is unpickled, no code of the model runs.
"""

import json
import logging
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace as replace_fields
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from batchgen.errors import ModelError
from batchgen.gpt2.activations import SYNONYMS
from batchgen.gpt2.config import OPTIONS, GPT2Config
from batchgen.gpt2.params import Array
from batchgen.models.shards import (
    Description,
    OnProgress,
    check_text,
    file_sha256,
    library_errors,
    listed,
    open_file,
    read_json,
    show,
    write_model,
)
from batchgen.models.tokenizer_files import log_settings, write_vocabulary

logger = logging.getLogger(__name__)

_ADAPTER = "adapter_config.json"  # of peft
CONFIG, WEIGHTS, WEIGHTS_INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"

_Handle: TypeAlias = Any  # an open safetensors file; the library has no types
_MAX_CONFIG, _MAX_JSON = 2**20, 64 * 2**20
_DTYPES = ("F32", "F16", "BF16")
_SIZES = {  # our name: theirs, in the order of preference
    "n_vocab": ("vocab_size",),
    "n_ctx": ("n_positions", "max_position_embeddings", "n_ctx", "block_size"),  # the last is nanoGPT's
    "n_embd": ("n_embd", "hidden_size"),
    "n_head": ("n_head", "num_attention_heads"),
    "n_layer": ("n_layer", "num_hidden_layers"),
}
_SUPPORTED: dict[str, tuple[object, ...]] = {
    "model_type": ("gpt2",),
    "add_cross_attention": (False,),
    "pruned_heads": ({},),
    "quantization_config": (None,),
    "auto_map": (None,),  # the model brings its own code
    "reorder_and_upcast_attn": (False, True),  # no difference in float32, which batchgen computes in
}
_SHARD_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}\.safetensors")
_BUFFERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # the causal mask, which old versions saved
_WRAPPERS = re.compile(r"\b(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")  # PyTorch's
# Heads beside the body, which generating does not need: those of classifiers and of reinforcement learning.
_HEADS = re.compile(
    r"(?!lm_head)(\w*heads?|\w*value\w*|score|classifier|qa_outputs|summary|reward\w*|critic|pooler)\..+"
)
_REMEDY = "download the model again, or check which model this is"
_MERGE = "merge the adapter into the model and save it: PeftModel.merge_and_unload() of peft"
_UNPICKLE = (
    "has only pickled weights ({}), and unpickling runs any code in them; if you trust them, convert them with: "
    'python -c \'from transformers import GPT2LMHeadModel as M; M.from_pretrained("SRC").save_pretrained("DST")\', '
    "and copy the tokenizer's files to DST"
)


# ---- the config


def _check_options(values: Mapping[str, object]) -> None:
    for name, allowed in _SUPPORTED.items():
        if name == "model_type" and name not in values:
            raise ModelError(f"{name} is missing; expected {show(allowed[0])}")
        if name in values and not any(type(values[name]) is type(each) and values[name] == each for each in allowed):
            expected = " or ".join(json.dumps(each) for each in allowed)
            raise ModelError(f"{name} is {show(values[name])}; batchgen computes only {expected}")


def _parse_config(values: Mapping[str, object]) -> GPT2Config:
    given = {name: values[name] for name in OPTIONS if values.get(name) is not None}
    if isinstance(activation := given.get("activation_function"), str):
        given["activation_function"] = SYNONYMS.get(activation, activation)
    for ours, names in _SIZES.items():
        found = [values[name] for name in names if values.get(name) is not None]
        if not found:
            raise ModelError(f"{names[0]} is missing; {_REMEDY}")
        given[ours] = found[0]
    config = GPT2Config(**given)  # type: ignore[arg-type]  # it checks types and values
    # The usual width of the MLP, written out or not, gives the same model and the same hash.
    return replace_fields(config, n_inner=None) if config.n_inner == 4 * config.n_embd else config


def read_hf_config(path: Path) -> GPT2Config:
    """Read `config.json`; ModelError names an option that is not GPT-2's or is not computed exactly here."""
    if os.path.lexists(path.parent / _ADAPTER) and not os.path.lexists(path):
        raise ModelError(f"{path.parent}: is an adapter to a model; {_MERGE}")
    values = read_json(path, _MAX_CONFIG)
    try:
        _check_options(values)
        return _parse_config(values)
    except ModelError as error:
        raise ModelError(f"{path}: {show(error)}") from error


# ---- the weights


def hf_names(config: GPT2Config) -> dict[str, str]:
    """Our names -> Hugging Face's without a prefix: h3/attn/c_attn/w -> h.3.attn.c_attn.weight, wte -> wte.weight."""
    leaves = {"g": "weight", "w": "weight", "b": "bias"}
    names = {}
    for name in config.tensor_shapes():
        path, _, leaf = re.sub(r"^h(\d+)", r"h.\1", name).replace("/", ".").rpartition(".")
        names[name] = f"{path}.{leaves[leaf]}" if path else f"{leaf}.weight"
    return names


def _read_weight_map(path: Path) -> dict[str, set[str] | None]:
    """{file: its tensors} from the index of several safetensors files."""
    places = read_json(path, _MAX_JSON).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ModelError(f"{path}: has no weight_map of tensors and files; {_REMEDY}")
    files: dict[str, set[str]] = {}
    for name, file in places.items():
        if not isinstance(file, str) or not _SHARD_FILE.fullmatch(file):
            raise ModelError(f"{path}: {show(file)} is not a plain .safetensors name inside the directory")
        files.setdefault(file, set()).add(name)
    return dict(sorted(files.items()))


def _find_weight_files(src: Path) -> dict[str, set[str] | None]:
    """{file: its tensors} of the safetensors files in a directory; None without an index."""
    if os.path.lexists(src / WEIGHTS):
        return {WEIGHTS: None}
    if os.path.lexists(src / WEIGHTS_INDEX):
        return _read_weight_map(src / WEIGHTS_INDEX)
    pickled = sorted(path.name for path in src.glob("*.bin")) + sorted(path.name for path in src.glob("*.pt"))
    if pickled:
        raise ModelError(f"{src}: {_UNPICKLE.format(show(pickled[0]))}")
    raise ModelError(f"{src}: has no {WEIGHTS} and no {WEIGHTS_INDEX}; {_REMEDY}")


def _read_bfloat16(path: Path, name: str, shape: tuple[int, ...]) -> Array:
    """Widen a bfloat16 tensor, the upper halves of float32 numbers; the library has checked the header's offsets."""
    with open_file(path) as file:
        length = int.from_bytes(file.read(8), "little")
        first, last = json.loads(file.read(length))[name]["data_offsets"]
        file.seek(8 + length + first)
        halves = np.frombuffer(file.read(last - first), "<u2").reshape(shape)
    widened: Array = np.left_shift(halves, 16, dtype=np.uint32).view(np.float32)
    return widened


def _plain_names(src: Path, names: Iterable[str]) -> dict[str, str]:
    """Each tensor's name without wrappers and the body's prefix: _orig_mod.transformer.h.0.ln_1.bias -> h.0.ln_1.bias.

    The prefix is what stands before wpe.weight; heads may have a part of it: _orig_mod.lm_head.weight.
    """
    plain = {name: _WRAPPERS.sub("", name) for name in names}
    found = sorted(name.removesuffix("wpe.weight") for name in plain.values() if f".{name}".endswith(".wpe.weight"))
    if len(found) > 1:
        raise ModelError(
            f"{src}: has {len(found)} models: {show(found[0])} and {show(found[1])}; save one of them alone"
        )
    parts = found[0].split(".")[:-1] if found else []
    prefixes = ["".join(f"{part}." for part in parts[:n]) for n in range(len(parts), 0, -1)]  # the longest first
    for name, text in plain.items():
        plain[name] = text.removeprefix(next(filter(text.startswith, prefixes), ""))
    return plain


class _Weights:
    """The open safetensors files of a directory, and the place of each tensor by its plain name."""

    def __init__(self, src: Path) -> None:
        self.src = src
        self.files: dict[str, _Handle] = {}  # by file name
        self.places: dict[str, tuple[str, str]] = {}  # wte.weight -> (model.safetensors, transformer.wte.weight)
        self.left_out: list[str] = []
        self.without_bias: set[str] = set()  # our names
        self.has_linear = False  # products' weights are [out, in], as nanoGPT's nn.Linear, not [in, out] as Conv1D

    def check_index(self, file: str, found: list[str], expected: set[str] | None) -> None:
        """Compare the tensors of a file with the index."""
        if expected is not None and set(found) != expected:
            odd = min(set(found) ^ expected)
            verb = "holds" if odd in found else "lacks"
            raise ModelError(f"{self.src / file}: {verb} tensor {show(odd)}, unlike the index; {_REMEDY}")

    def find_places(self) -> None:
        """Fill places and left_out."""
        files = {name: file for file, handle in self.files.items() for name in handle.keys()}  # noqa: SIM118
        for name, plain in _plain_names(self.src, files).items():
            if _BUFFERS.fullmatch(plain):
                continue
            if _HEADS.fullmatch(plain):
                self.left_out.append(name)
                continue
            if plain in self.places:
                raise ModelError(f"{self.src / files[name]}: tensor {show(name)} occurs twice; {_REMEDY}")
            self.places[plain] = (files[name], name)

    def _check_tensor(self, name: str, shape: tuple[int, ...]) -> None:
        file, theirs = self.places[name]
        with library_errors(self.src / file, _REMEDY):
            found = self.files[file].get_slice(theirs)
            found_shape, dtype = found.get_shape(), found.get_dtype()
        place = f"{self.src / file}: {show(theirs)}"
        if tuple(found_shape) != shape:
            raise ModelError(f"{place}: expected shape {list(shape)} from the config, found {found_shape}; {_REMEDY}")
        if dtype not in _DTYPES:
            raise ModelError(f"{place}: expected one of {', '.join(_DTYPES)}, found {show(dtype)}; {_REMEDY}")

    def read(self, name: str) -> Array:
        """One tensor in float32, which represents every float16 and bfloat16 exactly."""
        file, theirs = self.places[name]
        with library_errors(self.src / file, _REMEDY):
            found = self.files[file].get_slice(theirs)
            if found.get_dtype() == "BF16":  # NumPy has no bfloat16, and so the library cannot return one
                return _read_bfloat16(self.src / file, theirs, tuple(found.get_shape()))
            array: Array = self.files[file].get_tensor(theirs).astype(np.float32, copy=False)
        return array

    def _check_names(self, config: GPT2Config) -> None:
        """Compare the names with those of a GPT-2; all biases, or all of the norms or products, may be absent."""
        names = hf_names(config)
        if "wte.weight" not in self.places and "lm_head.weight" in self.places and config.tie_word_embeddings:
            self.places["wte.weight"] = self.places.pop("lm_head.weight")  # either of the tied two may be saved alone
        for pattern in (r"(.*/)?ln_./b", r".*/c_\w+/b"):
            biases = {name for name in names if re.fullmatch(pattern, name)}
            if not any(names[name] in self.places for name in biases):
                self.without_bias |= biases
        needed = {names[name] for name in names.keys() - self.without_bias}
        needed |= set() if config.tie_word_embeddings else {"lm_head.weight"}
        for verb, odd in (
            ("lacks", needed - set(self.places)),
            ("has", set(self.places) - needed - {"lm_head.weight"}),
        ):
            if odd:
                what = f"{verb} tensor {show(min(odd))}"
                remedy = _MERGE if any("lora_" in name for name in odd) else _REMEDY
                raise ModelError(f"{self.src}: {what}, unlike a GPT-2 of {config.n_layer} layers; {remedy}")

    def check(self, config: GPT2Config) -> GPT2Config:
        """Check names, shapes and types before a tensor is converted; return the config, tied if lm_head equals wte."""
        self._check_names(config)
        file, theirs = self.places["h.0.attn.c_attn.weight"]
        with library_errors(self.src / file, _REMEDY):
            self.has_linear = self.files[file].get_slice(theirs).get_shape() == [3 * config.n_embd, config.n_embd]
        names = hf_names(config)
        for name, shape in config.tensor_shapes().items():
            if name not in self.without_bias:
                self._check_tensor(names[name], shape[::-1] if self._is_transposed(name) else shape)
        if "lm_head.weight" not in self.places:
            return config
        self._check_tensor("lm_head.weight", config.tensor_shapes()["wte"])
        is_tied = np.array_equal(self.read("lm_head.weight"), self.read("wte.weight"))
        if config.tie_word_embeddings and not is_tied:
            remedy = "set its tie_word_embeddings to false if the model was trained with a separate head"
            raise ModelError(f"{self.src}: lm_head.weight is not wte.weight, but config.json ties the two; {remedy}")
        return replace_fields(config, tie_word_embeddings=is_tied)

    def _is_transposed(self, name: str) -> bool:
        return self.has_linear and name.endswith("/w")

    def tensors(self, config: GPT2Config) -> Iterator[tuple[str, Array]]:
        """Yield (our name, array), one in memory at a time; products' weights are [in, out]."""
        shapes = config.tensor_shapes()
        for name, theirs in hf_names(config).items():
            if name in self.without_bias:
                yield name, np.zeros(shapes[name], np.float32)
            else:
                yield name, self.read(theirs).T if self._is_transposed(name) else self.read(theirs)
        if not config.tie_word_embeddings:
            yield "lm_head", self.read("lm_head.weight").T  # [n_vocab, n_embd] -> [n_embd, n_vocab]

    def log_differences(self) -> None:
        """Say what the converted model does not have of this one, and what this one does not have."""
        if self.left_out:
            logger.warning("%s: left out, because generating does not need it: %s", self.src, listed(self.left_out))
        if self.without_bias:
            kinds = {re.sub(r"^h\d+/|/b$", "", name) for name in self.without_bias}
            logger.warning("%s: has no bias of %s; they are zeros", self.src, listed(kinds))


@contextmanager
def open_weights(src: Path) -> Iterator[_Weights]:
    """Open the weights of a directory; ModelError if they are missing, pickled or damaged."""
    from safetensors import safe_open  # here, because only a conversion needs it

    weights = _Weights(src)
    with ExitStack() as stack:
        for file, names in _find_weight_files(src).items():
            with open_file(src / file), library_errors(src / file, _REMEDY):  # the library checks header and length
                handle = weights.files[file] = stack.enter_context(safe_open(str(src / file), framework="numpy"))
                weights.check_index(file, list(handle.keys()), names)
        weights.find_places()
        yield weights


# ---- the whole


def _check_nanogpt(path: Path, weights: _Weights) -> None:
    """Refuse a config that leaves open which nanoGPT this is: there are two GELUs, and forks with other flags."""
    if not weights.has_linear:
        return
    values = read_json(path, _MAX_CONFIG)
    if values.get("activation_function") is None:
        remedy = 'add "gelu" if its MLP calls nn.GELU(), as nanoGPT does today, or "gelu_new" if it calls new_gelu()'
        raise ModelError(f"{path}: activation_function is missing, and the weights are laid out as nanoGPT's; {remedy}")
    flags = [
        name for name, value in values.items() if name.startswith("use_") and value is True and name != "use_cache"
    ]
    if flags:
        raise ModelError(
            f"{path}: {listed(flags)} is true, which batchgen does not compute; remove it if it has no effect"
        )


def _source_of(src: Path) -> dict[str, str]:
    """Where a model comes from, with the name that config.json gives it."""
    source = {"format": "Hugging Face directory", "config_sha256": file_sha256(src / CONFIG)}
    try:
        return source | {"called": check_text(read_json(src / CONFIG, _MAX_CONFIG).get("_name_or_path"), "name")}
    except ModelError:
        return source


def convert_hf_checkpoint(
    src: Path, dst: Path, *, name: str, replace: bool = False, on_progress: OnProgress | None = None
) -> None:
    """Convert a Hugging Face GPT-2 directory into the model directory dst; ModelError leaves dst as it was."""
    config = read_hf_config(src / CONFIG)
    try:
        with open_weights(src) as weights, tempfile.TemporaryDirectory() as private:
            description = Description(name, weights.check(config), _source_of(src))
            _check_nanogpt(src / CONFIG, weights)
            write_vocabulary(src, Path(private), config.n_vocab)
            tensors = weights.tensors(description.config)
            write_model(
                dst, description, tensors, tokenizer_dir=Path(private), replace=replace, on_progress=on_progress
            )
            weights.log_differences()
            log_settings(src)
    except OSError as error:
        raise ModelError(f"{src}: cannot be converted ({error.strerror or error})") from error
