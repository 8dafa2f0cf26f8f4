"""The metrics of a run for Prometheus, as the textfile collector of node_exporter reads them: --metrics FILE.prom.

The file is replaced as a whole with the status file's rhythm, and once more at the end. Every series has the output as
a label: the files of several jobs may then stand in one folder of the collector, which refuses a series that is there
twice.
"""

import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import cast

from batchgen import __version__
from batchgen.errors import OutputError, UsageError
from batchgen.files import replacing
from batchgen.job import Job
from batchgen.options import say
from batchgen.output.outputs import local_path
from batchgen.output.place import output_errors, refuse_in_the_way
from batchgen.output.store import is_address, parse_address
from batchgen.types import STATUSES, task_of

logger = logging.getLogger(__name__)

SUFFIX = ".prom"  # the collector reads no other file
STATES = ("running", "finished", "stopped", "failed")
SUCCESS_CODES = (0, 3)  # rows are there, and the output is complete
_START = b"# HELP batchgen_"
_LAST_SUCCESS = re.compile(r"^batchgen_last_success_timestamp_seconds\{.*\} ([0-9.e+]+)$", re.MULTILINE)

# name without its prefix: help, key of the status; a name that ends in _total is a counter's, else a gauge's
_NUMBERS = {
    "input_rows": ("Input rows that the run is to do.", "rows"),
    "input_rows_done": ("Input rows that are done, also by earlier attempts.", "rows_done"),
    "input_rows_resumed": ("Input rows that earlier attempts had done.", "rows_resumed"),
    "prompt_tokens_total": ("Prompt tokens read in this attempt.", "prompt_tokens"),
    "completion_tokens_total": ("Tokens generated or scored in this attempt.", "completion_tokens"),
    "tokens_per_second": ("Mean speed of this attempt.", "tokens_per_second"),
    "run_duration_seconds": ("Time of this attempt.", "seconds"),
    "eta_seconds": ("Time left, estimated; absent if not known.", "eta_seconds"),
    "exit_code": ("Exit code of the run; absent while it runs.", "exit_code"),
    "start_timestamp_seconds": ("When this attempt was started.", "started"),
    "updated_timestamp_seconds": ("When this file was written.", "now"),
    "last_success_timestamp_seconds": ("When a run last ended with exit code 0 or 3.", "succeeded"),
}
_COUNTERS = {key for name, (_, key) in _NUMBERS.items() if name.endswith("_total")}


# ---- the text format


def quote(text: str) -> str:
    r"""A label's value: `a"b` -> `"a\"b"`; bytes of a path that are not UTF-8 become U+FFFD."""
    text = os.fsencode(text).decode("utf-8", "replace")
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def _series(name: str, labels: Mapping[str, str], value: float) -> str:
    pairs = ",".join(f"{key}={quote(text)}" for key, text in labels.items())
    return f"batchgen_{name}{{{pairs}}} {value}"


def to_text(labels: Mapping[str, str], status: Mapping[str, object], now: float, succeeded: float | None) -> str:
    """All series of a status, as far as it has them; labels has `output`, and what batchgen_info has besides."""
    own, started = {"output": labels["output"]}, status.get("started")
    start = datetime.fromisoformat(started).timestamp() if isinstance(started, str) else None
    values = {**status, "started": start, "now": now, "succeeded": succeeded}
    states = [(own | {"state": one}, int(one == status.get("state"))) for one in STATES]
    families: dict[tuple[str, str], Sequence[tuple[Mapping[str, str], object]]] = {
        ("info", "What the run makes, and with what; always 1."): [(labels, 1)],
        ("run_state", "1 for the state in which the run is."): states,
        ("rows", "Output rows that are committed, by status."): [
            (own | {"status": one}, status.get(one)) for one in STATUSES
        ],
        **{(name, text): [(own, values.get(key))] for name, (text, key) in _NUMBERS.items()},
    }
    lines: list[str] = []
    for (name, text), series in families.items():
        known = [_series(name, pairs, value) for pairs, value in series if isinstance(value, int | float)]
        if known:
            kind = "counter" if name.endswith("_total") else "gauge"
            lines += [f"# HELP batchgen_{name} {text}", f"# TYPE batchgen_{name} {kind}", *known]
    return "\n".join(lines) + "\n"


# ---- the file


def check_metrics(path: Path) -> None:
    """Raise a BatchgenError for a file that the collector would not read, or that is not batchgen's to replace."""
    if path.suffix != SUFFIX:
        what = f"does not end in {SUFFIX}, and node_exporter reads no other file"
        raise UsageError(f"{say('metrics')} {path}: {what}; name it so")
    if path.is_symlink():
        raise OutputError(f"{say('metrics')} {path}: a symbolic link, which would be replaced; choose another name")
    with output_errors(path, "choose another name"):
        start = path.read_bytes()[: len(_START)] if path.exists() else b""
    if start and not start.startswith(_START):
        what = "a file that batchgen did not write; choose another name, or move it away"
        raise OutputError(f"{say('metrics')} {path}: {what}")


def _read_last_success(path: Path) -> float | None:
    """When a run last succeeded, as an earlier run's metrics say; a failure does not change it."""
    try:
        found = _LAST_SUCCESS.search(path.read_text("utf-8", "replace"))
        return float(found[1]) if found else None
    except (OSError, ValueError):
        return None


@dataclass(slots=True)
class MetricsFile:
    """Writes one run's metrics. If they cannot be written, that is logged once, and the next writing is tried again."""

    path: Path
    labels: Mapping[str, str]
    succeeded: float | None = None
    _counted: dict[str, int] = field(default_factory=dict)  # the highest value of each counter, which never goes down
    _has_failed: bool = field(default=False)

    @classmethod
    def open(cls, job: Job) -> "MetricsFile":
        """For a job with the option, after its check."""
        path, text = Path(job.output.metrics or ""), str(job.output.path)
        where = parse_address(text, dataset=True).where if is_address(text) else os.path.abspath(text)
        labels = {"output": where, "model": job.model, "task": task_of(job.kind), "version": __version__}
        return cls(path, labels, _read_last_success(path))

    def write(self, status: Mapping[str, object]) -> None:
        """Replace the file by what a status says, readable by the collector, which is another user."""
        now = round(time.time(), 3)
        if status.get("state") == "finished" and status.get("exit_code") in SUCCESS_CODES:
            self.succeeded = now
        for key in _COUNTERS & status.keys():  # tokens of rows that then failed are in no row at the end
            self._counted[key] = max(self._counted.get(key, 0), cast(int, status[key]))
        try:
            with replacing(self.path, durable=False) as file:
                os.fchmod(file.fileno(), 0o644)
                file.write(to_text(self.labels, {**status, **self._counted}, now, self.succeeded).encode())
        except OSError as error:
            if not self._has_failed:
                logger.warning("%s: the metrics cannot be written: %s", self.path, error.strerror or error)
            self._has_failed = True


def write_metrics(job: Job, status: Mapping[str, object]) -> None:
    """Write the metrics of a run that had nothing to watch, if the job wants them and they may be written."""
    path = Path(job.output.metrics or "")
    if job.output.metrics and path.parent.is_dir():
        inputs = [Path(name) for name in job.input.names if not is_address(name)]
        refuse_in_the_way("metrics", path, local_path(job.output), inputs)
        check_metrics(path)
        MetricsFile.open(job).write(status)
