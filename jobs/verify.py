"""batchgen verify: checks a model against its manifest, or an output by generating rows of it again."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from batchgen.jobs import report
from batchgen.models.model import Model
from batchgen.models.verify import record_verified, verify_model
from batchgen.output.ledger import is_dataset
from batchgen.output.place import SUFFIXES
from batchgen.output.store import refuse_address
from batchgen.review.replay import CLOSE, Replay, replay
from batchgen.types import Precision

SHOWN = 20  # differences
_DONE = {"generate": "generated", "score": "scored", "embed": "embedded"}


def verify(
    target: Annotated[
        str, typer.Argument(metavar="OUTPUT|MODEL", help="A Parquet file or dataset, or a model's name or directory.")
    ],
    rows: Annotated[int, typer.Option(min=1, max=10_000, help="Of an output: input rows to generate again.")] = 10,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Chooses the same rows again; without it, the choice is random.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Of an output: where its model is, if not under its name.")
    ] = None,
    precision: Annotated[
        Precision | None, typer.Option(help="Another one than the output's or the model's own.")
    ] = None,
) -> None:
    """Check an output by generating random rows of it again, or scoring them, or check a model.

    Rows of an OUTPUT are made from its metadata and compared with the file, bit for bit if the same version made
    it. Of a MODEL, its hashes and structure are checked, and the known completions of OpenAI's sizes. Exit code 0:
    all is as it should be; 1: something is not, and the line says what.

    Example: batchgen verify completions.parquet --rows 20

    Example: batchgen verify 124M
    """
    refuse_address(target, "a verification")
    if os.path.isfile(target) or Path(target).suffix.lower() in SUFFIXES or is_dataset(Path(target)):
        done = replay(Path(target), rows, seed, model, precision)
        with report.to_whoever_reads():
            _print_replay(done)
        sys.exit(1 if done.differences else 0)
    target_model = Model.open(target, precision)
    for line in verify_model(target_model):
        typer.echo(f"ok  {line}")
    record_verified(target_model)
    typer.echo(f"{target_model.directory}: verified")


def _print_replay(done: Replay) -> None:
    how = "bit for bit" if done.exact else f"by value, log-probabilities within {CLOSE}"
    lines = [
        f"{done.path}: {done.rows:,} input rows, {done.ok:,} of them ok; model {done.model}",
        f"{done.compared:,} of these {_DONE[done.task]} again "
        f"({done.samples:,} samples; --seed {done.seed} chooses them again)",
        f"compared {how}: {', '.join(done.columns)}",
        *(f"note: {note}" for note in done.notes),
        *(f"DIFFERS  {line}" for line in done.differences[:SHOWN]),
    ]
    for line in lines:
        typer.echo(report.one_line(line))
    if len(done.differences) > SHOWN:
        typer.echo(f"... and {len(done.differences) - SHOWN:,} more")
    if not done.differences:
        typer.echo("verified: all rows are the same")
    elif done.exact:
        typer.echo("not verified: these rows were changed in the file, or not made as its metadata says")
    else:
        typer.echo("not verified: these rows were changed, or rounding differs (see the notes)")
