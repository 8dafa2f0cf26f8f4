"""Attention over the cache of keys and values, compiled. Its bits depend on a query and its keys alone.

A *query* attends to all keys up to its own position, those of a path of segments (kv_cache.py has their layout). What
each number is, whatever reads together and wherever the keys lie:
score = one chain of fma over d_head; maximum; exp of the differences; their sum in LANES sums, by position modulo
LANES, which a fixed tree adds; values = for each block of BLOCK positions one chain of fma over its keys, the blocks
added in order; the quotient. Nothing else is multiplied: a key past the query's position may be nan.

The tables, int64: `queries` [n_query, 2] is a query's row of qkv and its number of keys; `groups` [n_group, 4] the
queries and the parts of a group, from ... to; `parts` [n_part, 5] a segment's base, size and start, and the queries
that read it, from ... to. Queries of a group read a block of keys together, MOST_ROWS at a time.
"""

import llvmlite.ir as ir
import numpy as np
from numba import types
from numba.extending import intrinsic, overload

from batchgen.gpt2.compiled import inline, kernel
from batchgen.gpt2.config import GPT2Config
from batchgen.gpt2.kv_cache import BLOCK, LANES, Segment
from batchgen.gpt2.microkernels import CONTINUE, MOST_ROWS, START, Float32, address, at, load, product, target_vectors
from batchgen.gpt2.portable import as_float32, bits_of, exp, in_order
from batchgen.gpt2.weights import round_up

F32, I32 = np.float32, np.int32


_round_up = inline(round_up)


def _any_columns(b_bytes):
    """`_multiply`: tiles of vectors, then single vectors, then parts of vectors."""
    width = target_vectors().fma or 4
    vectors = 4 if width == 16 else 2  # of a tile, whose sums fit into 32 registers, or into 16
    tile = vectors * width
    shapes = ((width, vectors), (width, 1), (4, 1), (1, 1))
    tiles, vector, quarter, single = (product(Float32(w, b_bytes), MOST_ROWS, v) for w, v in shapes)

    def multiply(memory, rows, columns, x, ldx, at, step, c, ldc, n_k, mode):
        b, ldb = address(memory) + b_bytes * at, b_bytes * step
        n = columns // tile * tile
        tiles(rows, n, x, ldx, b, ldb, c, ldc, n_k, mode)
        m = columns // width * width
        vector(rows, m - n, x, ldx, b + b_bytes * n, ldb, c + 4 * n, ldc, n_k, mode)
        n = columns // 4 * 4
        quarter(rows, n - m, x, ldx, b + b_bytes * m, ldb, c + 4 * m, ldc, n_k, mode)
        single(rows, columns - n, x, ldx, b + b_bytes * n, ldb, c + 4 * n, ldc, n_k, mode)

    return multiply


def _multiply(memory, rows, columns, x, ldx, at, step, c, ldc, n_k, mode):
    """c[r, j] = one chain of fma over k of x[r, k] * memory[at + k * step + j], for any number of columns.

    1 to MOST_ROWS rows; x and c are addresses, ldx and ldc the bytes from a row to the next.
    """


_add_lanes = product(Float32(LANES if target_vectors().fma == LANES else 4, 4), 1, 1)
_MULTIPLY = {types.float32: _any_columns(4), types.uint16: _any_columns(2)}


@overload(_multiply)
def _multiply_by_number(memory, rows, columns, x, ldx, at, step, c, ldc, n_k, mode):
    return _MULTIPLY[memory.dtype]


@inline
def _score(memory, keys, size, start, q, ends, lo, hi, scores):
    """Write the scores of queries lo ... hi-1 and the keys of one segment to their columns of `scores`."""
    d_head, n_column = q.shape[1], scores.shape[1]
    for block in range(0, min(size, ends[hi - 1] - start), BLOCK):  # the last query has the most keys
        step = min(BLOCK, size - block)  # keys in the block: its columns
        columns = min(step, _round_up(ends[hi - 1] - start - block, LANES))  # those past a query's end are not used
        x, c = address(q) + 4 * lo * d_head, address(scores) + 4 * (lo * n_column + start + block)
        _multiply(memory, hi - lo, columns, x, 4 * d_head, keys + block * d_head, step, c, 4 * n_column, d_head, START)


@inline
def _halve(lanes, half):
    for lane in range(half):
        lanes[lane] += lanes[lane + half]


@inline
def _softmax(s, n, ones, lanes):
    """Replace n scores by their exponentials, not normalised; returns the sum."""
    width = _round_up(n, BLOCK)
    row, last, n_last = s[:width], s[width - BLOCK : width], I32(n - width + BLOCK)
    for j in range(BLOCK):
        last[j] = last[j] if I32(j) < n_last else F32(-np.inf)
    largest = I32(-0x80000000)
    for j in range(row.size):
        largest = max(largest, in_order(bits_of(row[j])))
    top = as_float32(in_order(largest))
    for j in range(row.size):
        row[j] = exp(row[j] - top)
    _add_lanes(1, LANES, address(ones), 0, address(s), 4 * LANES, address(lanes), 0, width // LANES, START)
    _halve(lanes, 8)
    _halve(lanes, 4)
    _halve(lanes, 2)
    return lanes[0] + lanes[1]


@inline
def _add_values(memory, values, size, start, scores, ends, lo, hi, part, o):
    """Add the weighted values of one segment to o, block by block, for queries lo ... hi-1."""
    d_head, n_column = o.shape[1], scores.shape[1]
    for block in range(0, min(size, ends[hi - 1] - start), BLOCK):
        step, at = min(BLOCK, size - block), values + block * d_head
        x, c = address(scores) + 4 * (lo * n_column + start + block), address(part)
        common = max(0, min(step, ends[lo] - start - block))  # the keys of the first query are keys of all
        if common:
            _multiply(memory, hi - lo, d_head, x, 4 * n_column, at, d_head, c, 4 * d_head, common, START)
        for i in range(hi - lo):
            n_key = min(step, ends[lo + i] - start - block)
            if n_key > common:
                x_i, at_i, mode = x + 4 * (i * n_column + common), at + common * d_head, CONTINUE if common else START
                _multiply(memory, 1, d_head, x_i, 0, at_i, d_head, c + 4 * i * d_head, 0, n_key - common, mode)
            if n_key > 0:
                for d in range(d_head):
                    o[lo + i, d] += part[i, d]


_NUMBERS = ("f4", "u2")  # of the cache: float32, or the bits of bfloat16
_TABLE = "i8[:,::1]"


@kernel(*(f"void({n}[::1], i8, f4, f4[:,::1], {_TABLE}, {_TABLE}, {_TABLE}, i8, f4[:,:,::1])" for n in _NUMBERS))
def attend(memory, layer, scale, qkv, queries, groups, parts, n_ctx, out):
    """The attention of the queries in one layer -> out [n_query, n_head, d_head]; qkv [n_row, 3 * n_head * d_head]."""
    _, n_head, d_head = out.shape
    scores, ones = np.empty((MOST_ROWS, _round_up(n_ctx, BLOCK)), F32), np.ones(_round_up(n_ctx, BLOCK) // LANES, F32)
    work = np.empty((3, MOST_ROWS, d_head), F32)
    q, o, block = work[0], work[1], work[2]
    ends, totals, lanes = np.empty(MOST_ROWS, np.int64), np.empty(MOST_ROWS, F32), np.empty(LANES, F32)
    for group in range(len(groups)):
        first_part, last_part = groups[group, 2], groups[group, 3]
        for head in range(n_head):
            for first in range(groups[group, 0], groups[group, 1], MOST_ROWS):
                n = min(MOST_ROWS, groups[group, 1] - first)
                for i in range(n):
                    ends[i] = queries[first + i, 1]
                    query = qkv[queries[first + i, 0], head * d_head : (head + 1) * d_head]
                    for d in range(d_head):
                        q[i, d] = query[d] * scale
                        o[i, d] = 0
                for p in range(first_part, last_part):
                    size, lo, hi = parts[p, 1], max(parts[p, 3] - first, 0), min(parts[p, 4] - first, n)
                    if lo < hi:
                        keys = parts[p, 0] + (layer * n_head + head) * 2 * size * d_head
                        _score(memory, keys, size, parts[p, 2], q, ends, lo, hi, scores)
                for i in range(n):
                    totals[i] = _softmax(scores[i], ends[i], ones, lanes)
                for p in range(first_part, last_part):
                    size, lo, hi = parts[p, 1], max(parts[p, 3] - first, 0), min(parts[p, 4] - first, n)
                    if lo < hi:
                        values = parts[p, 0] + ((layer * n_head + head) * 2 + 1) * size * d_head
                        _add_values(memory, values, size, parts[p, 2], scores, ends, lo, hi, block, o)
                for i in range(n):
                    for d in range(d_head):
                        out[first + i, head, d] = o[i, d] / totals[i]


def _narrowed(builder, x, kind):
    """A float32, or a vector of them, as numbers of the cache: see `_narrow`."""
    if kind == types.float32:
        return x
    count = getattr(x.type, "count", None)
    i32, i16 = ((ir.VectorType(i, count) if count else i) for i in (ir.IntType(32), ir.IntType(16)))
    sixteen, one, half, quiet = (ir.Constant(i32, [n] * count if count else n) for n in (16, 1, 0x7FFF, 0x400000))
    bits = builder.bitcast(x, i32)
    odd = builder.and_(builder.lshr(bits, sixteen), one)
    rounded = builder.add(bits, builder.add(odd, half))
    is_nan = builder.fcmp_unordered("uno", x, x)
    return builder.trunc(builder.lshr(builder.select(is_nan, builder.or_(bits, quiet), rounded), sixteen), i16)


@intrinsic
def _narrow(typing_context, x, number):
    """A float32 as a number of the cache: itself, or the bits of the nearest bfloat16 (ties to even; nan stays nan)."""

    def generate(context, builder, signature, arguments):
        return _narrowed(builder, arguments[0], number)

    return number(types.float32, number), generate


@intrinsic
def _transpose(typing_context, source, source_step, target, target_step, number):
    """Columns of LANES rows of LANES float32 -> rows of numbers of the cache; addresses, bytes from a row to the next.

    Shuffled in registers: processors read a column of memory one number at a time.
    """

    def generate(context, builder, signature, arguments):
        source, source_step, target, target_step, _ = arguments
        floats, lanes = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(ir.IntType(32), LANES)
        loaded = (load(builder, at(builder, source, row, source_step), floats) for row in range(LANES))
        rows = [_narrowed(builder, x, number) for x in loaded]
        half = LANES // 2
        zips = [ir.Constant(lanes, [i + j // 2 + LANES * (j % 2) for j in range(LANES)]) for i in (0, half)]
        for _ in range(LANES.bit_length() - 1):  # each time, zip the first half of the rows with the second
            pairs = zip(rows[:half], rows[half:], strict=True)
            rows = [builder.shuffle_vector(*pair, order) for pair in pairs for order in zips]
        for row, x in enumerate(rows):
            to = builder.inttoptr(at(builder, target, row, target_step), x.type.as_pointer())
            builder.store(x, to, align=number.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4, number), generate


@inline
def _narrow_all(source, target, n):
    for i in range(n):
        target[i] = _narrow(source[i], target[i])


@inline
def _copy_numbers(memory, start, to, n):
    source, target = memory[start : start + n], memory[to : to + n]
    for i in range(n):
        target[i] = source[i]


@inline
def _copy(memory, n_layer_head, first, d_head, source, source_size, target, target_size, n):
    """Copy the first n positions of a segment to another in the layers' heads from `first` on."""
    for head in range(first, first + n_layer_head):
        start, to = source + head * 2 * source_size * d_head, target + head * 2 * target_size * d_head
        for block in range(0, n, BLOCK):
            step, to_step = min(BLOCK, source_size - block), min(BLOCK, target_size - block)
            for d in range(d_head):
                _copy_numbers(
                    memory, start + block * d_head + d * step, to + block * d_head + d * to_step, min(BLOCK, n - block)
                )
        _copy_numbers(memory, start + source_size * d_head, to + target_size * d_head, n * d_head)


@kernel(*(f"void({n}[::1], i8, i8, i8, i8, i8, i8, i8)" for n in _NUMBERS))
def _copy_layers(memory, n_layer_head, d_head, source, source_size, target, target_size, n):
    _copy(memory, n_layer_head, 0, d_head, source, source_size, target, target_size, n)


def copy_segment(config: GPT2Config, source: Segment, target: Segment) -> None:
    """Write the content of `source`, in all layers, to `target`, which starts at the same position."""
    n_layer_head, n = config.n_layer * config.n_head, source.length
    places = (source.base, source.size, target.base, target.size)
    _copy_layers(source.memory, n_layer_head, config.d_head, *places, n)
    target.length = n


@kernel(*(f"void({n}[::1], i8, i8, i8, f4[:,::1], {_TABLE})" for n in _NUMBERS))
def write(memory, layer, n_head, d_head, qkv, writes):
    """Write the keys and values of rows to the cache, in one layer, from qkv [n_row, 3 * n_head * d_head].

    writes is [n_write, 7]: first row and rows; base and size of a segment; the first row's position in it; base and
    size of a segment whose content before that position is copied first, or zeros.
    """
    n_embd, width = n_head * d_head, qkv.shape[1]
    rows, numbers, number = address(qkv), address(memory), memory.itemsize
    for w in range(len(writes)):
        row, n, base, size, position = writes[w, 0], writes[w, 1], writes[w, 2], writes[w, 3], writes[w, 4]
        if writes[w, 6]:
            _copy(memory, n_head, layer * n_head, d_head, writes[w, 5], writes[w, 6], base, size, position)
        for head in range(n_head):
            keys = base + (layer * n_head + head) * 2 * size * d_head
            values = keys + (size + position) * d_head
            column = n_embd + head * d_head
            i = 0
            while i < n:  # up to LANES rows at a time
                lane = (position + i) % BLOCK
                block, count = position + i - lane, min(n - i, LANES - lane % LANES)
                step = min(BLOCK, size - block)
                whole = d_head // LANES * LANES if count == LANES else 0
                for d in range(0, whole, LANES):
                    source = rows + 4 * ((row + i) * width + column + d)
                    target = numbers + number * (keys + block * d_head + d * step + lane)
                    _transpose(source, 4 * width, target, number * step, memory[0])
                for d in range(whole, d_head):
                    target = memory[keys + block * d_head + d * step + lane :]
                    _narrow_all(qkv[row + i : row + i + count, column + d], target, count)
                i += count
            for i in range(n):
                target = memory[values + i * d_head : values + (i + 1) * d_head]
                value = qkv[row + i, n_embd + column : n_embd + column + d_head]
                _narrow_all(value, target, d_head)
