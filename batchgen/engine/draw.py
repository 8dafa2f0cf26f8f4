"""The arithmetic of the sampler on one row, compiled: its bits are the same on every processor.

The weight of a token is exp((logit - largest) / temperature) in float32. Weights are added up in float64, in the order
that is written here.
"""

import numpy as np

from batchgen.gpt2.compiled import inline, kernel
from batchgen.gpt2.portable import bits_of, exp, in_order, log64

F32, I32, I64 = np.float32, np.int32, np.int64

LANES = 64  # sums that grow side by side; also logits that are skipped together if all are small
BLOCK = 32 * LANES  # weights whose sum a draw may skip


@kernel("void(f4[::1], f4, f4, f4[::1])")
def weigh(logits, largest, inverse_temperature, weights):
    """[n] -> [n], which may be the same array; the largest have the weight 1, also if they are infinite."""
    for i in range(logits.size):
        weight = exp((logits[i] - largest) * inverse_temperature)
        weights[i] = F32(1) if logits[i] == largest else weight


@inline
def _add_blocks(weights, lanes, totals):
    """totals[b] = the sum of blocks 0 to b; returns the sum of all, with the rest that fills no block."""
    total = 0.0
    for block in range(weights.size // BLOCK):
        lanes[:] = 0.0
        for i in range(block * BLOCK, (block + 1) * BLOCK, LANES):
            for lane in range(LANES):
                lanes[lane] += np.float64(weights[i + lane])
        for lane in range(LANES):
            total += lanes[lane]
        totals[block] = total
    for i in range(weights.size // BLOCK * BLOCK, weights.size):
        total += np.float64(weights[i])
    return total


@kernel("f8(f4[::1])")
def add_up(weights):
    return _add_blocks(weights, np.empty(LANES), np.empty(weights.size // BLOCK))


@kernel("i8(f4[::1], f8)")
def draw(weights, random):
    """The first index up to which the weights are more than `random` of their sum.

    random is at most 1 - 2**-53: the target, rounded, is still less than the sum, and the block that reaches it has a
    weight above 0. Within a block rounding may miss the target: then it is the last such weight.
    """
    n_block = weights.size // BLOCK
    totals = np.empty(n_block)
    target = random * _add_blocks(weights, np.empty(LANES), totals)
    block = 0
    while block < n_block and totals[block] <= target:
        block += 1
    cumulative = totals[block - 1] if block else 0.0
    index = block * BLOCK
    for i in range(block * BLOCK, min((block + 1) * BLOCK, weights.size)):
        if weights[i] > F32(0):
            index = i
            cumulative += np.float64(weights[i])
            if cumulative > target:
                break
    return index


@kernel("i8(f4[::1], f8, f8)")
def count_kept(weights, needed, min_p):
    """How many of these weights, largest first, top_p and min_p keep: until their sum is `needed`; none of weight 0."""
    total = 0.0
    for i in range(weights.size):
        weight = np.float64(weights[i])
        if total >= needed or weight < min_p or weight == 0.0:
            return i
        total += weight
    return weights.size


@inline
def _key(logit, token):
    """Sorts larger logits first, equal ones (0 and -0 too) by token: a float32 sorts like the integer of its bits."""
    return (I64(~in_order(bits_of(logit + F32(0)))) << I64(32)) | I64(token)


@kernel("i8(f4[::1], f4, i8[::1])")
def find(logits, bound, keys):
    """Write the keys of all logits that reach the bound, in order of tokens; returns how many."""
    n, whole = 0, logits.size // LANES * LANES
    for start in range(0, whole, LANES):
        hit = I32(0)
        for lane in range(LANES):
            hit |= I32(logits[start + lane] >= bound)
        if hit:
            for i in range(start, start + LANES):
                if logits[i] >= bound:
                    keys[n] = _key(logits[i], i)
                    n += 1
    for i in range(whole, logits.size):
        if logits[i] >= bound:
            keys[n] = _key(logits[i], i)
            n += 1
    return n


@kernel("void(f4[::1], f4, f8, f4[::1])")
def log_probabilities(logits, largest, total, out):
    """[n] -> [n] log(exp(logit - largest) / total)."""
    for i in range(logits.size):
        below = 0.0 if logits[i] == largest else np.float64(logits[i]) - np.float64(largest)
        out[i] = F32(below - log64(total))
