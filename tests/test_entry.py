"""entry.py, pool.py: a file of the current folder is not a library, and a process that cannot start says why."""

import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from batchgen.errors import BatchgenError
from batchgen.run import run_job
from batchgen.workers import pool
from tests.support.jobs import make_job
from tests.support.models import write_byte_model

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[1]
SCRIPT = "import sys; from batchgen.jobs.entry import main; main()"


def batchgen(*command: object, python_path: str = str(ROOT), cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": python_path}
    return subprocess.run(list(map(str, command)), env=environment, cwd=cwd, capture_output=True, text=True)


@pytest.fixture
def here(tmp_path) -> Path:
    """A folder with a prompt, and with files that have the names of libraries."""
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "p.jsonl").write_text('{"prompt": "Once"}\n')
    for name in ("numpy", "regex", "random", "types", "joblib"):
        (folder / f"{name}.py").write_text("raise RuntimeError('a file of the user')\n")
    write_byte_model(tmp_path / "bytes")
    return folder


def test_a_file_of_the_current_folder_is_no_library_for_a_run_and_its_workers(here):
    script = here.parent / "batchgen"  # as pip installs it
    script.write_text(SCRIPT)
    done = batchgen(sys.executable, script, "generate", "p.jsonl", "-o", "o.parquet", "--model", "../bytes", cwd=here)
    assert (done.returncode, done.stderr) == (0, "")


def test_python_m_batchgen_looks_for_no_library_in_the_current_folder(here):
    (here / "types.py").unlink()  # python -m itself imports this one
    done = batchgen(sys.executable, "-m", "batchgen", "--version", cwd=here)
    assert done.stdout.startswith("batchgen ")


def test_a_file_that_hides_a_library_is_named_in_one_line(here):
    (here / "types.py").unlink()
    (here / "random.py").unlink()
    script = here.parent / "batchgen"
    script.write_text(SCRIPT)
    done = batchgen(sys.executable, script, "--version", python_path=f"{here}:{ROOT}", cwd=here)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith(f"batchgen: {here}/")
    assert "is imported instead of the library of its name (a file of the user); rename it" in line


def test_a_worker_that_cannot_start_says_why(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho \"ModuleNotFoundError: No module named 'numpy'\" >&2\nexit 1\n")
    python.chmod(0o755)
    (tmp_path / "p.jsonl").write_text('{"prompt": "Once"}\n')
    job = make_job(tmp_path / "p.jsonl", tmp_path / "o.parquet", write_byte_model(tmp_path / "bytes"), jobs=1)
    monkeypatch.setattr(pool, "_idle", defaultdict(list))  # no worker of a run before
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(BatchgenError, match="cannot start: ModuleNotFoundError: No module named 'numpy'"):
        run_job(job)


def test_a_variable_that_keeps_a_library_from_its_import_is_named_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("LOKY_MAX_DEPTH", "abc")
    done = batchgen(sys.executable, "-m", "batchgen", "--version", cwd=tmp_path)
    [line] = done.stderr.splitlines()
    assert line.startswith('batchgen: cannot be imported: ValueError("invalid literal')
    assert "LOKY_MAX_DEPTH" in line
