"""How kernels are compiled: by Numba, to the letter (no sum in another order, no fused multiply-add unless written)."""

import pickle
from collections.abc import Callable
from typing import Any

import numba
from numba.core.caching import NullCache
from numba.core.compiler import CompileResult
from numba.core.runtime.nrt import rtsys
from numba.core.serialize import dumps

from batchgen.errors import SetupError
from batchgen.gpt2.machine_code import CACHE, code_name

_OPTIONS: Any = {"nogil": True, "boundscheck": False, "error_model": "numpy"}


class _Kept(NullCache):
    """Numba asks it for a kernel's code before compiling, and gives it the code afterwards."""

    def __init__(self, name: str, code: bytes | None) -> None:
        self.name, self.code = name, code

    def load_overload(self, signature: object, target_context: object) -> object:
        if self.code is None:
            return None
        rtsys.initialize(target_context)  # what code needs to run; Numba's own cache also loads what compiling needs
        return CompileResult._rebuild(target_context, *pickle.loads(self.code))  # type: ignore[no-untyped-call]

    def save_overload(self, signature: object, result: CompileResult) -> None:
        CACHE.write(self.name, dumps(result._reduce()))  # type: ignore[no-untyped-call]


def kernel(*signatures: str) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function for these signatures, or load its code from disk; its constants are those of its module."""

    def declare(function: Callable[..., Any]) -> Any:
        assert function.__closure__ is None, "two closures of one function would share a file of code"
        if getattr(numba.config, "DISABLE_JIT", 0):  # by the environment, a file .numba_config.yaml, or a program
            raise SetupError("DISABLE_JIT is set, and Numba then compiles nothing; unset it")
        dispatcher = numba.njit(**_OPTIONS)(function)
        for signature in signatures:
            name = code_name(function.__module__, function.__qualname__, signature)
            with CACHE.code(name) as code:
                dispatcher._cache = _Kept(name, code)
                dispatcher.compile(signature)
        dispatcher.disable_compile()
        return dispatcher

    return declare


def inline(function: Callable[..., Any]) -> Any:
    """A part of kernels, compiled into each of them."""
    return numba.njit(inline="always", **_OPTIONS)(function)
