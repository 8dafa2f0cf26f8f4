"""outputs.py: every output keeps the same protocol, and the same parts give the same rows in each."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchgen.errors import BatchgenError, BusyError, OutputError, UsageError
from batchgen.job import InputOptions, Job, OutputOptions
from batchgen.models.model import Model
from batchgen.output.file import FileOutput
from batchgen.output.finished import find_finished
from batchgen.output.ledger import Ledger, open_ledger, work_directory
from batchgen.output.outputs import Output, open_output
from batchgen.output.parts import with_receipt, write_part
from batchgen.output.reading import read_plan
from batchgen.output.retried import replace_failed
from batchgen.output.schema import Columns, rows_to_table
from batchgen.output.store import parse_address
from batchgen.output.upload import check_address
from batchgen.plan import Plan
from batchgen.selection import Selection
from batchgen.types import OutputRow, Receipt
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
    return open_output(Job(prompts.options, OutputOptions(**options | changes)), prompts, model.load_tokenizer)


def commit(ledger: Ledger, rows: list[OutputRow], schema: pa.Schema, missing: set[int] | None = None) -> None:
    """What workers and the run do: chunks of four input rows become parts; all of them, or the missing ones."""
    chunk_rows = 4
    for chunk in missing or range(1 + max((row.row for row in rows), default=-1) // chunk_rows):
        members = [row for row in rows if row.row // chunk_rows == chunk]
        statuses = Counter(row.status for row in members)
        path = ledger.attempt / f"{chunk:08d}.parquet"
        counts = (len({row.row for row in members}), len(members))
        counts += (statuses["ok"], statuses["rejected"], statuses["failed"], 0, 0)
        receipt = Receipt(chunk, str(path), "", *counts, plan=getattr(ledger.read_plan(), "digest", ""))
        ledger.commit(receipt.finished(write_part(members, path, with_receipt(schema, receipt)), 0.0))


def run(output: Output, rows: list[OutputRow]) -> None:
    """A whole run, from the facts to the output."""
    with open_ledger(output.path, output.where) as ledger:
        todo = output.rows_to_do(Selection(range(FACTS.rows)))
        schema = output.columns(FACTS, plan_of()).schema()
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


@pytest.mark.parametrize("name", LOCAL)
@pytest.mark.parametrize("beside", [".status.json", ".plan.json", ".batchgen/parts/0.parquet"])
def test_an_input_beside_the_output_is_never_written_over(tmp_path: Path, model: Model, name: str, beside: str) -> None:
    with pytest.raises(OutputError, match="would write over the input .* or remove it; choose another name"):
        opened(name, tmp_path, model, Prompts(local_paths=[tmp_path / f"{name}{beside}"]))


@pytest.mark.parametrize("name", LOCAL)
def test_an_output_is_never_in_the_place_of_a_runs_work(tmp_path: Path, model: Model, name: str) -> None:
    (tmp_path / "o.batchgen").mkdir()
    opened(name, tmp_path / "o.batchgen", model)
    (tmp_path / "o.batchgen" / "lock").touch()
    with pytest.raises(OutputError, match=r"o.batchgen is the place of a run's work, which is removed at its end"):
        opened(name, tmp_path / "o.batchgen", model)
    with pytest.raises(OutputError, match=r"new.batchgen is the place of a run's work"):
        opened("new.batchgen", tmp_path, model, format="dataset")


@pytest.mark.parametrize("name", ["n" * 226 + ".jsonl", "n" * 233, "s3://out/" + "n" * 240 + ".parquet"])
def test_a_name_too_long_for_what_is_beside_it_is_refused(tmp_path: Path, model: Model, store: Any, name: str) -> None:
    with pytest.raises(OutputError, match="File name too long"):
        opened(name, tmp_path, model, format="file" if "." in name else "dataset")


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
    rows = opened(name, tmp_path, model).rows_to_do(Selection(range(FACTS.rows)))
    assert (rows.count, rows.in_all, rows.staying.total()) == (6, 6, 0)
    assert all(row in rows.numbers for row in range(6))


@pytest.mark.parametrize("name", [*LOCAL, *REMOTE])
def test_columns_are_those_that_were_asked_for(tmp_path: Path, model: Model, store: Any, name: str) -> None:
    output = opened(name, tmp_path, model)
    openai = name.startswith("answers")
    assert output.columns(FACTS, plan_of(token_ids=True)) == Columns(token_ids=True, prompt_index=openai)
    columns = output.columns(replace(FACTS, asks=frozenset({"logprobs"})), plan_of())
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


@pytest.mark.parametrize("name", [*LOCAL, *REMOTE])
def test_an_output_of_too_few_rows_is_not_published(tmp_path: Path, model: Model, store: Any, name: str) -> None:
    output = opened(name, tmp_path, model)
    if name in FILES:
        output.path.write_text("previous")
    schema = output.columns(FACTS, plan_of()).schema()
    with open_ledger(output.path, output.where) as ledger:
        plan = output.claim(ledger, plan_of(rows=6), frozenset(), False)
        commit(ledger, ROWS, schema)
        with pytest.raises(OutputError, match="the parts hold 11 rows, not 12"):
            output.publish(ledger, plan, schema, 12)
        assert not ledger.is_published()
    if name in FILES:
        assert output.path.read_text() == "previous"
    else:
        assert not output.path.exists()
        assert "deep/folder/_SUCCESS" not in store.objects()


# ---- parts that are damaged after they were committed


def run_spoiled(output: Output, plan: Plan, spoil: Callable[[Ledger], Any]) -> None:
    """A run over whatever is there, in which something happens between the last commit and the publication."""
    with open_ledger(output.path, output.where, overwrite=True) as ledger:
        schema = output.columns(FACTS, plan_of()).schema()
        output.claim(ledger, plan, frozenset(), False)
        commit(ledger, ROWS, schema)
        spoil(ledger)
        output.publish(ledger, plan, schema, 11)


def exchange(part: Path) -> None:
    """Another part's bytes in the place of its own."""
    other = max(part.parent.glob("*.parquet"))
    data = other.read_bytes()
    other.write_bytes(part.read_bytes())
    part.write_bytes(data)


def flip(part: Path) -> None:
    data = bytearray(part.read_bytes())
    data[-20] ^= 1  # of the footer, in which Arrow finds no damage
    part.write_bytes(data)


def link(part: Path) -> None:
    part.rename(elsewhere := part.parents[2] / "elsewhere")
    part.symlink_to(elsewhere)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "flipped": flip,
    "emptied": lambda part: part.write_bytes(b""),
    "removed": lambda part: part.unlink(),
    "exchanged": exchange,
}
OF_A_FOLDER: dict[str, Callable[[Path], Any]] = {
    "doubled": lambda part: shutil.copy(part, part.with_name("00000007" + part.name[8:])),
    "another file": lambda part: (part.parent / "notes.txt").touch(),
    "a link": link,
}


@pytest.mark.parametrize("name", [*LOCAL, *REMOTE])
def test_a_part_that_is_damaged_later_is_never_published_and_is_made_again(
    tmp_path: Path, model: Model, store: Any, name: str
) -> None:
    damages = DAMAGES | (OF_A_FOLDER if name == "folder" else {})
    for damage, spoil in damages.items():
        store.clear()
        output = opened(name, tmp_path, model)
        plan, schema = plan_of(format=output.format, rows=6), output.columns(FACTS, plan_of()).schema()
        with pytest.raises(OutputError, match="part"):
            run_spoiled(output, plan, lambda ledger, spoil=spoil: spoil(ledger.part(0)))
        assert not output.path.exists(), damage
        assert not {"deep/folder/_SUCCESS", "deep/out.parquet", "deep/out.jsonl"} & store.objects().keys(), damage
        with open_ledger(output.path, output.where) as ledger:
            output.claim(ledger, plan, frozenset(), False)
            assert (0 in ledger.committed) == (damage in ("doubled", "another file")), damage
            commit(ledger, ROWS, schema, missing={0, 1} - ledger.committed.keys())
            output.publish(ledger, plan, schema, 11)
        if name != "answers.jsonl":
            data = store.objects("deep/") if "://" in name else local_files(output.path)
            assert read_rows(data) == records(ROWS), damage
        shutil.rmtree(output.path) if output.path.is_dir() else output.path.unlink(missing_ok=True)


@pytest.mark.parametrize("name", ["folder", "s3://out/deep/folder/"])
def test_a_damaged_part_does_not_cost_an_older_dataset(tmp_path: Path, model: Model, store: Any, name: str) -> None:
    run(opened(name, tmp_path, model), ROWS)
    output = opened(name, tmp_path, model)
    before = [local_files(output.path) if name == "folder" else store.objects()]
    with pytest.raises(OutputError, match="damaged"):
        run_spoiled(output, plan_of(format="dataset", rows=6, trim=True), lambda ledger: flip(ledger.part(1)))
    after = [local_files(output.path) if name == "folder" else store.objects()]
    assert before[0].items() <= after[0].items()


class Death(BaseException):
    """Of this process, by a signal or by a kill."""


def die_at(change: int, patch: pytest.MonkeyPatch, *, killed: bool) -> None:
    """From here on, the n-th change of a file is the last before the death; a kill lets nothing clear up after it."""
    left = [change]

    def last(call: Callable[..., Any]) -> Callable[..., Any]:
        def one(*arguments: Any, **options: Any) -> Any:
            if left[0] <= 0 and killed:
                raise Death
            done = call(*arguments, **options)
            left[0] -= 1
            if left[0] == 0:
                raise Death
            return done

        return one

    for name in ("rename", "replace", "unlink", "rmdir"):
        patch.setattr(os, name, last(getattr(os, name)))


@pytest.mark.parametrize("killed", [True, False])
@pytest.mark.parametrize("name", ["out.parquet", "folder"])
def test_from_the_last_commit_on_no_death_makes_a_chunk_again(
    tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch, name: str, killed: bool
) -> None:
    """An older output stays, or the new one is complete for the next run, which clears up, whatever it may replace."""
    output = opened(name, tmp_path, model)
    for change in count(1):
        plan = plan_of(format=output.format, rows=6, trim=bool(change % 2))  # the older output has the other
        with monkeypatch.context() as patch, suppress(Death), open_ledger(output.path, overwrite=True) as ledger:
            output.claim(ledger, plan, frozenset(), False)
            commit(ledger, ROWS, SCHEMA)
            die_at(change, patch, killed=killed)
            output.publish(ledger, plan, SCHEMA, 11)
            ledger.published = True
        is_there = output.path.exists() and read_plan(output.path) == plan
        assert is_there == ledger.is_published(), change
        assert is_there or change == 1 or killed or read_plan(output.path).trim != plan.trim, change
        if not work_directory(output.path).exists():
            break
        if not any(work_directory(output.path).iterdir()):
            work_directory(output.path).rmdir()
            continue
        with open_ledger(output.path, overwrite=True) as again:
            if find_finished(opened(name, tmp_path, model), again, plan, frozenset(), False) is None:
                output.claim(again, plan, frozenset(), False)
                assert len(again.committed) == 2, change
                output.publish(again, plan, SCHEMA, 11)
        assert read_plan(output.path) == plan
        assert read_rows(local_files(output.path)) == records(ROWS)
        assert list(tmp_path.iterdir()) == [output.path]
    assert change > 8


# ---- a dataset's folder, which may hold what is the user's


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def put(path: Path, what: str) -> None:
    """A file, a folder or a link of the user's in a dataset's folder."""
    if what == "a link":
        path.symlink_to(path.parent / "_SUCCESS")
    elif what == "a folder":
        path.mkdir()
        (path / "a.txt").write_text("mine")
    else:
        path.write_text("mine")


OTHERS = {
    "NOTES.txt": "a file",
    ".hidden": "a file",
    "labels": "a folder",
    "00000005-0123456789abcdef.parquet": "a link",
    "00000006-0123456789abcdef.parquet": "a folder",
    "00000001-0123456789abcdef.parquet": "a file",  # this chunk has a part already
}


@pytest.mark.parametrize("other", OTHERS)
def test_what_is_not_batchgens_in_a_dataset_is_never_removed(tmp_path: Path, model: Model, other: str) -> None:
    """It refuses the run at its start, and if it comes during the run, at its end; moved away, the run is resumed."""
    output = opened("folder", tmp_path, model)
    plan = plan_of(format="dataset", rows=6)
    run(output, ROWS)
    before = tree(output.path)
    with pytest.raises(OutputError, match=other[:8]):
        run_spoiled(output, plan, lambda _: put(output.path / other, OTHERS[other]))
    assert tree(output.path).items() > before.items()
    before = tree(output.path)
    with pytest.raises(OutputError, match=f"something other than a dataset of batchgen is there .{other[:8]}"):
        opened("folder", tmp_path, model, overwrite=True)
    assert tree(output.path) == before
    (output.path / other).rename(tmp_path / "away")
    output = opened("folder", tmp_path, model)
    with open_ledger(output.path) as ledger:
        output.claim(ledger, plan, frozenset(), False)
        assert len(ledger.committed) == 2
        output.publish(ledger, plan, SCHEMA, 11)
    assert sorted(os.listdir(tmp_path)) == ["away", "folder"]


# ---- one work directory, one output


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


@pytest.mark.parametrize("other", ["labels.parquet", "_RUN"])
def test_what_comes_into_a_claimed_prefix_is_neither_published_nor_removed(
    tmp_path: Path, model: Model, store: Any, other: str
) -> None:
    output, plan = opened("s3://out/a/", tmp_path, model), plan_of(format="dataset", rows=6)
    with suppress(KeyboardInterrupt), open_ledger(output.path, output.where) as ledger:
        output.claim(ledger, plan, frozenset(), False)
        commit(ledger, ROWS, SCHEMA)
        store.put(f"a/{other}", b'{"run": "of another"}')
        with pytest.raises((OutputError, BusyError), match=r"labels\.parquet|another run writes there"):
            output.publish(ledger, plan, SCHEMA, 11)
        raise KeyboardInterrupt
    there = store.objects("a/")
    assert there.keys() == {"_RUN", other}
    assert there[other] == b'{"run": "of another"}'
    store.clear()
    with open_ledger(output.path, output.where) as ledger:
        output.claim(ledger, plan, frozenset(), False)
        assert len(ledger.committed) == 2
        output.publish(ledger, plan, SCHEMA, 11)
    assert "_SUCCESS" in store.objects("a/")


def test_a_run_that_left_its_claim_does_not_remove_that_of_the_next(tmp_path: Path, model: Model, store: Any) -> None:
    outputs, plan = [], plan_of(format="dataset", rows=6)
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        outputs.append(opened("s3://out/a/", tmp_path / folder, model))
    with suppress(KeyboardInterrupt), open_ledger(outputs[0].path, outputs[0].where) as ledger:
        outputs[0].claim(ledger, plan, frozenset(), False)
        commit(ledger, ROWS, SCHEMA)
        outputs[0].publish(ledger, plan, SCHEMA, 11)
        shutil.copytree(ledger.directory, tmp_path / "left")
    shutil.move(tmp_path / "left", work_directory(outputs[0].path))
    with open_ledger(outputs[1].path, outputs[1].where, overwrite=True) as ledger:
        outputs[1].claim(ledger, replace(plan, trim=True), frozenset(), False)
        claim = store.objects("a/")["_RUN"]
        opened("s3://out/a/", tmp_path / "one", model)  # its check
        assert store.objects("a/")["_RUN"] == claim


@pytest.mark.parametrize(
    ("source", "name"),
    [
        *(("s3://out/p.jsonl", f"{address}p.jsonl") for address in ("s3://out//", "s3a://out/", "s3://k:s@out/./")),
        *(("s3://out/in/", f"s3://out/in/{name}") for name in ("out.parquet", "deep/", "")),
    ],
)
def test_an_input_in_a_store_is_neither_replaced_nor_added_to(tmp_path: Path, source: str, name: str) -> None:
    prompts = Prompts(InputOptions((source,)), (SimpleNamespace(where=source),))  # type: ignore[arg-type]
    with pytest.raises(OutputError, match="this is the input|it would be in the input"):
        check_address(parse_address(name), prompts)  # type: ignore[arg-type]


def test_an_output_beside_its_input_in_a_store_is_taken(tmp_path: Path) -> None:
    prompts = Prompts(InputOptions(("s3://out/in/", "https://host/p.jsonl?in=s3://out/x")))
    for name in ("s3://out/in2/", "s3://out/in.parquet", "gs://out/in/x.parquet", "s3://in/out/"):
        check_address(parse_address(name), prompts)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["a.parquet", "folder"])
def test_unfinished_work_is_for_one_output(tmp_path: Path, model: Model, store: Any, name: str) -> None:
    """Of two addresses, or an address and a path, with one last name, the second is refused and changes nothing."""
    end = "/" * (name == "folder")
    for mine, others in (
        (f"s3://out/x/{name}{end}", [f"s3://out/y/{name}{end}", name]),
        (name, [f"s3://out/x/{name}{end}"]),
    ):
        first = opened(mine, tmp_path, model)
        plan = plan_of(format=first.format, rows=6)
        with suppress(KeyboardInterrupt), open_ledger(first.path, first.where) as ledger:
            first.claim(ledger, plan, frozenset(), False)
            commit(ledger, ROWS, SCHEMA)
            raise KeyboardInterrupt
        before = tree(tmp_path)
        for other in others:
            second = opened(other, tmp_path, model)
            message = f"the work there is for {first.where}; resume that run, or choose another"
            with pytest.raises(BusyError, match=message), open_ledger(second.path, second.where, overwrite=True):
                raise AssertionError("two outputs have one work directory")
            assert tree(tmp_path) == before
        with open_ledger(first.path, first.where) as ledger:
            first.claim(ledger, plan, frozenset(), False)
            first.publish(ledger, plan, SCHEMA, 11)
        shutil.rmtree(first.path) if first.path.is_dir() else first.path.unlink(missing_ok=True)


@pytest.mark.parametrize("name", [*LOCAL, *REMOTE])
@pytest.mark.parametrize(("lost", "instead"), [(1, 3), (5, 4)])
def test_rows_that_are_not_those_of_the_input_are_never_published(
    tmp_path: Path, model: Model, request: pytest.FixtureRequest, name: str, lost: int, instead: int
) -> None:
    """As many as there should be, but one is there twice and one is not: a part of a chunk that was cut otherwise."""
    server = request.getfixturevalue("store") if "://" in name else None
    one = {row.row: row for row in ROWS if row.sample == 0}
    output = opened(name, tmp_path, model)
    schema = output.columns(FACTS, plan_of()).schema()
    with open_ledger(output.path, output.where) as ledger:
        plan = output.claim(ledger, plan_of(format=output.format, rows=6), frozenset(), False)
        commit(ledger, [one[instead if row == lost else row] for row in range(6)], schema)
        with pytest.raises(OutputError, match="does not hold each of its 6 input rows"):
            output.publish(ledger, plan, schema, 6)
    assert not output.path.exists()
    assert server is None or [key.rpartition("/")[2] for key in server.objects()] in ([], ["_RUN"])


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
    rows = opened("out.parquet", finished.parent, model, retry_failed=True).rows_to_do(Selection(range(FACTS.rows)))
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


def test_a_retry_never_mixes_its_rows_with_another_file(finished: Path, model: Model) -> None:
    output = opened("out.parquet", finished.parent, model, retry_failed=True)
    (finished.parent / "other").mkdir()
    run(opened("other/out.parquet", finished.parent, model), [replace(row, seed=7) for row in ROWS])
    other = (finished.parent / "other" / "out.parquet").read_bytes()
    publish = FileOutput.replace_rows

    def swap_then_publish(*args: Any) -> None:
        finished.write_bytes(other)
        publish(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileOutput, "replace_rows", swap_then_publish)
        with pytest.raises(OutputError, match=r"out\.parquet: the file was changed while its failed rows were"):
            run(output, ROWS)
    assert finished.read_bytes() == other


@pytest.mark.parametrize("made", [(1, 3), (3, 1), (0, 1), (1, 1), (1, 5)])
def test_a_retry_never_puts_a_row_in_the_place_of_another(finished: Path, model: Model, made: tuple[int, int]) -> None:
    before = finished.read_bytes()
    output = opened("out.parquet", finished.parent, model, retry_failed=True)
    with open_ledger(output.path) as ledger:
        todo = output.rows_to_do(Selection(range(FACTS.rows)))
        plan = output.claim(ledger, read_plan(finished), frozenset(), False)
        for chunk, row in enumerate(made):
            rows = [replace(one, row=row) for one in ROWS[:2]]
            path, receipt = ledger.attempt / f"{chunk:08d}.parquet", Receipt(chunk, "", "", 1, 2, 2, 0, 0, 0, 0)
            sha256 = write_part(rows, path, with_receipt(SCHEMA, receipt))
            ledger.commit(replace(receipt, path=str(path)).finished(sha256, 0.0))
        with pytest.raises(OutputError, match="does not hold each of its 6 input rows"):
            output.publish(ledger, plan, SCHEMA, 4 + todo.staying.total())
    assert finished.read_bytes() == before


def test_a_finished_file_in_another_order_is_not_retried(finished: Path, model: Model) -> None:
    pq.write_table(pq.read_table(finished).sort_by([("status", "ascending")]), finished)
    with pytest.raises(OutputError, match=r"out of order, or .*; it was changed: take the file as"):
        opened("out.parquet", finished.parent, model, retry_failed=True).rows_to_do(Selection(range(FACTS.rows)))


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


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda table: table.select(table.column_names[::-1]), "another program changed its columns"),
        (lambda table: table.append_column("mine", table["row"]), "another program changed its columns"),
        (lambda table: table.drop_columns("seed"), "another program changed its columns"),
        (lambda table: table.set_column(0, "row", table["row"].cast(pa.uint64())), "another program changed its"),
        (lambda table: table.slice(0, 3), "input rows, and its metadata says"),
        (lambda table: pa.concat_tables([table, table]), "input rows, and its metadata says"),
    ],
)
def test_a_retry_refuses_an_edited_file_before_its_rows(finished: Path, model: Model, change: Any, says: str) -> None:
    table = pq.ParquetFile(finished).read()
    pq.write_table(change(table).replace_schema_metadata(table.schema.metadata), finished)
    output = opened("out.parquet", finished.parent, model, retry_failed=True)

    def begin() -> None:
        output.rows_to_do(Selection(range(FACTS.rows)))
        output.columns(FACTS, plan_of())

    with pytest.raises(BatchgenError, match=says):
        begin()


def test_a_retry_reads_the_new_rows_when_it_comes_to_the_old_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batchgen.output.parts.BATCH_ROWS", 4)
    schema = pa.schema([("row", pa.int64()), ("sample", pa.int64()), ("status", pa.string())])
    old = [{"row": row, "sample": 0, "status": "failed" if row in (0, 5, 6, 18, 19) else "ok"} for row in range(20)]
    pq.write_table(pa.Table.from_pylist(old, schema), tmp_path / "out.parquet", row_group_size=8)
    new = [{"row": row, "sample": sample, "status": "ok"} for row in (0, 5, 6, 18, 19) for sample in range(3)]
    read: list[int] = []

    def batches() -> Iterator[pa.RecordBatch]:  # of two rows: the samples of a row are in two of them
        for at in range(0, len(new), 2):
            read.append(new[at]["row"])
            yield pa.RecordBatch.from_pylist(new[at : at + 2], schema)

    merged = []
    for batch in replace_failed(tmp_path / "out.parquet", batches()):
        merged += batch.to_pylist()
        assert all(row <= max(merged[-1]["row"], 0) or row == read[-1] for row in read)
    expected = [row for row in old if row["status"] == "ok"] + new
    assert merged == sorted(expected, key=lambda row: (row["row"], row["sample"]))
