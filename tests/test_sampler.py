"""engine/sampler.py against plain references, and its draws against the exact distribution."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy._core import _multiarray_umath as umath

from batchgen.engine import sampler
from batchgen.engine.sequence import Prompt, Sequence
from batchgen.types import SamplingParams

ROOT = Path(__file__).parents[1]
INF, NAN = np.inf, np.nan


def sequence(random: float | None = 0.5, token_ids=(), prompt_ids=(0,), **params) -> Sequence:
    sampling = SamplingParams(**{"max_tokens": 100, "temperature": 0.0 if random is None else 1.0} | params)
    draws = None if random is None else np.full(100, random)
    prompt = Prompt(0, tuple(prompt_ids), sampling, (0,))
    return Sequence(prompt, 0, 0, token_ids=list(token_ids), random=draws)


def allowed(logits: np.ndarray, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> np.ndarray:
    """The exact distribution of a drawn token, in float64, by sorting all tokens."""
    x = logits.astype(np.float64) / temperature
    if top_k:
        x[x < np.sort(x)[-min(top_k, len(x))]] = -np.inf
    p = np.exp(x - x.max())
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= top_p]] = 0
    p[p < min_p * p.max()] = 0
    return p / p.sum()


@pytest.mark.parametrize("n_vocab", [70, 257, 5000])
@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"temperature": 0.3},
        {"top_k": 5},
        {"top_k": 40, "top_p": 0.8},
        {"top_p": 0.5},
        {"top_p": 0.999},
        {"min_p": 0.1},
        {"min_p": 1e-6, "temperature": 3.0},
        {"top_k": 60, "top_p": 0.9, "min_p": 0.05, "temperature": 1.7},
        {"top_k": 10**6},
    ],
)
def test_draws_follow_the_exact_distribution(n_vocab, filters):
    """Evenly spaced random numbers must draw each token in proportion to its probability."""
    logits = np.random.default_rng(n_vocab).normal(0, 2.5, n_vocab).astype(np.float32)
    n = 4000
    comb = (np.arange(n) + 0.5) / n
    sequences = [sequence(u, **filters) for u in comb]
    tokens = sampler.sample(np.repeat(logits[None], n, axis=0), sequences, eos_ids=())
    expected = allowed(logits, **{"temperature": 1.0} | filters)
    found = np.bincount(tokens, minlength=n_vocab) / n
    assert np.abs(found - expected).max() < 1.5 / n
    assert not found[expected == 0].any()


def test_min_p_reaches_past_the_first_candidates_in_any_batch():
    flat = np.random.default_rng(1).normal(0, 0.1, (3, 20_000)).astype(np.float32)
    flat[1, :200] = 1.0  # equal logits: more candidates than in the other rows
    together = [sequence(0.999, min_p=0.01) for _ in flat]
    tokens = sampler.sample(flat.copy(), together, eos_ids=())
    for row, token in enumerate(tokens):
        assert sampler.sample(flat[row : row + 1].copy(), [sequence(0.999, min_p=0.01)], eos_ids=()) == [token]
        assert (
            np.argsort(-flat[row], kind="stable").tolist().index(token) > 10_000
        )  # random number 0.999: far down the order


def test_random_draws_pass_a_chi_square_test():
    rng = np.random.default_rng(3)
    logits = rng.normal(0, 1.5, 300).astype(np.float32)
    for filters in ({}, {"top_k": 20}, {"top_p": 0.9}):
        n = 6_000
        sequences = [sequence(u, **filters) for u in rng.random(n)]
        tokens = sampler.sample(np.repeat(logits[None], n, axis=0), sequences, eos_ids=())
        expected = allowed(logits, **filters) * n
        counts = np.bincount(tokens, minlength=300)
        cells = expected > 5
        assert counts[expected == 0].sum() == 0
        statistic = float(((counts[cells] - expected[cells]) ** 2 / expected[cells]).sum())
        freedom = int(cells.sum()) - 1
        assert statistic < freedom + 5 * np.sqrt(2 * freedom)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_row_is_sampled_as_if_alone(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    n_vocab = data.draw(st.sampled_from([3, 64, 200, 2048, 9000]))  # from 2,048 on, not all are sorted
    n_row = data.draw(st.integers(1, 9))
    logits = (rng.normal(0, 3, (n_row, n_vocab)) // data.draw(st.sampled_from([1e-9, 0.5, 3]))).astype(np.float32)
    kind = st.fixed_dictionaries(
        {},
        optional={
            "top_k": st.integers(0, 300),
            "top_p": st.floats(0.01, 1),
            "min_p": st.floats(0, 1),
            "temperature": st.sampled_from([1e-5, 0.001, 0.5, 1.0, 50.0]),
            "logprobs": st.integers(0, 5),
        },
    )
    kinds = [data.draw(kind) for _ in range(n_row)]
    draws = [data.draw(st.none() | st.floats(0, 1, exclude_max=True)) for _ in range(n_row)]
    for draw, one in zip(draws, kinds, strict=True):
        if draw is None:
            one["temperature"] = 0.0
    together = [sequence(draw, **one) for draw, one in zip(draws, kinds, strict=True)]
    tokens = sampler.sample(logits.copy(), together, eos_ids=())
    for i, (draw, one) in enumerate(zip(draws, kinds, strict=True)):
        alone = sequence(draw, **one)
        assert sampler.sample(logits[i : i + 1].copy(), [alone], eos_ids=()) == [tokens[i]]
        assert alone.logprobs == together[i].logprobs
        assert alone.top_logprobs == together[i].top_logprobs


@given(st.integers(0, 10**6), st.integers(1, 3000), st.sampled_from([5, 64, 2048, 6401]), st.booleans())
def test_find_largest_returns_the_k_largest_and_all_that_equal_the_kth(seed, k, n_vocab, coarse):
    row = np.random.default_rng(seed).normal(0, 2, n_vocab).astype(np.float32)
    if coarse:
        row = np.round(row)  # many equal ones; 0 and -0 too
    order = np.argsort(-row, kind="stable")
    wanted = order[row[order] >= row[order[min(k, n_vocab) - 1]]]
    assert sampler.find_largest(row, k, np.empty(n_vocab, np.int64)).tolist() == wanted.tolist()


def draws_of_the_definition(row, u, temperature, top_k, top_p, min_p):
    """The tokens that a draw by the definition can give, in float64: every limit is off by 1e-5 either way."""
    order, top_k = np.arange(len(row)), top_k if top_k < len(row) else 0
    if top_k or top_p < 1 or min_p:
        order = order[np.lexsort((order, -row))]
        order = order[row[order] >= row[order[(top_k or len(row)) - 1]]]
    weights = np.exp((row[order].astype(np.float64) - row.max()) / temperature)
    total = weights.sum()
    tokens = set()
    for off in (1 - 1e-5, 1 + 1e-5):
        before = np.cumsum(weights) - weights
        kept = np.where((before < (top_p * off * total if top_p < 1 else INF)) & (weights >= min_p * off), weights, 0)
        upto = np.cumsum(kept)
        low, high = (max(u - 1e-5, 0) * upto[-1], (u + 1e-5) * upto[-1])
        tokens |= {int(t) for t in order[(upto >= low) & (upto - kept <= high) & (kept > 0)]}
    return tokens


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n_vocab=st.sampled_from([1, 2, 64, 300, 5000]),
    step=st.sampled_from([1e-9, 0.25, 2.0]),  # coarse steps: equal logits
    u=st.floats(0, 1, exclude_max=True),
    temperature=st.sampled_from([0.01, 0.5, 1.0, 30.0]),
    top_k=st.integers(0, 400),
    top_p=st.just(1.0) | st.floats(0.01, 1),
    min_p=st.just(0.0) | st.floats(0, 1),
)
def test_a_draw_is_that_of_the_definition(seed, n_vocab, step, u, temperature, top_k, top_p, min_p):
    row = (np.random.default_rng(seed).normal(0, 3, n_vocab) // step * step).astype(np.float32)
    filters = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    [token] = sampler.sample(row[None].copy(), [sequence(u, **filters)], eos_ids=())
    assert token in draws_of_the_definition(row, u, **filters)


def test_greedy_takes_the_first_of_the_largest():
    logits = np.array([[0, 5, 5, 1], [9, 0, 0, 0]], np.float32)
    assert sampler.sample(logits, [sequence(None), sequence(None)], None) == [1, 0]


@pytest.mark.parametrize(
    ("row", "possible"),
    [
        ([0, NAN, 2, NAN], {0, 2}),
        ([NAN, 1, -INF, NAN], {1}),
        ([0, INF, 5, INF, NAN], {1, 3}),
        ([-INF, -INF, NAN], {2}),  # the others may not be generated: rows of no token, bad words
        ([NAN, NAN], {0, 1}),
        ([3e38, -3e38, 3e38], {0, 2}),
    ],
)
def test_logits_that_are_no_numbers_count_as_the_lowest_and_touch_no_other_row(row, possible):
    row, good = np.array(row, np.float32), np.linspace(-1, 1, len(row), dtype=np.float32)
    for filters in ({}, {"top_k": 2}, {"top_p": 0.9}, {"min_p": 0.1}, {"repetition_penalty": 50.0}):
        for u in (None, 0.0, 0.5, 1 - 2**-53):
            three = [sequence(u, logprobs=2, **filters) for _ in range(3)]
            tokens = sampler.sample(np.stack([good, row, good]), three, eos_ids=())
            assert tokens[1] in possible
            expected = NAN if np.isnan(row[[*possible]]).all() else -np.log(len(possible))
            assert three[1].logprobs[0] == pytest.approx(expected, abs=2.2, nan_ok=True)
            alone = sequence(u, logprobs=2, **filters)
            assert sampler.sample(good[None].copy(), [alone], eos_ids=()) == [tokens[0]] == [tokens[2]]
            assert three[0].logprobs == three[2].logprobs == alone.logprobs


def test_top_k_of_all_tokens_is_off():
    """Without a filter the tokens are in order of their ids, with one the most likely is first."""
    logits = np.array([[0, 1, 2]] * 2, np.float32)
    assert sampler.sample(logits, [sequence(0.0, top_k=3), sequence(0.0, top_k=2)], eos_ids=()) == [0, 2]


def test_log_probabilities_are_those_before_penalties():
    logits = np.random.default_rng(2).normal(0, 3, (2, 300)).astype(np.float32)
    logits[1] = logits[0]
    plain, biased = sequence(None, logprobs=3), sequence(None, logprobs=3, logit_bias=((7, 50.0),))
    _, token = sampler.sample(logits.copy(), [plain, biased], eos_ids=())
    assert token == 7
    assert biased.top_logprobs == plain.top_logprobs
    gap = float(logits[0].max()) - float(logits[0, 7])
    assert plain.logprobs[0] - biased.logprobs[0] == pytest.approx(gap, abs=1e-5)


def test_the_last_random_number_never_draws_a_forbidden_token():
    logits = np.full((1, 200), -np.inf, np.float32)
    logits[0, 7] = 1.0
    logits[0, 9] = 0.5
    for filters in ({}, {"top_k": 150}, {"top_p": 0.999}, {"min_p": 0.001}):
        for u in (0.0, 1 - 2**-53):
            assert sampler.sample(logits.copy(), [sequence(u, **filters)], None)[0] in (7, 9)


def test_log_probabilities_are_right_to_the_last_bits_of_float32():
    logits = np.random.default_rng(0).normal(0, [[0.1], [1], [5], [30]], (4, 3000)).astype(np.float32)
    for row in logits:
        one = sequence(0.4, logprobs=100)
        [token] = sampler.sample(row[None].copy(), [one], eos_ids=())
        x = row.astype(np.float64)
        exact = x - x.max() - np.log(np.exp(x - x.max()).sum())
        order = np.argsort(-row, kind="stable")[:100]
        assert [pair[0] for pair in one.top_logprobs[0]] == order.tolist()
        found = np.array([one.logprobs[0], *(pair[1] for pair in one.top_logprobs[0])])
        assert (found == found.astype(np.float32)).all()
        np.testing.assert_allclose(found, exact[[token, *order]], rtol=2e-7, atol=1e-30)


def digest() -> str:
    """What is sampled from fixed rows, as one word."""
    rng, found = np.random.default_rng(7), hashlib.sha256()
    logits = (rng.integers(-(2**20), 2**20, (40, 7001)) / 2**17).astype(np.float32)
    kinds = [{}, {"top_k": 40, "top_p": 0.9}, {"top_p": 0.8}, {"min_p": 0.01}, {"repetition_penalty": 1.3}]
    kinds.append({"no_repeat_ngram_size": 3, "dry_multiplier": 0.7, "dry_base": 1.3, "dry_allowed_length": 0})
    kinds += [{"typical_p": 0.6}, {"top_n_sigma": 1.0, "top_k": 50, "typical_p": 0.8}, {"xtc_probability": 1.0}]
    draws = [None if i % 9 == 0 else float(u) for i, u in enumerate(rng.integers(0, 2**53, 40) / 2**53)]
    sequences = [sequence(u, token_ids=(1, 2, 2), logprobs=3, **kinds[i % len(kinds)]) for i, u in enumerate(draws)]
    tokens = sampler.sample(logits, sequences, eos_ids=(5,))
    found.update(repr((tokens, [(one.logprobs, one.top_logprobs) for one in sequences])).encode())
    return found.hexdigest()


def test_other_instruction_sets_of_numpy_sample_the_same_bits():
    used = [name for name in umath.__cpu_dispatch__ if umath.__cpu_features__[name]]
    if not used:
        pytest.skip("NumPy has no other instruction sets for this processor")
    settings = {"NPY_DISABLE_CPU_FEATURES": " ".join(used), "PYTHONPATH": str(ROOT)}
    code = f"from tests.test_sampler import *; print(any(umath.__cpu_features__[name] for name in {used}), digest())"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=os.environ | settings, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().split() == ["False", digest()]
