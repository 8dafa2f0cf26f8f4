"""One random model of 124M's shape in every format, made once and kept in the cache directory."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from batchgen.gpt2.config import GPT2Config
from batchgen.gpt2.params import Array
from batchgen.models.shards import TOKENIZER_FILES, Description, write_model
from tests.support.tensors import random_tensors
from tests.support.vocabulary import gpt2_vocabulary_dir

SIZE_124M = GPT2Config(n_vocab=50257, n_ctx=1024, n_embd=768, n_head=12, n_layer=12)
END_OF_TEXT = 50_256

_LEAVES = {"g": "weight", "b": "bias", "w": "weight"}


def batchgen_model(cache: Path) -> Path:
    """batchgen's shards."""
    directory = cache / "models" / "batchgen"
    if not directory.exists():
        tensors = random_tensors(SIZE_124M)
        description = Description("random", SIZE_124M, {"kind": "random weights"})
        write_model(directory, description, tensors.items(), tokenizer_dir=gpt2_vocabulary_dir())
    return directory


def huggingface_model(cache: Path) -> Path:
    """The same weights as Hugging Face's GPT2LMHeadModel saves them."""
    directory = cache / "models" / "huggingface"
    if not directory.exists():
        new = directory.with_suffix(".tmp")
        shutil.rmtree(new, ignore_errors=True)
        write_huggingface(new, random_tensors(SIZE_124M), SIZE_124M, gpt2_vocabulary_dir())
        new.rename(directory)
    return directory


def write_huggingface(directory: Path, tensors: dict[str, Array], config: GPT2Config, vocabulary: Path) -> None:
    """A model and its tokenizer as Hugging Face's GPT2LMHeadModel saves them."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(huggingface_config(config), indent=2), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}', encoding="utf-8")
    for ours, theirs in TOKENIZER_FILES.items():
        shutil.copyfile(vocabulary / ours, directory / theirs)
    write_safetensors(directory / "model.safetensors", dict(huggingface_tensors(tensors)))


def huggingface_config(config: GPT2Config) -> dict[str, object]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "bos_token_id": config.n_vocab - 1,
        "eos_token_id": config.n_vocab - 1,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "n_ctx": config.n_ctx,
        "n_positions": config.n_ctx,
        "n_embd": config.n_embd,
        "n_head": config.n_head,
        "n_layer": config.n_layer,
        "vocab_size": config.n_vocab,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }


def huggingface_tensors(tensors: dict[str, Array]) -> Iterator[tuple[str, Array]]:
    """`h0/attn/c_attn/w` -> `transformer.h.0.attn.c_attn.weight`, also [in, out]; lm_head is left out: it is wte."""
    for name, tensor in tensors.items():
        if name == "lm_head":
            continue
        *path, leaf = name.split("/")
        if path and path[0][1:].isdigit():
            path[:1] = ["h", path[0][1:]]
        yield ".".join(["transformer", *path, _LEAVES.get(leaf, f"{leaf}.weight")]), tensor


def write_safetensors(path: Path, tensors: dict[str, Array]) -> None:
    """A length, a JSON header with each tensor's place, and the data."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor, "<f4").data)
