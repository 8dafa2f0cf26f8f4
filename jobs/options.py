"""Options that no record of a job holds, and that more than one command has."""

from typing import Annotated

import typer

from batchgen.models.registry import list_models
from batchgen.types import IO


def model_names(incomplete: str) -> list[str]:
    """What a shell offers after --model."""
    return [info.name for info in list_models() if info.error is None and info.name.startswith(incomplete)]


Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        autocompletion=model_names,
        help="A model's name (see: batchgen models) or its directory.",
        rich_help_panel=IO,
    ),
]
