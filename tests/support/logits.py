"""The logits of a prompt, by the kernels."""

from collections.abc import Sequence
from typing import Unpack

from batchgen.gpt2.config import GPT2Config
from batchgen.gpt2.forward import Forward, Prefill
from batchgen.gpt2.kv_cache import KVArena
from batchgen.gpt2.params import Array, Params
from batchgen.gpt2.weights import pack


def gpt2(inputs: Sequence[int], *, n_head: int, **params: Unpack[Params]) -> Array:
    """[n_seq] token ids -> [n_seq, n_vocab] logits of every position: picoGPT's `gpt2`, in float32."""
    (n_vocab, n_embd), (n_ctx, _) = params["wte"].shape, params["wpe"].shape
    _, n_inner = params["blocks"][0]["mlp"]["c_fc"]["w"].shape
    config = GPT2Config(n_vocab, n_ctx, n_embd, n_head, len(params["blocks"]), n_inner=n_inner)
    segment = KVArena(config, len(inputs)).allocate(len(inputs), start=0)
    assert segment is not None
    forward = Forward(pack(params), config, max_rows=len(inputs), max_logits=len(inputs))
    return forward(prefills=[Prefill(segment, inputs, n_logits=len(inputs))])
