"""Tests of batchgen/gpt2/portable.py: exp and log against NumPy in higher precision."""

import numpy as np

from batchgen.gpt2.compiled import kernel
from batchgen.gpt2.portable import bits_of, exp, fma, log64


@kernel("void(f4[::1], f4[::1])")
def _exp(x, out):
    for i in range(x.size):
        out[i] = exp(x[i])


@kernel("void(f8[::1], f8[::1])")
def _log64(x, out):
    for i in range(x.size):
        out[i] = log64(x[i])


@kernel("f4(f4, f4, f4)")
def _fma(x, y, z):
    return fma(x, y, z)


@kernel("i4(f4)")
def _bits(x):
    return bits_of(x)


def apply(function, x):
    out = np.empty_like(x)
    function(x, out)
    return out


def ulps(found, expected):
    """The largest error in units in the last place of `found`'s type."""
    return float(np.max(np.abs(found - expected) / np.spacing(np.abs(expected).astype(found.dtype))))


def test_exp_of_float32():
    x = np.concatenate([np.linspace(-87.3, 88.7, 200_001), np.linspace(-1, 1, 100_001)]).astype(np.float32)
    assert ulps(apply(_exp, x), np.exp(x.astype(np.float64))) < 1.1


def test_log_of_float64():
    rng = np.random.default_rng(0)
    x = np.concatenate([np.exp(rng.uniform(-700, 700, 200_001)), rng.uniform(0.5, 2, 100_001), [1.0, 2.0, 0.5]])
    assert ulps(apply(_log64, x), np.log(x.astype(np.longdouble))) < 1.01


def test_exp_of_what_has_no_finite_exp():
    x = np.array([-np.inf, -1e30, 0, 1e30, np.inf, np.nan], np.float32)
    np.testing.assert_array_equal(apply(_exp, x), np.array([0, 0, 1, np.inf, np.inf, np.nan], np.float32))


def test_fma_rounds_once():
    x = np.float32(1 + 2**-23)
    assert _fma(x, x, np.float32(-1 - 2**-22)) == np.float32(2**-46)


def test_bits():
    assert _bits(np.float32(1)) == 0x3F800000
