"""run.py: every input row has its output rows, in order, with any workers, chunks and interruptions."""

import contextlib
import json
import os
import platform
import random
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchgen import planning
from batchgen.errors import BatchgenError, BusyError, InputError, ModelError, OutputError, StoppedError, UsageError
from batchgen.gpt2.config import GPT2Config
from batchgen.input import prompts as prompts_module
from batchgen.input import validation
from batchgen.input.formats import Rows
from batchgen.input.prompts import Prompts
from batchgen.job import Job
from batchgen.models.model import Model
from batchgen.models.shards import load_manifest, map_shards
from batchgen.output import outputs
from batchgen.output.ledger import Ledger, open_ledger, work_directory
from batchgen.output.schema import Columns
from batchgen.progress import Progress, status_path
from batchgen.run import run_job
from batchgen.text.stopping import whole_characters
from batchgen.types import STATUSES, Rejected, SamplingParams
from batchgen.workers import pool
from batchgen.workers.supply import Deadline
from batchgen.workers.worker import WorkerSetup
from tests.support.inputs import scan
from tests.support.jobs import change_job, make_job
from tests.support.models import write_byte_model

# lines of a JSONL file that are rejected, and lines that are odd but good
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
    b'{"prompt": "a", "id": NaN}',
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
    """Rows of all lengths up to the longest that fits, shuffled with every bad line."""
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
    return make_job(prompts, tmp_path / "out.parquet", model, params, jobs=1, chunk_rows=32, status=False)


@pytest.fixture(scope="module")
def undisturbed(model, prompts, folder) -> bytes:
    """The bytes that `job` makes when nothing happens to it."""
    params = SamplingParams(max_tokens=10, temperature=0.8)
    run_job(make_job(prompts, folder / "undisturbed.parquet", model, params, jobs=1, chunk_rows=32))
    return (folder / "undisturbed.parquet").read_bytes()


def rows_of(path: Path) -> list[dict]:
    return pq.read_table(path).to_pylist()


# ---- rows in, rows out


def test_every_line_has_its_output_row_in_order(job):
    summary = run_job(job)
    rows = rows_of(job.output.path)
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
    summary = run_job(change_job(job, input=table))
    rows = rows_of(job.output.path)
    given = pq.read_table(table).to_pylist()
    assert [row["row"] for row in rows] == list(range(230))
    assert [(row["prompt"], row["id"]) for row in rows] == [(row["prompt"], str(row["id"])) for row in given]
    rejected = [row["row"] for row in rows if row["status"] == "rejected"]
    assert rejected == [3, 20, 37, 54]  # null, empty, one token too long, much too long
    assert summary.rejected == 4


def test_json_lines_out_say_what_parquet_says(job):
    run_job(job)
    run_job(change_job(job, output=job.output.path.with_suffix(".jsonl")))
    lines = job.output.path.with_suffix(".jsonl").read_bytes().decode().split("\n")
    assert lines.pop() == ""
    assert [json.loads(line) for line in lines] == rows_of(job.output.path)


def test_n_samples_are_n_rows(job):
    summary = run_job(change_job(job, sampling=SamplingParams(max_tokens=5, temperature=1.0, n=3)))
    rows = rows_of(job.output.path)
    samples = Counter(row["row"] for row in rows)
    assert {samples[row["row"]] for row in rows if row["status"] == "ok"} == {3}
    assert {samples[row["row"]] for row in rows if row["status"] == "rejected"} == {1}
    assert [(row["row"], row["sample"]) for row in rows] == sorted((row["row"], row["sample"]) for row in rows)
    assert summary.rows == len(rows) == 3 * 239 + 21
    assert summary.input_rows == 260


def test_a_drawn_row_has_a_seed_and_a_greedy_one_has_none(job):
    run_job(job)
    drawn = [row for row in rows_of(job.output.path) if row["status"] == "ok"]
    assert len({row["seed"] for row in drawn} - {None}) == len(drawn)
    run_job(change_job(job, sampling=SamplingParams(max_tokens=3, seed=8)))
    assert {row["seed"] for row in rows_of(job.output.path)} == {None}


def test_another_seed_draws_other_samples(job, undisturbed):
    run_job(change_job(job, sampling=replace(job.sampling, seed=1)))
    before = pq.read_table(pa.BufferReader(undisturbed))["completion"].to_pylist()
    assert sum(row["completion"] != old for row, old in zip(rows_of(job.output.path), before, strict=True)) > 200


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
@pytest.mark.parametrize("source", ["empty.jsonl", "blank.jsonl", "empty.parquet"])
def test_no_rows_are_an_empty_file_of_the_full_schema(job, tmp_path, source, suffix):
    path = tmp_path / source
    if source == "empty.parquet":
        pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), path)
    else:
        path.write_text("" if source == "empty.jsonl" else "\n \n\t\r\n")
    summary = run_job(change_job(job, input=path, output=job.output.path.with_suffix(suffix), jobs=2, chunk_rows=None))
    assert (summary.rows, summary.exit_code) == (0, 0)
    if suffix == ".parquet":
        assert pq.read_schema(job.output.path).remove_metadata() == Columns().schema()
        assert pq.read_table(job.output.path).num_rows == 0
    else:
        assert job.output.path.with_suffix(suffix).read_bytes() == b""


def test_the_columns_asked_for_are_there(job):
    params = SamplingParams(max_tokens=4, logprobs=0)
    run_job(change_job(job, sampling=params, token_ids=True))
    assert pq.read_schema(job.output.path).remove_metadata() == Columns(token_ids=True, logprobs=True).schema()
    for row in rows_of(job.output.path):
        if row["status"] == "ok":
            assert len(row["completion_token_ids"]) == len(row["logprobs"]) == row["completion_tokens"]
            assert whole_characters(bytes(row["completion_token_ids"])) == row["completion"]


# rows with parameters of every kind, for the byte model
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
    """The named rows; rejected rows stand in for the others, because the draws of a row depend on its number."""
    lines = [
        {"id": f"r{row}", "prompt": f"abc {row}" * (row in rows), "seed": row} | own for row, own in enumerate(OWN)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_half_of_a_surrogate_pair_rejects_its_line_alone(job, tmp_path):
    """JavaScript cuts an emoji so: anywhere in a line, it rejects that line, and the others are done."""
    bodies = [{"prompt": "a"}, {"prompt": "a", "suffix": "\ud83d"}, {"prompt": "a", "\ud83d": 1}, {"prompt": "b"}]
    lines = [json.dumps({"custom_id": f"{i}", "url": "/v1/completions", "body": b}) for i, b in enumerate(bodies)]
    lines += [json.dumps({"custom_id": "x", "url": "\ud83d", "body": {"prompt": "a"}})]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    for suffix in (".parquet", ".jsonl"):
        summary = run_job(change_job(job, input=tmp_path / "p.jsonl", output=tmp_path / f"out{suffix}"))
        assert (summary.ok, summary.rejected) == (2, 3)
    assert rows_of(tmp_path / "out.parquet")[1]["error"].startswith(r"p.jsonl:2: suffix '\ud83d' is not supported")


def test_rows_have_their_own_parameters(job, tmp_path):
    run_job(change_job(job, input=write_own(tmp_path / "own.jsonl", range(len(OWN))), token_ids=True))
    rows = rows_of(job.output.path)
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


def test_a_row_with_parameters_is_the_same_alone_and_in_a_batch(job, tmp_path):
    """Stop strings, loops and bad words affect their own row and no other."""
    run_job(change_job(job, input=write_own(tmp_path / "own.jsonl", range(len(OWN))), batch_size=5))
    together = rows_of(job.output.path)
    for row in range(len(OWN)):
        alone = change_job(job, input=write_own(tmp_path / f"{row}.jsonl", [row]), output=tmp_path / f"{row}.parquet")
        run_job(alone)
        found = [one for one in rows_of(alone.output.path) if one["row"] == row]
        expected = [one for one in together if one["row"] == row]
        assert found == expected


def test_the_parameters_of_rows_can_be_ignored(job, tmp_path):
    own = write_own(tmp_path / "own.jsonl", range(len(OWN)))
    run_job(change_job(job, input=own, row_params=False, sampling=SamplingParams(max_tokens=5)))
    rows = rows_of(job.output.path)
    assert len(rows) == len(OWN)
    assert "logprobs" not in rows[0]
    assert {row["seed"] for row in rows} == {None}


def test_prompts_that_end_in_a_space_are_counted_and_trimmed(job, tmp_path):
    prompts = ["a", "b ", " c", "d  ", "e\n", " "]
    path = tmp_path / "spaces.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    assert run_job(change_job(job, input=path)).space_ends == 3
    trimmed = run_job(change_job(job, input=path, trim=True, restart=True))
    assert (trimmed.space_ends, trimmed.rejected) == (0, 1)
    assert [row["prompt"] for row in rows_of(job.output.path)] == ["a", "b", " c", "d", "e\n", ""]


def test_the_output_says_how_it_was_made(job, model, prompts):
    run_job(change_job(job, sampling=replace(job.sampling, seed=5)))
    plan = json.loads(pq.read_schema(job.output.path).metadata[b"batchgen"])
    assert plan["model"] == "bytes"
    assert plan["model_hash"] == Model.load(model).hash
    assert plan["input"] == scan(prompts).sha256
    assert plan["parameters"]["seed"] == 5
    assert plan["parameters"]["temperature"] == 0.8
    assert (plan["precision"], plan["batch_invariant"], plan["portable"]) == ("float32", True, True)
    assert plan["python"] == platform.python_version()
    assert {"regex", "pyarrow"} <= plan.keys()
    assert {"batchgen", "numpy", "rows", "chunk_rows", "kv_bytes", "on_too_long"} <= plan.keys()
    assert None not in {plan[key] for key in ("chunk_rows", "batch_size", "kv_bytes")}


def test_length_options_save_rows(job, table):
    job = change_job(job, input=table, empty_prompt="unconditional")
    assert run_job(change_job(job, on_too_long="truncate-left")).rejected == 1  # null stays null
    rows = rows_of(job.output.path)
    assert rows[54]["prompt_tokens"] == 118
    assert len(rows[54]["prompt"]) == 3000
    run_job(change_job(job, on_too_long="shorten"))
    assert rows_of(job.output.path)[37]["completion_tokens"] <= 9


def test_an_exact_fit_is_generated_to_the_last_token(job, tmp_path):
    path = tmp_path / "fit.jsonl"
    path.write_text(json.dumps({"prompt": "x"}) + "\n" + json.dumps({"prompt": "xx"}) + "\n")
    run_job(change_job(job, input=path, sampling=SamplingParams(max_tokens=127, ignore_eos=True)))
    assert [(row["status"], row["completion_tokens"]) for row in rows_of(job.output.path)] == [
        ("ok", 127),
        ("rejected", None),
    ]


# ---- workers and chunks


def test_two_workers_write_what_one_writes(job, undisturbed):
    summary = run_job(change_job(job, jobs=2))
    assert summary.jobs == 2
    assert job.output.path.read_bytes() == undisturbed


def test_no_more_workers_than_chunks(job):
    assert run_job(change_job(job, jobs=64, chunk_rows=200)).jobs == 2


@pytest.mark.parametrize(
    ("chunk_rows", "options"), [(7, {}), (100, {"batch_size": 5}), (10**9 - 1, {"kv_bytes": 2**20})]
)
def test_rows_do_not_depend_on_their_batch(job, undisturbed, chunk_rows, options):
    run_job(change_job(job, chunk_rows=chunk_rows, share_prefixes=chunk_rows != 100, **options))
    assert pq.read_table(job.output.path).equals(pq.read_table(pa.BufferReader(undisturbed)))


def test_rows_that_are_grouped_make_the_output_of_one_chunk(job, tmp_path):
    """Greedy rows, half of them twice, some with a prefix in common, rejected ones and some of two samples."""
    rng = random.Random(3)
    once = [{"prompt": text(rng, 40)} for _ in range(10)] + [{"prompt": "b" * 70 + text(rng, 9)} for _ in range(9)]
    rows = [*once, *once, *({"prompt": "", "id": str(i)} for i in range(3)), *({"prompt": "x", "n": 2} for _ in "ab")]
    rng.shuffle(rows)
    source = tmp_path / "p.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = change_job(job, input=source, sampling=SamplingParams(max_tokens=6))
    run_job(change_job(job, chunk_rows=1000))
    one = rows_of(job.output.path)
    for chunk_rows in (4, 11):
        run_job(change_job(job, chunk_rows=chunk_rows))
        assert rows_of(job.output.path) == one


# ---- interruptions


class Interrupted(BaseException):
    """Like KeyboardInterrupt, which would end pytest itself."""


def interrupt_at(monkeypatch, n: int) -> None:
    """Let the (n+1)-th commit of the next run raise."""
    commit, left = Ledger.commit, iter(range(n))

    def interrupted(self: Ledger, receipt) -> None:
        if next(left, None) is None:
            raise Interrupted
        commit(self, receipt)

    monkeypatch.setattr(Ledger, "commit", interrupted)


def committed_rows(job: Job) -> set[int]:
    """The input rows that an interrupted run has done."""
    parts = (work_directory(job.output.path) / "parts").iterdir()
    return {row for part in parts for row in pq.read_table(part)["row"].to_pylist()}


@pytest.mark.parametrize(("jobs", "times"), [(1, (0, 3, 2)), (2, (1, 4))])
def test_an_interrupted_run_resumes(job, undisturbed, monkeypatch, jobs, times):
    job = change_job(job, jobs=jobs)
    done = 0
    for n in times:
        with monkeypatch.context() as patch:
            interrupt_at(patch, n)
            with pytest.raises(Interrupted):
                run_job(job)
        done += n
        assert not job.output.path.exists()
        assert len(list((work_directory(job.output.path) / "parts").iterdir())) == done
        assert sorted(os.listdir(work_directory(job.output.path))) == ["lock", "overwrite", "parts", "plan.json"]
    summary = run_job(job)
    assert job.output.path.read_bytes() == undisturbed
    assert (summary.resumed > 0, summary.rows) == (True, 260)
    assert os.listdir(job.output.path.parent) == [job.output.path.name]


def test_rows_that_are_done_are_not_tokenized_again(job, undisturbed, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        with pytest.raises(Interrupted):
            run_job(job)
    done = committed_rows(job)
    validate, seen = validation.validate, []

    def watched(request, *args):
        seen.append(request.row)
        return validate(request, *args)

    monkeypatch.setattr(validation, "validate", watched)
    run_job(job)
    assert done
    assert sorted({*seen, *done}) == list(range(len(seen) + len(done)))
    assert job.output.path.read_bytes() == undisturbed


def test_a_run_interrupted_in_the_merge_resumes(job, undisturbed, monkeypatch):
    job.output.path.write_text("the version before")
    with monkeypatch.context() as patch:
        patch.setattr(outputs, "write_parquet", lambda *_: (_ for _ in ()).throw(Interrupted))
        with pytest.raises(Interrupted):
            run_job(job)
    assert job.output.path.read_text() == "the version before"
    assert run_job(job).resumed == 260
    assert job.output.path.read_bytes() == undisturbed


def test_a_damaged_part_does_not_reach_the_output(job, undisturbed, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4)
        with pytest.raises(Interrupted):
            run_job(job)
    part = sorted((work_directory(job.output.path) / "parts").iterdir())[2]
    part.write_bytes(part.read_bytes()[:-30])
    run_job(job)
    assert "it will be made again" in caplog.text
    assert job.output.path.read_bytes() == undisturbed


def test_other_parameters_are_refused_and_restart_takes_them(job, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        with pytest.raises(Interrupted):
            run_job(job)
    other = change_job(job, sampling=replace(job.sampling, max_tokens=9))
    with pytest.raises(UsageError, match="had --max-tokens 10, and this has --max-tokens 9; .* or pass --restart"):
        run_job(other)
    assert run_job(change_job(other, restart=True)).resumed == 0


def test_another_format_of_the_input_is_refused(job, tmp_path, monkeypatch):
    (tmp_path / "p.txt").write_text("prompt\n" + "a\n" * 100)
    job = change_job(job, input=tmp_path / "p.txt", input_format="csv")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1)
        with pytest.raises(Interrupted):
            run_job(job)
    with pytest.raises(UsageError, match="had --input-format csv, and this has --input-format tsv"):
        run_job(change_job(job, input_format="tsv"))
    done = committed_rows(job)
    assert run_job(job).resumed == len(done) > 0


def test_another_precision_is_refused_by_name_and_the_run_goes_on_in_its_own(job, undisturbed, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1)
        with pytest.raises(Interrupted):
            run_job(job)
    with pytest.raises(UsageError, match="it had --precision float32, and this has --precision int8; run it as before"):
        run_job(change_job(job, precision="int8"))
    done = committed_rows(job)
    assert run_job(change_job(job, precision="float32")).resumed == len(done) > 0
    assert job.output.path.read_bytes() == undisturbed


def test_automatic_values_are_those_of_the_first_run(job, monkeypatch):
    job = change_job(job, chunk_rows=None)
    monkeypatch.setattr(planning, "auto_chunk_rows", lambda *_: 50)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        with pytest.raises(Interrupted):
            run_job(job)
    monkeypatch.setattr(planning, "auto_chunk_rows", lambda *_: 60)
    done = committed_rows(job)
    assert run_job(job).resumed == len(done) > 0


def test_a_second_run_is_refused_and_changes_nothing(job, monkeypatch):
    """Also if the first has left no memory."""
    monkeypatch.setattr(planning, "available_memory", lambda: 0)
    with open_ledger(job.output.path), pytest.raises(BusyError):
        run_job(job)
    assert os.listdir(job.output.path.parent) == []
    with pytest.raises(BatchgenError, match="0.0 GB are free"):
        run_job(job)
    assert os.listdir(job.output.path.parent) == []


# ---- what goes wrong


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_error_in_reading_is_raised_and_what_was_done_is_kept(job, undisturbed, monkeypatch, jobs):
    def damaged_after_150(self, *args):
        for rows in read(self, *args):
            good = [index for index, item in enumerate(rows.items) if item.row < 150]
            yield rows.take(good)
            if len(good) < len(rows.items):
                raise InputError("prompts.jsonl:151: the gzip data is damaged here")

    monkeypatch.setattr(prompts_module, "TOGETHER", 2)  # the two whole windows before the damage have 64 rows each
    read = Prompts._read
    with monkeypatch.context() as patch:
        patch.setattr(Prompts, "_read", damaged_after_150)
        with pytest.raises(InputError, match="damaged here"):
            run_job(change_job(job, jobs=jobs))
    assert len(list((work_directory(job.output.path) / "parts").iterdir())) == 4
    run_job(job)
    assert job.output.path.read_bytes() == undisturbed


def test_an_input_that_lost_rows_meanwhile_is_refused(job, monkeypatch):
    monkeypatch.setattr(Prompts, "_read", lambda *_: iter([Rows([Rejected(0, "p:1", None, None, "no")], None, [2])]))
    with pytest.raises(
        BatchgenError,
        match="260 rows were counted and 1 were done; if the input was changed meanwhile, run again with --restart",
    ):
        run_job(job)
    assert not job.output.path.exists()


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_error_in_a_worker_is_raised_as_it_is(job, monkeypatch, jobs):
    def no_room(setup: WorkerSetup, chunk, attempt: str) -> None:
        raise OutputError(f"{attempt}: cannot be written: No space left on device")

    monkeypatch.setattr(pool, "run_chunk", no_room)
    with pytest.raises(OutputError, match="cannot be written: No space left on device"):
        run_job(change_job(job, jobs=jobs))
    assert sorted(os.listdir(work_directory(job.output.path))) == ["lock", "overwrite", "parts", "plan.json"]


def test_impossible_limits_are_refused_before_there_is_a_plan(job):
    with pytest.raises(UsageError, match="memory budget .* raise --kv-memory to 1M"):
        run_job(change_job(job, kv_bytes=1000))
    with pytest.raises(UsageError, match="--batch-size 5000 is out of range"):
        run_job(change_job(job, batch_size=5000))
    assert os.listdir(job.output.path.parent) == []


def test_a_damaged_model_is_refused_before_the_first_row(job, model, tmp_path):
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    shard = copy / "wte.npy"
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ModelError, match="wte.npy: is damaged"):
        run_job(change_job(job, model=str(copy)))
    assert os.listdir(tmp_path) == ["copy"]


# ---- a dataset


def dataset_rows(folder: Path) -> list[dict]:
    return pq.read_table(folder).to_pylist()


def test_a_dataset_holds_the_rows_of_the_file(job, undisturbed):
    this = change_job(job, output=job.output.path.with_name("out"), output_format="dataset")
    summary = run_job(this)
    assert dataset_rows(this.output.path) == pq.read_table(pa.BufferReader(undisturbed)).to_pylist()
    assert summary.rows == 260
    plan = json.loads((this.output.path / "_SUCCESS").read_text())
    assert (plan["format"], plan["chunk_rows"], plan["model"]) == ("dataset", 32, "bytes")
    assert os.listdir(job.output.path.parent) == ["out"]


def test_a_dataset_takes_the_place_of_an_older_one_or_an_empty_folder(job):
    this = change_job(job, output=job.output.path.with_name("out"), output_format="dataset")
    this.output.path.mkdir()
    run_job(this)
    run_job(change_job(this, chunk_rows=100))
    assert len(list(this.output.path.iterdir())) == 3 + 1
    assert len(dataset_rows(this.output.path)) == 260
    assert os.listdir(job.output.path.parent) == ["out"]


@pytest.mark.parametrize("inputs", ["out/*.parquet", "**/*.parquet", ["p.jsonl", "out"]])
def test_a_dataset_does_not_replace_its_own_input(job, tmp_path, monkeypatch, inputs):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    job = change_job(job, output=Path("out"), output_format="dataset")
    run_job(change_job(job, input=Path("p.jsonl")))
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(OutputError, match=r"^out: .*choose another"):
        run_job(change_job(job, input=inputs))
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_folder_of_anything_else_is_refused_untouched(job):
    this = change_job(job, output=job.output.path.with_name("out"), output_format="dataset")
    this.output.path.mkdir()
    (this.output.path / "thesis.txt").write_text("all my work")
    with pytest.raises(OutputError, match=r"something other than a dataset of batchgen is there \(thesis.txt\)"):
        run_job(this)
    assert (this.output.path / "thesis.txt").read_text() == "all my work"


@pytest.mark.parametrize("nth", range(6))
@pytest.mark.parametrize("older", [False, True])
def test_a_dataset_is_old_absent_or_complete_if_its_publishing_is_killed(job, monkeypatch, nth, older):
    this = change_job(job, output=job.output.path.with_name("out"), output_format="dataset", chunk_rows=100)
    if older:
        run_job(this)
    expected = None if not older else dataset_rows(this.output.path)
    this = change_job(this, sampling=SamplingParams(max_tokens=3))
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
    if this.output.path.exists() and dataset_rows(this.output.path) != expected:
        assert (this.output.path / "_SUCCESS").exists()
        assert len(dataset_rows(this.output.path)) == 260
    summary = run_job(this)
    assert summary.resumed == 260  # nothing was done again
    assert {row["completion_tokens"] for row in dataset_rows(this.output.path)} <= {None, 0, 1, 2, 3}
    assert os.listdir(job.output.path.parent) == ["out"]


# ---- a time limit


def test_at_the_time_limit_a_run_stops_with_75_and_the_next_resumes(job, undisturbed, monkeypatch):
    this = change_job(job, time_limit=1000.0, jobs=2, status=True)
    with monkeypatch.context() as patch:
        patch.setattr(pool.Pool, "longest", property(lambda self: 600.0, lambda self, value: None), raising=False)
        with pytest.raises(
            StoppedError, match="--time-limit 1000 s: 0 of 260 rows are done; nothing was done: raise it"
        ) as error:
            run_job(this)
    assert error.value.exit_code == 75
    is_late = iter([False] * 3 + [True] * 100)
    with monkeypatch.context() as patch:
        patch.setattr(Deadline, "is_over", lambda self, margin: next(is_late))
        with pytest.raises(StoppedError, match=r"of 260 rows are done; run the same command again to resume") as error:
            run_job(this)
    status = json.loads(status_path(this.output.path).read_text())
    done = len(committed_rows(this))
    assert 0 < done < 260
    assert f" {done} of 260 rows" in str(error.value)
    assert (status["state"], status["exit_code"], status["rows_done"]) == ("stopped", 75, done)
    assert run_job(this).resumed == done
    assert job.output.path.read_bytes() == undisturbed


def test_a_run_that_is_in_time_ends_well(job, undisturbed):
    assert run_job(change_job(job, time_limit=1000.0)).exit_code == 3
    assert job.output.path.read_bytes() == undisturbed


def test_before_the_end_of_a_slurm_job_a_run_stops_with_75_and_the_next_resumes(job, undisturbed, monkeypatch):
    is_late = iter([False] * 3 + [True] * 100)
    with monkeypatch.context() as patch:
        patch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 10_000))
        patch.setattr(Deadline, "is_over", lambda self, margin: next(is_late))
        words = r"^the allocation ends at .* UTC: \d+ of 260 rows are done; run the same command again to resume"
        with pytest.raises(StoppedError, match=words) as error:
            run_job(job)
    assert error.value.exit_code == 75
    assert run_job(job).resumed
    assert job.output.path.read_bytes() == undisturbed


# ---- the status file


def test_the_status_says_at_the_end_what_the_summary_says(job):
    this = change_job(job, status=True)
    summary = run_job(this)
    status = json.loads(status_path(this.output.path).read_text())
    assert (status["state"], status["exit_code"], status["error"]) == ("finished", 3, None)
    assert {key: status[key] for key in STATUSES} == summary.statuses
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
    this = change_job(job, status=True)
    monkeypatch.setattr(outputs, "write_parquet", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(type(error)):
        run_job(this)
    status = json.loads(status_path(this.output.path).read_text())
    assert (status["state"], status["exit_code"], status["rows_done"]) == (state, code, 260)
    assert status["error"]


# ---- progress


@pytest.mark.parametrize("jobs", [1, 2])
def test_progress_ends_at_the_last_row(job, jobs):
    seen: list[Progress] = []
    summary = run_job(change_job(job, jobs=jobs), on_progress=seen.append)
    assert [now.rows for now in seen] == sorted(now.rows for now in seen)
    last = seen[-1]
    assert (last.rows, last.rows_in_all) == (260, 260)
    assert (last.prompt_tokens, last.completion_tokens) == (summary.prompt_tokens, summary.completion_tokens)


def test_progress_of_a_resumed_run_begins_with_its_committed_rows(job, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        with pytest.raises(Interrupted):
            run_job(job)
    seen: list[Progress] = []
    done = committed_rows(job)
    run_job(job, on_progress=seen.append)
    assert min(now.rows for now in seen) >= len(done) > 0
    assert seen[-1].rows == 260


def test_progress_that_cannot_be_shown_does_not_end_the_run(job, undisturbed, caplog):
    calls = []

    def broken(now: Progress) -> None:
        calls.append(now)
        raise BrokenPipeError("the terminal is gone")

    run_job(job, on_progress=broken)
    assert job.output.path.read_bytes() == undisturbed
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
    mapped = dict(
        map_shards(directory, load_manifest(directory), {})
    )  # as another worker would, so that the pages count as shared
    weights = sum(path.stat().st_size for path in directory.glob("*.npy"))
    assert weights > 150e6
    assert np.isfinite(sum(float(array.sum()) for array in mapped.values()))
    path = tmp_path / "few.jsonl"
    path.write_text('{"prompt": "abcd"}\n' * 64)
    options = {"jobs": 2, "chunk_rows": 4, "batch_size": 16, "kv_bytes": 8 * 2**20}
    run_job(make_job(path, job.output.path, directory, SamplingParams(max_tokens=2), **options))
    sizes = [_own_bytes(pid) for pid in _workers()]
    shutil.rmtree(directory)
    assert sizes
    assert max(sizes) < weights
