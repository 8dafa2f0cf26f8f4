"""Products with panels of weights, layer norm, activations, and the rows of int8 products.

The laws: a float32 element is chains of fma over k, cut at every CUT-th k, the chains added in order, then + b; an int8
element is float32(sum - zero * column_sum) * (scale * column_scale) + b, the sum an exact int32. Rows never meet: a
row's bits depend on nothing but itself and the weights.
"""

import numpy as np

from batchgen.gpt2.activations import ACTIVATIONS
from batchgen.gpt2.amx import amx_product
from batchgen.gpt2.compiled import inline, kernel
from batchgen.gpt2.machine_code import uses_amx
from batchgen.gpt2.microkernels import LINE, address, float32_product, int8_product
from batchgen.gpt2.portable import as_float32, bits_of, exp, fma, in_order
from batchgen.gpt2.weights import GROUP, PANEL

STORE, ADD, ACTIVATE = 0, 1, 2  # epilogue: out = x@w+b; out += x@w+b; ACTIVATE + number of an activation: of x@w+b
CUT = 256  # of k: shorter chains round less; 256 rows of a panel are 64 KiB
BLOCK = 96  # rows that share a read of such a piece: [BLOCK, PANEL] results stay in the first cache
LANES = 64  # sums of a row go by columns modulo LANES, then in pairs

F32, I32 = np.float32, np.int32
_INFINITY = I32(0x7F800000)  # its bits
NOTHING = F32(-0.0)  # which added to a float changes no bit of it

_multiply_float32, _FLOAT32_ROWS = float32_product()
_multiply_int8, _INT8_ROWS = amx_product() if uses_amx() else int8_product()


@inline
def _times_sigmoid(x, negative_exponent):
    return x / (F32(1) + exp(negative_exponent))


@inline
def _gelu_tanh(x):
    """x * sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x**3): 0.5 (1 + tanh u) = 1 / (1 + exp(-2u)) (Hendrycks, 2016)."""
    cubic, linear = F32(-2 * 0.7978845608028654 * 0.044715), F32(-2 * 0.7978845608028654)
    return _times_sigmoid(x, fma(x * x, cubic, linear) * x)


@inline
def _gelu_erf(x):
    """x * P(X <= x) for a standard normal X, rearranged: max(x, 0) - |x| P(X > |x|).

    P(X > a) = erfc(a / sqrt(2)) / 2 = t (c1 + t (c2 + ...)) exp(-a**2 / 2) / 2 with t = 1 / (1 + p a), within 8e-8:
    Abramowitz and Stegun, 7.1.26.
    """
    a = abs(x)
    t = F32(1) / fma(a, F32(0.3275911 / 2**0.5), F32(1))
    tail = fma(t, F32(1.061405429 / 2), F32(-1.453152027 / 2))
    tail = fma(t, tail, F32(1.421413741 / 2))
    tail = fma(t, tail, F32(-0.284496736 / 2))
    tail = fma(t, tail, F32(0.254829592 / 2)) * t
    return _relu(x) - a * tail * exp(F32(-0.5) * a * a)


@inline
def _relu(x):
    return F32(0) if x < F32(0) else x  # nan stays


@inline
def _tanh(x):
    """1 - 2 / (exp(2a) + 1) with x's sign; a polynomial (Cephes) where that cancels."""
    a = abs(x)
    z = x * x
    p = fma(F32(-5.70498872745e-3), z, F32(2.06390887954e-2))
    p = fma(p, z, F32(-5.37397155531e-2))
    p = fma(p, z, F32(1.33314422036e-1))
    p = fma(p, z, F32(-3.33332819422e-1))
    large = F32(1) - F32(2) / (exp(F32(2) * a) + F32(1))
    large = -large if x < F32(0) else large
    return fma(p * z, x, x) if a < F32(0.625) else large


@kernel("void(f4[::1], i8)")
def activate(x, number):
    """x -> activation(x) in place, by its number in ACTIVATIONS."""
    if number == 0:
        for i in range(x.size):
            x[i] = _gelu_tanh(x[i])
    elif number == 1:
        for i in range(x.size):
            x[i] = _gelu_erf(x[i])
    elif number == 2:
        for i in range(x.size):
            x[i] = _times_sigmoid(x[i], F32(-1.702) * x[i])
    elif number == 3:
        for i in range(x.size):
            x[i] = _times_sigmoid(x[i], -x[i])
    elif number == 4:
        for i in range(x.size):
            x[i] = _relu(x[i])
    elif number == 5:
        for i in range(x.size):
            x[i] = _relu(x[i]) * _relu(x[i])
    elif number == 6:
        for i in range(x.size):
            x[i] = _tanh(x[i])


assert len(ACTIVATIONS) == 7  # as many as activate has


@inline
def _places(out, row, column, c, nothing, epilogue):
    """Where a panel's tiles go, and what is added to them: addresses, and bytes from a row to the next.

    A panel that goes past the last column is collected in c [BLOCK, PANEL], and `_finish_block` takes it from there.
    """
    if out.shape[1] - column < PANEL:
        return address(c), 4 * PANEL, nothing, 0
    end, step = address(out) + 4 * (row * out.shape[1] + column), 4 * out.shape[1]
    return (end, step, end, step) if epilogue == ADD else (end, step, nothing, 0)


@kernel("void(f4[:, ::1], i8, f4[:, ::1], i8, i8, i8)")
def _finish_block(c, n_row, out, row, column, epilogue):
    """Take n_row rows of an incomplete panel from c [BLOCK, PANEL] to out at (row, column), and activate any panel."""
    n_column = min(PANEL, out.shape[1] - column)
    if n_column < PANEL:
        for i in range(n_row):
            for j in range(n_column):
                out[row + i, column + j] = out[row + i, column + j] + c[i, j] if epilogue == ADD else c[i, j]
    if epilogue >= ACTIVATE:
        for i in range(row, row + n_row):
            activate(out[i, column : column + n_column], epilogue - ACTIVATE)


@kernel("void(f4[:, ::1], Array(f4, 3, 'C', readonly=True), Array(f4, 1, 'C', readonly=True), i8, f4[:, ::1])")
def linear_float32(x, panels, b, epilogue, out):
    """x [n_row, n_in], panels [n_panel, n_in, PANEL], b [n_out] -> out [n_row, n_out]."""
    n_row, n_in = x.shape
    n_out, line = out.shape[1], 4 * PANEL
    c, b_p, nothing = np.empty((BLOCK, PANEL), np.float32), np.zeros(PANEL, np.float32), np.full(PANEL, NOTHING)
    x_0, panels_0, c_0, nothing_0 = address(x), address(panels), address(c), address(nothing)
    for p in range(panels.shape[0]):
        n_column = min(PANEL, n_out - p * PANEL)
        b_p[:n_column] = b[p * PANEL : p * PANEL + n_column]
        for row in range(0, n_row, BLOCK):
            n = min(BLOCK, n_row - row)
            for k in range(0, n_in, CUT):
                n_k = min(CUT, n_in - k)
                piece = panels_0 + line * (p * n_in + k)
                before, before_step = (c_0, line) if k else (nothing_0, 0)
                end, end_step, bias, residual, residual_step = c_0, line, nothing_0, nothing_0, 0
                if k + n_k == n_in:
                    bias = address(b_p)
                    end, end_step, residual, residual_step = _places(out, row, p * PANEL, c, nothing_0, epilogue)
                i, ahead = 0, piece + (line * n_k if n > _FLOAT32_ROWS else 0)  # one tile reads from front to back
                for tiles in range(-(-n // _FLOAT32_ROWS), 0, -1):
                    m = -(-(n - i) // tiles)  # rows of a tile: as equal as can be
                    of_rows = before + i * before_step, before_step, residual + i * residual_step, residual_step
                    x_i = x_0 + 4 * ((row + i) * n_in + k)
                    end_i, rest = end + i * end_step, (*of_rows, bias, ahead)
                    _multiply_float32(m, PANEL, x_i, 4 * n_in, piece, line, end_i, end_step, n_k, rest)
                    i, ahead = i + m, ahead + LINE * n_k
            _finish_block(c, n, out, row, p * PANEL, epilogue)


@kernel(
    "void(u1[:, ::1], f4[::1], i4[::1], Array(i1, 4, 'C', readonly=True), Array(f4, 1, 'C', readonly=True),"
    " Array(i4, 1, 'C', readonly=True), Array(f4, 1, 'C', readonly=True), i8, f4[:, ::1])"
)
def linear_int8(u, scale, zero, panels, column_scale, column_sum, b, epilogue, out):
    """quantise's u [n_row, n_group * GROUP], scale and zero [n_row]; panels [n_panel, n_group, PANEL, GROUP] -> out."""
    n_row, n_in = u.shape
    n_out, line = out.shape[1], 4 * PANEL
    c, b_p, nothing = np.empty((BLOCK, PANEL), np.float32), np.zeros(PANEL, np.float32), np.full(PANEL, NOTHING)
    u_0, scale_0, zero_0, nothing_0 = address(u), address(scale), address(zero), address(nothing)
    for p in range(panels.shape[0]):
        n_column = min(PANEL, n_out - p * PANEL)
        b_p[:n_column] = b[p * PANEL : p * PANEL + n_column]
        panel = address(panels) + p * n_in * PANEL
        columns = address(column_scale) + line * p, address(column_sum) + line * p, address(b_p)
        for row in range(0, n_row, BLOCK):
            end, end_step, residual, residual_step = _places(out, row, p * PANEL, c, nothing_0, epilogue)
            n, i = min(BLOCK, n_row - row), 0
            ahead = panel + (n_in * PANEL if n > _INT8_ROWS else 0)
            for tiles in range(-(-n // _INT8_ROWS), 0, -1):
                m = -(-(n - i) // tiles)
                rows = scale_0 + 4 * (row + i), zero_0 + 4 * (row + i), residual + i * residual_step, residual_step
                u_i, end_i = u_0 + (row + i) * n_in, end + i * end_step
                rest = rows + columns + (ahead,)
                _multiply_int8(m, PANEL, u_i, n_in, panel, PANEL * GROUP, end_i, end_step, n_in // GROUP, rest)
                i, ahead = i + m, ahead + n_in // GROUP * LINE
            _finish_block(c, n, out, row, p * PANEL, epilogue)


@inline
def _round(x):
    """The nearest int32 of |x| < 2**22, ties to even; no conversion of a float, which is undefined for some."""
    return I32(bits_of(x + F32(12582912)) - I32(0x4B400000))  # without it, an int64, in vectors of half as many


@kernel(
    "void(f4[:, ::1], Array(f4, 1, 'C', readonly=True), Array(f4, 1, 'C', readonly=True), u1[:, ::1], f4[::1], i4[::1])"
)
def quantise(x, inverse, offset, u, scale, zero):
    """Round each row of y = x * inverse + offset to bytes: y is about scale * (u - zero). An inf or nan: scale is nan.

    x [n_row, n_in], inverse and offset [n_in], u [n_row, n_in rounded up to GROUP], scale, zero [n_row].
    """
    n_row, n_in = x.shape
    for i in range(n_row):
        low, high = I32(0), I32(0)  # of 0 and the row, as integers in the order of the floats
        for k in range(n_in):
            ordered = in_order(bits_of(fma(x[i, k], inverse[k], offset[k])))
            low, high = min(low, ordered), max(high, ordered)
        u[i] = 0
        scale[i], zero[i] = F32(np.nan), 0
        if high < _INFINITY and low > -_INFINITY - 1:
            smallest, largest = as_float32(in_order(low)), as_float32(high)
            step = largest / F32(255) - smallest / F32(255)  # their difference may overflow
            step = step if step > F32(1e-36) else F32(1)  # so small a row is zeros
            reciprocal = F32(1) / step
            middle = _round(-smallest * reciprocal)
            scale[i], zero[i] = step, middle
            for k in range(n_in):
                byte = I32(_round(fma(x[i, k], inverse[k], offset[k]) * reciprocal) + middle)
                u[i, k] = min(max(byte, I32(0)), I32(255))


@inline
def _sum_lanes(lanes):
    """The sum of LANES numbers, by halves; overwrites them."""
    n = LANES
    while n > 1:
        n //= 2
        for j in range(n):
            lanes[j] += lanes[n + j]
    return lanes[0]


@kernel("void(f4[:, ::1], Array(f4, 1, 'C', readonly=True), Array(f4, 1, 'C', readonly=True), f4, f4[:, ::1])")
def layer_norm(x, g, b, eps, out):
    """(x - mean) / sqrt(variance + eps) * g + b for each row; x and out [n_row, n_embd], g and b [n_embd]."""
    n_row, n = x.shape
    lanes = np.empty(LANES, np.float32)
    whole = n - n % LANES
    for i in range(n_row):
        row = x[i]
        lanes[:] = 0
        for k in range(0, whole, LANES):
            for j in range(LANES):
                lanes[j] += row[k + j]
        for k in range(whole, n):
            lanes[k - whole] += row[k]
        mean = _sum_lanes(lanes) / F32(n)
        lanes[:] = 0
        for k in range(0, whole, LANES):
            for j in range(LANES):
                lanes[j] = fma(row[k + j] - mean, row[k + j] - mean, lanes[j])
        for k in range(whole, n):
            lanes[k - whole] = fma(row[k] - mean, row[k] - mean, lanes[k - whole])
        factor = F32(1) / np.sqrt(_sum_lanes(lanes) / F32(n) + eps)
        for k in range(n):
            out[i, k] = fma((row[k] - mean) * factor, g[k], b[k])
