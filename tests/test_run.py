"""run.py: every input row has its output rows, in order, whatever the workers, the chunks and the interruptions."""

import contextlib
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchgen import planning as planner
from batchgen import run
from batchgen.engine.probe import blas_info, is_batch_invariant
from batchgen.errors import BatchgenError, BusyError, InputError, ModelError, OutputError, StoppedError, UsageError
from batchgen.gpt2.config import GPT2Config
from batchgen.models.shards import load_manifest, load_params, model_hash
from batchgen.output.ledger import Ledger, open_ledger, work_directory
from batchgen.output.schema import output_schema
from batchgen.run import Job, Progress, run_job
from batchgen.text.stopping import whole_characters
from batchgen.types import Rejected, SamplingParams
from batchgen.workers import pool
from batchgen.workers.worker import WorkerSetup
from tests.support.models import BYTES, sharp_params, write_byte_model

pytestmark = pytest.mark.processes

INVARIANT = is_batch_invariant(sharp_params(BYTES), BYTES)
needs_invariance = pytest.mark.skipif(not INVARIANT, reason=f"{blas_info()} rounds a row differently in company")

# lines of a JSONL file, and what becomes of them
BAD_LINES = [
    b"not JSON",
    b"[1, 2]",
    b"17",
    b"null",
    b"{}",
    b'{"prompt": 5}',
    b'{"prompt": null, "id": "x"}',
    b'{"prompt": ["a"]}',
    b'{"text": "a"}',
    b'{"prompt": ""}',
    b'{"prompt": "\xff"}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "a", "prompt": "b"}',
    b'{"prompt": "a", "x": NaN}',
    b'{"prompt": "a", "x": ' + b"9" * 5000 + b"}",
    b'{"prompt": "a"} {"prompt": "b"}',
    b'{"prompt": "a"',
    b'{"prompt": "a", "id": 1.5}',
    b"[" * 50_000,
    b'{"prompt": "' + b"long " * 500 + b'"}',
    b"\x00",
]
ODD_LINES = [
    b'{"prompt": "a\\u0000\\u001b[31mb"}',
    b'{"prompt": "\\u2028 \\u0085 \xe2\x80\xa8", "id": 7}',
    b'{"prompt": "crlf"}\r',
    b'  {"prompt": "\xf0\x9f\xa6\x8a", "id": null}  ',
    b'{"prompt": "<|endoftext|>", "max_tokens": 3}',
]


def text(rng: random.Random, length: int) -> str:
    return "".join(rng.choice("abcdefgh \n") for _ in range(length))


def jsonl_lines(n: int = 260) -> list[bytes]:
    """Rows of all lengths up to the longest that fits, in company of every bad one."""
    rng = random.Random(5)
    good = [
        json.dumps({"id": f"r{row}", "prompt": text(rng, 1 + row * 7 % 118)}).encode()
        for row in range(n - len(BAD_LINES) - len(ODD_LINES))
    ]
    good[50:60] = good[40:50]  # repeats
    lines = good + BAD_LINES + ODD_LINES
    rng.shuffle(lines)
    return lines


def write_jsonl(path: Path, lines: list[bytes]) -> Path:
    blank = [line + b"\n" + (b"\n \t\r\n" if row % 9 == 0 else b"") for row, line in enumerate(lines)]
    path.write_bytes(b"\xef\xbb\xbf" + b"".join(blank))
    return path


def write_parquet(path: Path, n: int = 230) -> Path:
    rng = random.Random(6)
    prompts = [text(rng, 1 + row * 11 % 118) for row in range(n)]
    for row, odd in enumerate([None, "", "x" * 119, "x" * 3000, "\0", "\x1b[2J", "<|endoftext|>"]):
        prompts[row * 17 + 3] = odd
    pq.write_table(pa.table({"prompt": prompts, "id": list(range(n))}), path, row_group_size=50)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def model(folder) -> Path:
    return write_byte_model(folder / "bytes")


@pytest.fixture(scope="module")
def prompts(folder) -> Path:
    return write_jsonl(folder / "prompts.jsonl", jsonl_lines())


@pytest.fixture(scope="module")
def table(folder) -> Path:
    return write_parquet(folder / "prompts.parquet")


@pytest.fixture
def job(model, prompts, tmp_path) -> Job:
    params = SamplingParams(max_tokens=10, temperature=0.8)
    return Job(prompts, tmp_path / "out.parquet", str(model), params, jobs=1, chunk_rows=32)


@pytest.fixture(scope="module")
def undisturbed(model, prompts, folder) -> bytes:
    """The bytes that `job` makes when nothing happens to it."""
    params = SamplingParams(max_tokens=10, temperature=0.8)
    run_job(Job(prompts, folder / "undisturbed.parquet", str(model), params, jobs=1, chunk_rows=32))
    return (folder / "undisturbed.parquet").read_bytes()


def rows_of(path: Path) -> list[dict]:
    return pq.read_table(path).to_pylist()


# ---- rows in, rows out


def test_every_line_has_its_output_row_in_order(job):
    summary = run_job(job)
    rows = rows_of(job.output)
    lines = jsonl_lines()
    assert [(row["row"], row["sample"]) for row in rows] == [(row, 0) for row in range(len(lines))]
    assert Counter(row["status"] for row in rows) == {"ok": len(lines) - len(BAD_LINES), "rejected": len(BAD_LINES)}
    assert (summary.rows, summary.ok, summary.rejected, summary.exit_code) == (260, 239, 21, 3)
    for line, row in zip(lines, rows, strict=True):
        assert (row["status"] == "rejected") == (line in BAD_LINES)
        if row["status"] == "ok":
            assert row["prompt"] == json.loads(line.decode())["prompt"]
            assert row["prompt_tokens"] == len(row["prompt"].encode())
            assert row["error"] is None
        else:
            assert row["error"].startswith("prompts.jsonl:")
            assert row["completion"] is None


def test_every_row_of_a_parquet_file_has_its_output_row_in_order(job, table):
    summary = run_job(replace(job, input=table))
    rows = rows_of(job.output)
    given = pq.read_table(table).to_pylist()
    assert [row["row"] for row in rows] == list(range(230))
    assert [(row["prompt"], row["id"]) for row in rows] == [(row["prompt"], str(row["id"])) for row in given]
    rejected = [row["row"] for row in rows if row["status"] == "rejected"]
    assert rejected == [3, 20, 37, 54]  # null, empty, one token too long, much too long
    assert summary.rejected == 4


def test_json_lines_out_say_what_parquet_says(job):
    run_job(job)
    run_job(replace(job, output=job.output.with_suffix(".jsonl")))
    lines = job.output.with_suffix(".jsonl").read_bytes().decode().split("\n")
    assert lines.pop() == ""
    assert [json.loads(line) for line in lines] == rows_of(job.output)


def test_n_samples_are_n_rows(job):
    summary = run_job(replace(job, params=SamplingParams(max_tokens=5, temperature=1.0, n=3)))
    rows = rows_of(job.output)
    samples = Counter(row["row"] for row in rows)
    assert {samples[row["row"]] for row in rows if row["status"] == "ok"} == {3}
    assert {samples[row["row"]] for row in rows if row["status"] == "rejected"} == {1}
    assert [(row["row"], row["sample"]) for row in rows] == sorted((row["row"], row["sample"]) for row in rows)
    assert summary.rows == len(rows) == 3 * 239 + 21
    assert summary.input_rows == 260


def test_what_was_drawn_has_a_seed_and_what_was_not_has_none(job):
    run_job(job)
    drawn = [row for row in rows_of(job.output) if row["status"] == "ok"]
    assert len({row["seed"] for row in drawn} - {None}) == len(drawn)
    run_job(replace(job, params=SamplingParams(max_tokens=3, seed=8)))
    assert {row["seed"] for row in rows_of(job.output)} == {None}


def test_another_seed_draws_other_samples(job, undisturbed):
    run_job(replace(job, params=replace(job.params, seed=1)))
    before = pq.read_table(pa.BufferReader(undisturbed))["completion"].to_pylist()
    assert sum(row["completion"] != old for row, old in zip(rows_of(job.output), before, strict=True)) > 200


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
@pytest.mark.parametrize("source", ["empty.jsonl", "blank.jsonl", "empty.parquet"])
def test_no_rows_are_an_empty_file_of_the_full_schema(job, tmp_path, source, suffix):
    path = tmp_path / source
    if source == "empty.parquet":
        pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), path)
    else:
        path.write_text("" if source == "empty.jsonl" else "\n \n\t\r\n")
    summary = run_job(replace(job, input=path, output=job.output.with_suffix(suffix), jobs=2, chunk_rows=None))
    assert (summary.rows, summary.exit_code) == (0, 0)
    if suffix == ".parquet":
        assert pq.read_schema(job.output).remove_metadata() == output_schema()
        assert pq.read_table(job.output).num_rows == 0
    else:
        assert job.output.with_suffix(suffix).read_bytes() == b""


def test_the_columns_asked_for_are_there(job):
    params = SamplingParams(max_tokens=4, logprobs=0)
    run_job(replace(job, params=params, token_ids=True))
    assert pq.read_schema(job.output).remove_metadata() == output_schema(token_ids=True, logprobs=True)
    for row in rows_of(job.output):
        if row["status"] == "ok":
            assert len(row["completion_token_ids"]) == len(row["logprobs"]) == row["completion_tokens"]
            assert whole_characters(bytes(row["completion_token_ids"])) == row["completion"]


# rows with parameters of every kind, and what they must come to on the byte model
OWN = [
    {},
    {"max_tokens": 3},
    {"max_tokens": 40, "stop": ["e", " a"], "temperature": 1.5, "seed": 3, "n": 3},
    {"max_tokens": 40, "stop": "e", "include_stop": True, "temperature": 1.5, "seed": 3},
    {"max_tokens": 30, "stop": [chr(i) for i in range(97, 105)], "min_tokens": 9, "temperature": 3.0},
    {"max_tokens": 40, "bad_words": ["a", "be", "cde"], "temperature": 2.0, "ignore_eos": True},
    {"echo": True},
    {"logprobs": 3, "temperature": 1.0, "n": 2},
    {"logit_bias": {"120": 100}, "stop_loops": True, "max_tokens": 60},
    {"logit_bias": {"195": 100}, "max_tokens": 5, "ignore_eos": True},  # the first byte of two, again and again
    {"stop_token_ids": list(range(64)), "min_tokens": 2},
]


def write_own(path: Path, rows: Sequence[int]) -> Path:
    """The rows named; in the place of the others stand rows that are rejected, as what is drawn depends on it."""
    lines = [
        {"id": f"r{row}", "prompt": f"abc {row}" * (row in rows), "seed": row} | own for row, own in enumerate(OWN)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_half_of_a_surrogate_pair_sinks_no_chunk(job, tmp_path):
    """As JavaScript cuts an emoji: wherever it stands in a line, that line is rejected and the others are done."""
    bodies = [{"prompt": "a"}, {"prompt": "a", "suffix": "\ud83d"}, {"prompt": "a", "\ud83d": 1}, {"prompt": "b"}]
    lines = [json.dumps({"custom_id": f"{i}", "url": "/v1/completions", "body": b}) for i, b in enumerate(bodies)]
    lines += [json.dumps({"custom_id": "x", "url": "\ud83d", "body": {"prompt": "a"}})]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    for suffix in (".parquet", ".jsonl"):
        summary = run_job(replace(job, input=tmp_path / "p.jsonl", output=tmp_path / f"out{suffix}"))
        assert (summary.ok, summary.rejected) == (2, 3)
    assert rows_of(tmp_path / "out.parquet")[1]["error"].startswith(r"p.jsonl:2: suffix '\ud83d' is not supported")


def test_rows_have_their_own_parameters(job, tmp_path):
    run_job(replace(job, input=write_own(tmp_path / "own.jsonl", range(len(OWN))), token_ids=True))
    rows = rows_of(job.output)
    by_row = [[row for row in rows if row["row"] == number] for number in range(len(OWN))]
    assert [len(samples) for samples in by_row] == [own.get("n", 1) for own in OWN]
    assert {row["status"] for row in rows} == {"ok"}
    assert by_row[1][0]["completion_tokens"] <= 3
    for row in by_row[2] + by_row[3] + by_row[4]:
        whole = bytes(token for token in row["completion_token_ids"] if token < 256).decode("utf-8", "replace")
        own = OWN[row["row"]]
        if row["stop_reason"] is None:
            assert row["finish_reason"] == "length" or row["completion_tokens"] < own["max_tokens"]
        else:
            assert row["finish_reason"] == "stop"
            assert row["stop_reason"] in own["stop"]
            assert whole.startswith(row["completion"])
            assert row["completion"].endswith(row["stop_reason"]) == own.get("include_stop", False)
            assert row["completion_tokens"] > own.get("min_tokens", 0)
    assert not any(word in by_row[5][0]["completion"] for word in ("a", "be", "cde"))
    assert by_row[6][0]["completion"].startswith("abc 6")
    for row in by_row[7]:
        assert [len(top) for top in row["top_logprobs"]] == [3] * row["completion_tokens"]
        assert len(row["logprobs"]) == row["completion_tokens"]
        for top in row["top_logprobs"]:
            assert sorted(top, key=lambda one: -one["logprob"]) == top
    assert [row["logprobs"] for row in by_row[0]] == [None]
    assert (by_row[8][0]["finish_reason"], by_row[8][0]["completion"]) == ("repetition", "x" * 24)
    assert by_row[9][0]["completion"] == "\ufffd" * 4
    assert by_row[9][0]["completion_token_ids"] == [195] * 5


@needs_invariance
def test_a_row_with_parameters_is_what_it_is_alone(job, tmp_path):
    """Stop strings, loops and bad words end and bend their own row and touch no other."""
    run_job(replace(job, input=write_own(tmp_path / "own.jsonl", range(len(OWN))), batch_size=5))
    together = rows_of(job.output)
    for row in range(len(OWN)):
        alone = replace(job, input=write_own(tmp_path / f"{row}.jsonl", [row]), output=tmp_path / f"{row}.parquet")
        run_job(alone)
        found = [one for one in rows_of(alone.output) if one["row"] == row]
        expected = [one for one in together if one["row"] == row]
        assert found == expected


def test_own_parameters_can_be_left_unheeded(job, tmp_path):
    own = write_own(tmp_path / "own.jsonl", range(len(OWN)))
    run_job(replace(job, input=own, row_params=False, params=SamplingParams(max_tokens=5)))
    rows = rows_of(job.output)
    assert len(rows) == len(OWN)
    assert "logprobs" not in rows[0]
    assert {row["seed"] for row in rows} == {None}


def test_prompts_that_end_in_a_space_are_counted_and_trimmed(job, tmp_path):
    prompts = ["a", "b ", " c", "d  ", "e\n", " "]
    path = tmp_path / "spaces.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    assert run_job(replace(job, input=path)).space_ends == 3
    trimmed = run_job(replace(job, input=path, trim=True, restart=True))
    assert (trimmed.space_ends, trimmed.rejected) == (0, 1)
    assert [row["prompt"] for row in rows_of(job.output)] == ["a", "b", " c", "d", "e\n", " "]


def test_the_output_says_how_it_was_made(job, model, prompts):
    run_job(replace(job, params=replace(job.params, seed=5)))
    plan = json.loads(pq.read_schema(job.output).metadata[b"batchgen"])
    assert plan["model"] == "bytes"
    assert plan["model_hash"] == model_hash(load_manifest(model))
    assert plan["input"] == run.scan_input(prompts).sha256
    assert plan["parameters"]["seed"] == 5
    assert plan["parameters"]["temperature"] == 0.8
    assert plan["blas"].startswith(blas_info().name)
    assert plan["batch_invariant"] is INVARIANT
    assert {"batchgen", "numpy", "rows", "chunk_rows", "kv_bytes", "on_too_long"} <= plan.keys()
    assert None not in {plan[key] for key in ("chunk_rows", "batch_size", "kv_bytes")}


def test_length_options_save_rows(job, table):
    job = replace(job, input=table, empty_prompt="unconditional")
    assert run_job(replace(job, on_too_long="truncate-left")).rejected == 1  # null stays null
    rows = rows_of(job.output)
    assert rows[54]["prompt_tokens"] == 118
    assert len(rows[54]["prompt"]) == 3000
    run_job(replace(job, on_too_long="shorten"))
    assert rows_of(job.output)[37]["completion_tokens"] <= 9


def test_an_exact_fit_is_generated_to_the_last_token(job, tmp_path):
    path = tmp_path / "fit.jsonl"
    path.write_text(json.dumps({"prompt": "x"}) + "\n" + json.dumps({"prompt": "xx"}) + "\n")
    run_job(replace(job, input=path, params=SamplingParams(max_tokens=127, ignore_eos=True)))
    assert [(row["status"], row["completion_tokens"]) for row in rows_of(job.output)] == [
        ("ok", 127),
        ("rejected", None),
    ]


# ---- workers and chunks


def test_two_workers_write_what_one_writes(job, undisturbed):
    summary = run_job(replace(job, jobs=2))
    assert summary.jobs == 2
    assert job.output.read_bytes() == undisturbed


@needs_invariance
@pytest.mark.parametrize(("chunk_rows", "options"), [(7, {}), (100, {"batch_size": 5}), (10**9, {"kv_bytes": 2**20})])
def test_rows_do_not_depend_on_their_company(job, undisturbed, chunk_rows, options):
    run_job(replace(job, chunk_rows=chunk_rows, share_prefixes=chunk_rows != 100, **options))
    assert pq.read_table(job.output).equals(pq.read_table(pa.BufferReader(undisturbed)))


def test_no_more_workers_than_chunks(job):
    assert run_job(replace(job, jobs=64, chunk_rows=200)).jobs == 2


# ---- interruptions


class Interrupted(BaseException):
    """As a KeyboardInterrupt is, but not one that pytest itself takes to heart."""


def interrupt_at(monkeypatch, n: int) -> None:
    """Let the (n+1)-th commit of the next run raise."""
    commit, left = Ledger.commit, iter(range(n))

    def interrupted(self: Ledger, receipt) -> None:
        if next(left, None) is None:
            raise Interrupted
        commit(self, receipt)

    monkeypatch.setattr(Ledger, "commit", interrupted)


@pytest.mark.parametrize(("jobs", "times"), [(1, (0, 3, 2)), (2, (1, 4))])
def test_an_interrupted_run_is_gone_on_with(job, undisturbed, monkeypatch, jobs, times):
    job = replace(job, jobs=jobs)
    done = 0
    for n in times:
        with monkeypatch.context() as patch:
            interrupt_at(patch, n)
            with pytest.raises(Interrupted):
                run_job(job)
        done += n
        assert not job.output.exists()
        assert len(list((work_directory(job.output) / "parts").iterdir())) == done
        assert sorted(os.listdir(work_directory(job.output))) == ["lock", "parts", "plan.json"]
    summary = run_job(job)
    assert job.output.read_bytes() == undisturbed
    assert (summary.resumed > 0, summary.rows) == (True, 260)
    assert os.listdir(job.output.parent) == [job.output.name]


def test_rows_that_are_done_are_not_tokenized_again(job, undisturbed, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        with pytest.raises(Interrupted):
            run_job(job)
    done = {
        row
        for path in (work_directory(job.output) / "parts").iterdir()
        for row in pq.read_table(path)["row"].to_pylist()
    }
    validate, seen = run.validate, []
    monkeypatch.setattr(run, "validate", lambda request, *args: seen.append(request.row) or validate(request, *args))
    run_job(job)
    assert done
    assert sorted({*seen, *done}) == list(range(len(seen) + len(done)))
    assert job.output.read_bytes() == undisturbed


def test_a_run_interrupted_in_the_merge_is_gone_on_with(job, undisturbed, monkeypatch):
    job.output.write_text("the version before")
    with monkeypatch.context() as patch:
        patch.setattr(run, "merge_parts", lambda *_: (_ for _ in ()).throw(Interrupted))
        with pytest.raises(Interrupted):
            run_job(job)
    assert job.output.read_text() == "the version before"
    assert run_job(job).resumed == 260
    assert job.output.read_bytes() == undisturbed


def test_a_damaged_part_does_not_reach_the_output(job, undisturbed, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4)
        with pytest.raises(Interrupted):
            run_job(job)
    part = sorted((work_directory(job.output) / "parts").iterdir())[2]
    part.write_bytes(part.read_bytes()[:-30])
    run_job(job)
    assert "it will be made again" in caplog.text
    assert job.output.read_bytes() == undisturbed


def test_other_parameters_are_refused_and_restart_takes_them(job, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        with pytest.raises(Interrupted):
            run_job(job)
    other = replace(job, params=replace(job.params, max_tokens=9))
    with pytest.raises(UsageError, match="had parameters .*'max_tokens': 10.* or pass --restart"):
        run_job(other)
    assert run_job(replace(other, restart=True)).resumed == 0


def test_another_format_of_the_input_is_refused(job, tmp_path, monkeypatch):
    (tmp_path / "p.txt").write_text("prompt\n" + "a\n" * 100)
    job = replace(job, input=tmp_path / "p.txt", input_format="csv")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1)
        with pytest.raises(Interrupted):
            run_job(job)
    with pytest.raises(UsageError, match=r"had input_formats \['csv'\], this one has \['tsv'\]"):
        run_job(replace(job, input_format="tsv"))
    assert run_job(job).resumed == 32


def test_automatic_values_are_those_of_the_first_run(job, monkeypatch):
    job = replace(job, chunk_rows=None)
    monkeypatch.setattr(run, "auto_chunk_rows", lambda *_: 50)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        with pytest.raises(Interrupted):
            run_job(job)
    monkeypatch.setattr(run, "auto_chunk_rows", lambda *_: 60)
    assert run_job(job).resumed == 100


def test_a_second_run_is_refused_and_changes_nothing(job, monkeypatch):
    """Whatever memory the first has left."""
    monkeypatch.setattr(planner, "available_memory", lambda: 0)
    with open_ledger(job.output), pytest.raises(BusyError):
        run_job(job)
    assert os.listdir(job.output.parent) == []
    with pytest.raises(BatchgenError, match="0.0 GB are free"):
        run_job(job)
    assert os.listdir(job.output.parent) == []


# ---- what goes wrong


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_error_in_reading_is_raised_and_what_was_done_is_kept(job, undisturbed, monkeypatch, jobs):
    def damaged_after_150(*args, **kwargs):
        for item in read(*args, **kwargs):
            if item.row == 150:
                raise InputError("prompts.jsonl:151: the gzip data is damaged here")
            yield item

    read = run.read_requests
    with monkeypatch.context() as patch:
        patch.setattr(run, "read_requests", damaged_after_150)
        with pytest.raises(InputError, match="damaged here"):
            run_job(replace(job, jobs=jobs))
    assert len(list((work_directory(job.output) / "parts").iterdir())) == 4
    run_job(job)
    assert job.output.read_bytes() == undisturbed


def test_an_input_that_lost_rows_meanwhile_is_refused(job, monkeypatch):
    monkeypatch.setattr(run, "read_requests", lambda path, **_: iter([Rejected(0, "p:1", None, None, "no")]))
    with pytest.raises(BatchgenError, match="260 rows were counted and 1 were done; was it changed meanwhile"):
        run_job(job)
    assert not job.output.exists()


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_error_in_a_worker_is_raised_as_it_is(job, monkeypatch, jobs):
    def no_room(setup: WorkerSetup, chunk, attempt: str) -> None:
        raise OutputError(f"{attempt}: cannot be written: No space left on device")

    monkeypatch.setattr(pool, "run_chunk", no_room)
    with pytest.raises(OutputError, match="cannot be written: No space left on device"):
        run_job(replace(job, jobs=jobs))
    assert sorted(os.listdir(work_directory(job.output))) == ["lock", "parts", "plan.json"]


def test_what_no_engine_can_do_is_refused_before_there_is_a_plan(job):
    with pytest.raises(UsageError, match="memory budget .* raise --kv-memory to 1M"):
        run_job(replace(job, kv_bytes=1000))
    with pytest.raises(UsageError, match="--batch-size 5000 is out of range"):
        run_job(replace(job, batch_size=5000))
    assert os.listdir(job.output.parent) == []


def test_a_damaged_model_is_refused_before_the_first_row(job, model, tmp_path):
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    shard = copy / "wte.npy"
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ModelError, match="wte.npy: is damaged"):
        run_job(replace(job, model=str(copy)))
    assert os.listdir(tmp_path) == ["copy"]


def test_invariance_can_be_required(job, monkeypatch):
    monkeypatch.setattr(run, "is_batch_invariant", lambda *_: False)
    with pytest.raises(BatchgenError, match="--require-invariant: .* rounds a row differently in other company"):
        run_job(replace(job, require_invariant=True))
    assert os.listdir(job.output.parent) == []


def test_chunks_do_not_depend_on_jobs_where_rows_depend_on_company(job, monkeypatch):
    monkeypatch.setattr(run, "is_batch_invariant", lambda *_: False)
    model = run.Model(Path(job.model), load_manifest(Path(job.model)))
    facts = replace(run.scan_input(job.input), rows=100_000)
    sizes = {run.make_plan(replace(job, jobs=jobs), model, facts, 1000)[1]["chunk_rows"] for jobs in (1, 2, 7, 64)}
    assert len(sizes) == 1


# ---- a dataset


def dataset_rows(folder: Path) -> list[dict]:
    return pq.read_table(folder).to_pylist()


def test_a_dataset_holds_the_rows_of_the_file(job, undisturbed):
    this = replace(job, output=job.output.with_name("out"), dataset=True)
    summary = run_job(this)
    assert dataset_rows(this.output) == pq.read_table(pa.BufferReader(undisturbed)).to_pylist()
    assert summary.rows == 260
    plan = json.loads((this.output / "_SUCCESS").read_text())
    assert (plan["format"], plan["chunk_rows"], plan["model"]) == ("dataset", 32, "bytes")
    assert os.listdir(job.output.parent) == ["out"]


def test_a_dataset_takes_the_place_of_an_older_one_or_an_empty_folder(job):
    this = replace(job, output=job.output.with_name("out"), dataset=True)
    this.output.mkdir()
    run_job(this)
    run_job(replace(this, chunk_rows=100))
    assert len(list(this.output.iterdir())) == 3 + 1
    assert len(dataset_rows(this.output)) == 260
    assert os.listdir(job.output.parent) == ["out"]


@pytest.mark.parametrize("inputs", ["out/*.parquet", "**/*.parquet", ["p.jsonl", "out"]])
def test_a_dataset_is_not_made_of_its_own_parts(job, tmp_path, monkeypatch, inputs):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    job = replace(job, output=Path("out"), dataset=True)
    run_job(replace(job, input=Path("p.jsonl")))
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(OutputError, match=r"^out: .*choose another"):
        run_job(replace(job, input=inputs))
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_folder_of_anything_else_is_refused_untouched(job):
    this = replace(job, output=job.output.with_name("out"), dataset=True)
    this.output.mkdir()
    (this.output / "thesis.txt").write_text("all my work")
    with pytest.raises(OutputError, match="there is something else than a dataset of batchgen; choose another name"):
        run_job(this)
    assert (this.output / "thesis.txt").read_text() == "all my work"


@pytest.mark.parametrize("nth", range(6))
@pytest.mark.parametrize("older", [False, True])
def test_a_dataset_is_old_absent_or_complete_whenever_its_publishing_is_killed(job, monkeypatch, nth, older):
    this = replace(job, output=job.output.with_name("out"), dataset=True, chunk_rows=100)
    if older:
        run_job(this)
    expected = None if not older else dataset_rows(this.output)
    this = replace(this, params=SamplingParams(max_tokens=3))
    left = iter(range(nth))

    def killed(rename):
        def call(*args):
            if publishing and next(left, None) is None:
                raise Interrupted
            rename(*args)

        return call

    publishing = []
    publish = Ledger.publish_dataset
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "publish_dataset", lambda *args: (publishing.append(1), publish(*args)))
        patch.setattr(os, "rename", killed(os.rename))
        patch.setattr(os, "replace", killed(os.replace))
        patch.setattr(Ledger, "close", lambda self, finished: os.close(self._lock))  # as a kill leaves it
        with contextlib.suppress(Interrupted):
            run_job(this)
    if this.output.exists() and dataset_rows(this.output) != expected:
        assert (this.output / "_SUCCESS").exists()
        assert len(dataset_rows(this.output)) == 260
    summary = run_job(this)
    assert summary.resumed == 260  # nothing was done again
    assert {row["completion_tokens"] for row in dataset_rows(this.output)} <= {None, 0, 1, 2, 3}
    assert os.listdir(job.output.parent) == ["out"]


# ---- a time limit


def test_at_the_time_limit_a_run_stops_with_75_and_another_goes_on(job, undisturbed, monkeypatch):
    this = replace(job, time_limit=1000.0, jobs=2, status=job.output.with_name("s.json"))
    with monkeypatch.context() as patch:
        patch.setattr(run.Pool, "longest", property(lambda self: 600.0, lambda self, value: None), raising=False)
        with pytest.raises(StoppedError, match="--time-limit 1000 s: 0 of 260 rows are done; .* give it more") as error:
            run_job(this)
    assert error.value.exit_code == 75
    slow = iter([0.0] * 3 + [600.0] * 100)
    with monkeypatch.context() as patch:
        patch.setattr(run.Pool, "longest", property(lambda self: next(slow), lambda self, value: None), raising=False)
        with pytest.raises(StoppedError, match=r"96 of 260 rows are done; run the same command again to go on"):
            run_job(this)
    status = json.loads(this.status.read_text())
    assert (status["state"], status["exit_code"], status["rows_done"]) == ("stopped", 75, 96)
    assert run_job(this).resumed == 96
    assert job.output.read_bytes() == undisturbed


def test_a_run_that_is_in_time_ends_well(job, undisturbed):
    assert run_job(replace(job, time_limit=1000.0)).exit_code == 3
    assert job.output.read_bytes() == undisturbed


# ---- the status file


def test_the_status_says_at_the_end_what_the_summary_says(job):
    this = replace(job, status=job.output.with_name("s.json"))
    summary = run_job(this)
    status = json.loads(this.status.read_text())
    assert (status["state"], status["exit_code"], status["error"]) == ("finished", 3, None)
    assert {key: status[key] for key in ("ok", "rejected", "failed")} == summary.statuses
    assert status["rows_done"] == status["rows"] == 260
    assert status["completion_tokens"] == summary.completion_tokens


@pytest.mark.parametrize(
    ("error", "state", "code"),
    [
        (OutputError("no room"), "failed", 1),
        (ValueError("a bug"), "failed", 1),
        (KeyboardInterrupt(), "stopped", 130),
        (SystemExit(143), "stopped", 143),
    ],
)
def test_the_status_says_how_a_run_ended_badly(job, monkeypatch, error, state, code):
    this = replace(job, status=job.output.with_name("s.json"))
    monkeypatch.setattr(run, "merge_parts", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(type(error)):
        run_job(this)
    status = json.loads(this.status.read_text())
    assert (status["state"], status["exit_code"], status["rows_done"]) == (state, code, 260)
    assert status["error"]


# ---- progress


@pytest.mark.parametrize("jobs", [1, 2])
def test_progress_ends_at_the_last_row(job, jobs):
    seen: list[Progress] = []
    summary = run_job(replace(job, jobs=jobs), seen.append)
    assert [now.rows for now in seen] == sorted(now.rows for now in seen)
    last = seen[-1]
    assert (last.rows, last.rows_in_all) == (260, 260)
    assert (last.prompt_tokens, last.completion_tokens) == (summary.prompt_tokens, summary.completion_tokens)


def test_progress_goes_on_from_what_was_done(job, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        with pytest.raises(Interrupted):
            run_job(job)
    seen: list[Progress] = []
    run_job(job, seen.append)
    assert min(now.rows for now in seen) >= 96
    assert seen[-1].rows == 260


def test_progress_that_cannot_be_shown_does_not_end_the_run(job, undisturbed, caplog):
    calls = []

    def broken(now: Progress) -> None:
        calls.append(now)
        raise BrokenPipeError("the terminal is gone")

    run_job(job, broken)
    assert job.output.read_bytes() == undisturbed
    assert len(calls) == 1
    assert "progress is no longer shown" in caplog.text


# ---- memory


def _own_bytes(pid: int) -> int:
    """Memory that the process shares with no other (USS)."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return sizes["Private_Clean"] + sizes["Private_Dirty"]


def _workers() -> list[int]:
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    return [int(pid) for pid in children if b"LokyProcess" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="asks Linux for a worker's memory")
def test_workers_do_not_hold_the_weights_in_memory_of_their_own(job, tmp_path):
    config = GPT2Config(n_vocab=257, n_ctx=128, n_embd=1024, n_head=16, n_layer=3)
    directory = write_byte_model(tmp_path / "large", config)
    mapped = load_params(directory)  # as another worker would, so that the pages count as shared
    weights = sum(path.stat().st_size for path in directory.glob("*.npy"))
    assert weights > 150e6
    assert np.isfinite(sum(float(w.sum()) for block in mapped["blocks"] for w in _arrays(block)))
    path = tmp_path / "few.jsonl"
    path.write_text('{"prompt": "abcd"}\n' * 64)
    params = SamplingParams(max_tokens=2)
    run_job(Job(path, job.output, str(directory), params, jobs=2, chunk_rows=4, batch_size=16, kv_bytes=8 * 2**20))
    sizes = [_own_bytes(pid) for pid in _workers()]
    shutil.rmtree(directory)
    assert sizes
    assert max(sizes) < weights


def _arrays(tree) -> list:
    return [leaf for branch in tree.values() for leaf in _arrays(branch)] if isinstance(tree, dict) else [tree]
