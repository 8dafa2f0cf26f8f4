"""What makes a change to the file system outlast a power cut."""

import os
from pathlib import Path


def sync_path(path: Path) -> None:
    """fsync a file or a directory; a rename is on disk once its directory is synced."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
