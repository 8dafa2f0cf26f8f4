"""engine/cuts.py in the sampler: top_n_sigma, typical_p and XTC by their definition, and by their peers' own code."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from batchgen.engine import sampler
from batchgen.engine.sequence import Prompt, Sequence, uniforms
from batchgen.types import SamplingParams
from tests.support.distribution import distribution
from tests.test_sampler import sequence

PEERS = json.loads((Path(__file__).parent / "cases" / "draws_peers.json").read_text(encoding="utf-8"))
INF, NAN = np.inf, np.nan
CUTS = [{"top_n_sigma": 1.0}, {"typical_p": 0.3}, {"typical_p": 0.95}, {"xtc_probability": 1.0}]
CUTS += [{"xtc_probability": 1.0, "xtc_threshold": 0.0}, {"top_n_sigma": 1e-9}, {"typical_p": 1e-9}]
OTHERS = [{}, {"top_k": 2}, {"top_p": 0.7}, {"min_p": 0.2}, {"top_k": 3, "top_p": 0.5, "min_p": 0.1}]


def found(row: np.ndarray, is_cut=False, **params) -> np.ndarray:
    """[n_vocab] probabilities of the tokens that may be drawn."""
    row, p = np.array(row, np.float32), SamplingParams(**{"temperature": 1.0} | params)
    largest = row[sampler.most_likely(row)]
    ids, weights = sampler.find_candidates(row, largest, p, is_cut, sampler.make_buffers(row.size))
    probabilities = np.zeros(row.size)
    probabilities[slice(None) if ids is None else ids] = weights
    return probabilities / probabilities.sum()


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n_vocab=st.sampled_from([1, 2, 5, 63, 64, 65, 300, 5000]),
    spread=st.sampled_from([0.1, 2.0, 8.0]),
    step=st.sampled_from([None, 0.5]),  # equal logits
    forbidden=st.sampled_from([0.0, 0.5]),
    is_cut=st.booleans(),
    params=st.fixed_dictionaries(
        {"temperature": st.sampled_from([1e-5, 0.3, 1.0, 2.5, 100.0])},
        optional={
            "top_n_sigma": st.sampled_from([0.01, 0.7, 1.5, 4.0, 100.0]),
            "top_k": st.integers(1, 90),
            "typical_p": st.floats(1e-3, 1),
            "top_p": st.floats(1e-3, 1),
            "min_p": st.floats(0, 1),
            "xtc_threshold": st.floats(0.001, 0.6),
        },
    ),
)
def test_the_distribution_is_that_of_the_definition(seed, n_vocab, spread, step, forbidden, is_cut, params):
    rng = np.random.default_rng(seed)
    row = rng.normal(0, spread, n_vocab).astype(np.float32)
    row = np.round(row / step).astype(np.float32) * np.float32(step) if step else row
    row[1:][rng.random(n_vocab - 1) < forbidden] = -INF
    row[rng.random(n_vocab) < forbidden / 9] = NAN
    assume(not np.isnan(row).all())
    row[row == row.max(initial=-INF, where=~np.isnan(row))] += 0.0
    assume(np.isfinite(row).any())
    expected = distribution(row, SamplingParams(**params), is_cut)
    assume(expected.margin > 1e-4)
    probabilities = found(row, is_cut, **params)
    np.testing.assert_allclose(probabilities, expected.p, atol=1e-6)
    assert ((probabilities > 0) == (expected.p > 0))[expected.p > 1e-30].all()
    assert not probabilities[expected.p == 0].any()


@pytest.mark.parametrize("case", PEERS)
def test_the_peers_keep_the_same_tokens(case):
    row = np.array([-INF if x is None else x for x in case["logits"]], np.float32)
    is_cut = "xtc_threshold" in case["params"]
    probabilities = found(row, is_cut, **case["params"])
    assert np.flatnonzero(probabilities).tolist() == case["kept"]
    weights = np.exp((row[case["kept"]].astype(np.float64) - row.max()) / case["params"]["temperature"])
    np.testing.assert_allclose(probabilities[case["kept"]], weights / weights.sum(), atol=1e-6)


def test_transformers_own_warper_keeps_the_same_tokens():
    torch = pytest.importorskip("torch", reason="torch is not installed (pip install '.[parity]')")
    process = pytest.importorskip("transformers.generation.logits_process")
    rng, compared = np.random.default_rng(5), 0
    for _ in range(100):
        row = rng.normal(0, rng.choice([0.3, 3.0]), 2000).astype(np.float32)
        typical_p = float(rng.uniform(0.05, 0.99))
        if distribution(row, SamplingParams(temperature=1.0, typical_p=typical_p)).margin > 1e-5:
            logits = process.TypicalLogitsWarper(typical_p)(None, torch.tensor(row[None]))[0]
            np.testing.assert_allclose(found(row, typical_p=typical_p), torch.softmax(logits, -1).numpy(), atol=1e-6)
            compared += 1
    assert compared > 50


def test_the_temperature_changes_nothing_of_what_top_n_sigma_keeps():
    row = np.random.default_rng(0).normal(0, 3, 500).astype(np.float32)
    kept = [np.flatnonzero(found(row, top_n_sigma=1.3, temperature=t) > 0).tolist() for t in (0.5, 1.0, 20.0)]
    assert kept[0] == kept[1] == kept[2]


@pytest.mark.parametrize("others", OTHERS)
@given(u=st.floats(0, 1, exclude_max=True), seed=st.integers(0, 10**6))
def test_what_is_off_changes_no_bit(others, u, seed):
    row = np.random.default_rng(seed).normal(0, 3, (1, 3000)).astype(np.float32)
    [token] = sampler.sample(row.copy(), [sequence(u, **others)], ())
    for off in (
        {"typical_p": 1.0, "top_n_sigma": 0.0, "xtc_probability": 0.0, "xtc_threshold": 0.01},
        {"xtc_probability": 1.0, "xtc_threshold": 0.51},
        {"top_n_sigma": 100.0},
    ):
        assert sampler.sample(row.copy(), [sequence(u, **others, **off)], ()) == [token]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("temperature", [1e-5, 1.0, 100.0])
@pytest.mark.parametrize(
    ("row", "possible"),
    [
        ([1.0], {0}),
        ([0, NAN, 2, NAN], {0, 2}),
        ([NAN, 1, -INF, NAN], {1}),
        ([0, INF, 5, INF, NAN], {1, 3}),
        ([-INF, -INF, NAN], {2}),
        ([NAN, NAN], {0, 1}),
        ([3e38, -3e38, 3e38], {0, 2}),
        ([7.0] * 70, {*range(70)}),
        ([-INF] * 2500 + [0.0] + [-INF] * 2500, {2500}),
        ([0.0, -1e-45, 1e-45], {0, 1, 2}),
    ],
)
def test_there_is_always_a_token_and_never_a_forbidden_one(cut, temperature, row, possible):
    for others in OTHERS:
        for u in (0.0, 0.5, 1 - 2**-53):
            one = sequence(u, temperature=temperature, **cut, **others)
            [token] = sampler.sample(np.array([row], np.float32), [one], ())
            assert token in possible, (others, u)


def test_greedy_rows_take_the_most_likely_token_whatever_is_cut():
    row = np.log(np.array([[0.2, 0.5, 0.3]], np.float32))
    for cut in CUTS:
        assert sampler.sample(row.copy(), [sequence(None, **cut)], ()) == [1]


def test_equal_logits_are_typical_together():
    row = np.log(np.array([0.5, 0.125, 0.125, 0.125, 0.125], np.float32))
    for typical_p in (0.01, 0.3, 0.5):
        assert (found(row, typical_p=typical_p)[1:] > 0).all() == (found(row, typical_p=typical_p)[4] > 0)


def test_xtc_leaves_the_last_of_equal_tokens_and_what_is_below_the_threshold():
    row = np.log(np.array([0.3, 0.2, 0.3, 0.2], np.float32))
    assert np.flatnonzero(found(row, True, xtc_threshold=0.25)).tolist() == [1, 2, 3]
    assert np.flatnonzero(found(row, True, xtc_threshold=0.1)).tolist() == [3]
    assert np.flatnonzero(found(row, True, xtc_threshold=0.1, top_k=1)).tolist() == [2]
    assert np.flatnonzero(found(row, True, xtc_threshold=0.4)).tolist() == [0, 1, 2, 3]


def test_xtc_cuts_as_often_as_it_is_asked_to_whatever_is_drawn():
    """Of probabilities 0.6 and 0.4, the first is drawn in 0.6 of the tokens that are not cut."""
    n, row = 20_000, np.log(np.array([[0.6, 0.4]], np.float32))
    params = SamplingParams(temperature=1.0, max_tokens=n, xtc_probability=0.25, xtc_threshold=0.3)
    one = Sequence(Prompt(0, (0,), params, (11,)), 0, 11)
    for _ in range(n):
        one.token_ids += sampler.sample(row.copy(), [one], ())
    tokens, is_cut, draws = np.array(one.token_ids), uniforms(11, n, 1) < 0.25, uniforms(11, n)
    assert (tokens == np.where(is_cut, 1, draws >= 0.6)).mean() > 0.9999  # rounding of 0.6
    assert abs(is_cut.mean() - 0.25) < 5 * np.sqrt(0.25 * 0.75 / n)
    assert abs(np.corrcoef(is_cut, draws)[0, 1]) < 5 / np.sqrt(n)
    begun = Sequence(Prompt(0, (0,), params, (11,)), 0, 11, token_ids=one.token_ids[:700])
    for _ in range(100):
        begun.token_ids += sampler.sample(row.copy(), [begun], ())
    assert begun.token_ids == one.token_ids[:800]


@given(st.integers(0, 2**63 - 1), st.integers(1, 50))
def test_a_number_of_a_stream_depends_on_its_index_alone_and_streams_differ(seed, n):
    for stream in (0, 1):
        assert uniforms(seed, 50, stream)[:n].tolist() == uniforms(seed, n, stream).tolist()
    assert uniforms(seed, n).tolist() == np.random.Generator(np.random.Philox(key=seed)).random(n).tolist()
    assert not np.isin(uniforms(seed, n, 1), uniforms(seed, n)).any()
