"""batchgen merge: the outputs of all shards become the output of one run."""

import glob
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from batchgen.errors import InputError, UsageError
from batchgen.jobs import report
from batchgen.output.merging import merge_shards
from batchgen.output.store import refuse_address


def merge(
    shards: Annotated[
        list[str], typer.Argument(metavar="SHARD...", help="The outputs of all shards, in any order; files, globs.")
    ],
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="OUTPUT", help="Where to: a file, or a folder if shards are.")
    ],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there, whatever made it.")] = False,
) -> None:
    """Make one output of the SHARDs that generate, score or embed made with --shard 1/N to N/N.

    It checks that each is complete, that all are of one job, and that each of the N is there once, and writes what one
    run without --shard would have written. Exit code 0: every row ok; 3: some rows were rejected or failed; 4: all of
    them were; 1: a shard is missing or damaged; 2: usage; 75: a shard is not finished.

    Example: batchgen merge part-*.parquet -o completions.parquet
    """
    paths = list(_find(shards))
    refuse_address(output, "a merge")
    if not Path(output).name:
        raise UsageError(f"--output {output!r} is not a file name; name one, such as completions.parquet")
    summary = merge_shards(paths, Path(output), overwrite=overwrite)
    with report.to_whoever_reads():
        for line in report.merge_lines(summary, len(paths)):
            typer.echo(line)
    sys.exit(summary.exit_code)


def _find(names: Sequence[str]) -> Iterator[Path]:
    """The files that were named; a pattern that no shell has replaced stands for those that it fits."""
    for name in names:
        refuse_address(name, "a merge")
        if Path(name).exists() or not glob.has_magic(name):
            yield Path(name)
            continue
        found = sorted(glob.glob(name))
        if not found:
            raise InputError(f"{name}: no file has such a name; check the pattern")
        yield from map(Path, found)
