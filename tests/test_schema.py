"""The output's columns: their order, their types, and how rows become them."""

import math
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from batchgen.errors import UsageError
from batchgen.input.parameters import WITH_COLUMNS
from batchgen.job import InputOptions
from batchgen.output.schema import Columns, check_keep, choose_columns, rows_to_table
from batchgen.types import MEASURED, Kind, OutputRow, SamplingParams, ScoreRow
from tests.support.plans import plan_of
from tests.support.stand_ins import Facts, Prompts

ASKED = ("token_ids", "logprobs", "prompt_logprobs", "num_beams", "prompt_index", *MEASURED)
ALL = Columns(**dict.fromkeys(ASKED, True))  # type: ignore[arg-type]

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


@pytest.mark.parametrize("asked", [*product((False, True), repeat=len(ASKED))])
def test_asked_for_columns_come_last(asked: tuple[bool, ...]) -> None:
    own = [
        ["completion_token_ids"],
        ["logprobs", "top_logprobs"],
        ["prompt_token_ids", "prompt_logprobs", "prompt_top_logprobs"],
        ["beam_score"],
        ["prompt_index"],
        *([name] for name in MEASURED),
    ]
    wanted = [column for columns, is_asked in zip(own, asked, strict=True) if is_asked for column in columns]
    columns = Columns(**dict(zip(ASKED, asked, strict=True)))  # type: ignore[arg-type]
    assert columns.schema().names == [*Columns().schema().names, *wanted]


def test_only_row_sample_and_status_are_never_null() -> None:
    schema = Columns(token_ids=True, logprobs=True).schema()
    assert [field.name for field in schema if not field.nullable] == ["row", "sample", "status"]


def test_types_hold_what_the_rows_may_carry() -> None:
    schema = ALL.schema()
    types = {field.name: field.type for field in schema}
    assert types["row"] == types["seed"] == pa.int64()
    assert types["sample"] == types["prompt_tokens"] == types["completion_tokens"] == pa.int32()
    assert types["completion_token_ids"] == pa.list_(pa.int32())
    assert types["logprobs"] == types["prompt_logprobs"] == pa.list_(pa.float32())


def test_the_columns_are_the_fields_of_the_output_row() -> None:
    names = ALL.schema().names
    assert sorted(names) == sorted(field.name for field in fields(OutputRow))


FIRST, LAST = ["row", "sample", "id"], ["status", "error"]
PER_TOKEN = ["token_ids", "token_logprobs", "token_ranks"]
OF_KIND: dict[Kind, list[str]] = {
    "text": [*FIRST, "text", "tokens", "bytes", "nats", "bits_per_byte", "perplexity", *LAST],
    "completion": [*FIRST, "prompt", "completion", "prompt_tokens", "tokens", "logprob", "greedy", *LAST],
    "choices": [
        *(*FIRST, "prompt", "choices", "prompt_tokens", "choice_tokens"),
        *("logprobs", "logprobs_by_token", "logprobs_by_byte", "best", "best_by_token", "best_by_byte", *LAST),
    ],
}
SCORES: dict[Kind, dict[str, Any]] = {
    "text": {"tokens": 2, "bytes": 2**40, "nats": 1.5, "bits_per_byte": 0.1, "perplexity": math.inf},
    "completion": {"prompt_tokens": 1, "completion": " b", "tokens": 2, "logprob": -1.5, "greedy": True},
    "choices": {
        **{"prompt_tokens": 1, "choices": ("b", "c"), "choice_tokens": (1, 1), "logprobs": (-1.0, -2.0)},
        **{"logprobs_by_token": (-1.0, -2.0), "logprobs_by_byte": (-1.0, -2.0), "answer": 1},
        **dict.fromkeys(("best", "best_by_token", "best_by_byte"), 0),
    },
}
LISTS: dict[str, tuple[Any, ...]] = dict(zip(PER_TOKEN, ((5, 6), (-0.5, -1.0), (1, 2)), strict=True))


@pytest.mark.parametrize("kind", OF_KIND)
def test_scores_have_the_columns_of_their_kind(kind: Kind) -> None:
    assert Columns(kind=kind).schema().names == OF_KIND[kind]
    assert Columns(kind=kind, per_token=True).schema().names == [*OF_KIND[kind], *PER_TOKEN]
    schema = Columns(kind=kind, per_token=True, answer=True).schema()
    assert ("answer" in schema.names) == (kind == "choices")
    lists = {name: (value, value[:1]) for name, value in LISTS.items()} if kind == "choices" else LISTS
    made = ScoreRow(row=0, id="a", prompt="a", status="ok", **SCORES[kind], **lists)
    failed = ScoreRow(row=1, id=None, prompt=None, status="failed", error="why")
    table = rows_to_table([made, failed], schema)
    table.validate(full=True)
    for row, record in zip([made, failed], table.to_pylist(), strict=True):
        record["prompt"] = record.pop("text", record.get("prompt"))
        values = {name: _as_tuples(value) for name, value in record.items()}
        assert values == {name: getattr(row, name) for name in record}
    assert [field.name for field in schema if not field.nullable] == ["row", "sample", "status"]


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


def test_a_kept_column_may_have_a_name_that_the_scores_do_not_have() -> None:
    check_keep(["completion", "answer", "prompt", "choices", "logprobs"], Columns(kind="text"))
    check_keep(["answer", "completion", "text"], Columns(kind="choices"))
    for kind, answer, name in (("text", False, "text"), ("text", False, "token_ranks"), ("choices", True, "answer")):
        with pytest.raises(UsageError, match=f"--keep '{name}': the output has a column of its own by that name"):
            check_keep([name], Columns(kind=kind, answer=answer))  # type: ignore[arg-type]


def test_rows_come_back_as_they_went_in() -> None:
    schema = ALL.schema()
    top = (((1, "a", -0.5), (2, "b", -1.5)), (), ((3, "c", 0.0),))
    ones = replace(ROWS[0], top_logprobs=top, stop_reason="\n", prompt_index=4)
    prompts = {"prompt_token_ids": (7, 8), "prompt_logprobs": (None, -0.5), "prompt_top_logprobs": (None, top[0])}
    rows = [replace(ones, **prompts), ROWS[1]]
    table = rows_to_table(rows, schema)
    assert table.schema == schema
    table.validate(full=True)
    for row, record in zip(rows, table.to_pylist(), strict=True):
        for name in ("top_logprobs", "prompt_top_logprobs"):
            tops = record[name]
            record[name] = tops and tuple(
                None if each is None else tuple(tuple(one.values()) for one in each) for each in tops
            )
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in record.items()
        }
        assert OutputRow(**values) == row


def test_zero_rows_keep_the_full_schema() -> None:
    table = rows_to_table([], Columns(token_ids=True).schema())
    assert (table.num_rows, table.schema) == (0, Columns(token_ids=True).schema())


def test_every_column_is_in_the_documentation() -> None:
    text = (Path(__file__).parents[1] / "docs" / "formats.md").read_text(encoding="utf-8")
    for name in ALL.schema().names:
        assert f"| `{name}` |" in text


def test_kept_columns_come_last_and_from_their_table() -> None:
    kept = pa.table({"k": pa.array([5], pa.int16())})
    schema = Columns().schema(kept.schema)
    assert schema.names == [*Columns().schema().names, "k"]
    row = OutputRow(0, 0, None, None, None, None, None, None, "ok", None, None)
    assert rows_to_table([row], schema, kept)["k"].to_pylist() == [5]


# ---- which columns


@pytest.mark.parametrize("name", WITH_COLUMNS)
@pytest.mark.parametrize(
    ("run", "row", "row_params", "openai", "has"),
    [
        (False, False, True, False, False),
        (True, False, False, False, True),
        (False, True, True, False, True),
        (False, True, False, False, False),  # rows ask for them in vain
        (False, True, False, True, True),  # OpenAI's lines always have their own parameters
    ],
)
def test_log_probabilities_and_scores_are_a_column_if_the_run_or_a_row_can_ask_for_them(
    name: str, run: bool, row: bool, row_params: bool, openai: bool, has: bool
) -> None:
    prompts = Prompts(InputOptions((), row_params=row_params), openai=openai)
    sampling = SamplingParams(**{name: 4}) if run else SamplingParams()  # type: ignore[arg-type]
    facts = Facts(asks=frozenset({name} if row else set()))
    columns = choose_columns(prompts, facts, plan_of(parameters=sampling, row_params=row_params), 0)  # type: ignore[arg-type]
    assert columns == Columns(**{name: has}, prompt_index=openai)


def test_a_kept_column_may_not_have_the_name_of_another() -> None:
    check_keep(["k", "l"])
    for name in ("prompt", "row", "completion_token_ids", "top_logprobs", "prompt_index"):
        with pytest.raises(
            UsageError, match=f"--keep '{name}': the output has a column of its own by that name; rename"
        ):
            check_keep(["k", name])
    with pytest.raises(UsageError, match="--keep 'k': named 2 times; name it once"):
        check_keep(["k", "k"])
