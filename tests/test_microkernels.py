"""Tests of batchgen/gpt2/microkernels.py: every shape of a tile gives the same bits."""

from typing import Any

import numba
import numpy as np
import pytest

from batchgen.gpt2 import microkernels
from batchgen.gpt2.microkernels import (
    CONTINUE,
    START,
    Float32,
    Float32Panel,
    Int8,
    Vectors,
    product,
    target_vectors,
)
from batchgen.gpt2.weights import PANEL, to_int8, to_panels

X86 = pytest.mark.skipif(not microkernels._IS_X86, reason="names of x86 processors")
N_ROW, N_IN = 6, 160


def _random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def _float32_tile(width: int, vectors: int, b_bytes: int = 4) -> Any:
    """A function (x, b, c, first, last, mode) that multiplies columns first ... last - 1 of x, one row of c or all."""
    multiply = product(Float32(width, b_bytes), N_ROW, vectors)

    @numba.njit
    def run(x, b, c, first, last, mode):  # type: ignore[no-untyped-def]
        x_0, b_0 = x.ctypes.data + 4 * first, b.ctypes.data + b_bytes * PANEL * first
        multiply(len(x), PANEL, x_0, 4 * N_IN, b_0, b_bytes * PANEL, c.ctypes.data, 4 * PANEL, last - first, mode)

    return run


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    c = np.empty((N_ROW, PANEL), np.float32)
    _float32_tile(1, 1)(_random(N_ROW, N_IN), to_panels(_random(N_IN, PANEL))[0], c, 0, N_IN, START)
    return c


@pytest.mark.parametrize(("width", "vectors"), [(16, 4), (8, 2), (4, 2), (4, 4)])
def test_every_float32_tile_has_the_same_bits(width: int, vectors: int, expected: np.ndarray) -> None:
    run, x, b = _float32_tile(width, vectors), _random(N_ROW, N_IN), to_panels(_random(N_IN, PANEL))[0]
    for n_row in range(1, N_ROW + 1):
        c = np.full((n_row, PANEL), np.nan, np.float32)
        run(x[:n_row], b, c, 0, N_IN, START)
        assert (c == expected[:n_row]).all()


def test_a_chain_continues(expected: np.ndarray) -> None:
    run, x, b = _float32_tile(8, 2), _random(N_ROW, N_IN), to_panels(_random(N_IN, PANEL))[0]
    c = np.empty((N_ROW, PANEL), np.float32)
    run(x, b, c, 0, 50, START)
    run(x, b, c, 50, N_IN, CONTINUE)
    assert (c == expected).all()


@pytest.mark.parametrize(("width", "vectors"), [(16, 4), (8, 2), (4, 2), (4, 4)])
def test_a_chain_of_a_panel_is_added_to_what_is_before_and_to_the_residual(
    width: int, vectors: int, expected: np.ndarray
) -> None:
    multiply = product(Float32Panel(width), N_ROW, vectors)

    @numba.njit
    def run(x, panel, before, residual, bias, c):  # type: ignore[no-untyped-def]
        line, panel_0 = 4 * PANEL, panel.ctypes.data
        extra = before.ctypes.data, line, residual.ctypes.data, line, bias.ctypes.data, panel_0
        multiply(len(x), PANEL, x.ctypes.data, 4 * N_IN, panel_0, line, c.ctypes.data, line, N_IN, extra)

    before, residual, bias = np.split(_random(2 * N_ROW + 1, PANEL), [N_ROW, 2 * N_ROW])
    c = np.empty((N_ROW, PANEL), np.float32)
    run(_random(N_ROW, N_IN), to_panels(_random(N_IN, PANEL))[0], before, residual, bias[0], c)
    assert (c == residual + ((before + expected) + bias)).all()


def test_bfloat16_is_the_float32_of_the_same_value() -> None:
    b = to_panels(_random(N_IN, PANEL))[0]
    halves = (b.view(np.uint32) >> 16).astype(np.uint16)
    found, expected = np.empty((2, N_ROW, PANEL), np.float32)
    _float32_tile(8, 2, b_bytes=2)(_random(N_ROW, N_IN), halves, found, 0, N_IN, START)
    _float32_tile(8, 2)(
        _random(N_ROW, N_IN), (halves.astype(np.uint32) << 16).view(np.float32), expected, 0, N_IN, START
    )
    assert (found == expected).all()


def _int8_tile(width: int, dot: bool) -> Any:
    multiply = product(Int8(width, dot), N_ROW, 64 // width // 2)

    @numba.njit
    def run(u, panel, c, scale, zero, residual, column_scale, column_sum, b):  # type: ignore[no-untyped-def]
        rows = scale.ctypes.data, zero.ctypes.data, residual.ctypes.data, 256
        columns = column_scale.ctypes.data, column_sum.ctypes.data, b.ctypes.data
        u_0, panel_0, n_group = u.ctypes.data, panel.ctypes.data, len(panel)
        multiply(len(u), 64, u_0, u.shape[1], panel_0, 256, c.ctypes.data, 256, n_group, rows + columns + (panel_0,))

    return run


@pytest.mark.parametrize(("width", "dot"), [(16, True), (8, True), (16, False), (8, False), (4, False)])
def test_every_int8_tile_is_exact(width: int, dot: bool) -> None:
    if width > (target_vectors().dot if dot else target_vectors().multiply):
        pytest.skip("this processor has no such instruction")
    rng = np.random.default_rng(0)
    linear = to_int8(_random(80, PANEL), _random(PANEL))
    u = rng.integers(0, 256, (N_ROW, 80), dtype=np.uint8)
    u[0] = 255
    scale, zero = np.linspace(0.1, 1, N_ROW, dtype=np.float32), np.arange(N_ROW, dtype=np.int32) * 50
    exact = (
        u.astype(np.int64) @ linear.panels[0].transpose(0, 2, 1).reshape(80, PANEL) - zero[:, None] * linear.column_sum
    )
    expected = exact.astype(np.float32) * (scale[:, None] * linear.scale) + linear.b
    c, residual = np.empty((N_ROW, PANEL), np.float32), _random(N_ROW, PANEL)
    _int8_tile(width, dot)(u, linear.panels[0], c, scale, zero, residual, linear.scale, linear.column_sum, linear.b)
    assert (c == residual + expected).all()


@X86
@pytest.mark.parametrize(
    ("name", "vectors"),
    [
        ("haswell", (8, 8, 0)),
        ("alderlake", (8, 8, 8)),
        ("skylake-avx512", (16, 16, 0)),
        ("icelake-server", (16, 16, 16)),
        ("znver4", (16, 16, 16)),
        ("sandybridge", (0, 4, 0)),
        ("x86-64-v2", (0, 4, 0)),
    ],
)
def test_the_vectors_of_a_processor_are_what_llvm_selects(name: str, vectors: tuple[int, int, int]) -> None:
    target_vectors()  # which prepares LLVM
    assert microkernels._probe(name, "") == vectors


def test_the_environment_limits_vectors_and_widens_none(monkeypatch: pytest.MonkeyPatch) -> None:
    of_processor = target_vectors()
    monkeypatch.setenv("BATCHGEN_VECTORS", "8,4,0")
    assert target_vectors() == Vectors(min(8, of_processor.fma), 4, 0)
    monkeypatch.setenv("BATCHGEN_VECTORS", "64,64,64")
    assert target_vectors() == of_processor
