"""batchgen score: texts, completions or choices in, their log-probabilities out."""

from dataclasses import replace

from batchgen.job import DEFAULT_MODEL, Job, OutputOptions, Policy, ScoreInput, ScoreOptions, WorkOptions
from batchgen.jobs import options
from batchgen.jobs.flatten import flatten
from batchgen.jobs.running import run_shown


@flatten(*options.NOT_OF_SCORE)
def score(
    *,
    input: ScoreInput,
    output: OutputOptions,
    scores: ScoreOptions,
    policy: Policy,
    work: WorkOptions,
    model: options.Model = DEFAULT_MODEL,
    shown: options.Shown,
) -> None:
    """Score the texts of INPUT, or its prompts' completions or choices: how likely the model finds them.

    The output has a row for every row of INPUT, in input order, with sums of log-probabilities (natural logarithms).
    A text alone is scored as a whole; of a prompt with its completion, or with choices, only what follows the prompt.
    Resuming, --overwrite and exit codes are those of generate.

    Example: batchgen score texts.jsonl -o scores.parquet

    Example: batchgen score pairs.jsonl -o scores.parquet --completion-column completion

    Example: batchgen score questions.jsonl -o scores.parquet --choices-column choices --answer-column answer
    """
    run_shown(Job(replace(input, task=scores), output, model, policy=policy, work=work), shown)
