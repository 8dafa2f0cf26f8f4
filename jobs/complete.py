"""batchgen complete: one prompt, its completion streamed to the terminal (picoGPT's main)."""

import logging
import sys
from typing import Annotated

import typer

from batchgen.generator import Generator
from batchgen.job import DEFAULT_MODEL, WORK, Policy, WorkOptions
from batchgen.jobs import options, report
from batchgen.jobs.flatten import flatten
from batchgen.options import find_escape, flags_of
from batchgen.types import SamplingParams

logger = logging.getLogger(__name__)

_ESCAPED = {"n": "line feed", "t": "tab", "r": "carriage return", "x": "byte", "u": "character"}


def note_escapes(what: str, text: str) -> None:
    r"""Say that a `\n` is a backslash and an n: a prompt is read with all its backslashes, unlike an option."""
    if escape := find_escape(text):
        name = _ESCAPED[escape[1]]
        quoted = text.replace("'", "\\'") if text.isprintable() and len(text) <= 60 else "..."
        logger.warning(
            "note: %s: %s is a backslash and a letter; for a %s write %s $'%s'", what, escape, name, what, quoted
        )


_KV_MEMORY = flags_of([WorkOptions])["kv_bytes"][0]
KvMemory = Annotated[
    str | None,
    typer.Option(_KV_MEMORY, metavar="SIZE", help="Memory for keys and values, such as 2G.", rich_help_panel=WORK),
]


@flatten("n", "logprobs", "prompt_logprobs")
def complete(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to continue.")],
    sampling: SamplingParams,
    policy: Policy,
    model: options.Model = DEFAULT_MODEL,
    precision: options.Precision = None,
    kv_memory: KvMemory = None,
) -> None:
    """Complete one PROMPT and stream the text to the terminal as it comes.

    Example: batchgen complete "Once upon a time" --max-tokens 60 --temperature 0.8
    """
    note_escapes("PROMPT", prompt)
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    shown = report.harmless if sys.stdout.isatty() else str
    kv_bytes = WorkOptions(kv_bytes=kv_memory).kv_bytes  # type: ignore[arg-type]  # a text becomes what it says
    for text in Generator(model, precision=precision, kv_bytes=kv_bytes, batch_size=1).stream(prompt, sampling, policy):
        typer.echo(shown(text), nl=False)
    typer.echo("")
