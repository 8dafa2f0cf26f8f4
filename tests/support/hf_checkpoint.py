"""Hugging Face GPT-2 directories for the tests, written without transformers."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from batchgen.gpt2.config import GPT2Config
from batchgen.gpt2.params import Array
from batchgen.models.huggingface import hf_names
from tests.support.models import BYTES, sharp_tensors, write_byte_vocabulary


def hf_tensors(config: GPT2Config = BYTES, seed: int = 0) -> dict[str, Array]:
    """Weights under Hugging Face's names without a prefix; with lm_head.weight unless it is tied to wte."""
    tensors = sharp_tensors(config, seed)
    found = {theirs: tensors[name] for name, theirs in hf_names(config).items()}
    if not config.tie_word_embeddings:
        found["lm_head.weight"] = np.ascontiguousarray(tensors["lm_head"].T)
    return found


def hf_config(config: GPT2Config = BYTES) -> dict[str, Any]:
    """A config.json as transformers writes it, with options that batchgen ignores."""
    values = {"activation_function": "gelu_new"} | config.as_dict()
    values |= {"vocab_size": values.pop("n_vocab"), "n_positions": values.pop("n_ctx"), "model_type": "gpt2"}
    return values | {"architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1}


def write_safetensors(path: Path, tensors: dict[str, Any]) -> Path:
    """Write a safetensors file without the library, for bfloat16: a value is an array or (dtype, array of bits)."""
    header, offset, blocks = {}, 0, []
    names = {"<f4": "F32", "<f2": "F16", "<f8": "F64", "<i8": "I64", "|u1": "U8"}
    for name, value in tensors.items():
        dtype, array = value if isinstance(value, tuple) else (names[value.dtype.str], value)
        data = np.ascontiguousarray(array).tobytes()
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
        blocks.append(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blocks))
    return path


def write_hf_model(directory: Path, config: GPT2Config = BYTES, *, prefix: str = "", **options: Any) -> Path:
    """Write config.json, model.safetensors, vocab.json and merges.txt; options are added to config.json."""
    write_byte_vocabulary(directory)
    (directory / "encoder.json").rename(directory / "vocab.json")
    (directory / "vocab.bpe").rename(directory / "merges.txt")
    (directory / "config.json").write_text(json.dumps(hf_config(config) | options))
    tensors = hf_tensors(config)
    named = {name if name == "lm_head.weight" else prefix + name: array for name, array in tensors.items()}
    write_safetensors(directory / "model.safetensors", named)
    return directory
