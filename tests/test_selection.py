"""selection.py: shards are a partition, samples are stable, and a selected row is what it is in the full run."""

import html
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchgen.errors import UsageError
from batchgen.input import jsonl
from batchgen.input.prompts import Cut, Prompts
from batchgen.job import EmbedOptions, InputOptions, Job, ScoreInput, ScoreOptions, WorkOptions
from batchgen.options import SLURM_ARRAY, check_shard, parse_shard
from batchgen.output.reading import read_plan
from batchgen.output.retried import find_failed
from batchgen.planning import select
from batchgen.progress import read_status, status_path
from batchgen.review.forecast import forecast_job
from batchgen.review.replay import replay
from batchgen.review.report.page import write_report
from batchgen.run import run_job
from batchgen.selection import Selection, select_rows
from batchgen.types import SamplingParams
from tests.support.command import batchgen
from tests.support.jobs import change_job, make_job
from tests.support.models import write_byte_model
from tests.support.plans import plan_of

ROOT = Path(__file__).parents[1]

# ---- which rows

choices = st.fixed_dictionaries(
    {
        "rows": st.integers(0, 300),
        "skip_rows": st.integers(0, 310),
        "limit": st.none() | st.integers(1, 310),
        "sample": st.none() | st.integers(1, 310),
        "seed": st.integers(0, 2**63 - 1),
    }
)


def numbers(*values: Any, **options: Any) -> list[int]:
    return [*map(int, select_rows(*values, **options).numbers)]


@given(choices)
def test_a_selection_is_ascending_rows_of_the_slice_as_many_as_asked_for(options: dict[str, Any]) -> None:
    found = numbers(**options)
    limit = options["rows"] if options["limit"] is None else options["limit"]
    slice_ = range(options["rows"])[options["skip_rows"] :][:limit]
    assert found == sorted({*found} & {*slice_})
    assert len(found) == (len(slice_) if options["sample"] is None else min(len(slice_), options["sample"]))


@given(choices, st.integers(1, 40))
def test_shards_are_a_partition_in_order_whose_sizes_differ_by_one_at_most(options: dict[str, Any], n: int) -> None:
    whole = numbers(**options)
    shards = [select_rows(**options, shard=(k, n)) for k in range(1, n + 1)]
    assert [int(row) for shard in shards for row in shard.numbers] == whole
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
    for shard in shards:
        assert [*map(int, shard.before)] == whole[: len(shard.before)]
        assert [int(row) for row in (*shard.before, *shard.numbers)] == whole[: len(shard.before) + len(shard)]


@given(choices, st.integers(0, 100))
def test_of_a_sample_most_rows_stay_when_the_input_grows(options: dict[str, Any], more: int) -> None:
    """A row that leaves makes place for a new one, and no old one comes in."""
    options |= {"limit": None}
    before, after = numbers(**options), numbers(**options | {"rows": options["rows"] + more})
    if options["sample"] is not None:
        assert {row for row in after if row < options["rows"]} <= {*before}


def test_a_sample_is_drawn_by_the_seed_and_from_everywhere() -> None:
    samples = [numbers(10_000, sample=1000, seed=seed) for seed in (0, 0, 1, 2**63 - 1)]
    assert samples[0] == samples[1]
    assert len({tuple(one) for one in samples}) == 3
    for sample in samples:
        assert np.histogram(sample, 10, (0, 10_000))[0].min() > 60


@given(choices, st.none() | st.integers(1, 5))
def test_a_selection_knows_its_rows_its_end_and_what_stands_where(options: dict[str, Any], n: int | None) -> None:
    one = select_rows(**options, shard=None if n is None else (n, 5))
    found = [*map(int, one.numbers)]
    assert [row for row in range(options["rows"]) if row in one] == found
    assert one.end == max(found, default=-1) + 1
    assert one.between(1, 4).tolist() == found[1:4]
    assert len(one) == len(found)


def test_more_rows_than_any_input_has_are_no_error() -> None:
    assert len(select_rows(10**900)) == 2**62
    assert len(select_rows(10**900, shard=(1, 2))) == 2**61
    assert len(select_rows(-1)) == 0


def test_all_rows_are_a_selection() -> None:
    assert [*Selection(range(3)).numbers] == [0, 1, 2]
    assert Selection(range(3)).end == 3


@given(choices, st.none() | st.tuples(st.integers(1, 7), st.just(7)))
def test_a_plan_says_which_rows_it_has_done_and_its_command_line_makes_an_equal_one(
    options: dict[str, Any], shard: tuple[int, int] | None
) -> None:
    rows, seed = options.pop("rows"), options.pop("seed")
    text = None if shard is None else f"{shard[0]}/{shard[1]}"
    plan = plan_of(rows=rows, parameters=SamplingParams(seed=seed), shard=text, **options)
    assert [*plan.selection.numbers] == [*select_rows(rows, **options, seed=seed, shard=shard).numbers]
    assert type(plan).from_json(plan.to_json()) == plan
    words = plan.command_line().split()
    given = {word: words[at + 1] for at, word in enumerate(words[:-1]) if word.startswith("--")}
    assert given.get("--shard") == text
    for name in ("limit", "sample"):
        assert given.get(f"--{name}") == (None if options[name] is None else str(options[name]))
    assert given.get("--skip-rows", "0") == str(options["skip_rows"])


# ---- shards on a command line


def test_a_shard_is_the_kth_of_n() -> None:
    assert parse_shard("3/8") == (3, 8)
    assert parse_shard(" 1 / 1 ") == (1, 1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("9/8", r"'9/8' is out of range \(1/8 to 8/8\)"),
        ("0/8", r"'0/8' is out of range \(1/8 to 8/8\)"),
        ("1/0", r"'1/0' is out of range"),
        ("1/1000001", r"'1/1000001' is out of range"),
        ("3/", "'3/': not a part of a whole; write 3/8"),
        ("3", "'3': not a part"),
        ("-1/8", "'-1/8': not a part"),
        ("", "'': not a part"),
        ("three/8", "not a part"),
        ("Auto", "not a part"),
    ],
)
def test_what_is_no_shard_is_refused_with_the_range(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_shard(text)


@pytest.mark.parametrize("shard", [(0, 8), (9, 8), (1,), "3", 3, (1.0, 2), (True, 2), [1, 2]])
def test_a_shard_in_python_is_a_pair_or_its_text(shard: Any) -> None:
    assert InputOptions("p.jsonl", shard="3/8").shard == (3, 8)
    check_shard(None)
    with pytest.raises(UsageError, match="shard"):
        InputOptions("p.jsonl", shard=shard)


def array(monkeypatch: pytest.MonkeyPatch, *values: object, step: object = None) -> None:
    for name, value in zip(SLURM_ARRAY, values, strict=False):
        monkeypatch.setenv(name, str(value))
    if step is not None:
        monkeypatch.setenv("SLURM_ARRAY_TASK_STEP", str(step))


@pytest.mark.parametrize(
    ("task", "first", "last", "count", "step", "shard"),
    [
        (0, 0, 7, 8, None, (1, 8)),  # --array=0-7
        (7, 0, 7, 8, 1, (8, 8)),
        (3, 1, 8, 8, 1, (3, 8)),  # --array=1-8
        (5, 1, 15, 8, 2, (3, 8)),  # --array=1-15:2
        (15, 1, 15, 8, 2, (8, 8)),
        (4, 4, 4, 1, 1, (1, 1)),
    ],
)
def test_auto_is_the_place_of_the_task_in_its_array(
    task: int, first: int, last: int, count: int, step: int | None, shard: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    array(monkeypatch, task, first, last, count, step=step)
    assert parse_shard("auto") == shard


@pytest.mark.parametrize(
    ("values", "step", "words"),
    [
        ((), None, "'auto': this is no task of a Slurm array .SLURM_ARRAY_TASK_ID is not set.; write 3/8"),
        ((1, 0, 7), None, "SLURM_ARRAY_TASK_COUNT is not set"),
        ((1, "zero", 7, 8), None, "no numbers"),
        ((3, 1, 7, 3), 1, "task 3 of 3 from 1 to 7 has no place in a row of tasks with steps of 1"),  # 1,3,7
        ((2, 1, 15, 8), 2, "no place"),
        ((9, 1, 8, 8), 1, "no place"),
        ((0, 1, 8, 8), 1, "no place"),
    ],
)
def test_auto_outside_of_an_array_or_with_gaps_is_refused(
    values: Any, step: Any, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*SLURM_ARRAY, "SLURM_ARRAY_TASK_STEP"):
        monkeypatch.delenv(name, raising=False)
    array(monkeypatch, *values, step=step)
    with pytest.raises(ValueError, match=words):
        parse_shard("auto")


# ---- through jobs

N = 61
PARAMS = SamplingParams(max_tokens=8, temperature=0.9, n=2, seed=5, logprobs=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("selection")
    rows = [{"id": f"r{i}", "prompt": f"a prompt {i % 20}" * (i % 9 != 4), "topic": ["t", i]} for i in range(N)]
    rows = [row | ({"max_tokens": 3} if at % 7 == 1 else {}) for at, row in enumerate(rows)]
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [{"custom_id": f"c{i}", "method": "POST", "url": "/v1/completions"} for i in range(N)]
    bodies = [{"model": "bytes", "prompt": f"line {i}" * (i != 4), "max_tokens": 4} for i in range(N)]
    both = zip(lines, bodies, strict=True)
    (folder / "batch.jsonl").write_text("".join(json.dumps(line | {"body": body}) + "\n" for line, body in both))
    write_byte_model(folder / "models" / "bytes")
    return folder


@pytest.fixture(autouse=True)
def _model_under_its_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHGEN_MODELS", str(folder / "models"))


def run(folder: Path, name: str, input: str = "p.jsonl", **options: Any) -> Any:
    own = {"jobs": 1, "keep": ("topic",) if input == "p.jsonl" else ()}
    path = folder / name
    is_dataset = path.suffix == ""
    run_job(make_job(folder / input, path, "bytes", PARAMS, dataset=is_dataset, **own | options))
    if path.suffix == ".jsonl":
        return path.read_text().splitlines()
    return ds.dataset(path).to_table() if is_dataset else pq.read_table(path)


@pytest.fixture(scope="module")
def full(folder: Path) -> dict[str, Any]:
    """Every row, in each kind of output."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BATCHGEN_MODELS", str(folder / "models"))
        return {
            ".parquet": run(folder, "full.parquet"),
            "": run(folder, "full"),
            ".jsonl": run(folder, "full.jsonl"),
            "answers": run(folder, "answers.jsonl", "batch.jsonl"),
        }


SELECTIONS: list[dict[str, Any]] = [
    {"limit": 5},
    {"skip_rows": 7, "limit": 20},
    {"sample": 15},
    {"skip_rows": 3, "limit": 50, "sample": 30, "shard": (2, 3)},
]


def chosen(options: dict[str, Any]) -> list[int]:
    return numbers(N, **options, seed=PARAMS.seed)


@pytest.mark.parametrize("options", SELECTIONS, ids=str)
def test_selected_rows_are_those_of_the_full_run_in_every_column(
    folder: Path, tmp_path: Path, full: dict[str, Any], options: dict[str, Any]
) -> None:
    table = run(folder, tmp_path / "o.parquet", **options)
    expected = full[".parquet"].filter(pc.is_in(full[".parquet"]["row"], pa.array(chosen(options))))
    assert table.equals(expected)
    assert read_plan(tmp_path / "o.parquet").selection == select_rows(N, **options, seed=PARAMS.seed)


def test_so_are_those_of_datasets_json_lines_and_answers(folder: Path, tmp_path: Path, full: dict[str, Any]) -> None:
    options = SELECTIONS[3]
    rows = chosen(options)
    assert run(folder, tmp_path / "d", **options).equals(full[""].filter(pc.is_in(full[""]["row"], pa.array(rows))))
    lines = [line for line in full[".jsonl"] if json.loads(line)["row"] in rows]
    assert run(folder, tmp_path / "o.jsonl", **options) == lines
    assert json.loads((tmp_path / "o.jsonl.plan.json").read_text())["plan"]["shard"] == "2/3"
    answers = run(folder, tmp_path / "a.jsonl", "batch.jsonl", **options)
    assert answers == [full["answers"][row] for row in rows]


@pytest.mark.parametrize("task", [ScoreOptions(), EmbedOptions()], ids=["score", "embed"])
def test_so_are_scores_and_embeddings(folder: Path, tmp_path: Path, task: Any) -> None:
    tables = []
    for options in ({}, SELECTIONS[3]):
        read = ScoreInput(folder / "p.jsonl", text_column="prompt", task=task, row_params=False, **options)
        path = tmp_path / f"{len(tables)}.parquet"
        run_job(Job(read, path, "bytes", work=WorkOptions(jobs=1)))
        tables.append(pq.read_table(path))
    rows = numbers(N, **SELECTIONS[3])
    assert tables[1].equals(tables[0].filter(pc.is_in(tables[0]["row"], pa.array(rows))))


def test_the_last_row_is_the_last_that_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scan reads all, for the hash."""
    prompts = Prompts.open(InputOptions(folder / "p.jsonl", limit=3))
    facts = prompts.scan()
    assert facts.rows == N
    seen: list[int] = []
    read = jsonl.read

    def watched(*values: Any) -> Any:
        for rows in read(*values):
            for item in rows.items:
                seen.append(item.row)
                one = rows.take([item.row - rows.items[0].row])
                yield one

    monkeypatch.setattr(jsonl, "read", watched)
    cut = Cut.for_output("parquet", 4, select_rows(N, limit=3))
    assert [item.row for chunk in prompts.chunks(facts, PARAMS, lambda item: item, cut) for item in chunk.items] == [
        *(0, 1, 2)
    ]
    assert seen == [0, 1, 2, 3]


# ---- what people see of it


@pytest.fixture(scope="module")
def part(folder: Path, full: dict[str, Any]) -> Path:
    """An output of 20 rows of 61."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BATCHGEN_MODELS", str(folder / "models"))
        run(folder, "part.parquet", shard=(2, 3), limit=60, status=True)
    return folder / "part.parquet"


def test_the_status_the_report_and_the_verification_of_a_part_are_about_its_rows(part: Path, tmp_path: Path) -> None:
    status = read_status(status_path(part))
    assert (status["rows"], status["rows_done"]) == (20, 20)
    done = replay(part, 100)
    assert (done.rows, done.differences) == (20, ())
    write_report(part, tmp_path / "r.html")
    page = html.unescape((tmp_path / "r.html").read_text())
    assert "20 of the input's 61 rows" in page
    assert "--limit 60" in page
    assert "--shard 2/3" in page


def test_a_part_without_a_row_of_its_own_is_no_whole_part(part: Path, tmp_path: Path) -> None:
    assert [*find_failed(part, read_plan(part).selection, Counter()).numbers] == []  # type: ignore[call-overload]
    table = pq.read_table(part)
    pq.write_table(table.slice(2), tmp_path / "less.parquet")
    with pytest.raises(Exception, match="row 21 is out of order, or the rows before it are missing"):
        replay(tmp_path / "less.parquet", 5)


def command(folder: Path, *more: object, out: object = "part.parquet", verb: str = "generate") -> Any:
    words = [*verb.split(), "p.jsonl", "-o", out, "--model", "bytes", "--max-tokens", 8, "--temperature", 0.9, "-n", 2]
    words += ["--seed", 5, "--logprobs", 1, "--keep", "topic", "--jobs", 1, "--show", 0]
    return batchgen(*words, *more, folder=folder)


def test_the_same_part_again_is_complete_and_another_is_refused_by_name(part: Path) -> None:
    assert b"complete: there was nothing to do" in command(part.parent, "--shard", "2/3", "--limit", 60).stdout
    refused = command(part.parent, "--shard", "1/3")
    assert refused.returncode == 2
    assert (
        b"is complete: it had --limit 60, --shard 2/3, and this has no --limit, --shard 1/3; choose" in refused.stderr
    )
    assert b"it had --shard 2/3, and this has no --shard;" in command(part.parent, "--limit", 60).stderr


def test_plan_says_how_many_rows_of_how_many(part: Path) -> None:
    said = command(part.parent, "--sample", 9, "--no-time", out="x.parquet", verb="plan").stdout.decode()
    assert said.startswith("rows: 9 of the input's 61: ")
    job = make_job(part.parent / "p.jsonl", "", "bytes", PARAMS, sample=9, shard=(1, 2))
    forecast = forecast_job(job, measure_time=False)
    assert (forecast.rows, forecast.input_rows) == (4, 61)


def test_a_plan_of_rows_far_apart_has_a_time(folder: Path) -> None:
    """The rows to measure are chosen by their place in the selection, not by their number."""
    forecast = forecast_job(make_job(folder / "p.jsonl", "", "bytes", PARAMS, skip_rows=1, limit=1, jobs=1))
    assert forecast.seconds is not None


@pytest.mark.parametrize(
    ("more", "what"),
    [(["--skip-rows", 61], "--skip-rows 61"), (["--limit", 2, "--shard", "1/3"], "--shard 1/3")],
)
def test_a_selection_without_rows_is_an_output_without_rows_and_a_word(
    folder: Path, tmp_path: Path, more: list[Any], what: str
) -> None:
    done = command(folder, *more, out=tmp_path / "o.parquet")
    assert done.returncode == 0
    assert f"note: of the input's 61 rows, none is left by {what}" in done.stderr.decode()
    assert pq.read_table(tmp_path / "o.parquet").num_rows == 0
    assert command(folder, *more, out=tmp_path / "o.parquet").returncode == 0


# ---- resumed, and tried again


def test_a_part_that_was_killed_resumes_to_the_same_bytes(folder: Path, tmp_path: Path, full: dict[str, Any]) -> None:
    words = ["generate", folder / "p.jsonl", "-o", tmp_path / "o.parquet", "--model", "bytes", "--max-tokens", 8]
    words += ["--temperature", 0.9, "-n", 2, "--seed", 5, "--logprobs", 1, "--keep", "topic", "--jobs", 1]
    words += ["--chunk-rows", 1, "--sample", 40, "--shard", "2/2", "--show", 0]
    process = subprocess.Popen(
        [sys.executable, "-m", "batchgen", *map(str, words)], env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    parts = tmp_path / "o.parquet.batchgen" / "parts"
    while process.poll() is None and not (parts.exists() and any(parts.iterdir())):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert batchgen(*words, folder=folder).returncode in (0, 3)
    rows = pa.array(numbers(N, sample=40, seed=5, shard=(2, 2)))
    assert pq.read_table(tmp_path / "o.parquet").equals(
        full[".parquet"].filter(pc.is_in(full[".parquet"]["row"], rows))
    )


def test_failed_rows_of_a_part_are_made_again(folder: Path, part: Path, tmp_path: Path) -> None:
    table = pq.read_table(part)
    rows = table.to_pylist()
    kept: list[dict[str, Any]] = []
    for row in rows:
        is_failed = row["row"] % 5 == 0 and row["status"] == "ok"
        if is_failed and row["sample"] == 0:
            empty = {name: None for name in row} | {name: row[name] for name in ("row", "sample", "id", "topic")}
            kept.append(empty | {"status": "failed", "error": "it died", "prompt": row["prompt"]})
        elif not is_failed:
            kept.append(row)
    assert len(kept) < len(rows)
    broken = tmp_path / "o.parquet"
    pq.write_table(pa.Table.from_pylist(kept, table.schema), broken)
    done = command(folder, "--limit", 60, "--shard", "2/3", "--retry-failed", out=broken)
    assert done.returncode == 3
    assert pq.read_table(broken).equals(table)


def test_a_run_in_python_and_its_plan_select_the_same(folder: Path) -> None:
    job = make_job(folder / "p.jsonl", "o.parquet", "bytes", PARAMS, sample=9)
    facts = Prompts.open(job.input).scan()
    assert [*select(job, facts).numbers] == numbers(N, sample=9, seed=5)


@pytest.mark.parametrize("name", ["o.parquet", "o.jsonl", "d/"])
def test_a_part_in_a_store_is_that_of_a_local_run(
    folder: Path, tmp_path: Path, full: dict[str, Any], store_server: Any, name: str
) -> None:
    store_server.clear()
    own = {"jobs": 1, "keep": ("topic",), "shard": (2, 3), "limit": 60}
    job = make_job(folder / "p.jsonl", f"s3://out/{name}", "bytes", PARAMS, work_dir=tmp_path, **own)
    assert run_job(job).input_rows == 20
    assert run_job(change_job(job, overwrite=False)).complete
    for path, content in store_server.objects().items():
        (tmp_path / path.rpartition("/")[2]).write_bytes(content)
    rows = numbers(N, limit=60, shard=(2, 3))
    if name == "o.jsonl":
        expected = [line for line in full[".jsonl"] if json.loads(line)["row"] in rows]
        assert (tmp_path / "o.jsonl").read_text().splitlines() == expected
    else:
        files = sorted(map(str, tmp_path.glob("*.parquet")))
        table = full[".parquet"]
        assert ds.dataset(files).to_table().equals(table.filter(pc.is_in(table["row"], pa.array(rows))))
