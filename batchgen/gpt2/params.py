"""The parameters of a GPT-2: picoGPT's nested dict of arrays, and functions that build one."""

from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]


class Norm(TypedDict):
    g: Array  # [n_embd]
    b: Array  # [n_embd]


class Linear(TypedDict):
    w: Array  # [in, out]
    b: Array  # [out]


class Attn(TypedDict):
    c_attn: Linear  # w [n_embd, 3*n_embd]: queries, keys, values
    c_proj: Linear  # w [n_embd, n_embd]


class Mlp(TypedDict):
    c_fc: Linear  # w [n_embd, inner_dim]; inner_dim is 4*n_embd in OpenAI's models
    c_proj: Linear  # w [inner_dim, n_embd]


class Block(TypedDict):
    ln_1: Norm
    attn: Attn
    ln_2: Norm
    mlp: Mlp


class Params(TypedDict):
    """Keys and shapes of picoGPT's `load_gpt2_params_from_tf_ckpt`, and lm_head."""

    wte: Array  # [n_vocab, n_embd]
    wpe: Array  # [n_ctx, n_embd]
    blocks: list[Block]
    ln_f: Norm
    lm_head: Array  # [n_embd, n_vocab]: a contiguous copy of wte.T, unless config.tie_word_embeddings is false
    absent_ids: NotRequired[npt.NDArray[np.intp]]  # rows of wte that belong to no token: their logits are -inf


def nest(tensors: Mapping[str, Array], n_layer: int) -> Params:
    """Nest tensors by their names: `h3/attn/c_attn/w` -> params["blocks"][3]["attn"]["c_attn"]["w"]."""
    root: dict[str, Any] = {"blocks": [{} for _ in range(n_layer)]}
    for name, array in tensors.items():
        *path, leaf = name.split("/")
        node = root
        if path and path[0][1:].isdigit():
            node = root["blocks"][int(path.pop(0)[1:])]
        for key in path:
            node = node.setdefault(key, {})
        node[leaf] = array
    return root  # type: ignore[return-value]
