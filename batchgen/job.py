"""What is asked for: a job, made of a few small records, each checked when it is built. A job has no behaviour."""

from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias, get_args

from batchgen.errors import UsageError
from batchgen.options import (
    Shard,
    check_ranges,
    check_shard,
    count,
    duration,
    flags_of,
    known_keywords,
    option,
    parse_shard,
    rows,
    say,
    show_shard,
    shown,
    size,
    split_keywords,
)
from batchgen.types import (
    BEAMS,
    ENDS,
    IO,
    MAX_INT,
    MEASURED,
    PATTERNS,
    READING,
    SAMPLING,
    Kind,
    Precision,
    ReadSpecial,
    SamplingParams,
    Task,
)

InputFormat = Literal["auto", "jsonl", "csv", "tsv", "parquet", "txt"]
Quotes = Literal["auto", "yes", "no"]
OnTooLong = Literal["reject", "truncate-left", "shorten"]
EmptyPrompt = Literal["reject", "unconditional"]
OutputFormat = Literal["file", "dataset"]
Backend = Literal["loky", "dask", "ray"]
FirstToken = Literal["endoftext", "given"]
Pool = Literal["mean", "last"]
SeedBy = Literal["row", "id", "prompt"]
Duplicates = Literal["prompt", "completion", "both"]
Files: TypeAlias = str | Path | Sequence[str | Path]

DEFAULT_MODEL = "tales"
DEFAULT_PROMPT_COLUMN = "prompt"
DEFAULT_TEXT_COLUMN = "text"  # of what is scored or embedded without a prompt
DEFAULT_SHOTS_COLUMN, DEFAULT_SHOTS_END = "completion", "\n\n"
DEFAULT_ID_COLUMN = "id"  # may be absent; an id column that was asked for by name may not

SCORES, PROMPTS, WORK, CLUSTER, RUN = "Scores", "Prompts", "Work", "Cluster", "Run"
GROUPS = IO, SCORES, SAMPLING, PATTERNS, BEAMS, ENDS, PROMPTS, WORK, CLUSTER, RUN  # in the order of --help

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
_TEXT = "The column of a text without a prompt; `text` if no other column is named."
_FIRST_TOKEN = "Score a text's first token after <|endoftext|>, or begin with the second."
_STRIDE = "Of a text longer than n_ctx: tokens that each window scores; default: n_ctx."
_PER_TOKEN = "Add columns of each scored token: id, log-probability, rank."
_LAYER = "As in transformers' hidden_states: 0 is before the first block, -1 after ln_f."
_LIMIT = "Only the first N rows, after those that are skipped; default: all."
_SAMPLE = "Only N of these rows, drawn by --seed, in their order; default: all."
_SHARD = "This part of the rows: 3/8 is the third of eight; auto: this task of a Slurm array."
_SEED_BY = "What a row's random numbers depend on besides the seed: its number, its id, or its prompt's tokens."
_TEMPLATE = "Make the prompt from columns: 'Q: {question}\\nA:'; {a.b} is a key of an object, {{ is a brace."
_SHOTS = "Examples to put in front of every prompt: a file of the template's columns and a completion."
_SHOTS_COLUMN = "The column of --shots that holds an example's completion."
_SHOTS_END = "The text after each example; default: an empty line."
_DROP = "Of rows with the same prompt, or samples with the same completion, keep the first; others have status dropped."
_REUSE = "Copy rows from this older output if they would be the same; can be given again."
_LINEAGE = "Append the run's events to this file as OpenLineage JSON."
_METRICS = "Keep this file, such as status.prom, up to date for node_exporter's textfile collector."
_TIME_LIMIT = "Stop in time, exit code 75: 50m, 7h30m; the same command resumes."


@known_keywords
@dataclass(frozen=True, slots=True)
class InputOptions:
    """Prompts to read: files, globs, directories, addresses, or - for standard input; and how to read their rows."""

    files: Files = option(MISSING, _INPUT, argument=True, metavar="INPUT...")
    prompt_column: str = option(DEFAULT_PROMPT_COLUMN, "The column or key that holds the prompt.", IO)
    id_column: str = option(DEFAULT_ID_COLUMN, "The one that holds the row's id, if any.", IO)
    keep: tuple[str, ...] = option((), "A column to carry to the output; can be given again.", IO, metavar="COL")
    format: InputFormat = option(
        "auto", _FORMAT, IO, flag="--input-format", key="input_format", choices=get_args(InputFormat)
    )
    row_params: bool = option(True, "Use the parameters that rows have: max_tokens, seed and so on.", SAMPLING)
    delimiter: str = option("auto", _DELIMITER, IO, metavar="CHAR")
    quotes: Quotes = option("auto", _QUOTES, IO, choices=get_args(Quotes))
    skip_rows: int = option(0, "Leave out the first N rows.", IO, metavar="N", within=(0, 10**18, "0 or more"))
    limit: int | None = rows(_LIMIT, IO)
    sample: int | None = rows(_SAMPLE, IO)
    shard: Shard | None = option(None, _SHARD, IO, metavar="K/N", parse=parse_shard, show=show_shard)
    seed_by: SeedBy = option("row", _SEED_BY, SAMPLING, choices=get_args(SeedBy))
    template: str | None = option(None, _TEMPLATE, PROMPTS, metavar="TEXT", escaped=True)
    template_file: Path | None = option(None, "The same, read from a file, without escapes.", PROMPTS, metavar="FILE")
    shots: str | None = option(None, _SHOTS, PROMPTS, metavar="FILE")
    n_shots: int | None = rows("Only N examples of --shots, drawn by --seed; default: all.", PROMPTS)
    shots_column: str = option(DEFAULT_SHOTS_COLUMN, _SHOTS_COLUMN, PROMPTS, metavar="COL")
    shots_end: str = option(DEFAULT_SHOTS_END, _SHOTS_END, PROMPTS, metavar="TEXT", escaped=True)

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
        check_shard(self.shard)
        _check_prompts(self)

    @property
    def names(self) -> tuple[str, ...]:
        """The files as they were named."""
        return (str(self.files),) if isinstance(self.files, str | Path) else tuple(map(str, self.files))


def _check_prompts(options: InputOptions) -> None:
    """Raise UsageError if the options about what prompts are made of contradict, or if one has no effect."""
    template: object = options.template
    if template is not None and not isinstance(template, str):
        raise UsageError(f"template {shown(template)} is not a string; write 'Q: {{question}}'")
    if template is not None and options.template_file is not None:
        raise UsageError(f"{say('template')} and {say('template_file')} were given; leave one out")
    made = "template_file" if template is None else "template"
    is_named = options.prompt_column not in (DEFAULT_PROMPT_COLUMN, getattr(options, "text_column", None))
    if is_named and getattr(options, made) is not None:
        remedy = f"write {{{options.prompt_column}}} in the template, and leave it out"
        raise UsageError(f"{say(made)} makes the prompt, and {say('prompt_column')} names one; {remedy}")
    shots: object = options.shots
    if isinstance(shots, PathLike):
        object.__setattr__(options, "shots", str(shots))
    elif shots is not None and (not isinstance(shots, str) or shots in ("", "-")):
        raise UsageError(f"{say('shots')} {shown(shots)} is no file of examples; name one")
    for name, default in (("n_shots", None), ("shots_column", DEFAULT_SHOTS_COLUMN), ("shots_end", DEFAULT_SHOTS_END)):
        if shots is None and getattr(options, name) != default:
            raise UsageError(f"{say(name)} is about examples, and there are none; add {say('shots')}")


@dataclass(frozen=True, slots=True)
class ScoreOptions:
    """What is wanted of texts: the log-probabilities of their tokens."""

    task: ClassVar[Task] = "score"
    first_token: FirstToken = option("endoftext", _FIRST_TOKEN, SCORES, choices=get_args(FirstToken))
    stride: int | None = count(_STRIDE, SCORES)
    per_token: bool = option(False, _PER_TOKEN, SCORES, off=None)
    kind: Kind = "text"  # of the rows; a job has it of its input

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True, slots=True)
class EmbedOptions:
    """What is wanted of texts: a vector of n_embd numbers."""

    task: ClassVar[Task] = "embed"
    kind: ClassVar[Kind] = "embed"
    layer: int = option(-1, _LAYER, SCORES, within=(-MAX_INT, MAX_INT, "-(n_layer + 1) to n_layer"))
    pool: Pool = option("mean", "The mean of all positions, or the last one.", SCORES, choices=get_args(Pool))

    def __post_init__(self) -> None:
        check_ranges(self)


TaskOptions: TypeAlias = ScoreOptions | EmbedOptions


def kind_of(completion_column: str | None, choices_column: str | None) -> Kind:
    """What there is to score in rows with these columns."""
    return "choices" if choices_column else "completion" if completion_column else "text"


def with_kind(task: ScoreOptions, kind: Kind) -> ScoreOptions:
    """The options for rows of this kind; UsageError for one that means nothing to them."""
    for name in ("stride", "first_token"):
        default = getattr(ScoreOptions(), name)
        if kind != "text" and (value := getattr(task, name)) != default:
            raise UsageError(f"{say(name, value)} is about a text that is scored alone; leave it out")
    return replace(task, kind=kind)


def _fit_kind(task: TaskOptions, kind: Kind) -> TaskOptions:
    """The task of an input with rows of this kind; UsageError if it has none."""
    if isinstance(task, ScoreOptions):
        return with_kind(task, kind)
    if not isinstance(task, EmbedOptions):
        raise UsageError(f"task {shown(task)} is none; write ScoreOptions(...) or EmbedOptions(...)")
    if kind != "text":
        raise UsageError(f"{say(f'{kind}_column')} names what is scored, and texts are embedded; leave it out")
    return task


@known_keywords
@dataclass(frozen=True, slots=True)
class ScoreInput(InputOptions):
    """Rows to score or to embed: a text alone, a prompt with its completion, or a prompt with its choices."""

    row_params: bool = False  # they are about what is generated
    text_column: str | None = option(None, _TEXT, IO)
    completion_column: str | None = option(None, "The column that holds the prompt's completion.", IO)
    choices_column: str | None = option(None, "The one that holds the prompt's choices, a list of strings.", IO)
    answer_column: str | None = option(None, "The one that says which choice is right: its index or its text.", IO)
    task: TaskOptions = ScoreOptions()

    def __post_init__(self) -> None:
        InputOptions.__post_init__(self)
        for name in ("text_column", "completion_column", "choices_column", "answer_column"):
            if getattr(self, name) == "":  # of a shell's variable that is not set: another column would be scored
                raise UsageError(f"{say(name)} is empty; name a column, or leave it out")
        targets = [name for name in ("completion_column", "choices_column") if getattr(self, name)]
        if len(targets) + bool(self.text_column) > 1:
            both = " and ".join(say(name) for name in ("text_column", *targets) if getattr(self, name))
            raise UsageError(f"{both} were given, and a row has one thing to score; leave one out")
        if self.answer_column and not self.choices_column:
            raise UsageError(
                f"{say('answer_column')} names the right one of several choices; add {say('choices_column')}"
            )
        if not targets and self.prompt_column not in (DEFAULT_PROMPT_COLUMN, self.text_column):
            remedy = f"add {say('completion_column')} or {say('choices_column')}, or name {say('text_column')} instead"
            raise UsageError(f"{say('prompt_column')} names what is before a completion or choices; {remedy}")
        is_made = self.template is not None or self.template_file is not None
        if is_made and self.text_column not in (None, DEFAULT_TEXT_COLUMN):
            remedy = f"write {{{self.text_column}}} in it, and leave {say('text_column')} out"
            raise UsageError(f"{say('template')} makes the text, and {say('text_column')} names one; {remedy}")
        if self.shots is not None and not targets:
            remedy = f"add {say('completion_column')} or {say('choices_column')}, or leave it out"
            raise UsageError(f"{say('shots')} puts examples before a prompt, and a text has none; {remedy}")
        if not targets:
            object.__setattr__(self, "text_column", self.text_column or DEFAULT_TEXT_COLUMN)
            object.__setattr__(self, "prompt_column", self.text_column)
        object.__setattr__(self, "task", _fit_kind(self.task, self.kind))

    @property
    def kind(self) -> Kind:
        """What there is to score in a row."""
        return kind_of(self.completion_column, self.choices_column)


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
    mean_logprob: bool = option(False, "Add a column: the mean log-probability of the tokens.", IO, off=None)
    repetition: bool = option(False, "Add a column: the share of 4-grams that occurred before.", IO, off=None)
    drop_duplicates: Duplicates | None = option(None, _DROP, IO, choices=get_args(Duplicates))
    rejects: bool = option(True, "Give rejected and dropped rows an output row too.", IO)
    work_dir: Path | None = option(None, _WORK_DIR, IO, metavar="DIR")
    retry_failed: bool = option(False, "Generate the failed rows of a finished output again.", RUN, off=None)
    overwrite: bool = option(False, "Replace what is there, whatever made it.", RUN, off=None)
    status: bool = option(True, "Keep OUTPUT.status.json up to date, for machines.", RUN)
    lineage: Path | None = option(None, _LINEAGE, RUN, metavar="FILE")
    metrics: Path | None = option(None, _METRICS, RUN, metavar="FILE")

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
    reuse: tuple[str, ...] = option((), _REUSE, WORK, metavar="OLD")
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
    """One run: complete every prompt of `input` into `output`, or score or embed the rows of a ScoreInput.

    For both, a path or a string is enough.

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
        if self.task:
            object.__setattr__(self, "sampling", READING)
            for name, field_name, value in _NOT_OF[self.task.task]:
                if getattr(getattr(self, name), field_name) == value:
                    what = say(field_name, value)
                    raise UsageError(f"{what} is about completions that are generated; leave it out")
            if self.work.reuse:
                raise UsageError(f"{say('reuse')} copies completions that are generated; leave it out")

    @property
    def task(self) -> TaskOptions | None:
        """What is done with each row; None: it is completed, as `sampling` says."""
        return self.input.task if isinstance(self.input, ScoreInput) else None

    @property
    def kind(self) -> Kind:
        return self.task.kind if self.task else "generate"


# options that mean nothing to some tasks: the record of a job, the field, the value
_OF_GENERATION = (
    ("policy", "on_too_long", "shorten"),
    *(("output", name, True) for name in ("token_ids", *MEASURED)),
    *(("output", "drop_duplicates", value) for value in get_args(Duplicates)),
)
_NOT_OF = {
    "embed": _OF_GENERATION,
    "score": (*_OF_GENERATION, ("policy", "empty_prompt", "unconditional"), ("policy", "trim", True)),
}

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
    model, task = options.pop("model", DEFAULT_MODEL), options.pop("task", None)
    if task is None:
        reading, writing, sampling, policy, work = split_keywords(options, *RECORDS)
        input = InputOptions(job, **reading)  # type: ignore[arg-type]
    else:
        reading, writing, policy, work = split_keywords(options, ScoreInput, OutputOptions, Policy, WorkOptions)
        input, sampling = ScoreInput(job, **reading, task=task), {}  # type: ignore[arg-type]
    return Job(
        input,
        OutputOptions(output, **writing),  # type: ignore[arg-type]
        str(model),
        SamplingParams(**sampling),  # type: ignore[arg-type]
        Policy(**policy),  # type: ignore[arg-type]
        WorkOptions(**work),  # type: ignore[arg-type]
    )


_FLAGS_OF = (*RECORDS, ScoreInput, ScoreOptions, EmbedOptions)
FLAGS = flags_of(_FLAGS_OF) | {"model": ("--model", None)}  # for options.use_flags
