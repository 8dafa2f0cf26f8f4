"""The output's columns: their order, their types, and how rows become them."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from batchgen.errors import UsageError
from batchgen.job import InputOptions
from batchgen.output.schema import Columns, check_keep, choose_columns, rows_to_table
from batchgen.types import OutputRow, SamplingParams
from tests.support.stand_ins import Facts, Prompts

ROWS = [
    OutputRow(0, 0, "a", "Once", " upon a time", 1, 3, "stop", "ok", None, 7, (2402, 257, 640), (-0.5, -1.0, 0.0)),
    OutputRow(1, 0, None, None, None, None, None, None, "rejected", "p.jsonl:2: not JSON", None),
]


def test_columns_are_in_the_documented_order() -> None:
    assert Columns().schema().names == [
        "row",
        "sample",
        "id",
        "prompt",
        "completion",
        "prompt_tokens",
        "completion_tokens",
        "finish_reason",
        "stop_reason",
        "status",
        "error",
        "seed",
        "parameters",
    ]


@pytest.mark.parametrize(("token_ids", "logprobs"), [(False, False), (True, False), (False, True), (True, True)])
def test_asked_for_columns_come_last(token_ids: bool, logprobs: bool) -> None:
    names = Columns(token_ids, logprobs).schema().names
    assert names[13:] == ["completion_token_ids"] * token_ids + ["logprobs", "top_logprobs"] * logprobs
    assert Columns(token_ids, logprobs, prompt_index=True).schema().names == [*names, "prompt_index"]


def test_only_row_sample_and_status_are_never_null() -> None:
    schema = Columns(token_ids=True, logprobs=True).schema()
    assert [field.name for field in schema if not field.nullable] == ["row", "sample", "status"]


def test_types_hold_what_the_rows_may_carry() -> None:
    schema = Columns(token_ids=True, logprobs=True).schema()
    types = {field.name: field.type for field in schema}
    assert types["row"] == types["seed"] == pa.int64()
    assert types["sample"] == types["prompt_tokens"] == types["completion_tokens"] == pa.int32()
    assert types["completion_token_ids"] == pa.list_(pa.int32())
    assert types["logprobs"] == pa.list_(pa.float32())


def test_the_columns_are_the_fields_of_the_output_row() -> None:
    names = Columns(token_ids=True, logprobs=True, prompt_index=True).schema().names
    assert sorted(names) == sorted(field.name for field in fields(OutputRow))


def test_rows_come_back_as_they_went_in() -> None:
    schema = Columns(token_ids=True, logprobs=True, prompt_index=True).schema()
    top = (((1, "a", -0.5), (2, "b", -1.5)), (), ((3, "c", 0.0),))
    rows = [replace(ROWS[0], top_logprobs=top, stop_reason="\n", prompt_index=4), ROWS[1]]
    table = rows_to_table(rows, schema)
    assert table.schema == schema
    table.validate(full=True)
    for row, record in zip(rows, table.to_pylist(), strict=True):
        tops = record["top_logprobs"]
        record["top_logprobs"] = tops and tuple(tuple(tuple(one.values()) for one in each) for each in tops)
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in record.items()
        }
        assert OutputRow(**values) == row


def test_zero_rows_keep_the_full_schema() -> None:
    table = rows_to_table([], Columns(token_ids=True).schema())
    assert (table.num_rows, table.schema) == (0, Columns(token_ids=True).schema())


def test_every_column_is_in_the_documentation() -> None:
    text = (Path(__file__).parents[1] / "docs" / "formats.md").read_text(encoding="utf-8")
    for name in Columns(token_ids=True, logprobs=True, prompt_index=True).schema().names:
        assert f"| `{name}` |" in text


def test_kept_columns_come_last_and_from_their_table() -> None:
    kept = pa.table({"k": pa.array([5], pa.int16())})
    schema = Columns().schema(kept.schema)
    assert schema.names == [*Columns().schema().names, "k"]
    row = OutputRow(0, 0, None, None, None, None, None, None, "ok", None, None)
    assert rows_to_table([row], schema, kept)["k"].to_pylist() == [5]


# ---- which columns


@pytest.mark.parametrize(
    ("sampling", "facts", "row_params", "openai", "logprobs"),
    [
        (SamplingParams(), False, True, False, False),
        (SamplingParams(logprobs=0), False, False, False, True),
        (SamplingParams(), True, True, False, True),
        (SamplingParams(), True, False, False, False),  # rows ask for them in vain
        (SamplingParams(), True, False, True, True),  # OpenAI's lines always have their own parameters
    ],
)
def test_logprobs_are_a_column_if_the_run_or_a_row_can_ask_for_them(
    sampling: SamplingParams, facts: bool, row_params: bool, openai: bool, logprobs: bool
) -> None:
    prompts = Prompts(InputOptions((), row_params=row_params), openai=openai)
    columns = choose_columns(prompts, Facts(logprobs=facts), sampling, token_ids=False)
    assert columns == Columns(logprobs=logprobs, prompt_index=openai)


def test_a_kept_column_may_not_have_the_name_of_another() -> None:
    check_keep(["k", "l"])
    for name in ("prompt", "row", "completion_token_ids", "top_logprobs", "prompt_index"):
        with pytest.raises(
            UsageError, match=f"--keep '{name}': the output has a column of its own by that name; rename"
        ):
            check_keep(["k", name])
    with pytest.raises(UsageError, match="--keep 'k': named 2 times; name it once"):
        check_keep(["k", "k"])
