"""The output's columns, fixed before the first row is read."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from batchgen.errors import UsageError
from batchgen.types import OutputRow

TOP_LOGPROB = pa.struct([("token_id", pa.int32()), ("token", pa.string()), ("logprob", pa.float32())])


def output_schema(
    *, token_ids: bool = False, logprobs: bool = False, prompt_index: bool = False, kept: Any = None
) -> Any:
    """The columns in order, kept ones (a schema) last; only row, sample and status are never null.

    prompt_index is for inputs of which a row may have several prompts.
    """
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
    if token_ids:
        fields.append(pa.field("completion_token_ids", pa.list_(pa.int32())))
    if logprobs:
        fields.append(pa.field("logprobs", pa.list_(pa.float32())))
        fields.append(pa.field("top_logprobs", pa.list_(pa.list_(TOP_LOGPROB))))
    if prompt_index:
        fields.append(pa.field("prompt_index", pa.int32()))
    return pa.schema([*fields, *(kept or ())])


def check_keep(keep: Sequence[str]) -> None:
    """Refuse, as a UsageError, to keep a column twice or one whose name the output needs for its own."""
    own = output_schema(token_ids=True, logprobs=True, prompt_index=True).names
    for column in keep:
        if column in own:
            raise UsageError(f"--keep {column!r}: the output has a column of its own by that name; rename the input's")
        if keep.count(column) > 1:
            raise UsageError(f"--keep {column!r}: named {keep.count(column)} times; name it once")


def rows_to_table(rows: Sequence[OutputRow], schema: pa.Schema, kept: Any = None) -> pa.Table:
    """One column for every field of the schema: a row's attribute of that name, or one of `kept`, a table as long."""
    carried = {} if kept is None else dict(zip(kept.column_names, kept.columns, strict=True))
    columns: list[Any] = [
        carried[field.name]
        if field.name in carried
        else pa.array([getattr(row, field.name) for row in rows], field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)
