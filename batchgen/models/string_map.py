"""Small JSON files of {key: string} beside the models: hashes of fetched files, days of verification."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from batchgen.errors import ModelError
from batchgen.files import locked, replace_file
from batchgen.models.shards import read_json

_LIMIT = 2**22


def read_string_map(path: Path) -> dict[str, str]:
    """Read the whole file; {} if it does not exist. Raises ModelError if it holds anything else."""
    if not os.path.lexists(path):
        return {}
    values = read_json(path, _LIMIT)
    if not all(isinstance(value, str) for value in values.values()):
        raise ModelError(f"{path}: expected an object of strings; repair or remove it")
    return values


def update_string_map(path: Path, values: Mapping[str, str]) -> None:
    """Add or change entries and keep those of other processes, with the folder locked."""
    try:
        with locked(path.parent):
            text = json.dumps(read_string_map(path) | dict(values), indent=1, sort_keys=True) + "\n"
            replace_file(path, text.encode())
    except OSError as error:
        raise ModelError(f"{path}: cannot be written ({error.strerror or error})") from error
