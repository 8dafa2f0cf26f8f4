"""The plan: all that the rows of an output depend on, as one record that travels with them."""

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from batchgen.job import InputOptions, OutputOptions, Policy, WorkOptions
from batchgen.options import arguments, flag_of, options_of, with_value, words_of
from batchgen.types import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What every row depends on, and nothing else: equal plans give equal rows, bit for bit.

    It is stored in the work directory (plan.json), in the output's metadata and in a dataset's _SUCCESS.
    """

    batchgen: str  # versions
    numpy: str
    blas: str  # what decides how a sum is rounded: library, version, kernels
    batch_invariant: bool  # whether a row's bits are the same in any batch
    input: str  # SHA-256; see input/prompts.py
    input_formats: tuple[str, ...]
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

    # ---- JSON

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values: lists for tuples, an object for the parameters."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if not self.retry:
            del values["retry"]
        plain: dict[str, Any] = json.loads(json.dumps(values | {"parameters": self.parameters.as_dict()}))
        return plain

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Plan":
        """The reverse of to_json. Raises ValueError naming what is missing, unknown or of the wrong type.

        Raises UsageError for a value that no option may have.
        """
        names = {field.name for field in fields(cls)}
        if unknown := sorted(values.keys() - names):
            raise ValueError(f"{unknown[0]!r} is not known here")
        if missing := sorted(names - values.keys() - {"retry"}):
            raise ValueError(f"{missing[0]!r} is missing")
        given = dict(values) | {"parameters": read_parameters(values["parameters"])}
        for field in fields(cls):
            if field.name not in given:
                continue
            if str(field.type).startswith("tuple"):
                given[field.name] = _texts(field.name, given[field.name])
            elif isinstance(field.type, type) and type(given[field.name]) is not field.type:
                raise ValueError(f"{field.name} is not of type {field.type.__name__}")
        plan = cls(**given)
        plan._input(), plan.policy()  # checked as the records that they are
        return plan

    # ---- comparing

    def conflict(self, other: "Plan", automatic: Iterable[str] = ()) -> str | None:
        """What differs in `other`, in the words of the command line; None if both make the same rows.

        automatic names fields of `other` that nobody asked for: they agree with anything.
        """
        free = set(automatic)
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if mine != theirs and field.name not in free:
                return _difference(field.name, mine, theirs)
        return None

    # ---- the command

    def command_line(self, inputs: Iterable[str] = ("INPUT",), output: str | None = None) -> str:
        """The command that makes the output again, quoted for a shell; parsed, it gives an equal plan."""
        output = output or ("completions" if self.format == "dataset" else f"completions.{self.format}")
        words = ["batchgen", "generate", *inputs, *with_value("-o", output), *with_value("--model", self.model)]
        for record in (self._input(), self._output(), self.parameters, self.policy(), self._work()):
            words += arguments(record)
        return shlex.join(words)

    def _input(self) -> InputOptions:
        formats = set(self.input_formats)
        return InputOptions(
            (),
            self.prompt_column,
            self.id_column,
            self.keep,
            format=formats.pop() if len(formats) == 1 else "auto",  # type: ignore[arg-type]
            row_params=self.row_params,
        )

    def policy(self) -> Policy:
        """What was done with prompts that do not fit the model."""
        return Policy(self.on_too_long, self.empty_prompt, self.trim)  # type: ignore[arg-type]

    def _output(self) -> OutputOptions:
        """Without the path, which `arguments` leaves out as the default of nothing."""
        return OutputOptions(
            MISSING,  # type: ignore[arg-type]
            format="dataset" if self.format == "dataset" else "file",
            token_ids=self.token_ids,
            retry_failed=self.retry,
        )

    def _work(self) -> WorkOptions:
        return WorkOptions(
            batch_size=self.batch_size,
            chunk_rows=self.chunk_rows,
            kv_bytes=self.kv_bytes,
            share_prefixes=self.share_prefixes,
        )


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


def _difference(name: str, mine: Any, theirs: Any) -> str:
    """`--max-tokens 40` there, `--max-tokens 64` here."""
    if name == "parameters":
        pairs: Iterator[tuple[str, Any, Any]] = (
            (field.name, getattr(mine, field.name), getattr(theirs, field.name)) for field in fields(mine)
        )
        name, mine, theirs = next(pair for pair in pairs if pair[1] != pair[2])
    return f"it had {_named(name, mine)}, and this has {_named(name, theirs)}"


def _named(name: str, value: Any) -> str:
    """--max-tokens 40; no --trim; numpy '2.4.1', which no option sets."""
    declared = _OPTIONS.get(name)
    if declared is None:
        return f"{name} {value!r}"
    return shlex.join(words_of(name, declared, value)) or f"no {flag_of(name, declared)}"


_OPTIONS = {
    name: declared
    for record in (InputOptions, SamplingParams, Policy, OutputOptions, WorkOptions)
    for name, declared in options_of(record).items()
    if name != "format"  # of a plan, it is more than either option's
}
