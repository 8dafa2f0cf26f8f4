"""A dataset: a folder of Parquet parts in the order of their names, complete when _SUCCESS is there.

And what a run keeps beside its output, whatever that is.
"""

import json
import re
from pathlib import Path
from typing import Any

SUCCESS = "_SUCCESS"  # readers of Parquet skip names that begin so; it holds the plan that made the parts
WORK_SUFFIX = ".batchgen"  # of the directories that a run keeps there; see ledger.py
STATUS_SUFFIX = ".status.json"  # of the file that says how far it is; see status.py
PART = re.compile(r"(\d{8,})-([0-9a-f]{16})\.parquet")  # number of the chunk, and start of the part's SHA-256


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
