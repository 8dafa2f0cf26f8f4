"""reused.py and older.py: an output made with --reuse is the one that a full run makes, and as little is generated."""

import json
import os
import random
from collections.abc import Callable, Iterator
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchgen.errors import BatchgenError, InputError, UsageError
from batchgen.job import Job
from batchgen.output.file import FileOutput
from batchgen.output.ledger import Ledger
from batchgen.output.reading import read_plan
from batchgen.output.reused import OlderRows, read_older
from batchgen.output.schema import Columns, columns_of
from batchgen.plan import Plan
from batchgen.progress import Summary
from batchgen.review.forecast import forecast_job
from batchgen.run import run_job
from batchgen.types import Chunk, Receipt, Request, SamplingParams
from batchgen.workers import workers
from batchgen.workers.supply import Deadline
from batchgen.workers.worker import run_chunk
from batchgen.workers.workers import LocalWorkers, worker_setup
from tests.support.jobs import change_job, make_job
from tests.support.models import write_byte_model

GREEDY = SamplingParams(max_tokens=4)
DRAWN = SamplingParams(max_tokens=4, temperature=1.0, seed=3, n=2)
Row = dict[str, Any]


class Here(LocalWorkers):
    """Chunks are done in this process: a run takes milliseconds."""

    def run(
        self, plan: Plan, columns: Columns, chunks: Iterator[Chunk], n_chunks: int, deadline: Deadline
    ) -> Iterator[Receipt]:
        self.jobs = 1
        setup = worker_setup(self.model, plan, columns)
        return (run_chunk(setup, chunk, str(self.attempt)) for chunk in deadline.limit(chunks, lambda: 0.0))


@pytest.fixture(autouse=True, scope="module")
def _here() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "LocalWorkers", Here)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_model(tmp_path_factory.mktemp("reused") / "bytes")


def write(path: Path, rows: list[Row]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def job(model: Path, rows: list[Row], out: Path, params: SamplingParams = GREEDY, **options: Any) -> Job:
    files = write(out.parent / f"of {out.name}" / "p.jsonl", rows)  # errors have the file's last name
    return make_job(files, f"{out}/" if out.suffix == "" else out, model, params, **{"jobs": 1} | options)


def table(path: Path) -> pa.Table:
    if path.is_dir():
        return pa.concat_tables([pq.read_table(part) for part in sorted(path.glob("*.parquet"))])
    return pq.read_table(path)


def rows_of(n: int, first: int = 0) -> list[Row]:
    return [{"id": f"r{row}", "prompt": f"tale {row}"} for row in range(first, first + n)]


def reuse(
    model: Path, folder: Path, old: list[Row], new: list[Row], params: SamplingParams = GREEDY, **options: Any
) -> Summary:
    """Make an output of the old rows, and one of the new rows that reuses it: it must be what a full run makes."""
    before = options.pop("before", {})
    run_job(job(model, old, folder / "old.parquet", **{"params": params, **options, **before}))
    return compare(model, folder, new, params, **options)


def compare(model: Path, folder: Path, new: list[Row], params: SamplingParams = GREEDY, **options: Any) -> Summary:
    """A full run of the new rows, and one that reuses the output which is there."""
    run_job(job(model, new, folder / "full.parquet", params, **options))
    summary = run_job(job(model, new, folder / "new.parquet", params, **options, reuse=(str(folder / "old.parquet"),)))
    assert_equal(folder / "new.parquet", folder / "full.parquet")
    return summary


def assert_equal(path: Path, full: Path) -> None:
    """Every column, bit for bit."""
    made, wanted = table(path), table(full)
    assert made.schema.equals(wanted.schema)
    for name in wanted.schema.names:
        assert made[name].to_pylist() == wanted[name].to_pylist(), name
    assert made.equals(wanted)


def numbers(summary: Summary) -> tuple[int, int]:
    return summary.reused, summary.extended


# ---- edits of the input

ROWS = st.lists(
    st.fixed_dictionaries(
        {"prompt": st.sampled_from(["a", "b", "tale", "x " * 9, "", "é\n", "  ends in spaces  "])},
        optional={
            "max_tokens": st.sampled_from([2, 4]),
            "seed": st.integers(0, 2),
            "temperature": st.sampled_from([0, 1]),
            "n": st.sampled_from([1, 2]),
            "logprobs": st.sampled_from([0, 1]),
            "stop": st.sampled_from(["e", ["a", "th"]]),
        },
    ),
    max_size=12,
)
OPTIONS = st.fixed_dictionaries(
    {
        "params": st.builds(
            SamplingParams,
            temperature=st.sampled_from([0.0, 1.0]),
            n=st.integers(1, 4),
            max_tokens=st.sampled_from([2, 4, 9, 120]),
            top_k=st.sampled_from([0, 2]),
        )
    },
    optional={
        "token_ids": st.just(True),
        "trim": st.just(True),
        "on_too_long": st.sampled_from(["truncate-left", "shorten"]),
        "empty_prompt": st.just("unconditional"),
        "drop_duplicates": st.sampled_from(["prompt", "completion", "both"]),
        "rejects": st.just(False),
        "chunk_rows": st.just(3),
        "limit": st.just(5),
    },
)


@given(old=ROWS, new=ROWS, seed_by=st.sampled_from(["row", "id", "prompt"]), was=OPTIONS, now=OPTIONS, data=st.data())
@settings(deadline=None, max_examples=40)
def test_whatever_became_of_the_input_the_output_is_that_of_a_full_run(
    model: Path,
    tmp_path_factory: pytest.TempPathFactory,
    old: list[Row],
    new: list[Row],
    seed_by: str,
    was: Row,
    now: Row,
    data: st.DataObject,
) -> None:
    """Grown, edited, cut, in another order, with rows twice, under other options; ids stay with their rows."""
    folder = tmp_path_factory.mktemp("edits")
    old = [{"id": f"r{at}", **row} for at, row in enumerate(old)]
    kept = data.draw(st.permutations(old)) if data.draw(st.booleans()) else old
    kept = kept[: data.draw(st.integers(0, len(kept)))]
    new = [*kept, *({"id": f"s{at}", **row} for at, row in enumerate(new))]
    if data.draw(st.booleans()):
        now = was | {"params": now["params"]}
    run_job(job(model, old, folder / "old.parquet", seed_by=seed_by, **was))
    compare(model, folder, new, seed_by=seed_by, **now)


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize(("seed_by", "n_copied"), [("row", 12), ("id", 20), ("prompt", 20)])
def test_only_rows_whose_random_numbers_changed_are_generated(
    model: Path, tmp_path: Path, precision: str, seed_by: str, n_copied: int
) -> None:
    """Eight of twenty rows change places, and five are new; greedy ones are copied wherever they stand."""
    old = rows_of(20)
    new = [*old[:12], *old[12:][::-1], *rows_of(5, first=100)]
    summary = reuse(model, tmp_path, old, new, DRAWN, seed_by=seed_by, precision=precision)
    assert numbers(summary) == (n_copied, 0)


def test_greedy_rows_are_copied_wherever_they_stand(model: Path, tmp_path: Path) -> None:
    old = rows_of(20)
    new = [*rows_of(3, first=50), *old[::-2], old[4] | {"id": "again"}]
    assert numbers(reuse(model, tmp_path, old, new)) == (11, 0)


# ---- more samples, and longer ones

EXTENDING = [
    {},
    {"temperature": 1.0},
    {"temperature": 1.0, "logprobs": 2},
    {"temperature": 1.0, "logprobs": 0, "stop": ("e", "th")},
    {"temperature": 0.9, "stop_loops": True, "repetition_penalty": 1.3, "min_tokens": 2},
    {"echo": True, "prompt_logprobs": 1, "temperature": 1.0, "presence_penalty": 0.5},
]


@pytest.mark.parametrize("options", EXTENDING)
@pytest.mark.parametrize(("was", "now"), [((2, 4), (5, 4)), ((2, 4), (2, 11)), ((3, 4), (4, 9)), ((4, 9), (2, 3))])
def test_more_or_longer_samples_are_those_that_were_asked_for_at_first(
    model: Path, tmp_path: Path, options: dict[str, Any], was: tuple[int, int], now: tuple[int, int]
) -> None:
    before, after = (SamplingParams(n=n, max_tokens=most, **options) for n, most in (was, now))
    rows = rows_of(8)
    summary = reuse(model, tmp_path, rows, rows, after, before={"params": before}, token_ids=True, seed_by="id")
    assert summary.reused + summary.extended == 8
    full_tokens = sum(table(tmp_path / "full.parquet")["completion_tokens"].to_pylist())
    assert summary.completion_tokens < full_tokens


@pytest.mark.parametrize(("was", "now", "copied"), [((3, 4), (2, 4), 8), ((2, 4), (3, 4), 0), ((2, 4), (2, 9), 0)])
def test_beams_are_copied_if_all_that_are_wanted_are_there_and_else_searched_whole(
    model: Path, tmp_path: Path, was: tuple[int, int], now: tuple[int, int], copied: int
) -> None:
    before, after = (SamplingParams(n=n, max_tokens=most, num_beams=3) for n, most in (was, now))
    summary = reuse(model, tmp_path, rows_of(8), rows_of(8), after, before={"params": before}, token_ids=True)
    assert numbers(summary) == (copied, 0)
    other = reuse(model, tmp_path, rows_of(8), rows_of(8), SamplingParams(max_tokens=4), before={"params": before})
    assert numbers(other) == (0, 0)
    scores = table(tmp_path / "old.parquet")["beam_score"].to_pylist()
    assert all(score < 0 for score in scores)


def test_beams_whose_scores_were_removed_are_searched_anew(model: Path, tmp_path: Path) -> None:
    params = SamplingParams(max_tokens=4, num_beams=2)
    run_job(job(model, rows_of(4), tmp_path / "old.parquet", params))
    old = table(tmp_path / "old.parquet")
    pq.write_table(old.drop_columns(["beam_score"]), tmp_path / "old.parquet")
    assert numbers(compare(model, tmp_path, rows_of(4), params)) == (0, 0)


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_a_mean_of_log_probabilities_is_continued_though_the_older_output_has_none_of_them(
    model: Path, tmp_path: Path, precision: str
) -> None:
    rows, options = rows_of(9), {"mean_logprob": True, "token_ids": True, "precision": precision}
    before, after = (SamplingParams(temperature=1.0, n=n, max_tokens=most) for n, most in ((2, 8), (4, 13)))
    assert numbers(reuse(model, tmp_path, rows, rows, after, before={"params": before}, **options)) == (0, 9)


def test_more_samples_need_no_token_ids_and_longer_ones_do(model: Path, tmp_path: Path) -> None:
    rows, before = rows_of(6), {"params": DRAWN}
    more, longer = (SamplingParams(temperature=1.0, seed=3, n=n, max_tokens=most) for n, most in ((4, 4), (2, 8)))
    assert numbers(reuse(model, tmp_path, rows, rows, more, before=before)) == (0, 6)
    assert numbers(reuse(model, tmp_path, rows, rows, longer, before=before))[0] == 0


# ---- outputs of all kinds, and runs that are killed


@pytest.mark.parametrize("name", ["new.parquet", "new", "new.jsonl"])
def test_a_killed_run_is_resumed_with_the_same_older_outputs_alone(
    model: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = rows_of(10), [*rows_of(5, first=100), *rows_of(30)]
    run_job(job(model, old, tmp_path / "old.parquet"))
    run_job(job(model, new, tmp_path / f"full{Path(name).suffix}", chunk_rows=4))
    again = job(model, new, tmp_path / name, chunk_rows=4, reuse=(str(tmp_path / "old.parquet"),))
    with monkeypatch.context() as patch:
        patch.setattr(Deadline, "limit", lambda _, chunks, __: islice(chunks, 3))
        with pytest.raises(BatchgenError):
            run_job(again)
    run_job(job(model, rows_of(2), tmp_path / "other.parquet"))
    for other in ((), (str(tmp_path / "other.parquet"),)):
        with pytest.raises(UsageError, match="give the same --reuse, or pass --restart"):
            run_job(change_job(again, reuse=other))
    summary = run_job(again)
    assert summary.resumed
    assert numbers(summary) == (10, 0)
    if name.endswith("jsonl"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "full.jsonl").read_bytes()
    else:
        assert_equal(tmp_path / name, tmp_path / f"full{Path(name).suffix}")
    assert run_job(change_job(again, overwrite=False)).complete  # whatever is reused, it is the same output
    assert run_job(change_job(again, overwrite=False, reuse=())).complete


@pytest.mark.parametrize("name", ["c.parquet", "c"])
def test_an_output_can_be_reused_for_its_own_replacement_though_the_run_is_killed_at_its_end(
    model: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    run_job(job(model, rows_of(10), path))
    again = job(model, rows_of(14), path, reuse=(str(path),))
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "close", lambda self, **_: os.close(self._lock))
        assert numbers(run_job(again)) == (10, 0)
    run_job(job(model, rows_of(14), tmp_path / f"full{path.suffix}"))
    assert run_job(again).resumed == 14
    assert_equal(path, tmp_path / f"full{path.suffix}")


@pytest.mark.parametrize("damage", [lambda part: part.write_bytes(b"no part"), Path.unlink])
def test_a_part_that_is_lost_before_it_is_published_is_made_again(
    model: Path, tmp_path: Path, damage: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_job(job(model, rows_of(10), tmp_path / "old.parquet"))
    again = job(model, rows_of(14), tmp_path / "new.parquet", reuse=(str(tmp_path / "old.parquet"),), chunk_rows=2)
    with monkeypatch.context() as patch:
        patch.setattr(FileOutput, "publish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_job(again)
    damage(min((tmp_path / "new.parquet.batchgen" / "parts").iterdir()))
    run_job(change_job(again, overwrite=False))
    run_job(job(model, rows_of(14), tmp_path / "full.parquet"))
    assert_equal(tmp_path / "new.parquet", tmp_path / "full.parquet")


def test_several_older_outputs_by_a_glob_and_a_dataset(model: Path, tmp_path: Path) -> None:
    run_job(job(model, rows_of(5), tmp_path / "day1.parquet"))
    run_job(job(model, rows_of(5, first=5), tmp_path / "day2.parquet"))
    run_job(job(model, rows_of(5, first=10), tmp_path / "set", chunk_rows=2))
    new = job(model, rows_of(20), tmp_path / "new.parquet", reuse=(f"{tmp_path}/day*.parquet", str(tmp_path / "set")))
    forecast = forecast_job(new, measure_time=False)
    assert (forecast.reused, forecast.extended, forecast.rows, forecast.ok) == (15, 0, 20, 20)
    assert numbers(run_job(new)) == (15, 0)
    run_job(job(model, rows_of(20), tmp_path / "full.parquet"))
    assert_equal(tmp_path / "new.parquet", tmp_path / "full.parquet")


# ---- outputs that cannot be reused


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ({"precision": "int8"}, {}, "it was made with precision int8, and this is float32"),
        ({"token_ids": False}, {"token_ids": True}, "it has no column 'completion_token_ids'"),
        ({"special_tokens": "parse"}, {}, "it was made with special_tokens parse, and this is auto"),
    ],
)
def test_rows_are_generated_anew_and_the_reason_is_given_once(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, before: Row, after: Row, reason: str
) -> None:
    assert numbers(reuse(model, tmp_path, rows_of(5), rows_of(5), **after, before=before)) == (0, 0)
    assert [message.count(reason) for message in caplog.messages] == [1]


def test_a_policy_that_changes_no_row_of_it_is_no_obstacle(model: Path, tmp_path: Path) -> None:
    before = {"on_too_long": "shorten"}
    assert numbers(reuse(model, tmp_path, rows_of(5), rows_of(5), before=before)) == (5, 0)


def test_of_an_output_without_some_samples_those_before_the_first_gap_are_copied(model: Path, tmp_path: Path) -> None:
    params = SamplingParams(max_tokens=1, temperature=1.0, top_k=3, n=4)
    before = {"drop_duplicates": "completion", "rejects": False}
    copied, extended = numbers(reuse(model, tmp_path, rows_of(20), rows_of(20), params, before=before))
    old = table(tmp_path / "old.parquet")
    assert any(group.count(0) == 0 for group in samples_by_row(old))
    assert extended == sum(group[0] == 0 for group in samples_by_row(old)) - copied > 0


def samples_by_row(made: pa.Table) -> list[list[int]]:
    pairs = zip(made["row"].to_pylist(), made["sample"].to_pylist(), strict=True)
    return [[sample for _, sample in group] for _, group in groupby(pairs, key=itemgetter(0))]


def test_what_is_no_finished_output_is_refused(model: Path, tmp_path: Path) -> None:
    run_job(job(model, rows_of(3), tmp_path / "c.jsonl"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.parquet").write_text("no Parquet")
    pq.write_table(pa.table({"prompt": ["a"]}), tmp_path / "other.parquet")
    (tmp_path / "busy.parquet.batchgen").mkdir()
    os.mkfifo(tmp_path / "pipe.parquet")
    for name, said in (
        ("c.jsonl", "keep outputs as .parquet to reuse them"),
        ("empty", "not a complete dataset"),
        ("text.parquet", "text.parquet: damaged, or not written by batchgen"),
        ("other.parquet", "no metadata under 'batchgen'"),
        ("busy.parquet", "its run has not ended"),
        ("none.parquet", "no such file"),
        ("new.parquet", "no such file"),  # the output itself
        ("pipe.parquet", "a pipe or a device"),
        ("none*.parquet", "matches"),
    ):
        with pytest.raises(InputError, match=said):
            run_job(job(model, rows_of(3), tmp_path / "new.parquet", reuse=(str(tmp_path / name),)))
        assert not (tmp_path / "new.parquet").exists()


@pytest.mark.parametrize("kind", ["old.parquet", "set"])
def test_no_damaged_byte_of_an_older_output_makes_another_text(model: Path, tmp_path: Path, kind: str) -> None:
    rows = rows_of(12)
    full = job(model, rows, tmp_path / "full.parquet", DRAWN)
    run_job(full)
    run_job(job(model, rows, tmp_path / kind, DRAWN, chunk_rows=4))
    files = sorted((tmp_path / kind).iterdir()) if kind == "set" else [tmp_path / kind]
    plan, schema, wanted = reading(full)
    refused = 0
    random.seed(5)
    for path in files:
        good = path.read_bytes()
        for at in [*random.sample(range(len(good)), 60), *range(max(len(good) - 40, 0), len(good))]:
            bad = bytearray(good)
            bad[at] ^= 1 << random.randrange(8)
            path.write_bytes(bad)
            try:
                _, older = read_older([str(tmp_path / kind)], plan, schema, tmp_path)
            except InputError:
                refused += 1
                continue
            assert older is None or copied(older, rows) <= wanted
        path.write_bytes(good)
    assert refused


def reading(full: Job) -> tuple[Plan, pa.Schema, set[Any]]:
    """The plan and the columns of an output, and what its rows say."""
    made = table(Path(full.output.path))
    rows = {(row["row"], row["sample"], row["completion"], row["seed"]) for row in made.to_pylist()}
    plan = read_plan(Path(full.output.path))
    return plan, columns_of(plan).schema(), rows


def copied(older: OlderRows, rows: list[Row]) -> set[Any]:
    items = [Request(at, f"p:{at}", row["id"], row["prompt"], DRAWN) for at, row in enumerate(rows)]
    found = older.find(items)
    pairs = [(item, entry) for item, entry in zip(items, found, strict=True) if entry >= 0]
    if not pairs:
        return set()
    _, reused = older.divide([item for item, _ in pairs], [entry for _, entry in pairs], lambda item: item)
    made = pa.ipc.open_stream(reused.stream).read_all().to_pylist()
    return {(row["row"], row["sample"], row["completion"], row["seed"]) for row in made}


# ---- together with what else decides rows


@pytest.mark.parametrize(
    "options",
    [
        {"drop_duplicates": "prompt"},
        {"drop_duplicates": "completion"},
        {"mean_logprob": True, "repetition": True, "token_ids": True},
        {"rejects": False},
        {"limit": 9, "skip_rows": 2},
        {"sample": 6},
        {"shard": (2, 3)},
    ],
)
@pytest.mark.parametrize("params", [GREEDY, DRAWN, SamplingParams(max_tokens=7, temperature=1.0, seed=3, n=3)])
def test_with_options_that_drop_select_and_measure_rows(
    model: Path, tmp_path: Path, options: dict[str, Any], params: SamplingParams
) -> None:
    old = [*rows_of(6), {"id": "none", "prompt": ""}, *rows_of(3)]
    new = [*rows_of(2, first=20), *old[::-1], *rows_of(2, first=20)]
    new = [row | {"id": f"n{at}"} for at, row in enumerate(new)]
    before = {"limit": None, "skip_rows": 0, "sample": None, "shard": None, "params": DRAWN}
    before = {name: value for name, value in before.items() if name in options or name == "params"}
    summary = reuse(model, tmp_path, old, new, params, seed_by="prompt", **options, before=before)
    assert summary.reused > 0 or params is not DRAWN
