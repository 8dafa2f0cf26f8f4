"""duplicates.py of input/ and of output/: which rows repeat another, and what becomes of them and of the others."""

import json
import random
from array import array
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchgen.errors import InputError, StoppedError, UsageError
from batchgen.input.duplicates import FirstPlaces, FirstSeen, Repeats, hash128
from batchgen.output.beside import path_beside, read_beside
from batchgen.output.duplicates import drop_repeated
from batchgen.output.ledger import Ledger
from batchgen.output.reading import read_left_out, read_stored
from batchgen.output.schema import Columns, rows_to_table
from batchgen.progress import Summary, status_path
from batchgen.review.forecast import forecast_job
from batchgen.review.replay import replay
from batchgen.review.report.page import render
from batchgen.run import run_job
from batchgen.types import OutputRow, Rejected, SamplingParams, TokenizedRequest
from tests.support.jobs import make_job
from tests.support.models import write_byte_model

SAMPLED = SamplingParams(max_tokens=2, temperature=1.0, n=3, seed=5)
PROMPTS = ["a", "b", "a", "", "c", "b ", "a", "x" * 500, "x" * 500, "c", "d", "b", "a"]
U64 = st.integers(0, 2**64 - 1)
REPEATED = [2, 6, 9, 11, 12]  # of these: a row with the prompt of an earlier one that can be generated


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_model(tmp_path_factory.mktemp("duplicates") / "bytes")


def write(path: Path, prompts: Sequence[Any], **columns: Sequence[Any]) -> Path:
    rows = ({"prompt": one, **{name: values[i] for name, values in columns.items()}} for i, one in enumerate(prompts))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(model: Path, prompts: Path, out: Path, **options: Any) -> tuple[Summary, list[dict[str, Any]]]:
    summary = run_job(make_job(prompts, out, model, **{"sampling": SAMPLED, "jobs": 1} | options))
    return summary, read(out)


def read(out: Path) -> list[dict[str, Any]]:
    if out.suffix == ".jsonl":
        return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    rows: list[dict[str, Any]] = pq.read_table(out).to_pylist()
    return rows


# ---- places and keys


@given(places=st.lists(st.from_regex(r"(a|b|7)?(:row |:)?[0-9]{0,17}", fullmatch=True), unique=True, min_size=1))
def test_a_place_comes_back_as_it_was(places: list[str]) -> None:
    first = FirstPlaces()
    assert [first.find((key, 0), place) for key, place in enumerate(places)] == [None] * len(places)
    found = [first.find((key, 0), "other") for key in range(len(places))]
    assert found == places


@given(keys=st.lists(st.tuples(st.integers(0, 2), st.sampled_from([0, 1, 2**64 - 1])) | st.tuples(U64, U64)))
def test_the_first_number_of_each_key_is_found_however_the_keys_collide(keys: list[tuple[int, int]]) -> None:
    seen, known = FirstSeen(), {}
    seen._mask, seen._low, seen._high, seen._numbers = 1, *(array("Q", [0, 0]) for _ in range(3))  # grows at once
    for number, key in enumerate(keys):
        assert seen.find(key, number) == known.get(key)
        known.setdefault(key, number)


def test_a_row_takes_96_bytes_at_most() -> None:
    first, n = FirstPlaces(), 100_000
    for row in range(n):
        first.find(hash128(b"%d" % row), f"prompts.jsonl:{row + 1}")
        assert row < 1000 or first._seen.bytes <= 96 * (row + 1)
    assert first.find(hash128(b"7"), "prompts.jsonl:0") == "prompts.jsonl:8"


@given(st.lists(st.lists(st.sampled_from(["", "a", "ab", "b"]), max_size=3), min_size=2, max_size=2))
def test_lists_of_texts_have_one_key_only_if_they_are_equal(pair: list[list[str]]) -> None:
    a, b = (hash128(*(text.encode() for text in texts)) for texts in pair)
    assert (a == b) == (pair[0] == pair[1])


def test_token_ids_are_no_text_and_all_prompts_of_a_row_count() -> None:
    def item(row: int, given_as_ids: bool, *prompts: str) -> TokenizedRequest:
        (first, *others) = [(text, tuple(text.encode())) for text in prompts]
        return TokenizedRequest(row, f"p:{row}", None, *first, SAMPLED, others=tuple(others), given_as_ids=given_as_ids)

    items = [
        item(0, False, "a"),
        item(1, True, "a"),
        item(2, False, "a", "b"),
        item(3, False, "ab"),
        item(4, True, "a"),
    ]
    repeats = Repeats(prompts=True, ids=False)
    decided = [repeats.decide(one) for one in [*items, item(5, False, "a", "b")]]
    assert [one.row for one in decided if isinstance(one, Rejected)] == [4, 5]
    assert [one.error for one in decided if isinstance(one, Rejected)] == [
        "p:4: the prompt of p:1 again",
        "p:5: the prompt of p:2 again",
    ]


# ---- prompts


def test_the_first_row_of_a_prompt_is_kept_as_the_full_run_has_it(model: Path, tmp_path: Path) -> None:
    prompts = write(tmp_path / "p.jsonl", PROMPTS)
    _, whole = run(model, prompts, tmp_path / "whole.parquet")
    summary, rows = run(model, prompts, tmp_path / "o.parquet", drop_duplicates="prompt")
    dropped = [row for row in rows if row["status"] == "dropped"]
    assert [row for row in rows if row["status"] != "dropped"] == [row for row in whole if row["row"] not in REPEATED]
    assert [row["row"] for row in dropped] == REPEATED
    assert dropped[0]["error"] == "p.jsonl:3: the prompt of p.jsonl:1 again"
    assert all(row["completion"] is None and row["prompt"] for row in dropped)
    assert (summary.dropped, summary.rejected, summary.ok, summary.exit_code) == (5, 3, 15, 3)
    assert "again" not in " ".join(reason.text for reason in summary.reasons)
    assert json.loads(status_path(tmp_path / "o.parquet").read_text())["dropped"] == 5
    assert replay(tmp_path / "o.parquet", 100, model=str(model)).differences == ()
    assert read_stored(tmp_path / "o.parquet").statuses == Counter(summary.statuses)


def test_what_is_dropped_was_asked_for(model: Path, tmp_path: Path) -> None:
    prompts = write(tmp_path / "p.jsonl", ["a", "b", "a"])
    options = {"sampling": SAMPLED, "drop_duplicates": "prompt"}
    assert forecast_job(make_job(prompts, "", model, **options), measure_time=False).exit_code == 0
    summary, _ = run(model, prompts, tmp_path / "o.jsonl", **options)
    assert (summary.statuses, summary.exit_code) == ({"ok": 6, "rejected": 0, "failed": 0, "dropped": 1}, 0)


def test_trimmed_prompts_are_compared_and_rejected_ones_are_nobodys_first(model: Path, tmp_path: Path) -> None:
    prompts = write(tmp_path / "p.jsonl", ["a", "a ", "b", "b", "b"], max_tokens=[1, 2, 999, 1, 1])
    _, rows = run(model, prompts, tmp_path / "o.parquet", drop_duplicates="prompt", trim=True)
    statuses = {row["row"]: row["status"] for row in rows}
    assert list(statuses.values()) == ["ok", "dropped", "rejected", "ok", "dropped"]


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_chunks_and_any_shards_drop_the_same_rows(
    model: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    prompts = write(folder / "p.jsonl", data.draw(st.lists(st.sampled_from(["a", "b", "c", ""]), max_size=12)))
    selected = {"skip_rows": data.draw(st.integers(0, 2)), "sample": data.draw(st.none() | st.integers(1, 12))}
    options = {"drop_duplicates": "prompt", "chunk_rows": data.draw(st.integers(1, 5))} | selected
    _, whole = run(model, prompts, folder / "whole.parquet", **options)
    _, again = run(model, prompts, folder / "again.parquet", **options | {"chunk_rows": data.draw(st.integers(1, 5))})
    assert again == whole
    n = data.draw(st.integers(1, 4))
    parts = [run(model, prompts, folder / f"{k}.parquet", shard=(k, n), **options)[1] for k in range(1, n + 1)]
    assert [row for part in parts for row in part] == whole
    kept = [row for row in whole if row["status"] == "ok"]
    assert len({row["prompt"] for row in kept}) * 3 == len(kept)


def test_a_run_that_was_stopped_drops_the_same_rows(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(3)
    prompts = write(tmp_path / "p.jsonl", [rng.choice("abcdefghij") * rng.randint(1, 9) for _ in range(200)])
    options = {"drop_duplicates": "both", "chunk_rows": 2, "sampling": SamplingParams(max_tokens=1)}
    _, whole = run(model, prompts, tmp_path / "whole.parquet", **options)
    commit, done = Ledger.commit, 0

    def stop(ledger: Ledger, receipt: Any) -> None:
        nonlocal done
        commit(ledger, receipt)
        done += 1
        if done % 17 == 0:
            raise StoppedError("for now")

    monkeypatch.setattr(Ledger, "commit", stop)
    resumed = 0
    while True:
        try:
            summary, rows = run(model, prompts, tmp_path / "o.parquet", **options | {"overwrite": False})
            break
        except StoppedError:
            resumed += 1
    assert resumed > 3
    assert rows == whole
    assert summary.statuses == dict(Counter({"rejected": 0, "failed": 0}) | Counter(row["status"] for row in whole)) | {
        "rejected": 0,
        "failed": 0,
    }


def test_rows_that_repeat_a_prompt_are_not_counted_as_generated_anew(model: Path, tmp_path: Path) -> None:
    old = write(tmp_path / "old.jsonl", ["a", "b", "a", "c"])
    run(model, old, tmp_path / "old.parquet", drop_duplicates="prompt")
    grown = write(tmp_path / "p.jsonl", ["a", "b", "a", "c", "d"])
    summary, _ = run(
        model, grown, tmp_path / "o.parquet", drop_duplicates="prompt", reuse=(str(tmp_path / "old.parquet"),)
    )
    assert (summary.reused, summary.extended, summary.anew, summary.dropped) == (3, 0, 1, 1)


# ---- ids


def test_a_second_row_with_an_id_is_rejected_if_ids_draw(model: Path, tmp_path: Path) -> None:
    prompts = write(tmp_path / "p.jsonl", ["a", "b", "c", "d"], id=["x", "y", "x", "y"])
    _, rows = run(model, prompts, tmp_path / "o.parquet", seed_by="id", shard=(2, 2))
    assert [row["status"] for row in rows] == ["rejected", "rejected"]
    assert rows[0]["error"].startswith("p.jsonl:3: the id 'x' is that of p.jsonl:1, and ")
    _, rows = run(model, prompts, tmp_path / "o.parquet")
    assert {row["status"] for row in rows} == {"ok"}


# ---- completions


def table(texts: Sequence[str | None], samples: int = 2, status: str = "ok") -> pa.Table:
    rows = [
        OutputRow(i // samples, i % samples, None, "p", one, 1, 1, "stop", "ok" if one is not None else status, None, 7)
        for i, one in enumerate(texts)
    ]
    return rows_to_table(rows, Columns().schema())


TEXTS = st.lists(st.none() | st.sampled_from(["", "a", "b", "\0", "é"]), max_size=20)


@given(texts=TEXTS, size=st.integers(1, 7), status=st.sampled_from(["rejected", "failed", "dropped"]))
def test_the_first_of_equal_completions_stays_and_deciding_again_changes_nothing(
    texts: list[str | None], size: int, status: str
) -> None:
    given = table(texts, status=status)
    whole = pa.Table.from_batches(drop_repeated(given.to_batches()), given.schema)
    seen: dict[str, int] = {}
    for i, (text, row) in enumerate(zip(texts, whole.to_pylist(), strict=True)):
        first = seen.setdefault(text, i) if text is not None else i
        again = f"the completion of row {first // 2}, sample {first % 2} again"
        assert row["status"] == ("dropped" if first != i else "ok" if text is not None else status)
        assert row["error"] == (again if first != i else None)
    others = [name for name in given.column_names if name not in ("status", "error")]
    assert whole.select(others).equals(given.select(others))
    for once in (given, whole):
        pieces = pa.Table.from_batches(drop_repeated(once.to_batches(max_chunksize=size)), given.schema)
        assert pieces.equals(whole)


@given(texts=TEXTS, cuts=st.lists(st.integers(0, 20), max_size=3))
def test_merged_shards_are_decided_as_one_run(texts: list[str | None], cuts: list[int]) -> None:
    given = table(texts, 1)
    whole = pa.Table.from_batches(drop_repeated(given.to_batches()), given.schema)
    bounds = sorted({0, len(texts), *(cut for cut in cuts if cut < len(texts))})
    pieces = [given.slice(a, b - a) for a, b in zip(bounds, bounds[1:], strict=False)]
    decided = [batch for piece in pieces for batch in drop_repeated(piece.to_batches())]
    assert pa.Table.from_batches(drop_repeated(decided), given.schema).equals(whole)


def test_a_completion_is_there_once(model: Path, tmp_path: Path) -> None:
    prompts = write(tmp_path / "p.jsonl", PROMPTS)
    _, whole = run(model, prompts, tmp_path / "whole.parquet")
    summary, rows = run(model, prompts, tmp_path / "o.parquet", drop_duplicates="completion")
    kept = [row["completion"] for row in rows if row["status"] == "ok"]
    assert sorted(kept) == sorted({row["completion"] for row in whole if row["completion"] is not None})
    assert [{**row, "status": 0, "error": 0} for row in rows] == [{**row, "status": 0, "error": 0} for row in whole]
    assert summary.dropped == sum(row["status"] == "dropped" for row in rows) > 0
    assert read_stored(tmp_path / "o.parquet").statuses == Counter(summary.statuses)
    assert replay(tmp_path / "o.parquet", 100, model=str(model)).differences == ()
    again, _ = run(model, prompts, tmp_path / "o.parquet", drop_duplicates="completion", overwrite=False)
    assert (again.complete, again.statuses) == (True, summary.statuses)


# ---- without rejects


@pytest.mark.parametrize("name", ["o.parquet", "o.jsonl"])
@pytest.mark.parametrize("drops", [None, "prompt", "completion", "both"])
def test_what_is_left_out_is_what_is_rejected_or_dropped_and_is_counted(
    model: Path, tmp_path: Path, name: str, drops: str | None
) -> None:
    prompts = write(tmp_path / "p.jsonl", PROMPTS)
    options = {"drop_duplicates": drops, "chunk_rows": 2}
    full, whole = run(model, prompts, tmp_path / f"full-{name}", **options)
    summary, rows = run(model, prompts, tmp_path / name, rejects=False, **options)
    assert rows == [row for row in whole if row["status"] == "ok"]
    assert summary.statuses == full.statuses
    assert summary.left_out == full.rejected + full.dropped == len(whole) - len(rows)
    stored = read_beside(tmp_path / name) if name.endswith("jsonl") else read_stored(tmp_path / name)
    assert stored.statuses == Counter(summary.statuses)
    assert stored.left_out["rows"] == len(PROMPTS) - len({row["row"] for row in rows})
    assert json.loads(status_path(tmp_path / name).read_text())["left_out"] == summary.left_out
    again, _ = run(model, prompts, tmp_path / name, rejects=False, overwrite=False, **options)
    assert (again.complete, again.statuses, again.left_out) == (True, summary.statuses, summary.left_out)
    if name.endswith("parquet"):
        assert replay(tmp_path / name, 100, model=str(model)).differences == ()
        assert f"{summary.left_out} of them are left out" in render(tmp_path / name)


def edited(out: Path, change: Any) -> Path:
    """The file with other rows and the same metadata, its own keys included."""
    file = pq.ParquetFile(out)
    table, metadata = change(file.read()), file.metadata.metadata
    with pq.ParquetWriter(out, table.schema.with_metadata({"batchgen": metadata[b"batchgen"]})) as writer:
        writer.write_table(table.replace_schema_metadata({"batchgen": metadata[b"batchgen"]}))
        writer.add_key_value_metadata({"batchgen_left_out": metadata[b"batchgen_left_out"]})
    return out


def test_a_row_that_is_lost_is_missed_in_an_output_that_leaves_rows_out(model: Path, tmp_path: Path) -> None:
    prompts = write(tmp_path / "p.jsonl", PROMPTS)
    out = tmp_path / "o.parquet"
    run(model, prompts, out, rejects=False, drop_duplicates="both")
    last = int(pq.read_table(out)["row"][-1].as_py())
    edited(out, lambda table: table.filter(pc.field("row") != last))
    with pytest.raises(InputError, match="input rows"):
        read_stored(out)
    with pytest.raises(InputError, match="input rows"):
        replay(out, 3, model=str(model))


def fail(out: Path, number: int) -> None:
    """Make an input row a failed one, as if it had ended its worker."""

    def change(table: pa.Table) -> pa.Table:
        rows = table.to_pylist()
        at = next(i for i, row in enumerate(rows) if row["row"] == number)
        nothing = dict.fromkeys(("completion", "completion_tokens", "finish_reason", "stop_reason", "seed"))
        failed = rows[at] | nothing | {"sample": 0, "status": "failed", "error": "killed"}
        others = [row for row in rows[at:] if row["row"] != number]
        return pa.Table.from_pylist([*rows[:at], failed, *others], schema=table.schema.remove_metadata())

    edited(out, change)


@pytest.mark.parametrize("drops", [None, "prompt", "completion", "both"])
def test_a_retry_ends_in_what_the_run_would_have_made(model: Path, tmp_path: Path, drops: str | None) -> None:
    prompts, out = write(tmp_path / "p.jsonl", PROMPTS), tmp_path / "o.parquet"
    options = {"drop_duplicates": drops, "rejects": False}
    summary, whole = run(model, prompts, out, **options)
    left_out = read_left_out(out)
    fail(out, 0)
    again, rows = run(model, prompts, out, retry_failed=True, **options)
    assert rows == whole
    assert again.statuses == summary.statuses
    assert read_left_out(out) == left_out


@pytest.mark.parametrize(
    ("name", "options", "what"),
    [
        ("folder/", {"drop_duplicates": "completion"}, "a dataset; leave it out, or name a .parquet or .jsonl file"),
        ("folder/", {"drop_duplicates": "both"}, "a dataset"),
        ("folder/", {"rejects": False}, "a dataset"),
        ("answers.jsonl", {"drop_duplicates": "completion"}, "name the output .parquet"),
        ("answers.jsonl", {"rejects": False}, "name the output .parquet"),
        ("answers.jsonl", {"mean_logprob": True}, "--mean-logprob: OpenAI's lines"),
        ("answers.jsonl", {"repetition": True}, "name the output .parquet"),
        ("answers.parquet", {"drop_duplicates": "both", "rejects": False}, "leave one of them out"),
    ],
)
def test_what_an_output_has_no_place_for_is_refused_before_any_work(
    model: Path, tmp_path: Path, name: str, options: dict[str, Any], what: str
) -> None:
    body = {"method": "POST", "url": "/v1/completions", "body": {"prompt": "a", "max_tokens": 2}}
    openai = "".join(json.dumps(body | {"custom_id": str(row)}) + "\n" for row in range(3))
    prompts = write(tmp_path / "p.jsonl", ["a"])
    if name.startswith("answers"):
        prompts.write_text(openai, encoding="utf-8")
    with pytest.raises(UsageError, match="leave") as caught:
        run_job(make_job(prompts, f"{tmp_path}/{name}", model, **options))
    assert what in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"p.jsonl"}


def test_a_dropped_request_of_openais_has_an_answer_that_says_so(model: Path, tmp_path: Path) -> None:
    body = {"method": "POST", "url": "/v1/completions", "body": {"prompt": "a", "max_tokens": 2}}
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("".join(json.dumps(body | {"custom_id": str(row)}) + "\n" for row in range(2)))
    _, answers = run(model, prompts, tmp_path / "o.jsonl", drop_duplicates="prompt", sampling=SamplingParams())
    assert answers[0]["response"]["status_code"] == 200
    assert answers[1]["response"] is None
    assert answers[1]["error"] == {"code": "dropped", "message": "p.jsonl:2: the prompt of p.jsonl:1 again"}
    assert path_beside(tmp_path / "o.jsonl").exists()
