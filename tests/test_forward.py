"""gpt2/forward.py against references, and against itself: a row's bits are its own, whatever shares its pass."""

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchgen.gpt2 import pico
from batchgen.gpt2.config import GPT2Config
from batchgen.gpt2.forward import Forward, Prefill
from batchgen.gpt2.kv_cache import BLOCK, KVArena, Segment
from batchgen.gpt2.params import Array, nest
from batchgen.gpt2.weights import Float32Linear, Int8Linear, Linear, Weights, pack
from batchgen.types import Precision
from tests.support import reference
from tests.support.logits import gpt2
from tests.support.models import TINY, sharp_params, sharp_tensors
from tests.support.tensors import random_tensors

# widths and heads of the four sizes with one layer, and unpublished shapes
SHAPES = [
    GPT2Config(n_vocab=5003, n_ctx=1024, n_embd=768, n_head=12, n_layer=1),
    GPT2Config(n_vocab=999, n_ctx=1024, n_embd=1024, n_head=16, n_layer=1),
    GPT2Config(n_vocab=999, n_ctx=1024, n_embd=1280, n_head=20, n_layer=1),
    GPT2Config(n_vocab=999, n_ctx=1024, n_embd=1600, n_head=25, n_layer=1),
    GPT2Config(n_vocab=11, n_ctx=7, n_embd=4, n_head=1, n_layer=1),
    GPT2Config(n_vocab=300, n_ctx=70, n_embd=30, n_head=3, n_layer=2),
    GPT2Config(n_vocab=4096, n_ctx=512, n_embd=256, n_head=4, n_layer=6),
    TINY,
]
D_HEADS = [1, 8, 20, 24, 40, 64, 80, 100]
PRECISIONS: list[Precision] = ["float32", "int8"]


def tokens(n: int, n_vocab: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, n_vocab, n).tolist()


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@cache
def tiny_model(d_head: int, precision: Precision) -> tuple[Weights, GPT2Config]:
    n_head = 5 if d_head == 1 else 2
    config = GPT2Config(n_vocab=97, n_ctx=320, n_embd=n_head * d_head, n_head=n_head, n_layer=2)
    return pack(sharp_params(config), precision), config


def poisoned_arena(config: GPT2Config, precision: Precision, n_tokens: int = 4096) -> KVArena:
    """Whatever is read before it is written is nan."""
    arena = KVArena(config, n_tokens, precision)
    arena.memory.view(np.uint8)[:] = 255
    return arena


def every_logit(ids: list[int], weights: Weights, config: GPT2Config) -> Array:
    """[n_seq] -> [n_seq, n_vocab], in one pass without anything else."""
    arena = poisoned_arena(config, weights.precision, len(ids))
    forward = Forward(weights, config, max_rows=len(ids), max_logits=len(ids))
    return forward(prefills=[Prefill(arena.allocate(len(ids), start=0), ids, len(ids))]).copy()


@pytest.mark.parametrize("config", SHAPES, ids=lambda c: f"{c.n_embd}x{c.n_layer}")
def test_logits_equal_the_float64_reference(config):
    tensors = random_tensors(config)
    ids = tokens(min(9, config.n_ctx), config.n_vocab)
    params = nest(tensors, config.n_layer)
    expected = reference.logits(ids, {k: v for k, v in tensors.items() if k != "lm_head"}, config.n_head)
    found = gpt2(ids, **params, n_head=config.n_head)
    assert found.dtype == np.float32
    assert relative_error(found, expected) < 1e-5


def test_logits_of_a_full_context_equal_the_reference():
    tensors = sharp_tensors(TINY)
    ids = tokens(TINY.n_ctx, TINY.n_vocab)
    expected = reference.logits(ids, {k: v for k, v in tensors.items() if k != "lm_head"}, TINY.n_head)
    found = gpt2(ids, **nest(tensors, TINY.n_layer), n_head=TINY.n_head)
    assert relative_error(found, expected) < 2e-6


# ---- int8 against a slow model of it: NumPy in float64, the rounding to bytes written again


def _int8_linear(x: np.ndarray, w: Linear) -> np.ndarray:
    assert isinstance(w, Int8Linear)
    n_in, n_out = len(w.inverse), len(w.b)
    columns = w.panels.transpose(1, 3, 0, 2).reshape(-1, len(w.scale))[:n_in, :n_out].astype(float)
    x = x * w.inverse + w.offset
    low, high = np.minimum(x.min(1, keepdims=True), 0), np.maximum(x.max(1, keepdims=True), 0)
    step = (high - low) / 255
    zero = np.rint(-low / step)
    x = (np.clip(np.rint(x / step) + zero, 0, 255) - zero) * step
    return x @ (columns * w.scale[:n_out]) + w.b


def _bfloat16(x: np.ndarray) -> np.ndarray:
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.rint(mantissa * 256) / 256, exponent)


def _int8_logits(ids: list[int], weights: Weights, config: GPT2Config) -> np.ndarray:
    x = weights.wte[ids].astype(float) + weights.wpe[: len(ids)]
    mask = np.triu(np.full((len(ids), len(ids)), -np.inf), 1)
    for block in weights.blocks:
        qkv = _int8_linear(pico.layer_norm(x, **block.ln_1), block.c_attn)
        heads = qkv.reshape(len(ids), 3, config.n_head, config.d_head).transpose(1, 2, 0, 3)
        q, k, v = heads[0], _bfloat16(heads[1]), _bfloat16(heads[2])
        attended = pico.softmax(q @ k.transpose(0, 2, 1) / config.d_head**0.5 + mask) @ v
        x = x + _int8_linear(attended.transpose(1, 0, 2).reshape(x.shape), block.attn_proj)
        hidden = pico.gelu(_int8_linear(pico.layer_norm(x, **block.ln_2), block.c_fc))
        x = x + _int8_linear(hidden, block.mlp_proj)
    return _int8_linear(pico.layer_norm(x, **weights.ln_f), weights.lm_head)


@pytest.mark.parametrize("d_head", D_HEADS)
def test_int8_logits_equal_a_slow_model_of_them(d_head):
    """But for prompts in which a number on the edge between two bytes, or two bfloat16, goes to the other one."""
    weights, config = tiny_model(d_head, "int8")
    prompts = [tokens(5, config.n_vocab, seed) for seed in range(20)]
    expected = [_int8_logits(ids, weights, config) for ids in prompts]
    found = [every_logit(ids, weights, config) for ids in prompts]
    exact = [every_logit(ids, *tiny_model(d_head, "float32")) for ids in prompts]
    errors = [relative_error(f, e) for f, e in zip(found, expected, strict=True)]
    assert np.median(errors) < 2e-6
    assert max(errors) < max(relative_error(f, e) for f, e in zip(exact, expected, strict=True))


# ---- a row's bits


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("d_head", D_HEADS)
def test_cached_decode_equals_full_forward(d_head, precision):
    weights, config = tiny_model(d_head, precision)
    ids = tokens(140, config.n_vocab)
    forward, arena = Forward(weights, config, max_rows=64, max_logits=2), poisoned_arena(config, precision)
    segment = arena.allocate(140, start=0)
    rows = [forward(prefills=[Prefill(segment, ids[:10], n_logits=1)])[0].copy()]
    rows += [forward([token], [segment])[0].copy() for token in ids[10:]]
    np.testing.assert_array_equal(rows, every_logit(ids, weights, config)[9:], strict=True)


def _draw_prompts(data, arena: KVArena) -> tuple[list[list[int]], list[Segment], list[list[Prefill]]]:
    """Prompts that share whole blocks, copy a part of one, or do neither; their segments, their prefills in passes."""
    config = arena.config
    stem = tokens(3 * BLOCK, config.n_vocab, seed=data.draw(st.integers(0, 5)))
    root = arena.allocate(2 * BLOCK, start=0)
    child, copied = arena.allocate(BLOCK, 2 * BLOCK, root), arena.allocate(40, 2 * BLOCK, root)
    passes = [
        [Prefill(root, stem[: 2 * BLOCK]), Prefill(child, stem[2 * BLOCK :])],
        [Prefill(copied, stem[-BLOCK:-24])],
    ]
    prompts, segments = [], []
    for seed in range(data.draw(st.integers(1, 9))):
        own = tokens(data.draw(st.integers(1, 90)), config.n_vocab, seed=10 + seed)
        parent = data.draw(st.sampled_from([None, root, child, copied]))
        n_shared, above = (0, None) if parent is None else (parent.start, root) if parent is copied else (0, parent)
        n_before = 0 if parent is None else {root: 128, child: 192, copied: 168}[parent]
        prompts.append(stem[:n_before] + own)
        start = n_shared if parent is copied else n_before
        segments.append(arena.allocate(n_before - start + len(own) + 3, start, above))
        cut = data.draw(st.integers(0, len(own) - 1))
        pieces = [Prefill(segments[-1], own[:cut])] if cut else []
        pieces.append(Prefill(segments[-1], own[cut:], n_logits=1))
        pieces[0].copied = copied if parent is copied else None
        passes += [[piece] for piece in pieces]
    return prompts, segments, passes


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_row_has_the_same_bits_however_prompts_are_cut_packed_copied_and_shared(data):
    """Every logit equals that of the sequence alone, in one pass, from memory in which everything else is nan."""
    precision = data.draw(st.sampled_from(PRECISIONS))
    weights, config = tiny_model(data.draw(st.sampled_from(D_HEADS)), precision)
    arena, forward = poisoned_arena(config, precision), Forward(weights, config, max_rows=1200, max_logits=16)
    prompts, segments, passes = _draw_prompts(data, arena)
    last = []
    while passes:
        n = data.draw(st.integers(1, len(passes)))
        last += list(forward(prefills=sum(passes[:n], [])).copy())
        passes = passes[n:]
    order = data.draw(st.permutations(range(len(prompts))))
    steps = [forward([step + i for i in order], [segments[i] for i in order]).copy() for step in range(3)]
    for i, prompt in enumerate(prompts):
        expected = every_logit([*prompt, i, i + 1, i + 2], weights, config)[-4:]
        found = [last[i], *(step[order.index(i)] for step in steps)]
        np.testing.assert_array_equal(found, expected, strict=True)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_decode_of_many_sequences_in_several_groups_equals_each_alone(precision):
    """More sequences than a group has, with a prefix in common and without, and a prefill in the same pass."""
    weights, config = tiny_model(8, precision)
    forward, arena = Forward(weights, config, max_rows=600, max_logits=160), poisoned_arena(config, precision, 32768)
    stem = tokens(BLOCK, config.n_vocab)
    root = arena.allocate(BLOCK, start=0)
    forward(prefills=[Prefill(root, stem)])
    own = [tokens(1 + 3 * i % 140, config.n_vocab, seed=i) for i in range(150)]
    segments = [arena.allocate(len(ids) + 1, *((BLOCK, root) if i < 100 else (0,))) for i, ids in enumerate(own)]
    for ids, segment in zip(own, segments, strict=True):
        forward(prefills=[Prefill(segment, ids)])
    prefill = Prefill(arena.allocate(100, start=0), tokens(100, config.n_vocab), n_logits=1)
    found = forward([7] * 150, segments, [prefill]).copy()
    for i in (*range(0, 150, 13), 63, 64, 99, 100):
        ids = [*(stem if i < 100 else []), *own[i], 7]
        np.testing.assert_array_equal(found[i], every_logit(ids, weights, config)[-1], strict=True)
    np.testing.assert_array_equal(found[150], every_logit(tokens(100, config.n_vocab), weights, config)[-1])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_sequence_that_overflows_changes_no_bit_of_another(precision):
    """Beside it, and in memory that it leaves."""
    params = sharp_params(TINY)
    params["wte"][5] = 3e38  # its mean is infinite, what follows is nan; lm_head is another array
    weights = pack(params, precision)
    forward, arena = Forward(weights, TINY, max_rows=600, max_logits=16), KVArena(TINY, 512, precision)
    good = [6 + token % 400 for token in tokens(70, TINY.n_vocab)]
    segments = [arena.allocate(80, start=0), arena.allocate(80, start=0)]
    rows = forward(prefills=[Prefill(segments[0], [5] * 70, 1), Prefill(segments[1], good, 1)]).copy()
    steps = [rows, *(forward([5, 9], segments).copy() for _ in range(3))]
    assert not np.isfinite(steps[-1][0]).any()
    expected = every_logit([*good, 9, 9, 9], weights, TINY)[-4:]
    assert np.isfinite(expected).all()
    np.testing.assert_array_equal([step[1] for step in steps], expected, strict=True)
    arena.release(segments[0])
    again = arena.allocate(80, start=0)
    assert again.base == segments[0].base
    rows = [forward(prefills=[Prefill(again, good, 1)])[0].copy(), *(forward([9], [again])[0].copy() for _ in range(3))]
    np.testing.assert_array_equal(rows, expected, strict=True)


def test_a_prefill_without_logits_returns_no_rows():
    weights, config = tiny_model(8, "float32")
    forward, arena = Forward(weights, config, max_rows=64, max_logits=2), KVArena(config, 64)
    assert forward(prefills=[Prefill(arena.allocate(9, start=0), [1, 2, 3])]).shape == (0, config.n_vocab)


def test_rows_of_wte_without_a_token_have_no_chance():
    params = sharp_params(TINY)
    found = gpt2([1, 2, 3], **params | {"absent_ids": np.array([3, 77])}, n_head=TINY.n_head)
    assert (found[:, [3, 77]] == -np.inf).all()
    assert np.isfinite(np.delete(found, [3, 77], axis=1)).all()


def test_the_precision_follows_the_weights():
    for precision, kind in (("float32", Float32Linear), ("int8", Int8Linear)):
        assert isinstance(tiny_model(8, precision)[0].blocks[0].c_fc, kind)
