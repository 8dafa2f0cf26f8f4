"""Tests of batchgen/gpt2/kernels.py: errors against float64, and the laws that say what the bits are."""

import math
from fractions import Fraction

import numpy as np
import pytest

from batchgen.errors import ModelError
from batchgen.gpt2 import kernels
from batchgen.gpt2.activations import ACTIVATIONS
from batchgen.gpt2.kernels import ACTIVATE, ADD, STORE
from batchgen.gpt2.weights import MOST_IN, Float32Linear, Int8Linear, round_up, to_int8, to_panels

WIDTHS = [1, 8, 20, 24, 40, 64, 80, 100, 160, 768, 3072]
GELU = ACTIVATE + ACTIVATIONS.index("gelu_new")


def _normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def _quantise(x: np.ndarray, inverse: np.ndarray, offset: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    n_row, n_in = x.shape
    u = np.full((n_row, round_up(n_in, 4)), 255, np.uint8)
    scale, zero = np.empty(n_row, np.float32), np.empty(n_row, np.int32)
    kernels.quantise(x, inverse, offset, u, scale, zero)
    return u, scale, zero


def _linear(x: np.ndarray, linear: Float32Linear | Int8Linear, epilogue: int, out: np.ndarray) -> np.ndarray:
    if isinstance(linear, Float32Linear):
        kernels.linear_float32(x, linear.panels, linear.b, epilogue, out)
    else:
        rows = _quantise(x, linear.inverse, linear.offset)
        weights = linear.panels, linear.scale, linear.column_sum, linear.b
        kernels.linear_int8(*rows, *weights, epilogue, out)
    return out


def _make(precision: str, n_in: int, n_out: int) -> Float32Linear | Int8Linear:
    w, b = _normal(1, n_in, n_out), _normal(2, n_out)
    return to_int8(w, b) if precision == "int8" else Float32Linear(to_panels(w), b)


def _unpacked(linear: Int8Linear) -> np.ndarray:
    """The int8 weights [n_in rounded up, n_panel * PANEL] as int64."""
    n_panel, n_group, n_column, group = linear.panels.shape
    return linear.panels.transpose(1, 3, 0, 2).reshape(n_group * group, n_panel * n_column).astype(np.int64)


@pytest.mark.parametrize("n_in", WIDTHS)
def test_a_float32_product_is_within_rounding_of_float64(n_in: int) -> None:
    x, w, b = _normal(0, 7, n_in), _normal(1, n_in, 100), _normal(2, 100)
    out = _linear(x, Float32Linear(to_panels(w), b), STORE, np.full((7, 100), np.nan, np.float32))
    magnitudes = np.abs(x).astype(np.float64) @ np.abs(w) + np.abs(b)
    assert (np.abs(out - (x.astype(np.float64) @ w + b)) <= 1e-6 * magnitudes).all()


def _fma(x: np.float32, y: np.float32, z: np.float32) -> np.float32:
    """x * y + z, rounded once: by way of float64, with an odd last bit if the exact sum is between two."""
    exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
    near = float(exact)
    if Fraction(near) == exact:
        return np.float32(near)
    other = math.nextafter(near, math.inf if exact > Fraction(near) else -math.inf)
    return np.float32(other if np.float64(other).view(np.int64) & 1 else near)


def test_a_float32_element_is_chains_of_fma_cut_at_256_and_added_in_order() -> None:
    x, w, b = _normal(0, 2, 700), _normal(1, 700, 3), _normal(2, 3)
    out = _linear(x, Float32Linear(to_panels(w), b), STORE, np.empty((2, 3), np.float32))
    for i, j in np.ndindex(2, 3):
        total = None
        for cut in range(0, 700, 256):
            chain = np.float32(0)
            for k in range(cut, min(cut + 256, 700)):
                chain = _fma(x[i, k], w[k, j], chain)
            total = chain if total is None else total + chain
        assert total is not None
        assert out[i, j] == total + b[j]


@pytest.mark.parametrize("n_in", WIDTHS)
def test_an_int8_element_is_an_exact_sum(n_in: int) -> None:
    x, linear = _normal(0, 9, n_in), _make("int8", n_in, 100)
    assert isinstance(linear, Int8Linear)
    u, scale, zero = _quantise(x, linear.inverse, linear.offset)
    exact = u.astype(np.int64) @ _unpacked(linear) - zero[:, None] * linear.column_sum.astype(np.int64)
    expected = exact[:, :100].astype(np.float32) * (scale[:, None] * linear.scale[:100]) + linear.b
    assert (_linear(x, linear, STORE, np.empty((9, 100), np.float32)) == expected).all()


def test_int8_sums_are_exact_up_to_the_widest_input_and_wider_ones_are_refused() -> None:
    w, b, out = np.ones((MOST_IN, 1), np.float32), np.zeros(1, np.float32), np.empty((2, 1), np.float32)
    x = np.stack([w[:, 0], -w[:, 0]])
    np.testing.assert_allclose(_linear(x, to_int8(w, b), STORE, out)[:, 0], [MOST_IN, -MOST_IN], rtol=1e-6)
    with pytest.raises(ModelError, match=f"is {MOST_IN + 1}, int8 computes at most {MOST_IN}; use .*float32"):
        to_int8(np.ones((MOST_IN + 1, 1), np.float32), b)


def test_the_largest_bytes_do_not_saturate() -> None:
    """Pairs of 255 * 127 exceed int16, in which vpmaddubsw adds."""
    linear = to_int8(np.full((3072, 64), -1, np.float32), np.zeros(64, np.float32))
    u, ones = np.full((5, 3072), 255, np.uint8), np.ones(5, np.float32)
    out = np.empty((5, 64), np.float32)
    weights = linear.panels, np.ones(64, np.float32), linear.column_sum, linear.b
    kernels.linear_int8(u, ones, np.zeros(5, np.int32), *weights, STORE, out)
    assert (out == np.float32(-255 * 127 * 3072)).all()


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("n_out", [1, 64, 100])
def test_a_row_does_not_depend_on_the_other_rows(precision: str, n_out: int) -> None:
    x, linear = _normal(0, 201, 300), _make(precision, 300, n_out)
    together = _linear(x, linear, GELU, np.empty((201, n_out), np.float32))
    for rows in ([0], [200], [5, 3], range(7), range(13), range(50, 162), range(200, -1, -1)):
        some = _linear(x[list(rows)], linear, GELU, np.empty((len(rows), n_out), np.float32))
        assert (some == together[list(rows)]).all()


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("n_out", [24, 63, 64, 65, 192])
def test_an_epilogue_follows_the_product_and_no_other_row_is_touched(precision: str, n_out: int) -> None:
    x, linear, before = _normal(0, 8, 40), _make(precision, 40, n_out), _normal(3, 10, n_out)
    product = _linear(x, linear, STORE, np.empty((8, n_out), np.float32))
    added = before.copy()
    _linear(x, linear, ADD, added[:8])
    assert (added[:8] == before[:8] + product).all()
    assert (added[8:] == before[8:]).all()
    for number in range(len(ACTIVATIONS)):
        activated, expected = before.copy(), product.copy().ravel()
        _linear(x, linear, ACTIVATE + number, activated[:8])
        kernels.activate(expected, number)
        assert (activated[:8] == expected.reshape(8, n_out)).all()
        assert (activated[8:] == before[8:]).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("n_out", [64, 100])
def test_a_row_that_is_not_finite_is_nan_in_int8_and_no_other_row_is(bad: float, n_out: int) -> None:
    x, linear = _normal(0, 8, 40), _make("int8", 40, n_out)
    expected = _linear(x, linear, GELU, np.empty((8, n_out), np.float32))
    x[3, 7] = bad
    found = _linear(x, linear, GELU, np.empty((8, n_out), np.float32))
    assert np.isnan(found[3]).all()
    assert (np.delete(found, 3, axis=0) == np.delete(expected, 3, axis=0)).all()


@pytest.mark.parametrize("n_in", WIDTHS)
def test_a_quantised_row_is_within_its_step(n_in: int) -> None:
    x, offset = _normal(0, 6, n_in) * np.float32(3), _normal(2, n_in)
    inverse = np.abs(_normal(1, n_in)) + np.float32(0.1)
    x[1] -= 5
    x[2] = np.abs(x[2])
    u, scale, zero = _quantise(x, inverse, offset)
    smoothed = x * inverse + offset
    ends = np.maximum(smoothed.max(axis=1), 0) - np.minimum(smoothed.min(axis=1), 0)
    np.testing.assert_allclose(scale, ends / 255, rtol=1e-6)
    back = (u[:, :n_in].astype(np.float64) - zero[:, None]) * scale[:, None]
    assert (np.abs(back - smoothed) <= 1.001 * scale[:, None]).all()
    assert (u[:, n_in:] == 0).all()


def test_equal_huge_and_tiny_rows_are_quantised() -> None:
    x = np.array([[0, 0, 0], [7, 7, 7], [-7, -7, -7], [3e38, -3e38, 1e38], [1e-40, -1e-40, 0]], np.float32)
    u, scale, zero = _quantise(x, np.ones(3, np.float32), np.zeros(3, np.float32))
    back = (u[:, :3].astype(np.float64) - zero[:, None]) * scale[:, None]
    assert np.isfinite(scale).all()
    assert (scale > 0).all()
    np.testing.assert_allclose(back[:3], x[:3], rtol=1e-6)
    np.testing.assert_allclose(back[3], x[3], rtol=0, atol=scale[3])
    assert (back[4] == 0).all()


@pytest.mark.parametrize("n_embd", WIDTHS)
def test_layer_norm_is_within_rounding_of_float64(n_embd: int) -> None:
    x, g, b = _normal(0, 5, n_embd) * np.float32(4) + np.float32(9), _normal(1, n_embd), _normal(2, n_embd)
    out, wide = np.empty_like(x), x.astype(np.float64)
    kernels.layer_norm(x, g, b, 1e-5, out)
    centred = wide - wide.mean(axis=1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5) * g + b
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=2e-5 if n_embd > 1 else 1e-3)
    alone = np.empty_like(x[3:4])
    kernels.layer_norm(x[3:4].copy(), g, b, 1e-5, alone)
    assert (alone == out[3:4]).all()
