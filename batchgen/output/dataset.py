"""A dataset: a folder of Parquet parts in the order of their names, complete when _SUCCESS is there."""

import json
from pathlib import Path
from typing import Any

from batchgen.files import SUCCESS


def dataset_plan(out: Path) -> dict[str, Any] | None:
    """The plan that made a complete dataset, or None where there is no such thing."""
    try:
        plan = json.loads((out / SUCCESS).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return plan if isinstance(plan, dict) else None


def may_become_dataset(out: Path) -> bool:
    """Whether nothing is lost if a dataset takes this place: nothing, an empty folder, or a dataset."""
    return not out.exists() or (out.is_dir() and (dataset_plan(out) is not None or not any(out.iterdir())))
