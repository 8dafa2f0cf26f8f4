"""gpt2/attention.py: its law in plain loops, the keys up to a query's position alone, bfloat16, copies."""

import numpy as np
import pytest

from batchgen.gpt2.attention import attend, copy_segment, write
from batchgen.gpt2.compiled import kernel
from batchgen.gpt2.config import GPT2Config
from batchgen.gpt2.kv_cache import BLOCK, LANES, KVArena, Segment
from batchgen.gpt2.portable import exp, fma

CONFIG = GPT2Config(n_vocab=10, n_ctx=64, n_embd=8, n_head=2, n_layer=2)
D_HEADS = [1, 8, 20, 24, 40, 64, 80, 100]
PER_TOKEN = 2 * CONFIG.n_layer * CONFIG.n_embd  # numbers
N = 150  # rows


@kernel("void(f4[::1], f4[:,::1], f4[:,::1], f4[::1])")
def attend_plainly(q, keys, values, out):
    """The law, number after number: q [d_head], already scaled, keys and values [n_key, d_head]."""
    n_key, d_head = keys.shape
    weights, lanes, largest = np.zeros(n_key, np.float32), np.zeros(LANES, np.float32), np.float32(-np.inf)
    for t in range(n_key):
        for d in range(d_head):
            weights[t] = fma(q[d], keys[t, d], weights[t])
        largest = max(largest, weights[t])
    for t in range(n_key):
        weights[t] = exp(weights[t] - largest)
        lanes[t % LANES] += weights[t]
    for half in (8, 4, 2, 1):
        for lane in range(half):
            lanes[lane] += lanes[lane + half]
    for d in range(d_head):
        out[d] = 0
        for block in range(0, n_key, BLOCK):
            part = np.float32(0)
            for t in range(block, min(block + BLOCK, n_key)):
                part = fma(weights[t], values[t, d], part)
            out[d] += part
        out[d] /= lanes[0]


def random_rows(d_head: int, n_head: int = 2, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((N, 3 * n_head * d_head), dtype=np.float32)


def attend_in_cache(qkv: np.ndarray, d_head: int, dtype: type, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """All rows write to one segment, then attend -> out [N, 2, d_head], and the cache's memory."""
    memory = np.full(2 * 2 * 160 * d_head, -1).astype(dtype)
    write(memory, 0, 2, d_head, qkv, np.array([[0, N, 0, 160, 0, 0, 0]]))
    queries = np.array([np.arange(N), np.arange(1, N + 1)]).T.copy()
    groups, parts = np.array([[0, N, 0, 1]]), np.array([[0, 160, 0, 0, N]])
    out = np.zeros((N, 2, d_head), np.float32)
    attend(memory, 0, scale, qkv, queries, groups, parts, 160, out)
    return out, memory


def as_bfloat16(x: np.ndarray) -> np.ndarray:
    """The nearest float32 with 8 binary digits, of the two nearest the even one."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.rint(mantissa * 256) / 256, exponent).astype(np.float32)


@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
@pytest.mark.parametrize("d_head", D_HEADS)
def test_attention_follows_its_law_bit_for_bit_and_equals_float64(d_head, dtype):
    qkv = random_rows(d_head)
    found, _ = attend_in_cache(qkv, d_head, dtype, 0.3)
    q, k, v = qkv.reshape(N, 3, 2, d_head).transpose(1, 2, 0, 3)  # 3 x [2, N, d_head]
    q = np.ascontiguousarray(q * np.float32(0.3))
    k, v = (np.ascontiguousarray(x if dtype == np.float32 else as_bfloat16(x)) for x in (k, v))
    expected = np.zeros(d_head, np.float32)
    for head in range(2):
        scores = q[head].astype(float) @ k[head].T + np.triu(np.full((N, N), -np.inf), 1)
        weights = np.exp(scores - scores.max(1, keepdims=True))
        exact = weights @ v[head] / weights.sum(1, keepdims=True)
        np.testing.assert_allclose(found[:, head], exact, atol=1e-5)
        for i in range(N):
            attend_plainly(q[head, i], k[head, : i + 1], v[head, : i + 1], expected)
            np.testing.assert_array_equal(found[i, head], expected, strict=True)


@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
@pytest.mark.parametrize("column", [20, 40])  # of its key, of its value
def test_nan_at_a_position_reaches_the_queries_from_there_on_and_no_other(column, dtype):
    qkv = random_rows(20, n_head=2)
    clean, _ = attend_in_cache(qkv, 20, dtype, 1.0)
    qkv[100, 2 * column : 2 * column + 20] = np.nan  # head 0
    found, _ = attend_in_cache(qkv, 20, dtype, 1.0)
    np.testing.assert_array_equal(found[:100], clean[:100])
    np.testing.assert_array_equal(found[:, 1], clean[:, 1])
    assert np.isnan(found[100:, 0]).all()


def test_keys_and_values_are_rounded_to_the_nearest_bfloat16_ties_to_even_and_nan_stays_nan():
    qkv = random_rows(100)
    bits = np.random.default_rng(1).integers(0, 2**32, qkv.size, np.uint32).reshape(qkv.shape)
    bits[0], bits[1], bits[2], bits[3] = 0x3F808000, 0x3F818000, 0x7F800000, 0xFF800001  # two ties, infinity, a nan
    qkv = bits.view(np.float32)
    qkv[:, 200:400] = qkv[:, 400:]  # keys as values
    _, memory = attend_in_cache(qkv, 100, np.uint16, 1.0)
    values = memory.reshape(2, 2, 160, 100)[:, 1, :N]  # [n_head, N, d_head]
    found = (values.astype(np.uint32) << 16).view(np.float32)
    x = qkv.reshape(N, 3, 2, 100)[:, 2].transpose(1, 0, 2)
    with np.errstate(over="ignore", invalid="ignore"):
        np.testing.assert_array_equal(found, np.where(np.abs(x) < 1.2e-38, found, as_bfloat16(x)))
    assert (values[:, 0] == 0x3F80).all()
    assert (values[:, 1] == 0x3F82).all()
    assert np.isnan(found[:, 3]).all()
    keys = memory.reshape(2, 2, 160 * 100)[:, 0]
    blocks = [keys[:, 100 * t : 100 * (t + BLOCK)].reshape(2, 100, -1) for t in range(0, 160, BLOCK)]
    np.testing.assert_array_equal(np.concatenate(blocks, 2)[:, :, :N].transpose(0, 2, 1), values)


def contents(segment: Segment) -> tuple[np.ndarray, np.ndarray]:
    """Keys [n_layer * n_head, length, d_head] and values, alike."""
    n_part, d_head, n = CONFIG.n_layer * CONFIG.n_head, CONFIG.d_head, segment.length
    heads = segment.memory[segment.base : segment.base + segment.size * PER_TOKEN].reshape(n_part, 2, -1)
    blocks = np.split(heads[:, 0], range(BLOCK * d_head, heads.shape[2], BLOCK * d_head), axis=1)
    keys = np.concatenate([block.reshape(n_part, d_head, -1) for block in blocks], axis=2)  # [n_part, d_head, size]
    return keys.transpose(0, 2, 1)[:, :n], heads[:, 1].reshape(n_part, -1, d_head)[:, :n]


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize(
    ("length", "source_size", "target_size"), [(1, 16, 128), (40, 48, 80), (150, 160, 200), (128, 128, 130)]
)
def test_a_copy_has_the_same_content_and_changes_nothing_else(length, source_size, target_size, precision):
    arena = KVArena(CONFIG, 1024, precision)
    arena.memory.view(np.uint8)[:] = np.random.default_rng(0).integers(0, 64, arena.memory.nbytes)
    source = arena.allocate(source_size, start=0)
    target, other = arena.allocate(target_size, start=0), arena.allocate(64, start=0)
    source.length = length
    before = arena.memory.copy()
    copy_segment(CONFIG, source, target)
    assert target.length == length
    for found, expected in zip(contents(target), contents(source), strict=True):
        np.testing.assert_array_equal(found, expected, strict=True)
    for rest in (slice(target.base), slice(other.base, None)):
        np.testing.assert_array_equal(arena.memory[rest], before[rest])
