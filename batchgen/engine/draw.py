"""The arithmetic of the sampler and of scores on rows, compiled: its bits are the same on every processor.

The weight of a token is exp((logit - largest) / temperature) in float32. Weights are added up in float64, in the order
that is written here.
"""

import numpy as np

from batchgen.gpt2.compiled import inline, kernel
from batchgen.gpt2.portable import as_float32, bits_of, exp, exp_below, in_order, log64

F32, I32, I64 = np.float32, np.int32, np.int64

INFINITY = I32(0x7F800000)  # its bits
LOWEST = F32(np.finfo(np.float32).min)
LANES = 64  # sums that grow side by side; also logits that are skipped together if all are small
BLOCK = 32 * LANES  # weights whose sum a draw may skip


@kernel("void(f4[::1], f4, f4, f4[::1])")
def weigh(logits, largest, inverse_temperature, weights):
    """[n] -> [n], which may be the same array; the largest have the weight 1, also if they are infinite."""
    for i in range(logits.size):
        weight = exp((logits[i] - largest) * inverse_temperature)
        weights[i] = F32(1) if logits[i] == largest else weight


@kernel("void(f4[::1], u4[::1])")
def keep(logits, allowed):
    """Each logit [n] whose bit is 0, or that has none, becomes -inf; bit i % 32 of allowed[i // 32] is token i's."""
    n = min(logits.size, 32 * allowed.size)
    for start in range(0, n, 32):
        bits, part = allowed[start >> 5], logits[start : min(start + 32, n)]
        if bits == np.uint32(0):
            part[:] = F32(-np.inf)
        elif bits != np.uint32(0xFFFFFFFF):
            for lane in range(part.size):
                part[lane] = part[lane] if bits >> np.uint32(lane) & np.uint32(1) else F32(-np.inf)
    logits[n:] = F32(-np.inf)


@inline
def _add_block(weights, lanes, total):
    """total + the sum of BLOCK weights"""
    lanes[:] = 0.0
    for i in range(0, BLOCK, LANES):
        for lane in range(LANES):
            lanes[lane] += np.float64(weights[i + lane])
    for lane in range(LANES):
        total += lanes[lane]
    return total


@inline
def _add_rest(weights, total):
    """total + the sum of weights that fill no block"""
    for i in range(weights.size):
        total += np.float64(weights[i])
    return total


@inline
def _add_blocks(weights, lanes, totals):
    """totals[b] = the sum of blocks 0 to b; returns the sum of all, with the rest that fills no block."""
    total = 0.0
    for block in range(weights.size // BLOCK):
        total = _add_block(weights[block * BLOCK : (block + 1) * BLOCK], lanes, total)
        totals[block] = total
    return _add_rest(weights[weights.size // BLOCK * BLOCK :], total)


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


@inline
def _log_probability(logit, largest, total):
    """log(exp(logit - largest) / total); nan for the lowest number, which stands for a nan"""
    if logit == LOWEST:
        return F32(np.nan)
    below = 0.0 if logit == largest else np.float64(logit) - np.float64(largest)
    return F32(below - log64(total))


@kernel("void(f4[::1], f4, f8, f4[::1])")
def log_probabilities(logits, largest, total, out):
    """[n] -> [n] log(exp(logit - largest) / total)."""
    for i in range(logits.size):
        out[i] = _log_probability(logits[i], largest, total)


@inline
def _largest(row):
    """The largest logit; each nan becomes the lowest finite number."""
    largest, farthest = I32(-0x80000000), I32(0)  # in the order of the floats; the bits that are farthest from 0
    for i in range(row.size):
        largest = max(largest, in_order(bits_of(row[i])))
        farthest = max(farthest, I32(bits_of(row[i]) & I32(0x7FFFFFFF)))
    if farthest > INFINITY:
        largest = I32(-0x80000000)
        for i in range(row.size):
            row[i] = row[i] if row[i] == row[i] else LOWEST
            largest = max(largest, in_order(bits_of(row[i])))
    return as_float32(in_order(largest))


@inline
def _total(row, largest, weights, lanes):
    """add_up of the weights of a row at temperature 1; overwrites weights [BLOCK] and lanes [LANES]."""
    total = 0.0
    for start in range(0, row.size, BLOCK):
        part = row[start : start + BLOCK]
        for i in range(part.size):
            weight = exp_below(part[i] - largest)
            weights[i] = F32(1) if part[i] == largest else weight
        total = _add_block(weights, lanes, total) if part.size == BLOCK else _add_rest(weights[: part.size], total)
    return total


@kernel("void(f4[:, ::1], f4[:, ::1])")
def log_softmax(logits, out):
    """[n, n_vocab] -> [n, n_vocab]. A nan of the logits becomes the lowest finite number."""
    weights, lanes = np.empty(BLOCK, F32), np.empty(LANES)
    for i in range(len(logits)):
        row = logits[i]
        largest = _largest(row)
        log_total = log64(_total(row, largest, weights, lanes))
        for j in range(row.size):
            below = 0.0 if row[j] == largest else np.float64(row[j]) - np.float64(largest)
            out[i, j] = F32(below - log_total)


@inline
def _rank(row, token):
    """1 + the number of larger logits, and of equal ones of lower tokens."""
    x, before, after, rank = row[token], row[:token], row[token + 1 :], I32(1)
    for i in range(before.size):
        rank = I32(rank + I32(before[i] >= x))  # in vectors of int32: the sum of two is an int64
    for i in range(after.size):
        rank = I32(rank + I32(after[i] > x))
    return I64(rank)


@kernel("void(f4[:, ::1], i8[::1], i8[::1], f4[::1], i8[::1], f4[::1], f8[::1])")
def score(logits, rows, tokens, logprobs, ranks, largest, totals):
    """The log-probability and the rank of tokens[i] under logits[rows[i]], for each i.

    And of that row the largest logit and the sum of all weights. Equal rows should be adjacent, as should equal tokens
    of a row: they are then computed once. A nan of the rows becomes the lowest finite number.
    """
    weights, lanes = np.empty(BLOCK, F32), np.empty(LANES)
    for i in range(rows.size):
        row, token = logits[rows[i]], tokens[i]
        if i and rows[i] == rows[i - 1]:
            largest[i], totals[i] = largest[i - 1], totals[i - 1]
        else:
            largest[i] = _largest(row)
            totals[i] = _total(row, largest[i], weights, lanes)
        if i and rows[i] == rows[i - 1] and token == tokens[i - 1]:
            logprobs[i], ranks[i] = logprobs[i - 1], ranks[i - 1]
        else:
            logprobs[i], ranks[i] = _log_probability(row[token], largest[i], totals[i]), _rank(row, token)


@kernel("void(f4[:, ::1], f8[::1])")
def add_rows(rows, sums):
    """Add rows [n, n_embd] to sums [n_embd], one after another."""
    for i in range(len(rows)):
        for j in range(sums.size):
            sums[j] += np.float64(rows[i, j])
