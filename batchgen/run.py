"""A job from its first line to its last: read, validate, plan, generate, commit, publish."""

from collections.abc import Callable
from dataclasses import replace

from batchgen.engine.probe import blas_info
from batchgen.errors import BatchgenError, StoppedError
from batchgen.input.prompts import Cut, Prompts
from batchgen.input.validation import make_check
from batchgen.job import Job
from batchgen.models.model import Model
from batchgen.options import say
from batchgen.output.ledger import Ledger, open_ledger
from batchgen.output.outputs import Output, open_output, work_folder
from batchgen.output.rows import Rows
from batchgen.planning import Setting, check_memory, make_plan, n_chunks, probe_arithmetic
from batchgen.progress import (
    OnProgress,
    Progress,
    Reporter,
    StatusFile,
    Summary,
    add_progress,
    reporting,
    status_path,
)
from batchgen.workers.marker import read_sightings
from batchgen.workers.supply import Deadline
from batchgen.workers.workers import open_workers


def run_job(
    job: Job, on_progress: OnProgress | None = None, open_model: Callable[[str], Model] = Model.open
) -> Summary:
    """Complete every prompt of job.input into job.output, resuming an interrupted run of the same plan.

    Every input row is accounted for by at least one output row, in input order. open_model finds the model, after
    input and output were checked. Raises a BatchgenError, whose text is for the user, if the job as a whole cannot
    run; neither an error nor a kill loses what is finished.
    """
    deadline = Deadline(job.work.time_limit)
    prompts = Prompts.open(job.input, spool=work_folder(job.output))
    output = open_output(job.output, prompts, lambda: model.load_tokenizer())
    model = open_model(job.model)
    with open_ledger(output.path) as ledger, open_workers(job.work, model, ledger.attempt) as workers:
        check_memory(model.name, model.config, model.bytes)  # with the lock: another run may hold output and memory
        model.verify()
        facts = prompts.scan()
        rows = output.rows_to_do(facts)
        arithmetic = probe_arithmetic(model, require_invariant=job.work.require_invariant)
        asked = make_plan(job, facts, model, Setting(arithmetic, rows.count, workers.slots, output.format))
        plan = output.claim(ledger, *asked, job.work.restart)
        columns = output.columns(facts, job.sampling)
        check = make_check(model.load_tokenizer(), model.config.n_ctx, job.policy)
        chunks = prompts.chunks(facts, job.sampling, check, Cut(plan.chunk_rows, rows.numbers, ledger.committed))
        missing = n_chunks(rows.count, plan.chunk_rows) - len(ledger.committed)
        with reporting(make_reporter(job, output, ledger, rows, on_progress)) as report:
            for receipt in workers.run(plan, columns, chunks, missing, deadline):
                ledger.commit(receipt)
            check_complete(job, rows, report)
            blas = str(replace(blas_info(), threads=1))
            summary = report.summarise(output.where, facts.rows, rows.staying, workers.jobs, blas)
            output.publish(ledger, plan, columns.schema(facts.kept), summary.rows)
        report.finish(summary)
    return summary


def make_reporter(job: Job, output: Output, ledger: Ledger, rows: Rows, on_progress: OnProgress | None) -> Reporter:
    """Watches the ledger's counts and the workers' markers."""
    resumed = ledger.counts.copy()
    status = StatusFile(status_path(output.path) if job.output.status else None, str(output.where))

    def look() -> Progress:
        sightings = read_sightings(ledger.attempt)  # before the counts: what is committed meanwhile is counted there
        return add_progress(ledger.counts.copy(), resumed, sightings, ledger.committed, rows.count)

    return Reporter(look, ledger.counts, resumed, status, on_progress)


def check_complete(job: Job, rows: Rows, report: Reporter) -> None:
    """Raise StoppedError if the time limit was reached, and BatchgenError if a row is missing."""
    done = report.counts["input_rows"]
    if done == rows.count:
        return
    limit = job.work.time_limit
    if limit is not None and done < rows.count:
        new = done > report.resumed["input_rows"]
        remedy = "run the same command again to resume" if new else "nothing was done: raise it"
        raise StoppedError(f"{say('time_limit')} {limit:g} s: {done:,} of {rows.count:,} rows are done; {remedy}")
    remedy = f"if the input was changed meanwhile, run again with {say('restart', True)}"
    raise BatchgenError(f"input: {rows.count} rows were counted and {done} were done; {remedy}")
