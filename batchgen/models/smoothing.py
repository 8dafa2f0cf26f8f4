"""What is done to the input of each int8 product before it is rounded to bytes: y = x * inverse + offset.

GPT-2 has a few columns that are many times as large as the others. They decide the scale of a row, and the others are
rounded away. After `offset`, the mean of every column is 0; after `inverse`, the largest values of all columns are
about alike, and so are the weights that multiply them (SmoothQuant, Xiao et al., 2022, with alpha = 1/2; moving the
mean too: Outlier Suppression+, Wei et al., 2023).

The means and the largest values are those of the model itself on random tokens, over all positions of its context. The
kernels give the same bits on every processor, so the numbers here do too.
"""

from dataclasses import replace

import numpy as np

from batchgen.gpt2.config import GPT2Config
from batchgen.gpt2.forward import Forward, Prefill
from batchgen.gpt2.kv_cache import KVArena
from batchgen.gpt2.params import Array
from batchgen.gpt2.weights import Float32Linear, Linear, Weights
from batchgen.text.tokenizer import Tokenizer

SEQUENCES, LENGTH = 8, 128  # of random tokens


class _Inputs:
    """What a product has read: the number of rows, the sum, minimum and maximum of each column."""

    def __init__(self, n_in: int) -> None:
        self.n = 0
        self.sum = np.zeros(n_in)
        self.low, self.high = np.full(n_in, np.inf, np.float32), np.full(n_in, -np.inf, np.float32)

    @np.errstate(all="ignore")
    def add(self, x: Array) -> None:
        for row in x:  # a sum in the order of the rows
            self.sum += row
        self.n += len(x)
        np.minimum(self.low, x.min(axis=0), out=self.low)
        np.maximum(self.high, x.max(axis=0), out=self.high)


class _Recording(Forward):
    """A forward pass that records the inputs of its products, and computes no logits."""

    def __init__(self, weights: Weights, config: GPT2Config, max_rows: int) -> None:
        super().__init__(weights, config, max_rows, max_logits=max_rows)
        self.inputs: dict[int, _Inputs] = {}

    def _linear(self, x: Array, w: Linear, epilogue: int, out: Array) -> None:
        self.inputs.setdefault(id(w), _Inputs(x.shape[1])).add(x)
        if w is not self.weights.lm_head:
            super()._linear(x, w, epilogue, out)


def _random_ids(weights: Weights, tokenizer: Tokenizer, n: int) -> list[int]:
    n_vocab = len(weights.wte)
    ids = np.setdiff1d(np.arange(n_vocab), tokenizer.absent_ids(n_vocab))
    chosen: list[int] = ids[np.random.Philox(key=0).random_raw(n) % np.uint64(len(ids))].tolist()
    return chosen


def _not_tiny(x: Array) -> Array:
    """Raise the smallest of some magnitudes: a column that is 0 on random tokens may not be on others."""
    return np.maximum(x, max(np.median(x) / 4, x.max() / 1024))


@np.errstate(all="ignore")
def _fit(inputs: _Inputs, w: Float32Linear) -> tuple[Array, Array]:
    """(inverse, offset) from the inputs of one product; 1 and 0 where they are not finite."""
    mean = inputs.sum / inputs.n
    largest = _not_tiny(np.maximum(inputs.high - mean, mean - inputs.low))
    weights = _not_tiny(np.maximum(w.panels.max(axis=(0, 2)), -w.panels.min(axis=(0, 2))).astype(np.float64))
    inverse = np.sqrt(weights / largest).astype(np.float32)
    inverse[~(np.isfinite(inverse) & (inverse > 0))] = 1
    offset = (-mean * inverse).astype(np.float32)
    offset[~np.isfinite(offset)] = 0
    return inverse, offset


def _linears(weights: Weights) -> dict[str, Linear]:
    linears = {"lm_head": weights.lm_head}
    for i, block in enumerate(weights.blocks):
        linears[f"h{i}/attn/c_attn/w"], linears[f"h{i}/attn/c_proj/w"] = block.c_attn, block.attn_proj
        linears[f"h{i}/mlp/c_fc/w"], linears[f"h{i}/mlp/c_proj/w"] = block.c_fc, block.mlp_proj
    return linears


def fit_inputs(weights: Weights, config: GPT2Config, tokenizer: Tokenizer) -> dict[str, tuple[Array, Array]]:
    """{matrix: (inverse, offset) [n_in]}, the same bits on every processor: rows depend on them.

    weights: in float32, mapped.
    """
    length = min(LENGTH, config.n_ctx)
    spread = replace(weights, wpe=weights.wpe[:: config.n_ctx // length])  # position i of all, at i * n_ctx / length
    ids = _random_ids(weights, tokenizer, SEQUENCES * length)
    forward = _Recording(spread, config, length)
    arena = KVArena(config, length)
    for first in range(0, len(ids), length):
        arena.clear()
        segment = arena.allocate(length, start=0)
        assert segment is not None
        forward(prefills=[Prefill(segment, ids[first : first + length], n_logits=length)])
    return {name: _fit(forward.inputs[id(w)], w) for name, w in _linears(weights).items()}  # type: ignore[arg-type]
