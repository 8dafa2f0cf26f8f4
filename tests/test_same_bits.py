"""A row has the same bits under every processor, tile and batch. tests/same_bits.py, run by hand, compares more."""

import platform
from pathlib import Path

import pytest

from tests.same_bits import NO_NUMPY, ONLY, TARGETS, WIDTHS, differences, is_possible, run_target

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the targets are x86's"),
]

PROMPTS = ("--prompts", "24")


@pytest.fixture(scope="module")
def native(tmp_path_factory) -> dict[str, dict[str, str]]:
    return run_target({}, tmp_path_factory.mktemp("native"), *PROMPTS)


def test_both_precisions_are_compared_for_every_width_of_a_head(native):
    assert len(native) == 2 * len(WIDTHS)
    for columns in native.values():
        assert {"completion", "top_logprobs", "prompt_top_logprobs", "finish_reason"} <= columns.keys()
    completions = {columns["completion"] for columns in native.values()}
    assert len(completions) > len(WIDTHS)  # the models say different things


@pytest.mark.parametrize(
    "settings",
    [
        TARGETS["skylake-avx512"],
        TARGETS["haswell"] | NO_NUMPY,
        {"NUMBA_CPU_NAME": "generic", "NUMBA_OPT": "0", **ONLY},
    ],
    ids=["AVX-512 without VNNI", "AVX2, and NumPy without vectors", "SSE without FMA"],
)
def test_a_whole_job_has_the_same_bits_for_another_processor(native, tmp_path: Path, settings):
    if not is_possible(settings):
        pytest.skip("this machine has not its instructions")
    is_slow = settings["NUMBA_CPU_NAME"] == "generic"
    found = run_target(settings, tmp_path, *PROMPTS, *(("--widths", "20,8") if is_slow else ()))
    assert found
    assert not list(differences({"native": native, "other": found}))
