"""batchgen complete: one prompt, its completion streamed to the terminal (picoGPT's main)."""

import sys
from typing import Annotated

import typer

from batchgen.generator import Generator
from batchgen.job import DEFAULT_MODEL, Policy
from batchgen.jobs import options, report
from batchgen.jobs.flatten import flatten, note_escapes
from batchgen.types import SamplingParams


@flatten("n", "logprobs", "prompt_logprobs")
def complete(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to continue.")],
    sampling: SamplingParams,
    policy: Policy,
    model: options.Model = DEFAULT_MODEL,
    precision: options.Precision = None,
) -> None:
    """Complete one PROMPT and stream the text to the terminal as it comes.

    Example: batchgen complete "Once upon a time" --max-tokens 60 --temperature 0.8
    """
    note_escapes("PROMPT", prompt)
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    shown = report.harmless if sys.stdout.isatty() else str
    for text in Generator(model, precision=precision, batch_size=1).stream(prompt, sampling, policy):
        typer.echo(shown(text), nl=False)
    typer.echo("")
