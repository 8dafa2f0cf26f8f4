"""Options that more than one command has, and how the sampling ones become SamplingParams."""

import re
from typing import Annotated

import typer

from batchgen.errors import UsageError
from batchgen.input.sources import InputFormat
from batchgen.input.validation import EmptyPrompt, OnTooLong
from batchgen.models.registry import list_models

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


def model_names(incomplete: str) -> list[str]:
    """What a shell offers after --model."""
    return [info.name for info in list_models() if info.error is None and info.name.startswith(incomplete)]


PromptColumn = Annotated[str, typer.Option(help="The column or key that holds the prompt.")]
IdColumn = Annotated[str, typer.Option(help="The one that holds the row's id, if any.")]
Format = Annotated[InputFormat, typer.Option(help="What the input is, whatever it is called; auto goes by the suffix.")]
RowParams = Annotated[bool, typer.Option(help="Heed parameters in rows: max_tokens, seed and so on.")]
Jobs = Annotated[str, typer.Option("--jobs", "-j", help="Worker processes; auto: a core each.")]
BatchSize = Annotated[str, typer.Option(help="Sequences in flight in a worker.")]
ChunkRows = Annotated[str, typer.Option(help="Rows that a worker takes at a time.")]
KvMemory = Annotated[str, typer.Option(help="Keys and values that a worker may hold, such as 2G.")]
SharePrefixes = Annotated[bool, typer.Option(help="Read prefixes that prompts share only once.")]
Model = Annotated[
    str,
    typer.Option(
        "--model", "-m", autocompletion=model_names, help="A model's name (see: batchgen models) or its directory."
    ),
]
MaxTokens = Annotated[int, typer.Option(help="New tokens at most, for each sample.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy: always the most likely token.")]
TopK = Annotated[int, typer.Option(help="Draw from the K most likely tokens; 0 is off.")]
TopP = Annotated[float, typer.Option(help="Draw from the likeliest tokens that make up this probability; 1 is off.")]
MinP = Annotated[float, typer.Option(help="Drop tokens less likely than this times the likeliest; 0 is off.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Divide the logits of tokens already there; 1 is off.")]
PresencePenalty = Annotated[float, typer.Option(help="Subtract from the logits of generated tokens; 0 is off.")]
FrequencyPenalty = Annotated[float, typer.Option(help="The same for every time that they were; 0 is off.")]
MinTokens = Annotated[int, typer.Option(help="No end before this many tokens.")]
Seed = Annotated[int, typer.Option(help="Draws the same samples again; used where temperature is above 0.")]
TooLong = Annotated[OnTooLong, typer.Option(help="What to do where prompt + max_tokens exceed n_ctx.")]
Empty = Annotated[EmptyPrompt, typer.Option(help="Reject it, or start from <|endoftext|>.")]
Stop = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End before this text; again for more, up to 8.")]
IncludeStop = Annotated[bool, typer.Option("--include-stop", help="Keep the stop string in the completion.")]
BadWords = Annotated[
    list[str] | None, typer.Option(metavar="TEXT", help="Never generate the tokens of this text; again for more.")
]
StopTokenIds = Annotated[str, typer.Option(metavar="ID,ID", help="End at these token ids too: 198,13.")]
LogitBias = Annotated[
    str, typer.Option(metavar="ID=BIAS,...", help="Add to the logits of tokens, -100 to 100: 198=-100,464=2.5.")
]
Echo = Annotated[bool, typer.Option("--echo", help="Begin the completion with the prompt.")]
StopLoops = Annotated[bool, typer.Option("--stop-loops", help="End a completion that repeats itself.")]
Trim = Annotated[bool, typer.Option("--trim", help="Take spaces off the prompt's end; GPT-2 goes on badly from them.")]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos/--stop-at-eos", help="Go on past <|endoftext|>.")]


def parse_size(text: str | None, option: str) -> int | None:
    """A number of bytes: `1536M` -> 1610612736; None and `auto` -> None."""
    if text is None or text == "auto":
        return None
    match = re.fullmatch(r"(\d{1,15})([KMG]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not match:
        raise UsageError(f"{option} {text!r}: not a size; write it as 1536M or 2G")
    if not int(match[1]):
        raise UsageError(f"{option} {text!r} is out of range (a byte or more); leave it out: it is automatic then")
    return int(match[1]) * _UNITS[match[2].upper()]


def parse_token_ids(text: str) -> tuple[int, ...]:
    """`198,13` -> (198, 13)"""
    return tuple(_token_id(part, "--stop-token-ids") for part in text.split(",") if part)


def parse_biases(text: str) -> tuple[tuple[int, float], ...]:
    """`198=-100,464=2.5` -> ((198, -100.0), (464, 2.5))"""
    biases = {}
    for part in filter(None, text.split(",")):
        token, _, bias = part.partition("=")
        try:
            biases[_token_id(token, "--logit-bias")] = float(bias)
        except ValueError as error:
            raise UsageError(f"--logit-bias {part!r}: write it as a token id and a number, such as 198=-100") from error
    return tuple(biases.items())


def _token_id(text: str, option: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text.strip()):
        raise UsageError(f"{option} {text!r}: not a token id; write whole numbers from 0 on")
    return int(text)


def parse_count(text: str, option: str) -> int | None:
    """A whole number from 1 on; `auto` -> None."""
    if text == "auto":
        return None
    if not re.fullmatch(r"\d{1,9}", text) or int(text) < 1:
        raise UsageError(f"{option} {text!r}: must be a whole number from 1 on, or auto")
    return int(text)


def parse_duration(text: str | None, option: str) -> float | None:
    """Seconds: `90` and `90s` -> 90.0, `50m` -> 3000.0, `1h30m` -> 5400.0; None -> None."""
    if text is None:
        return None
    parts = re.findall(r"(\d{1,9}(?:\.\d{1,9})?)([smhd]?)", text)
    seconds = sum(float(number) * _SECONDS[unit] for number, unit in parts)
    if "".join(number + unit for number, unit in parts) != text or not 0 < seconds < 1e9:
        raise UsageError(f"{option} {text!r}: not a time; write it as 90s, 50m or 1h30m")
    return seconds
