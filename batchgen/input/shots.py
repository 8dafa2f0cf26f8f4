"""The input of a job with its template, and with the examples that stand before every prompt."""

from pathlib import Path

from batchgen.errors import InputError, UsageError
from batchgen.input.prompts import Prompts
from batchgen.input.templates import Examples, Shots, with_template
from batchgen.job import InputOptions
from batchgen.options import say
from batchgen.selection import select_rows
from batchgen.types import READING, Rejected

MAX_CHARACTERS = 2**22  # of all examples; no model reads a tenth of it


def open_prompts(options: InputOptions, seed: int, spool: Path | None = None) -> Prompts:
    """`Prompts.open` with the examples that the seed draws."""
    options = with_template(options)
    return Prompts.open(options, spool, read_shots(options, seed) if options.shots else None)


def read_shots(options: InputOptions, seed: int) -> Shots:
    """The examples, in the order of their file; a row that is drawn and is none is an error of the job."""
    assert options.shots is not None
    file = Examples(
        options.shots,
        options.prompt_column,
        row_params=False,
        template=options.template,
        completion=options.shots_column,
    )
    try:
        prompts = Prompts.open(file)
        rows = prompts.scan().rows
    except InputError as error:
        raise InputError(f"{say('shots')}: {error}") from error
    wanted = options.n_shots or rows
    if wanted > rows or not rows:
        has = f"has {rows} row{'' if rows == 1 else 's'}"
        remedy = f"lower {say('n_shots', wanted)}, or add rows" if rows else "add rows"
        raise UsageError(f"{say('shots')} {options.shots}: {has}; {remedy}")
    drawn = select_rows(rows, sample=wanted, seed=seed)
    texts: list[str] = []
    length = 0
    for item in prompts.requests(READING):
        if item.row >= drawn.end:
            break
        if item.row not in drawn:
            continue
        if isinstance(item, Rejected):
            raise InputError(f"{say('shots')}: {item.error}")
        texts.append(f"{item.prompt}{options.shots_end}")
        length += len(texts[-1])
        if length > MAX_CHARACTERS:
            what = f"{wanted:,} examples have more than {MAX_CHARACTERS:,} characters"
            raise UsageError(f"{say('shots')} {options.shots}: {what}; draw fewer with {say('n_shots')}")
    return Shots("".join(texts), len(texts), tuple(prompts.local_paths))
