"""Outputs of scores and embeddings, made in this process: no workers, a few milliseconds."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from batchgen.gpt2.machine_code import prepare_kernels
from batchgen.input.validation import make_check
from batchgen.job import EmbedOptions, Policy, ScoreOptions
from batchgen.models.model import Model
from batchgen.output.schema import Columns, rows_to_table
from batchgen.plan import Plan
from batchgen.types import READING, Chunk, Kind, Request
from batchgen.workers.complete import map_engine
from batchgen.workers.tasks import rows_of_chunk
from tests.support.plans import plan_for

PARAMS = READING
KINDS: tuple[Kind, ...] = ("text", "completion", "choices", "embed")
TASKS = {kind: ScoreOptions(stride=50, per_token=True, kind=kind) for kind in KINDS} | {"embed": EmbedOptions(layer=2)}
_COLUMNS: dict[str, dict[str, Any]] = {
    "text": {"text_column": "text", "prompt_column": "text"},
    "completion": {"completion_column": "completion"},
    "choices": {"choices_column": "choices", "answer_column": "answer"},
    "embed": {"text_column": "text", "prompt_column": "text"},
}
PREFIX = "one prefix of a hundred bytes, which is longer than a block: " * 2


def requests_of(kind: Kind) -> list[Request]:
    """Twelve rows: equal ones, ones that share a block, texts longer than n_ctx 128, one that is rejected."""
    rows: list[tuple[str, tuple[str, ...], int | None]] = [
        (
            PREFIX[:90] + "abc" * (i % 3),
            {"completion": (f" end {i % 5}",), "choices": (" a", " b", " c d")}.get(kind, ()),
            i % 3,
        )
        for i in range(9)
    ]
    long = "a text of many tokens. " * 20 if kind == "text" else "short"
    rows += [(long, rows[0][1], 0), ("x", rows[0][1], None), ("y" * 500 if kind != "text" else "", rows[0][1], 1)]
    return [
        Request(
            row, f"p:{row}", f"r{row}", prompt, PARAMS, targets=targets, answer=answer if kind == "choices" else None
        )
        for row, (prompt, targets, answer) in enumerate(rows)
    ]


def tokenized(kind: Kind, model: Model) -> Chunk:
    check = make_check(model.load_tokenizer(), model.config.n_ctx, Policy(), TASKS[kind])
    return Chunk(0, tuple(map(check, requests_of(kind))))


def plan_of_kind(kind: Kind, model: Model, rows: int) -> Plan:
    fields = {
        name: getattr(TASKS[kind], name)
        for name in ("first_token", "stride", "per_token", "layer", "pool")
        if hasattr(TASKS[kind], name)
    }
    return plan_for(model, PARAMS, rows=rows, task=TASKS[kind].task, **_COLUMNS[kind], **fields)


def write_rows(path: Path, kind: Kind, model: Model, rows: Sequence[Any]) -> Path:
    """An output of these rows, records of types.py."""
    schema = Columns(
        kind=kind, per_token=kind != "embed", answer=kind == "choices", n_embd=model.config.n_embd
    ).schema()
    metadata = {"batchgen": json.dumps(plan_of_kind(kind, model, len(rows)).to_json())}
    pq.write_table(rows_to_table(rows, schema.with_metadata(metadata)), path)
    return path


def write_scores(path: Path, kind: Kind, directory: Path) -> Path:
    """What a run makes of requests_of(kind)."""
    model = Model.open(str(directory))
    prepare_kernels()
    tokenizer = model.load_tokenizer()
    engine = map_engine(model, tokenizer)
    rows = rows_of_chunk(tokenized(kind, model), TASKS[kind], PARAMS, engine, tokenizer)
    return write_rows(path, kind, model, rows)
