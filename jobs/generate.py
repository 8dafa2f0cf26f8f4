"""batchgen generate: prompts in, completions out."""

from batchgen.job import DEFAULT_MODEL, InputOptions, Job, OutputOptions, Policy, WorkOptions
from batchgen.jobs import options
from batchgen.jobs.flatten import flatten
from batchgen.jobs.running import run_shown
from batchgen.types import SamplingParams


@flatten()
def generate(
    *,
    input: InputOptions,
    output: OutputOptions,
    sampling: SamplingParams,
    policy: Policy,
    work: WorkOptions,
    model: options.Model = DEFAULT_MODEL,
    shown: options.Shown,
) -> None:
    """Complete every prompt of INPUT; the output has a row for every row of INPUT, in input order.

    To resume an interrupted run, run the same command again; over its own finished output, it says that it is complete.
    What another job made is only replaced with --overwrite. Exit code 0: every row ok; 3: some rows were rejected or
    failed, the output says why; 4: all of them were; 1: the job could not run; 2: usage; 75: run again later.

    Example: batchgen generate prompts.jsonl -o completions.parquet --max-tokens 64 --temperature 0.8
    """
    run_shown(Job(input, output, model, sampling, policy, work), shown)
