"""Does this machine's BLAS give a row the same bits whatever rows stand beside it?

OpenBLAS's AVX-512 kernels do, from two rows on; its AVX2 kernels do not. Nothing documents it, so it is tried:
the model's first layer and LM head, on the same tokens alone and in company.
"""

from dataclasses import dataclass, replace

import numpy as np
from threadpoolctl import threadpool_info

from batchgen.gpt2.config import GPT2Config
from batchgen.gpt2.forward import Forward, Prefill
from batchgen.gpt2.kv_cache import BLOCK, KVArena, Segment
from batchgen.gpt2.params import Array, Params

_COMPANY = (1, 6, 90, 500)  # rows of other sequences in the same pass


@dataclass(frozen=True, slots=True)
class Blas:
    """What multiplies here: library, version, and the processor type that it chose its kernels for."""

    name: str
    version: str
    core_type: str
    threads: int

    @property
    def kernels(self) -> str:
        """What decides how a sum is rounded."""
        return f"{self.name} {self.version} {self.core_type}"

    def __str__(self) -> str:
        return f"{self.kernels}, {self.threads} thread{'s' if self.threads > 1 else ''}"


def blas_info() -> Blas:
    """The BLAS that NumPy uses, as threadpoolctl sees it."""
    for library in threadpool_info():
        if library["user_api"] == "blas":
            core_type = library.get("architecture") or "unknown core type"
            return Blas(library["internal_api"], library["version"] or "?", core_type, library["num_threads"])
    return Blas("unknown BLAS", "?", "unknown core type", 1)


class _Trial:
    """One layer of the model, reading the same tokens under different circumstances."""

    def __init__(self, params: Params, config: GPT2Config) -> None:
        one_layer = Params(
            wte=params["wte"],
            wpe=params["wpe"],
            blocks=params["blocks"][:1],
            ln_f=params["ln_f"],
            lm_head=params["lm_head"],
        )
        self.config = replace(config, n_layer=1)
        n_prompt = min(2 * BLOCK - 30, config.n_ctx - 2)
        rng = np.random.default_rng(0)
        self.tokens: list[int] = rng.integers(0, config.n_vocab, n_prompt + 2).tolist()
        self.others: list[int] = rng.integers(0, config.n_vocab, max(_COMPANY)).tolist()
        self.n_prompt = n_prompt
        self.n_logits = 8
        self.forward = Forward(one_layer, self.config, n_prompt + max(_COMPANY) + 1, 16)
        self.arena = KVArena(self.config, 4 * n_prompt + 2 * max(_COMPANY) + 100)

    def _segment(self, n_tokens: int, start: int = 0, parent: Segment | None = None) -> Segment:
        segment = self.arena.allocate(n_tokens, start, parent)
        assert segment is not None
        return segment

    def logits(self, company: int, share: bool) -> Array:
        """Logits [n_logits + 1, n_vocab] of the prompt's end and of one more token, beside `company` other rows."""
        self.arena.clear()
        prefills = []
        n = min(company, self.config.n_ctx - 2)
        other = self._segment(n + 2) if n else None
        if other:
            prefills.append(Prefill(other, self.others[:n]))
        shared = None
        n_shared = BLOCK if share and self.n_prompt > BLOCK + self.n_logits else 0
        if n_shared:
            shared = self._segment(n_shared)
            prefills.append(Prefill(shared, self.tokens[:n_shared]))
        own = self._segment(self.n_prompt + 2 - n_shared, n_shared, shared)
        prefills.append(Prefill(own, self.tokens[n_shared : self.n_prompt], min(self.n_logits, self.n_prompt)))
        prompt = self.forward(prefills=prefills).copy()
        segments, token = [own], self.tokens[self.n_prompt]
        if shared is not None:
            segments.append(self._segment(2, n_shared, shared))  # a sibling, one token further than the prefix
        if other:
            segments.append(other)
        decoded = self.forward([token] * len(segments), segments)
        return np.vstack([prompt, decoded[:1]])


def is_batch_invariant(params: Params, config: GPT2Config) -> bool:
    """Whether a sequence's logits are bitwise the same alone, in company, and with a shared prefix, on this BLAS."""
    trial = _Trial(params, config)
    alone = trial.logits(0, share=False)
    return all(np.array_equal(alone, trial.logits(n, share)) for n in _COMPANY for share in (False, True))
