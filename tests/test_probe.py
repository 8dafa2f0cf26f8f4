"""engine/probe.py: the answer for kernels that are known."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from batchgen.engine.probe import blas_info, numpy_kernels
from tests.support.models import has_avx512

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(("core_type", "invariant"), [("SKYLAKEX", True), ("HASWELL", False)])
def test_avx512_kernels_are_batch_invariant_and_avx2_kernels_are_not(core_type, invariant):
    if core_type == "SKYLAKEX" and not has_avx512():
        pytest.skip("this processor has no AVX-512")
    if blas_info().name != "openblas":
        pytest.skip(f"NumPy here uses {blas_info().name}, which has no OPENBLAS_CORETYPE")
    code = (
        "from batchgen.engine.probe import *; from tests.support.models import *;"
        "print(blas_info().core_type, is_batch_invariant(sharp_params(TINY), TINY))"
    )
    settings = {"OPENBLAS_CORETYPE": core_type, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found, answer = done.stdout.split()
    assert found.upper() == core_type
    assert answer == str(invariant)


def test_instruction_sets_that_numpy_may_not_use_are_another_plan():
    if not has_avx512():
        pytest.skip("this processor has no AVX-512")
    code = "from batchgen.engine.probe import numpy_kernels; print(numpy_kernels())"
    name = "X86_V4" if "X86_V4" in numpy_kernels() else "AVX512F"
    settings = {"NPY_DISABLE_CPU_FEATURES": name, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() not in ("", numpy_kernels())
