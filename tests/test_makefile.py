"""Makefile: the name of the output, and what counts as an error of `make run`."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from batchgen.gpt2.machine_code import places_here

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def test_clean_removes_the_machine_code_of_kernels():
    recipe = subprocess.run(["make", "-n", "clean"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert "find batchgen jobs tests benchmarks examples -name __pycache__" in recipe.stdout
    assert places_here()[0] == ROOT / "batchgen/__pycache__/kernels"


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`make run` as if everything were installed."""
    command = ["make", "-o", ".venv/run", "run", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("a/b.jsonl", "b"),
        ("b.jsonl.gz", "b"),
        ("b.csv.zst", "b"),
        ("a/folder/", "folder"),
        ("data/*.jsonl", "data"),
        ("a/data/part-[0-9]?.csv", "data"),
        ("a/data/**/*.parquet", "data"),
        ("*.jsonl", "prompts"),
        (".", "prompts"),
    ],
)
def test_an_output_has_the_name_of_its_input_and_never_that_of_a_glob(given, name):
    (found,) = re.findall(r'--output "(.*?)"', make("-n", f"INPUT={given}").stdout)
    assert found == f"{name}.completions.parquet"


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (3, 0), (1, 2), (2, 2), (75, 2)])
def test_rows_that_failed_are_a_line_and_not_an_error_of_make(tmp_path, code, expected):
    (tmp_path / "batchgen").write_text(f"#!/bin/sh\nexit {code}\n")
    os.chmod(tmp_path / "batchgen", 0o755)
    done = make(f"BIN={tmp_path}")
    assert done.returncode == expected
    assert ("Some rows are rejected or failed" in done.stderr) == (code == 3)
