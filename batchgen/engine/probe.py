"""Does this machine's BLAS compute the same bits for a row in every batch?

OpenBLAS's AVX-512 kernels do for two or more rows; its AVX2 kernels do not. No documentation says so, hence a trial:
the model's first layer and LM head read the same tokens alone and in batches.
"""

import os
import threading
from dataclasses import dataclass, replace

import numpy as np
from numpy.lib.introspect import opt_func_info
from threadpoolctl import threadpool_info, threadpool_limits

from batchgen.gpt2.config import GPT2Config
from batchgen.gpt2.forward import Forward, Prefill
from batchgen.gpt2.kv_cache import BLOCK, KVArena, Segment
from batchgen.gpt2.params import Array, Params

_OTHER_ROWS = (1, 6, 90, 500)  # rows of another sequence in the same pass
_ROUNDED = ("add", "exp", "log", "tanh")  # of NumPy, in the forward pass and the sampler
_N_LOGITS = 8  # rows of the prompt whose logits are compared


@dataclass(frozen=True, slots=True)
class Blas:
    """The BLAS that NumPy uses."""

    name: str
    version: str
    core_type: str  # the processor type of its kernels
    threads: int

    @property
    def kernels(self) -> str:
        """All that decides how a sum is rounded."""
        return f"{self.name} {self.version} {self.core_type}"

    def __str__(self) -> str:
        return f"{self.kernels}, {self.threads} thread{'s' if self.threads > 1 else ''}"


def blas_info() -> Blas:
    """The BLAS that NumPy uses, according to threadpoolctl."""
    for library in threadpool_info():
        if library["user_api"] == "blas":
            core_type = library.get("architecture") or "unknown core type"
            return Blas(library["internal_api"], library["version"] or "?", core_type, library["num_threads"])
    return Blas("unknown BLAS", "?", "unknown core type", 1)


def numpy_kernels() -> str:
    """The instruction sets with which NumPy computes what they round differently: add X86_V3, exp X86_V4, ..."""
    functions = opt_func_info(func_name=f"^({'|'.join(_ROUNDED)})$", signature="float32|float64")
    found = {f"{name} {kernel['current']}" for name, kernels in functions.items() for kernel in kernels.values()}
    return ", ".join(sorted(found))


class OneBlasThread:
    """While any thread of the process is in it, BLAS has one thread: with two, bits differ. The last restores it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._limits = threadpool_limits(1, user_api="blas")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._limits.restore_original_limits()

    def renew_lock(self) -> None:
        """In a forked process: the thread that held the lock does not exist there."""
        self._lock = threading.Lock()


one_blas_thread = OneBlasThread()
os.register_at_fork(after_in_child=one_blas_thread.renew_lock)


class _Trial:
    """One layer of the model, which reads the same tokens in different batches."""

    def __init__(self, params: Params, config: GPT2Config) -> None:
        one_layer = params | {"blocks": params["blocks"][:1]}
        self.config = replace(config, n_layer=1)
        self.n_prompt = min(2 * BLOCK - 30, config.n_ctx - 2)
        rng = np.random.default_rng(0)
        self.tokens: list[int] = rng.integers(0, config.n_vocab, self.n_prompt + 2).tolist()
        self.others: list[int] = rng.integers(0, config.n_vocab, max(_OTHER_ROWS)).tolist()
        self.forward = Forward(one_layer, self.config, self.n_prompt + max(_OTHER_ROWS) + 1, 2 * _N_LOGITS)
        self.arena = KVArena(self.config, 4 * self.n_prompt + 2 * max(_OTHER_ROWS) + 100)

    def _allocate(self, n_tokens: int, start: int = 0, parent: Segment | None = None) -> Segment:
        segment = self.arena.allocate(n_tokens, start, parent)
        assert segment is not None
        return segment

    def logits(self, n_other: int, *, share: bool) -> Array:
        """Logits [_N_LOGITS + 1, n_vocab] of the prompt's end and of one more token, with n_other other rows."""
        self.arena.clear()
        prefills = []
        n = min(n_other, self.config.n_ctx - 2)
        other = self._allocate(n + 2) if n else None
        if other:
            prefills.append(Prefill(other, self.others[:n]))
        shared = None
        n_shared = BLOCK if share and self.n_prompt > BLOCK + _N_LOGITS else 0
        if n_shared:
            shared = self._allocate(n_shared)
            prefills.append(Prefill(shared, self.tokens[:n_shared]))
        own = self._allocate(self.n_prompt + 2 - n_shared, n_shared, shared)
        prefills.append(Prefill(own, self.tokens[n_shared : self.n_prompt], min(_N_LOGITS, self.n_prompt)))
        prompt = self.forward(prefills=prefills).copy()
        segments, token = [own], self.tokens[self.n_prompt]
        if shared is not None:
            segments.append(self._allocate(2, n_shared, shared))  # a second sequence that uses the shared segment
        if other:
            segments.append(other)
        decoded = self.forward([token] * len(segments), segments)
        return np.vstack([prompt, decoded[:1]])


def is_batch_invariant(params: Params, config: GPT2Config) -> bool:
    """Whether a sequence's logits have the same bits alone, in a batch, and with a shared prefix, on this BLAS."""
    trial = _Trial(params, config)
    alone = trial.logits(0, share=False)
    return all(np.array_equal(alone, trial.logits(n, share=share)) for n in _OTHER_ROWS for share in (False, True))
