"""GPT-2 and its greedy loop in full, without a cache: read this first.

Names, arguments and results are those of picoGPT's gpt2_pico.py. n_seq is the number of tokens, n_embd the width of a
token's vector, d_head = n_embd / n_head the width of an attention head; params.py lists the parameters. forward.py
computes the same logits several hundred times faster, and tests/test_pico.py compares the two.
"""

import numpy as np


def gelu(x):  # any shape -> the same shape; approximates x * P(X <= x) for a standard normal X
    return 0.5 * x * (1 + np.tanh(0.7978845608 * (x + 0.044715 * x**3)))  # sqrt(2/pi) = 0.7978845608


def softmax(x):  # any shape -> the same shape; the last axis sums to 1
    e = np.exp(x - x.max(axis=-1, keepdims=True))  # subtracting the maximum changes nothing but keeps exp from overflow
    return e / e.sum(axis=-1, keepdims=True)


def layer_norm(x, g, b, eps=1e-5):  # [n_seq, n_embd] -> [n_seq, n_embd]: rows to mean 0 and variance 1, then * g + b
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred * centred).mean(axis=-1, keepdims=True)  # [n_seq, 1]
    return g * centred / np.sqrt(variance + eps) + b


def linear(x, w, b):  # [n_seq, n_in] @ [n_in, n_out] + [n_out] -> [n_seq, n_out]
    return x @ w + b


def ffn(x, c_fc, c_proj):  # [n_seq, n_embd] -> [n_seq, 4*n_embd] -> [n_seq, n_embd]
    return linear(gelu(linear(x, **c_fc)), **c_proj)


def attention(q, k, v, mask):  # one head: 3 x [n_seq, d_head], [n_seq, n_seq] -> [n_seq, d_head]
    scores = q @ k.T / q.shape[-1] ** 0.5 + mask  # [n_seq, d_head] @ [d_head, n_seq] -> [n_seq, n_seq]
    return softmax(scores) @ v  # [n_seq, n_seq] @ [n_seq, d_head] -> [n_seq, d_head]


def mha(x, c_attn, c_proj, n_head):  # [n_seq, n_embd] -> [n_seq, n_embd]
    q, k, v = np.split(linear(x, **c_attn), 3, axis=-1)  # [n_seq, 3*n_embd] -> 3 x [n_seq, n_embd]
    mask = np.triu(np.full((len(x), len(x)), -1e10, x.dtype), k=1)  # [n_seq, n_seq]: no token attends to a later one
    heads = zip(*(np.split(part, n_head, axis=-1) for part in (q, k, v)), strict=True)  # n_head x 3 x [n_seq, d_head]
    return linear(np.hstack([attention(*head, mask) for head in heads]), **c_proj)


def transformer_block(x, mlp, attn, ln_1, ln_2, n_head):  # [n_seq, n_embd] -> [n_seq, n_embd]
    x = x + mha(layer_norm(x, **ln_1), **attn, n_head=n_head)
    return x + ffn(layer_norm(x, **ln_2), **mlp)


def gpt2(inputs, wte, wpe, blocks, ln_f, n_head):  # [n_seq] token ids -> [n_seq, n_vocab] logits
    x = wte[inputs] + wpe[: len(inputs)]  # [n_seq, n_embd]: token embedding + position embedding
    for block in blocks:
        x = transformer_block(x, **block, n_head=n_head)
    return layer_norm(x, **ln_f) @ wte.T  # [n_seq, n_embd] @ [n_embd, n_vocab]: row i scores the token after token i


def generate(inputs, params, n_head, n_tokens_to_generate):  # token ids -> the new token ids
    inputs = list(inputs)
    for _ in range(n_tokens_to_generate):
        logits = gpt2(inputs, **params, n_head=n_head)
        inputs.append(int(np.argmax(logits[-1])))  # greedy: the most likely next token
    return inputs[len(inputs) - n_tokens_to_generate :]
