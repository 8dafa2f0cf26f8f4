"""Arithmetic for kernels whose bits are the same on every processor: fma, exp, log.

IEEE 754 fixes the bits of +, -, *, /, sqrt and fma, but not of exp and log: libraries and instruction sets differ.
Here they are polynomials of these operations. Numba contracts and reorders nothing, so what is written is computed.
"""

import llvmlite.ir as ir
import numpy as np
from numba import types
from numba.extending import intrinsic

from batchgen.gpt2.compiled import inline

F32 = np.float32

# 2**n * exp(r) with |r| <= ln(2)/2; n * LN2_HIGH is exact, as its last bits are zeros
_LOG2_E = F32(1.44269504)
_LN2_HIGH, _LN2_LOW = F32(0.693359375), F32(-2.12194440e-4)
_LN2_HIGH_64, _LN2_LOW_64 = 6.93147180369123816490e-01, 1.90821492927058770002e-10
_SMALLEST, _LARGEST = F32(-87.33654), F32(88.72283)  # below, exp is 0 here (no subnormal results); above, infinity


@intrinsic
def fma(typing_context, x, y, z):
    """x * y + z, rounded once."""
    return x(x, x, x), lambda context, builder, signature, arguments: builder.fma(*arguments)


def _cast(result, argument, kind):
    return result(argument), lambda context, builder, signature, arguments: builder.bitcast(arguments[0], kind)


@intrinsic
def as_float32(typing_context, bits):
    """The float32 of these bits, an int32."""
    return _cast(types.float32, types.int32, ir.FloatType())


@intrinsic
def _as_float64(typing_context, bits):
    return _cast(types.float64, types.int64, ir.DoubleType())


@intrinsic
def bits_of(typing_context, x):
    """The bits of a float32 as int32, or of a float64 as int64."""
    if x == types.float64:
        return _cast(types.int64, x, ir.IntType(64))
    return _cast(types.int32, types.float32, ir.IntType(32))


@inline
def in_order(bits):
    """The bits of a float32 as an integer in the order of the floats; twice, the bits again."""
    return np.int32(bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@inline
def _exp_within(x):
    """exp of a float32 from _SMALLEST to _LARGEST, or of nan."""
    n = np.floor(fma(x, _LOG2_E, F32(0.5)))
    n = n if n == n else F32(0)  # an integer of nan is undefined
    r = fma(-n, _LN2_LOW, fma(-n, _LN2_HIGH, x))
    p = fma(F32(1.9875691500e-4), r, F32(1.3981999507e-3))
    p = fma(p, r, F32(8.3334519073e-3))
    p = fma(p, r, F32(4.1665795894e-2))
    p = fma(p, r, F32(1.6666665459e-1))
    p = fma(p, r, F32(5.0000001201e-1))
    p = fma(p * r, r, r) + F32(1)
    return as_float32(bits_of(p) + (np.int32(n) << np.int32(23)))  # n more in the exponent; 2**128 is no float32


@inline
def exp(x):
    """exp of a float32, within 1.1 units in the last place; 0 below -87.3; nan of nan."""
    p = _exp_within(_SMALLEST if x < _SMALLEST else (_LARGEST if x > _LARGEST else x))
    p = F32(0) if x < _SMALLEST else p
    return F32(np.inf) if x > _LARGEST else p


@inline
def exp_below(x):
    """exp of a float32 that is at most 0, or nan: the same bits in fewer steps."""
    p = _exp_within(_SMALLEST if x < _SMALLEST else x)
    return F32(0) if x < _SMALLEST else p


@inline
def log64(x):
    """log of a positive, normal float64, within 1 unit in the last place.

    x = 2**n * m with sqrt(1/2) <= m < sqrt(2); log m = 2 artanh s, s = (m - 1) / (m + 1) (fdlibm's polynomial).
    """
    bits = bits_of(x) + np.int64(0x3FF0000000000000 - 0x3FE6A09E667F3BCD)
    n = (bits >> np.int64(52)) - np.int64(1023)
    f = _as_float64((bits & np.int64(0x000FFFFFFFFFFFFF)) + np.int64(0x3FE6A09E667F3BCD)) - 1.0
    s = f / (2.0 + f)
    z = s * s
    w = z * z
    odd = w * fma(w, fma(w, 1.531383769920937332e-01, 2.222219843214978396e-01), 3.999999999940941908e-01)
    even = fma(w, fma(w, 1.479819860511658591e-01, 1.818357216161805012e-01), 2.857142874366239149e-01)
    r = z * fma(w, even, 6.666666666666735130e-01) + odd
    half_square = 0.5 * f * f
    k = np.float64(n)
    return k * _LN2_HIGH_64 - ((half_square - (s * (half_square + r) + k * _LN2_LOW_64)) - f)
