"""The command line: its output and exit codes; a user's mistake is one line and leaves no file."""

import io
import json
import logging
import os
import pty
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from batchgen import __version__
from batchgen.errors import InputError
from batchgen.generator import Generator
from batchgen.jobs import cli
from batchgen.jobs.report import harmless, one_line
from batchgen.output.ledger import Ledger
from batchgen.progress import state_of, to_follow, watched, words_of
from batchgen.types import SamplingParams
from tests.support.command import batchgen as run_here
from tests.support.models import write_byte_model

ROOT = Path(__file__).parents[1]
CASES = ROOT / "tests" / "cases"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_byte_model(tmp_path_factory.mktemp("cli") / "bytes")


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The current folder, with a good input."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / "p.jsonl").write_text('{"prompt": "Once", "id": "a"}\n{"prompt": "upon a time"}\n')
    return folder


@pytest.fixture
def batchgen(model, monkeypatch, capsys):
    """Run a command line in this process, as `batchgen` does: (exit code, standard output, standard error)."""
    handler = signal.getsignal(signal.SIGTERM)

    def call(*arguments: object, use_model: bool = True) -> tuple[int, str, str]:
        more = ["--model", str(model)] if use_model else []
        monkeypatch.setattr(sys, "argv", ["batchgen", *map(str, arguments), *more])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return end.value.code or 0, out, err

    yield call
    signal.signal(signal.SIGTERM, handler)
    logging.getLogger().handlers = [h for h in logging.getLogger().handlers if type(h) is not logging.StreamHandler]


def names(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def run(*arguments: object, **kwargs) -> subprocess.CompletedProcess:
    """`batchgen` in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | kwargs.pop("env", {})
    command = [sys.executable, "-m", "batchgen", *map(str, arguments)]
    return subprocess.run(command, env=environment, timeout=120, check=False, **kwargs)


# ---- successful runs


@pytest.mark.parametrize(
    ("output", "more"), [("./o.parquet", "--report"), ("deep//o.parquet", "--report"), ("o/", "--report"), ("-", "-q")]
)
def test_a_command_is_not_done_before_its_page_or_its_copy_is(here, batchgen, monkeypatch, output, more):
    """A signal between the output and these must not end it with 0."""
    seen = []

    def run_job(job, **_):
        seen.append(str(Path(job.output.path)) in to_follow)
        raise InputError("stopped")

    (here / "deep").mkdir()
    monkeypatch.setattr("batchgen.jobs.running.run_job", run_job)
    assert batchgen("generate", "p.jsonl", "-o", output, more)[0] == 1
    to_follow.clear()
    assert seen == [True]


def test_a_job_prints_its_counts_its_output_and_some_rows(here, batchgen):
    code, out, err = batchgen("generate", "p.jsonl", "-o", "out.parquet", "--max-tokens", 5)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "2 rows: 2 ok, 0 rejected, 0 failed"
    assert re.fullmatch(r"15 tokens in, \d+ out in \d+\.\d s: [\d,]+ tokens/s \(1 job; .*\)", lines[1])
    assert lines[2] == "output: out.parquet"
    assert lines[4].startswith("[a] Once ->")
    assert lines[5].startswith("[row 1] upon a time ->")
    assert sorted(os.listdir(here)) == ["out.parquet", "out.parquet.status.json", "p.jsonl"]


def test_a_rejected_row_is_exit_code_3_and_is_shown(here, batchgen):
    (here / "p.jsonl").write_text('{"prompt": "Once"}\nnot JSON\n')
    code, out, err = batchgen("generate", "p.jsonl", "-o", "out.jsonl", "--max-tokens", 5)
    assert (code, err) == (3, "")
    assert out.startswith("2 rows: 1 ok, 1 rejected, 0 failed\n")
    assert "[row 1] rejected: p.jsonl:2: not JSON" in out


def test_the_summary_and_the_status_list_the_reasons_with_counts_and_the_first_places(here, batchgen):
    (here / "p.jsonl").write_text('{"prompt": "Once"}\n{"prompt": "a", "n": 0}\nno\n{"prompt": "a", "n": -12}\n')
    code, out, _ = batchgen("generate", "p.jsonl", "-o", "out.parquet", "--show", 0, "--max-tokens", 5)
    assert code == 3
    assert out.splitlines()[1:3] == [
        "       2  n 0 is out of range (1 to 1024)  [p.jsonl:2, ...]",
        '       1  not JSON: Expecting value at column 1; write {"prompt": "Once upon a time"}  [p.jsonl:3]',
    ]
    assert json.loads((here / "out.parquet.status.json").read_text())["reasons"][0] == {
        "rows": 2,
        "first": "p.jsonl:2",
        "reason": "n 0 is out of range (1 to 1024)",
    }


def test_a_run_without_an_ok_row_is_exit_code_4(here, batchgen):
    (here / "p.jsonl").write_text('{"prompt": ""}\n')
    assert batchgen("generate", "p.jsonl", "-o", "out.parquet", "--show", 0)[0] == 4
    assert batchgen("plan", "p.jsonl", "--no-time")[0] == 4


def test_nested_parameters(here, batchgen):
    code, out, _ = batchgen("generate", CASES / "nested_parameters.jsonl", "-o", "out.jsonl", "--show", 0)
    assert code == 3
    assert (
        "note: columns max_tokens, parameters, sampling_params are taken as parameters; --no-row-params ignores" in out
    )
    rows = [json.loads(line) for line in (here / "out.jsonl").read_text().splitlines()]
    assert [row["completion_tokens"] and row["completion_tokens"] <= 3 for row in rows] == [True, True, True, None]
    assert rows[3]["error"].endswith("'max_new_tokens' is not a parameter; did you mean 'max_tokens'? rename it")


@pytest.mark.parametrize("command", ["plan", "generate"])
def test_own_columns_as_parameters(here, batchgen, command):
    """An output as an input, and a column of counts: what is taken as a parameter, and what is not, is said."""
    batchgen("generate", "p.jsonl", "-o", "first.parquet", "--temperature", 1, "--max-tokens", 4)
    options = ["-o", "second.parquet", "--show", 0] if command == "generate" else ["--no-time"]
    note = "note: the input is an output of batchgen, with its results in seed, parameters: they are not taken as"
    assert note in batchgen(command, "first.parquet", *options)[1]
    (here / "counts.csv").write_text("prompt,n\na,3\nb,2\n")
    note = "note: column n is taken as a parameter; --no-row-params ignores it"
    options = ["-o", "third.parquet", "--show", 0] if command == "generate" else ["--no-time"]
    assert note in batchgen(command, "counts.csv", *options)[1]


def test_a_prompt_of_the_command_line_is_read_with_its_backslashes(here, batchgen, caplog):
    batchgen("complete", r"it's\nover")
    assert [r.getMessage() for r in caplog.records] == [
        "note: PROMPT: \\n is a backslash and a letter; for a line feed write PROMPT $'it\\'s\\nover'"
    ]


def test_shell_escapes_in_a_file(here, batchgen):
    (here / "stops.csv").write_text('prompt,stop\na,\\n\nb,"\n"\nc,x\nd,\\nUser\n')
    out = batchgen("plan", "stops.csv", "--no-time")[1]
    assert "note: \\n in the stop strings of 2 rows is a backslash and a letter; write the character itself\n" in out


def test_samples_and_prompts_are_counted_apart(here, batchgen):
    _, out, _ = batchgen("generate", "p.jsonl", "-o", "out.parquet", "-n", 3, "--temperature", 1, "--show", 0)
    assert out.startswith("6 rows from 2 prompts: 6 ok")
    assert len(out.splitlines()) == 3


def test_no_rows_are_exit_code_0(here, batchgen):
    (here / "p.jsonl").write_text("")
    code, out, _ = batchgen("generate", "p.jsonl", "-o", "out.parquet")
    assert code == 0
    assert out.startswith("0 rows: 0 ok, 0 rejected, 0 failed\n")
    assert pq.read_table("out.parquet").num_rows == 0


def test_a_column_and_an_id_can_be_named(here, batchgen):
    pq.write_table(pa.table({"text": ["ab"], "key": [7]}), "t.parquet")
    columns = ["--prompt-column", "text", "--id-column", "key"]
    assert batchgen("generate", "t.parquet", "-o", "out.parquet", *columns)[0] == 0
    (row,) = pq.read_table("out.parquet").to_pylist()
    assert (row["prompt"], row["id"]) == ("ab", "7")


def test_every_option_reaches_the_run(here, batchgen):
    values = {
        "--max-tokens": 6, "--temperature": 0.5, "--top-k": 9, "--top-p": 0.9, "--min-p": 0.01, "--min-tokens": 2,
        "--repetition-penalty": 1.1, "--presence-penalty": 0.1, "--frequency-penalty": 0.2, "--seed": 7, "--n": 2,
    }  # fmt: skip
    others = {"--batch-size": 5, "--chunk-rows": 3, "--kv-memory": "8M", "--jobs": 1, "--on-too-long": "shorten"}
    flags = ["--ignore-eos", "--output-token-ids", "--no-share-prefixes", "--stop-loops", "--include-stop", "--echo"]
    flags += ["--trim", "--no-row-params"]
    lists = ["--stop", "x", "--stop", "\n\n", "--bad-words", "y z", "--logit-bias", "5=2.5,6=-100"]
    lists += ["--stop-token-ids", "7,8", "--logprobs", 3]
    arguments = [*(part for pair in (values | others).items() for part in pair), *lists]
    assert batchgen("generate", "p.jsonl", "-o", "out.parquet", *arguments, *flags)[0] == 0
    plan = json.loads(pq.read_schema("out.parquet").metadata[b"batchgen"])
    for option, value in values.items():
        assert plan["parameters"][option.strip("-").replace("-", "_")] == value
    for flag in ("ignore_eos", "stop_loops", "include_stop", "echo"):
        assert plan["parameters"][flag] is True
    assert (plan["trim"], plan["row_params"]) == (True, False)
    assert (plan["parameters"]["stop"], plan["parameters"]["bad_words"]) == (["x", "\n\n"], ["y z"])
    assert (plan["parameters"]["logit_bias"], plan["parameters"]["stop_token_ids"]) == ([[5, 2.5], [6, -100.0]], [7, 8])
    assert plan["parameters"]["logprobs"] == 3
    assert (plan["batch_size"], plan["chunk_rows"], plan["kv_bytes"]) == (5, 3, 8 * 2**20)
    assert (plan["on_too_long"], plan["share_prefixes"], plan["token_ids"]) == ("shorten", False, True)


def test_rows_of_an_openai_batch_are_shown_too(here, batchgen):
    lines = [{"custom_id": "x", "url": "/v1/completions", "body": {"prompt": ["a", "b"]}}, {"custom_id": "y"}]
    (here / "b.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for out in ("out.jsonl", "out.parquet"):
        code, text, err = batchgen("generate", "b.jsonl", "-o", out, "--max-tokens", 4)
        assert (code, err) == (3, "")
        assert text.count("[x] ") == 2
        assert "[y] rejected: b.jsonl:2: " in text
        assert "note:" not in text


def test_a_space_at_a_prompts_end_is_noted(here, batchgen):
    (here / "p.jsonl").write_text('{"prompt": "Once "}\n{"prompt": "upon"}\n')
    assert "note: 1 prompt ends in a space" in batchgen("generate", "p.jsonl", "-o", "o.jsonl")[1]
    assert "note:" not in batchgen("generate", "p.jsonl", "-o", "t.jsonl", "--trim")[1]


def test_complete_streams_what_a_job_writes(here, batchgen, model):
    options = ["--max-tokens", 30, "--temperature", 0.8, "--seed", 4]
    (here / "one.jsonl").write_text('{"prompt": "Once"}\n')
    batchgen("generate", "one.jsonl", "-o", "out.parquet", *options)
    code, out, err = batchgen("complete", "Once", *options)
    assert (code, err) == (0, "")
    assert out == pq.read_table("out.parquet")["completion"][0].as_py() + "\n"


def test_models_are_listed_and_a_broken_one_with_its_error(batchgen, model, monkeypatch, tmp_path):
    monkeypatch.setenv("BATCHGEN_MODELS", str(model.parent))
    (model.parent / "broken").mkdir(exist_ok=True)
    (model.parent / "broken" / "manifest.json").write_text("{")
    code, out, err = batchgen("models", use_model=False)
    assert (code, err) == (0, "")
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert re.fullmatch(rf"bytes +0\.0M +128 +0\.2 MB +test +no +{re.escape(str(model))}", lines["bytes"])
    assert "manifest.json: is not JSON" in lines["broken"]
    assert lines["broken"].count("manifest.json") == 1
    assert "batchgen fetch 124M" in lines["Not"]


@pytest.mark.parametrize("command", [[], ["generate"], ["complete"], ["convert"], ["models"]])
def test_every_command_has_help(command):
    for option in ("--help", "-h"):
        result = CliRunner().invoke(cli.app, [*command, option])
        assert result.exit_code == 0
        assert "Usage: " in result.output


def test_the_version_is_shown(batchgen):
    assert batchgen("--version", use_model=False) == (0, f"batchgen {__version__}\n", "")


# ---- standard input and output, several inputs, kept columns


def test_standard_input_to_standard_output_is_json_lines_and_the_rest_is_on_standard_error(here, model, monkeypatch):
    arguments = ["generate", "-", "-o", "-", "--keep", "tag", "--max-tokens", 4, "--model", model]
    given = here.parent / "given.jsonl"
    given.write_bytes(b'{"prompt": "Once", "tag": [1]}\nnonsense\n{"prompt": "upon"}\n')
    monkeypatch.setattr(tempfile, "tempdir", str(here))
    done = run_here(*arguments, stdin=given)
    assert done.returncode == 3
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["row"], row["status"], row["tag"]) for row in rows] == [
        (0, "ok", [1]),
        (1, "rejected", None),
        (2, "ok", None),
    ]
    assert rows[1]["error"].startswith("stdin:2: not JSON")
    assert done.stderr.decode().startswith("3 rows: 2 ok, 1 rejected, 0 failed\n")
    assert done.stderr.decode().endswith("output: -\n")
    assert os.listdir(here) == ["p.jsonl"]
    assert run_here(*arguments, stdin=given).stdout == done.stdout


def test_a_run_over_standard_input_is_resumed_with_the_same_bytes(here, batchgen, monkeypatch):
    def give(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))

    prompts = (here / "p.jsonl").read_bytes()
    arguments = ["generate", "-", "-o", "out.parquet", "--max-tokens", 4]
    give(prompts)
    with monkeypatch.context() as patch:
        patch.setattr("batchgen.output.outputs.write_parquet", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        patch.setattr(cli, "_stop", lambda code: sys.exit(code))
        assert batchgen(*arguments)[0] == 130
    give(prompts + b"\n")
    code, _, err = batchgen(*arguments)
    assert (code, "is not the input that it had" in err) == (2, True)
    give(prompts)
    code, out, _ = batchgen(*arguments)
    assert (code, out.splitlines()[0]) == (0, "2 rows: 2 ok, 0 rejected, 0 failed (2 of them by an earlier run)")


def test_a_signal_in_the_clean_up_after_the_output_is_complete(here, batchgen, monkeypatch):
    """Exit code and status are those of the finished job; the next command clears up. `-o -` has still to copy."""
    arguments = ["generate", "p.jsonl", "--max-tokens", 4, "--overwrite", "-o"]
    clear = Ledger._clear
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "_clear", lambda self, *kept: sys.exit(143) if kept else clear(self))
        patch.setattr(os, "_exit", sys.exit)
        assert batchgen(*arguments, "out.parquet")[::2] == (
            0,
            "batchgen: terminated: the output is complete: out.parquet\n",
        )
        assert batchgen(*arguments, "-")[:2] == (143, "")
    status = json.loads((here / "out.parquet.status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("finished", 0)
    assert (here / "out.parquet.batchgen").exists()
    code, out, _ = batchgen(*arguments, "out.parquet")
    assert (code, "complete: there was nothing to do" in out) == (0, True)
    assert sorted(os.listdir(here)) == ["out.parquet", "out.parquet.status.json", "p.jsonl"]


def test_a_closed_terminal_ends_a_run_in_order_however_often_it_says_so(monkeypatch):
    """It sends SIGHUP to the group, and the shell does too."""
    watched.clear()
    monkeypatch.setattr(cli.threading, "Timer", lambda *_: SimpleNamespace(start=lambda: None))
    before = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has it ignored, and then it stays so
    try:
        cli._handle_signals()
        with pytest.raises(SystemExit, match="129"):
            signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)
        assert (state_of(SystemExit(129)), words_of(SystemExit(129))[:8]) == ("stopped", "hung up;")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_the_reader_of_standard_output_may_be_slow():
    """What does not fit into a pipe that does not block is lost, and Python says nothing."""
    before = os.get_blocking(1)
    try:
        os.set_blocking(1, False)
        cli._open_missing_streams()
        assert os.get_blocking(1)
    finally:
        os.set_blocking(1, before)


def test_the_reader_of_standard_output_may_stop(here, model):
    (here / "many.jsonl").write_text('{"prompt": "Once"}\n' * 3000)
    command = f"'{sys.executable}' -m batchgen generate many.jsonl -o - --max-tokens 1 --model '{model}' | head -1"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, env=environment, timeout=120, check=False
    )
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 1)
    assert b"Traceback" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_standard_output_is_one_line(here, model):
    with open("/dev/full", "wb") as full:
        done = run("generate", "p.jsonl", "-o", "-", "--model", model, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert done.stderr.startswith(b"batchgen: -: standard output cannot be written: No space left on device; name a")
    assert len(done.stderr.splitlines()) == 1


def test_a_terminal_as_standard_input_is_one_line(here, model):
    leader, follower = pty.openpty()
    done = run("generate", "-", "-o", "o.parquet", "--model", model, stdin=follower, capture_output=True)
    os.close(leader)
    os.close(follower)
    assert done.returncode == 1
    assert done.stderr.startswith(b"batchgen: -: standard input is a terminal; pipe prompts into it")
    assert os.listdir(here) == ["p.jsonl"]


def test_several_inputs_and_kept_columns_are_carried_by_workers(here, batchgen):
    (here / "set" / "lang=en").mkdir(parents=True)
    tables = [pa.table({"prompt": [f"{n}"] * 8, "when": pa.array([n] * 8, pa.timestamp("ns"))}) for n in range(2)]
    pq.write_table(tables[0], here / "set" / "lang=en" / "0.parquet")
    pq.write_table(tables[1], here / "more.parquet")
    arguments = ["p.jsonl", "set", "mo*.parquet", "--keep", "when", "--keep", "lang", "--jobs", 2, "--chunk-rows", 3]
    assert batchgen("generate", *arguments, "-o", "out.parquet", "--max-tokens", 2)[0] == 0
    table = pq.read_table("out.parquet", partitioning=None)
    assert table["row"].to_pylist() == list(range(18))
    assert table.schema.types[-2:] == [pa.timestamp("ns"), pa.string()]
    assert table["when"].cast(pa.int64()).to_pylist() == [None] * 2 + [0] * 8 + [1] * 8
    assert table["lang"].to_pylist() == [None] * 2 + ["en"] * 8 + [None] * 8


def test_a_kept_custom_id_is_a_column_as_any_other(here, batchgen):
    (here / "p.jsonl").write_text('{"prompt": "Once", "custom_id": "a"}\n')
    code, out, err = batchgen("generate", "p.jsonl", "-o", "out.jsonl", "--keep", "custom_id", "--max-tokens", 2)
    assert (code, err) == (0, "")
    assert "Once ->" in out
    assert json.loads((here / "out.jsonl").read_text())["custom_id"] == "a"


def test_the_status_file_of_a_run_is_not_an_input_of_the_next(here, batchgen):
    """Neither if a pattern finds it nor if the shell names it among the others."""
    for name in ("a.json", "b.json"):
        (here / name).write_text('{"prompt": "Once"}\n')
    for _ in range(2):
        assert batchgen("generate", "*.json", "-o", "out.parquet", "--max-tokens", 2)[0] == 0
        by_shell = sorted(map(str, here.glob("*.json")))
        assert batchgen("generate", *by_shell, "-o", "out.parquet", "--max-tokens", 2)[0] == 0
        assert pq.read_table("out.parquet").num_rows == 2
    assert (here / "out.parquet.status.json").exists()


# ---- a user's mistakes


def make_inputs(here: Path) -> None:
    (here / "binary.jsonl").write_bytes(bytes(range(128, 256)) * 20)
    (here / "column.jsonl").write_text('{"text": "a", "id": 1}\n')
    pq.write_table(pa.table({"prompt": [1, 2]}), here / "numbers.parquet")
    pq.write_table(pa.table({"text": ["a"], "Prompt": ["b"]}), here / "column.parquet")
    (here / "text.md").write_text("Once\n")
    (here / "truncated.jsonl.gz").write_bytes(b"\x1f\x8b\x08\x00")
    (here / "folder").mkdir()
    (here / "full").mkdir()
    (here / "full" / "f.jsonl").write_text('{"prompt": "a"}\n')
    (here / "folder.parquet").mkdir()
    (here / "link.parquet").symlink_to("p.jsonl")
    (here / "unwritable").write_text("")


MISTAKES = [
    (["*.csv", "-o", "o.parquet"], 1, "no match; check the pattern"),
    (["p.jsonl", "p.jsonl", "-o", "o.parquet"], 1, "p.jsonl: named twice"),
    (["p.jsonl", "q.jsonl", "-o", "o.parquet"], 1, "q.jsonl: no such file; did you mean p.jsonl"),
    (["p.jsonl", "-o", "o.parquet", "--keep", "tag"], 1, "p.jsonl: no column 'tag'"),
    (["p.jsonl", "-o", "o.parquet", "--keep", "prompt"], 2, "--keep 'prompt': the output has a column of its own"),
    (
        ["ftp://x/p.jsonl", "-o", "o.parquet"],
        1,
        "ftp://x/p.jsonl: this address cannot be read .*; download the file, or use s3://",
    ),
    (["p.jsonl", "-o", "o.parquet", "--input-format", "parquet"], 1, "p.jsonl: not a Parquet file"),
    (["p.jsonl", "full", "-o", "full/o.parquet"], 1, "it would be in the input full and be read with it"),
    (["/nowhere/x.jsonl", "-o", "o.parquet"], 1, "/nowhere/x.jsonl: no such file; check the name"),
    (["q.jsonl", "-o", "o.parquet"], 1, "q.jsonl: no such file; did you mean p.jsonl?"),
    (["folder", "-o", "o.parquet"], 1, "folder: no file in this directory"),
    (["binary.jsonl", "-o", "o.parquet"], 1, "binary.jsonl: none of the first .* invalid UTF-8"),
    (["text.md", "-o", "o.parquet"], 1, "text.md: unknown format; use .parquet, .jsonl, .*--input-format"),
    (["truncated.jsonl.gz", "-o", "o.parquet"], 1, "truncated.jsonl.gz: not a gzip file, or a damaged one"),
    (["column.jsonl", "-o", "o.parquet"], 1, "no key 'prompt'; the keys are 'text', 'id'; .*--prompt-column"),
    (["column.parquet", "-o", "o.parquet"], 1, "the columns are 'text', 'Prompt'; did you mean 'Prompt'"),
    (["numbers.parquet", "-o", "o.parquet"], 1, "column 'prompt' is of type int64; cast it to string"),
    (["p.jsonl", "-o", "o.parquet", "--id-column", "nr"], 1, "no key 'nr'"),
    (["p.jsonl", "-o", "p.jsonl"], 1, "p.jsonl: this is the input p.jsonl"),
    (["p.jsonl", "-o", "./folder/../p.jsonl"], 1, "this is the input p.jsonl"),
    (["p.jsonl", "-o", "folder.parquet"], 1, "folder.parquet: a directory; name a file in it"),
    (["p.jsonl", "-o", "link.parquet"], 1, "link.parquet: a symbolic link"),
    (["p.jsonl", "-o", "nowhere/o.parquet"], 1, "nowhere is no such folder; create it"),
    (["p.jsonl", "-o", "unwritable/o.parquet"], 1, "unwritable is not a folder"),
    (["p.jsonl", "-o", "/proc/o.parquet"], 1, "/proc/o.parquet: the folder cannot be written"),
    (["p.jsonl", "-o", "x" * 250 + ".parquet"], 1, "File name too long"),
    (["p.jsonl", "-o", "o.csv"], 2, "o.csv: the suffix '.csv' is not one of .parquet, .jsonl"),
    (["p.jsonl", "-o", "o.parquet", "--model", "bites"], 1, r"unknown model 'bites'.*\(known: .*bytes"),
    (
        ["p.jsonl", "-o", "o.parquet", "--model", "124M", "--no-fetch"],
        1,
        "124M is not here; fetch it with: batchgen fetch",
    ),
    (["p.jsonl", "-o", "o.parquet", "--model", "./folder"], 1, "folder: is not a model"),
    (["p.jsonl", "-o", "o.parquet", "--max-tokens", "0"], 2, r"max_tokens 0 is out of range \(1 or more\)"),
    (["p.jsonl", "-o", "o.parquet", "--temperature", "nan"], 2, "temperature nan is out of range"),
    (["p.jsonl", "-o", "o.parquet", "--top-p", "0"], 2, "top_p 0.0 is out of range .* greedy is temperature 0"),
    (["p.jsonl", "-o", "o.parquet", "--n", "1025"], 2, "n 1025 is out of range"),
    (["p.jsonl", "-o", "o.parquet", "--seed", "-1"], 2, "seed -1 is out of range"),
    (["p.jsonl", "-o", "o.parquet", "--logprobs", "101"], 2, "logprobs 101 is out of range"),
    (["p.jsonl", "-o", "o.parquet", *["--stop", "x"] * 65], 2, "stop has 65 strings"),
    (["p.jsonl", "-o", "o.parquet", "--stop", ""], 2, "stop '' is out of range"),
    (["p.jsonl", "-o", "o.parquet", "--bad-words", ""], 2, "bad_words '' is out of range"),
    (["p.jsonl", "-o", "o.parquet", "--logit-bias", "5"], 2, "--logit-bias '5': write it as a token id and a number"),
    (["p.jsonl", "-o", "o.parquet", "--logit-bias", "x=1"], 2, "--logit-bias 'x': not a token id"),
    (["p.jsonl", "-o", "o.parquet", "--logit-bias", "5=101"], 2, "logit_bias 101.0 of token 5 is out of range"),
    (["p.jsonl", "-o", "o.parquet", "--stop-token-ids", "a,b"], 2, "--stop-token-ids 'a': not a token id"),
    (["p.jsonl", "-o", "o.parquet", "--jobs", "0"], 2, "--jobs '0': must be a whole number from 1 on, or auto"),
    (["p.jsonl", "-o", "o.parquet", "--chunk-rows", "many"], 2, "--chunk-rows 'many': must be"),
    (["p.jsonl", "-o", "o.parquet", "--batch-size", "1e3"], 2, "--batch-size '1e3': must be"),
    (["p.jsonl", "-o", "o.parquet", "--batch-size", "5000"], 2, "--batch-size 5000 is out of range"),
    (["p.jsonl", "-o", "o.parquet", "--kv-memory", "lots"], 2, "--kv-memory 'lots': not a size; write it as"),
    (["p.jsonl", "-o", "o.parquet", "--kv-memory", "0"], 2, "--kv-memory '0' is out of range .*; leave it out"),
    (["p.jsonl", "-o", ""], 2, "--output '' is not a file name; name one, such as"),
    (["p.jsonl", "-o", "."], 2, "--output '.' is not a file name"),
    (["p.jsonl", "-o", "-", "--format", "dataset"], 2, "-o -: a dataset is a folder of files; name one"),
    (["p.jsonl", "-o", "s3://[bucket/x/"], 2, "s3://...: not an address .*; write it as s3://bucket/"),
    (["p.jsonl", "-o", "o.parquet", "--kv-memory", "1K"], 2, "memory budget .* raise --kv-memory to 1M"),
]


@pytest.mark.parametrize(("arguments", "code", "line"), MISTAKES, ids=lambda value: str(value)[-60:])
def test_a_mistake_is_one_line_and_nothing_is_written(here, batchgen, model, monkeypatch, arguments, code, line):
    monkeypatch.setenv("BATCHGEN_MODELS", str(model.parent))
    make_inputs(here)
    before = names(here)
    found, out, err = batchgen("generate", *arguments, use_model="--model" not in arguments)
    assert (found, out) == (code, "")
    assert re.fullmatch(rf"batchgen: [^\n]*{line}[^\n]*\n", err)
    assert names(here) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate"],
        ["generate", "p.jsonl"],
        ["generate", "p.jsonl", "-o", "o.parquet", "--bogus"],
        ["generate", "p.jsonl", "-o", "o.parquet", "--max-tokens", "1.5"],
        ["generate", "p.jsonl", "-o", "o.parquet", "--on-too-long", "crop"],
        ["generate", "p.jsonl", "-o", "o.parquet", "--show", "-1"],
        ["complete"],
        ["frobnicate"],
    ],
    ids=" ".join,
)
def test_a_command_line_that_cannot_be_read_is_exit_code_2(here, batchgen, arguments):
    before = names(here)
    code, out, err = batchgen(*arguments, use_model=False)
    assert (code, out) == (2, "")
    assert "Usage: " in err
    assert "Traceback" not in err
    assert names(here) == before


@pytest.mark.parametrize(
    ("prompt", "more", "line"),
    [
        ("", [], "PROMPT: the prompt is empty.*--empty-prompt unconditional"),
        ("x" * 120, ["--max-tokens", 20], "120 prompt tokens .* exceed n_ctx 128; .*--on-too-long"),
        ("\udcff", [], "half of a surrogate pair"),
    ],
)
def test_a_prompt_that_cannot_be_completed_is_one_line(batchgen, prompt, more, line):
    code, out, err = batchgen("complete", prompt, *more)
    assert code in (1, 2)
    assert out == ""
    assert re.fullmatch(f"batchgen: [^\n]*{line}[^\n]*\n", err)


def test_the_options_that_an_error_of_complete_names_exist(batchgen):
    assert batchgen("complete", "", "--empty-prompt", "unconditional", "--max-tokens", 3)[0] == 0
    assert batchgen("complete", "x" * 200, "--on-too-long", "truncate-left", "--max-tokens", 3)[0] == 0
    beams = ("complete", "x", "--num-beams", 64, "--max-tokens", 9)
    error = batchgen(*beams, "--kv-memory", "1M")[2]
    remedy = re.search(r"raise (--kv-memory) to (\d+M)", error)
    assert remedy
    assert batchgen(*beams, *remedy.groups())[0] == 0


# ---- names and texts with control characters


@pytest.mark.parametrize("name", ["a b", "-dash", "über 🦊", "line\nfeed", "\x1b[31mred"])
def test_a_file_may_have_any_name(here, batchgen, name):
    (here / f"{name}.jsonl").write_bytes((here / "p.jsonl").read_bytes())
    code, out, err = batchgen("generate", f"./{name}.jsonl", "-o", f"./{name}.out.jsonl", "--max-tokens", 2)
    assert (code, err) == (0, "")
    assert f"output: {one_line(name)}.out.jsonl\n" in out
    assert out.isprintable() or "\x1b" not in out
    code, out, err = batchgen("generate", f"./{name}.jsonx", "-o", "o.parquet")
    assert (code, len(err.splitlines())) == (1, 1)
    assert "\x1b" not in err


def test_control_characters_of_a_prompt_do_not_reach_the_terminal(here, batchgen):
    prompt = "\x1b[2J\x07\x9b31m\u202e\r\nbell"
    (here / "p.jsonl").write_text(json.dumps({"prompt": prompt, "id": "\x1b]0;title\x07"}) + "\n{\x1b[31m\n")
    code, out, err = batchgen("generate", "p.jsonl", "-o", "out.jsonl")
    assert (code, err) == (3, "")
    assert all(c.isprintable() or c == "\n" for c in out)
    assert json.loads((here / "out.jsonl").read_text().split("\n")[0])["prompt"] == prompt


def test_a_completion_on_a_terminal_is_without_control_characters(model):
    params = SamplingParams(max_tokens=120, temperature=5.0, ignore_eos=True)
    completion = "".join(Generator(model).stream("a", params))
    assert not completion.isprintable()
    parent, terminal = pty.openpty()
    arguments = ["complete", "a", "--model", model, "--max-tokens", 120, "--temperature", 5, "--ignore-eos"]
    assert run(*arguments, stdout=terminal).returncode == 0
    os.close(terminal)
    shown = os.read(parent, 10_000).decode().replace("\r\n", "\n").removesuffix("\n")
    os.close(parent)
    assert "\x1b" not in shown
    assert re.sub(" +", " ", shown.expandtabs()) == re.sub(" +", " ", harmless(completion).expandtabs())


# ---- closed and full streams


def test_a_job_finishes_if_the_reader_of_its_output_is_gone(here, model):
    arguments = ["generate", "p.jsonl", "-o", "out.parquet", "--model", model, "--max-tokens", 2]
    reader, writer = os.pipe()
    os.close(reader)
    done = run(*arguments, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")
    assert sorted(os.listdir(here)) == ["out.parquet", "out.parquet.status.json", "p.jsonl"]


def test_a_job_runs_with_closed_streams_and_without_home(here, model):
    script = 'exec "$0" -m batchgen generate p.jsonl -o out.parquet --model "$1" -j 2 --chunk-rows 1 <&- >&- 2>&-'
    environment = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(["sh", "-c", script, sys.executable, model], env=environment, timeout=120, check=False)
    assert done.returncode == 0
    assert pq.read_table("out.parquet").num_rows == 2
    assert sorted(os.listdir(here)) == ["out.parquet", "out.parquet.status.json", "p.jsonl"]


def test_an_interruption_while_modules_are_imported_leaves_no_traceback(here):
    (here / "typer.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    environment = os.environ | {"PYTHONPATH": f"{here}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", "from batchgen.jobs.entry import main; main()", "--version"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"importing\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == b""
    assert process.returncode == -signal.SIGINT


def test_a_full_disk_behind_standard_output_is_one_line():
    with open("/dev/full", "w") as full:
        done = run("models", stdout=full, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (1, b"batchgen: [Errno 28] No space left on device\n")


# ---- for machines


def test_messages_can_be_json_lines(here, model):
    arguments = ["generate", "p.jsonl", "-o", "o.parquet", "--model", model, "--log-json", "--show", 0]
    done = run_here(*arguments)
    assert done.returncode == 0
    [last] = map(json.loads, done.stderr.splitlines())
    assert (last["level"], last["message"], last["exit_code"], last["ok"]) == ("info", "finished", 0, 2)
    refused = run_here(*arguments[:-2], "--max-tokens", 0)
    [line] = map(json.loads, refused.stderr.splitlines())
    assert (refused.returncode, line["level"]) == (2, "error")
    assert "max_tokens 0 is out of range" in line["message"]


def test_the_status_file_is_beside_the_output_unless_no_status_is_given(here, batchgen):
    assert batchgen("generate", "p.jsonl", "-o", "o.parquet", "--no-status")[0] == 0
    assert sorted(os.listdir(here)) == ["o.parquet", "p.jsonl"]
    assert batchgen("generate", "p.jsonl", "-o", "o.parquet", "--overwrite")[0] == 0
    assert json.loads((here / "o.parquet.status.json").read_text())["state"] == "finished"


def test_a_dataset_can_be_shown_like_a_file(here, batchgen):
    code, out, _ = batchgen("generate", "p.jsonl", "-o", "o", "--format", "dataset", "--max-tokens", 4)
    assert code == 0
    assert out.splitlines()[2] == "output: o"
    assert out.splitlines()[4].startswith("[a] Once ->")
    assert (here / "o" / "_SUCCESS").exists()


def test_a_second_signal_exits_immediately_and_an_ignored_one_stays_ignored(here, model):
    code = "import signal, sys, time; from batchgen.jobs import cli; cli._handle_signals(); "
    waits = "try:\n print(flush=True); time.sleep(60)\nfinally:\n print(flush=True); time.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-c", code + "exec(sys.argv[1])", waits],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "\n"  # it ends in order
    process.send_signal(signal.SIGINT)
    assert process.wait(2) == 130  # the last resort would come after 3 seconds
    assert process.communicate()[1] == "batchgen: interrupted; run the same command again to resume\n"
    keeps = "signal.signal(signal.SIGINT, signal.SIG_IGN); cli._handle_signals(); "
    keeps += "sys.exit(signal.getsignal(signal.SIGINT) is not signal.SIG_IGN)"
    command = [sys.executable, "-c", "import signal, sys; from batchgen.jobs import cli; " + keeps]
    assert subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False).returncode == 0
