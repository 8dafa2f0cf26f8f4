"""A job from its first line to its last: read, validate, plan, generate, commit, publish."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from batchgen.gpt2.machine_code import prepare_kernels
from batchgen.input.prompts import Cut, Facts, Prompts
from batchgen.input.validation import make_check
from batchgen.job import Files, Job, as_job
from batchgen.models.model import Model
from batchgen.output.finished import correcting_status, find_finished, summarise_finished
from batchgen.output.ledger import Ledger, open_ledger
from batchgen.output.outputs import Output, open_output, work_folder
from batchgen.output.rows import Rows
from batchgen.planning import Setting, check_memory, make_plan, n_chunks
from batchgen.progress import OnProgress, Progress, Reporter, StatusFile, Summary, reporting, status_path
from batchgen.types import add_reasons, task_of
from batchgen.workers.marker import read_sightings
from batchgen.workers.outlook import Outlook, add_progress
from batchgen.workers.supply import Deadline
from batchgen.workers.workers import open_workers


def _run(job: Job, on_progress: OnProgress | None, open_model: Callable[[str], Model]) -> Summary:
    """See run_job."""
    deadline = Deadline(job.work.time_limit)
    prompts = Prompts.open(job.input, spool=work_folder(job.output))
    output = open_output(job, prompts, lambda: model.load_tokenizer())
    model = open_model(job.model).with_precision(job.work.precision)
    with ExitStack() as stack:
        overwrite = job.output.overwrite and not job.output.retry_failed  # a retry keeps what is done
        ledger = stack.enter_context(open_ledger(output.path, output.where, overwrite=overwrite))
        facts = prompts.scan()
        rows = output.rows_to_do(facts)
        if complete := find_complete(job, output, ledger, facts, rows, model):
            return complete
        workers = stack.enter_context(open_workers(job.work, model, ledger.attempt))
        check_memory(model)  # with the lock: another run may hold output and memory
        model.verify()
        prepare_kernels()
        asked = make_plan(job, facts, model, Setting(rows.count, workers.slots, output.format))
        plan = output.claim(ledger, *asked, job.work.restart)
        columns = output.columns(facts, plan, model.config.n_embd)
        check = make_check(model.load_tokenizer(), model.config.n_ctx, job.policy, plan.options())
        cut = Cut.for_output(plan.format, plan.chunk_rows, rows.numbers, ledger.committed)
        chunks = prompts.chunks(facts, job.sampling, check, cut)
        missing = n_chunks(rows.count - ledger.counts["input_rows"], plan.chunk_rows)  # or more, if rows are large
        with reporting(make_reporter(job, prompts, output, ledger, rows, on_progress)) as report:
            for receipt in workers.run(plan, columns, chunks, missing, deadline):
                ledger.commit(receipt)
            deadline.check_complete(report, rows.count)
            summary = report.summarise(output.where, facts.rows, rows.staying, workers.jobs, plan.precision)
            output.publish(ledger, plan, columns.schema(facts.kept), summary.rows)
            ledger.published = True
    return summary


def run_job(
    job: Job | Files,
    output: str | Path | None = None,
    *,
    on_progress: OnProgress | None = None,
    open_model: Callable[[str], Model] = Model.open,
    **options: object,
) -> Summary:
    """Complete every prompt of job.input into job.output, resuming an interrupted run of the same plan.

    Instead of a Job, its input and output do, and options by their names. Every input row is accounted for by at
    least one output row, in input order. Raises a BatchgenError, whose text is for the user, if the job as a whole
    cannot run; neither an error nor a kill loses what is finished.

    >>> run_job("prompts.jsonl", "completions.parquet", max_tokens=64, jobs=2)
    """
    asked = as_job(job, output, options)
    with correcting_status(asked):
        return _run(asked, on_progress, open_model)


def find_complete(job: Job, output: Output, ledger: Ledger, facts: Facts, rows: Rows, model: Model) -> Summary | None:
    """The summary of an output that this job, or another that asked for the same, has finished; else None."""
    if job.output.retry_failed and rows.count:
        return None
    plan, automatic = make_plan(job, facts, model, Setting(facts.rows, 0, output.format))
    statuses = find_finished(output, ledger, plan, automatic, job.work.restart)
    return None if statuses is None else summarise_finished(job, output, facts.rows, statuses)


def make_reporter(
    job: Job, prompts: Prompts, output: Output, ledger: Ledger, rows: Rows, on_progress: OnProgress | None
) -> Reporter:
    """Watches the ledger's counts and the workers' markers."""
    resumed = ledger.counts.copy()
    add_reasons(ledger.reasons, rows.reasons)
    path = status_path(output.path) if job.output.status else None
    status = StatusFile(path, str(output.where), job.input.names, ledger.reasons)
    outlook = Outlook(rows.count, resumed["input_rows"])

    def look(seconds: float) -> Progress:
        sightings = read_sightings(ledger.attempt)  # before the counts: what is committed meanwhile is counted there
        done = ledger.counts.copy()
        now = add_progress(done, resumed, sightings, ledger.committed, rows.count)
        eta = outlook.look(sightings, ledger.committed, done["input_rows"], seconds)
        return replace(now, seconds=seconds, eta_seconds=eta, task=task_of(job.kind))

    is_retry, parameters = job.output.retry_failed, prompts.row_parameters
    return Reporter(
        look, ledger.counts, resumed, status, on_progress, parameters, is_retry, job.kind, ledger.is_published
    )
