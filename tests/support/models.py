"""Small models for the tests, made in milliseconds."""

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from batchgen.gpt2.config import GPT2Config
from batchgen.gpt2.params import Array, Params, nest
from batchgen.gpt2.weights import to_panels
from batchgen.models.shards import Description, load_tensors, write_model, write_npy
from batchgen.text.tokenizer import END_OF_TEXT, byte_alphabet
from tests.support.tensors import random_tensors

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


MERGES = (
    *("t h", "th e", "Ġ t", "Ġt h", "Ġth e", "Ġt i", "Ġti m", "Ġtim e", "Ġ a", "Ġa n", "Ġan d", "Ġ k", "i n", "in g"),
    *("Ġk ing", "O n", "c e", "On ce", "Ġ s", "Ġs o", "Ġso n", "Ċ Ċ", "Ġ Ġ", "ĠĠ ĠĠ", ": /", ":/ /", ". .", ".. ."),
    *("Ã ©", "c a", "ca f", "caf Ã©", "l d", "e r", "er s", "1 2", "12 3", "h t", "t p", "ht tp", "http s"),
)


def write_merged_vocabulary(directory: Path) -> Path:
    """A byte vocabulary with some merges: the tokens after <|endoftext|> are longer."""
    write_byte_vocabulary(directory)
    encoder = json.loads((directory / "encoder.json").read_text(encoding="utf-8"))
    for merge in MERGES:
        encoder[merge.replace(" ", "")] = len(encoder)
    (directory / "encoder.json").write_text(json.dumps(encoder), encoding="utf-8")
    (directory / "vocab.bpe").write_text("\n".join(("#version: 0.2", *MERGES, "")), encoding="utf-8")
    return directory


MERGED = replace(BYTES, n_vocab=BYTES.n_vocab + len(MERGES))


def merged_tensors() -> dict[str, Array]:
    """Weights of a model with this vocabulary, whose logits differ about as those of a trained one."""
    tensors = sharp_tensors(MERGED)
    tensors["ln_f/g"] *= 3
    return tensors


def write_merged_model(directory: Path) -> Path:
    """A model directory with this vocabulary."""
    vocabulary = write_merged_vocabulary(directory.parent / f"{directory.name}-vocabulary")
    tensors = merged_tensors()
    del tensors["lm_head"]
    write_model(directory, Description(directory.name, MERGED, {}), tensors.items(), tokenizer_dir=vocabulary)
    return directory


def write_byte_model(directory: Path, config: GPT2Config = BYTES, seed: int = 0) -> Path:
    """A model directory with the byte vocabulary: a prompt has as many tokens as bytes."""
    vocabulary = write_byte_vocabulary(directory.parent / f"{directory.name}-vocabulary")
    tensors = sharp_tensors(config, seed)
    del tensors["lm_head"]
    description = Description(directory.name, config, {"kind": "test"})
    write_model(directory, description, tensors.items(), tokenizer_dir=vocabulary)
    return directory


def write_wide_model(directory: Path) -> Path:
    """A byte model with 64 rows of wte that no token has, 256 to 299 and 301 to 320, whose logits are the largest.

    <|endoftext|> is 300. The rows of no token are zeros, as padding is, and every token's own logit is below zero.
    """
    config, eos_id = replace(BYTES, n_vocab=BYTES.n_vocab + 64), 300
    tensors, absent = sharp_tensors(config), [*range(256, eos_id), *range(eos_id + 1, config.n_vocab)]
    tensors["ln_f/b"][0] = 50
    tensors["wte"][:, 0] = -0.2
    tensors["wte"][absent] = 0
    del tensors["lm_head"]
    vocabulary = write_byte_vocabulary(directory.parent / f"{directory.name}-vocabulary")
    encoder = json.loads((vocabulary / "encoder.json").read_text(encoding="utf-8")) | {END_OF_TEXT: eos_id}
    (vocabulary / "encoder.json").write_text(json.dumps(encoder), encoding="utf-8")
    write_model(directory, Description(directory.name, config, {}), tensors.items(), tokenizer_dir=vocabulary)
    return directory


def rewrite_tensor(model: Path, name: str, change: Callable[[Array], object]) -> None:
    """Change a tensor of a model on disk, and its hash in the manifest, as an attacker could."""
    manifest = json.loads((model / "manifest.json").read_text())
    tensor = load_tensors(model)[name].copy()
    change(tensor)
    entry = manifest["tensors"][name]
    (model / entry["file"]).unlink()  # a process may have mapped it
    write_npy(model / entry["file"], to_panels(tensor) if "layout" in entry else tensor)
    entry["sha256"] = npy_sha256(tensor)
    (model / "manifest.json").write_text(json.dumps(manifest))


def npy_sha256(tensor: Array) -> str:
    """The SHA-256 of a tensor's plain `.npy` file."""
    with tempfile.TemporaryDirectory() as folder:
        return write_npy(Path(folder, "tensor.npy"), tensor)


def unpack_model(model: Path) -> Path:
    """Store a model as format 1 did: every tensor in a plain file."""
    manifest = json.loads((model / "manifest.json").read_text())
    for name, tensor in load_tensors(model).items():
        entry = manifest["tensors"][name]
        if entry.pop("layout", None):
            (model / entry["file"]).unlink()
            entry["file"] = f"{name.replace('/', '.')}.npy"
            assert write_npy(model / entry["file"], tensor) == entry["sha256"]
    (model / "manifest.json").write_text(json.dumps(manifest | {"format": 1}))
    return model
