"""examples/: each script runs as its first line says, in a folder of the user's own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
