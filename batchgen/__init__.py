"""Offline batch completions with GPT-2 in NumPy."""

from typing import TYPE_CHECKING

__version__ = "0.3.0"  # another one whenever a row, or how an input is cut into chunks, may differ

if TYPE_CHECKING:
    from batchgen.errors import BatchgenError, BusyError, InputError, ModelError, OutputError, StoppedError, UsageError
    from batchgen.generator import Generator
    from batchgen.job import (
        EmbedOptions,
        InputOptions,
        Job,
        OutputOptions,
        Policy,
        ScoreInput,
        ScoreOptions,
        WorkOptions,
    )
    from batchgen.progress import Progress, Summary
    from batchgen.run import run_job
    from batchgen.types import OutputRow, SamplingParams, ScoreRow

__all__ = [
    "BatchgenError",
    "BusyError",
    "EmbedOptions",
    "Generator",
    "InputError",
    "InputOptions",
    "Job",
    "ModelError",
    "OutputError",
    "OutputOptions",
    "OutputRow",
    "Policy",
    "Progress",
    "SamplingParams",
    "ScoreInput",
    "ScoreOptions",
    "ScoreRow",
    "StoppedError",
    "Summary",
    "UsageError",
    "WorkOptions",
    "__version__",
    "run_job",
]

_NAMES = {
    "batchgen.errors": "BatchgenError BusyError InputError ModelError OutputError StoppedError UsageError",
    "batchgen.generator": "Generator",
    "batchgen.job": "EmbedOptions InputOptions Job OutputOptions Policy ScoreInput ScoreOptions WorkOptions",
    "batchgen.progress": "Progress Summary",
    "batchgen.run": "run_job",
    "batchgen.types": "OutputRow SamplingParams ScoreRow",
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names.split()}


def __getattr__(name: str) -> object:
    """Import a name when it is first used: a worker needs few of them."""
    if name not in _MODULES:
        raise AttributeError(f"module 'batchgen' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_MODULES[name]), name)
