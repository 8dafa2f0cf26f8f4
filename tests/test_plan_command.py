"""jobs/plan.py: what `batchgen plan` prints."""

import json
import logging
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.main import get_command
from typer.testing import CliRunner

from batchgen.jobs.cli import app
from batchgen.jobs.plan import duration, length_lines, median
from tests.support.models import write_byte_model


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_byte_model(tmp_path_factory.mktemp("plan") / "bytes")


def run(model: Path, *arguments: object) -> tuple[int, list[str]]:
    done = CliRunner().invoke(app, ["plan", *map(str, arguments), "--model", str(model)])
    return done.exit_code, done.output.splitlines()


def test_a_plan_shows_rows_rejects_lengths_work_memory_and_time(model, tmp_path):
    lines = [json.dumps({"prompt": "ab" * (1 + row % 30)}) for row in range(90)] + ["nonsense", "[1]", "[2]"]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    code, out = run(model, tmp_path / "p.jsonl", "--max-tokens", 4, "--chunk-rows", 20, "--jobs", 2, "--show", 0)
    assert code == 3
    assert out[0] == "rows: 93: 90 to generate, 3 to be rejected; 93 output rows"
    assert out[1].split()[0] == "2"
    assert "the line is an array" in out[1]
    assert out[1].endswith("[p.jsonl:92, p.jsonl:93]")
    assert "not JSON" in out[2]
    assert out[3] == "prompt tokens: 2,790; 2 to 60, median 30, mean 31"
    assert out[-3].startswith("work: 5 chunks of up to 20 rows; 2 jobs, up to 256 sequences in flight in each")
    assert out[-2].startswith("memory: up to ")
    assert out[-1].startswith("time: about ")
    assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl"]


def test_a_plan_of_good_rows_is_exit_code_0_and_no_time_leaves_out_the_forecast(model, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    code, out = run(model, tmp_path / "p.jsonl", "--no-time")
    assert code == 0
    assert not [line for line in out if line.startswith("time")]


def test_a_plan_is_the_command_generate_with_one_word_changed(model, tmp_path, monkeypatch):
    (tmp_path / "p.jsonl").write_text('{"id": "x", "prompt": "a b  "}\n{"prompt": "' + "c" * 500 + '"}\n')
    options = ["-o", tmp_path / "o.parquet", "--format", "file", "-n", 2, "--temperature", 1, "--trim", "--no-fetch"]
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # --log-json changes those that are there
    more = ["--report", "--no-status", "--log-json", "--progress", "none", "--time-limit", "1h", "--no-time"]
    code, out = run(model, tmp_path / "p.jsonl", *options, *more, "--on-too-long", "truncate-left")
    assert code == 0
    assert out[0] == "rows: 2: 2 to generate, 0 to be rejected; 4 output rows"
    assert out[-2:] == ["[x] 3 tokens: 'a b'", "[row 1] 88 tokens: '" + "c" * 88 + "'"]
    assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl"]
    assert run(model, tmp_path / "p.jsonl", *options, "--no-time", "--quiet") == (3, [])
    assert run(model, tmp_path / "p.jsonl", "-o", "-", "--no-time")[0] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-o", "out.txt"], "the suffix '.txt' is not one of .parquet, .jsonl"),
        (["-o", "no/such/folder/o.parquet"], "is no such folder"),
        (["-o", "-", "--format", "dataset"], "a dataset is a folder"),
        (["-o", "-", "--report"], "--report: a report is about"),
    ],
)
def test_a_plan_checks_the_output_that_a_run_would_refuse(model, tmp_path, options, message):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    done = CliRunner().invoke(app, ["plan", str(tmp_path / "p.jsonl"), *options, "--model", str(model), "--no-time"])
    assert message in str(done.exception)


def test_an_input_that_cannot_run_cannot_be_planned(model, tmp_path):
    done = CliRunner().invoke(app, ["plan", str(tmp_path / "no.jsonl"), "--model", str(model)])
    assert "no such file" in str(done.exception)


@given(st.dictionaries(st.integers(1, 1024), st.integers(1, 100), min_size=1))
def test_the_histogram_holds_every_row_once(lengths):
    head, *bins = length_lines(Counter(lengths))
    assert sum(int(line.rsplit(" ", 1)[1].replace(",", "")) for line in bins) == sum(lengths.values())
    assert len(bins) <= 13
    flat = sorted(length for length, n in lengths.items() for _ in range(n))
    assert median(Counter(lengths)) == flat[(len(flat) - 1) // 2]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (9.96, "10.0 s"), (42, "42 s"), (425, "7 min 5 s"), (12000, "3 h 20 min")]
)
def test_durations_read_well(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("planned", "command"), [("plan", "generate"), ("plan score", "score"), ("plan embed", "embed")]
)
def test_every_option_of_a_command_is_one_of_its_plan(planned, command):
    commands = get_command(app).commands
    options, others = ({one.name: one.opts for one in commands[name].params} for name in (planned, command))
    assert options == others | {"time": ["--time"]}


def test_scores_are_planned_by_two_words(model, tmp_path):
    rows = [{"id": "x", "prompt": "one two ", "completion": "three"}, {"prompt": "one", "completion": ""}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["score", tmp_path / "p.jsonl", "--completion-column", "completion", "-o", tmp_path / "o.parquet", "-j", 1]
    code, out = run(model, *words)
    assert code == 3
    assert out[0] == "rows: 2: 1 to score, 1 to be rejected; 2 output rows"
    assert out[2] == "tokens of rows: 13; 13 to 13, median 13, mean 13"
    assert out[4] == "scored: 6 of these tokens"
    assert out[-3].startswith("time: about ")
    assert out[-1] == "[x] 13 tokens: 'one two' | ' three'"
    assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl"]
