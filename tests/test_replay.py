"""replay.py: rows that a run wrote are generated again as they were; a changed row is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from batchgen.engine.limits import kv_bytes_per_token
from batchgen.errors import BatchgenError, InputError, ModelError
from batchgen.jobs.cli import app
from batchgen.models.model import Model
from batchgen.output.reading import read_plan
from batchgen.review import replay as module
from batchgen.review.replay import replay
from batchgen.run import run_job
from batchgen.types import SamplingParams
from tests.support.jobs import change, make_job
from tests.support.models import BYTES, write_byte_model
from tests.support.scores import KINDS, write_scores

LINES = [json.dumps({"id": f"r{i}", "prompt": "the prompt "[: 1 + i % 11] * (1 + i % 9)}) for i in range(30)]
LINES[7:7] = ["not JSON", '{"prompt": ""}', json.dumps({"prompt": "x" * 200})]
OK = 30
OLDER = {"batchgen": "0.2.0", "blas": "openblas", "batch_invariant": True, "numpy_kernels": "", "portable": ...}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("replay")


@pytest.fixture(scope="module")
def model(folder) -> Path:
    return write_byte_model(folder / "models" / "bytes")


@pytest.fixture(autouse=True)
def _model_under_its_name(model, monkeypatch):
    monkeypatch.setenv("BATCHGEN_MODELS", str(model.parent))


@pytest.fixture(scope="module")
def output(folder, model) -> Path:
    (folder / "p.jsonl").write_text("\n".join(LINES))
    params = SamplingParams(max_tokens=12, temperature=0.9, n=2, logprobs=0, prompt_logprobs=1)
    run_job(
        make_job(folder / "p.jsonl", folder / "out.parquet", str(model), params, jobs=1, chunk_rows=8, token_ids=True)
    )
    return folder / "out.parquet"


def rewrite(
    output: Path,
    folder: Path,
    change: Callable[[list[dict[str, Any]]], object] = lambda rows: None,
    **metadata: object,
) -> Path:
    """The output with other rows, or with other metadata."""
    table = pq.read_table(output)
    run = json.loads(table.schema.metadata[b"batchgen"]) | metadata
    run = {key: value for key, value in run.items() if value is not ...}
    rows = table.to_pylist()
    change(rows)
    schema = table.schema.with_metadata({"batchgen": json.dumps(run)})
    pq.write_table(pa.Table.from_pylist(rows, schema), folder / "changed.parquet")
    return folder / "changed.parquet"


def first_ok(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return next(row for row in rows if row["status"] == "ok")


def test_rows_of_a_run_are_generated_again(output, model):
    done = replay(output, 100)
    assert (done.rows, done.ok, done.compared, done.samples) == (len(LINES), OK, OK, 2 * OK)
    assert done.model == model
    assert done.exact
    assert {"completion", "completion_token_ids", "finish_reason", "prompt_top_logprobs", "seed"} <= set(done.columns)
    assert done.differences == ()


def test_an_output_that_changes_while_it_is_read_is_named(output, tmp_path, monkeypatch):
    path = Path(shutil.copy(output, tmp_path))
    read = module.read_input_rows
    monkeypatch.setattr(module, "read_input_rows", lambda *args: (shutil.copy(output, tmp_path), read(*args))[1])
    with pytest.raises(InputError, match=r"out\.parquet: the file was changed while it was being read; verify it when"):
        replay(path, 4)


@pytest.mark.parametrize("on_too_long", ["truncate-left", "shorten"])
def test_cut_and_empty_prompts_are_generated_again(folder, tmp_path, model, on_too_long):
    job = make_job(folder / "p.jsonl", tmp_path / "out.parquet", str(model), on_too_long=on_too_long)
    (folder / "p.jsonl").write_text("\n".join(LINES))
    run_job(change(job, empty_prompt="unconditional", jobs=1))
    done = replay(job.output.path, 100)
    assert done.differences == ()
    assert done.ok == OK + (2 if on_too_long == "truncate-left" else 1)


@pytest.mark.parametrize("seed_by", ["id", "prompt"])
def test_rows_are_generated_again_by_what_their_seeds_hang_on(folder, tmp_path, model, seed_by):
    (folder / "p.jsonl").write_text("\n".join(LINES))
    params = SamplingParams(max_tokens=12, temperature=0.9, n=2)
    job = make_job(folder / "p.jsonl", tmp_path / "out.parquet", str(model), params, trim=True, jobs=1, seed_by=seed_by)
    run_job(job)
    done = replay(job.output.path, 100)
    assert (done.exact, done.differences, done.ok) == (True, (), OK)
    again = replay(rewrite(job.output.path, tmp_path, seed_by="row"), 100)
    assert len(again.differences) == 2 * OK


def test_a_seed_chooses_the_same_rows_again(output, monkeypatch):
    seen: list[list[int]] = []
    read = module.read_input_rows
    monkeypatch.setattr(module, "read_input_rows", lambda path, rows, own: seen.append(rows) or read(path, rows, own))
    assert replay(output, 4, seed=3).compared == 4
    again = replay(output, 4, seed=None)
    replay(output, 4, seed=3)
    replay(output, 4, seed=again.seed)
    assert seen[0] == seen[2]
    assert seen[1] == seen[3]
    assert len(set(seen[0])) == 4
    assert 7 not in seen[0] + seen[1]


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("completion", "edited"),
        ("completion", None),
        ("completion_tokens", 999),
        ("finish_reason", "stop "),
        ("seed", 1),
        ("completion_token_ids", [1, 2]),
        ("completion_token_ids", None),
        ("logprobs", [0.5]),
    ],
)
def test_an_edited_value_is_named_with_its_row(output, tmp_path, column, value):
    path = rewrite(output, tmp_path, lambda rows: first_ok(rows).__setitem__(column, value))
    (line,) = replay(path, 100).differences
    assert line.startswith(f"row 0, sample 0: {column} differs")


def test_one_bit_of_a_log_probability_is_a_difference(output, tmp_path):
    def flip(rows):
        values = np.array(first_ok(rows)["logprobs"], np.float32)
        values[0] = np.nextafter(values[0], np.float32(0))
        first_ok(rows)["logprobs"] = values.tolist()

    (line,) = replay(rewrite(output, tmp_path, flip), 100).differences
    assert line.startswith("row 0, sample 0: logprobs differs from place 0: ")


@pytest.mark.parametrize(
    ("another", "words"),
    [
        ({"batchgen": "9.9"}, "made with batchgen 9.9, this is"),
        ({"regex": "9.9"}, "made with regex 9.9, this is"),
        ({"llguidance": "9.9"}, "made with llguidance 9.9, this is"),
        (OLDER, "made by batchgen 0.2.0: then the bits of a row depended on the processor"),
    ],
)
def test_values_are_compared_and_a_note_says_so_if_the_arithmetic_differs(output, tmp_path, another, words):
    def nudge(rows):
        first_ok(rows)["logprobs"][0] += 1e-5

    done = replay(rewrite(output, tmp_path, nudge, **another), 100)
    assert not done.exact
    assert len(done.notes) == 1
    assert words in done.notes[0]
    assert done.differences == ()
    edited = rewrite(output, tmp_path, lambda rows: first_ok(rows).update(completion="x"), **another)
    assert len(replay(edited, 100).differences) == 1


def test_rows_are_generated_in_the_precision_of_the_file_or_in_the_one_asked_for(output, tmp_path):
    made = rewrite(output, tmp_path, precision="int8")
    assert len(replay(made, 100).differences) > OK  # they were made in float32
    done = replay(made, 100, precision="float32")
    assert done.differences == ()
    assert done.notes == ("the file was made with precision int8, this is float32",)


def test_another_prompt_seed_or_parameter_is_a_difference(output, tmp_path):
    run = json.loads(pq.read_schema(output).metadata[b"batchgen"])
    for name, value in [("seed", 5), ("temperature", 0.0), ("max_tokens", 3)]:
        path = rewrite(output, tmp_path, parameters=run["parameters"] | {name: value})
        assert len(replay(path, 100).differences) == 2 * OK
    assert replay(rewrite(output, tmp_path, lambda rows: first_ok(rows).update(prompt="xyz")), 100).differences
    path = rewrite(output, tmp_path, lambda rows: first_ok(rows).update(prompt=None))
    assert "its prompt removed" in replay(path, 100).differences[0]
    path = rewrite(output, tmp_path, lambda rows: first_ok(rows).update(prompt="y" * 500))
    assert "is ok in the file, and rejected here (row 0: 500 prompt tokens" in replay(path, 100).differences[0]


def test_a_sample_that_was_removed_is_named(output, tmp_path):
    path = rewrite(output, tmp_path, lambda rows: rows.pop(1))
    assert replay(path, 100).differences == ("row 0, sample 1: was generated again, and is missing from the file",)


def test_a_sample_that_was_added_is_named(output, tmp_path):
    path = rewrite(output, tmp_path, lambda rows: rows.insert(2, rows[1] | {"sample": 2}))
    assert replay(path, 100).differences == (
        "row 0, sample 2: is in the file, and was not generated again; the row was added, or its prompt removed",
    )


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda rows: rows.__delitem__(slice(0, 2)), "row 1 is out of order, or the rows before it are missing"),
        (lambda rows: rows.reverse(), "out of order"),
        (
            lambda rows: rows.__delitem__(slice(-2, None)),
            "each of its 33 input rows in order: it holds 32",
        ),
        (lambda rows: rows.clear(), "it holds 0"),
    ],
)
def test_rows_that_are_missing_or_moved_are_named(output, tmp_path, change, line):
    with pytest.raises(InputError, match=line):
        replay(rewrite(output, tmp_path, change), 3)


def test_a_file_without_an_ok_row_is_named(tmp_path, model):
    (tmp_path / "p.jsonl").write_text('{"prompt": ""}\n{"prompt": 3}\n')
    run_job(make_job(tmp_path / "p.jsonl", tmp_path / "out.parquet", str(model), jobs=1))
    with pytest.raises(BatchgenError, match="none of its 2 rows is ok"):
        replay(tmp_path / "out.parquet", 3)


def test_parameters_of_another_version_are_named(output, tmp_path):
    run = json.loads(pq.read_schema(output).metadata[b"batchgen"])
    for parameters, named in (
        (run["parameters"] | {"mirostat": 2}, "the parameter 'mirostat' is not known here"),
        (run["parameters"] | {"top_p": 7}, "top_p 7 is out of range"),
        (None, "'parameters' is not an object"),
    ):
        path = rewrite(output, tmp_path, parameters=parameters, batchgen="9.9")
        with pytest.raises(InputError, match=rf"\({named}.*it was changed, or batchgen 9.9 wrote it"):
            replay(path, 3)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"later": 1}, "'later' is not known here"),
        ({"rows": "33"}, "rows is not of type int"),
        ({"trim": None}, "trim is not of type bool"),
        ({"keep": "id"}, "keep is not a list of strings"),
        ({"numpy": None}, "numpy is not of type str"),
        ({"on_too_long": "cut"}, "on_too_long 'cut' is none of reject, .*"),
        ({"input_formats": ["odt"]}, "format 'odt' is none of auto, .*"),
    ],
)
def test_metadata_that_is_not_a_plan_is_one_error(output, tmp_path, values, named):
    with pytest.raises(InputError, match=rf"is not a plan of this version \({named}\)"):
        replay(rewrite(output, tmp_path, **values), 3)


def test_a_missing_field_of_the_plan_is_named(output, tmp_path):
    table = pq.read_table(output)
    values = json.loads(table.schema.metadata[b"batchgen"])
    del values["model_hash"]
    pq.write_table(table.replace_schema_metadata({"batchgen": json.dumps(values)}), tmp_path / "changed.parquet")
    with pytest.raises(InputError, match=r"is not a plan of this version \('model_hash' is missing\)"):
        replay(tmp_path / "changed.parquet", 3)


def test_the_model_is_known_by_its_hash(output, tmp_path, model, monkeypatch):
    other = write_byte_model(tmp_path / "models" / "bytes", seed=1)
    with pytest.raises(ModelError, match="made by model bytes with hash .*; .*is here with hash .* --model"):
        replay(output, 3, model=str(other))
    monkeypatch.setenv("BATCHGEN_MODELS", str(other.parent))
    with pytest.raises(ModelError, match="bytes is here with hash"):
        replay(output, 3)
    assert replay(output, 3, model=str(model)).differences == ()
    model_again = write_byte_model(tmp_path / "models" / "bytes-again")
    assert replay(rewrite(output, tmp_path, model="bytes", model_hash=_hash(model_again)), 3).model == model_again
    with pytest.raises(ModelError, match="nowhere is not here"):
        replay(rewrite(output, tmp_path, model="nowhere", model_hash="0" * 64), 3)


def _hash(model: Path) -> str:
    return Model.open(str(model)).hash


def test_the_command_says_what_was_compared(output, tmp_path):
    done = CliRunner().invoke(app, ["verify", str(output), "--rows", "3", "--seed", "1"])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert "33 input rows, 30 of them ok" in lines[0]
    assert lines[1] == "3 of these generated again (6 samples; --seed 1 chooses them again)"
    assert lines[2].startswith("compared bit for bit")
    assert lines[-1] == "verified: all rows are the same"


def test_the_command_exits_1_on_an_edited_file(output, tmp_path):
    def edit(rows):
        for row in rows:
            row["completion"] = "\x1b[2J\n"

    done = CliRunner().invoke(app, ["verify", str(rewrite(output, tmp_path, edit)), "--rows", "30"])
    assert done.exit_code == 1
    assert done.output.count("DIFFERS") == 20
    assert "... and 40 more" in done.output
    assert "not verified" in done.output.splitlines()[-1]
    assert "\x1b" not in done.output


def test_a_name_with_the_suffix_of_an_output_is_one_and_any_other_is_a_model(tmp_path):
    missing = CliRunner().invoke(app, ["verify", str(tmp_path / "no.parquet")])
    assert isinstance(missing.exception, InputError)
    assert isinstance(CliRunner().invoke(app, ["verify", "no-such-model"]).exception, ModelError)
    (tmp_path / "text").write_text("text")
    assert isinstance(CliRunner().invoke(app, ["verify", str(tmp_path / "text")]).exception, InputError)


def test_rows_with_parameters_of_their_own_are_generated_again(tmp_path, model):
    own = [{"max_tokens": 3}, {"seed": 9, "temperature": 1.2}, {"n": 3}, {"stop": ["a", "e"], "echo": True}, {}]
    lines = [json.dumps({"prompt": "the prompt"} | values) for values in own]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    params = SamplingParams(max_tokens=12, temperature=0.9)
    run_job(make_job(tmp_path / "p.jsonl", tmp_path / "out.parquet", str(model), params, jobs=1))
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [json.loads(row["parameters"] or "{}") for row in rows if row["sample"] == 0] == own
    done = replay(tmp_path / "out.parquet", 10)
    assert (done.compared, done.samples, done.differences) == (5, 7, ())


@pytest.mark.parametrize("name", ["beam_score", "mean_logprob"])
def test_a_kept_column_of_an_older_version_is_not_compared_whatever_its_name_is_now(tmp_path, model, name):
    line = json.dumps({"prompt": "the prompt", "given": 0.5})
    (tmp_path / "p.jsonl").write_text(line)
    run_job(make_job(tmp_path / "p.jsonl", tmp_path / "out.parquet", str(model), jobs=1, keep=("given",)))
    table = pq.read_table(tmp_path / "out.parquet")
    run = json.loads(table.schema.metadata[b"batchgen"]) | {"keep": [name]}
    names = [name if column == "given" else column for column in table.column_names]
    older = table.rename_columns(names).replace_schema_metadata({"batchgen": json.dumps(run)})
    pq.write_table(older, tmp_path / "older.parquet")
    done = replay(tmp_path / "older.parquet", 1)
    assert done.differences == ()
    assert name not in done.columns


def test_a_search_that_fits_in_int8_alone_is_made_again_in_float32(tmp_path, model, monkeypatch):
    monkeypatch.setattr(module, "default_kv_bytes", lambda *_: 0)
    line = json.dumps({"prompt": "the prompt", "num_beams": 8, "max_tokens": 20})
    (tmp_path / "p.jsonl").write_text(line)
    options = {"precision": "int8", "kv_bytes": 600 * kv_bytes_per_token(BYTES, "int8"), "jobs": 1}
    run_job(make_job(tmp_path / "p.jsonl", tmp_path / "out.parquet", str(model), **options))
    assert replay(tmp_path / "out.parquet", 1, precision="float32").compared == 1


def test_prompts_that_were_token_ids_are_generated_again(tmp_path, model):
    """Ids that the tokenizer would not make of their own text, more of them than fit, and several in one line."""
    prompts = [[256, 97], [97, 32], [255, 254], [97] * 200, [[256], [98, 32]], "text "]
    lines = [
        {"custom_id": f"{i}", "method": "POST", "url": "/v1/completions", "body": {"prompt": prompt, "n": 2}}
        for i, prompt in enumerate(prompts)
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "out.parquet"
    params = SamplingParams(max_tokens=12, temperature=0.9)
    run_job(make_job(tmp_path / "p.jsonl", out, str(model), params, jobs=1, on_too_long="truncate-left", trim=True))
    rows = pq.read_table(out).to_pylist()
    assert [row["status"] for row in rows] == ["ok"] * 14
    assert json.loads(rows[0]["parameters"])["prompt_token_ids"] == [256, 97]
    done = replay(out, 10)
    assert (done.compared, done.samples, done.differences) == (6, 14, ())


@pytest.mark.parametrize(
    "text", ["{", "[1]", '{"mirostat": 2}', '{"top_p": 7}', '{"prompt_token_ids": []}', '{"prompt_token_ids": ["a"]}']
)
def test_parameters_of_a_row_that_no_run_wrote_are_named(output, tmp_path, text):
    with pytest.raises(InputError, match="parameters"):
        replay(rewrite(output, tmp_path, lambda rows: first_ok(rows).update(parameters=text)), 100)


# ---- scores and embeddings


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_made_again_and_one_bit_of_any_column_is_a_difference(tmp_path, model, kind):
    path = write_scores(tmp_path / "scores.parquet", kind, model)
    done = replay(path, 100)
    assert (done.rows, done.ok, done.compared, done.exact, done.differences) == (12, 11, 11, True, ())
    kept, plan = pq.read_table(path), read_plan(path)
    rows = [row for row in kept.to_pylist() if row["status"] == "ok"]
    made = module.generate_again(module.read_requests(path, plan, rows), plan, Model.open(str(model)))
    assert set(done.columns) == set(kept.column_names) - module._GIVEN - module._TARGETS
    for name in done.columns:
        changed = [rows[0] | {name: nudge(rows[0][name], kept.schema.field(name).type)}, *rows[1:]]
        (line,) = module.list_differences(pa.Table.from_pylist(changed, kept.schema), made, done.columns, exact=True)
        assert line.startswith(f"row 0, sample 0: {name} differs")


def nudge(value: Any, kind: pa.DataType) -> Any:
    """The nearest other value."""
    if isinstance(value, list):
        return [nudge(value[0], kind.value_type), *value[1:]]
    if isinstance(value, float):
        return np.nextafter(value, 9e9, dtype=kind.to_pandas_dtype()).item()
    return not value if isinstance(value, bool) else value + 1


@pytest.mark.parametrize(
    ("kind", "column", "value"),
    [("text", "text", "other"), ("completion", "completion", " other"), ("choices", "choices", [" a", " b", " other"])],
)
def test_another_text_than_the_one_that_was_scored_is_a_difference(tmp_path, model, kind, column, value):
    path = write_scores(tmp_path / "scores.parquet", kind, model)
    changed = rewrite(path, tmp_path, lambda rows: first_ok(rows).update({column: value}))
    (line,) = replay(changed, 100).differences
    assert line.startswith("row 0, sample 0: ")


def test_minus_zero_is_not_zero_and_large_sums_are_compared_by_their_size():
    assert module._same(-0.0, 0.0, exact=False)
    assert not module._same(-0.0, 0.0, exact=True)
    assert module._same(-1000.5, -1000.0, exact=False)
    assert not module._same(-1.5, -1.0, exact=False)
