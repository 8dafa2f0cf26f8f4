"""batchgen verify: is this model what it says?"""

from typing import Annotated

import typer

from batchgen.checkpoint.registry import find_model
from batchgen.checkpoint.shards import load_manifest
from batchgen.checkpoint.verify import record_verified, verify_model


def verify(model: Annotated[str, typer.Argument(metavar="MODEL", help="A model's name or its directory.")]) -> None:
    """Check a model: its hashes, its structure, and for OpenAI's sizes what they are known to say.

    Each line says what was checked; the first thing that is wrong ends it with exit code 1.

    Example: batchgen verify 124M
    """
    directory = find_model(model)
    for line in verify_model(directory):
        typer.echo(f"ok  {line}")
    record_verified(load_manifest(directory))
    typer.echo(f"{directory}: verified")
