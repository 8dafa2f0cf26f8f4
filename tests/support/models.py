"""Small models for the tests, made in milliseconds."""

import json
from pathlib import Path

import numpy as np

from batchgen.gpt2.config import GPT2Config
from batchgen.gpt2.params import Array, Params, nest, random_tensors
from batchgen.models.shards import Description, write_model
from batchgen.text.tokenizer import END_OF_TEXT, byte_alphabet

TINY = GPT2Config(n_vocab=500, n_ctx=256, n_embd=64, n_head=4, n_layer=3)
BYTES = GPT2Config(n_vocab=257, n_ctx=128, n_embd=32, n_head=2, n_layer=2)


def sharp_tensors(config: GPT2Config, seed: int = 0) -> dict[str, Array]:
    """Random weights so large that the next token depends strongly on all tokens before it."""
    tensors = random_tensors(config, seed)
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and name != "lm_head":
            tensor *= 6
    tensors["lm_head"] = np.ascontiguousarray(tensors["wte"].T)
    return tensors


def sharp_params(config: GPT2Config, seed: int = 0) -> Params:
    return nest(sharp_tensors(config, seed), config.n_layer)


def write_byte_vocabulary(directory: Path) -> Path:
    """A vocabulary without merges: token i is byte i, and 256 is <|endoftext|>."""
    directory.mkdir(parents=True, exist_ok=True)
    encoder = {character: byte for byte, character in byte_alphabet().items()} | {END_OF_TEXT: 256}
    (directory / "encoder.json").write_text(json.dumps(encoder), encoding="utf-8")
    (directory / "vocab.bpe").write_text("#version: 0.2\n", encoding="utf-8")
    return directory


def write_byte_model(directory: Path, config: GPT2Config = BYTES, seed: int = 0) -> Path:
    """A model directory with the byte vocabulary: a prompt has as many tokens as bytes."""
    vocabulary = write_byte_vocabulary(directory.parent / f"{directory.name}-vocabulary")
    tensors = sharp_tensors(config, seed)
    del tensors["lm_head"]
    description = Description(directory.name, config, {"kind": "test"})
    write_model(directory, description, tensors.items(), tokenizer_dir=vocabulary)
    return directory


def has_avx512() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "avx512vl" in cpuinfo.read_text()
