"""The five numbers that make a GPT-2, and the shape of every tensor that follows from them."""

import reprlib
from dataclasses import asdict, dataclass

from batchgen.errors import ModelError

LAYER_NORM_EPS = 1e-5
# No GPT-2 comes near; they keep a hostile manifest from asking for terabytes.
_LIMIT = 2**24
_MAX_LAYERS = 4096


@dataclass(frozen=True, slots=True)
class GPT2Config:
    """OpenAI's hparams under OpenAI's names; raises ModelError on anything that is not a GPT-2."""

    n_vocab: int
    n_ctx: int
    n_embd: int
    n_head: int
    n_layer: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            limit = _MAX_LAYERS if name == "n_layer" else _LIMIT
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
                shown = reprlib.repr(value)
                raise ModelError(f"config: {name} is {shown}; it must be a whole number from 1 to {limit}")
        if self.n_embd % self.n_head:
            raise ModelError(f"config: n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")

    @property
    def d_head(self) -> int:
        return self.n_embd // self.n_head

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's name (OpenAI's checkpoint, less its `model/`) and shape, linear weights as [in, out]."""
        n_embd = self.n_embd
        block: dict[str, tuple[int, ...]] = {
            "ln_1/g": (n_embd,),
            "ln_1/b": (n_embd,),
            "attn/c_attn/w": (n_embd, 3 * n_embd),
            "attn/c_attn/b": (3 * n_embd,),
            "attn/c_proj/w": (n_embd, n_embd),
            "attn/c_proj/b": (n_embd,),
            "ln_2/g": (n_embd,),
            "ln_2/b": (n_embd,),
            "mlp/c_fc/w": (n_embd, 4 * n_embd),
            "mlp/c_fc/b": (4 * n_embd,),
            "mlp/c_proj/w": (4 * n_embd, n_embd),
            "mlp/c_proj/b": (n_embd,),
        }
        shapes: dict[str, tuple[int, ...]] = {"wte": (self.n_vocab, n_embd), "wpe": (self.n_ctx, n_embd)}
        for layer in range(self.n_layer):
            shapes |= {f"h{layer}/{name}": shape for name, shape in block.items()}
        return shapes | {"ln_f/g": (n_embd,), "ln_f/b": (n_embd,)}
