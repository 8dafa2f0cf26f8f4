"""The configuration of a GPT-2: OpenAI's five numbers, Hugging Face's options, and the shape of every tensor."""

import reprlib
from dataclasses import asdict, dataclass, fields
from typing import Any

from batchgen.errors import ModelError
from batchgen.gpt2.activations import ACTIVATIONS

# Limits far beyond every GPT-2: they keep a hostile manifest from allocating terabytes.
_MAX_SIZE = 2**24
_MAX_LAYERS = 4096
_SMALLEST_EPSILON = 1e-37  # float32 has no smaller number with all its digits


def _check_field(name: str, value: object) -> None:
    limit = _MAX_LAYERS if name == "n_layer" else _MAX_SIZE
    if isinstance(OPTIONS.get(name), bool):
        is_well, rule = isinstance(value, bool), "it must be true or false"
    elif name == "activation_function":
        is_well, rule = value in ACTIVATIONS, f"batchgen computes {', '.join(ACTIVATIONS)}"
    elif name == "layer_norm_epsilon":
        is_well = type(value) in (int, float) and _SMALLEST_EPSILON <= value <= 1  # type: ignore[operator]
        rule = f"it must be a number from {_SMALLEST_EPSILON} to 1, in float32"
    else:
        is_well = (type(value) is int and 1 <= value <= limit) or (name == "n_inner" and value is None)
        rule = f"it must be a whole number from 1 to {limit}"
    if not is_well:
        raise ModelError(f"config: {name} is {reprlib.repr(value)}; {rule}")


@dataclass(frozen=True, slots=True)
class GPT2Config:
    """OpenAI's five hparams, then Hugging Face's options, whose defaults are the values of OpenAI's models."""

    n_vocab: int
    n_ctx: int
    n_embd: int
    n_head: int
    n_layer: int
    n_inner: int | None = None  # width of the MLP; None means 4*n_embd
    tie_word_embeddings: bool = True  # lm_head is wte.T
    scale_attn_weights: bool = True  # divide scores by sqrt(d_head)
    scale_attn_by_inverse_layer_idx: bool = False  # and by the layer's number, which starts at 1
    activation_function: str = "gelu_new"  # of the MLP
    layer_norm_epsilon: float = 1e-5

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_field(field.name, getattr(self, field.name))
        if self.n_embd % self.n_head:
            raise ModelError(f"config: n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")

    def as_dict(self) -> dict[str, Any]:
        """The five numbers and every option that is not at its default, for hashes and manifests."""
        return {name: value for name, value in asdict(self).items() if name not in OPTIONS or value != OPTIONS[name]}

    @property
    def d_head(self) -> int:
        return self.n_embd // self.n_head

    @property
    def inner_dim(self) -> int:
        """Width of the MLP."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    def attention_scale(self, layer: int) -> float:
        """The factor of a layer's scores (query times key): 1/sqrt(d_head) in OpenAI's models; layer starts at 0."""
        scale = self.d_head**-0.5 if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor, as in OpenAI's checkpoint without `model/`; linear weights are [in, out]."""
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


OPTIONS = {field.name: field.default for field in fields(GPT2Config)[5:]}  # Hugging Face's, with their defaults
