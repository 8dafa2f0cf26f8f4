"""outputs.py: every output keeps the same protocol, and the same parts give the same rows in each."""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchgen.errors import BatchgenError, BusyError, OutputError, UsageError
from batchgen.job import InputOptions, OutputOptions
from batchgen.models.model import Model
from batchgen.output.ledger import Ledger, open_ledger, work_directory
from batchgen.output.outputs import Output, open_output
from batchgen.output.parts import with_receipt, write_part
from batchgen.output.reading import read_plan
from batchgen.output.schema import Columns, rows_to_table
from batchgen.types import OutputRow, Receipt, SamplingParams
from tests.support.models import write_byte_model
from tests.support.plans import plan_of
from tests.support.stand_ins import Facts, Prompts

ROWS = [
    OutputRow(row, sample, f"id-{row}", "Once", f" upon {row}", 4, 6, "length", "ok", None, 7, parameters="{}")
    for row in range(6)
    for sample in range(2)
]
ROWS[4:6] = [OutputRow(2, 0, "id-2", None, None, None, None, None, "rejected", "p.jsonl:3: not JSON", None)]
FACTS = Facts(rows=6)
SCHEMA = Columns().schema()
FILES = ["out.parquet", "out.jsonl", "answers.jsonl"]
LOCAL = [*FILES, "folder"]
REMOTE = ["s3://out/deep/out.parquet", "s3://out/deep/out.jsonl", "s3://out/deep/folder/"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model.open(str(write_byte_model(tmp_path_factory.mktemp("outputs") / "bytes")))


@pytest.fixture
def store(store_server: Any) -> Iterator[Any]:
    yield store_server
    store_server.clear()


def opened(name: str, folder: Path, model: Model, prompts: Prompts | None = None, **changes: Any) -> Output:
    """The output of this name: in the folder, or in a store with its work in the folder."""
    remote = "://" in name
    options: dict[str, Any] = {"path": name if remote else folder / name, "work_dir": folder if remote else None}
    if name == "folder":
        options["format"] = "dataset"
    prompts = prompts or Prompts(openai=name.startswith("answers"))
    return open_output(OutputOptions(**options | changes), prompts, model.load_tokenizer)


def commit(ledger: Ledger, rows: list[OutputRow], schema: pa.Schema, chunk_rows: int = 4) -> None:
    """What workers and the run do: chunks of so many input rows become parts."""
    for chunk in range(1 + max((row.row for row in rows), default=-1) // chunk_rows):
        members = [row for row in rows if row.row // chunk_rows == chunk]
        statuses = Counter(row.status for row in members)
        path = ledger.attempt / f"{chunk:08d}.parquet"
        counts = (len({row.row for row in members}), len(members))
        counts += (statuses["ok"], statuses["rejected"], statuses["failed"], 0, 0)
        receipt = Receipt(chunk, str(path), "", *counts)
        ledger.commit(receipt.finished(write_part(members, path, with_receipt(schema, receipt)), 0.0))


def run(output: Output, rows: list[OutputRow]) -> None:
    """A whole run, from the facts to the output."""
    with open_ledger(output.path) as ledger:
        todo = output.rows_to_do(FACTS)
        schema = output.columns(FACTS, SamplingParams()).schema()
        plan = output.claim(ledger, plan_of(format=output.format, rows=6), frozenset(), False)
        commit(ledger, [row for row in rows if todo.numbers is None or row.row in todo.numbers], schema)
        output.publish(ledger, plan, schema, ledger.counts["rows"] + todo.staying.total())


def records(rows: list[OutputRow], schema: pa.Schema = SCHEMA) -> list[dict[str, Any]]:
    table: list[dict[str, Any]] = rows_to_table(rows, schema).to_pylist()
    return table


def read_rows(data: dict[str, bytes]) -> list[dict[str, Any]]:
    """The rows of an output that consists of these files."""
    rows: list[dict[str, Any]] = []
    for name, content in sorted(data.items()):
        if name.endswith(".jsonl"):
            rows += map(json.loads, content.splitlines())
        elif name.endswith(".parquet"):
            rows += pq.read_table(pa.BufferReader(content)).to_pylist()
    return rows


def local_files(path: Path) -> dict[str, bytes]:
    paths = path.iterdir() if path.is_dir() else [path]
    return {file.name: file.read_bytes() for file in paths}


# ---- the choice


@pytest.mark.parametrize(
    ("name", "kind", "format"),
    [
        ("out.parquet", "FileOutput", "parquet"),
        ("OUT.JSONL", "FileOutput", "jsonl"),
        ("folder", "Dataset", "dataset"),
        ("s3://out/deep/out.parquet", "FileUpload", "parquet"),
        ("s3://out/deep/folder/", "DatasetUpload", "dataset"),
    ],
)
def test_the_name_decides_what_an_output_is(
    tmp_path: Path, model: Model, store: Any, name: str, kind: str, format: str
) -> None:
    store.clear()
    output = opened(name, tmp_path, model)
    assert (type(output).__name__, output.format) == (kind, format)
    assert output.path == tmp_path / Path(name).name
    assert output.where == (name if "://" in name else tmp_path / name)
    assert list(tmp_path.iterdir()) == []
    assert store.objects() == {}


def test_a_format_can_be_given_for_any_address(tmp_path: Path, model: Model, store: Any) -> None:
    assert opened("s3://out/a.parquet", tmp_path, model, format="dataset").format == "dataset"


@pytest.mark.parametrize(
    ("name", "changes", "error", "message"),
    [
        ("out.csv", {}, UsageError, "not one of .parquet, .jsonl"),
        ("out.parquet", {"work_dir": Path()}, UsageError, "--work-dir: a local output keeps its work beside it"),
        ("out.jsonl", {"retry_failed": True}, UsageError, "--retry-failed wants a finished .parquet file"),
        ("folder", {"retry_failed": True}, UsageError, "--retry-failed wants a finished .parquet file"),
        ("out.parquet", {"retry_failed": True}, OutputError, "no such file; run without --retry-failed first"),
        ("s3://out/a.parquet", {"retry_failed": True}, UsageError, "is for an output that is a local file"),
        ("s3://out/april", {}, UsageError, "neither a file nor a dataset"),
        ("hdfs://out/a.parquet", {}, UsageError, "not an address that can be written"),
        ("missing/out.parquet", {}, OutputError, "no such folder"),
        ("missing/folder", {"format": "dataset"}, OutputError, "no such folder"),
        (".", {}, UsageError, "'.' is not a file name"),
    ],
)
def test_a_place_that_cannot_be_used_is_refused_before_any_work(
    tmp_path: Path,
    model: Model,
    store: Any,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    changes: dict[str, Any],
    error: type[BatchgenError],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        opened(name, Path(), model, **changes)
    assert list(tmp_path.iterdir()) == []
    assert store.objects() == {}


@pytest.mark.parametrize("name", [*LOCAL, *REMOTE])
def test_a_kept_column_of_the_outputs_own_is_refused_by_all(
    tmp_path: Path, model: Model, store: Any, name: str
) -> None:
    with pytest.raises(UsageError, match="--keep 'row': the output has a column of its own"):
        opened(name, tmp_path, model, Prompts(InputOptions((), keep="row")))


@pytest.mark.parametrize("name", ["answers.jsonl", "s3://out/answers.jsonl"])
def test_answers_have_no_place_for_kept_columns(tmp_path: Path, model: Model, store: Any, name: str) -> None:
    prompts = Prompts(InputOptions((), keep="k"), openai=True)
    with pytest.raises(UsageError, match="--keep: OpenAI's lines have no place for other columns; name the output"):
        opened(name, tmp_path, model, prompts)
    opened(name.replace("jsonl", "parquet"), tmp_path, model, prompts)


@pytest.mark.parametrize("name", LOCAL)
def test_an_input_is_never_replaced(tmp_path: Path, model: Model, name: str) -> None:
    if name == "folder":
        run(opened(name, tmp_path, model), ROWS)
    else:
        (tmp_path / name).write_text("{}")
    with pytest.raises(OutputError, match="this is the input"):
        opened(name, tmp_path, model, Prompts(local_paths=[tmp_path / name]))
    if name == "folder":
        with pytest.raises(OutputError, match="is in it, and would be replaced"):
            opened(name, tmp_path, model, Prompts(local_paths=[next((tmp_path / name).glob("*.parquet"))]))


# ---- the protocol


@pytest.mark.parametrize("name", LOCAL)
def test_the_same_parts_give_the_same_rows(tmp_path: Path, model: Model, name: str) -> None:
    output = opened(name, tmp_path, model)
    run(output, ROWS)
    rows = read_rows(local_files(output.path))
    if name == "answers.jsonl":
        texts = [[choice["text"] for choice in (row["response"]["body"].get("choices") or [])] for row in rows]
        assert texts == [[f" upon {row}"] * 2 * (row != 2) for row in range(6)]
    else:
        assert rows == records(ROWS)
    beside = [tmp_path / f"{name}.plan.json"] if name.endswith(".jsonl") else []
    assert sorted(tmp_path.iterdir()) == sorted([output.path, *beside])


@pytest.mark.parametrize("name", REMOTE)
def test_the_same_parts_give_the_same_rows_in_a_store(tmp_path: Path, model: Model, store: Any, name: str) -> None:
    local = tmp_path / Path(name).name
    run(opened(local.name, tmp_path, model), ROWS)
    expected = local_files(local)
    output = opened(name, tmp_path, model)
    run(output, ROWS)
    found = store.objects("deep/folder/" if name.endswith("/") else "deep/")
    if name.endswith("/"):
        success = json.loads(found.pop("_SUCCESS"))
        plan = json.loads(expected.pop("_SUCCESS"))
        assert success.keys() - plan.keys() == {"run", "parts", "statuses"}
        assert {key: success[key] for key in plan} == plan
        assert [part["rows"] for part in success["parts"]] == [7, 4]
    assert found == expected
    assert read_rows(found) == records(ROWS)
    assert local in tmp_path.iterdir()
    assert not list(tmp_path.glob("*.batchgen"))


@pytest.mark.parametrize("name", [*LOCAL, *REMOTE])
def test_all_rows_are_to_do(tmp_path: Path, model: Model, store: Any, name: str) -> None:
    rows = opened(name, tmp_path, model).rows_to_do(FACTS)
    assert (rows.count, rows.numbers, rows.staying.total()) == (6, None, 0)


@pytest.mark.parametrize("name", [*LOCAL, *REMOTE])
def test_columns_are_those_that_were_asked_for(tmp_path: Path, model: Model, store: Any, name: str) -> None:
    output = opened(name, tmp_path, model, token_ids=True)
    openai = name.startswith("answers")
    assert output.columns(FACTS, SamplingParams()) == Columns(token_ids=True, prompt_index=openai)
    output = opened(name, tmp_path, model)
    columns = output.columns(replace(FACTS, logprobs=True), SamplingParams())
    assert columns == Columns(token_ids=openai, logprobs=True, prompt_index=openai)  # answers have tokens' texts


@pytest.mark.parametrize("name", [*LOCAL, *REMOTE])
def test_a_claim_adopts_a_plan_and_another_run_resumes_or_is_refused(
    tmp_path: Path, model: Model, store: Any, name: str
) -> None:
    output = opened(name, tmp_path, model)
    plan = plan_of(format=output.format, rows=6)
    with suppress(KeyboardInterrupt), open_ledger(output.path) as ledger:
        assert output.claim(ledger, plan, frozenset(), False) == plan
        commit(ledger, ROWS, SCHEMA)
        raise KeyboardInterrupt
    other = replace(plan, chunk_rows=9)
    output = opened(name, tmp_path, model)
    with pytest.raises(UsageError, match="had --chunk-rows 4"), open_ledger(output.path) as ledger:
        output.claim(ledger, other, frozenset({"batch_size"}), False)
    with suppress(KeyboardInterrupt), open_ledger(output.path) as ledger:
        assert output.claim(ledger, other, frozenset({"chunk_rows"}), False) == plan
        assert sorted(ledger.committed) == [0, 1]
        raise KeyboardInterrupt
    with open_ledger(output.path) as ledger:
        assert output.claim(ledger, other, frozenset(), True) == other
        assert ledger.committed == {}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_too_few_rows_is_not_published(tmp_path: Path, model: Model, name: str) -> None:
    output = opened(name, tmp_path, model)
    output.path.write_text("previous")
    schema = output.columns(FACTS, SamplingParams()).schema()
    with open_ledger(output.path) as ledger:
        plan = output.claim(ledger, plan_of(), frozenset(), False)
        commit(ledger, ROWS, schema)
        with pytest.raises(OutputError, match="the parts hold 11 rows, not 12"):
            output.publish(ledger, plan, schema, 12)
    assert output.path.read_text() == "previous"


def test_a_prefix_that_was_claimed_is_busy_for_others(tmp_path: Path, model: Model, store: Any) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    one, two = (opened("s3://out/a/", tmp_path / folder, model) for folder in ("one", "two"))
    with open_ledger(one.path) as ledger:
        one.claim(ledger, plan_of(), frozenset(), False)
        with pytest.raises(BusyError, match="another run writes there"), open_ledger(two.path) as other:
            two.claim(other, plan_of(), frozenset(), False)
        with pytest.raises(BusyError, match="another run writes there"):
            opened("s3://out/a/", tmp_path / "two", model)


def test_the_work_for_one_address_is_not_resumed_for_another(tmp_path: Path, model: Model, store: Any) -> None:
    first, second = (opened(f"s3://out/{folder}/a.parquet", tmp_path, model) for folder in "xy")
    assert first.path == second.path
    with suppress(KeyboardInterrupt), open_ledger(first.path) as ledger:
        first.claim(ledger, plan_of(), frozenset(), False)
        raise KeyboardInterrupt
    message = "the work there is for s3://out/x/a.parquet"
    with pytest.raises(UsageError, match=message), open_ledger(second.path) as ledger:
        second.claim(ledger, plan_of(), frozenset(), False)


# ---- a file whose failed rows are made again


def failed(row: int) -> OutputRow:
    return OutputRow(row, 0, f"id-{row}", "Once", None, 4, None, None, "failed", "its worker died", None)


@pytest.fixture
def finished(tmp_path: Path, model: Model) -> Path:
    """An output in which rows 1 and 4 failed."""
    rows = [failed(row.row) if row.row in (1, 4) else row for row in ROWS if row.row not in (1, 4) or row.sample == 0]
    run(opened("out.parquet", tmp_path, model), rows)
    return tmp_path / "out.parquet"


def test_the_failed_rows_of_a_finished_file_are_to_do(finished: Path, model: Model) -> None:
    rows = opened("out.parquet", finished.parent, model, retry_failed=True).rows_to_do(FACTS)
    assert (rows.count, rows.numbers) == (2, {1, 4})
    assert rows.staying == {"ok": 6, "rejected": 1}
    (rejected,) = (row for row in ROWS if row.status == "rejected")
    assert [(reason.rows, reason.row, f"{reason.place}: {reason.text}") for reason in rows.reasons] == [
        (1, rejected.row, rejected.error)
    ]


def test_a_retry_ends_in_the_rows_and_the_plan_of_an_undisturbed_run(finished: Path, model: Model) -> None:
    plan = read_plan(finished)
    run(opened("out.parquet", finished.parent, model, retry_failed=True), ROWS)
    assert read_rows(local_files(finished)) == records(ROWS)
    assert read_plan(finished) == plan
    before = finished.read_bytes()
    run(opened("out.parquet", finished.parent, model, retry_failed=True), ROWS)  # nothing is left to do
    assert finished.read_bytes() == before
    assert list(finished.parent.iterdir()) == [finished]


def test_a_retry_adopts_a_plan_of_its_own_and_only_for_the_options_of_the_file(finished: Path, model: Model) -> None:
    output = opened("out.parquet", finished.parent, model, retry_failed=True)
    plan = read_plan(finished)
    message = "had --chunk-rows 4, .* give the options that made it, with its batchgen"
    with pytest.raises(UsageError, match=message), open_ledger(output.path) as ledger:
        output.claim(ledger, replace(plan, chunk_rows=1), frozenset(), False)
    with suppress(KeyboardInterrupt), open_ledger(output.path) as ledger:
        held = output.claim(ledger, replace(plan, chunk_rows=1), frozenset({"chunk_rows"}), False)
        assert held == replace(plan, chunk_rows=1, retry=True)
        raise KeyboardInterrupt
    assert work_directory(finished).exists()
    run(opened("out.parquet", finished.parent, model), ROWS)  # an interrupted retry is in no other run's way
    assert read_rows(local_files(finished)) == records(ROWS)
