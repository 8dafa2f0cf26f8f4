"""batchgen embed: texts in, a vector of each out."""

from dataclasses import replace

from batchgen.job import DEFAULT_MODEL, EmbedOptions, Job, OutputOptions, Policy, ScoreInput, WorkOptions
from batchgen.jobs import options
from batchgen.jobs.flatten import flatten
from batchgen.jobs.running import run_shown


@flatten(*options.NOT_OF_EMBED)
def embed(
    *,
    input: ScoreInput,
    output: OutputOptions,
    embedding: EmbedOptions,
    policy: Policy,
    work: WorkOptions,
    model: options.Model = DEFAULT_MODEL,
    shown: options.Shown,
) -> None:
    """Make a vector of each text of INPUT: the model's states in one layer, as their mean or the last one.

    The output has a row for every row of INPUT, in input order, with a list of n_embd float32 in the column embedding.
    Resuming, --overwrite and exit codes are those of generate.

    Example: batchgen embed texts.jsonl -o embeddings.parquet --layer -1 --pool mean
    """
    run_shown(Job(replace(input, task=embedding), output, model, policy=policy, work=work), shown)
