"""Outputs: where the rows of a run go. One protocol, and the choice among its implementations."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeAlias

import pyarrow as pa

from batchgen.errors import UsageError
from batchgen.input.prompts import Facts, Prompts
from batchgen.job import Job, OutputOptions
from batchgen.options import say
from batchgen.output.dataset import Dataset
from batchgen.output.file import FileOutput, write_json_lines, write_parquet
from batchgen.output.ledger import Ledger, is_dataset, old_dataset
from batchgen.output.openai import answers_writer
from batchgen.output.place import is_json_lines
from batchgen.output.retried import RetriedFile
from batchgen.output.rows import Rows, Stored
from batchgen.output.schema import Columns, check_keep
from batchgen.output.store import is_address, open_store, parse_address
from batchgen.output.upload import DatasetUpload, FileUpload
from batchgen.plan import Plan
from batchgen.selection import Selection
from batchgen.text.tokenizer import Tokenizer
from batchgen.types import MEASURED

LoadTokenizer: TypeAlias = Callable[[], Tokenizer]


class Output(Protocol):
    """Where rows go. A run calls the methods in this order; at every instant the output is absent, old or complete."""

    @property
    def where(self) -> Path | str:
        """Its name for people: the path, or the address without keys."""

    @property
    def path(self) -> Path:
        """The work directory and the status file are beside it; for a store, a stand-in in work_dir."""

    @property
    def format(self) -> str:
        """What the plan says: parquet, jsonl or dataset."""

    def check(self) -> None:
        """Raise a BatchgenError for a place that cannot be written or must never be replaced; nothing stays changed."""

    def rows_to_do(self, selection: Selection) -> Rows:
        """The input rows to generate: these, or the failed ones of a finished output."""

    def stored(self) -> Stored | None:
        """What is there already, None if nothing; InputError if it is not a complete output of batchgen."""

    def columns(self, facts: Facts, plan: Plan, n_embd: int = 0) -> Columns:
        """The columns of every row, fixed before the first."""

    def claim(self, ledger: Ledger, plan: Plan, automatic: frozenset[str], restart: bool) -> Plan:
        """Hold the place, and adopt the plan or that of the run to resume; returns the plan that holds. See Ledger."""

    def publish(self, ledger: Ledger, plan: Plan, schema: pa.Schema, rows: int) -> None:
        """Make the committed parts the output, which must then hold so many rows."""


def work_folder(options: OutputOptions) -> Path:
    """The folder of the work directory: the output's own; for an address, work_dir or the current folder."""
    return (options.work_dir or Path()) if is_address(str(options.path)) else Path(options.path).parent


def local_path(options: OutputOptions) -> Path:
    """The output's path; for an address, its stand-in in work_dir."""
    text = str(options.path)
    if not is_address(text):
        return Path(text)
    return work_folder(options) / parse_address(text, dataset=options.format == "dataset").last


def _make_file(path: Path, options: OutputOptions, prompts: Prompts, load_tokenizer: LoadTokenizer) -> FileOutput:
    """A file output of the kind that the suffix, the input and the options ask for."""
    has_answers = prompts.openai and is_json_lines(path)
    if has_answers and prompts.options.keep:
        remedy = "name the output .parquet"
        raise UsageError(f"{say('keep')}: OpenAI's lines have no place for other columns; {remedy}")
    if has_answers:
        write = answers_writer(load_tokenizer)
    else:
        write = write_json_lines if is_json_lines(path) else write_parquet
    kind = RetriedFile if options.retry_failed else FileOutput
    return kind(path, prompts, write, has_answers)


def _open_local(text: str, options: OutputOptions, prompts: Prompts, load_tokenizer: LoadTokenizer) -> Output:
    path = Path(text)
    if options.work_dir is not None:
        remedy = "leave it out, or name s3://bucket/..."
        raise UsageError(f"{say('work_dir')}: a local output keeps its work beside it; {remedy}")
    if not path.name:
        raise UsageError(f"{say('output')} {text!r} is not a file name; name one, such as completions.parquet")
    was_dataset = is_dataset(path) or is_dataset(old_dataset(path))
    if not (options.format == "dataset" or text.endswith("/") or was_dataset):
        return _make_file(path, options, prompts, load_tokenizer)
    if options.retry_failed:
        what = "wants a finished .parquet file, and this is a dataset"
        raise UsageError(f"{path}: {say('retry_failed', True)} {what}")
    return Dataset(path, prompts)


def _open_upload(text: str, options: OutputOptions, prompts: Prompts, load_tokenizer: LoadTokenizer) -> Output:
    address = parse_address(text, dataset=options.format == "dataset")
    if options.retry_failed:
        what = f"{say('retry_failed', True)} is for an output that is a local file"
        remedy = "download the file, retry its rows there, and upload it"
        raise UsageError(f"{address.where}: {what}; {remedy}")
    path = local_path(options)
    store = open_store(address)
    if address.name:
        return FileUpload(_make_file(path, options, prompts, load_tokenizer), address, store)
    return DatasetUpload(Dataset(path, prompts), address, store)


def check_filters(options: OutputOptions, output: Output, prompts: Prompts) -> None:
    """Raise UsageError for what is decided when rows are merged, or for a column, if the output has no place for it."""
    drops = options.drop_duplicates if options.drop_duplicates in ("completion", "both") else None
    merging = [say("drop_duplicates", drops)] if drops else []
    merging += [] if options.rejects else [say("rejects", False)]
    if merging and output.format == "dataset":
        what = f"{merging[0]} is done when rows are merged into one file, and this is a dataset"
        raise UsageError(f"{output.where}: {what}; leave it out, or name a .parquet or .jsonl file")
    columns = [say(name, True) for name in MEASURED if getattr(options, name)]
    if prompts.openai and output.format == "jsonl" and (refused := [*merging, *columns]):
        what = f"{refused[0]}: OpenAI's lines, one for each request, have no place for it"
        raise UsageError(f"{output.where}: {what}; leave it out, or name the output .parquet")
    if prompts.openai and len(merging) == 2:
        what = f"an OpenAI request may have several prompts, and {merging[1]} hides which of them has which samples"
        raise UsageError(f"{output.where}: {merging[0]}: {what}; leave one of them out")


def open_output(job: Job, prompts: Prompts, load_tokenizer: LoadTokenizer) -> Output:
    """The output that the job asks for, after its check; BatchgenError if the place cannot be used."""
    check_keep(job.input.keep, Columns(kind=job.kind, answer=getattr(job.input, "answer_column", None) is not None))
    text = str(job.output.path)
    choose = _open_upload if is_address(text) else _open_local
    output = choose(text, job.output, prompts, load_tokenizer)
    check_filters(job.output, output, prompts)
    output.check()
    return output
