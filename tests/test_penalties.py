"""engine/penalties.py and its kernels in repeats.py: each parameter by its definition and by its peer's own code."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchgen.engine.draw import LOWEST
from batchgen.engine.penalties import penalise
from batchgen.engine.repeats import ban_repeated
from batchgen.engine.sequence import make_breakers
from tests.test_sampler import sequence

PEER = json.loads((Path(__file__).parent / "cases" / "dry_llama_cpp.json").read_text(encoding="utf-8"))


def test_penalties_follow_their_papers():
    logits = np.array([2.0, -1.0, 0.5, 3.0, 1.0], np.float32)
    base = {"token_ids": (1, 1, 3), "prompt_ids": (0, 3)}
    row = logits.copy()
    penalise(row, sequence(repetition_penalty=2.0, **base), None)
    assert row.tolist() == [1.0, -2.0, 0.5, 1.5, 1.0]
    row = logits.copy()
    penalise(row, sequence(presence_penalty=0.5, frequency_penalty=0.25, **base), None)
    assert row.tolist() == [2.0, -2.0, 0.5, 2.25, 1.0]
    row = logits.copy()
    penalise(row, sequence(logit_bias=((2, 10.0), (0, -1.0)), **base), None)
    assert row.tolist() == [1.0, -1.0, 10.5, 3.0, 1.0]


def work_in_order(logits, one, eos_ids, order):
    """The logits after these steps, token by token in plain Python, each as the paper or the API words it."""
    p, seen = one.params, {*one.prompt.token_ids, *one.token_ids}
    context, generated = [*one.prompt.token_ids, *one.token_ids], one.token_ids
    ending = {*p.stop_token_ids, *eos_ids} if len(generated) < p.min_tokens else set()
    steps = {
        "bias": lambda x, t: x + dict(p.logit_bias).get(t, 0.0),
        "repetition": lambda x, t: (
            (x / p.repetition_penalty if x > 0 else x * p.repetition_penalty) if t in seen else x
        ),
        "frequency": lambda x, t: x - p.frequency_penalty * generated.count(t),
        "presence": lambda x, t: x - p.presence_penalty * (t in generated),
        "bad words": lambda x, t: -np.inf if any([*context, t][-len(w) :] == [*w] for w in one.prompt.bad_words) else x,
        "repeated n-grams": lambda x, t: -np.inf if t in banned_by_definition(context, p.no_repeat_ngram_size) else x,
        "allowed": lambda x, t: x if t in (p.allowed_token_ids or range(7)) else -np.inf,
        "min tokens": lambda x, t: -np.inf if t in ending else x,
    }
    row = [float(x) for x in logits]
    for step in order:
        row = [steps[step](x, token) for token, x in enumerate(row)]
    return row


VLLM = ("allowed", "bad words", "min tokens", "bias", "repetition", "frequency", "presence")  # v1/sample/sampler.py
TRANSFORMERS = (
    "bias",
    "repetition",
    "repeated n-grams",
    "bad words",
    "min tokens",
)  # GenerationMixin._get_logits_processor

_tokens = st.lists(st.integers(0, 6), max_size=5).map(tuple)


@given(
    logits=st.lists(st.floats(-8, 8, width=32), min_size=7, max_size=7),
    texts=st.tuples(_tokens.filter(len), _tokens),
    bias=st.dictionaries(st.integers(0, 6), st.floats(-9, 9, width=32), max_size=4),
    factors=st.tuples(st.floats(0.5, 2), *[st.sampled_from([0.0, -1.5, 0.25])] * 2),
    words=st.lists(_tokens.filter(len), max_size=2),
    min_tokens=st.integers(0, 4),
    size=st.integers(0, 3),
    ids=st.lists(st.integers(0, 6), max_size=5).map(tuple),
)
def test_bias_and_penalties_are_in_the_order_of_vllm_and_of_transformers(
    logits, texts, bias, factors, words, min_tokens, size, ids
):
    names = ("repetition_penalty", "frequency_penalty", "presence_penalty")
    given = dict(zip(names, factors, strict=True)) | {"logit_bias": bias, "min_tokens": min_tokens}
    if factors[1:] == (0.0, 0.0):  # transformers has no such penalties
        assert_order(logits, texts, words, TRANSFORMERS, no_repeat_ngram_size=size, **given)
    assert_order(logits, texts, words, VLLM, allowed_token_ids=ids, **given)


def assert_order(logits, texts, words, order, **given):
    one = sequence(prompt_ids=texts[0], token_ids=texts[1], stop_token_ids=(5,), **given)
    one.prompt = replace(one.prompt, bad_words=tuple(words))
    row = np.array(logits, np.float32)
    penalise(row, one, (6,))
    np.testing.assert_allclose(row, work_in_order(logits, one, (6,), order), rtol=1e-5, atol=1e-5)


def test_min_tokens_forbids_every_way_to_stop():
    row = np.zeros(5, np.float32)
    penalise(row, sequence(min_tokens=3, stop_token_ids=(1,), token_ids=(0, 0)), eos_ids=(4,))
    assert np.isneginf(row).tolist() == [False, True, False, False, True]
    row = np.zeros(5, np.float32)
    penalise(row, sequence(min_tokens=2, stop_token_ids=(1,), token_ids=(0, 0)), eos_ids=(4,))
    assert not np.isneginf(row).any()


@given(st.lists(st.integers(0, 3), max_size=6), st.lists(st.integers(0, 3), max_size=6), st.data())
def test_no_bad_word_is_ever_completed(prompt_ids, token_ids, data):
    """As in transformers' NoBadWordsLogitsProcessor: a word's last token is forbidden after the rest of the word."""
    word = st.lists(st.integers(0, 3), min_size=1, max_size=4).map(tuple)
    words = data.draw(st.lists(word, max_size=4))
    one = sequence(prompt_ids=tuple([0, *prompt_ids]), token_ids=token_ids)
    one.prompt = replace(one.prompt, bad_words=tuple(words))
    row = np.zeros(4, np.float32)
    penalise(row, one, None)
    context = [0, *prompt_ids, *token_ids]
    forbidden = {token for token in range(4) for w in words if [*context, token][-len(w) :] == list(w)}
    assert set(np.flatnonzero(np.isneginf(row)).tolist()) == forbidden


# ---- repetitions

# tokens with many repetitions: a few blocks, again and again
_history = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=5), min_size=1, max_size=3).flatmap(
    lambda blocks: st.lists(st.sampled_from(blocks), min_size=1, max_size=12).map(lambda some: sum(some, []))
)


def banned_by_definition(context, size):
    """The tokens that complete `size` tokens in a row which are in the context already."""
    rows = [context[at : at + size] for at in range(len(context) - size + 1)] if size else []
    return {row[-1] for row in rows if len(context) >= size - 1 and row[:-1] == context[len(context) - size + 1 :]}


@given(_history, st.integers(1, 12), st.integers(0, 8))
def test_no_tokens_in_a_row_occur_twice(context, size, n_prompt):
    row = np.zeros(5, np.float32)
    prompt_ids, token_ids = context[: n_prompt + 1], context[n_prompt + 1 :]
    penalise(row, sequence(prompt_ids=prompt_ids, token_ids=token_ids, no_repeat_ngram_size=size), ())
    assert set(np.flatnonzero(np.isneginf(row)).tolist()) == banned_by_definition(context, size)


@given(_history, st.integers(1, 12))
def test_repeated_ngrams_are_those_of_transformers(context, size):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    theirs = transformers.NoRepeatNGramLogitsProcessor(size)(torch.tensor([context]), torch.zeros(1, 5))[0].numpy()
    row = np.zeros(5, np.float32)
    ban_repeated(row, np.array(context, np.int32), size)
    assert row.tolist() == theirs.tolist()


def since_break(context, breakers):
    """How many tokens follow the breaker that begins last; of several, the longest."""
    for at in reversed(range(len(context))):
        if lengths := [len(one) for one in breakers if context[at : at + len(one)] == list(one)]:
            return len(context) - at - max(lengths)
    return len(context)


def lowered_by_definition(logits, context, breakers, p):
    """DRY in plain Python: for each token, the longest repetition that it goes on with."""
    row, limit = [float(x) for x in logits], since_break(context, breakers)
    for token in set(context) - {one[0] for one in breakers if len(one) == 1}:
        lengths = [0]
        for at in [i for i, other in enumerate(context) if other == token and i]:
            same = [n for n in range(min(at, limit) + 1) if context[at - n : at] == context[len(context) - n :]]
            lengths.append(max(same))
        occurs = token in context[1:]
        if occurs and max(lengths) >= p.dry_allowed_length and limit >= p.dry_allowed_length:
            row[token] -= p.dry_multiplier * p.dry_base ** (max(lengths) - p.dry_allowed_length)
    return row


def after_dry(logits, context, breakers, **params):
    one = sequence(prompt_ids=context[:3], token_ids=context[3:], **params)
    one.prompt = replace(one.prompt, breakers=make_breakers(tuple(map(tuple, breakers))))
    row = np.array(logits, np.float32)
    penalise(row, one, ())
    return row, one.params


@given(
    _history,
    st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=3), max_size=2),
    st.sampled_from([0.25, 0.8, 5.0]),
    st.sampled_from([1.0, 1.25, 1.75]),
    st.integers(0, 5),
    st.sampled_from([1, 31, 40]),
)
def test_dry_lowers_what_goes_on_with_a_repetition(context, breakers, multiplier, base, allowed, scale):
    """Also of tokens above those of all breakers, and in other words of a mask."""
    context, breakers = ([scale * x for x in context], [[scale * x for x in one] for one in breakers])
    given = {"dry_multiplier": multiplier, "dry_base": base, "dry_allowed_length": allowed}
    logits = np.zeros(4 * scale + 1)
    row, p = after_dry(logits, context, breakers, **given)
    np.testing.assert_allclose(row, lowered_by_definition(logits, context, breakers, p), rtol=1e-6)


@pytest.mark.parametrize("case", PEER["dry"])
def test_dry_is_that_of_llama_cpp(case):
    given = {f"dry_{name}": case[name] for name in ("multiplier", "base")}
    row, _ = after_dry(case["logits"], case["context"], case["breakers"], dry_allowed_length=case["allowed"], **given)
    np.testing.assert_allclose(row, np.array(case["lowered"], np.float32), rtol=1e-6)


@pytest.mark.parametrize("allowed", [0, 2, 1000])
@pytest.mark.parametrize("base", [1.0, 1.000001, 1.75, 100.0])
@pytest.mark.parametrize("logits", [(0.0, 1.0), (np.inf, 1.0), (-np.inf, 1.0), (LOWEST, 1.0), (1e38, -1e38)])
def test_no_repetition_is_too_long_to_be_lowered(logits, base, allowed):
    """1000 equal tokens: the lowered logit is a number, and only what was banned is banned."""
    given = {"dry_multiplier": 100.0, "dry_base": base, "dry_allowed_length": allowed, "max_tokens": 2000}
    row, _ = after_dry(logits, [0] * 1000, [], **given)
    assert row[1] == np.float32(logits[1])
    assert not np.isnan(row).any()
    assert np.isneginf(row).tolist() == np.isneginf(np.array(logits)).tolist()
    assert row[0] < logits[0] or allowed == 1000 or np.isinf(logits[0]) or abs(logits[0]) > 1e37


# ---- allowed tokens


@given(st.sets(st.integers(0, 99), min_size=1), st.integers(100, 140))
def test_every_token_that_is_not_allowed_is_banned(ids, n_vocab):
    row = np.zeros(n_vocab, np.float32)
    penalise(row, sequence(allowed_token_ids=tuple(ids)), ())
    assert set(np.flatnonzero(row == 0).tolist()) == ids
