"""Options that no record of a job holds, and that more than one command has."""

from dataclasses import dataclass
from typing import Annotated

import typer

from batchgen import types
from batchgen.job import PRECISION_HELP, RUN
from batchgen.jobs.logs import log_as_json
from batchgen.jobs.progress import ProgressStyle
from batchgen.models.registry import list_models
from batchgen.types import IO, MEASURED


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

Precision = Annotated[types.Precision | None, typer.Option(help=PRECISION_HELP, rich_help_panel=IO)]
Fetch = Annotated[bool, typer.Option(help="Fetch one of OpenAI's models if it is not here yet.", rich_help_panel=IO)]
Report = Annotated[
    bool, typer.Option("--report", help="Write a report too, beside the output as .html.", rich_help_panel=IO)
]
LogJson = Annotated[
    bool,
    typer.Option("--log-json", callback=log_as_json, help="Messages as JSON, one object a line.", rich_help_panel=RUN),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.", rich_help_panel=RUN)]
Progress = Annotated[ProgressStyle, typer.Option(help="A bar, lines, or nothing.", rich_help_panel=RUN)]
Show = Annotated[int, typer.Option(min=0, help="Completions to show at the end (plan: prompts).", rich_help_panel=RUN)]

# fields of records that these commands have no option for
_OF_COMPLETIONS = ("token_ids", *MEASURED, "drop_duplicates", "seed_by", "reuse")
_OF_SHOTS = ("shots", "n_shots", "shots_column", "shots_end")
NOT_OF_SCORE = (*_OF_COMPLETIONS, "empty_prompt", "trim")
NOT_OF_EMBED = (*_OF_COMPLETIONS, *_OF_SHOTS, "prompt_column", "completion_column", "choices_column", "answer_column")


@dataclass(frozen=True, slots=True)
class Shown:
    """How a job is run for people."""

    fetch: Fetch = True
    html_report: Report = False
    progress: Progress = "auto"
    log_json: LogJson = False
    quiet: Quiet = False
    show: Show = 3
