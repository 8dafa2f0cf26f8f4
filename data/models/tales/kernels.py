"""The network's operations for one CPU core: bfloat16 products by PyTorch, the rest by kernels.cpp.

With PyTorch's own, two thirds of a training step's time go to what is no matrix product, and
with these two fifths.  `kernels.cpp` is compiled with the machine's C++ compiler at the first call.
"""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

FLAGS = ["-O3", "-march=native", "-mprefer-vector-width=512", "-ffast-math", "-std=c++17", "-shared", "-fPIC"]


@functools.cache
def library() -> ctypes.CDLL:
    """kernels.cpp, compiled and loaded."""
    keep_memory()
    source = Path(__file__).with_name("kernels.cpp")
    with tempfile.TemporaryDirectory() as folder:
        compiled = Path(folder) / "kernels.so"
        subprocess.run([os.environ.get("CXX", "c++"), *FLAGS, str(source), "-o", str(compiled)], check=True)
        loaded = ctypes.CDLL(str(compiled))
    loaded.cross_entropy.restype = ctypes.c_double
    return loaded


def keep_memory() -> None:
    """Have glibc keep freed memory: to get each large tensor anew from the system takes a fifth of a step's time."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        for option, value in ((-4, 0), (-1, -1), (-2, 1 << 28)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
            mallopt(option, value)


def call(name: str, *arguments: Tensor | int | float) -> float:
    """Call a kernel with tensors (contiguous), integers (64 bits) and floats."""
    given: list[object] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            assert argument.is_contiguous()
            given.append(ctypes.c_void_p(argument.data_ptr()))
        else:
            given.append(ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_int64(argument))
    return getattr(library(), name)(*given)


class Gelu(Function):
    """GELU, tanh formula."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        """Of a bfloat16 tensor."""
        ctx.save_for_backward(x)
        y = torch.empty_like(x)
        call("gelu", x, y, x.numel())
        return y

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor) -> Tensor:
        """From the input, which is kept."""
        (x,) = ctx.saved_tensors
        dx = torch.empty_like(x)
        call("gelu_backward", x, dy.contiguous(), dx, x.numel())
        return dx


class LayerNorm(Function):
    """Layer norm from the float32 residual stream to bfloat16."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Over the last axis."""
        width = x.shape[-1]
        y, stats = torch.empty_like(x, dtype=torch.bfloat16), x.new_empty(x.numel() // width, 2)
        call("layer_norm", x, weight, bias, y, stats, len(stats), width)
        ctx.save_for_backward(x, weight, stats)
        return y

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For the input, the weight and the bias."""
        x, weight, stats = ctx.saved_tensors
        dx, dweight, dbias = torch.empty_like(x), torch.zeros_like(weight), torch.zeros_like(weight)
        call("layer_norm_backward", x, weight, dy.contiguous(), stats, dx, dweight, dbias, len(stats), x.shape[-1])
        return dx, dweight, dbias


class Add(Function):
    """The residual stream (float32) plus a branch (bfloat16) under dropout."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, branch: Tensor, dropout: float) -> Tensor:
        """The mask is drawn again from its seed on the way back."""
        seed = int(torch.randint(2**32, ())) if dropout else 0
        ctx.mask = (seed, int((1 - dropout) * 2**32) if dropout else 0, 1 / (1 - dropout))
        out = torch.empty_like(x)
        call("add", x, branch.contiguous(), out, x.numel(), *ctx.mask)
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, dout: Tensor) -> tuple[Tensor, Tensor, None]:
        """The stream's gradient is the output's."""
        dout = dout.contiguous()
        dbranch = torch.empty_like(dout, dtype=torch.bfloat16)
        call("add_backward", dout, dbranch, dout.numel(), *ctx.mask)
        return dout, dbranch, None


class Attention(Function):
    """Causal attention of bfloat16 queries, keys and values, [batch, length, 3, heads, width]."""

    BLOCK = 256  # queries at a time: the keys after a block's last query are left out

    @staticmethod
    def forward(ctx: FunctionCtx, qkv: Tensor) -> Tensor:
        """[batch, length, heads * width]; the probabilities are kept."""
        batch, length, _, heads, width = qkv.shape
        split = qkv.permute(2, 0, 3, 1, 4).contiguous()
        query, key, value = split.flatten(1, 2)
        out, kept = torch.empty_like(query), []
        for start in range(0, length, Attention.BLOCK):
            end = min(start + Attention.BLOCK, length)
            part = torch.bmm(query[:, start:end], key[:, :end].mT)
            call("softmax", part, width**-0.5, batch * heads, end - start, end, start)
            out[:, start:end] = torch.bmm(part, value[:, :end])
            kept.append(part)
        ctx.save_for_backward(split, *kept)
        return out.view(batch, heads, length, width).transpose(1, 2).reshape(batch, length, heads * width)

    @staticmethod
    def backward(ctx: FunctionCtx, dout: Tensor) -> Tensor:
        """For queries, keys and values."""
        split, *kept = ctx.saved_tensors
        _, batch, heads, length, width = split.shape
        query, key, value = split.flatten(1, 2)
        dout = dout.view(batch, length, heads, width).transpose(1, 2).reshape(batch * heads, length, width)
        dsplit = torch.empty_like(split) if len(kept) == 1 else torch.zeros_like(split)
        dquery, dkey, dvalue = dsplit.flatten(1, 2)
        for i, part in enumerate(kept):
            start, end = i * Attention.BLOCK, part.shape[2]
            given = dout[:, start:end]
            scores = torch.bmm(given, value[:, :end].mT)
            call("softmax_backward", part, scores, width**-0.5, batch * heads, end - start, end, start)
            if len(kept) == 1:
                torch.bmm(part.mT, given, out=dvalue)
                torch.bmm(scores, key, out=dquery)
                torch.bmm(scores.mT, query, out=dkey)
            else:
                dvalue[:, :end] += torch.bmm(part.mT, given)
                dquery[:, start:end] = torch.bmm(scores, key[:, :end])
                dkey[:, :end] += torch.bmm(scores.mT, query[:, start:end])
        return dsplit.permute(1, 3, 0, 2, 4).contiguous()


class CrossEntropy(Function):
    """Mean cross-entropy in nats of bfloat16 logits, whose memory it takes for their gradient."""

    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor, targets: Tensor) -> Tensor:
        """Of [rows, vocabulary] logits."""
        logits = logits.detach()
        loss = call("cross_entropy", logits, targets.contiguous(), *logits.shape)
        ctx.save_for_backward(logits)
        return torch.tensor(loss / len(logits))

    @staticmethod
    def backward(ctx: FunctionCtx, dloss: Tensor) -> tuple[Tensor, None]:
        """The gradient that forward left."""
        (gradient,) = ctx.saved_tensors
        return (gradient if float(dloss) == 1.0 else gradient.mul_(float(dloss))), None
