"""Random weights for tests and benchmarks."""

import numpy as np

from batchgen.gpt2.config import GPT2Config
from batchgen.gpt2.params import Array


def random_tensors(config: GPT2Config, seed: int = 0) -> dict[str, Array]:
    """Random weights of GPT-2's scale (standard deviation 0.02, norms near 1) and lm_head."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, Array] = {}
    for name, shape in config.tensor_shapes().items():
        noise = rng.standard_normal(shape, dtype=np.float32)
        noise *= np.float32(0.02)
        tensors[name] = noise + np.float32(1) if name.endswith("/g") else noise
    tensors["lm_head"] = np.ascontiguousarray(tensors["wte"].T)
    if not config.tie_word_embeddings:
        tensors["lm_head"] = rng.standard_normal((config.n_embd, config.n_vocab), dtype=np.float32) * np.float32(0.02)
    return tensors
