"""Offline batch completions with GPT-2 in NumPy."""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from batchgen.generator import Generator
    from batchgen.job import InputOptions, Job, OutputOptions, Policy, WorkOptions
    from batchgen.progress import Summary
    from batchgen.run import run_job
    from batchgen.types import SamplingParams

__all__ = [
    "Generator",
    "InputOptions",
    "Job",
    "OutputOptions",
    "Policy",
    "SamplingParams",
    "Summary",
    "WorkOptions",
    "__version__",
    "run_job",
]

_MODULES = {
    "Generator": "batchgen.generator",
    "InputOptions": "batchgen.job",
    "Job": "batchgen.job",
    "OutputOptions": "batchgen.job",
    "Policy": "batchgen.job",
    "SamplingParams": "batchgen.types",
    "Summary": "batchgen.progress",
    "WorkOptions": "batchgen.job",
    "run_job": "batchgen.run",
}


def __getattr__(name: str) -> object:
    """Import a name when it is first used: a worker needs few of them."""
    if name not in _MODULES:
        raise AttributeError(f"module 'batchgen' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_MODULES[name]), name)
