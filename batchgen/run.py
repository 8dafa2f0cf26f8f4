"""A job from its first line to its last: read, validate, plan, generate, commit, publish."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from batchgen.gpt2.machine_code import prepare_kernels
from batchgen.input.prompts import Cut, Facts
from batchgen.input.shots import open_prompts
from batchgen.input.validation import make_check
from batchgen.job import Files, Job, as_job
from batchgen.models.model import Model
from batchgen.output.finished import correcting_status, find_finished, summarise_finished
from batchgen.output.ledger import Ledger, open_ledger
from batchgen.output.observers import check_observers, open_observers
from batchgen.output.outputs import Output, open_output, work_folder
from batchgen.output.reused import OlderRows, read_older
from batchgen.output.rows import Rows
from batchgen.output.schema import Columns
from batchgen.plan import Plan
from batchgen.planning import Setting, check_memory, make_plan, n_chunks, select, within_memory
from batchgen.progress import OnProgress, Summary, reporting
from batchgen.workers.supply import Deadline
from batchgen.workers.watch import make_reporter
from batchgen.workers.workers import open_workers


def _run(job: Job, on_progress: OnProgress | None, open_model: Callable[[str], Model]) -> Summary:
    """See run_job."""
    deadline = Deadline.find(job.work.time_limit)
    job = replace(job, work=replace(job.work, time_limit=deadline.seconds))
    prompts = open_prompts(job.input, job.sampling.seed, spool=work_folder(job.output))
    output = open_output(job, prompts, lambda: model.load_tokenizer())
    check_observers(job, output, prompts)
    model = open_model(job.model).with_precision(job.work.precision)
    with ExitStack() as stack:
        overwrite = job.output.overwrite and not job.output.retry_failed  # a retry keeps what is done
        ledger = stack.enter_context(open_ledger(output.path, output.where, overwrite=overwrite))
        facts = prompts.scan()
        rows = output.rows_to_do(select(job, facts))
        if complete := find_complete(job, output, ledger, facts, rows, model):
            return complete
        workers = stack.enter_context(open_workers(job.work, model, ledger.attempt))
        check_memory(model)  # with the lock: another run may hold output and memory
        model.verify()
        prepare_kernels()
        asked, automatic = make_plan(job, facts, model, Setting(rows.count, workers.slots, output.format))
        columns = output.columns(facts, asked, model.config.n_embd)
        asked, older = with_older(job, asked, columns, ledger)
        plan = output.claim(ledger, asked, automatic, job.work.restart)
        check = make_check(model.load_tokenizer(), model.config.n_ctx, *plan.rules())
        check = within_memory(check, model.config, plan.precision, plan.kv_bytes)
        cut = Cut.for_output(plan.format, plan.chunk_rows, rows.numbers, ledger.committed, plan.drops("prompt"))
        chunks = prompts.chunks(facts, job.sampling, check, cut, older)
        missing = n_chunks(rows.count - ledger.counts["input_rows"], plan.chunk_rows)  # or more, if rows are large
        reporter = make_reporter(job, prompts, output, ledger, rows, on_progress)
        reporter.status.observers = open_observers(job, plan, prompts, facts, output, columns.schema(facts.kept))
        with reporting(reporter) as report:
            for receipt in workers.run(plan, columns, chunks, missing, deadline):
                ledger.commit(receipt)
            deadline.check_complete(report, rows.count)
            ledger.note_whole()
            summary = report.summarise(output.where, rows.in_all, rows.staying, workers.jobs, plan.precision)
            output.publish(ledger, plan, columns.schema(facts.kept), summary.rows)
            ledger.published = True
    return report.outcome or summary


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
    plan, automatic = make_plan(job, facts, model, Setting(rows.in_all, 0, output.format))
    statuses = find_finished(output, ledger, plan, automatic, job.work.restart)
    return None if statuses is None else summarise_finished(job, output, rows.in_all, statuses)


def with_older(job: Job, plan: Plan, columns: Columns, ledger: Ledger) -> tuple[Plan, OlderRows | None]:
    """The plan with its older outputs, and their rows; a run that has only to publish needs none.

    It may have begun to replace one of them.
    """
    if whole := ledger.find_whole(job.work.restart):
        return replace(plan, reuse=whole.reuse), None
    digests, older = read_older(job.work.reuse, plan, columns.schema(), ledger.directory)
    return replace(plan, reuse=digests), older
