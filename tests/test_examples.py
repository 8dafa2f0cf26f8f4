"""examples/: each script runs as its first line says, in a folder of the user's own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from batchgen import EmbedOptions, Job, ScoreInput, WorkOptions, run_job

ROOT = Path(__file__).parents[1]
PROMPTS = ROOT / "data" / "prompts" / "sample.jsonl"
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))


def run_example(name: str, *arguments: object, folder: Path) -> str:
    """What an example prints."""
    command = [sys.executable, ROOT / "examples" / name, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_an_example_is_short_and_begins_with_its_command(script):
    lines = script.read_text(encoding="utf-8").splitlines()
    assert len(lines) < 40
    assert f"python examples/{script.name}" in lines[0]


def test_prompts_in_memory_have_a_line_for_every_sample(tmp_path):
    printed = run_example("generate_in_memory.py", folder=tmp_path).splitlines()
    assert [line.partition(" -> ")[0] for line in printed] == [
        f"{prompt!r}, sample {sample}" for prompt in ("Once upon a time", "The king") for sample in (0, 1)
    ]


def test_a_job_writes_what_duckdb_reads(tmp_path):
    pytest.importorskip("duckdb", reason="duckdb is not installed (pip install '.[dev]')")
    printed = run_example("run_a_job.py", PROMPTS, "completions.parquet", folder=tmp_path)
    assert printed == "completions.parquet: 12 ok, 0 rejected, 0 failed\n"
    read = run_example("read_with_duckdb.py", "completions.parquet", folder=tmp_path).splitlines()
    assert read[0].startswith("ok: 12 rows, ")
    assert read[1].startswith("model tales, max_tokens 16, NumPy ")


def test_nearest_texts_are_found_with_numpy_duckdb_and_polars(tmp_path):
    """The text itself is nearest, and DuckDB and Polars agree on the others."""
    pytest.importorskip("duckdb", reason="duckdb is not installed (pip install '.[dev]')")
    pytest.importorskip("polars", reason="polars is not installed (pip install '.[dev]')")
    texts = [json.loads(line)["prompt"] for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    lines = [json.dumps({"text": text}) for text in [*texts, ""]]
    (tmp_path / "t.jsonl").write_text("\n".join(lines), encoding="utf-8")
    job = Job(ScoreInput(tmp_path / "t.jsonl", task=EmbedOptions()), tmp_path / "e.parquet", work=WorkOptions(jobs=1))
    assert run_job(job).rejected == 1
    with_numpy = run_example("nearest_with_numpy.py", "e.parquet", texts[4], folder=tmp_path).splitlines()
    assert with_numpy[0] == f"1.000 {texts[4]}"
    with_duckdb = run_example("nearest_with_duckdb.py", "e.parquet", 4, folder=tmp_path).splitlines()
    assert with_duckdb[0] == f"0.00 4 {texts[4]}"
    assert len(with_duckdb) == 3
    assert run_example("nearest_with_polars.py", "e.parquet", 4, folder=tmp_path).splitlines() == with_duckdb
