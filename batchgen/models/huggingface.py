"""Convert a Hugging Face GPT-2 directory to a model directory, one tensor in memory at a time.

Such a directory holds `config.json`, `model.safetensors` (or several files and an index) and a vocabulary. Each
difference from OpenAI's models is computed exactly or refused by name; nothing is unpickled, no code of the model runs.
"""

import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace as replace_fields
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from batchgen.errors import ModelError
from batchgen.gpt2.config import LAYER_NORM_EPS, GPT2Config
from batchgen.gpt2.params import Array
from batchgen.models.shards import (
    Description,
    OnProgress,
    check_text,
    file_sha256,
    library_errors,
    open_file,
    read_json,
    show,
    write_model,
)
from batchgen.text.tokenizer import END_OF_TEXT, VOCABULARY_FILES, Tokenizer

logger = logging.getLogger(__name__)

CONFIG, WEIGHTS, WEIGHTS_INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
GELU_TANH = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")  # three names of one function

_Handle: TypeAlias = Any  # an open safetensors file; the library has no types
_MAX_CONFIG, _MAX_JSON = 2**20, 64 * 2**20
_DTYPES = ("F32", "F16", "BF16")
_SIZES = {  # our name: theirs, in the order of preference
    "n_vocab": ("vocab_size",),
    "n_ctx": ("n_positions", "n_ctx"),
    "n_embd": ("n_embd",),
    "n_head": ("n_head",),
    "n_layer": ("n_layer",),
}
_OPTIONS = ("n_inner", "tie_word_embeddings", "scale_attn_weights", "scale_attn_by_inverse_layer_idx")
_SUPPORTED: dict[str, tuple[object, ...]] = {
    "model_type": ("gpt2",),
    "activation_function": GELU_TANH,
    "layer_norm_epsilon": (LAYER_NORM_EPS,),
    "add_cross_attention": (False,),
    "pruned_heads": ({},),
    "quantization_config": (None,),
    "auto_map": (None,),  # the model brings its own code
    "reorder_and_upcast_attn": (False, True),  # no difference in float32, which batchgen computes in
}
_SHARD_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}\.safetensors")
_BUFFERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # the causal mask, which old versions saved
_PREFIX = "transformer."
_REMEDY = "download the model again, or check which model this is"
_UNPICKLE = (
    "has only pickled weights ({}), and unpickling runs any code in them; if you trust them, convert them with: "
    'python -c \'from transformers import GPT2LMHeadModel as M; M.from_pretrained("SRC").save_pretrained("DST")\''
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
    given = {name: values[name] for name in _OPTIONS if values.get(name) is not None}
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


class _Weights:
    """The open safetensors files of a directory, and the place of each tensor by its name without the prefix."""

    def __init__(self, src: Path) -> None:
        self.src = src
        self.files: dict[str, _Handle] = {}  # by file name
        self.places: dict[str, tuple[str, str]] = {}  # wte.weight -> (model.safetensors, transformer.wte.weight)

    def add_places(self, file: str, found: list[str], expected: set[str] | None) -> None:
        if expected is not None and set(found) != expected:
            odd = min(set(found) ^ expected)
            verb = "holds" if odd in found else "lacks"
            raise ModelError(f"{self.src / file}: {verb} tensor {show(odd)}, unlike the index; {_REMEDY}")
        for name in found:
            plain = name.removeprefix(_PREFIX)
            if _BUFFERS.fullmatch(plain):
                continue
            if plain in self.places:
                raise ModelError(f"{self.src / file}: tensor {show(name)} occurs twice; {_REMEDY}")
            self.places[plain] = (file, name)

    def _check_tensor(self, name: str, shape: tuple[int, ...]) -> None:
        file, theirs = self.places[name]
        with library_errors(self.src / file, _REMEDY):
            found = self.files[file].get_slice(theirs)
            found_shape, dtype = found.get_shape(), found.get_dtype()
        place = f"{self.src / file}: {theirs}"
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

    def check(self, config: GPT2Config) -> GPT2Config:
        """Check names, shapes and types before a tensor is converted; return the config, tied if lm_head equals wte."""
        names, shapes = hf_names(config), config.tensor_shapes()
        if "wte.weight" not in self.places and "lm_head.weight" in self.places and config.tie_word_embeddings:
            self.places["wte.weight"] = self.places.pop("lm_head.weight")  # either of the tied two may be saved alone
        needed = set(names.values()) | (set() if config.tie_word_embeddings else {"lm_head.weight"})
        unknown = set(self.places) - needed - {"lm_head.weight"}
        for verb, odd in (("lacks", needed - set(self.places)), ("has", unknown)):
            if odd:
                what = f"{verb} tensor {show(min(odd))}"
                raise ModelError(f"{self.src}: {what}, unlike a GPT-2 of {config.n_layer} layers; {_REMEDY}")
        for name, theirs in names.items():
            self._check_tensor(theirs, shapes[name])
        if "lm_head.weight" not in self.places:
            return config
        self._check_tensor("lm_head.weight", shapes["wte"])
        is_tied = np.array_equal(self.read("lm_head.weight"), self.read("wte.weight"))
        if config.tie_word_embeddings and not is_tied:
            remedy = "set its tie_word_embeddings to false if the model was trained with a separate head"
            raise ModelError(f"{self.src}: lm_head.weight is not wte.weight, but config.json ties the two; {remedy}")
        return replace_fields(config, tie_word_embeddings=is_tied)

    def tensors(self, config: GPT2Config) -> Iterator[tuple[str, Array]]:
        """Yield (our name, array), one in memory at a time; Conv1D's weights are [in, out], as ours."""
        for name, theirs in hf_names(config).items():
            yield name, self.read(theirs)
        if not config.tie_word_embeddings:
            yield "lm_head", self.read("lm_head.weight").T  # [n_vocab, n_embd] -> [n_embd, n_vocab]


@contextmanager
def open_weights(src: Path) -> Iterator[_Weights]:
    """Open the weights of a directory; ModelError if they are missing, pickled or damaged."""
    from safetensors import safe_open  # here, because only a conversion needs it

    weights = _Weights(src)
    with ExitStack() as stack:
        for file, names in _find_weight_files(src).items():
            with open_file(src / file), library_errors(src / file, _REMEDY):  # the library checks header and length
                handle = weights.files[file] = stack.enter_context(safe_open(str(src / file), framework="numpy"))
                weights.add_places(file, list(handle.keys()), names)
        yield weights


# ---- the vocabulary


def _read_added_tokens(src: Path) -> dict[str, object]:
    """{token: id} of a fine-tune's added tokens; old and new versions of transformers have them in different files."""
    tokens: dict[str, object] = {}
    if os.path.lexists(src / "added_tokens.json"):
        tokens |= read_json(src / "added_tokens.json", _MAX_CONFIG)
    if os.path.lexists(src / TOKENIZER):
        entries = read_json(src / TOKENIZER, _MAX_JSON).get("added_tokens")
        for entry in entries if isinstance(entries, list) else ():
            if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
                raise ModelError(f"{src / TOKENIZER}: an entry of added_tokens has no content; {_REMEDY}")
            tokens[entry["content"]] = entry.get("id")
    return tokens


def _check_value(path: Path, name: str, found: object, expected: object) -> None:
    if found != expected:
        only = f"batchgen has only GPT-2's byte-level BPE ({json.dumps(expected)})"
        raise ModelError(f"{path}: {name} is {show(found)}; {only}")


def _merge_line(path: Path, merge: object) -> str:
    """A merge as a line of merges.txt: "t h" or ["t", "h"] -> "t h"."""
    if isinstance(merge, str):
        return merge
    if not isinstance(merge, list) or len(merge) != 2 or not all(isinstance(part, str) for part in merge):
        raise ModelError(f"{path}: {show(merge)} in merges is not a pair of strings; {_REMEDY}")
    return " ".join(merge)


def _read_tokenizer(path: Path) -> tuple[dict[str, object], bytes]:
    """The vocabulary and the merges file from a tokenizer.json; ModelError unless it is GPT-2's byte-level BPE."""
    values = read_json(path, _MAX_JSON)
    if not isinstance(values.get("model"), dict):
        raise ModelError(f"{path}: has no model; {_REMEDY}")
    model, splitter = values["model"], values.get("pre_tokenizer")
    _check_value(path, "model.type", model.get("type"), "BPE")
    _check_value(path, "normalizer", values.get("normalizer"), None)
    options = splitter if isinstance(splitter, dict) else {"type": splitter, "add_prefix_space": False}
    _check_value(path, "pre_tokenizer.type", options.get("type"), "ByteLevel")
    _check_value(path, "pre_tokenizer.add_prefix_space", options.get("add_prefix_space", True), False)
    _check_value(path, "pre_tokenizer.use_regex", options.get("use_regex", True), True)
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges"):
        if model.get(name):
            _check_value(path, f"model.{name}", model[name], None)
    vocabulary, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocabulary, dict) or not isinstance(merges, list):
        raise ModelError(f"{path}: model has no vocab and merges; {_REMEDY}")
    text = "".join(f"{line}\n" for line in ["#version: 0.2", *(_merge_line(path, merge) for merge in merges)])
    return vocabulary, text.encode(errors="replace")  # a lone surrogate then matches no token


def _prepare_vocabulary(src: Path, private: Path) -> Path:
    """Return the directory with the two vocabulary files: src, or private, into which they are written if needed."""
    added = _read_added_tokens(src)
    pairs = [(src / vocabulary, src / merges) for vocabulary, merges in VOCABULARY_FILES]
    pair = next((pair for pair in pairs if all(map(os.path.lexists, pair))), None)
    if pair:
        vocabulary = read_json(pair[0], _MAX_JSON)
        if all(token in vocabulary for token in added):
            return src
        with open_file(pair[1]) as file:
            merges = file.read(_MAX_JSON)
    elif os.path.lexists(src / TOKENIZER):
        vocabulary, merges = _read_tokenizer(src / TOKENIZER)
    else:
        raise ModelError(f"{src}: has neither vocab.json and merges.txt nor {TOKENIZER}; put the vocabulary there")
    (private / "encoder.json").write_text(json.dumps(added | vocabulary))
    (private / "vocab.bpe").write_bytes(merges)
    return private


def _check_vocabulary(src: Path, vocabulary: Path, config: GPT2Config) -> None:
    try:
        tokenizer = Tokenizer.load(vocabulary)
    except ModelError as error:
        if vocabulary == src:
            raise
        reason = str(error).replace(f"{vocabulary}{os.sep}", "")  # without the names of temporary files
        raise ModelError(f"{src}: the vocabulary made from it is not GPT-2's: {reason}") from error
    if tokenizer.n_vocab > config.n_vocab:
        sizes = f"{tokenizer.n_vocab} tokens and the model {config.n_vocab}"
        raise ModelError(f"{src}: the vocabulary has {sizes}; {_REMEDY}")
    eos = read_json(src / CONFIG, _MAX_CONFIG).get("eos_token_id")
    if isinstance(eos, int) and eos != tokenizer.eos_id:
        text = "%s: eos_token_id is %d; batchgen ends completions only at %s (id %s)"
        logger.warning(text, src / CONFIG, eos, END_OF_TEXT, tokenizer.eos_id)


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
    """Convert a Hugging Face GPT-2 directory into the model directory dst.

    Needs memory for the largest tensor, not for the model. Raises ModelError, with the file, for anything missing or
    damaged, and for a model that batchgen does not compute exactly; dst then stays as it was.
    """
    config = read_hf_config(src / CONFIG)
    try:
        with open_weights(src) as weights, tempfile.TemporaryDirectory() as private:
            description = Description(name, weights.check(config), _source_of(src))
            vocabulary = _prepare_vocabulary(src, Path(private))
            _check_vocabulary(src, vocabulary, description.config)
            tensors = weights.tensors(description.config)
            write_model(dst, description, tensors, tokenizer_dir=vocabulary, replace=replace, on_progress=on_progress)
    except OSError as error:
        raise ModelError(f"{src}: cannot be converted ({error.strerror or error})") from error
