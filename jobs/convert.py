"""batchgen convert: a checkpoint becomes shards."""

from pathlib import Path
from typing import Annotated

import typer

from batchgen.checkpoint.convert import convert_tf_checkpoint
from batchgen.checkpoint.registry import model_destination


def convert(
    src: Annotated[Path, typer.Argument(metavar="SRC", help="An OpenAI GPT-2 checkpoint: a folder of seven files.")],
    dst: Annotated[str, typer.Argument(metavar="DST", help="A name for --model, or a folder.")],
    replace: Annotated[bool, typer.Option("--replace", help="Replace a model that is there already.")] = False,
) -> None:
    """Convert the checkpoint in SRC to shards in DST, checked, and all or nothing.

    Example: batchgen convert ~/gpt-2/models/124M 124M
    """
    directory = model_destination(dst)
    convert_tf_checkpoint(src, directory, name=directory.name, replace=replace)
    typer.echo(f"{directory}: converted; use it with --model {dst}")
