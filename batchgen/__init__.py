"""Offline batch completions with GPT-2 in NumPy."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from batchgen.generator import Generator
    from batchgen.run import Job, Summary, run_job
    from batchgen.types import SamplingParams

__all__ = ["Generator", "Job", "SamplingParams", "Summary", "__version__", "run_job"]

_HOMES = {
    "Generator": "batchgen.generator",
    "Job": "batchgen.run",
    "SamplingParams": "batchgen.types",
    "Summary": "batchgen.run",
    "run_job": "batchgen.run",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for only then: a worker needs little of it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'batchgen' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
