"""batchgen convert: convert a checkpoint to shards."""

from pathlib import Path
from typing import Annotated

import typer

from batchgen.jobs.fetch import PRECISION_HELP, convert_progress
from batchgen.jobs.progress import ProgressStyle
from batchgen.jobs.report import one_line
from batchgen.models.convert import convert_checkpoint
from batchgen.models.model import Model, make_default
from batchgen.models.registry import model_destination
from batchgen.types import Precision


def convert(
    src: Annotated[
        Path,
        typer.Argument(metavar="SRC", help="A folder with OpenAI's GPT-2 (seven files), or one of Hugging Face's."),
    ],
    dst: Annotated[str, typer.Argument(metavar="DST", help="A name for --model, or a folder.")],
    replace: Annotated[bool, typer.Option("--replace", help="Replace an existing model.")] = False,
    precision: Annotated[Precision | None, typer.Option(help=PRECISION_HELP)] = None,
    progress: Annotated[ProgressStyle, typer.Option(help="A bar, lines, or nothing.")] = "auto",
) -> None:
    """Convert the checkpoint in SRC to shards in DST; check it, and write all or nothing.

    SRC is a TensorFlow checkpoint as OpenAI publishes it, or a Hugging Face folder with config.json,
    model.safetensors (single or sharded) and a vocabulary.

    Example: batchgen convert ~/gpt-2/models/124M 124M
    """
    directory = model_destination(dst)
    with convert_progress(directory.name, progress) as show:
        convert_checkpoint(src, directory, name=directory.name, replace=replace, on_progress=show)
    if precision:
        make_default(directory, precision)
    tokenizer = Model.load(directory).load_tokenizer()
    for what, word, ids in (
        ("every prompt begins with", "and", tokenizer.special.begin),
        ("completions end at", "or", tokenizer.special.end),
    ):
        if tokens := [f"{one_line(tokenizer.token_text(token))} (id {token})" for token in ids]:
            typer.echo(f"{what} {f' {word} '.join(tokens)}")
    if not tokenizer.special.end:
        typer.echo("completions end at no token: only at max_tokens, a stop string or a stop token")
    typer.echo(f"{directory}: converted; use it with --model {dst}")
