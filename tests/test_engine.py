"""engine/: a prompt is completed as if alone, in every batch."""

import math
import random
import re
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchgen.engine.engine import MAX_ROWS, Engine
from batchgen.engine.limits import kv_bytes_per_token
from batchgen.engine.sequence import Completion, Prompt, Sequence, _entropy, is_loop, sample_seeds, uniforms
from batchgen.errors import UsageError
from batchgen.gpt2 import pico
from batchgen.gpt2.forward import Forward
from batchgen.gpt2.kv_cache import BLOCK
from batchgen.gpt2.weights import Weights, pack
from batchgen.types import Begun, FinishReason, Precision, SamplingParams
from tests.support.models import TINY, sharp_params

EOS = TINY.n_vocab - 1
PER_TOKEN = kv_bytes_per_token(TINY, "float32")
PARAMS = sharp_params(TINY)
PICO = {key: value for key, value in PARAMS.items() if key != "lm_head"}
WEIGHTS: dict[Precision, Weights] = {precision: pack(PARAMS, precision) for precision in get_args(Precision)}


def prompt(row: int, token_ids: list[int], **params) -> Prompt:
    sampling = SamplingParams(**params)
    return Prompt(row, tuple(token_ids), sampling, sample_seeds(sampling.seed, row, sampling.n))


def mixed_prompts(seed: int, n: int = 40) -> list[Prompt]:
    """Prompts of many lengths, with shared stems, duplicates and every kind of sampling."""
    rng = random.Random(seed)
    stem = [rng.randrange(EOS) for _ in range(3 * BLOCK)]
    kinds = [
        {},
        {"temperature": 0.9, "n": 3},
        {"temperature": 1.2, "top_k": 7},
        {"temperature": 0.7, "top_p": 0.9, "logprobs": 3},
        {"temperature": 1.5, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.3},
        {"min_tokens": 5, "presence_penalty": 0.5, "frequency_penalty": 0.5, "stop_token_ids": (3, 4)},
        {"ignore_eos": True, "logit_bias": ((5, 2.0),), "n": 2, "logprobs": 0},
        {"temperature": 1.0, "n": 2, "no_repeat_ngram_size": 2, "allowed_token_ids": (1, 2, 3), "min_tokens": 5},
        {"temperature": 2.0, "dry_multiplier": 2.0, "dry_allowed_length": 1, "allowed_token_ids": tuple(range(9))},
    ]
    prompts = []
    for row in range(n):
        ids = [rng.randrange(EOS) for _ in range(rng.randrange(1, 150))]
        if row % 3 == 1:
            ids = (stem[: rng.choice([BLOCK, 90, 2 * BLOCK, 130, 3 * BLOCK])] + ids)[:200]
        if row % 7 == 3:
            ids = list(prompts[row - 2].token_ids)
        prompts.append(prompt(row, ids, max_tokens=rng.randrange(6, 40), **kinds[row % len(kinds)]))
    return prompts


def run(
    prompts: list[Prompt], tokens: int = 20_000, precision: Precision = "float32", rows: int = MAX_ROWS, **options
) -> dict[tuple[int, int], Completion]:
    kv_bytes = tokens * kv_bytes_per_token(TINY, precision)
    engine = Engine(WEIGHTS[precision], TINY, eos_ids=(EOS,), kv_bytes=kv_bytes, **options)
    engine.forward = Forward(WEIGHTS[precision], TINY, max(rows, engine.max_batch), engine.forward.max_logits)
    completions = {(c.row, c.sample): c for c in engine.generate(prompts)}
    assert engine.arena.free == [(0, engine.arena.n_tokens)]
    return completions


def test_every_sample_of_every_prompt_is_completed_once():
    prompts = mixed_prompts(0)
    engine = Engine(WEIGHTS["float32"], TINY, eos_ids=(EOS,), kv_bytes=2000 * PER_TOKEN)
    keys = [(c.row, c.sample) for c in engine.generate(prompts)]
    assert sorted(keys) == [(p.row, sample) for p in prompts for sample in range(p.params.n)]


@pytest.mark.parametrize("tokens", [2_000, 20_000])
def test_the_work_of_an_engine_is_what_it_was_given_and_at_the_end_it_is_done(tokens):
    engine = Engine(WEIGHTS["float32"], TINY, eos_ids=(EOS,), kv_bytes=tokens * PER_TOKEN)
    before: list[int] = []
    for _, drawn in engine.steps(mixed_prompts(0)):
        work = engine.work
        assert len(drawn) == work.generated - sum(before)
        before.append(len(drawn))
        assert work.started - work.finished <= work.batch
        assert work.finished <= work.started <= work.sequences
        assert work.finished_tokens <= work.generated
    assert engine.work.steps == len(before)
    assert engine.work.started == engine.work.finished == engine.work.ended == engine.work.sequences
    assert engine.work.finished_tokens == engine.work.ended_tokens == engine.work.generated
    assert engine.work.read == engine.work.prompt_tokens


def test_shared_prefixes_and_equal_requests_are_work_once():
    engine = Engine(WEIGHTS["float32"], TINY, eos_ids=(EOS,), kv_bytes=20_000 * PER_TOKEN)
    stem = list(range(2 * BLOCK))
    list(engine.generate([prompt(row, [*stem, last], max_tokens=3) for row, last in enumerate([7, 8, 8])]))
    assert (engine.work.sequences, engine.work.max_tokens) == (2, 6)
    assert engine.work.prompt_tokens == 2 * BLOCK + 2


def test_an_engine_that_is_closed_early_has_nothing_left_to_do():
    engine = Engine(WEIGHTS["float32"], TINY, eos_ids=(EOS,), kv_bytes=20_000 * PER_TOKEN)
    next(steps := engine.steps(mixed_prompts(0)))
    steps.close()
    assert engine.work.started == engine.work.finished == engine.work.sequences > 0


def test_greedy_completions_equal_pico():
    prompts = [replace(p, params=SamplingParams(max_tokens=p.params.max_tokens)) for p in mixed_prompts(1, n=6)]
    for p in prompts:
        expected = pico.generate(list(p.token_ids), PICO, TINY.n_head, p.params.max_tokens)
        stopped = EOS in expected
        found = run(prompts if p is prompts[0] else [p])[p.row, 0]
        assert list(found.token_ids) == expected[: expected.index(EOS) if stopped else None]
        assert found.finish_reason == ("stop" if stopped else "length")


@pytest.mark.parametrize("precision", get_args(Precision))
@settings(max_examples=8, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 60), st.booleans(), st.sampled_from([320, 700, 20_000]), st.randoms())
def test_completions_do_not_depend_on_their_batch(precision, seed, max_batch, share_prefixes, tokens, shuffler):
    """Batch size, memory, sharing and order change no token and no bit of a log-probability."""
    prompts = mixed_prompts(seed, n=25)
    expected = run(prompts, precision=precision)
    shuffled = list(prompts)
    shuffler.shuffle(shuffled)
    assert run(shuffled, tokens, precision, max_batch=max_batch, share_prefixes=share_prefixes) == expected


def test_a_completion_in_a_batch_equals_that_of_the_prompt_alone():
    prompts = mixed_prompts(5)
    together = run(prompts)
    for p in prompts:
        assert all(together[key] == value for key, value in run([p], 320, max_batch=1).items())


def test_the_same_run_gives_the_same_bits():
    prompts = mixed_prompts(2)
    assert run(prompts, 900, max_batch=9) == run(prompts, 900, max_batch=9)


def test_a_second_call_of_an_engine_gives_the_same_bits():
    engine = Engine(WEIGHTS["float32"], TINY, eos_ids=(EOS,), kv_bytes=900 * PER_TOKEN)
    prompts = mixed_prompts(3)
    first = {(c.row, c.sample): c for c in engine.generate(prompts)}
    assert {(c.row, c.sample): c for c in engine.generate(prompts)} == first


def test_the_engine_is_usable_after_a_caller_closes_the_iterator():
    engine = Engine(WEIGHTS["float32"], TINY, eos_ids=(EOS,), kv_bytes=900 * PER_TOKEN)
    prompts = mixed_prompts(3)
    next(iter(engine.generate(prompts)))
    assert engine.arena.free == [(0, engine.arena.n_tokens)]
    assert len({(c.row, c.sample) for c in engine.generate(prompts)}) == sum(p.params.n for p in prompts)


def test_equal_greedy_requests_are_generated_once_and_sampled_ones_each():
    same = [prompt(row, [1, 2, 3], max_tokens=4, n=2) for row in range(3)]
    drawn = [prompt(row, [1, 2, 3], max_tokens=4, temperature=1.0) for row in range(10, 13)]
    engine = Engine(WEIGHTS["float32"], TINY, eos_ids=(), kv_bytes=900 * PER_TOKEN)
    widths = [len(sampled) for _, sampled in engine.steps([*same, *drawn])]
    assert widths == [4, 4, 4, 4]
    completions = run([*same, *drawn])
    assert len({completions[row, sample].token_ids for row in range(3) for sample in range(2)}) == 1
    assert len({completions[row, 0].token_ids for row in (10, 11, 12)}) == 3
    banned = replace(same[0], row=3, bad_words=((completions[0, 0].token_ids[0],),))
    assert run([*same, banned])[3, 0] == run([banned])[3, 0] != replace(completions[0, 0], row=3)


def test_a_shared_prefix_is_read_once():
    stem = list(range(2 * BLOCK))
    prompts = [prompt(row, [*stem, 400 + row], max_tokens=2) for row in range(10)]
    engine = Engine(WEIGHTS["float32"], TINY, eos_ids=(), kv_bytes=9000 * PER_TOKEN)
    rows = []
    embed = engine.forward._embed
    engine.forward._embed = lambda ids, segments, prefills: (
        rows.append(sum(p.n_row for p in prefills)) or embed(ids, segments, prefills)
    )
    assert len(list(engine.generate(prompts))) == 10
    assert sum(rows) == 2 * BLOCK + 10


def test_samples_of_a_prompt_share_its_prefill():
    engine = Engine(WEIGHTS["float32"], TINY, eos_ids=(), kv_bytes=9000 * PER_TOKEN)
    rows = []
    embed = engine.forward._embed
    engine.forward._embed = lambda ids, segments, prefills: (
        rows.append(sum(p.n_row for p in prefills)) or embed(ids, segments, prefills)
    )
    ids = list(range(100))
    assert len(list(engine.generate([prompt(0, ids, max_tokens=3, n=8, temperature=1.0)]))) == 8
    assert sum(rows) == 100


def test_a_free_slot_is_filled_in_the_next_step():
    prompts = [prompt(row, [row], max_tokens=1 + row % 5, ignore_eos=True) for row in range(30)]
    engine = Engine(WEIGHTS["float32"], TINY, eos_ids=(EOS,), kv_bytes=2000 * PER_TOKEN, max_batch=4)
    widths = [len(sampled) for _, sampled in engine.steps(prompts)]
    total = sum(1 + row % 5 for row in range(30))
    assert sum(widths) == total
    assert widths[: total // 4 - 5] == [4] * (total // 4 - 5)


def test_random_numbers_depend_on_seed_row_sample_and_position_alone():
    assert sample_seeds(7, 3, 5)[:2] == sample_seeds(7, 3, 2)
    seeds = {sample_seeds(seed, row, 2)[sample] for seed in range(3) for row in range(50) for sample in range(2)}
    assert len(seeds) == 300
    np.testing.assert_array_equal(uniforms(9, 50)[:10], uniforms(9, 10))


def test_seeds_beyond_32_bits_do_not_collide_and_those_below_stay_as_they_are():
    """SeedSequence cuts numbers into words of 32 bits, and fills up with zeros: both gave pairs with one seed."""
    large = 2**32
    keys = [
        (s, r) for s in (0, 1, 5, large, large + 1, large + 5, 5 * large, large**2 // 2 - 1) for r in (*range(6), large)
    ]
    seeds = [seed for s, r in keys for seed in sample_seeds(s, r, 6)]
    assert len(set(seeds)) == len(keys) * 6
    assert sample_seeds(0, 0, 1) == (7896617691693857887,)
    assert sample_seeds(large - 1, 7, 2) == (474547428913669383, 4010727976949326565)


word = st.integers(0, 2**32 - 1) | st.sampled_from([0, 1, 2**31, 2**32 - 1])
keys = st.just(()) | st.tuples(word, word, word, word)
place = st.tuples(st.integers(0, 2**63 - 1) | word, st.integers(0, 2**40), st.integers(0, 2**20), keys)


def test_the_seeds_of_a_key_do_not_depend_on_the_row():
    key = (1, 2, 3, 2**32 - 1)
    assert sample_seeds(5, 7, 4, key=key) == sample_seeds(5, 2**40, 4, key=key)
    assert sample_seeds(5, 7, 6, key=key)[2:] == sample_seeds(5, 7, 4, first=2, key=key)
    assert sample_seeds(5, 7, 1, key=key) == (736276863265465892,)


@given(place, place)
def test_what_random_numbers_hang_on_is_never_mixed_as_something_else(a, b):
    """SeedSequence fills up to 4 words with zeros, and mixes in every further one."""

    def mixed(place):
        words = _entropy(*place)
        assert all(0 <= number < 2**32 for number in words)
        return (*words, *[0] * (4 - len(words)))

    what = [(seed, key or row, sample) for seed, row, sample, key in (a, b)]
    assert (mixed(a) == mixed(b)) == (what[0] == what[1])


def test_logprobs_are_those_of_the_model_and_end_with_the_completion():
    completion = run([prompt(0, [5, 6], max_tokens=6, temperature=0.5, logprobs=4)])[0, 0]
    ids = [5, 6]
    for token, logprob, top in zip(completion.token_ids, completion.logprobs, completion.top_logprobs, strict=True):
        row = pico.gpt2(ids, **PICO, n_head=TINY.n_head)[-1].astype(np.float64)
        expected = row - row.max() - np.log(np.exp(row - row.max()).sum())
        assert logprob == pytest.approx(expected[token], abs=1e-3)
        assert [i for i, _ in top] == np.argsort(-expected)[:4].tolist()
        ids.append(token)


def test_a_completion_does_not_include_the_token_that_ended_it():
    ids = [1, 2, 3]
    free = run([prompt(0, ids, max_tokens=10, ignore_eos=True)])[0, 0].token_ids
    stopped = run([prompt(0, ids, max_tokens=10, ignore_eos=True, stop_token_ids=(free[4],))])[0, 0]
    first = free.index(free[4])
    assert stopped.token_ids == free[:first]
    assert stopped.finish_reason == "stop"


def test_bad_prompts_and_limits_are_refused_before_any_work():
    engine = Engine(WEIGHTS["float32"], TINY, eos_ids=(EOS,), kv_bytes=900 * PER_TOKEN)
    good = prompt(0, [1])
    for bad, words in [
        (prompt(7, [500]), "row 7: token id 500 is outside the vocabulary of 500"),
        (prompt(7, [-1]), "token id -1 is outside"),
        (prompt(7, []), "at least one"),
        (prompt(7, [1] * 250), "250 prompt tokens . 40 max_tokens"),
        (prompt(7, [1], stop_token_ids=(900,)), "token id 900"),
        (prompt(7, [1], logit_bias=((900, 1.0),)), "token id 900"),
    ]:
        with pytest.raises(UsageError, match=words):
            next(engine.steps([good, bad]))
    with pytest.raises(UsageError, match="too small for one sequence of n_ctx 256.* raise --kv-memory to 1M"):
        Engine(WEIGHTS["float32"], TINY, eos_ids=(EOS,), kv_bytes=10)
    with pytest.raises(UsageError, match="--batch-size 5000 is out of range .1 to 4096"):
        Engine(WEIGHTS["float32"], TINY, eos_ids=(EOS,), kv_bytes=900 * PER_TOKEN, max_batch=5000)


def test_the_budget_in_the_error_suffices(python_names):
    with pytest.raises(UsageError, match="raise kv_bytes to 1M") as error:
        Engine(WEIGHTS["float32"], TINY, eos_ids=(EOS,), kv_bytes=10)
    assert Engine(
        WEIGHTS["float32"], TINY, eos_ids=(EOS,), kv_bytes=int(re.search(r"(\d+) bytes", str(error.value))[1])
    )


def test_no_prompts_give_no_completions():
    assert run([]) == {}


# ---- ends that the caller decides, loops, bad words


def test_a_sequence_ends_with_the_token_at_which_should_stop_says_so():
    prompts = mixed_prompts(7, n=20)
    engine = Engine(WEIGHTS["float32"], TINY, eos_ids=(EOS,), kv_bytes=2000 * PER_TOKEN, max_batch=6)
    asked = []

    def third(sequence: Sequence) -> FinishReason | None:
        asked.append((sequence.prompt.row, sequence.sample, len(sequence.token_ids)))
        return "stop" if len(sequence.token_ids) == 3 else None

    free = run(prompts)
    found = {(c.row, c.sample): c for c in engine.generate(prompts, should_stop=third)}
    assert engine.arena.free == [(0, engine.arena.n_tokens)]
    assert len(asked) == len(set(asked))  # once for each token
    assert found.keys() == free.keys()
    for key, completion in found.items():
        if len(free[key].token_ids) >= 3:
            assert (len(completion.token_ids), completion.finish_reason) == (3, "stop")
            assert completion.logprobs is None or len(completion.logprobs) == len(completion.top_logprobs) == 3
        assert completion.token_ids == free[key].token_ids[:3]


def test_a_stop_at_the_last_token_counts_as_stop_and_not_as_length():
    engine = Engine(WEIGHTS["float32"], TINY, eos_ids=(), kv_bytes=2000 * PER_TOKEN)
    (completion,) = engine.generate([prompt(0, [1], max_tokens=1)], should_stop=lambda sequence: "stop")
    assert (len(completion.token_ids), completion.finish_reason) == (1, "stop")


@given(st.lists(st.integers(0, 2), max_size=100), st.integers(1, 70), st.integers(0, 30))
def test_a_loop_is_a_block_three_times_or_more_and_24_tokens_in_all(start, period, repeats):
    ids = start + [n % 7 for n in range(period)] * repeats
    reference = any(
        ids[-p * times :] == ids[-p:] * times
        for p in range(1, 65)
        for times in [max(3, math.ceil(24 / p))]
        if p * times <= len(ids)
    )
    assert is_loop(ids) == reference
    if period <= 64 and repeats >= 3 and repeats * period >= 24:
        assert is_loop(ids[: len(start) + repeats * period])


@pytest.mark.parametrize("min_tokens", [0, 30])
def test_stop_loops_ends_a_loop_but_not_before_min_tokens(min_tokens):
    looping = {"max_tokens": 50, "ignore_eos": True, "logit_bias": ((7, 100.0),), "min_tokens": min_tokens}
    completions = run([prompt(0, [1], **looping, stop_loops=True), prompt(1, [1], **looping)])
    stopped, free = completions[0, 0], completions[1, 0]
    assert (len(stopped.token_ids), stopped.finish_reason) == (max(24, min_tokens), "repetition")
    assert (len(free.token_ids), free.finish_reason) == (50, "length")


def test_bad_words_are_never_generated():
    free = run([prompt(0, [5, 6], max_tokens=30, ignore_eos=True)])[0, 0].token_ids
    words = ((free[0],), free[3:5], free[10:13])
    for params in ({}, {"temperature": 1.0, "n": 4}):
        one = prompt(0, [5, 6], max_tokens=30, ignore_eos=True, **params)
        for completion in run([replace(one, bad_words=words)]).values():
            ids = (5, 6, *completion.token_ids)
            assert not any(ids[i : i + len(w)] == w for w in words for i in range(1, len(ids)))


def test_prompts_of_one_row_number_their_samples_consecutively():
    params = SamplingParams(max_tokens=4, temperature=1.0, n=2)
    prompts = [Prompt(9, (1, 2, first), params, sample_seeds(params.seed, 9, 2, first), first) for first in (0, 2, 4)]
    completions = run(prompts)
    assert sorted(completions) == [(9, sample) for sample in range(6)]
    assert sample_seeds(3, 9, 6) == sample_seeds(3, 9, 2) + sample_seeds(3, 9, 4, first=2)
    assert len({c.token_ids for c in completions.values()}) == 6


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("precision", get_args(Precision))
def test_a_completion_ends_when_no_token_may_come_next(precision, temperature):
    """Its tokens are allowed and repeat nothing, and there is no allowed token that would repeat nothing after them."""
    for size in (1, 2, 3):
        options = {"allowed_token_ids": (4, 7), "no_repeat_ngram_size": size, "logprobs": 1, "min_tokens": 30}
        prompts = [prompt(row, [row + 9, 4], max_tokens=40, temperature=temperature, **options) for row in range(5)]
        for one in run(prompts, precision=precision).values():
            context = [one.row + 9, 4, *one.token_ids]
            ngrams = [tuple(context[at : at + size]) for at in range(len(context) - size + 1)]
            next_ones = [(*context[len(context) - size + 1 :], token) for token in (4, 7)]
            assert {*one.token_ids} <= {4, 7}
            assert one.finish_reason == "blocked"
            assert len(one.token_ids) == len(one.logprobs) == len(one.top_logprobs)
            assert len({*ngrams}) == len(ngrams)
            assert {*next_ones} <= {*ngrams}


# ---- samples that an older run has begun


def begun_with(completion: Completion, n: int) -> Begun:
    """The sample from its first n tokens on."""
    return Begun(completion.sample, completion.token_ids[:n])


def most_begun(completion: Completion, max_tokens: int) -> int:
    """A token that ends a sample is not in it, so all of the others may be begun with."""
    n = len(completion.token_ids)
    return n if completion.finish_reason == "stop" and n < max_tokens else n - 1


def demanding_prompts(seed: int, n: int) -> list[Prompt]:
    """mixed_prompts with bad words, loops, log-probabilities of prompts, and prompts that are only read."""
    looping = {"ignore_eos": True, "stop_loops": True, "logit_bias": ((7, 60.0), (9, 60.0)), "min_tokens": 30}
    prompts = [
        *mixed_prompts(seed, n),
        *(prompt(n + at, [1, 2, at], max_tokens=50, temperature=t, **looping) for at, t in enumerate((0, 0, 0.5))),
        prompt(n + 3, [5, 6], max_tokens=0, prompt_logprobs=1, n=2),
    ]
    rng = random.Random(seed)
    for at, p in enumerate(prompts):
        scored = None if p.row % 4 and p.params.max_tokens else rng.choice([1, len(p.token_ids)])
        params = replace(p.params, logprobs=rng.choice([None, 0, 3]), prompt_logprobs=rng.choice([0, 2]))
        words = ((p.token_ids[0],), (5, 6)) if p.row % 5 == 1 else ()
        prompts[at] = replace(p, params=params, scored=scored, bad_words=words)
    return prompts


@pytest.mark.parametrize("precision", get_args(Precision))
@settings(max_examples=10, deadline=None)
@given(
    st.integers(0, 1000),
    st.integers(1, 60),
    st.booleans(),
    st.sampled_from([320, 700, 20_000]),
    st.sampled_from([7, 100, MAX_ROWS]),
    st.randoms(),
)
def test_a_sample_goes_on_from_any_of_its_tokens_as_if_it_had_never_stopped(
    precision, seed, batch, share, room, rows, rng
):
    """The same tokens, log-probabilities and ends, bit for bit; and of the samples that are not asked for, nothing."""
    prompts = demanding_prompts(seed, n=18)
    whole = run(prompts, precision=precision)
    asked, expected = [], {}
    for p in prompts:
        keys = [(p.row, sample) for sample in range(p.params.n)]
        chosen = rng.sample(keys, rng.randint(0, len(keys)))
        most = {key: most_begun(whole[key], p.params.max_tokens) for key in chosen}
        begun = [begun_with(whole[key], rng.choice([0, n, rng.randint(0, max(n, 0))])) for key, n in most.items()]
        asked.append(replace(p, begun=tuple(begun)))
        expected |= {key: whole[key] for key in chosen}
    rng.shuffle(asked)
    assert run(asked, room, precision, rows, max_batch=batch, share_prefixes=share) == expected


def test_only_new_tokens_are_work():
    """What is begun is read with the prompt, in one pass; the blocks in which samples begin alike, once."""
    engine = Engine(WEIGHTS["float32"], TINY, eos_ids=(), kv_bytes=20_000 * PER_TOKEN)
    one = prompt(0, list(range(70)), max_tokens=30, temperature=1.0, n=3)
    whole = list(engine.generate([one]))
    before = replace(engine.work)
    begun = [begun_with(completion, n) for completion, n in zip(whole, (29, 20, 0), strict=True)]
    list(engine.generate([replace(one, begun=tuple(begun))]))
    assert engine.work.max_tokens - before.max_tokens == engine.work.generated - before.generated == 1 + 10 + 30
    assert engine.work.finished_tokens == engine.work.generated
    assert engine.work.read - before.read == BLOCK + 3 * (70 - BLOCK) + 29 + 20
    assert engine.work.steps - before.steps == 30


def test_equal_greedy_requests_are_one_only_if_they_are_equally_far():
    engine = Engine(WEIGHTS["float32"], TINY, eos_ids=(), kv_bytes=900 * PER_TOKEN)
    same = [prompt(row, [1, 2, 3], max_tokens=4, n=2) for row in range(3)]
    ids = next(iter(engine.generate(same))).token_ids
    far = [Begun(0, ids[:2]), Begun(1, ids[:1])]
    asked = [replace(one, begun=(far[at == 2], replace(far[0], sample=1))) for at, one in enumerate(same)]
    asked[2] = replace(asked[2], begun=(replace(far[1], sample=0), replace(far[0], sample=1)))
    assert [len(sampled) for _, sampled in engine.steps(asked)] == [2, 2, 1]
    assert {(c.row, c.sample, c.token_ids) for c in engine.generate(asked)} == {
        (row, sample, ids) for row in range(3) for sample in range(2)
    }


@pytest.mark.parametrize(
    ("begun", "words"),
    [
        (Begun(3, ()), r"row 7, sample 3: is none of its samples 1 to 2"),
        (Begun(1, (1, 2, 3, 4)), "sample 1: begins with 4 tokens, and max_tokens 4 leaves none to generate"),
        (Begun(1, (500,)), "token id 500 is outside the vocabulary of 500"),
    ],
)
def test_what_no_sample_can_have_begun_with_is_refused(begun, words):
    engine = Engine(WEIGHTS["float32"], TINY, eos_ids=(EOS,), kv_bytes=900 * PER_TOKEN)
    one = replace(prompt(7, [1], max_tokens=4, n=2, logprobs=0), first_sample=1)
    with pytest.raises(UsageError, match=words):
        next(engine.steps([replace(one, begun=(begun,))]))
