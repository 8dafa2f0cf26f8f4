"""What holds for all tests: errors name flags, and models come from nowhere but the test."""

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# pico.py multiplies with NumPy: two processes of tests with two BLAS threads each would take turns.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy is loaded

from batchgen.job import FLAGS
from batchgen.options import flags_in_use, use_flags

# No test asserts on time: a busy machine is no fault.
settings.register_profile("any machine", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

# Started in the background of a shell, this process ignores Ctrl-C, and so would every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


# The modules that take longest, longest first: one that begins last would leave a core idle at the end.
LONGEST = [
    "test_cluster",
    "test_faults",
    "test_documented",
    "test_pool",
    "test_run",
    "test_store",
    "test_same_bits",
    "test_convert",
    "test_golden",
    "test_benchmarks",
    "test_cli",
    "test_finished",
    "test_engine",
]


def pytest_collection_modifyitems(items):
    """The order in which `-n 2 --dist loadfile --no-loadscope-reorder` (make test) gives modules to its processes."""
    rank = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture(autouse=True, scope="session")
def _errors_name_flags():
    """As at a command line; for the whole session, so that rows of module fixtures have the same errors."""
    use_flags(FLAGS)


@pytest.fixture(autouse=True)
def _flags_are_restored():
    before = flags_in_use()
    yield
    use_flags(before)


@pytest.fixture
def python_names():
    """Errors of this test name options as in Python; `_flags_are_restored` undoes it."""
    use_flags({})


@pytest.fixture(autouse=True)
def _no_models_of_the_user(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("BATCHGEN_MIRROR", "http://127.0.0.1:9")  # where nobody answers
    monkeypatch.setenv("BATCHGEN_MODELS", str(tmp_path_factory.getbasetemp() / "models"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def store_server() -> Iterator[Any]:
    """A local S3, with what a test sees and does in tests/support/store_server.py."""
    pytest.importorskip("moto.server", reason="moto[server] is not installed (pip install '.[dev]')")
    pytest.importorskip("obstore", reason="obstore is not installed (pip install '.[store]')")
    from tests.support.store_server import serving

    with serving() as proxy:
        yield proxy
