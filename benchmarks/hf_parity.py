"""Compare batchgen with transformers on the same float32 weights: python -m benchmarks.hf_parity [--deep] [SHAPE ...].

For each shape, transformers makes and saves a GPT-2 with random weights, `convert_checkpoint` converts it, and both
read the same prompts. A shape is ok if all logits are within 1e-4, and if every greedy token of batchgen's engine
(with its cache and batching) is that of transformers, unless the two best logits are within 1e-3. Exit code 1 if one
is not. The larger sizes have their true width but few layers; --deep gives them all layers, which needs 20 GB of memory
and as much disk.
"""

import argparse
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GPT2Config as HFConfig
from transformers import GPT2LMHeadModel
from transformers.utils.logging import disable_progress_bar

from batchgen.engine.engine import Engine
from batchgen.engine.sequence import Prompt, sample_seeds
from batchgen.gpt2.forward import Forward, Prefill
from batchgen.gpt2.kv_cache import KVArena
from batchgen.gpt2.weights import pack
from batchgen.models.convert import convert_checkpoint
from batchgen.models.shards import load_manifest, load_params
from batchgen.types import SamplingParams
from tests.support.models import write_byte_vocabulary

LENGTHS = (1, 7, 33, 96)
NEW_TOKENS = 24
TOLERANCE, MARGIN = 1e-4, 1e-3


@dataclass(frozen=True)
class Shape:
    """One kind of model: its config, how it is saved, and its number of layers without --deep."""

    config: dict[str, Any]
    dtype: torch.dtype = torch.float32
    shallow: int | None = None
    sharded: bool = False
    base: bool = False  # saved without the LM head's `transformer.` prefix
    note: str = ""
    lengths: tuple[int, ...] = field(default=LENGTHS)


SHAPES = {
    "124M": Shape({"n_embd": 768, "n_head": 12, "n_layer": 12}, lengths=(*LENGTHS, 1000)),
    "355M": Shape({"n_embd": 1024, "n_head": 16, "n_layer": 24}, shallow=8),
    "774M": Shape({"n_embd": 1280, "n_head": 20, "n_layer": 36}, shallow=4, sharded=True),
    "1558M": Shape({"n_embd": 1600, "n_head": 25, "n_layer": 48}, shallow=3),
    "distilgpt2": Shape({"n_embd": 768, "n_head": 12, "n_layer": 6}, base=True, note="no prefix"),
    "DialoGPT": Shape({"n_embd": 1024, "n_head": 16, "n_layer": 24}, torch.float16, shallow=4, note="float16"),
    "bfloat16": Shape({"n_embd": 768, "n_head": 12, "n_layer": 4}, torch.bfloat16),
    "untied": Shape({"n_embd": 768, "n_head": 12, "n_layer": 4, "tie_word_embeddings": False}),
    "n_inner": Shape({"n_embd": 768, "n_head": 12, "n_layer": 4, "n_inner": 1001}, note="n_inner 1001"),
    "narrow": Shape({"n_embd": 768, "n_head": 12, "n_layer": 4, "n_inner": 37}, note="n_inner 37"),
    "mistral": Shape(
        {"n_embd": 768, "n_head": 12, "n_layer": 6}
        | {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
        note="scores by layer",
    ),
    **{
        name: Shape(
            {"n_embd": 768, "n_head": 12, "n_layer": 4, "activation_function": name, "layer_norm_epsilon": 1e-6}
        )
        for name in ("gelu", "quick_gelu", "silu", "relu", "relu2", "tanh")
    },
    "unscaled": Shape({"n_embd": 768, "n_head": 12, "n_layer": 4, "scale_attn_weights": False}, note="scores unscaled"),
}


def make_model(shape: Shape, deep: bool, directory: Path) -> GPT2LMHeadModel:
    """A random model in float32, after transformers saved it as a Hugging Face directory."""
    values = shape.config | ({} if deep or shape.shallow is None else {"n_layer": shape.shallow})
    torch.manual_seed(0)
    config = HFConfig(**values, initializer_range=0.04, attn_implementation="eager", eos_token_id=256)
    model = GPT2LMHeadModel(config).to(shape.dtype).eval()
    saved = model.transformer if shape.base else model
    saved.save_pretrained(directory, max_shard_size="200MB" if shape.sharded else "50GB")
    write_byte_vocabulary(directory)
    (directory / "encoder.json").rename(directory / "vocab.json")
    (directory / "vocab.bpe").rename(directory / "merges.txt")
    return model.float()


@torch.no_grad()
def compare(model: GPT2LMHeadModel, converted: Path, lengths: tuple[int, ...]) -> tuple[float, float, int, int, int]:
    """(largest difference of logits, largest logit, greedy tokens, number that differ, of these within MARGIN)."""
    config = load_manifest(converted).config
    weights = pack(load_params(converted))
    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(0, config.n_vocab, length).tolist()) for length in lengths]
    worst, largest = 0.0, 0.0
    for prompt in prompts:
        expected = model(torch.tensor([prompt])).logits[0].numpy()
        found = logits(weights, config, prompt)
        worst, largest = max(worst, float(np.abs(found - expected).max())), max(largest, float(np.abs(expected).max()))
    n, different, close = 0, 0, 0
    sampling = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
    engine = Engine(weights, config, eos_ids=(), kv_bytes=2**30, max_batch=len(prompts))
    requests = [Prompt(i, ids, sampling, sample_seeds(0, i, 1)) for i, ids in enumerate(prompts)]
    for completion in engine.generate(requests):
        prompt, new = prompts[completion.row], list(completion.token_ids)
        rows = model(torch.tensor([[*prompt, *new][:-1]])).logits[0, len(prompt) - 1 :]
        best = torch.topk(rows, 2)
        n += len(new)
        for token, ids, values in zip(new, best.indices.tolist(), best.values.tolist(), strict=True):
            different += token != ids[0]
            close += token != ids[0] and values[0] - values[1] <= MARGIN
    return worst, largest, n, different, close


def logits(weights: Any, config: Any, prompt: tuple[int, ...]) -> Any:
    """batchgen's logits at every position of a prompt."""
    segment = KVArena(config, len(prompt)).allocate(len(prompt), start=0)
    assert segment is not None
    return Forward(weights, config, len(prompt), len(prompt))(prefills=[Prefill(segment, prompt, n_logits=len(prompt))])


def check(name: str, deep: bool) -> bool:
    """Print one line on a shape; whether it is ok."""
    shape, started = SHAPES[name], time.monotonic()
    directory = Path(tempfile.mkdtemp(prefix="hf_parity-"))
    try:
        model = make_model(shape, deep, directory / "hf")
        convert_checkpoint(directory / "hf", directory / "model", name=name)
        worst, largest, n, different, close = compare(model, directory / "model", shape.lengths)
        layers = load_manifest(directory / "model").config.n_layer
    finally:
        shutil.rmtree(directory)
    right = worst < TOLERANCE and different == close
    print(
        f"{name:10} {shape.config['n_embd']:>5}x{layers:<2} {shape.note:15} logits up to {largest:5.1f}, "
        f"difference at most {worst:.1e}; greedy {n - different}/{n} equal, {close} within the margin: "
        f"{'ok' if right else 'WRONG'} ({time.monotonic() - started:.0f} s)",
        flush=True,
    )
    return right


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=", ".join(SHAPES))
    parser.add_argument("--deep", action="store_true", help="all layers of the larger sizes")
    options = parser.parse_args()
    disable_progress_bar()
    return 0 if all([check(name, options.deep) for name in options.shapes or SHAPES]) else 1


if __name__ == "__main__":
    sys.exit(main())
