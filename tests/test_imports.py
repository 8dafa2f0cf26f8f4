"""The modules that a command loads: generate needs neither TensorFlow nor requests, and the engine only NumPy."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.models import write_byte_model

ROOT = Path(__file__).parents[1]
LOADED = "import json, sys; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"


def loaded_by(script: str, *arguments: object) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded after the script."""
    command = [sys.executable, "-c", f"{script}\n{LOADED}", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_generating_loads_neither_tensorflow_nor_requests(tmp_path):
    model = write_byte_model(tmp_path / "bytes")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    script = """
import sys
from batchgen.jobs.cli import app
try:
    app(["generate", sys.argv[1], "-o", sys.argv[2], "--model", sys.argv[3], "--max-tokens", "2"])
except SystemExit as end:
    assert end.code == 0, end.code
"""
    loaded = loaded_by(script, tmp_path / "p.jsonl", tmp_path / "out.parquet", model)
    assert (tmp_path / "out.parquet").exists()
    assert {"batchgen", "numpy", "pyarrow", "joblib"} <= loaded
    assert not loaded & {
        "tensorflow",
        "requests",
        "urllib3",
        "torch",
        "hypothesis",
        "pytest",
        "dask",
        "distributed",
        "ray",
    }


@pytest.mark.parametrize("module", ["batchgen.engine.engine", "batchgen.gpt2.forward", "batchgen.gpt2.pico"])
def test_the_engine_loads_numpy_alone(module):
    loaded = loaded_by(f"import {module}")
    assert "numpy" in loaded
    assert not loaded & {"joblib", "pyarrow", "regex", "requests", "rich", "tensorflow", "typer"}


def test_what_computes_nothing_does_not_load_the_compiler():
    script = """
from batchgen.jobs.cli import app
for words in (["--help"], ["generate", "--help"], ["models"]):
    app(words, standalone_mode=False)
"""
    assert not loaded_by(script) & {"numba", "llvmlite"}


def test_the_records_load_nothing_but_python():
    loaded = loaded_by("import batchgen.job, batchgen.plan, batchgen.progress, batchgen.files, batchgen.errors")
    assert not loaded & {"numpy", "joblib", "pyarrow", "regex", "requests", "tensorflow", "typer"}
