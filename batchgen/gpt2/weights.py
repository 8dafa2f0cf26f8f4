"""The weights of a GPT-2 as the kernels read them: linear weights in panels, in float32 or in int8.

A panel is PANEL adjacent columns of a matrix [n_in, n_out], row after row, so that a kernel reads memory from front to
back. The columns of the last panel past n_out are zeros.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from batchgen.errors import ModelError
from batchgen.gpt2.params import Array, Norm, Params
from batchgen.options import say
from batchgen.types import Precision

PANEL = 64  # columns: 4 AVX-512 vectors of float32, or 16 AVX vectors read 2 at a time
GROUP = 4  # rows of an int8 panel that lie together: one dot product of bytes (vpdpbusd) adds up four
_FINITE = np.finfo(np.float32).max
LARGEST = 127  # int8 weights are -127 to 127
MOST_IN = (2**31 - 1) // (255 * LARGEST)  # columns of an input in int8: the sum of more products may be no int32

Bytes = npt.NDArray[np.int8]
Int32s = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class Float32Linear:
    """x @ w + b in float32."""

    panels: Array  # [n_panel, n_in, PANEL]
    b: Array  # [n_out]


@dataclass(frozen=True, slots=True, eq=False)
class Int8Linear:
    """x @ w + b as y @ q + b: y is x * inverse + offset rounded to bytes, q[i, j] is panels[i, j] * scale[j] in int8.

    `offset` moves the mean of each column of y to 0 (b makes up for it), and `inverse` makes the columns of y alike in
    size (SmoothQuant, Xiao et al., 2022).
    """

    panels: Bytes  # [n_panel, ceil(n_in / GROUP), PANEL, GROUP]
    scale: Array  # [n_panel * PANEL]
    column_sum: Int32s  # [n_panel * PANEL] sums over i of panels[i, j]
    inverse: Array  # [n_in]
    offset: Array  # [n_in]
    b: Array  # [n_out]


Linear: TypeAlias = Float32Linear | Int8Linear


@dataclass(frozen=True, slots=True, eq=False)
class BlockWeights:
    """One transformer block."""

    ln_1: Norm
    c_attn: Linear
    attn_proj: Linear
    ln_2: Norm
    c_fc: Linear
    mlp_proj: Linear


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """A whole model."""

    precision: Precision
    wte: Array  # [n_vocab, n_embd]
    wpe: Array  # [n_ctx, n_embd]
    blocks: list[BlockWeights]
    ln_f: Norm
    lm_head: Linear  # [n_embd, n_vocab], b is zeros
    absent_ids: npt.NDArray[np.intp] | None = None  # rows of wte that belong to no token: their logits are -inf


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def aligned(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[np.generic]:
    """Zeros whose first byte is at a multiple of 64, a cache line and an AVX-512 vector."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    memory = np.zeros(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def to_panels(w: Array) -> Array:
    """[n_in, n_out] -> [n_panel, n_in, PANEL]."""
    n_in, n_out = w.shape
    n_panel = -(-n_out // PANEL)
    panels = aligned((n_panel, n_in, PANEL), np.float32)
    for p in range(n_panel):
        columns = w[:, p * PANEL : (p + 1) * PANEL]
        panels[p, :, : columns.shape[1]] = columns
    return panels  # type: ignore[return-value]


def from_panels(panels: Array, n_out: int) -> Array:
    """[n_panel, n_in, PANEL] -> [n_in, n_out]: the inverse of to_panels."""
    n_panel, n_in, _ = panels.shape
    return np.ascontiguousarray(panels.transpose(1, 0, 2).reshape(n_in, n_panel * PANEL)[:, :n_out])


@np.errstate(over="ignore")  # of weights near the largest float32
def to_int8(w: Array, b: Array, inverse: Array | None = None, offset: Array | None = None) -> Int8Linear:
    """Round w [n_in, n_out] to int8 with a scale for each column; the input will be x * inverse + offset [n_in]."""
    n_in, n_out = w.shape
    if n_in > MOST_IN:
        remedy = f"use {say('precision', 'float32')}"
        raise ModelError(f"n_embd or n_inner is {n_in}, int8 computes at most {MOST_IN}; {remedy}")
    n_panel, n_group = -(-n_out // PANEL), -(-n_in // GROUP)
    inverse = np.ones(n_in, np.float32) if inverse is None else inverse
    offset = np.zeros(n_in, np.float32) if offset is None else offset
    panels = aligned((n_panel, n_group, PANEL, GROUP), np.int8)
    scale, column_sum = np.ones(n_panel * PANEL, np.float32), np.zeros(n_panel * PANEL, np.int32)
    moved_b = np.empty(n_out, np.float32)
    for p in range(n_panel):
        part = slice(p * PANEL, min((p + 1) * PANEL, n_out))
        columns = np.clip(w[:, part] / inverse[:, None], -_FINITE, _FINITE)  # [n_in, up to PANEL]
        n = columns.shape[1]
        scales = np.abs(columns).max(axis=0) / np.float32(LARGEST)
        scales = np.where(scales > 0, scales, np.float32(1))
        rounded = np.zeros((n_group * GROUP, PANEL), np.int8)
        rounded[:n_in, :n] = np.clip(np.rint(columns / scales), -LARGEST, LARGEST)
        panels[p] = rounded.reshape(n_group, GROUP, PANEL).transpose(0, 2, 1)
        scale[part] = scales
        column_sum[p * PANEL : (p + 1) * PANEL] = rounded.sum(axis=0, dtype=np.int32)
        moved = np.multiply(offset[:, None], columns, dtype=np.float64)
        moved_b[part] = b[part] - np.add.accumulate(moved)[-1]  # a sum in the order of i
    return Int8Linear(panels, scale, column_sum, inverse, offset, moved_b)  # type: ignore[arg-type]


def arrange(params: Params, precision: Precision, linear: Callable[..., Linear]) -> Weights:
    """The weights of a model from nested parameters; linear(w, b) makes a product of its matrix, in whatever form."""
    blocks = [
        BlockWeights(
            ln_1=block["ln_1"],
            c_attn=linear(**block["attn"]["c_attn"]),
            attn_proj=linear(**block["attn"]["c_proj"]),
            ln_2=block["ln_2"],
            c_fc=linear(**block["mlp"]["c_fc"]),
            mlp_proj=linear(**block["mlp"]["c_proj"]),
        )
        for block in params["blocks"]
    ]
    lm_head = linear(params["lm_head"], np.zeros(len(params["wte"]), np.float32))
    return Weights(precision, params["wte"], params["wpe"], blocks, params["ln_f"], lm_head, params.get("absent_ids"))


def pack(params: Params, precision: Precision = "float32") -> Weights:
    """The weights of a model in memory, from picoGPT's parameters."""
    return arrange(params, precision, to_int8 if precision == "int8" else lambda w, b: Float32Linear(to_panels(w), b))
