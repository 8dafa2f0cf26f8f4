"""Compare batchgen with transformers on the same float32 weights: python -m benchmarks.hf_parity [--deep] [SHAPE ...].

For each shape, transformers makes and saves a GPT-2 with random weights, `convert_checkpoint` converts it, and both
read the same prompts. A shape is ok if all logits, log-probabilities of the prompts' tokens and embeddings of every
layer are within 1e-4, and if every greedy token of batchgen's engine (with its cache and batching) is that of
transformers, unless the two best logits are within 1e-3. Exit code 1 if one is not. The larger sizes have their true
width but few layers; --deep gives them all layers, which needs 20 GB of memory and as much disk.
"""

import argparse
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

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
from batchgen.job import Pool
from batchgen.models.convert import convert_checkpoint
from batchgen.models.shards import load_manifest, load_params
from batchgen.types import READING, SamplingParams
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


@dataclass(slots=True)
class Comparison:
    """The largest differences from transformers, and the greedy tokens."""

    largest: float = 0.0  # logit
    logits: float = 0.0
    scores: float = 0.0  # log-probabilities of the prompts' own tokens
    embeddings: float = 0.0
    tokens: int = 0
    different: int = 0
    close: int = 0  # of those that differ, those by less than MARGIN

    @property
    def is_right(self) -> bool:
        return max(self.logits, self.scores, self.embeddings) < TOLERANCE and self.different == self.close


def difference(found: Any, expected: torch.Tensor) -> float:
    return float(np.abs(found - expected.numpy()).max())


@torch.no_grad()
def compare(model: GPT2LMHeadModel, converted: Path, lengths: tuple[int, ...]) -> Comparison:
    config = load_manifest(converted).config
    weights = pack(load_params(converted))
    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(0, config.n_vocab, length).tolist()) for length in lengths]
    engine = Engine(weights, config, eos_ids=(), kv_bytes=2**30, max_batch=len(prompts))
    result = Comparison()
    for prompt in prompts:
        expected = model(torch.tensor([prompt])).logits[0]
        result.logits = max(result.logits, difference(logits(weights, config, prompt), expected))
        result.largest = max(result.largest, float(expected.abs().max()))
    compare_completions(model, engine, prompts, result)
    compare_scores(model, engine, prompts, result)
    compare_embeddings(model, engine, prompts, result)
    return result


def as_requests(prompts: list[tuple[int, ...]], params: SamplingParams, scored: int | None = None) -> list[Prompt]:
    return [Prompt(row, ids, params, sample_seeds(0, row, 1), scored=scored) for row, ids in enumerate(prompts)]


def compare_completions(
    model: GPT2LMHeadModel, engine: Engine, prompts: list[tuple[int, ...]], result: Comparison
) -> None:
    sampling = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
    for completion in engine.generate(as_requests(prompts, sampling)):
        prompt, new = prompts[completion.row], list(completion.token_ids)
        rows = model(torch.tensor([[*prompt, *new][:-1]])).logits[0, len(prompt) - 1 :]
        best = torch.topk(rows, 2)
        result.tokens += len(new)
        for token, ids, values in zip(new, best.indices.tolist(), best.values.tolist(), strict=True):
            result.different += token != ids[0]
            result.close += token != ids[0] and values[0] - values[1] <= MARGIN


def compare_scores(model: GPT2LMHeadModel, engine: Engine, prompts: list[tuple[int, ...]], result: Comparison) -> None:
    """The log-probability of every token after the first."""
    scored = [prompt for prompt in prompts if len(prompt) > 1]
    for completion in engine.generate(as_requests(scored, READING, scored=1)):
        ids = torch.tensor(scored[completion.row])
        expected = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        assert completion.prompt_logprobs is not None
        result.scores = max(result.scores, difference(np.array(completion.prompt_logprobs), expected))


def compare_embeddings(
    model: GPT2LMHeadModel, engine: Engine, prompts: list[tuple[int, ...]], result: Comparison
) -> None:
    """The embeddings of every layer, pooled in both ways."""
    states = [model(torch.tensor([prompt]), output_hidden_states=True).hidden_states for prompt in prompts]
    for layer in range(engine.config.n_layer + 1):
        for pool in get_args(Pool):
            for prompt, vector in engine.embed(as_requests(prompts, READING), layer, pool):
                hidden = states[prompt.row][layer][0]  # [n_prompt, n_embd]
                expected = hidden.mean(0) if pool == "mean" else hidden[-1]
                result.embeddings = max(result.embeddings, difference(vector, expected))


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
        found = compare(model, directory / "model", shape.lengths)
        layers = load_manifest(directory / "model").config.n_layer
    finally:
        shutil.rmtree(directory)
    print(
        f"{name:10} {shape.config['n_embd']:>5}x{layers:<2} {shape.note:15} logits up to {found.largest:5.1f}, "
        f"difference at most {found.logits:.1e}, of log-probabilities {found.scores:.1e}, "
        f"of embeddings {found.embeddings:.1e}; "
        f"greedy {found.tokens - found.different}/{found.tokens} equal, {found.close} within the margin: "
        f"{'ok' if found.is_right else 'WRONG'} ({time.monotonic() - started:.0f} s)",
        flush=True,
    )
    return found.is_right


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=", ".join(SHAPES))
    parser.add_argument("--deep", action="store_true", help="all layers of the larger sizes")
    options = parser.parse_args()
    disable_progress_bar()
    return 0 if all([check(name, options.deep) for name in options.shapes or SHAPES]) else 1


if __name__ == "__main__":
    sys.exit(main())
