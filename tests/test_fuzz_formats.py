import os
import subprocess
import sys

import pytest

from tests.fuzz_formats import KINDS
from tests.test_convert import REPOSITORY, needs_tensorflow

N = 300  # of each; with 10,000 it was run once: python -m tests.fuzz_formats KIND


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[needs_tensorflow] * ("bundle" in kind)) for kind in KINDS])
def test_a_damaged_file_is_refused_or_loads_as_it_was(kind: str) -> None:
    """In a process of its own: a crash would take the tests with it."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "tests.fuzz_formats", kind, str(N)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
