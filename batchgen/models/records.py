"""Small JSON files of {name: text} beside the models, such as the hashes of what was fetched."""

import fcntl
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from batchgen.errors import ModelError
from batchgen.models.shards import read_json, short

_LIMIT = 2**22


class Records:
    """One such file; it is read whole and replaced whole, by one process at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, str]:
        """All of it; empty where there is no file. Raises ModelError where it is not such a file."""
        if not os.path.lexists(self.path):
            return {}
        values = read_json(self.path, _LIMIT)
        if not isinstance(values, dict) or not all(isinstance(value, str) for value in values.values()):
            raise ModelError(f"{self.path}: expected an object of strings, found {short(values)}; mend or remove it")
        return values

    def update(self, values: Mapping[str, str]) -> None:
        """Add or change some, keeping what other processes have written meanwhile."""
        folder = os.open(self.path.parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            text = json.dumps(self.read() | dict(values), indent=1, sort_keys=True) + "\n"
            descriptor, temporary = tempfile.mkstemp(prefix=f".{self.path.name}-", dir=self.path.parent)
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
        except OSError as error:
            raise ModelError(f"{self.path}: cannot be written ({error.strerror or error})") from error
        finally:
            os.close(folder)
