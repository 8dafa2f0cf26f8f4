"""Hugging Face's GPT-2 directories, read one tensor at a time and written as a model directory of shards.

A GPT-2 there is `config.json`, `model.safetensors` (or several, with an index) and a vocabulary. What its config
says otherwise than OpenAI's models is computed exactly or refused by name; nothing is unpickled, no code is run.
"""

import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from batchgen.errors import ModelError
from batchgen.gpt2.config import LAYER_NORM_EPS, GPT2Config
from batchgen.gpt2.params import Array
from batchgen.models.shards import (
    OnProgress,
    check_text,
    counted,
    file_sha256,
    open_file,
    read_json,
    shard_shapes,
    short,
    write_model,
)
from batchgen.text.tokenizer import END_OF_TEXT, VOCABULARY_FILES, Tokenizer

logger = logging.getLogger(__name__)

CONFIG, WEIGHTS, WEIGHTS_INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
GELU_TANH = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")  # three names of one function

_MAX_CONFIG, _MAX_JSON = 2**20, 64 * 2**20
_DTYPES = ("F32", "F16", "BF16")
_NUMBERS = {"n_vocab": "vocab_size", "n_ctx": "n_positions", "n_embd": "n_embd", "n_head": "n_head"}
_NUMBERS |= {"n_layer": "n_layer"}
_SHARD_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}\.safetensors")
_BUFFERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # the causal mask, which old versions saved
_PREFIX = "transformer."
_REMEDY = "get the model again, or see which model this is"
_UNPICKLE = (
    "only pickled weights ({}) are here, and unpickling runs whatever code is in them; where you trust them: "
    'python -c \'from transformers import GPT2LMHeadModel as M; M.from_pretrained("SRC").save_pretrained("DST")\''
)


def convert_hf_checkpoint(
    src: Path, dst: Path, *, name: str, replace: bool = False, on_progress: OnProgress | None = None
) -> None:
    """Convert a Hugging Face GPT-2 directory into the model directory dst.

    Needs memory for the largest tensor, not for the model. Raises ModelError, with the file, on anything that is
    missing, damaged or not a GPT-2 that batchgen computes exactly; dst is then as it was.
    """
    config = read_hf_config(src / CONFIG)
    with ExitStack() as stack:
        weights = stack.enter_context(_Weights(src))
        config = weights.checked(config)
        vocabulary = _vocabulary(src, Path(stack.enter_context(tempfile.TemporaryDirectory())))
        _check_vocabulary(src, vocabulary, config)
        tensors = counted(weights.tensors(config), len(shard_shapes(config)), on_progress)
        write_model(dst, config, tensors, name=name, source=_source(src), tokenizer_dir=vocabulary, replace=replace)


def _source(src: Path) -> dict[str, str]:
    """What is known of where a model comes from; the name in config.json is what its writer called it."""
    source = {"format": "Hugging Face directory", "config_sha256": file_sha256(src / CONFIG)}
    values = read_json(src / CONFIG, _MAX_CONFIG)
    try:
        called = check_text(values.get("_name_or_path") if isinstance(values, dict) else None, "name")
    except ModelError:
        return source
    return source | {"called": called}


# --- the config ----------------------------------------------------------------------------------------------


def read_hf_config(path: Path) -> GPT2Config:
    """Read `config.json`; what is neither GPT-2's nor computed exactly here is refused by its name."""
    values = read_json(path, _MAX_CONFIG)
    if not isinstance(values, dict):
        raise ModelError(f"{path}: expected an object, found {short(values)}; {_REMEDY}")
    try:
        _check_options(values)
        return _config(values)
    except ModelError as error:
        raise ModelError(f"{path}: {short(error)}") from error


def _check_options(values: Mapping[str, object]) -> None:
    supported: dict[str, tuple[object, ...]] = {
        "model_type": ("gpt2",),
        "activation_function": GELU_TANH,
        "layer_norm_epsilon": (LAYER_NORM_EPS,),
        "add_cross_attention": (False,),
        "pruned_heads": ({},),
        "quantization_config": (None,),
        "auto_map": (None,),  # the model brings code of its own
        "reorder_and_upcast_attn": (False, True),  # the same in float32, which all is here
    }
    required = {"model_type"}
    for name, allowed in supported.items():
        if name in required and name not in values:
            raise ModelError(f"{name} is missing; expected {short(allowed[0])}")
        if name in values and not any(type(values[name]) is type(each) and values[name] == each for each in allowed):
            expected = " or ".join(json.dumps(each) for each in allowed)
            raise ModelError(f"{name} is {short(values[name])}; batchgen computes only {expected}")


def _config(values: Mapping[str, Any]) -> GPT2Config:
    aliases = {"n_positions": ("n_positions", "n_ctx")}
    given: dict[str, Any] = {}
    for ours, theirs in _NUMBERS.items():
        found = [values[name] for name in aliases.get(theirs, (theirs,)) if values.get(name) is not None]
        if not found:
            raise ModelError(f"{theirs} is missing; {_REMEDY}")
        given[ours] = found[0]
    for name in ("n_inner", "tie_word_embeddings", "scale_attn_weights", "scale_attn_by_inverse_layer_idx"):
        if values.get(name) is not None:
            given[name] = values[name]
    config = GPT2Config(**given)
    if config.n_inner == 4 * config.n_embd:  # the same model by the same hash, said or not
        config = GPT2Config(**{name: value for name, value in given.items() if name != "n_inner"})
    return config


# --- the weights ---------------------------------------------------------------------------------------------


def hf_names(config: GPT2Config) -> dict[str, str]:
    """`h3/attn/c_attn/w` -> `h.3.attn.c_attn.weight`, `wte` -> `wte.weight`, and so on, without a prefix."""
    leaves = {"g": "weight", "w": "weight", "b": "bias"}
    names = {}
    for name in config.tensor_shapes():
        *path, leaf = name.split("/")
        if path:
            names[name] = ".".join([re.sub(r"^h(\d+)$", r"h.\1", path[0]), *path[1:], leaves[leaf]])
        else:
            names[name] = f"{leaf}.weight"
    return names


class _Weights:
    """The safetensors files of a directory, open: where each tensor is, by its name without the prefix."""

    def __init__(self, src: Path) -> None:
        self.src = src
        self.files: dict[str, Any] = {}  # file -> safetensors' handle
        self.places: dict[str, tuple[str, str]] = {}  # wte.weight -> (model.safetensors, transformer.wte.weight)
        self._stack = ExitStack()

    def __enter__(self) -> "_Weights":
        with ExitStack() as stack:
            expected = _weight_files(self.src)
            for file, names in expected.items():
                self.files[file] = stack.enter_context(_open_safetensors(self.src / file))
                with _reading(self.src / file):
                    self._place(file, list(self.files[file].keys()), names)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _place(self, file: str, found: list[str], expected: set[str] | None) -> None:
        if expected is not None and set(found) != expected:
            odd = min(set(found) ^ expected)
            where = "holds" if odd in found else "lacks"
            raise ModelError(f"{self.src / file}: {where} tensor {short(odd)}, unlike what the index says; {_REMEDY}")
        for name in found:
            plain = name.removeprefix(_PREFIX)
            if _BUFFERS.fullmatch(plain):
                continue
            if plain in self.places:
                raise ModelError(f"{self.src / file}: tensor {short(name)} is there twice; {_REMEDY}")
            self.places[plain] = (file, name)

    def checked(self, config: GPT2Config) -> GPT2Config:
        """Check names, shapes and types of all tensors before any is read; returns the config, tied if it is."""
        names = hf_names(config)
        if "wte.weight" not in self.places and "lm_head.weight" in self.places and config.tie_word_embeddings:
            self.places["wte.weight"] = self.places.pop("lm_head.weight")  # of two that are one, either may be saved
        needed = set(names.values()) | (set() if config.tie_word_embeddings else {"lm_head.weight"})
        unknown = set(self.places) - needed - {"lm_head.weight"}
        for words, odd in (("lacks", needed - set(self.places)), ("has", unknown)):
            if odd:
                what = f"{words} tensor {short(min(odd))}"
                raise ModelError(f"{self.src}: {what}, unlike a GPT-2 of {config.n_layer} layers; {_REMEDY}")
        shapes = config.tensor_shapes()
        for name, theirs in names.items():
            self._check(theirs, shapes[name])
        if "lm_head.weight" not in self.places:
            return config
        self._check("lm_head.weight", shapes["wte"])
        same = np.array_equal(self.read("lm_head.weight"), self.read("wte.weight"))
        if config.tie_word_embeddings and not same:
            raise ModelError(
                f"{self.src}: lm_head.weight is not wte.weight, while config.json has the two tied; set its "
                "tie_word_embeddings to false if the model was trained with a head of its own"
            )
        return _tied(config) if same else config

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        file, theirs = self.places[name]
        with _reading(self.src / file):
            found = self.files[file].get_slice(theirs)
            found_shape, dtype = found.get_shape(), found.get_dtype()
        where = f"{self.src / file}: {theirs}"
        if tuple(found_shape) != shape:
            raise ModelError(f"{where}: expected shape {list(shape)} from the config, found {found_shape}; {_REMEDY}")
        if dtype not in _DTYPES:
            raise ModelError(f"{where}: expected one of {', '.join(_DTYPES)}, found {short(dtype)}; {_REMEDY}")

    def read(self, name: str) -> Array:
        """One tensor in float32, which holds every float16 and bfloat16 exactly."""
        file, theirs = self.places[name]
        with _reading(self.src / file):
            found = self.files[file].get_slice(theirs)
            if found.get_dtype() == "BF16":  # which NumPy, and so the library for it, does not know
                return _read_bfloat16(self.src / file, theirs, tuple(found.get_shape()))
            array: Array = self.files[file].get_tensor(theirs).astype(np.float32, copy=False)
        return array

    def tensors(self, config: GPT2Config) -> Iterator[tuple[str, Array]]:
        """Yield (name, array) in batchgen's names, one in memory at a time; Conv1D's weights are [in, out] as here."""
        for name, theirs in hf_names(config).items():
            yield name, self.read(theirs)
        if not config.tie_word_embeddings:
            yield "lm_head", self.read("lm_head.weight").T


def _tied(config: GPT2Config) -> GPT2Config:
    return GPT2Config(**{name: value for name, value in config.as_dict().items() if name != "tie_word_embeddings"})


def _weight_files(src: Path) -> dict[str, set[str] | None]:
    """The safetensors files of a directory, each with the names that an index says are in it."""
    if os.path.lexists(src / WEIGHTS):
        return {WEIGHTS: None}
    if os.path.lexists(src / WEIGHTS_INDEX):
        return _sharded(src / WEIGHTS_INDEX)
    pickled = sorted(path.name for path in src.glob("*.bin")) + sorted(path.name for path in src.glob("*.pt"))
    if pickled:
        raise ModelError(f"{src}: {_UNPICKLE.format(short(pickled[0]))}")
    raise ModelError(f"{src}: has no {WEIGHTS} and no {WEIGHTS_INDEX}; {_REMEDY}")


def _sharded(path: Path) -> dict[str, set[str] | None]:
    values = read_json(path, _MAX_JSON)
    places = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(places, dict) or not places:
        raise ModelError(f"{path}: has no weight_map of tensors and files; {_REMEDY}")
    files: dict[str, set[str]] = {}
    for name, file in places.items():
        if not isinstance(file, str) or not _SHARD_FILE.fullmatch(file):
            raise ModelError(f"{path}: {short(file)} is not a plain .safetensors name inside the directory")
        files.setdefault(file, set()).add(name)
    return dict(sorted(files.items()))


def _open_safetensors(path: Path) -> Any:
    with open_file(path):  # a file, and readable; the library checks its header against its length
        pass
    from safetensors import safe_open  # only who converts needs it

    with _reading(path):
        return safe_open(str(path), framework="numpy")


class _reading:  # noqa: N801  # a context manager, and cheaper than a generator for thousands of tensors
    """Turn what safetensors raises into ModelError."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, ModelError):
            raise ModelError(f"{self.path}: cannot be read as safetensors ({short(error)}); {_REMEDY}") from error


def _read_bfloat16(path: Path, name: str, shape: tuple[int, ...]) -> Array:
    """A bfloat16 is the upper half of a float32; its bytes are where the header, which was checked, says."""
    with open_file(path) as file:
        length = int.from_bytes(file.read(8), "little")
        first, last = json.loads(file.read(length))[name]["data_offsets"]
        file.seek(8 + length + first)
        halves = np.frombuffer(file.read(last - first), "<u2").reshape(shape)
    widened: Array = np.left_shift(halves, 16, dtype=np.uint32).view(np.float32)
    return widened


# --- the vocabulary ------------------------------------------------------------------------------------------


def _vocabulary(src: Path, private: Path) -> Path:
    """The directory with the two vocabulary files: src, or private with what was made from tokenizer.json."""
    added = _added_tokens(src)
    pairs = [(src / vocabulary, src / merges) for vocabulary, merges in VOCABULARY_FILES]
    pair = next((pair for pair in pairs if all(map(os.path.lexists, pair))), None)
    if pair:
        vocabulary = read_json(pair[0], _MAX_JSON)
        if not isinstance(vocabulary, dict):
            raise ModelError(f"{pair[0]}: expected an object, found {short(vocabulary)}; {_REMEDY}")
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


def _added_tokens(src: Path) -> dict[str, int]:
    """Tokens that a fine-tune added to the vocabulary, from where old and new versions of transformers keep them."""
    found: dict[str, Any] = {}
    if os.path.lexists(src / "added_tokens.json"):
        values = read_json(src / "added_tokens.json", _MAX_CONFIG)
        found |= values if isinstance(values, dict) else {}
    if os.path.lexists(src / TOKENIZER):
        values = read_json(src / TOKENIZER, _MAX_JSON)
        entries = values.get("added_tokens") if isinstance(values, dict) else None
        for entry in entries if isinstance(entries, list) else ():
            if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
                raise ModelError(f"{src / TOKENIZER}: an entry of added_tokens has no content; {_REMEDY}")
            found[entry["content"]] = entry.get("id")
    return found


def _read_tokenizer(path: Path) -> tuple[dict[str, Any], bytes]:
    """Vocabulary and merges out of a tokenizer.json that is GPT-2's byte-level BPE and nothing else."""
    values = read_json(path, _MAX_JSON)
    if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
        raise ModelError(f"{path}: has no model; {_REMEDY}")
    model, before = values["model"], values.get("pre_tokenizer")
    _expect(path, "model.type", model.get("type"), "BPE")
    _expect(path, "normalizer", values.get("normalizer"), None)
    kind, prefix, split = _take_pre_tokenizer(before)
    _expect(path, "pre_tokenizer.type", kind, "ByteLevel")
    _expect(path, "pre_tokenizer.add_prefix_space", prefix, False)
    _expect(path, "pre_tokenizer.use_regex", split, True)
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges"):
        if model.get(name):
            _expect(path, f"model.{name}", model[name], None)
    vocabulary, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocabulary, dict) or not isinstance(merges, list):
        raise ModelError(f"{path}: model has no vocab and merges; {_REMEDY}")
    lines = [merge if isinstance(merge, str) else _joined(path, merge) for merge in merges]
    text = "".join(f"{line}\n" for line in ["#version: 0.2", *lines])
    return vocabulary, text.encode(errors="replace")  # a lone surrogate is then no token of the vocabulary


def _take_pre_tokenizer(values: object) -> tuple[object, object, object]:
    if not isinstance(values, dict):
        return values, False, True
    return values.get("type"), values.get("add_prefix_space", True), values.get("use_regex", True)


def _joined(path: Path, merge: object) -> str:
    if not isinstance(merge, list) or len(merge) != 2 or not all(isinstance(part, str) for part in merge):
        raise ModelError(f"{path}: {short(merge)} in merges is not a pair of strings; {_REMEDY}")
    return " ".join(merge)


def _expect(path: Path, name: str, found: object, expected: object) -> None:
    if found != expected:
        raise ModelError(
            f"{path}: {name} is {short(found)}; batchgen has only GPT-2's byte-level BPE ({json.dumps(expected)})"
        )


def _check_vocabulary(src: Path, vocabulary: Path, config: GPT2Config) -> None:
    tokenizer = Tokenizer.load(vocabulary)
    if tokenizer.n_vocab > config.n_vocab:
        raise ModelError(
            f"{src}: the vocabulary has {tokenizer.n_vocab} tokens and the model {config.n_vocab}; {_REMEDY}"
        )
    values = read_json(src / CONFIG, _MAX_CONFIG)
    eos = values.get("eos_token_id") if isinstance(values, dict) else None
    if isinstance(eos, int) and eos != tokenizer.eos_id:
        logger.warning(
            "%s: eos_token_id is %d; batchgen ends completions at %s (id %s) alone",
            src / CONFIG,
            eos,
            END_OF_TEXT,
            tokenizer.eos_id,
        )
