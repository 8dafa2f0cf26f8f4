"""batchgen complete: one prompt, its completion streamed to the terminal (picoGPT's main)."""

import sys
from typing import Annotated

import typer

from batchgen.jobs import options, report
from batchgen.models.registry import DEFAULT_MODEL, find_model
from batchgen.stream import stream_completion
from batchgen.types import SamplingParams


def complete(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to go on with.")],
    model: options.Model = DEFAULT_MODEL,
    max_tokens: options.MaxTokens = 40,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: options.Seed = 0,
    ignore_eos: options.IgnoreEos = False,
    stop: options.Stop = None,
    include_stop: options.IncludeStop = False,
    stop_loops: options.StopLoops = False,
    on_too_long: options.TooLong = "reject",
    empty_prompt: options.Empty = "reject",
) -> None:
    """Complete one PROMPT and stream the text to the terminal as it comes.

    Example: batchgen complete "Once upon a time" --max-tokens 60 --temperature 0.8
    """
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        ignore_eos=ignore_eos,
        stop=tuple(stop or ()),
        include_stop=include_stop,
        stop_loops=stop_loops,
    )
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    shown = report.harmless if sys.stdout.isatty() else str
    for text in stream_completion(find_model(model), prompt, params, on_too_long, empty_prompt):
        typer.echo(shown(text), nl=False)
    typer.echo("")
