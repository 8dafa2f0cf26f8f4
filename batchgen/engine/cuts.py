"""The samplers that look at more than the order of tokens, compiled: top_n_sigma, typical_p, XTC.

Its bits are the same on every processor: sums are float64, in the order that is written here. A token that is cut out
has the logit -inf and the weight 0. At least one token is always left.
"""

import numpy as np

from batchgen.engine.draw import INFINITY, LANES, LOWEST
from batchgen.gpt2.compiled import inline, kernel
from batchgen.gpt2.portable import as_float32, bits_of

F32, F64, I32, I64 = np.float32, np.float64, np.int32, np.int64

PASSES = 3  # halvings of the range of a bound, after which what is outside of it is removed


@inline
def _sum(lanes):
    total = 0.0
    for lane in range(LANES):
        total += lanes[lane]
    return total


@kernel("void(f4[::1], f4, f8)")
def cut_below_sigmas(row, largest, n_sigma):
    """Keep the logits [n] of at least `largest` - n_sigma standard deviations of all finite ones.

    A nan, which is LOWEST here, is not finite. The largest is one of them, so the difference of the mean square and the
    squared mean loses no more than log2(n) bits.
    """
    if not LOWEST < largest < F32(np.inf):
        return
    n, sums, squares = I32(0), np.zeros(LANES), np.zeros(LANES)
    for i in range(row.size):
        n = I32(n + I32(row[i] > LOWEST))
    for start in range(0, row.size, LANES):
        part = row[start : start + LANES]
        for lane in range(part.size):
            depth = F64(part[lane]) - F64(largest)
            depth = depth if part[lane] > LOWEST else 0.0
            sums[lane] += depth
            squares[lane] += depth * depth
    mean = _sum(sums) / n
    bound = F64(largest) - n_sigma * np.sqrt(max(_sum(squares) / n - mean * mean, 0.0))
    for i in range(row.size):
        row[i] = row[i] if F64(row[i]) >= bound else F32(-np.inf)


@inline
def _mass(distances, weights, bound, sums):
    """The sum of the weights up to a distance."""
    sums[:] = 0.0
    for start in range(0, weights.size, LANES):
        for lane in range(LANES):
            sums[lane] += F64(weights[start + lane] if distances[start + lane] <= bound else F32(0))
    return _sum(sums)


@inline
def _ends(distances):
    """The smallest and the largest finite one; a float32 above 0 sorts like the integer of its bits."""
    low, high = INFINITY, I32(0)
    for i in range(distances.size):
        bits = bits_of(distances[i])
        low = min(low, bits)
        high = max(high, bits if bits < INFINITY else I32(0))
    return as_float32(I32(low)), as_float32(I32(high))


@inline
def _pack(distances, weights, low, high):
    """Move those with a distance above `low`, up to `high`, to the front; returns how many, padded to LANES."""
    n = 0
    for i in range(weights.size):
        distance, weight = distances[i], weights[i]
        distances[n], weights[n] = distance, weight
        n += I64((distance > low) & (distance <= high))
    end = -(-n // LANES) * LANES
    distances[n:end], weights[n:end] = F32(np.inf), F32(0)
    return end


@inline
def _find_bound(distances, weights, needed):
    """The smallest distance up to which the weights are `needed`. Lengths are multiples of LANES; overwrites both."""
    n, left_out, sums = weights.size, 0.0, np.empty(LANES)
    first, high = _ends(distances)
    while first < high:
        low, below = F32(-1), 0.0  # of the bound; the weights up to it
        for _ in range(PASSES):
            middle = max(first, low) + (high - max(first, low)) * F32(0.5)
            middle = middle if middle < high else max(first, low)
            mass = _mass(distances[:n], weights[:n], middle, sums)
            if left_out + mass >= needed:
                high = middle
            else:
                low, below = middle, mass
        n = _pack(distances[:n], weights[:n], low, high)
        left_out += below
        first, high = _ends(distances[:n])
    return high


@inline
def _depth(logit, largest, inverse_temperature):
    """How far below the largest; 0 for an infinite one that is the largest."""
    depth = (largest - logit) * inverse_temperature
    return F32(0) if logit == largest else depth


@inline
def _mean_depth(depths, weights):
    """The sum of the weights [n], and their mean of the depths; n is a multiple of LANES."""
    totals, products = np.zeros(LANES), np.zeros(LANES)
    for start in range(0, weights.size, LANES):
        for lane in range(LANES):
            totals[lane] += F64(weights[start + lane])
        for lane in range(LANES):
            products[lane] += F64(weights[start + lane] * depths[start + lane])
    total = _sum(totals)
    return total, F32(_sum(products) / total)


@kernel("f4(f4[::1], f4[::1], f4, f4, f8, f4[:, ::1])")
def cut_atypical(row, weights, largest, inverse_temperature, typical_p, buffers):
    """Keep the tokens whose surprise is nearest to its mean, the entropy, until they make up typical_p.

    Also keeps all that are as near as the last of them. A surprise is the depth below the largest logit plus the same
    number for all tokens, so depths replace it. Returns the largest weight that is kept. Overwrites buffers [2, n].
    """
    n = row.size
    end = -(-n // LANES) * LANES
    distances, rest = buffers[0, :end], buffers[1, :end]
    for i in range(n):
        weight, depth = weights[i], _depth(row[i], largest, inverse_temperature)
        distances[i], rest[i] = depth if weight > F32(0) else F32(0), weight
    distances[n:], rest[n:] = F32(0), F32(0)
    total, mean = _mean_depth(distances, rest)
    for i in range(end):
        distance = abs(distances[i] - mean)
        distances[i] = distance if rest[i] > F32(0) else F32(np.inf)
    bound = _find_bound(distances, rest, typical_p * total)
    for i in range(n):
        logit, weight = row[i], weights[i]
        is_kept = abs(_depth(logit, largest, inverse_temperature) - mean) <= bound
        weights[i], row[i] = weight if is_kept else F32(0), logit if is_kept else F32(-np.inf)
    most = I32(0)
    for i in range(n):
        most = max(most, bits_of(weights[i]))
    return as_float32(I32(most))


@kernel("void(f4[::1], f8)")
def cut_top(weights, needed):
    """XTC: of the weights [n] that are `needed` or more keep one, the smallest, of equal ones the last."""
    least, last = INFINITY, I32(-1)
    for i in range(weights.size):
        is_top = (F64(weights[i]) >= needed) & (weights[i] > F32(0))
        least = min(least, bits_of(weights[i]) if is_top else INFINITY)
    for i in range(weights.size):
        last = max(last, I32(i) if bits_of(weights[i]) == least else I32(-1))
    for i in range(weights.size):
        weights[i] = weights[i] if (F64(weights[i]) < needed) | (I32(i) == last) else F32(0)
