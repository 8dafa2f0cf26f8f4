"""The whole of GPT-2 and its greedy loop, without a cache: read this first.

The functions, their names and their results are those of picoGPT's gpt2_pico.py. `forward.py` computes the
same thing several hundred times faster; the tests hold the two against each other.
"""

import numpy as np


def gelu(x):  # any shape, the tanh form
    return 0.5 * x * (1 + np.tanh(0.7978845608 * (x + 0.044715 * x**3)))


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def layer_norm(x, g, b, eps=1e-5):  # each position to mean 0, variance 1, then scale and shift
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred * centred).mean(axis=-1, keepdims=True)
    return g * centred / np.sqrt(variance + eps) + b


def linear(x, w, b):  # [n_seq, in], [in, out], [out] -> [n_seq, out]
    return x @ w + b


def ffn(x, c_fc, c_proj):  # [n_seq, n_embd] -> [n_seq, 4*n_embd] -> [n_seq, n_embd]
    return linear(gelu(linear(x, **c_fc)), **c_proj)


def attention(q, k, v, mask):  # [n_seq, d_head] x 3, [n_seq, n_seq] -> [n_seq, d_head]
    return softmax(q @ k.T / q.shape[-1] ** 0.5 + mask) @ v


def mha(x, c_attn, c_proj, n_head):  # [n_seq, n_embd] -> [n_seq, n_embd]
    q, k, v = np.split(linear(x, **c_attn), 3, axis=-1)
    mask = np.triu(np.full((len(x), len(x)), -1e10, x.dtype), k=1)  # no position sees a later one
    heads = zip(*(np.split(part, n_head, axis=-1) for part in (q, k, v)), strict=True)
    return linear(np.hstack([attention(*head, mask) for head in heads]), **c_proj)


def transformer_block(x, mlp, attn, ln_1, ln_2, n_head):  # [n_seq, n_embd] -> [n_seq, n_embd]
    x = x + mha(layer_norm(x, **ln_1), **attn, n_head=n_head)
    return x + ffn(layer_norm(x, **ln_2), **mlp)


def gpt2(inputs, wte, wpe, blocks, ln_f, n_head):  # [n_seq] token ids -> [n_seq, n_vocab] logits
    x = wte[inputs] + wpe[: len(inputs)]
    for block in blocks:
        x = transformer_block(x, **block, n_head=n_head)
    return layer_norm(x, **ln_f) @ wte.T


def generate(inputs, params, n_head, n_tokens_to_generate):  # token ids -> the new token ids
    inputs = list(inputs)
    for _ in range(n_tokens_to_generate):
        logits = gpt2(inputs, **params, n_head=n_head)
        inputs.append(int(np.argmax(logits[-1])))
    return inputs[len(inputs) - n_tokens_to_generate :]
