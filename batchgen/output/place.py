"""The place of an output: refused before any work if it cannot be written or must not be replaced."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from batchgen.errors import OutputError
from batchgen.files import PLAN_SUFFIX, STATUS_SUFFIX, WORK_SUFFIX, temporary_path
from batchgen.limits import reached_limit
from batchgen.options import say

# Not another path: the next run would begin anew there.
KEPT = "make room or correct that, and run the same command again: finished chunks are kept"
SUFFIXES = (".parquet", ".jsonl")


def is_json_lines(path: Path) -> bool:
    return path.suffix.lower() == ".jsonl"


@contextmanager
def output_errors(path: Path, remedy: str = "make room or choose another path") -> Iterator[None]:
    """Turn an OSError into an OutputError that names the output."""
    try:
        yield
    except OSError as error:
        if reached_limit(error):
            raise
        reason = error.strerror or str(error)
        raise OutputError(f"{path}: cannot be written: {reason}; {remedy}") from error


def _check_length(path: Path) -> None:
    """Raise OSError for a name that is too long, of the longest file beside the output."""
    with suppress(FileNotFoundError, NotADirectoryError):
        temporary_path(path.with_name(path.name + STATUS_SUFFIX)).lstat()  # exists() and the like would answer False


def refuse_link(path: Path) -> None:
    """Raise OutputError for a symbolic link, and OSError for a name that is too long."""
    _check_length(path)
    if path.is_symlink():
        raise OutputError(f"{path}: a symbolic link, which would be replaced; name the file it points to")


def refuse_input(path: Path, inputs: Sequence[Path]) -> None:
    """Raise OutputError if the output's path is one of the inputs."""
    for source in inputs:
        if path.exists() and source.exists() and path.samefile(source):
            raise OutputError(f"{path}: this is the input {source}; choose another name for the output")


def _refuse_beside(path: Path, inputs: Sequence[Path]) -> None:
    """Raise OutputError if a run would write over an input beside the output, or is to write where runs work."""
    place, remedy = path.absolute().parent.resolve() / path.name, "choose another name for the output"
    written = [place.with_name(place.name + suffix) for suffix in (STATUS_SUFFIX, PLAN_SUFFIX, WORK_SUFFIX)]
    for source in inputs:
        if {source.resolve(), *source.resolve().parents} & {*written}:
            raise OutputError(f"{path}: the run would write over the input {source} or remove it; {remedy}")
    for folder in (place, *place.parents):
        if folder.name.endswith(WORK_SUFFIX) and (folder == place or (folder / "lock").exists()):
            raise OutputError(f"{path}: {folder} is the place of a run's work, which is removed at its end; {remedy}")


def check_folder(path: Path, inputs: Sequence[Path]) -> None:
    """Raise OutputError if the output's folder is read as input, is missing, or takes no files."""
    with output_errors(path):
        _check_length(path)
        _refuse_beside(path, inputs)
    for source in inputs:
        if source.is_dir() and path.parent.resolve().is_relative_to(source.resolve()):
            raise OutputError(f"{path}: it would be in the input {source} and be read with it; choose another folder")
    folder = path.parent
    if not folder.is_dir():
        what = "not a folder" if folder.exists() else "no such folder"
        raise OutputError(f"{path}: {folder} is {what}; create it (mkdir -p) or choose another")
    try:  # permission bits say nothing for root and on a read-only mount
        tempfile.TemporaryFile(dir=folder).close()  # noqa: SIM115  # made and gone
    except OSError as error:
        raise OutputError(f"{path}: the folder cannot be written: {error.strerror}; choose another") from error


def refuse_in_the_way(option: str, path: Path, out: Path, inputs: Sequence[Path]) -> None:
    """Raise OutputError for a file that is the run's own or its input, or in a folder of these, or that is no file."""
    if path.exists() and not path.is_file():
        raise OutputError(f"{say(option)} {path}: not a file; choose another name")
    place, end = path.resolve(), out.absolute().parent.resolve() / out.name
    own = [end, *(end.with_name(end.name + suffix) for suffix in (STATUS_SUFFIX, PLAN_SUFFIX, WORK_SUFFIX))]
    for what, paths in (("output", own), ("input", [source.resolve() for source in inputs])):
        for one in paths:
            if place == one or one in place.parents:
                raise OutputError(f"{say(option)} {path}: it is in the way of the {what} {one}; choose another name")
