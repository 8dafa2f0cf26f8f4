"""Files: replaced durably, hashed, locked; strict JSON; and the names of what a run keeps beside its output."""

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

SUCCESS = "_SUCCESS"  # in a dataset's folder: it is complete; readers of Parquet skip names that begin with _
WORK_SUFFIX = ".batchgen"  # of a run's work directory; see output/ledger.py
STATUS_SUFFIX = ".status.json"  # of a run's status file; see progress.py
PLAN_SUFFIX = ".plan.json"  # of the plan of JSON lines; see output/beside.py
PART = re.compile(r"(\d{8,})-([0-9a-f]{16})\.parquet")  # the chunk's number and the start of the part's SHA-256


# ---- replacing


def temporary_path(path: Path) -> Path:
    """The temporary file of `path`: always the same name, so that the next writer removes what a killed one left."""
    return path.with_name(f".{path.name}.batchgen-tmp")


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Yield a file that takes the name `path` when the block ends well; on an exception `path` stays as it was.

    At every instant `path` is absent, its previous version, or the complete new file. With durable, the new file and
    its name have reached the disk when the block ends. Writers of one path must exclude each other.
    """
    temporary = temporary_path(path)
    temporary.unlink(missing_ok=True)
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_path(path.parent)


def replace_file(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write `data` to `path`, which is replaced at once; see `replacing`."""
    with replacing(path, durable=durable) as file:
        file.write(data)


def sync_path(path: Path) -> None:
    """fsync a file or a directory; a rename is on disk once its directory is synced."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- hashing, locking


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lock(descriptor: int, *, wait: bool = False) -> bool:
    """Lock an open file or directory (flock) until it is closed; False if another holds it and wait is False."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


# ---- JSON


def parse_json(data: str | bytes) -> Any:
    """One JSON value. ValueError on NaN, Infinity and a key that appears twice, RecursionError on deep nesting."""
    return json.loads(data, object_pairs_hook=unique_keys, parse_constant=_refuse_constant)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """[("id", 1), ("prompt", "a")] -> {"id": 1, "prompt": "a"}; ValueError if a key appears twice."""
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:40]!r} appears twice")
    return values


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")
