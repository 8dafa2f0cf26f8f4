"""The output's columns, fixed before the first row is read."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from batchgen.types import OutputRow

TOP_LOGPROB = pa.struct([("token_id", pa.int32()), ("token", pa.string()), ("logprob", pa.float32())])


def output_schema(*, token_ids: bool = False, logprobs: bool = False, prompt_index: bool = False) -> pa.Schema:
    """The columns in order; row and sample number the output, and only they and status are never null.

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
    ]
    if token_ids:
        fields.append(pa.field("completion_token_ids", pa.list_(pa.int32())))
    if logprobs:
        fields.append(pa.field("logprobs", pa.list_(pa.float32())))
        fields.append(pa.field("top_logprobs", pa.list_(pa.list_(TOP_LOGPROB))))
    if prompt_index:
        fields.append(pa.field("prompt_index", pa.int32()))
    return pa.schema(fields)


def rows_to_table(rows: Sequence[OutputRow], schema: pa.Schema) -> pa.Table:
    """One column for every field of the schema, each filled from the row's attribute of that name."""
    columns: list[Any] = [pa.array([getattr(row, field.name) for row in rows], field.type) for field in schema]
    return pa.Table.from_arrays(columns, schema=schema)
