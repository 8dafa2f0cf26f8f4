"""batchgen card: a dataset card beside an output, for the Hugging Face Hub."""

from pathlib import Path
from typing import Annotated

import typer

from batchgen.errors import UsageError
from batchgen.jobs import report as terminal
from batchgen.output.store import refuse_address
from batchgen.review.card import Wishes, write_card


def card(
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="A file or dataset that batchgen wrote.")],
    license: Annotated[str | None, typer.Option(help="The dataset's license, by the Hub's name: cc-by-4.0.")] = None,
    title: Annotated[str | None, typer.Option(help="Its name; without it, that of OUTPUT.")] = None,
    language: Annotated[
        list[str] | None, typer.Option(help="Its language, such as en; can be given again.", metavar="CODE")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a README.md that batchgen did not write, or that was edited.")
    ] = False,
) -> None:
    """Write a dataset card, README.md, in the folder of OUTPUT, or in it if it is a folder.

    The card says how OUTPUT was made, from its metadata: model, parameters, counts, columns, how to make and check it
    again, and its first rows. Its head is the Hugging Face Hub's: datasets.load_dataset(FOLDER) reads OUTPUT.

    Example: batchgen card completions.parquet --license cc-by-4.0 --language en
    """
    refuse_address(output, "a card")
    if not Path(output).name:
        raise UsageError(f"{output!r} is not a file name; name a file or a dataset that batchgen wrote")
    written = write_card(Path(output), Wishes(license, title, tuple(language or ())), overwrite=overwrite)
    with terminal.to_whoever_reads():
        typer.echo(f"card: {terminal.one_line(str(written))}")
        if license is None:
            typer.echo("note: the license is unknown; --license ID names it")
