"""The plan: all that the rows of an output depend on, as one record that travels with them."""

import dataclasses
import hashlib
import json
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Any

from batchgen.files import parse_json
from batchgen.job import (
    DEFAULT_PROMPT_COLUMN,
    DEFAULT_SHOTS_COLUMN,
    DEFAULT_SHOTS_END,
    EmbedOptions,
    InputOptions,
    OutputOptions,
    Policy,
    ScoreInput,
    ScoreOptions,
    SeedBy,
    TaskOptions,
    WorkOptions,
    kind_of,
)
from batchgen.options import arguments, flag_of, options_of, parse_shard, with_value, words_of
from batchgen.types import MEASURED, Ids, Kind, Precision, SamplingParams, Task

if TYPE_CHECKING:
    from batchgen.selection import Selection

_LATER = {"regex", "llguidance"}  # versions that some plans lack: they are empty then, and agree with anything
_DEFAULTS = SamplingParams().as_dict()
# parameters that older plans lack, with the values that change nothing
_NEWER = dict([*_DEFAULTS.items()][[*_DEFAULTS].index("skip_special_tokens") + 1 :])
_OLDER = {"blas", "numpy_kernels"}  # fields that older plans have: what decided how a sum was rounded


def differs(name: str, a: object, b: object) -> bool:
    """Whether two plans differ in a field that is `a` in one and `b` in the other."""
    return a != b and not (name in _LATER and "" in (a, b))


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What every row depends on, and nothing else: equal plans give equal rows, bit for bit."""

    batchgen: str  # version
    input: str  # SHA-256; see input/prompts.py
    input_formats: tuple[str, ...]  # of each file; one for all if they agree
    rows: int  # of the input
    prompt_column: str
    id_column: str
    keep: tuple[str, ...]
    row_params: bool
    model: str
    model_hash: str
    parameters: SamplingParams
    on_too_long: str
    empty_prompt: str
    trim: bool
    format: str  # of the output: parquet, jsonl or dataset
    token_ids: bool
    chunk_rows: int
    batch_size: int
    kv_bytes: int
    share_prefixes: bool
    retry: bool = False  # of the failed rows of a finished output
    special_tokens: str = "auto"
    delimiter: str = "auto"
    quotes: str = "yes"  # of plans from before this option
    files: tuple[str, ...] = ()  # of several input files, 16 digits of the SHA-256 of each, folders included
    regex: str = ""  # version: its Unicode tables decide tokens
    llguidance: str = ""  # version, if the run has a pattern: it decides which tokens may come
    precision: Precision = "float32"
    task: Task = "generate"
    text_column: str | None = None  # these four: see ScoreInput
    completion_column: str | None = None
    choices_column: str | None = None
    answer_column: str | None = None
    first_token: str | None = None  # these three: see ScoreOptions
    stride: int | None = None
    per_token: bool = False
    layer: int | None = None  # these two: see EmbedOptions
    pool: str | None = None
    skip_rows: int = 0  # these four: see selection.py
    limit: int | None = None
    sample: int | None = None
    shard: str | None = None  # 3/8
    seed_by: SeedBy = "row"
    template: str | None = None
    shots: str | None = None  # 16 digits of the SHA-256 of what stands before every prompt
    n_shots: int | None = dataclasses.field(default=None, compare=False)  # these three are in `shots`
    shots_column: str = dataclasses.field(default=DEFAULT_SHOTS_COLUMN, compare=False)
    shots_end: str = dataclasses.field(default=DEFAULT_SHOTS_END, compare=False)
    mean_logprob: bool = False  # these four: see OutputOptions
    repetition: bool = False
    drop_duplicates: str | None = None
    rejects: bool = True
    # 16 digits of the SHA-256 of each older output that rows may be copied from, which changes chunks and no row
    reuse: tuple[str, ...] = dataclasses.field(default=(), compare=False)
    portable: bool = dataclasses.field(default=False, compare=False)  # equal bits on any processor: since 0.3.0
    numpy: str = dataclasses.field(default="", compare=False)  # versions that change no row
    python: str = dataclasses.field(default="", compare=False)
    pyarrow: str = dataclasses.field(default="", compare=False)
    names: tuple[str, ...] = dataclasses.field(default=(), compare=False)  # of the input's files now; never stored

    # ---- JSON

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values: lists for tuples, an object for the parameters, batch_invariant for readers."""
        pairs = ((field, getattr(self, field.name)) for field in fields(self) if field.name != "names")
        values = {field.name: value for field, value in pairs if value != field.default}
        values |= {"parameters": self.parameters.as_dict()}
        if self.portable:
            values |= {"batch_invariant": True, "precision": self.precision}
        plain: dict[str, Any] = json.loads(json.dumps(values))
        return plain

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Plan":
        """The reverse of to_json; ValueError for a wrong field, UsageError for a value that no option may have."""
        names = {field.name for field in fields(cls)} - {"names"}
        values = {name: value for name, value in values.items() if name not in {*_OLDER, "batch_invariant"}}
        if unknown := sorted(values.keys() - names):
            raise ValueError(f"{unknown[0]!r} is not known here")
        if missing := sorted({field.name for field in fields(cls) if field.default is MISSING} - values.keys()):
            raise ValueError(f"{missing[0]!r} is missing")
        given = values | {"parameters": read_parameters(values["parameters"])}
        for field in fields(cls):
            if field.name not in given:
                continue
            if str(field.type).startswith("tuple"):
                given[field.name] = _texts(field.name, given[field.name])
            elif isinstance(field.type, type) and type(given[field.name]) is not field.type:
                raise ValueError(f"{field.name} is not of type {field.type.__name__}")
        plan = cls(**given)
        plan._input(), plan.policy(), plan._work(), plan.options()  # checked as the records that they are
        return plan

    @property
    def digest(self) -> str:
        """16 hex digits: each part holds those of the plan that it was made by, also if older plans have it."""
        values = self.to_json()
        for name, value in _NEWER.items():
            if getattr(self.parameters, name) == value:
                del values["parameters"][name]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

    # ---- comparing

    def conflict(self, other: "Plan", automatic: Iterable[str] = ()) -> str | None:
        """All that differs in `other`, in the words of the command line; None if both make the same rows.

        automatic names fields of `other` that nobody asked for: they agree with anything.
        """
        free = set(automatic)
        names = [field.name for field in fields(self) if field.compare and field.name not in free]
        values = {name: (getattr(self, name), getattr(other, name)) for name in names}
        differing = {name for name, (a, b) in values.items() if differs(name, a, b)}
        differing -= {name for cause in differing for name in _IMPLIED.get(cause, ())}
        pairs = [pair for name in names if name in differing - {"input"} for pair in _pairs(name, self, other)]
        parts = [_changed_input(self, other)] if "input" in differing else []
        if "input_formats" in differing and len(self.input_formats) + len(other.input_formats) > 2:
            parts.append(_changed_formats(self, other))
            pairs = [pair for pair in pairs if pair[0] != "input_formats"]
        if "shots" in differing:
            parts.append(_changed_shots(self, other))
            pairs = [pair for pair in pairs if pair[0] != "shots"]
        if pairs:
            had, has = (", ".join(_named(pair[0], pair[i]) for pair in pairs) for i in (1, 2))
            parts.append(f"it had {had}, and this has {has}")
        return "; ".join(parts) or None

    # ---- the command

    def command_line(self, output: str | None = None) -> str:
        """The command that makes the output of INPUT and SHOTS, quoted for a shell; parsed, it gives an equal plan."""
        output = output or ("completions" if self.format == "dataset" else f"completions.{self.format}")
        words = ["batchgen", self.task, "INPUT", *with_value("-o", output), *with_value("--model", self.model)]
        words += arguments(self._input(), ("prompt_column",) if self.text_column else ())  # it is that column
        for record in (self._output(), self.options() or self.parameters, self.policy(), self._work()):
            words += arguments(record)
        return shlex.join(words)

    def _input(self) -> InputOptions:
        formats = set(self.input_formats)
        options: dict[str, Any] = {
            "id_column": self.id_column,
            "keep": self.keep,
            "format": next(iter(formats)) if len(formats) == 1 else "auto",
            "delimiter": self.delimiter,
            "quotes": self.quotes if formats & {"csv", "tsv"} else "auto",
            **{name: getattr(self, name) for name in ("skip_rows", "limit", "sample", "seed_by", "template")},
            "shard": parse_shard(self.shard) if self.shard else None,
        }
        if self.shots:
            options |= {"shots": "SHOTS", **{name: getattr(self, name) for name in _OF_SHOTS}}
        if self.task == "generate":
            return InputOptions((), self.prompt_column, row_params=self.row_params, **options)
        columns = {name: getattr(self, name) for name in _SCORE_COLUMNS}
        return ScoreInput((), DEFAULT_PROMPT_COLUMN if self.text_column else self.prompt_column, **columns, **options)

    @property
    def selection(self) -> "Selection":
        """The rows of the input that the output holds."""
        from batchgen.selection import select_rows  # with NumPy, which a command's options do not need

        shard = parse_shard(self.shard) if self.shard else None
        seed = self.parameters.seed
        return select_rows(self.rows, self.skip_rows, self.limit, self.sample, seed=seed, shard=shard)

    def read_own(self, text: str | None) -> tuple[SamplingParams, Ids]:
        """A row's parameters, and the ids that it was given as, of its column `parameters`.

        ValueError, TypeError, RecursionError or UsageError says what is wrong there.
        """
        values = {} if text is None else parse_json(text)
        if not isinstance(values, dict):
            raise ValueError("not an object")
        ids = values.pop("prompt_token_ids", None)
        if ids is not None and not (isinstance(ids, list) and ids and all(type(token) is int for token in ids)):
            raise ValueError("prompt_token_ids are not token ids")
        return read_parameters(self.parameters.as_dict() | values) if values else self.parameters, tuple(ids or ())

    def drops(self, what: str) -> bool:
        """Whether rows that repeat a prompt, or a completion, are dropped."""
        return self.drop_duplicates in (what, "both")

    def rules(self) -> tuple[Policy, TaskOptions | None, SeedBy, tuple[str, ...]]:
        """How requests become tokenized ones: the arguments of make_check after those of the model."""
        return self.policy(), self.options(), self.seed_by, self.measured

    @property
    def measured(self) -> tuple[str, ...]:
        """Of MEASURED, what was asked for."""
        return tuple(name for name in MEASURED if getattr(self, name))

    @property
    def is_part(self) -> bool:
        """Whether some rows of the input may be left to others."""
        return bool(self.skip_rows) or (self.limit, self.sample, self.shard) != (None, None, None)

    @property
    def kind(self) -> Kind:
        return kind_of(self.completion_column, self.choices_column) if self.task == "score" else self.task

    def options(self) -> TaskOptions | None:
        """What was done with the rows; None: they were completed."""
        if self.task == "score":
            return ScoreOptions(self.first_token or "endoftext", self.stride, self.per_token, self.kind)  # type: ignore[arg-type]
        return EmbedOptions(self.layer or 0, self.pool or "mean") if self.task == "embed" else None  # type: ignore[arg-type]

    def policy(self) -> Policy:
        """What was done with prompts that do not fit the model."""
        return Policy(self.on_too_long, self.empty_prompt, self.trim, self.special_tokens)  # type: ignore[arg-type]

    def _output(self) -> OutputOptions:
        """Without the path, which `arguments` leaves out as the default of nothing."""
        return OutputOptions(
            MISSING,  # type: ignore[arg-type]
            format="dataset" if self.format == "dataset" else "file",
            token_ids=self.token_ids,
            **{name: getattr(self, name) for name in _OF_OUTPUT},
            retry_failed=self.retry,
        )

    def _work(self) -> WorkOptions:
        return WorkOptions(
            batch_size=self.batch_size,
            chunk_rows=self.chunk_rows,
            kv_bytes=self.kv_bytes,
            share_prefixes=self.share_prefixes,
            precision=self.precision,
        )


_OF_SHOTS = ("n_shots", "shots_column", "shots_end")
_OF_OUTPUT = ("mean_logprob", "repetition", "drop_duplicates", "rejects")
_SCORE_COLUMNS = ("text_column", "completion_column", "choices_column", "answer_column")


def task_fields(input: InputOptions, task: TaskOptions | None) -> dict[str, Any]:
    """The fields of a plan that say what is done with rows; none if they are completed."""
    if task is None:
        return {}
    columns = {name: getattr(input, name) for name in _SCORE_COLUMNS}
    return {"task": task.task, **columns, **{name: getattr(task, name) for name in options_of(task)}}


def read_parameters(values: object) -> SamplingParams:
    """SamplingParams from JSON values; ValueError names what is not a parameter, UsageError a value out of range."""
    if not isinstance(values, Mapping):
        raise ValueError("'parameters' is not an object")
    if unknown := sorted(values.keys() - {field.name for field in fields(SamplingParams)}):
        raise ValueError(f"the parameter {unknown[0]!r} is not known here")
    return SamplingParams(**values)


def _texts(name: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{name} is not a list of strings")
    return tuple(value)


# what differs because something else does
_IMPLIED: dict[str, tuple[str, ...]] = {
    "task": (
        *("prompt_column", "row_params", "parameters", "token_ids", "empty_prompt", "trim", "seed_by", *_SCORE_COLUMNS),
        *(*options_of(ScoreOptions), *options_of(EmbedOptions)),
    ),
    "text_column": ("prompt_column",),
    "template": ("shots",),  # whose prompts it makes too
    "input": ("rows", "files", "input_formats"),
    "model": ("model_hash",),
    **dict.fromkeys(("input_formats", "delimiter", "quotes"), ("rows",)),
}


_PACKAGES = {name: f"the package {name}" for name in ("regex", "llguidance")}  # a parameter is named regex too


def _pairs(name: str, old: Plan, new: Plan) -> list[tuple[str, Any, Any]]:
    """A field, or the parameters that differ, with the value of each plan."""
    names = [field.name for field in fields(SamplingParams)] if name == "parameters" else [name]
    a, b = (plan.parameters if name == "parameters" else plan for plan in (old, new))
    values = [(one, getattr(a, one), getattr(b, one)) for one in names]
    said = _PACKAGES if name in _PACKAGES else {}
    return [(said.get(one, one), mine, theirs) for one, mine, theirs in values if mine != theirs]


def _changed_input(old: Plan, new: Plan) -> str:
    """`b.jsonl is not the input that it had (120 rows then, 2 now)`"""
    then, now = ((plan.files or (plan.input[:16],)) for plan in (old, new))
    added, gone = Counter(now) - Counter(then), Counter(then) - Counter(now)
    changed: list[str] = []
    for name, sha256 in zip(reversed(new.names), reversed(now), strict=False):  # of equal files, the last was added
        if added[sha256]:
            added[sha256] -= 1
            changed.insert(0, name)
    what = "the input is not what it was"
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        verb = "is" if len(changed) == 1 else "are"
        it = "the input" if len(then) == len(now) == 1 else "among the inputs"
        what = f"{', '.join(changed[:3])}{more} {verb} not {it} that it had"
    elif not added:
        what = "the input has fewer files than it had" if gone else "the files of the input are in another order"
    counts = [(len(then), len(now), "files"), (old.rows, new.rows, "rows")]
    values = [f"{a:,} {noun if a != 1 else noun[:-1]} then, {b:,} now" for a, b, noun in counts if a != b]
    return f"{what} ({'; '.join(values) or f'SHA-256 {old.input[:8]} then, {new.input[:8]} now'})"


def _changed_shots(old: Plan, new: Plan) -> str:
    """`the examples of --shots are not what they were (--n-shots 5 then, --n-shots 3 now)`"""
    if old.shots is None or new.shots is None:
        had, has = ("no examples" if plan.shots is None else "examples of --shots" for plan in (old, new))
        return f"it had {had} before its prompts, and this has {has}"
    values = [(name, getattr(old, name), getattr(new, name)) for name in _OF_SHOTS]
    changed = [f"{_named(name, then)} then, {_named(name, now)} now" for name, then, now in values if then != now]
    changed = changed or [f"SHA-256 {old.shots[:8]} then, {new.shots[:8]} now"]
    return f"the examples of --shots are not what they were ({'; '.join(changed)})"


def _changed_formats(old: Plan, new: Plan) -> str:
    """`b.tsv was read as csv, and is read as tsv now`, of the first such file; older plans have no format of each."""
    then, now = (one.input_formats * (len(one.files) if len(one.input_formats) == 1 else 1) for one in (old, new))
    is_known = len(then) == len(now) == len(new.names)
    files = zip(new.names, then, now, strict=True) if is_known else [("a file", *map(" or ".join, (then, now)))]
    name, mine, theirs = next(one for one in files if one[1] != one[2])
    return f"{name} was read as {mine}, and is read as {theirs} now"


def _named(name: str, value: Any) -> str:
    """--max-tokens 40; no --trim; the package regex '2026.2.28', which no option sets."""
    if name == "task":
        return f"the command {value}"
    if name in ("model", "input_formats", "format"):
        flag = {"model": "--model", "input_formats": "--input-format", "format": "--format"}[name]
        text = value[0] if name == "input_formats" else value
        return shlex.join(with_value(flag, "file" if name == "format" and value != "dataset" else text))
    declared = _OPTIONS.get(name)
    if name == "shard" and value:  # a plan has it as a command line does
        return f"--shard {value}"
    if declared is None:
        return f"{name} {value[:12]!r}" if name == "model_hash" else f"{name} {value!r}"
    return shlex.join(words_of(name, declared, value)) or f"no {flag_of(name, declared)}"


_OPTIONS = {
    name: declared
    for record in (
        InputOptions,
        ScoreInput,
        SamplingParams,
        ScoreOptions,
        EmbedOptions,
        Policy,
        OutputOptions,
        WorkOptions,
    )
    for name, declared in options_of(record).items()
    if name != "format"  # of a plan, it is more than either option's
}
