"""engine/scores.py: a token's log-probability and rank are those of the model, in every batch, bit for bit."""

import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchgen.engine import scores
from batchgen.engine.draw import BLOCK as SUMMED
from batchgen.engine.draw import add_up, score, weigh
from batchgen.engine.engine import Engine
from batchgen.engine.limits import kv_bytes_per_token
from batchgen.engine.sequence import Completion, Prompt
from batchgen.errors import UsageError
from batchgen.gpt2.forward import Forward
from batchgen.gpt2.kv_cache import BLOCK
from batchgen.types import READING, Precision
from tests.support import reference
from tests.support.models import TINY, sharp_tensors
from tests.test_engine import EOS, WEIGHTS, mixed_prompts, prompt

PRECISIONS: list[Precision] = ["float32", "int8"]
TENSORS = {name: tensor for name, tensor in sharp_tensors(TINY).items() if name != "lm_head"}

Key = tuple[int, int]  # row and sample


def read_only(row: int, token_ids: list[int], scored: int | None, **params) -> Prompt:
    return replace(prompt(row, token_ids, **{"max_tokens": 0, "prompt_logprobs": 0} | params), scored=scored)


def engine_of(precision: Precision = "float32", tokens: int = 20_000, rows: int = 1024, **options) -> Engine:
    """With passes of up to so many rows."""
    kv_bytes = tokens * kv_bytes_per_token(TINY, precision)
    engine = Engine(WEIGHTS[precision], TINY, eos_ids=(EOS,), kv_bytes=kv_bytes, **options)
    engine.forward = Forward(WEIGHTS[precision], TINY, rows, engine.forward.max_logits)
    return engine


def run(prompts: list[Prompt], *args, **options) -> dict[Key, Completion]:
    engine = engine_of(*args, **options)
    completions = list(engine.generate(prompts))
    assert engine.arena.free == [(0, engine.arena.n_tokens)]
    work = engine.work
    assert work.started == work.finished == work.sequences
    assert work.read == work.prompt_tokens
    found = {(c.row, c.sample): c for c in completions}
    assert len(found) == len(completions) == sum(len(p.seeds) for p in prompts)
    return found


def mixed_scores(seed: int) -> list[Prompt]:
    """Prompts that generate, score or do both, with shared stems, equal ones and ones that differ in the last token."""
    rng = random.Random(seed)
    prompts = []
    for one in mixed_prompts(seed, n=24):
        ids, kind = list(one.token_ids), rng.randrange(6)
        scored = rng.choice([1, len(ids), rng.randint(1, len(ids))])
        params = replace(one.params, prompt_logprobs=rng.randrange(3))
        if kind < 2:
            prompts.append(replace(one, scored=scored, params=params))
        elif kind == 2:
            prompts.append(replace(one, scored=scored, params=replace(params, max_tokens=0, min_tokens=0)))
        elif kind < 5 or not prompts:
            prompts += [
                read_only(one.row + 100 * i, [*ids, rng.randrange(EOS)], scored) for i in range(rng.randint(1, 3))
            ]
        else:
            other = prompts[-1].token_ids
            cut = rng.randint(1, len(other))
            prompts.append(read_only(one.row, [*other[:cut], *ids][:200], cut))
    return prompts


# ---- the numbers


def test_scores_are_those_of_the_float64_reference():
    ids = np.random.default_rng(0).integers(0, EOS, 70).tolist()
    logits = reference.logits(ids[:-1], TENSORS, TINY.n_head)
    expected = logits - np.log(np.exp(logits - logits.max(axis=1)[:, None]).sum(axis=1))[:, None]
    expected -= logits.max(axis=1)[:, None]
    [found] = run([read_only(0, ids, 1, prompt_logprobs=3)]).values()
    of_tokens = expected[np.arange(69), ids[1:]]
    np.testing.assert_allclose(found.prompt_logprobs, of_tokens, atol=1e-4)
    assert found.prompt_ranks == tuple((1 + (expected > of_tokens[:, None]).sum(axis=1)).tolist())
    for top, row in zip(found.prompt_top_logprobs, expected, strict=True):
        assert [token for token, _ in top] == np.argsort(-row)[:3].tolist()
    assert (found.token_ids, found.finish_reason) == ((), "length")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_scores_of_a_completion_are_the_logprobs_of_the_run_that_made_it(precision):
    """Bit for bit, greedy and drawn, with the highest ones of each position."""
    kinds = [{}, {"temperature": 1.3}, {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.2}]
    prompts = [
        prompt(row, list(range(row, 5 + 31 * row)), max_tokens=9, ignore_eos=True, logprobs=3, **kind)
        for row, kind in enumerate(kinds)
    ]
    made = run(prompts, precision)
    again = [
        read_only(p.row, [*p.token_ids, *made[p.row, 0].token_ids], len(p.token_ids), prompt_logprobs=3)
        for p in prompts
    ]
    found = run(again, precision)
    for key, completion in made.items():
        assert found[key].prompt_logprobs == completion.logprobs
        assert found[key].prompt_top_logprobs == completion.top_logprobs
        is_first = [
            top[0][0] == token for top, token in zip(completion.top_logprobs, completion.token_ids, strict=True)
        ]
        assert [rank == 1 for rank in found[key].prompt_ranks] == is_first
    assert set(found[0, 0].prompt_ranks) == {1}  # greedy


@settings(max_examples=12)
@given(
    st.sampled_from(PRECISIONS),
    st.integers(0, 10**6),
    st.sampled_from([1, 3, 256]),
    st.booleans(),
    st.sampled_from([400, 20_000]),
    st.sampled_from([7, 100, 1024]),
)
def test_scores_do_not_depend_on_their_batch(precision, seed, max_batch, share_prefixes, tokens, rows):
    """Nor do completions beside them, with memory for all or one, in passes of many rows or few."""
    prompts = mixed_scores(seed)
    random.Random(seed).shuffle(prompts)
    rows = max(rows, max_batch)
    found = run(prompts, precision, tokens, rows, max_batch=max_batch, share_prefixes=share_prefixes)
    for one in random.Random(seed).sample(prompts, 4):
        alone = run([one], precision)
        assert {key: found[key] for key in alone} == alone
    for one in prompts:
        for sample in range(one.params.n):
            completion = found[one.row, sample]
            if one.scored is not None:
                assert len(completion.prompt_logprobs) == len(one.token_ids) - one.scored
                assert (
                    len(completion.prompt_ranks)
                    == len(completion.prompt_top_logprobs)
                    == len(completion.prompt_logprobs)
                )
            else:
                assert completion.prompt_logprobs is None is completion.prompt_ranks


# ---- the work


def count_head(engine: Engine) -> list[int]:
    """The rows of logits of each call of the head from now on."""
    rows: list[int] = []
    head = engine.forward.head

    def counted(states: np.ndarray) -> np.ndarray:
        rows.append(len(states))
        return head(states)

    engine.forward.head = counted  # type: ignore[method-assign]
    return rows


def test_logits_are_made_in_slices_of_wanted_positions_alone():
    engine = engine_of(rows=300)
    rows = count_head(engine)
    texts = [list(range(n, n + 200)) for n in range(3)]
    list(engine.generate([read_only(row, ids, 101) for row, ids in enumerate(texts)]))
    assert sum(rows) == 3 * 99
    assert max(rows) <= scores.ROWS
    assert len(engine.forward._logits) == 256


def test_choices_share_their_prompt_and_those_of_one_token_share_all():
    """50 rows with a few-shot prompt: what is read, and the positions that have logits."""
    engine, stem = engine_of(), list(range(2 * BLOCK + 40))
    rows = count_head(engine)
    prompts = [
        read_only(9 * row + i, [*stem, 300 + row, 5, 400 + i], len(stem) + 2) for row in range(6) for i in range(4)
    ]
    list(engine.generate(prompts))
    assert engine.work.prompt_tokens == engine.work.read == len(stem) + 6 * 2
    assert sum(rows) == 6
    assert engine.work.steps == 1
    engine = engine_of()
    list(engine.generate([read_only(i, [*stem, 400 + i, 5, 5], len(stem)) for i in range(4)]))
    assert engine.work.read == len(stem) - 1 + 4 * 3  # the last token of the stem has logits


def test_equal_requests_are_read_once_whatever_their_samples():
    engine = engine_of()
    same = [read_only(row, [1, 2, 3], 1, n=2, temperature=1.0) for row in range(3)]
    assert len(list(engine.generate(same))) == 6
    assert (engine.work.sequences, engine.work.read, engine.work.generated) == (1, 2, 0)


def test_nothing_is_read_for_what_nobody_wants():
    engine = engine_of()
    echo = prompt(0, [1, 2, 3], max_tokens=0, echo=True)
    one = read_only(1, [7], 1)  # a prompt of one token has no token to score
    found = {c.row: c for c in engine.generate([echo, one])}
    assert engine.work.read == engine.work.steps == 0
    assert engine.work.started == engine.work.finished == 2
    assert found[0].finish_reason == found[1].finish_reason == "length"
    assert (found[0].prompt_logprobs, found[1].prompt_logprobs) == (None, ())


def test_a_prompt_may_have_one_token_more_than_the_context_if_nothing_follows_it():
    ids = np.random.default_rng(0).integers(0, EOS, TINY.n_ctx + 1).tolist()
    [found] = run([read_only(0, ids, TINY.n_ctx)]).values()
    assert len(found.prompt_logprobs) == 1
    for bad, words in [
        (read_only(7, [*ids, 1], 1), "row 7: 258 prompt tokens . 0 max_tokens"),
        (replace(prompt(7, ids, max_tokens=1), scored=1), "row 7: 257 prompt tokens"),
        (read_only(7, [1, 2], 3), r"row 7: scored 3 is out of range \(1 to 2\)"),
        (read_only(7, [1, 2], 0), "scored 0 is out of range"),
        (read_only(7, [1, TINY.n_vocab], 1), "token id 500 is outside"),
    ]:
        with pytest.raises(UsageError, match=words):
            run([bad])
    with pytest.raises(UsageError, match="257 prompt tokens"):
        next(engine_of().embed([read_only(0, ids, None)], -1, "last"))


def test_a_step_names_the_rows_that_it_reads_apart_from_those_that_get_a_token():
    engine, named = engine_of(rows=100), []
    ids = list(range(150))
    prompts = [prompt(0, ids, max_tokens=2), read_only(1, ids[::-1], 1)]
    list(engine.generate(prompts, on_step=lambda *rows: named.append(rows)))
    assert named == [([], [], [0]), ([0], [], [1]), ([], [0], [1])]


# ---- the kernel


@pytest.mark.parametrize("size", [1, 5, SUMMED - 1, SUMMED, 2 * SUMMED + 70])
def test_a_score_is_the_log_of_a_weight_over_their_sum_in_the_order_of_add_up(size):
    rng = np.random.default_rng(size)
    logits = rng.normal(0, 3, (3, size)).astype(np.float32)
    logits[1, rng.integers(size)] -= np.inf if size > 1 else 0
    logits[2] = np.round(logits[2])  # many are equal
    rows = np.repeat(np.arange(3), 4)
    tokens = np.sort(rng.integers(0, size, (3, 4)), axis=1).ravel()
    found, ranks, largest, totals = (
        np.empty(12, np.float32),
        np.empty(12, np.int64),
        np.empty(12, np.float32),
        np.empty(12),
    )
    score(logits, rows, tokens, found, ranks, largest, totals)
    for i, (row, token) in enumerate(zip(logits[rows], tokens, strict=True)):
        weights = np.empty_like(row)
        weigh(row, row.max(), 1.0, weights)
        assert (largest[i], totals[i]) == (row.max(), add_up(weights))
        assert found[i] == np.float32(np.float64(row[token]) - np.float64(row.max()) - np.log(totals[i]))
        assert np.argsort(-row, kind="stable")[ranks[i] - 1] == token


def test_a_nan_ranks_as_the_lowest_finite_number_and_stays_one_and_infinities_are_their_limits():
    """A damaged model must not pass for one that finds all tokens equally likely."""
    nan, inf = np.nan, np.inf
    for logits, logprobs, ranks in [
        ([0, nan, -nan, -inf], [0, nan, nan, -inf], [1, 2, 3, 4]),
        ([nan, nan], [nan, nan], [1, 2]),
        ([inf, 0, inf], [np.float32(-np.log(2)), -inf, np.float32(-np.log(2))], [1, 3, 2]),
        ([0, -0.0], [np.float32(-np.log(2))] * 2, [1, 2]),
    ]:
        n = len(logits)
        found = np.empty(n, np.float32), np.empty(n, np.int64), np.empty(n, np.float32), np.empty(n)
        score(np.array([logits], np.float32), np.zeros(n, np.int64), np.arange(n), *found)
        np.testing.assert_array_equal(found[0], np.array(logprobs, np.float32))
        assert found[1].tolist() == ranks


# ---- embeddings


@cache
def hidden_states(ids: tuple[int, ...]) -> list[np.ndarray]:
    return reference.hidden_states(ids, TENSORS, TINY.n_head)


POOLS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"mean": lambda x: x.mean(axis=0), "last": lambda x: x[-1]}


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("layer", range(-TINY.n_layer - 1, TINY.n_layer + 1))
def test_an_embedding_is_the_state_of_the_reference_at_every_layer(layer, pool):
    ids = tuple(np.random.default_rng(1).integers(0, EOS, 40).tolist())
    [(_, found)] = engine_of().embed([read_only(0, list(ids), None)], layer, pool)
    assert (found.dtype, found.shape) == (np.float32, (TINY.n_embd,))
    np.testing.assert_allclose(found, POOLS[pool](hidden_states(ids)[layer]), atol=1e-4)


@settings(max_examples=10)
@given(
    st.sampled_from(PRECISIONS),
    st.integers(0, 10**6),
    st.sampled_from(sorted(POOLS)),
    st.sampled_from([0, 1, -1]),
    st.sampled_from([(1, 400, 7), (3, 400, 100), (256, 20_000, 1024)]),
)
def test_embeddings_do_not_depend_on_their_batch(precision, seed, pool, layer, limits):
    prompts = [read_only(p.row, list(p.token_ids), None) for p in mixed_prompts(seed, 20)]
    max_batch, tokens, rows = limits
    engine = engine_of(precision, tokens, rows, max_batch=max_batch)
    found = {p.row: vector for p, vector in engine.embed(prompts, layer, pool)}
    assert engine.work.finished == engine.work.started == len({p.token_ids for p in prompts}) < len(prompts)
    assert engine.work.read == engine.work.prompt_tokens
    assert engine.arena.free == [(0, engine.arena.n_tokens)]
    for p in prompts:
        [(_, alone)] = engine_of(precision).embed([p], layer, pool)
        assert found[p.row].tobytes() == alone.tobytes()


def test_a_layer_that_the_model_lacks_is_refused(python_names):
    for layer in (TINY.n_layer + 1, -TINY.n_layer - 2):
        with pytest.raises(UsageError, match=rf"layer={layer} is out of range \(-4 to 3"):
            next(engine_of().embed([read_only(0, [1], None)], layer, "last"))


def test_params_of_reading_only_draw_nothing():
    assert READING.greedy
