"""The five numbers that make a GPT-2, what a few fine-tunes have otherwise, and the shape of every tensor."""

import reprlib
from dataclasses import dataclass, fields
from typing import Any

from batchgen.errors import ModelError

LAYER_NORM_EPS = 1e-5
# No GPT-2 comes near; they keep a hostile manifest from asking for terabytes.
_LIMIT = 2**24
_MAX_LAYERS = 4096


@dataclass(frozen=True, slots=True)
class GPT2Config:
    """OpenAI's hparams under OpenAI's names; raises ModelError on anything that is not a GPT-2.

    What follows the five is Hugging Face's, with the values that OpenAI's models have as defaults.
    """

    n_vocab: int
    n_ctx: int
    n_embd: int
    n_head: int
    n_layer: int
    n_inner: int | None = None  # width of the MLP; None is 4*n_embd
    tie_word_embeddings: bool = True  # lm_head is wte.T
    scale_attn_weights: bool = True  # scores are divided by sqrt(d_head)
    scale_attn_by_inverse_layer_idx: bool = False  # and by the layer's number, from 1

    def __post_init__(self) -> None:
        for field in fields(self):
            _check(field.name, getattr(self, field.name))
        if self.n_embd % self.n_head:
            raise ModelError(f"config: n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")

    def as_dict(self) -> dict[str, Any]:
        """The five numbers, and of the rest what is not as in OpenAI's models: what hashes and manifests hold."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if name not in OPTIONS or value != OPTIONS[name]}

    @property
    def d_head(self) -> int:
        return self.n_embd // self.n_head

    @property
    def inner_dim(self) -> int:
        """Width of the MLP."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    def attention_scale(self, layer: int) -> float:
        """What a layer's scores (query times key) are multiplied with: 1/sqrt(d_head) in OpenAI's models."""
        scale = self.d_head**-0.5 if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's name (OpenAI's checkpoint, less its `model/`) and shape, linear weights as [in, out]."""
        n_embd, inner_dim = self.n_embd, self.inner_dim
        block: dict[str, tuple[int, ...]] = {
            "ln_1/g": (n_embd,),
            "ln_1/b": (n_embd,),
            "attn/c_attn/w": (n_embd, 3 * n_embd),
            "attn/c_attn/b": (3 * n_embd,),
            "attn/c_proj/w": (n_embd, n_embd),
            "attn/c_proj/b": (n_embd,),
            "ln_2/g": (n_embd,),
            "ln_2/b": (n_embd,),
            "mlp/c_fc/w": (n_embd, inner_dim),
            "mlp/c_fc/b": (inner_dim,),
            "mlp/c_proj/w": (inner_dim, n_embd),
            "mlp/c_proj/b": (n_embd,),
        }
        shapes: dict[str, tuple[int, ...]] = {"wte": (self.n_vocab, n_embd), "wpe": (self.n_ctx, n_embd)}
        for layer in range(self.n_layer):
            shapes |= {f"h{layer}/{name}": shape for name, shape in block.items()}
        return shapes | {"ln_f/g": (n_embd,), "ln_f/b": (n_embd,)}


OPTIONS = {field.name: field.default for field in fields(GPT2Config)[5:]}


def _check(name: str, value: object) -> None:
    if isinstance(OPTIONS.get(name), bool):
        if not isinstance(value, bool):
            raise ModelError(f"config: {name} is {reprlib.repr(value)}; it must be true or false")
        return
    if name == "n_inner" and value is None:
        return
    limit = _MAX_LAYERS if name == "n_layer" else _LIMIT
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
        raise ModelError(f"config: {name} is {reprlib.repr(value)}; it must be a whole number from 1 to {limit}")
