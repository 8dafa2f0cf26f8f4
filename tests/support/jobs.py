"""Jobs from flat keywords, as a command line has them: each goes to the record that has a field of this name."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from batchgen.job import DEFAULT_MODEL, RECORDS, Files, InputOptions, Job, OutputOptions, Policy, WorkOptions
from batchgen.options import options_of
from batchgen.types import SamplingParams

_ATTRIBUTES = {
    InputOptions: "input",
    OutputOptions: "output",
    SamplingParams: "sampling",
    Policy: "policy",
    WorkOptions: "work",
}
# keyword: the attribute of a job and the field of its record
_FIELDS = {
    declared.key or name: (_ATTRIBUTES[record], name)
    for record in RECORDS
    for name, declared in options_of(record).items()
} | {"input": ("input", "files")}


def make_job(
    input: Files,
    output: str | Path,
    model: str | Path = DEFAULT_MODEL,
    sampling: SamplingParams | None = None,
    **options: Any,
) -> Job:
    """make_job("p.jsonl", "o.parquet", jobs=1, keep=("a",), output_format="dataset"); by default it may replace."""
    return change(Job(input, output, str(model), sampling or SamplingParams()), **{"overwrite": True} | options)


def make_watched_job(folder: Path, model: Path, **options: Any) -> Job:
    """Five rows, of which one is rejected, from p.jsonl to c.parquet, which it may not replace."""
    lines = [json.dumps({"prompt": f"a {i}" * (i != 3)}) + "\n" for i in range(5)]
    (folder / "p.jsonl").write_text("".join(lines))
    options = {"jobs": 1, "overwrite": False} | options
    return make_job(folder / "p.jsonl", folder / "c.parquet", model, SamplingParams(max_tokens=4), **options)


def change_job(job: Job, **options: Any) -> Job:
    """The job with some options changed; `input` and `output` are the files and the path, `sampling` is a record."""
    records: dict[str, dict[str, Any]] = {}
    for name in options.keys() - {"model", "sampling"}:
        attribute, field = _FIELDS[name]
        records.setdefault(attribute, {})[field] = options.pop(name)
    job = replace(job, **options)
    return replace(job, **{name: replace(getattr(job, name), **changes) for name, changes in records.items()})


_OTHER_NAMES = {"files": "input", "out": "output", "params": "sampling"}


def change(job: Job, **options: Any) -> Job:
    """change_job with dataset=True, and with files, out and params for input, output and sampling."""
    if "dataset" in options:
        options["output_format"] = "dataset" if options.pop("dataset") else "file"
    return change_job(job, **{_OTHER_NAMES.get(name, name): value for name, value in options.items()})
