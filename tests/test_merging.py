"""merging.py: merged shards are what one run writes, and whatever is not all shards of one job is named."""

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchgen.errors import BatchgenError, BusyError, InputError, OutputError, UsageError
from batchgen.files import replace_file, stamp_of, temporary_path
from batchgen.output import merging
from batchgen.output.beside import read_beside, write_beside
from batchgen.output.file import decide_rows, write_json_lines, write_parquet
from batchgen.output.ledger import open_ledger, work_directory
from batchgen.output.merging import merge_shards
from batchgen.output.reading import read_plan, read_stored
from batchgen.output.rows import Stored
from batchgen.output.schema import Columns, rows_to_table
from batchgen.plan import Plan
from batchgen.progress import status_path
from batchgen.review.replay import replay
from batchgen.run import run_job
from batchgen.types import OutputRow, SamplingParams
from tests.support.command import batchgen
from tests.support.jobs import make_job
from tests.support.models import write_byte_model
from tests.support.plans import plan_of
from tests.support.scores import KINDS, write_scores

SCHEMA = Columns(token_ids=True).schema(pa.schema([pa.field("topic", pa.string())]))
PER_RUN = {"chunk_rows", "batch_size", "kv_bytes"}  # of a plan; they may differ from one run's


def made(numbers: Sequence[int], seed: int) -> list[OutputRow]:
    """Output rows of these input rows: some rejected, some with several samples, one failed now and then."""
    rows: list[OutputRow] = []
    for number in numbers:
        rng = random.Random(seed * 1000 + number)
        status = rng.choice(["ok", "ok", "ok", "rejected", "failed"])
        if status != "ok":
            empty = (None,) * 5
            rows.append(OutputRow(number, 0, f"r{number}", *empty, status, f"p:{number}: no", None))  # type: ignore[arg-type]
            continue
        for sample in range(rng.randint(1, 3)):
            text = "é☃a" * rng.randint(0, 5)
            ids = tuple(rng.choices(range(50_000), k=rng.randint(0, 4)))
            rows.append(OutputRow(number, sample, None, "p", text, 1, len(ids), "length", "ok", None, 7, ids))
    return rows


def write_output(path: Path, rows: list[OutputRow], plan: Plan) -> Path:
    """What a run of this plan makes of these rows."""
    topics = pa.table({"topic": [f"t{row.row}" for row in rows]}, schema=pa.schema([("topic", pa.string())]))
    batches: Any = rows_to_table(rows, SCHEMA, topics).to_batches(max_chunksize=7)
    statuses: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    batches = decide_rows(batches, plan, statuses, left_out)
    with open(path, "wb") as file:
        if path.suffix == ".jsonl":
            write_json_lines(batches, file)
            write_beside(path, file, Stored(plan, statuses, left_out))
        else:
            write_parquet(batches, file, SCHEMA, plan, left_out)
    return path


def write_shards(folder: Path, plan: Plan, n: int, seed: int = 0, suffix: str = ".parquet") -> list[Path]:
    paths = []
    for k in range(1, n + 1):
        own = replace(plan, shard=f"{k}/{n}", chunk_rows=k, batch_size=k + 1)
        rows = made([*map(int, own.selection.numbers)], seed)
        paths.append(write_output(folder / f"s{k}{suffix}", rows, own))
    return paths


def whole(folder: Path, plan: Plan, seed: int = 0, suffix: str = ".parquet") -> Path:
    return write_output(folder / f"whole{suffix}", made([*map(int, plan.selection.numbers)], seed), plan)


def same_plan(a: Path, b: Path) -> bool:
    one, other = (read_plan(path).to_json() for path in (a, b))
    return {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)} <= PER_RUN


# ---- what one run writes

selections = st.fixed_dictionaries(
    {
        "rows": st.integers(0, 60),
        "skip_rows": st.integers(0, 20),
        "limit": st.none() | st.integers(1, 60),
        "sample": st.none() | st.integers(1, 60),
        "drop_duplicates": st.none() | st.just("completion"),
        "rejects": st.booleans(),
    }
)


@settings(max_examples=40)
@given(selections, st.integers(1, 9), st.integers(0, 99), st.randoms(), st.sampled_from([".parquet", ".jsonl"]))
def test_shards_in_any_order_are_merged_to_the_output_of_one_run(
    tmp_path_factory: pytest.TempPathFactory, selection: Any, n: int, seed: int, rng: random.Random, suffix: str
) -> None:
    folder = tmp_path_factory.mktemp("merge")
    plan = plan_of(**selection, format=suffix[1:], token_ids=True)
    one, shards = whole(folder, plan, seed, suffix), write_shards(folder, plan, n, seed, suffix)
    rng.shuffle(shards)
    out = folder / f"out{suffix}"
    summary = merge_shards(shards, out)
    stored = read_beside(one) if suffix == ".jsonl" else read_stored(one)
    assert summary.statuses == {status: stored.statuses[status] for status in summary.statuses}
    assert (summary.input_rows, summary.complete) == (len(plan.selection), False)
    if suffix == ".jsonl":
        assert out.read_bytes() == one.read_bytes()
        beside = [json.loads((folder / f"{name}.jsonl.plan.json").read_text()) for name in ("out", "whole")]
        for values in beside:
            values["plan"] = {name: value for name, value in values["plan"].items() if name not in PER_RUN}
        assert beside[0] == beside[1]
    else:
        assert pq.read_table(out).equals(pq.read_table(one))
        assert pq.read_schema(out) == pq.read_schema(one)
        assert read_stored(out).left_out == stored.left_out
        assert same_plan(out, one)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_model(tmp_path_factory.mktemp("merge") / "models" / "bytes")


@pytest.fixture(autouse=True)
def _model_under_its_name(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHGEN_MODELS", str(model.parent))


def contents(path: Path) -> Any:
    return path.read_bytes() if path.suffix == ".jsonl" else ds.dataset(path).to_table()


@pytest.mark.parametrize(("precision", "name"), [("float32", "o.parquet"), ("int8", "o"), ("float32", "o.jsonl")])
def test_runs_of_shards_merge_to_a_run_of_all(precision: Any, name: str, tmp_path: Path) -> None:
    """Sampled, with n=2, and other chunks in every run."""
    lines = [{"id": f"r{i}", "prompt": f"prompt {i % 13}" * (i != 6), "topic": [i]} for i in range(40)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    params = SamplingParams(max_tokens=6, temperature=0.9, n=2, seed=4)
    own = {"jobs": 1, "precision": precision, "keep": ("topic",), "dataset": name == "o"}
    for k, shard in enumerate([None, (1, 3), (2, 3), (3, 3)]):
        more = own | {"shard": shard, "chunk_rows": 5 + 2 * k}
        run_job(make_job(tmp_path / "p.jsonl", tmp_path / f"{k}-{name}", "bytes", params, **more))
    summary = merge_shards([tmp_path / f"{k}-{name}" for k in (3, 1, 2)], tmp_path / name)
    assert contents(tmp_path / name) == contents(tmp_path / f"0-{name}")
    assert (summary.ok, summary.rejected, summary.exit_code) == (78, 1, 3)
    if name != "o.jsonl":
        assert same_plan(tmp_path / name, tmp_path / f"0-{name}")
        assert replay(tmp_path / name, 10).differences == ()
    again = {"shard": None, "chunk_rows": None, "overwrite": False}
    job = make_job(tmp_path / "p.jsonl", tmp_path / name, "bytes", params, **own | again)
    assert run_job(job).complete  # and a run of all finds it made


def cut(output: Path, n: int) -> list[Path]:
    """The shards that are the parts of a whole output."""
    table, plan = pq.read_table(output), read_plan(output)
    paths = []
    for k in range(1, n + 1):
        own = replace(plan, shard=f"{k}/{n}")
        rows = table.filter(pc.is_in(table["row"], pa.array(own.selection.between(0, len(own.selection)))))
        schema = table.schema.with_metadata({"batchgen": json.dumps(own.to_json())})
        paths.append(output.with_name(f"s{k}.parquet"))
        pq.write_table(rows.cast(schema), paths[-1])
    return paths


@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_embeddings_merge_too(kind: Any, model: Path, tmp_path: Path) -> None:
    one = write_scores(tmp_path / "one.parquet", kind, model)
    merge_shards(cut(one, 5), tmp_path / "out.parquet")
    assert pq.read_table(tmp_path / "out.parquet").equals(pq.read_table(one))


def test_a_dataset_of_empty_shards_is_an_empty_dataset(tmp_path: Path) -> None:
    plan = plan_of(rows=0, format="dataset")
    for k in (1, 2):
        (tmp_path / f"s{k}").mkdir()
        (tmp_path / f"s{k}" / "_SUCCESS").write_text(json.dumps(replace(plan, shard=f"{k}/2").to_json()))
    assert merge_shards([tmp_path / "s2", tmp_path / "s1"], tmp_path / "out").rows == 0
    assert json.loads((tmp_path / "out" / "_SUCCESS").read_text()) == plan.to_json()
    assert merge_shards([tmp_path / "s1", tmp_path / "s2"], tmp_path / "out").complete


# ---- what is not all shards of one job


@pytest.fixture
def plan() -> Plan:
    return plan_of(rows=40, token_ids=True)


@pytest.fixture
def shards(tmp_path: Path, plan: Plan) -> list[Path]:
    return write_shards(tmp_path, plan, 8)


def refusal(kind: type[BatchgenError], paths: Sequence[Path], out: Path, **options: Any) -> str:
    before = out.read_bytes() if out.is_file() else None
    with pytest.raises(BatchgenError) as caught:
        merge_shards(paths, out, **options)
    assert type(caught.value) is kind
    assert (out.read_bytes() if out.is_file() else None) == before
    assert not temporary_path(out).exists()
    return str(caught.value).replace(f"{out.parent}/", "")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([1, 2, 4, 5, 6, 7, 8], "8 shards, and 3/8 is missing; give each of them once"),
        ([1, 2, 6, 8], "8 shards, and 3/8 to 5/8 are missing; 7/8 is missing; give each of them once"),
        ([1, 2, 3, 4, 5, 5, 6, 7, 8], "8 shards, and 5/8 is both s5.parquet and s5.parquet; give each of them once"),
        ([8], "8 shards, and 1/8 to 7/8 are missing; give each of them once"),
    ],
)
def test_shards_that_are_missing_or_double_are_named(
    shards: list[Path], tmp_path: Path, given: list[int], words: str
) -> None:
    assert refusal(UsageError, [shards[k - 1] for k in given], tmp_path / "out.parquet") == words


def test_many_missing_shards_are_named_in_part(tmp_path: Path, plan: Plan) -> None:
    shards = write_shards(tmp_path, plan, 40)
    assert "; and 12 more; give" in refusal(UsageError, shards[::2], tmp_path / "out.parquet")


def test_shards_of_other_numbers_overlap(shards: list[Path], tmp_path: Path, plan: Plan) -> None:
    (tmp_path / "b").mkdir()
    others = write_shards(tmp_path / "b", plan, 4)
    words = "s1.parquet is 1/8 and b/s4.parquet is 4/4, which overlap; merge shards of one number"
    assert refusal(UsageError, [*shards, others[3]], tmp_path / "out.parquet") == words


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"parameters": SamplingParams(seed=3, stop_token_ids=(1, 2))}, "it had --seed 0, and this has --seed 3"),
        ({"precision": "int8"}, "it had --precision float32, and this has --precision int8"),
        ({"limit": 40}, "it had no --limit, and this has --limit 40"),
        ({"batchgen": "2.0"}, "it had batchgen '1.0', and this has batchgen '2.0'"),
        ({"regex": "2026"}, ""),
        ({"input": "abd"}, "the input is not what it was (SHA-256 abc then, abd now)"),
        ({"model_hash": "4567"}, "it had model_hash '0123', and this has model_hash '4567'"),
        ({"numpy": "9.9", "python": "9.9", "pyarrow": "9.9", "kv_bytes": 7, "reuse": ("ab",)}, ""),
    ],
)
def test_a_shard_of_another_job_is_named_with_what_differs(
    shards: list[Path], tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    own = replace(read_plan(shards[2]), **changes)
    write_output(shards[2], made([*map(int, own.selection.numbers)], 0), own)
    if not words:
        assert merge_shards(shards, tmp_path / "out.parquet").input_rows == 40
        return
    said = refusal(UsageError, shards, tmp_path / "out.parquet")
    assert said == f"s3.parquet: not of the job that made s1.parquet: {words}; merge shards of one job"


def test_an_output_of_all_rows_is_no_shard(shards: list[Path], tmp_path: Path, plan: Plan) -> None:
    said = refusal(InputError, [*shards, whole(tmp_path, plan)], tmp_path / "out.parquet")
    assert said == "whole.parquet: it was made without --shard, so it is no part of a whole; leave it out"


def test_a_shard_that_is_not_there_or_not_finished_is_named(shards: list[Path], tmp_path: Path) -> None:
    shards[4].unlink()
    assert "s5.parquet: no such file; check the name" in refusal(InputError, shards, tmp_path / "out.parquet")
    work_directory(shards[4]).mkdir()
    said = refusal(BusyError, shards, tmp_path / "out.parquet")
    assert said == "s5.parquet: not finished yet; resume it with its own command, and merge then"


def flip(path: Path) -> None:
    """Damage the file in its first pages, which its metadata does not show."""
    data = bytearray(path.read_bytes())
    data[100:110] = bytes(10)
    path.write_bytes(data)


def swap(path: Path) -> None:
    table = pq.read_table(path)
    order = [*range(len(table) - 1, -1, -1)]
    pq.write_table(table.take(order), path)


def drop_a_row(path: Path) -> None:
    table = pq.read_table(path)
    pq.write_table(table.filter(pc.not_equal(table["row"], table["row"][0])), path)


def rename_a_column(path: Path) -> None:
    table = pq.read_table(path)
    names = ["subject" if name == "topic" else name for name in table.column_names]
    pq.write_table(table.rename_columns(names), path)


@pytest.mark.parametrize("damage", [flip, swap, drop_a_row, rename_a_column, lambda path: path.write_bytes(b"PAR1")])
def test_a_damaged_shard_is_named_and_the_output_stays(
    shards: list[Path], tmp_path: Path, damage: Callable[[Path], Any]
) -> None:
    out = tmp_path / "out.parquet"
    for shown in (False, True):  # without an output, and with one
        if shown:
            merge_shards(write_shards(tmp_path, plan_of(rows=40, token_ids=True), 8), out)
        damage(shards[6])
        said = refusal(InputError, shards, out, overwrite=True)
        assert said.startswith("s7.parquet: ")
        assert ";" in said


def test_json_lines_that_were_changed_are_named(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, plan_of(rows=9, format="jsonl", token_ids=True), 3, suffix=".jsonl")
    with open(shards[1], "a") as file:
        file.write("{}\n")
    said = refusal(InputError, shards, tmp_path / "out.jsonl")
    assert said == "s2.jsonl: it is not the file that s2.jsonl.plan.json was written for"
    (tmp_path / "s2.jsonl.plan.json").unlink()
    assert "is not beside it" in refusal(InputError, shards, tmp_path / "out.jsonl")


# ---- the place


def test_a_finished_output_is_replaced_only_if_that_was_asked_for(
    shards: list[Path], tmp_path: Path, plan: Plan
) -> None:
    out = tmp_path / "out.parquet"
    other = replace(plan, trim=True)
    write_output(out, made(range(40), 1), other)
    status_path(out).write_text('{"state": "finished"}')
    said = refusal(UsageError, shards, out)
    assert said.startswith("out.parquet is complete: it had --trim, and this has no --trim; choose another name")
    assert not merge_shards(shards, out, overwrite=True).complete
    assert not status_path(out).exists()  # it was about what was there before
    out.write_text("something else")
    assert "not a complete output of batchgen" in refusal(OutputError, shards, out)
    assert not work_directory(out).exists()


def test_the_same_merge_again_is_complete_and_changes_nothing(shards: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    first = merge_shards(shards, out)
    before = (stamp_of(out), out.read_bytes())
    again = merge_shards(shards[::-1], out)
    assert again.complete
    assert (again.statuses, again.exit_code) == (first.statuses, first.exit_code)
    assert (stamp_of(out), out.read_bytes()) == before  # not the time of the last look


def test_a_shard_that_was_tried_again_is_not_merged_already(shards: list[Path], tmp_path: Path, plan: Plan) -> None:
    out = tmp_path / "out.parquet"
    failed = merge_shards(shards, out).failed
    assert failed
    for path in shards:
        own = read_plan(path)
        rows = [row for row in made([*map(int, own.selection.numbers)], 0)]
        write_output(path, [replace(row, status="ok") if row.status == "failed" else row for row in rows], own)
    said = refusal(UsageError, shards, out)
    assert said == (
        f"out.parquet is complete with {failed} failed rows, and the shards have 0; pass --overwrite to replace it"
    )
    assert merge_shards(shards, out, overwrite=True).failed == 0


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("s3.parquet", OutputError, "s3.parquet: this is the input s3.parquet; choose another name"),
        (
            "out.jsonl",
            UsageError,
            "out.jsonl: the shards are Parquet files, and so will be the output; name a .parquet",
        ),
        ("out", UsageError, "out: the shards are Parquet files, and so will be the output; name a .parquet file"),
        ("none/out.parquet", OutputError, "no such folder; create it"),
    ],
)
def test_a_place_that_cannot_be_the_output_is_refused(
    shards: list[Path], tmp_path: Path, name: str, kind: Any, words: str
) -> None:
    assert words in refusal(kind, shards, tmp_path / name).replace(f"{tmp_path}/", "")


def test_an_unfinished_run_of_the_output_is_left_alone(shards: list[Path], tmp_path: Path, plan: Plan) -> None:
    out = tmp_path / "out.parquet"
    directory = work_directory(out)
    directory.mkdir()
    replace_file(directory / "plan.json", json.dumps(plan.to_json()).encode())
    said = refusal(BusyError, shards, out, overwrite=True)
    assert said.startswith("out.parquet.batchgen: an unfinished run is to write ")
    assert (directory / "plan.json").exists()


def test_a_run_that_holds_the_output_is_not_disturbed(shards: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    with open_ledger(out):
        assert "another run holds it" in refusal(BusyError, shards, out)


# ---- ended in the middle


def test_a_merge_that_is_interrupted_leaves_nothing(
    shards: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.parquet"
    before = {*tmp_path.iterdir()}
    read = merging.read_batches

    def breaks_off(path: Path, columns: Any = None) -> Iterator[pa.RecordBatch]:
        if path == shards[5]:
            raise KeyboardInterrupt
        yield from read(path, columns)

    with monkeypatch.context() as patch:
        patch.setattr(merging, "read_batches", breaks_off)
        with pytest.raises(KeyboardInterrupt):
            merge_shards(shards, out)
    assert {*tmp_path.iterdir()} == before
    merge_shards(shards, out)


def test_what_a_killed_merge_has_left_is_removed_by_the_next(shards: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    temporary_path(out).write_text("half")
    (work_directory(out) / "parts").mkdir(parents=True)
    (work_directory(out) / "parts" / f"00000000-{'0' * 16}.parquet").write_text("half")
    (work_directory(out) / "attempt-0").mkdir()
    merge_shards(shards, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["out.parquet", *(one.name for one in shards)])


# ---- the command


def test_the_command_finds_shards_by_a_pattern_and_says_what_it_has_made(shards: list[Path], tmp_path: Path) -> None:
    done = batchgen("merge", "s*.parquet", "-o", "out.parquet", folder=tmp_path)
    lines = done.stdout.decode().splitlines()
    assert done.returncode == 3
    assert lines[0].endswith("failed")
    assert lines[1:] == ["merged: 8 shards", "output: out.parquet"]
    again = batchgen("merge", *shards, "-o", "out.parquet", folder=tmp_path)
    assert again.returncode == 3
    assert b"complete: there was nothing to do" in again.stdout


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["x*.parquet", "-o", "out.parquet"], 1, "x*.parquet: no file has such a name; check the pattern"),
        (
            ["s3://a/b.parquet", "-o", "out.parquet"],
            2,
            "s3://a/b.parquet: a merge is of a local file; download it first",
        ),
        (["s1.parquet", "-o", "s3://a/b.parquet"], 2, "s3://a/b.parquet: a merge is of a local file"),
        (["s1.parquet", "-o", "/"], 2, "--output '/' is not a file name"),
        (["s1.parquet", "-o", "out.parquet"], 2, "8 shards, and 2/8 to 8/8 are missing"),
    ],
)
def test_the_command_refuses_in_one_line(
    shards: list[Path], tmp_path: Path, words: list[str], code: int, said: str
) -> None:
    done = batchgen("merge", *words, folder=tmp_path)
    assert (done.returncode, done.stderr.decode().count("\n")) == (code, 1)
    assert said in done.stderr.decode()


def test_a_shard_may_have_the_name_of_a_pattern(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, plan_of(rows=3, token_ids=True), 1)
    shutil.move(shards[0], tmp_path / "s[1].parquet")
    assert b"merged: 1 shard\n" in batchgen("merge", "s[1].parquet", "-o", "out.parquet", folder=tmp_path).stdout
