"""What is asked for: a job, made of a few small records, each checked when it is built. A job has no behaviour."""

from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from batchgen.errors import UsageError
from batchgen.options import (
    check_ranges,
    count,
    duration,
    flags_of,
    known_keywords,
    option,
    say,
    shown,
    size,
    split_keywords,
)
from batchgen.types import ENDS, IO, SAMPLING, Precision, ReadSpecial, SamplingParams

InputFormat = Literal["auto", "jsonl", "csv", "tsv", "parquet", "txt"]
Quotes = Literal["auto", "yes", "no"]
OnTooLong = Literal["reject", "truncate-left", "shorten"]
EmptyPrompt = Literal["reject", "unconditional"]
OutputFormat = Literal["file", "dataset"]
Backend = Literal["loky", "dask", "ray"]
Files: TypeAlias = str | Path | Sequence[str | Path]

DEFAULT_MODEL = "tales"
DEFAULT_ID_COLUMN = "id"  # may be absent; an id column that was asked for by name may not

PROMPTS, WORK, CLUSTER, RUN = "Prompts", "Work", "Cluster", "Run"
GROUPS = (IO, SAMPLING, ENDS, PROMPTS, WORK, CLUSTER, RUN)  # of options, in the order of --help

_INPUT = "Prompts: JSON lines, CSV or Parquet; files, globs, directories, s3:// and the like, or - (stdin)."
_OUTPUT = "Where to: .parquet or .jsonl, a folder, or either as s3:// and the like; - is JSON lines to stdout."
_FORMAT = "What the input is, whatever it is called; auto goes by the suffix."
_DELIMITER = "Between fields of CSV and TSV: tab, or a character; auto goes by the header."
_QUOTES = "Whether quotes enclose fields of CSV and TSV, or are text; auto: text between tabs."
_WORK_DIR = "Where the work of an output in an object store is kept; default: the current folder."
_BACKEND = "Workers of this machine, or those of a Dask or Ray cluster."
_SCHEDULER = "Dask's: tcp://HOST:8786, or its scheduler file (.json)."
_ADDRESS = "Ray's: HOST:6379, ray://HOST:10001; auto: the Ray cluster on this machine."
_ROW_TIMEOUT = "Treat a worker as hung after this long without progress: 30s, 10m (default)."
_SPECIAL_TOKENS = "Read <|endoftext|> and the like in prompts as tokens or as text; auto: as the model's tokenizer."
PRECISION_HELP = "Of the weights' products: float32, or int8 (less memory, faster); default: the model's own."
_TIME_LIMIT = "Stop in time, exit code 75: 50m, 7h30m; the same command resumes."


@known_keywords
@dataclass(frozen=True, slots=True)
class InputOptions:
    """Prompts to read: files, globs, directories, addresses, or - for standard input; and how to read their rows."""

    files: Files = option(MISSING, _INPUT, argument=True, metavar="INPUT...")
    prompt_column: str = option("prompt", "The column or key that holds the prompt.", IO)
    id_column: str = option(DEFAULT_ID_COLUMN, "The one that holds the row's id, if any.", IO)
    keep: tuple[str, ...] = option((), "A column to carry to the output; can be given again.", IO, metavar="COL")
    format: InputFormat = option(
        "auto", _FORMAT, IO, flag="--input-format", key="input_format", choices=get_args(InputFormat)
    )
    row_params: bool = option(True, "Use the parameters that rows have: max_tokens, seed and so on.", SAMPLING)
    delimiter: str = option("auto", _DELIMITER, IO, metavar="CHAR")
    quotes: Quotes = option("auto", _QUOTES, IO, choices=get_args(Quotes))

    def __post_init__(self) -> None:
        for name in ("files", "keep"):
            value = getattr(self, name)
            is_one = isinstance(value, str) or not isinstance(value, Iterable)
            object.__setattr__(self, name, (value,) if is_one else tuple(value))
        if self.delimiter in ("\t", "\\t"):  # a shell passes '\t' as two characters
            object.__setattr__(self, "delimiter", "tab")
        one = isinstance(self.delimiter, str) and len(self.delimiter) == 1 and self.delimiter not in '"\r\n\0\ufeff '
        if not one and self.delimiter not in ("auto", "tab"):
            raise UsageError(f"delimiter {shown(self.delimiter)} is out of range (auto, tab, or a character such as ;)")
        check_ranges(self)

    @property
    def names(self) -> tuple[str, ...]:
        """The files as they were named."""
        return (str(self.files),) if isinstance(self.files, str | Path) else tuple(map(str, self.files))


@known_keywords
@dataclass(frozen=True, slots=True)
class Policy:
    """What to do with prompts that do not fit the model as they are."""

    on_too_long: OnTooLong = option(
        "reject", "What to do with a row whose prompt + max_tokens exceed n_ctx.", PROMPTS, choices=get_args(OnTooLong)
    )
    empty_prompt: EmptyPrompt = option(
        "reject", "Reject it, or start from <|endoftext|>.", PROMPTS, choices=get_args(EmptyPrompt)
    )
    trim: bool = option(False, "Remove spaces at the prompt's end; GPT-2 continues badly from them.", PROMPTS, off=None)
    special_tokens: ReadSpecial = option("auto", _SPECIAL_TOKENS, PROMPTS, choices=get_args(ReadSpecial))

    def __post_init__(self) -> None:
        check_ranges(self)


@known_keywords
@dataclass(frozen=True, slots=True)
class OutputOptions:
    """Where rows go: a .parquet or .jsonl file, a dataset folder, or either in an object store."""

    path: str | Path = option(MISSING, _OUTPUT, IO, flag="--output", key="output", short="-o", metavar="OUTPUT")
    format: OutputFormat = option(
        "file",
        "One file, or a folder of Parquet parts.",
        IO,
        flag="--format",
        key="output_format",
        choices=get_args(OutputFormat),
    )
    token_ids: bool = option(False, "Add a column of the completion's token ids.", IO, flag="--output-token-ids")
    work_dir: Path | None = option(None, _WORK_DIR, IO, metavar="DIR")
    retry_failed: bool = option(False, "Generate the failed rows of a finished output again.", RUN, off=None)
    overwrite: bool = option(False, "Replace what is there, whatever made it.", RUN, off=None)
    status: bool = option(True, "Keep OUTPUT.status.json up to date, for machines.", RUN)

    def __post_init__(self) -> None:
        check_ranges(self)


@known_keywords
@dataclass(frozen=True, slots=True)
class WorkOptions:
    """Who does the work, how precisely, in what pieces, and for how long; None is automatic."""

    jobs: int | None = count("Worker processes; auto: one per core.", WORK, short="-j")
    batch_size: int | None = count("Sequences in flight in a worker.", WORK)
    chunk_rows: int | None = count("Input rows of one chunk, at most; 32 MiB of input end it too.", WORK)
    kv_bytes: int | None = size("Memory for the keys and values in a worker, such as 2G.", WORK, flag="--kv-memory")
    share_prefixes: bool = option(True, "Read prefixes that prompts share only once.", WORK)
    precision: Precision | None = option(None, PRECISION_HELP, IO, choices=get_args(Precision))
    backend: Backend = option("loky", _BACKEND, CLUSTER, choices=get_args(Backend))
    scheduler: str | None = option(None, _SCHEDULER, CLUSTER, metavar="ADDRESS")
    address: str | None = option(None, _ADDRESS, CLUSTER, metavar="ADDRESS")
    model_cache: Path | None = option(None, "Where each node keeps its own copy of the model.", CLUSTER, metavar="DIR")
    restart: bool = option(False, "Discard what an interrupted run did.", RUN, off="--resume")
    row_timeout: float | None = duration(_ROW_TIMEOUT, RUN)
    time_limit: float | None = duration(_TIME_LIMIT, RUN)

    def __post_init__(self) -> None:
        check_ranges(self)
        for name, backend in (("scheduler", "dask"), ("address", "ray")):
            if getattr(self, name) and self.backend != backend:
                raise UsageError(
                    f"{say(name)} names a {backend.title()} cluster, and this is {say('backend', self.backend)}; "
                    f"add {say('backend', backend)}"
                )
        if self.backend == "dask" and not self.scheduler:
            scheduler = say("scheduler", "tcp://HOST:8786")
            raise UsageError(f"{say('backend', 'dask')}: which cluster? give {scheduler}, or its scheduler file")
        if self.backend == "loky" and self.model_cache:
            remedy = f"add {say('backend', 'dask')} or {say('backend', 'ray')}"
            raise UsageError(f"{say('model_cache')} is for a cluster; {remedy}")


@known_keywords
@dataclass(frozen=True, slots=True)
class Job:
    """One run: complete every prompt of `input` into `output`; for both, a path or a string is enough.

    >>> Job("prompts.jsonl", "completions.parquet", sampling=SamplingParams(max_tokens=64))
    """

    input: InputOptions
    output: OutputOptions
    model: str = DEFAULT_MODEL
    sampling: SamplingParams = SamplingParams()
    policy: Policy = field(default_factory=Policy)
    work: WorkOptions = field(default_factory=WorkOptions)

    if TYPE_CHECKING:  # what __post_init__ accepts: dataclasses have no converters

        def __init__(
            self,
            input: InputOptions | Files,
            output: OutputOptions | str | Path,
            model: str | Path = ...,
            sampling: SamplingParams = ...,
            policy: Policy = ...,
            work: WorkOptions = ...,
        ) -> None: ...

    def __post_init__(self) -> None:
        for name, record in zip(_ATTRIBUTES, RECORDS, strict=True):
            value: object = getattr(self, name)
            if not isinstance(value, record) and record in (InputOptions, OutputOptions):
                object.__setattr__(self, name, record(value))  # type: ignore[arg-type]
            elif not isinstance(value, record):
                raise UsageError(f"{name} {shown(value)} is not a {record.__name__}; write {record.__name__}(...)")
        for path in (*self.input.files, self.output.path):  # type: ignore[misc]
            if not isinstance(path, str | PathLike):
                raise UsageError(f"{shown(path)} is not a path; give a string or a Path")
        object.__setattr__(self, "model", str(self.model))


_ATTRIBUTES = ("input", "output", "sampling", "policy", "work")
RECORDS = (InputOptions, OutputOptions, SamplingParams, Policy, WorkOptions)  # of a job, in the order of --help


def as_job(job: Job | Files, output: str | Path | None, options: dict[str, object]) -> Job:
    """A job, or one made of its input, its output, and options of its records by their names."""
    if isinstance(job, Job):
        if output is not None or options:
            more = ", ".join([*(["output"] if output is not None else []), *options])
            raise UsageError(f"a Job and {more} were given; put them into the Job, or give its input first")
        return job
    if output is None:
        raise UsageError("an input and no output was given; name a file: run_job('prompts.jsonl', 'out.parquet')")
    model = options.pop("model", DEFAULT_MODEL)
    reading, writing, sampling, policy, work = split_keywords(options, *RECORDS)
    return Job(
        InputOptions(job, **reading),  # type: ignore[arg-type]
        OutputOptions(output, **writing),  # type: ignore[arg-type]
        str(model),
        SamplingParams(**sampling),  # type: ignore[arg-type]
        Policy(**policy),  # type: ignore[arg-type]
        WorkOptions(**work),  # type: ignore[arg-type]
    )


FLAGS = flags_of(RECORDS) | {"model": ("--model", None)}  # for options.use_flags
