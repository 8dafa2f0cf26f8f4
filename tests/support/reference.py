"""GPT-2 in float64, written from the paper, position by position and head by head; it shares no code with batchgen.

The tests compare the fast forward pass and pico.py with it. It is slow and plain on purpose.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Options:
    """What Hugging Face's config.json can change; the defaults are OpenAI's. Each activation is the paper's formula."""

    activation: str = "gelu_new"
    eps: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False


ACTIVATIONS: dict[str, Callable[[float], float]] = {
    "gelu_new": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu": lambda x: x * 0.5 * math.erfc(-x / math.sqrt(2)),
    "quick_gelu": lambda x: x * _sigmoid(1.702 * x),
    "silu": lambda x: x * _sigmoid(x),
    "relu": lambda x: max(x, 0.0),
    "relu2": lambda x: max(x, 0.0) ** 2,
    "tanh": math.tanh,
}


OPENAI = Options()


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def _norm(vector: Doubles, tensors: dict[str, Doubles], name: str, eps: float) -> Doubles:
    mean = math.fsum(vector) / len(vector)
    variance = math.fsum((value - mean) ** 2 for value in vector) / len(vector)
    return (vector - mean) / math.sqrt(variance + eps) * tensors[f"{name}/g"] + tensors.get(f"{name}/b", 0.0)


def _affine(vector: Doubles, tensors: dict[str, Doubles], name: str) -> Doubles:
    return np.einsum("i,ij->j", vector, tensors[f"{name}/w"]) + tensors.get(f"{name}/b", 0.0)


def _attend(query: Doubles, keys: list[Doubles], values: list[Doubles], scale: float) -> Doubles:
    weights = [math.exp(float(np.dot(query, key)) * scale) for key in keys]
    total = math.fsum(weights)
    return sum((weight / total * value for weight, value in zip(weights, values, strict=True)), np.zeros(len(query)))


def hidden_states(
    token_ids: Sequence[int],
    float32_tensors: dict[str, npt.NDArray[np.float32]],
    n_head: int,
    options: Options = OPENAI,
) -> list[Doubles]:
    """[n_seq] token ids -> transformers' hidden_states, [n_seq, n_embd] each, in float64.

    n_layer + 1 of them: before each block, and after ln_f. The tensors have OpenAI's names.
    """
    tensors = {name: tensor.astype(np.float64) for name, tensor in float32_tensors.items()}
    n_layer = 1 + max(int(name[1:].split("/")[0]) for name in tensors if name[0] == "h")
    n_embd = tensors["wte"].shape[1]
    d_head = n_embd // n_head
    activate = ACTIVATIONS[options.activation]
    stream = [tensors["wte"][token] + tensors["wpe"][position] for position, token in enumerate(token_ids)]
    states = []
    for layer in range(n_layer):
        states.append(np.array(stream))
        name = f"h{layer}"
        scale = 1 / math.sqrt(d_head) if options.scale_attn_weights else 1.0
        scale /= layer + 1 if options.scale_attn_by_inverse_layer_idx else 1
        keys: list[list[Doubles]] = [[] for _ in range(n_head)]
        values: list[list[Doubles]] = [[] for _ in range(n_head)]
        for position, x in enumerate(stream):
            qkv = _affine(_norm(x, tensors, f"{name}/ln_1", options.eps), tensors, f"{name}/attn/c_attn")
            heads = []
            for head in range(n_head):
                part = slice(head * d_head, (head + 1) * d_head)
                keys[head].append(qkv[n_embd : 2 * n_embd][part])
                values[head].append(qkv[2 * n_embd :][part])
                heads.append(_attend(qkv[:n_embd][part], keys[head], values[head], scale))
            x = x + _affine(np.concatenate(heads), tensors, f"{name}/attn/c_proj")
            hidden = _affine(_norm(x, tensors, f"{name}/ln_2", options.eps), tensors, f"{name}/mlp/c_fc")
            hidden = np.array([activate(value) for value in hidden])
            stream[position] = x + _affine(hidden, tensors, f"{name}/mlp/c_proj")
    return [*states, np.array([_norm(x, tensors, "ln_f", options.eps) for x in stream])]


def logits(
    token_ids: Sequence[int],
    float32_tensors: dict[str, npt.NDArray[np.float32]],
    n_head: int,
    options: Options = OPENAI,
) -> Doubles:
    """[n_seq] token ids -> [n_seq, n_vocab] logits; a tensor lm_head [n_embd, n_vocab] makes them, else wte does."""
    last = hidden_states(token_ids, float32_tensors, n_head, options)[-1]
    head_weights = float32_tensors.get("lm_head", float32_tensors["wte"].T)
    return last @ head_weights.astype(np.float64)
