"""Plans for tests that need one and do not look at most of it."""

from importlib.metadata import version
from typing import Any

from batchgen import __version__
from batchgen.models.model import Model
from batchgen.plan import Plan
from batchgen.types import SamplingParams


def plan_of(**changes: Any) -> Plan:
    """A whole plan, with these fields changed."""
    values: dict[str, Any] = {
        "batchgen": "1.0",
        "input": "abc",
        "input_formats": ("jsonl",),
        "rows": 12,
        "prompt_column": "prompt",
        "id_column": "id",
        "keep": (),
        "row_params": True,
        "model": "bytes",
        "model_hash": "0123",
        "parameters": SamplingParams(stop_token_ids=(1, 2)),
        "on_too_long": "reject",
        "empty_prompt": "reject",
        "trim": False,
        "format": "parquet",
        "token_ids": False,
        "chunk_rows": 4,
        "batch_size": 8,
        "kv_bytes": 2**20,
        "share_prefixes": True,
    }
    return Plan(**values | changes)


def plan_for(model: Model, parameters: SamplingParams | None = None, **changes: Any) -> Plan:
    """A plan that workers of this machine can run."""
    here = {"batchgen": __version__, "regex": version("regex"), "portable": True}
    sizes = {"rows": 0, "chunk_rows": 2, "batch_size": 8, "kv_bytes": 2**26, "share_prefixes": False}
    own = {"model": model.name, "model_hash": model.hash, "parameters": parameters or SamplingParams()}
    return plan_of(**here | sizes | own | changes)
