"""The place of an output: refused before any work if it cannot be written or must not be replaced."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from batchgen.errors import OutputError
from batchgen.files import temporary_path

SUFFIXES = (".parquet", ".jsonl")


def is_json_lines(path: Path) -> bool:
    return path.suffix.lower() == ".jsonl"


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn an OSError into an OutputError that names the output."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"{path}: cannot be written: {reason}; make room or choose another path") from error


def refuse_link(path: Path) -> None:
    """Raise OutputError for a symbolic link, and OSError for a name that is too long."""
    with suppress(FileNotFoundError, NotADirectoryError):
        temporary_path(path).lstat()  # the longest of the names; is_symlink and the like would answer False
    if path.is_symlink():
        raise OutputError(f"{path}: a symbolic link, which would be replaced; name the file it points to")


def refuse_input(path: Path, inputs: Sequence[Path]) -> None:
    """Raise OutputError if the output's path is one of the inputs."""
    for source in inputs:
        if path.exists() and source.exists() and path.samefile(source):
            raise OutputError(f"{path}: this is the input {source}; choose another name for the output")


def check_folder(path: Path, inputs: Sequence[Path]) -> None:
    """Raise OutputError if the output's folder is read as input, is missing, or takes no files.

    inputs are files, and directories whose files are all read. The check for permission creates a file: permission
    bits say nothing for root and on a read-only mount.
    """
    for source in inputs:
        if source.is_dir() and path.parent.resolve().is_relative_to(source.resolve()):
            raise OutputError(f"{path}: it would be in the input {source} and be read with it; choose another folder")
    folder = path.parent
    if not folder.is_dir():
        what = "not a folder" if folder.exists() else "no such folder"
        raise OutputError(f"{path}: {folder} is {what}; create it (mkdir -p) or choose another")
    try:
        tempfile.TemporaryFile(dir=folder).close()  # noqa: SIM115  # made and gone
    except OSError as error:
        raise OutputError(f"{path}: the folder cannot be written: {error.strerror}; choose another") from error
