"""The output's columns, fixed before the first row is read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa

from batchgen.errors import UsageError
from batchgen.input.parameters import WITH_COLUMNS
from batchgen.input.prompts import Facts, Prompts, asked_columns
from batchgen.options import say
from batchgen.plan import Plan
from batchgen.types import MEASURED, Kind, Row

TOP_LOGPROB = pa.struct([("token_id", pa.int32()), ("token", pa.string()), ("logprob", pa.float32())])
INTS, FLOATS, TEXTS = (pa.list_(kind) for kind in (pa.int32(), pa.float64(), pa.string()))
_ATTRIBUTES = {"text": "prompt"}  # of a row, where a column has another name


@dataclass(frozen=True, slots=True)
class Columns:
    """What the columns of an output depend on, fixed before the first row."""

    token_ids: bool = False
    logprobs: bool = False
    prompt_logprobs: bool = False
    prompt_index: bool = False  # for inputs whose rows may have several prompts
    kind: Kind = "generate"
    per_token: bool = False  # of scores
    answer: bool = False  # of choices: the input names the right one
    n_embd: int = 0  # of embeddings
    mean_logprob: bool = False  # these two: see types.MEASURED
    repetition: bool = False
    num_beams: bool = False  # the scores of beam search

    def schema(self, kept: pa.Schema | None = None) -> pa.Schema:
        """All columns in order, the kept ones last; only row, sample and status are never null."""
        return pa.schema([*_FIELDS[self.kind](self), *(kept or ())])


def _first(text: str) -> list[pa.Field]:
    """What every output begins with; `text` names the column of what was read."""
    return [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("sample", pa.int32(), nullable=False),
        pa.field("id", pa.string()),
        pa.field(text, pa.string()),
    ]


def _status() -> list[pa.Field]:
    return [pa.field("status", pa.string(), nullable=False), pa.field("error", pa.string())]


def _generated(columns: Columns) -> list[pa.Field]:
    fields = [
        *_first("prompt"),
        pa.field("completion", pa.string()),
        pa.field("prompt_tokens", pa.int32()),
        pa.field("completion_tokens", pa.int32()),
        pa.field("finish_reason", pa.string()),
        pa.field("stop_reason", pa.string()),
        *_status(),
        pa.field("seed", pa.int64()),
        pa.field("parameters", pa.string()),
    ]
    if columns.token_ids:
        fields.append(pa.field("completion_token_ids", pa.list_(pa.int32())))
    if columns.logprobs:
        fields.append(pa.field("logprobs", pa.list_(pa.float32())))
        fields.append(pa.field("top_logprobs", pa.list_(pa.list_(TOP_LOGPROB))))
    if columns.prompt_logprobs:
        fields.append(pa.field("prompt_token_ids", pa.list_(pa.int32())))
        fields.append(pa.field("prompt_logprobs", pa.list_(pa.float32())))
        fields.append(pa.field("prompt_top_logprobs", pa.list_(pa.list_(TOP_LOGPROB))))
    if columns.num_beams:
        fields.append(pa.field("beam_score", pa.float64()))
    if columns.prompt_index:
        fields.append(pa.field("prompt_index", pa.int32()))
    fields += [pa.field(name, pa.float64()) for name in MEASURED if getattr(columns, name)]
    return fields


def _of_completion(columns: Columns) -> list[pa.Field]:
    return [
        *_first("prompt"),
        pa.field("completion", pa.string()),
        pa.field("prompt_tokens", pa.int32()),
        pa.field("tokens", pa.int32()),
        pa.field("logprob", pa.float64()),
        pa.field("greedy", pa.bool_()),
        *_status(),
        *_per_token(columns),
    ]


def _of_text(columns: Columns) -> list[pa.Field]:
    return [
        *_first("text"),
        pa.field("tokens", pa.int32()),
        pa.field("bytes", pa.int64()),
        pa.field("nats", pa.float64()),
        pa.field("bits_per_byte", pa.float64()),
        pa.field("perplexity", pa.float64()),
        *_status(),
        *_per_token(columns),
    ]


def _of_choices(columns: Columns) -> list[pa.Field]:
    return [
        *_first("prompt"),
        pa.field("choices", TEXTS),
        pa.field("prompt_tokens", pa.int32()),
        pa.field("choice_tokens", INTS),
        *(pa.field(name, FLOATS) for name in ("logprobs", "logprobs_by_token", "logprobs_by_byte")),
        *(pa.field(name, pa.int32()) for name in ("best", "best_by_token", "best_by_byte")),
        *([pa.field("answer", pa.int32())] if columns.answer else []),
        *_status(),
        *_per_token(columns),
    ]


def _per_token(columns: Columns) -> list[pa.Field]:
    """A list of what is scored, or of choices a list for each."""
    kinds = (
        {"token_ids": INTS, "token_logprobs": pa.list_(pa.float32()), "token_ranks": INTS} if columns.per_token else {}
    )
    return [pa.field(name, pa.list_(kind) if columns.kind == "choices" else kind) for name, kind in kinds.items()]


def _embedded(columns: Columns) -> list[pa.Field]:
    return [
        *_first("text"),
        pa.field("prompt_tokens", pa.int32()),
        pa.field("embedding", pa.list_(pa.float32(), columns.n_embd)),
        *_status(),
    ]


_FIELDS: dict[Kind, Callable[[Columns], list[pa.Field]]] = {
    "generate": _generated,
    "text": _of_text,
    "completion": _of_completion,
    "choices": _of_choices,
    "embed": _embedded,
}


def columns_of(plan: Plan) -> Columns:
    """The columns that a plan alone decides."""
    answer = plan.answer_column is not None
    measured = {name: getattr(plan, name) for name in MEASURED}
    return Columns(plan.token_ids, kind=plan.kind, per_token=plan.per_token, answer=answer, **measured)


def choose_columns(prompts: Prompts, facts: Facts, plan: Plan, n_embd: int) -> Columns:
    """The columns that a run may need: some only if the run, or a row that may, asks for them."""
    asked = asked_columns(prompts, facts, plan.parameters) if plan.task == "generate" else ()
    wanted = dict.fromkeys(asked, True)
    return replace(columns_of(plan), **wanted, prompt_index=prompts.openai, n_embd=n_embd)  # type: ignore[arg-type]


def own_names(columns: Columns) -> frozenset[str]:
    """The names that no kept column may have: those of the columns that such an output has or could have."""
    asked = dict.fromkeys(("token_ids", *WITH_COLUMNS, "prompt_index", "per_token", *MEASURED), True)
    every = replace(columns, **asked)  # type: ignore[arg-type]
    return frozenset(every.schema().names)


def check_keep(keep: Sequence[str], columns: Columns = Columns()) -> None:
    """Raise UsageError for a column that is kept twice, or whose name the output needs for a column of its own."""
    own = own_names(columns)
    for column in keep:
        named = f"{say('keep')} {column!r}"
        if column in own:
            raise UsageError(f"{named}: the output has a column of its own by that name; rename the input's")
        if keep.count(column) > 1:
            raise UsageError(f"{named}: named {keep.count(column)} times; name it once")


def rows_to_table(rows: Sequence[Row], schema: pa.Schema, kept: pa.Table | None = None) -> pa.Table:
    """The rows as a table: each column is their attribute of that name, or a column of `kept`, a table as long."""
    carried = {} if kept is None else dict(zip(kept.column_names, kept.columns, strict=True))
    columns: list[pa.Array] = [
        carried[field.name]
        if field.name in carried
        else pa.array([getattr(row, _ATTRIBUTES.get(field.name, field.name)) for row in rows], field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)
