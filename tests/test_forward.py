"""gpt2/forward.py against the float64 reference, and against itself with a cache, packed rows and shared prefixes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchgen.engine.probe import is_batch_invariant
from batchgen.gpt2.config import GPT2Config
from batchgen.gpt2.forward import Forward, Prefill, gpt2, min_rows
from batchgen.gpt2.kv_cache import BLOCK, KVArena
from batchgen.gpt2.params import nest, random_tensors
from tests.support import reference
from tests.support.models import TINY, sharp_params, sharp_tensors

# widths and heads of the four sizes with one layer, the first with its vocabulary, and unpublished shapes
SHAPES = [
    GPT2Config(n_vocab=50257, n_ctx=1024, n_embd=768, n_head=12, n_layer=1),
    GPT2Config(n_vocab=999, n_ctx=1024, n_embd=1024, n_head=16, n_layer=1),
    GPT2Config(n_vocab=999, n_ctx=1024, n_embd=1280, n_head=20, n_layer=1),
    GPT2Config(n_vocab=999, n_ctx=1024, n_embd=1600, n_head=25, n_layer=1),
    GPT2Config(n_vocab=11, n_ctx=7, n_embd=4, n_head=1, n_layer=1),
    GPT2Config(n_vocab=300, n_ctx=70, n_embd=30, n_head=3, n_layer=2),
    GPT2Config(n_vocab=2560, n_ctx=512, n_embd=160, n_head=5, n_layer=6),
    TINY,
]


def tokens(n: int, n_vocab: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, n_vocab, n).tolist()


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def is_close(found: np.ndarray, expected: np.ndarray) -> bool:
    """Equal bit for bit if this machine's BLAS is batch-invariant, else up to rounding."""
    if is_batch_invariant(sharp_params(TINY), TINY):
        return np.array_equal(found, expected)
    return relative_error(found, expected) < 1e-5


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
    assert relative_error(found, expected) < 1e-5


def test_cached_decode_equals_full_forward():
    params, ids = sharp_params(TINY), tokens(200, TINY.n_vocab)
    full = gpt2(ids, **params, n_head=TINY.n_head)
    forward, arena = Forward(params, TINY, max_rows=64, max_logits=2), KVArena(TINY, 256)
    segment = arena.allocate(200, start=0)
    rows = [forward(prefills=[Prefill(segment, ids[:10], n_logits=1)])[0].copy()]
    rows += [forward([token], [segment])[0].copy() for token in ids[10:]]
    assert is_close(np.array(rows), full[9:])


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_packed_rows_equal_rows_alone(data):
    """Every logit equals that of the prompt alone, however prompts are cut, packed and shared."""
    params = sharp_params(TINY)
    stem = tokens(2 * BLOCK, TINY.n_vocab, seed=data.draw(st.integers(0, 5)))
    forward, arena = Forward(params, TINY, max_rows=700, max_logits=16), KVArena(TINY, 4096)
    n_shared = data.draw(st.sampled_from([0, BLOCK, 2 * BLOCK]))
    parent, pending = None, []
    if n_shared:
        parent = arena.allocate(n_shared, start=0)
        pending.append(Prefill(parent, stem[:n_shared]))
    prompts, segments = [], []
    for i in range(data.draw(st.integers(1, 4))):
        own = tokens(data.draw(st.integers(1, 90)), TINY.n_vocab, seed=10 + i)
        prompts.append(stem[:n_shared] + own)
        segments.append(arena.allocate(len(own) + 1, n_shared, parent))
        cut = data.draw(st.integers(0, len(own) - 1))
        if cut:
            pending.append(Prefill(segments[-1], own[:cut]))
            forward(prefills=pending)
            pending = []
        pending.append(Prefill(segments[-1], own[cut:], n_logits=1))
        last = forward(prefills=pending)[0].copy()
        pending = []
        assert is_close(last, gpt2(prompts[-1], **params, n_head=TINY.n_head)[-1])
    decoded = forward([3] * len(prompts), segments).copy()
    for prompt, row in zip(prompts, decoded, strict=True):
        assert is_close(row, gpt2([*prompt, 3], **params, n_head=TINY.n_head)[-1])


def test_prefill_in_the_pass_of_its_parent_equals_a_full_forward():
    params, ids = sharp_params(TINY), tokens(100, TINY.n_vocab)
    forward, arena = Forward(params, TINY, max_rows=200, max_logits=2), KVArena(TINY, 256)
    parent = arena.allocate(BLOCK, start=0)
    child = arena.allocate(40, BLOCK, parent)
    row = forward(prefills=[Prefill(parent, ids[:BLOCK]), Prefill(child, ids[BLOCK:], n_logits=1)])[0]
    assert is_close(row, gpt2(ids, **params, n_head=TINY.n_head)[-1])


@pytest.mark.parametrize("together", [True, False])
def test_prefill_after_copied_keys_and_values_equals_a_full_forward(together):
    params, ids = sharp_params(TINY), tokens(120, TINY.n_vocab)
    forward, arena = Forward(params, TINY, max_rows=200, max_logits=2), KVArena(TINY, 512)
    parent = arena.allocate(BLOCK, start=0)
    copied, own = arena.allocate(20, BLOCK, parent), arena.allocate(60, BLOCK, parent)
    read = [Prefill(parent, ids[:BLOCK]), Prefill(copied, ids[BLOCK : BLOCK + 20])]
    rest = [Prefill(own, ids[BLOCK + 20 :], n_logits=1, copied=copied)]
    if not together:
        forward(prefills=read)
    row = forward(prefills=[*read, *rest] if together else rest)[0]
    assert own.end == len(ids)
    assert is_close(row, gpt2(ids, **params, n_head=TINY.n_head)[-1])


def test_decode_of_several_groups_equals_each_sequence_alone():
    params = sharp_params(TINY)
    forward, arena = Forward(params, TINY, max_rows=600, max_logits=80), KVArena(TINY, 8192)
    prompts = [tokens(1 + 3 * i % 140, TINY.n_vocab, seed=i) for i in range(70)]
    segments = [arena.allocate(len(prompt) + 1, start=0) for prompt in prompts]
    for prompt, segment in zip(prompts, segments, strict=True):
        forward(prefills=[Prefill(segment, prompt)])
    order = sorted(range(70), key=lambda i: segments[i].end)
    decoded = forward([7] * 70, [segments[i] for i in order]).copy()
    for i, row in zip(order, decoded, strict=True):
        assert is_close(row, gpt2([*prompts[i], 7], **params, n_head=TINY.n_head)[-1])


def test_a_prefill_without_logits_returns_no_rows():
    forward, arena = Forward(sharp_params(TINY), TINY, max_rows=64, max_logits=2), KVArena(TINY, 64)
    assert forward(prefills=[Prefill(arena.allocate(9, start=0), [1, 2, 3])]).shape == (0, TINY.n_vocab)


def test_products_with_weights_have_two_rows_or_more_and_are_not_small():
    assert min_rows(GPT2Config(50257, 1024, 768, 12, 12)) == 2
    for n_embd in (64, 160, 1600):
        rows = min_rows(GPT2Config(100, 64, n_embd, 1, 1))
        assert rows >= 2
        assert rows * n_embd * min(n_embd, 100) > 100**3
