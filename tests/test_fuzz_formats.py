import os
import subprocess
import sys

from tests.support.fuzz_formats import KINDS
from tests.test_convert import REPOSITORY, needs_tensorflow

N = 300  # of each; for more: python -m tests.support.fuzz_formats
OF_TENSORFLOW = [kind for kind in KINDS if kind.startswith("bundle")]


def test_a_damaged_file_is_refused_or_loads_as_before() -> None:
    fuzz_in_a_process(*(kind for kind in KINDS if kind not in OF_TENSORFLOW))


@needs_tensorflow
def test_a_damaged_checkpoint_is_refused_or_loads_as_before() -> None:
    fuzz_in_a_process(*OF_TENSORFLOW)


def fuzz_in_a_process(*kinds: str) -> None:
    """A crash must not end the process of the tests."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "tests.support.fuzz_formats", str(N), *kinds]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("loaded as before") == len(kinds)
