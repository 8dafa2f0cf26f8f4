"""The samplers that look at more than the order of tokens, compiled: top_n_sigma, typical_p, XTC.

Its bits are the same on every processor: sums are float64, in the order that is written here. A token that is cut out
has the logit -inf and the weight 0. At least one token is always left.
"""

import numpy as np

from batchgen.engine.draw import INFINITY, LANES, LOWEST
from batchgen.gpt2.compiled import inline, kernel
from batchgen.gpt2.portable import as_float32, bits_of

F32, F64, I32, I64 = np.float32, np.float64, np.int32, np.int64

PASSES = 5  # over a range of distances, after which few are left in it


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
def _mean_depth(row, weights, largest, inverse_temperature):
    """The sum of the weights [n], and their mean of the logits' depths."""
    totals, products = np.zeros(LANES), np.zeros(LANES)
    for start in range(0, row.size, LANES):
        logits, part = row[start : start + LANES], weights[start : start + LANES]
        for lane in range(part.size):
            depth = _depth(logits[lane], largest, inverse_temperature)
            totals[lane] += F64(part[lane])
            products[lane] += F64(part[lane] * depth if part[lane] > F32(0) else F32(0))
    total = _sum(totals)
    return total, F32(_sum(products) / total)


@inline
def _mass(distances, weights, bound, sums):
    """The sum of the weights up to a distance, added in pairs as float32, then as float64."""
    sums[:] = 0.0
    pairs = weights.size // (2 * LANES) * (2 * LANES)
    for start in range(0, pairs, 2 * LANES):
        near, part = distances[start : start + 2 * LANES], weights[start : start + 2 * LANES]
        for lane in range(LANES):
            one = part[lane] if near[lane] <= bound else F32(0)
            other = part[lane + LANES] if near[lane + LANES] <= bound else F32(0)
            sums[lane] += F64(one + other)
    for start in range(pairs, weights.size, LANES):
        near, part = distances[start : start + LANES], weights[start : start + LANES]
        for lane in range(part.size):
            sums[lane] += F64(part[lane] if near[lane] <= bound else F32(0))
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
def _pack(distances, weights, low, high, out):
    """Move those with a distance above `low`, up to `high`, to the front of distances and of out; returns how many."""
    n = 0
    for start in range(0, weights.size, LANES):
        near, part, found = distances[start : start + LANES], weights[start : start + LANES], I32(0)
        for lane in range(part.size):
            found |= I32(near[lane] > low) & I32(near[lane] <= high)
        if found:  # in few parts
            for lane in range(part.size):
                is_in = (near[lane] > low) & (near[lane] <= high)
                distances[n], out[n] = near[lane], part[lane]
                n += I64(is_in)
    return n


@inline
def _find_bound(distances, weights, needed, total, guess, rest):
    """The smallest distance up to which the weights, `total`, are `needed`. Overwrites distances and rest, all [n].

    A range is narrowed in PASSES, then all outside of it are left out. The first range is narrowed from a guess by the
    Illinois algorithm, which takes few passes, the next ones by halving, which takes few at worst.
    """
    left_out, sums = 0.0, np.empty(LANES)
    # how far the weights up to low fall short of needed, and those up to high exceed it; which of the two moved last
    short, over, side = needed, total - needed, 0
    first, high = _ends(distances)
    while first < high:
        low, below = F32(-1), left_out  # of the bound; the weights up to it
        for k in range(PASSES):
            least, is_first = max(first, low), left_out == 0.0
            middle = least + (high - least) * F32(short / (short + over) if is_first else 0.5)
            middle = guess if is_first and k == 0 else middle
            middle = middle if least <= middle < high else least
            mass = left_out + _mass(distances, weights, middle, sums)
            if mass >= needed:
                high, over, short, side = middle, mass - needed, short * (0.5 if side > 0 else 1.0), 1
            else:
                low, below, short, over, side = middle, mass, needed - mass, over * (0.5 if side < 0 else 1.0), -1
        n = _pack(distances, weights, low, high, rest)
        distances, weights = distances[:n], rest[:n]
        left_out = below
        first, high = _ends(distances)
    return high


@inline
def _depth(logit, largest, inverse_temperature):
    """How far below the largest; 0 for an infinite one that is the largest."""
    depth = (largest - logit) * inverse_temperature
    return F32(0) if logit == largest else depth


@kernel("void(f4[::1], f4[::1], f4, f4, f8, f4[:, ::1])")
def cut_atypical(row, weights, largest, inverse_temperature, typical_p, buffers):
    """Set the weights to 0 of all but the tokens whose surprise is nearest to its mean, the entropy: typical_p of all.

    Also keeps all that are as near as the last of them. A surprise is the depth below the largest logit plus the same
    number for all tokens, so depths replace it. Overwrites buffers [2, n].
    """
    distances, rest = buffers[0, : row.size], buffers[1, : row.size]
    total, mean = _mean_depth(row, weights, largest, inverse_temperature)
    for i in range(row.size):
        distance = abs(_depth(row[i], largest, inverse_temperature) - mean)
        distances[i] = distance if weights[i] > F32(0) else F32(np.inf)
    bound = _find_bound(distances, weights, typical_p * total, total, mean, rest)
    for i in range(row.size):
        is_kept = abs(_depth(row[i], largest, inverse_temperature) - mean) <= bound
        weights[i] = weights[i] if is_kept else F32(0)


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
