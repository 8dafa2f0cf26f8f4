"""Where an output came from, for catalogs: a run's events as OpenLineage JSON, a line each: --lineage FILE.

START is written before the first row, COMPLETE, FAIL or ABORT at the end; a run that is killed leaves a START alone.
See https://openlineage.io/spec/2-0-2/OpenLineage.json.
"""

import json
import logging
import os
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeAlias

import pyarrow as pa

from batchgen import __version__
from batchgen.errors import BatchgenError, OutputError
from batchgen.files import lock, read_object
from batchgen.options import say
from batchgen.output.place import output_errors
from batchgen.output.reading import output_files
from batchgen.output.store import is_address
from batchgen.plan import Plan

logger = logging.getLogger(__name__)

Object: TypeAlias = dict[str, object]

PRODUCER = f"pkg:pypi/batchgen-gpt2@{__version__}"
_SPEC = "https://openlineage.io/spec"
_CORE = f"{_SPEC}/2-0-2/OpenLineage.json#/$defs/"
# versions of the facets' schemas
_FACETS = {
    "DatasourceDatasetFacet": "1-0-1",
    "DatasetVersionDatasetFacet": "1-0-1",
    "SchemaDatasetFacet": "1-2-0",
    "InputStatisticsInputDatasetFacet": "1-0-0",
    "OutputStatisticsOutputDatasetFacet": "1-0-2",
    "ProcessingEngineRunFacet": "1-1-1",
    "ErrorMessageRunFacet": "1-0-1",
    "ParentRunFacet": "1-2-0",
    "JobTypeJobFacet": "2-0-4",
}
_TYPES = {"finished": "COMPLETE", "failed": "FAIL", "stopped": "ABORT"}  # of the event that ends a run, by its state
_OUTCOME = {  # fields of the status, and their names in the facet
    **{name: name for name in ("ok", "rejected", "failed", "dropped", "seconds")},
    **{"rows_done": "rowsDone", "rows_resumed": "rowsResumed", "exit_code": "exitCode"},
    **{"prompt_tokens": "promptTokens", "completion_tokens": "completionTokens"},
}
MOST_INPUTS = 1_000  # files that an event names
_MAX_LINE = 2**24


# ---- facets


def _facet(schema: str, **values: object) -> Object:
    """A facet of OpenLineage's, or one of our own, whose schema is that of any facet of a run."""
    url = f"{_SPEC}/facets/{_FACETS[schema]}/{schema}.json#/$defs/{schema}" if schema else f"{_CORE}RunFacet"
    return {"_producer": PRODUCER, "_schemaURL": url} | {key: value for key, value in values.items() if value != ""}


def name_dataset(where: str) -> tuple[str, str]:
    """Namespace and name: s3://bucket/a/b.jsonl -> ("s3://bucket", "a/b.jsonl"); a local path -> ("file", "/a/b")."""
    if not is_address(where):
        return "file", _text(os.path.abspath(where))
    scheme, _, rest = where.partition("://")
    bucket, _, key = rest.partition("/")
    return ("file", f"/{key}") if scheme == "file" else (f"{scheme}://{bucket}", key.strip("/") or "/")


def _text(text: str) -> str:
    """Text that UTF-8 can hold: a path may have other bytes."""
    return os.fsencode(text).decode("utf-8", "replace")


def _dataset(where: str, version: str, **facets: Object) -> Object:
    namespace, name = name_dataset(where)
    uri = "file:///" if namespace == "file" else namespace
    facets |= {
        "dataSource": _facet("DatasourceDatasetFacet", name=namespace, uri=uri),
        "version": _facet("DatasetVersionDatasetFacet", datasetVersion=version),
    }
    return {"namespace": namespace, "name": name, "facets": facets}


def _describe_plan(plan: Plan, output: str) -> Object:
    """What rows depend on."""
    return _facet(
        "",
        task=plan.task,
        model=_text(plan.model),
        modelHash=plan.model_hash,
        precision=plan.precision,
        parameters=plan.parameters.as_dict(),
        inputSha256=plan.input,
        inputFiles=len(plan.files) or 1,
        inputRows=len(plan.selection),
        seedBy=plan.seed_by,
        shard=plan.shard or "",
        digest=plan.digest,
        command=_text(plan.command_line(output)),
    )


def read_parent(text: str) -> Object:
    """The facet of the run that started this one: namespace/name/run id, in OPENLINEAGE_PARENT_ID; nothing if none."""
    found = re.fullmatch("([^/]+)/(.+)/([0-9a-fA-F-]{36})", text)
    if not found:
        return {}
    job = {"namespace": found[1], "name": found[2]}
    return {"parent": _facet("ParentRunFacet", run={"runId": found[3]}, job=job)}


# ---- events


@dataclass(slots=True)
class Lineage:
    """The events of one run."""

    path: Path
    plan: Plan
    output: str  # its path or address
    local: Path  # its path; of an address, the stand-in's
    inputs: Sequence[str]  # paths and addresses; none for standard input
    input_bytes: int
    schema: pa.Schema
    run: str = field(default_factory=lambda: str(uuid.uuid4()))
    _has_ended: bool = False

    def start(self) -> None:
        """Write START; OutputError if it cannot be written, before any work."""
        with output_errors(self.path, "choose another file, or correct that"):
            append_line(self.path, self._event("START", {}))

    def watch(self, status: Mapping[str, object]) -> None:
        """Called with each status of the run: the first that is not `running` is the end."""
        kind = _TYPES.get(str(status["state"]))
        if kind is None or self._has_ended:
            return
        try:
            append_line(self.path, self._event(kind, status))
        except (OSError, BatchgenError) as error:  # the output is not lost for it
            reason = getattr(error, "strerror", None) or error
            logger.warning("%s: the event %s of run %s cannot be written: %s", self.path, kind, self.run, reason)
        self._has_ended = True

    def _event(self, kind: str, status: Mapping[str, object]) -> Object:
        return {
            "eventTime": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "eventType": kind,
            "producer": PRODUCER,
            "schemaURL": f"{_CORE}RunEvent",
            "run": {"runId": self.run, "facets": self._run_facets(status)},
            "job": self._job(),
            "inputs": self._inputs(),
            "outputs": [self._output(status if kind == "COMPLETE" else {})],
        }

    def _run_facets(self, status: Mapping[str, object]) -> Object:
        facets = {
            "processing_engine": _facet("ProcessingEngineRunFacet", name="batchgen", version=__version__),
            "batchgen_plan": _describe_plan(self.plan, Path(self.output).name),
        } | read_parent(os.environ.get("OPENLINEAGE_PARENT_ID", ""))
        if status:
            outcome = {key: status[name] for name, key in _OUTCOME.items() if status.get(name) is not None}
            facets["batchgen_outcome"] = _facet("", **outcome)
        if error := status.get("error"):
            message = _text(str(error))
            facets["errorMessage"] = _facet("ErrorMessageRunFacet", message=message, programmingLanguage="PYTHON")
        return facets

    def _job(self) -> Object:
        """Its name is the output's: all attempts, and later runs, are runs of one job."""
        namespace = os.environ.get("OPENLINEAGE_NAMESPACE") or "batchgen"
        space, name = name_dataset(self.output)
        kind = _facet("JobTypeJobFacet", processingType="BATCH", integration="BATCHGEN", jobType="JOB")
        where = name if space == "file" else f"{space}/{name}"
        return {"namespace": namespace, "name": f"{self.plan.task}:{where}", "facets": {"jobType": kind}}

    def _inputs(self) -> list[Object]:
        versions = self.plan.files or (self.plan.input,)
        if len(versions) != len(self.inputs):  # standard input
            return []
        inputs = [_dataset(where, version) for where, version in zip(self.inputs, versions, strict=True)]
        if len(inputs) == 1:
            facet = _facet("InputStatisticsInputDatasetFacet", rowCount=self.plan.rows, size=self.input_bytes)
            inputs[0]["inputFacets"] = {"inputStatistics": facet}
        return inputs[:MOST_INPUTS]

    def _output(self, status: Mapping[str, object]) -> Object:
        """The output; its version is the plan's digest, because equal plans make equal rows."""
        fields = [{"name": one.name, "type": str(one.type)} for one in self.schema]
        output = _dataset(self.output, self.plan.digest, schema=_facet("SchemaDatasetFacet", fields=fields))
        if status:
            written = ("ok", "failed", *(("rejected", "dropped") if self.plan.rejects else ()))
            rows = sum(int(str(status.get(name) or 0)) for name in written)
            sizes = [] if is_address(self.output) else [os.stat(file).st_size for file in output_files(self.local)]
            values = {"size": sum(sizes), "fileCount": len(sizes)} if sizes else {}
            facet = _facet("OutputStatisticsOutputDatasetFacet", rowCount=rows, **values)
            output["outputFacets"] = {"outputStatistics": facet}
        return output


# ---- the file


def append_line(path: Path, event: Object) -> None:
    """Append an event; the file is locked meanwhile, because several runs may share it."""
    line = json.dumps(event, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    with open(descriptor, "r+b", buffering=0) as file:
        lock(file.fileno(), wait=True)
        size = file.seek(0, os.SEEK_END)
        if size and os.pread(descriptor, 1, size - 1) != b"\n":  # a writer was killed, or the disk was full
            line = b"\n" + line
        if file.write(line) != len(line):
            raise OSError(None, "no space left: only a part of the line was written")
        os.fsync(descriptor)


def check_lineage(path: Path) -> None:
    """Raise OutputError for what is no file of events, so that nothing else is added to."""
    if not path.exists():
        return
    with output_errors(path, "choose another file, or correct that"), open(path, "r+b") as file:
        first = file.readline(_MAX_LINE)
    if first.strip() and not {"eventTime", "schemaURL"} <= read_object(first).keys():
        raise OutputError(f"{say('lineage')} {path}: its first line is no event of OpenLineage; choose another name")
