"""The reporter of a run: what it looks at."""

from dataclasses import replace

from batchgen.input.prompts import Prompts
from batchgen.job import Job
from batchgen.output.ledger import Ledger
from batchgen.output.outputs import Output
from batchgen.output.rows import Rows
from batchgen.progress import OnProgress, Progress, Reporter, StatusFile, status_path
from batchgen.types import add_reasons, task_of
from batchgen.workers.marker import read_sightings
from batchgen.workers.outlook import Outlook, add_progress


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

    return Reporter(
        look,
        ledger.counts,
        resumed,
        status,
        on_progress,
        prompts.row_parameters,
        is_retry=job.output.retry_failed,
        kind=job.kind,
        is_published=ledger.is_published,
        merged=ledger.merged,
        has_rejects=job.output.rejects,
        reuses=bool(job.work.reuse),
    )
