"""engine/draw.py: sums and draws against the same order of work in plain Python, bit for bit."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchgen.engine.draw import BLOCK, LANES, add_up, count_kept, draw, find, weigh

SIZES = [1, 3, LANES, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 77]


def running_sums(weights) -> list[float]:
    """The sums up to each whole block, then up to each weight of the rest; Python adds in float64."""
    total, sums = 0.0, []
    for start in range(0, len(weights) // BLOCK * BLOCK, BLOCK):
        lanes = [0.0] * LANES
        for i in range(BLOCK):
            lanes[i % LANES] += float(weights[start + i])
        for lane in lanes:
            total += lane
        sums.append(total)
    for weight in weights[len(sums) * BLOCK :]:
        total += float(weight)
        sums.append(total)
    return sums


@pytest.mark.parametrize("size", SIZES)
def test_sums_are_in_the_order_of_the_law(size):
    weights = np.random.default_rng(size).random(size, np.float32)
    assert add_up(weights) == running_sums(weights)[-1]


@given(
    st.sampled_from(SIZES), st.integers(0, 10**6), st.floats(0, 1, exclude_max=True), st.sampled_from([0, 0.5, 0.999])
)
def test_a_draw_is_a_token_of_weight_above_0_at_which_the_sum_passes_the_target(size, seed, random, zeros):
    rng = np.random.default_rng(seed)
    weights = rng.random(size, np.float32) * (rng.random(size) >= zeros)
    weights[rng.integers(size)] = 1
    index, upto = draw(weights, random), np.cumsum(weights, dtype=np.float64)
    assert weights[index] > 0
    target = random * upto[-1]
    assert upto[index] - weights[index] <= target + 1e-9
    assert upto[index] > target - 1e-9


@pytest.mark.parametrize("size", SIZES)
def test_the_last_random_number_draws_the_last_weights_above_0(size):
    last = size // 2
    for seed in range(20):  # a block's sum by lanes may be a little more than its sum in order
        weights = np.exp(-np.random.default_rng(seed).uniform(0, 60, size)).astype(np.float32)
        weights[last] = 1
        weights[last + 1 :] = 0
        assert draw(weights, 1 - 2**-53) == last
        assert draw(weights, 0.0) == 0


def test_a_number_on_the_border_draws_the_token_behind_it():
    weights = np.ones(4 * BLOCK, np.float32)
    for index in (0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK):
        assert draw(weights, index / weights.size) == index


def test_weights_of_infinite_logits():
    for logits, expected in [([1, np.inf, np.inf], [0, 1, 1]), ([-np.inf] * 2, [1, 1]), ([0, -np.inf], [1, 0])]:
        x = np.array(logits, np.float32)
        out = np.empty_like(x)
        weigh(x, x.max(), 1.0, out)
        assert out.tolist() == expected


@pytest.mark.parametrize(
    ("needed", "min_p", "kept"), [(np.inf, 0, 4), (1.5, 0, 2), (1.51, 0, 3), (9, 0.3, 2), (0.1, 1, 1)]
)
def test_the_tokens_that_top_p_and_min_p_keep(needed, min_p, kept):
    assert count_kept(np.array([1, 0.5, 0.25, 0.125, 0], np.float32), needed, min_p) == kept


def test_keys_sort_like_the_logits_they_stand_for():
    logits = np.array([0.0, -0.0, 1.5, -1.5, np.inf, -np.inf, 1e-45, -1e-45, 3e38, 1.5] * 20, np.float32)
    keys = np.empty(logits.size, np.int64)
    assert find(logits, -np.inf, keys) == logits.size
    assert (np.sort(keys) & 0xFFFFFFFF).tolist() == np.argsort(-logits, kind="stable").tolist()
    assert find(logits, 1.5, keys) == 80
    assert (keys[:80] & 0xFFFFFFFF).tolist() == np.flatnonzero(logits >= 1.5).tolist()
