"""A finished output is not lost by a slip, and a status file is true after a run that had nothing to watch."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

from batchgen.errors import BatchgenError, BusyError, InputError, OutputError
from batchgen.job import Job
from batchgen.options import say
from batchgen.output.ledger import Ledger, is_held, refuse_conflict
from batchgen.output.metrics import write_metrics
from batchgen.output.outputs import Output, local_path
from batchgen.output.store import is_address
from batchgen.plan import Plan
from batchgen.progress import (
    Summary,
    correct_status,
    exit_code_of,
    read_status,
    state_of,
    status_path,
    watched,
    words_of,
)

OF_THE_MACHINE = frozenset({"batchgen", "regex", "llguidance"})  # a complete output stays so on another


def find_finished(
    output: Output, ledger: Ledger, plan: Plan, automatic: frozenset[str], restart: bool
) -> Counter[str] | None:
    """The rows, by status, of the output that this plan has made already; None if there is work to do.

    Only what was asked for is compared: input, model, options. Raises an error if something else is there, unless this
    run, or the one that it resumes, may replace it; anything may replace an output without an ok row. A run that died
    when it had only to clear up is not made again, whatever it may.
    """
    free = automatic | OF_THE_MACHINE
    published, unfinished = (None, None) if restart else (ledger.read_published(), ledger.unfinished())
    if published and not published.conflict(plan, free):
        with suppress(InputError):
            stored = output.stored()
            if stored and not stored.plan.conflict(plan, free):
                return stored.statuses
    if ledger.overwrite or (unfinished and (ledger.may_replace() or unfinished.conflict(plan, free))):
        return None  # claim refuses a conflict with the unfinished run
    remedy = f"choose another name for the output, or pass {say('overwrite', True)} to replace it"
    try:
        stored = output.stored()
    except InputError as error:
        what = str(error).removeprefix(f"{output.where}: ").split(";")[0]
        raise OutputError(f"{output.where}: not a complete output of batchgen: {what}; {remedy}") from error
    if stored is None:
        return None
    if not stored.statuses["ok"] and stored.plan.conflict(plan, free):
        ledger.overwrite = True
        return None
    refuse_conflict(f"{output.where} is complete", stored.plan, plan, free, remedy)
    return stored.statuses


def summarise_finished(job: Job, output: Output, rows: int, statuses: Counter[str]) -> Summary:
    """The summary of a complete output; its status says `finished` too, if a run was killed before it could."""
    summary = replace(Summary.of_complete(output.where, rows, statuses), has_rejects=job.output.rejects)
    path = status_path(output.path)
    counts = {"rows_done": rows, "rows": rows, **summary.statuses}
    if job.output.status and read_status(path).get("state") != "finished":
        correct_status(path, state="finished", exit_code=summary.exit_code, error=None, **counts)
    write_metrics(job, {"state": "finished", "exit_code": summary.exit_code, **counts})
    return summary


@contextmanager
def correcting_status(job: Job) -> Iterator[None]:
    """If the block, a run, raises before it is watched, say so in the metrics, and in an earlier run's status file."""
    watched.clear()
    try:
        yield
    except BaseException as error:
        if not watched and not isinstance(error, BusyError):
            with suppress(BatchgenError, OSError, ValueError):  # the output's name itself may be what is wrong
                _note_failure(job, error)
        raise


def _note_failure(job: Job, error: BaseException) -> None:
    """Not if another run writes these files; nor the status of a finished output which this run may not replace."""
    out = local_path(job.output)
    if not out.name or is_held(out):  # no name: such as . and /
        return
    write_metrics(job, {"state": state_of(error), "exit_code": exit_code_of(error)})
    path = status_path(out)
    is_there = out.exists() or is_address(str(job.output.path))
    may_replace = job.output.overwrite and not job.output.retry_failed
    is_protected = is_there and not may_replace and read_status(path).get("state") == "finished"
    if job.output.status and not is_protected:
        correct_status(path, state=state_of(error), exit_code=exit_code_of(error), error=words_of(error))
