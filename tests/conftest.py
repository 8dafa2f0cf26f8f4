"""What holds for all tests: one BLAS thread, as batchgen's workers have, and models from nowhere but the test."""

import signal

import pytest
from threadpoolctl import threadpool_limits

# Started in the background of a shell, this process ignores Ctrl-C, and so would every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


# Workers and clusters are started here, killed, and looked for: one such test after another.
PROCESSES = {"test_cluster", "test_faults", "test_pool", "test_run", "test_worker", "test_cli", "test_benchmarks"}


def pytest_collection_modifyitems(items):
    """With `-n 2 --dist loadgroup` (make test): these first, in one of the two, and all others in the other."""
    for item in items:
        if item.path.stem in PROCESSES:
            item.add_marker(pytest.mark.xdist_group("processes"))
    items.sort(key=lambda item: item.path.stem not in PROCESSES)


@pytest.fixture(autouse=True, scope="session")
def _one_blas_thread():
    with threadpool_limits(1, user_api="blas"):
        yield


@pytest.fixture(autouse=True)
def _no_models_of_the_user(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("BATCHGEN_MIRROR", "http://127.0.0.1:9")  # where nobody answers
    monkeypatch.setenv("BATCHGEN_MODELS", str(tmp_path_factory.getbasetemp() / "models"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
