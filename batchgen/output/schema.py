"""The output's columns, fixed before the first row is read."""

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from batchgen.errors import UsageError
from batchgen.input.prompts import Facts, Prompts
from batchgen.options import say
from batchgen.types import OutputRow, SamplingParams

TOP_LOGPROB = pa.struct([("token_id", pa.int32()), ("token", pa.string()), ("logprob", pa.float32())])


@dataclass(frozen=True, slots=True)
class Columns:
    """Optional columns of an output, fixed before the first row."""

    token_ids: bool = False
    logprobs: bool = False
    prompt_index: bool = False  # for inputs whose rows may have several prompts

    def schema(self, kept: pa.Schema | None = None) -> pa.Schema:
        """All columns in order, the kept ones last; only row, sample and status are never null."""
        fields = [
            pa.field("row", pa.int64(), nullable=False),
            pa.field("sample", pa.int32(), nullable=False),
            pa.field("id", pa.string()),
            pa.field("prompt", pa.string()),
            pa.field("completion", pa.string()),
            pa.field("prompt_tokens", pa.int32()),
            pa.field("completion_tokens", pa.int32()),
            pa.field("finish_reason", pa.string()),
            pa.field("stop_reason", pa.string()),
            pa.field("status", pa.string(), nullable=False),
            pa.field("error", pa.string()),
            pa.field("seed", pa.int64()),
            pa.field("parameters", pa.string()),
        ]
        if self.token_ids:
            fields.append(pa.field("completion_token_ids", pa.list_(pa.int32())))
        if self.logprobs:
            fields.append(pa.field("logprobs", pa.list_(pa.float32())))
            fields.append(pa.field("top_logprobs", pa.list_(pa.list_(TOP_LOGPROB))))
        if self.prompt_index:
            fields.append(pa.field("prompt_index", pa.int32()))
        return pa.schema([*fields, *(kept or ())])


OWN = frozenset(Columns(token_ids=True, logprobs=True, prompt_index=True).schema().names)  # no kept column's names


def choose_columns(prompts: Prompts, facts: Facts, sampling: SamplingParams, *, token_ids: bool) -> Columns:
    """The columns that a run may need: log-probabilities if the run, or a row that may, asks for them."""
    rows_may_ask = prompts.openai or prompts.options.row_params
    logprobs = sampling.logprobs is not None or (facts.logprobs and rows_may_ask)
    return Columns(token_ids, logprobs, prompt_index=prompts.openai)


def check_keep(keep: Sequence[str]) -> None:
    """Raise UsageError for a column that is kept twice, or whose name the output needs for a column of its own."""
    for column in keep:
        named = f"{say('keep')} {column!r}"
        if column in OWN:
            raise UsageError(f"{named}: the output has a column of its own by that name; rename the input's")
        if keep.count(column) > 1:
            raise UsageError(f"{named}: named {keep.count(column)} times; name it once")


def rows_to_table(rows: Sequence[OutputRow], schema: pa.Schema, kept: pa.Table | None = None) -> pa.Table:
    """The rows as a table: each column is their attribute of that name, or a column of `kept`, a table as long."""
    carried = {} if kept is None else dict(zip(kept.column_names, kept.columns, strict=True))
    columns: list[pa.Array] = [
        carried[field.name]
        if field.name in carried
        else pa.array([getattr(row, field.name) for row in rows], field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)
