"""The fault suite (make faults) with few repetitions: after each fault, the promises of docs/faults.md hold."""

import sys
from pathlib import Path

import pytest

from tests.faults.bench import Bench, Skipped
from tests.faults.matrix import CASES, Case

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc"),
]


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    return Bench(Path(tmp_path_factory.mktemp("faults")), full=False)


@pytest.mark.parametrize("case", [case for case in CASES if case.quick], ids=lambda case: case.name)
def test_a_fault_ends_as_promised(bench: Bench, case: Case) -> None:
    try:
        assert case.cause(bench)
    except Skipped as reason:
        pytest.skip(f"{case.name}: {reason}")
