"""GPT-2 in float64, written from the paper, position by position and head by head; it shares no code with batchgen.

The tests compare the fast forward pass and pico.py with it. It is slow and plain on purpose.
"""

import math

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]


def _norm(vector: Doubles, tensors: dict[str, Doubles], name: str) -> Doubles:
    mean = math.fsum(vector) / len(vector)
    variance = math.fsum((value - mean) ** 2 for value in vector) / len(vector)
    return (vector - mean) / math.sqrt(variance + 1e-5) * tensors[f"{name}/g"] + tensors[f"{name}/b"]


def _affine(vector: Doubles, tensors: dict[str, Doubles], name: str) -> Doubles:
    return np.einsum("i,ij->j", vector, tensors[f"{name}/w"]) + tensors[f"{name}/b"]


def _gelu(value: float) -> float:
    return 0.5 * value * (1 + math.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)))


def _attend(query: Doubles, keys: list[Doubles], values: list[Doubles]) -> Doubles:
    weights = [math.exp(float(np.dot(query, key)) / math.sqrt(len(query))) for key in keys]
    total = math.fsum(weights)
    return sum((weight / total * value for weight, value in zip(weights, values, strict=True)), np.zeros(len(query)))


def logits(token_ids: list[int], float32_tensors: dict[str, npt.NDArray[np.float32]], n_head: int) -> Doubles:
    """[n_seq] token ids -> [n_seq, n_vocab] logits, in float64 from float32 tensors under OpenAI's names."""
    tensors = {name: tensor.astype(np.float64) for name, tensor in float32_tensors.items()}
    n_layer = 1 + max(int(name[1:].split("/")[0]) for name in tensors if name[0] == "h")
    n_embd = tensors["wte"].shape[1]
    d_head = n_embd // n_head
    stream = [tensors["wte"][token] + tensors["wpe"][position] for position, token in enumerate(token_ids)]
    for layer in range(n_layer):
        name = f"h{layer}"
        keys: list[list[Doubles]] = [[] for _ in range(n_head)]
        values: list[list[Doubles]] = [[] for _ in range(n_head)]
        for position, x in enumerate(stream):
            qkv = _affine(_norm(x, tensors, f"{name}/ln_1"), tensors, f"{name}/attn/c_attn")
            heads = []
            for head in range(n_head):
                part = slice(head * d_head, (head + 1) * d_head)
                keys[head].append(qkv[n_embd : 2 * n_embd][part])
                values[head].append(qkv[2 * n_embd :][part])
                heads.append(_attend(qkv[:n_embd][part], keys[head], values[head]))
            x = x + _affine(np.concatenate(heads), tensors, f"{name}/attn/c_proj")
            hidden = _affine(_norm(x, tensors, f"{name}/ln_2"), tensors, f"{name}/mlp/c_fc")
            hidden = np.array([_gelu(value) for value in hidden])
            stream[position] = x + _affine(hidden, tensors, f"{name}/mlp/c_proj")
    return np.array([tensors["wte"] @ _norm(x, tensors, "ln_f") for x in stream])
