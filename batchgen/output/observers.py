"""Who else learns how far a run is: the files of --metrics and --lineage."""

import tempfile
from pathlib import Path

import pyarrow as pa

from batchgen.errors import OutputError, UsageError
from batchgen.input.prompts import Facts, Prompts
from batchgen.job import Job
from batchgen.options import say
from batchgen.output.lineage import Lineage, check_lineage
from batchgen.output.metrics import MetricsFile, check_metrics
from batchgen.output.outputs import Output
from batchgen.output.place import output_errors, refuse_in_the_way
from batchgen.plan import Plan
from batchgen.progress import Observer


def check_observers(job: Job, output: Output, prompts: Prompts) -> None:
    """Raise a BatchgenError, before any work, for a file that cannot be written or must not be."""
    if job.output.metrics and job.output.lineage and Path(job.output.metrics) == Path(job.output.lineage):
        raise UsageError(f"{say('metrics')} and {say('lineage')} name one file; choose another name for one of them")
    for name, check in (("metrics", check_metrics), ("lineage", check_lineage)):
        if not (given := getattr(job.output, name)):
            continue
        path = Path(given)
        with output_errors(path, "choose another name"):
            _check_folder(name, path)
            refuse_in_the_way(name, path, output.path, prompts.local_paths)
            check(path)


def _check_folder(name: str, path: Path) -> None:
    """Raise OutputError unless its folder takes files: a file there is replaced, or made."""
    if not path.parent.is_dir():
        what = "not a folder" if path.parent.exists() else "no such folder"
        remedy = "create it (mkdir -p) or choose another"
        raise OutputError(f"{say(name)} {path}: {path.parent} is {what}; {remedy}")
    if name == "metrics" or not path.exists():
        tempfile.TemporaryFile(dir=path.parent).close()  # noqa: SIM115  # made and gone


def open_observers(
    job: Job, plan: Plan, prompts: Prompts, facts: Facts, output: Output, schema: pa.Schema
) -> tuple[Observer, ...]:
    """The functions that are called with each status of the run; the lineage has its first event then."""
    found: list[Observer] = []
    if job.output.metrics:
        found.append(MetricsFile.open(job).write)
    if job.output.lineage:
        inputs = [source.where for source in prompts.sources if source.where != "-"]
        path, where = Path(job.output.lineage), str(output.where)
        lineage = Lineage(path, plan, where, output.path, inputs, facts.bytes, schema)
        lineage.start()
        found.append(lineage.watch)
    return tuple(found)
