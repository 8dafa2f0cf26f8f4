"""engine/beams.py: what transformers and a plain float64 search find; in every batch, with blocks that are shared."""

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchgen.engine.beams import Blocks, power
from batchgen.engine.engine import Engine
from batchgen.engine.limits import beam_tokens_needed, kv_bytes_per_token, search_tokens_needed
from batchgen.engine.sequence import Completion, Prompt, Sequence
from batchgen.errors import UsageError
from batchgen.gpt2.config import GPT2Config
from batchgen.gpt2.forward import Forward, Prefill
from batchgen.gpt2.kv_cache import BLOCK, KVArena
from batchgen.gpt2.params import nest
from batchgen.gpt2.weights import pack
from batchgen.types import Begun, Precision, SamplingParams
from tests.support import reference
from tests.support.beams import Rules, every_completion, search
from tests.support.models import BYTES, TINY, sharp_tensors
from tests.test_engine import EOS, mixed_prompts, prompt, run

CASES = json.loads(Path(__file__).with_name("cases").joinpath("beams.json").read_text())
SMALL = GPT2Config(n_vocab=4, n_ctx=32, n_embd=8, n_head=2, n_layer=1)
MODELS = {"tiny": (TINY, sharp_tensors(TINY, 1)), "bytes": (BYTES, sharp_tensors(BYTES, 2))}
MARGIN = 1e-4

small_seeds = st.integers(0, 10**6)
penalties = st.sampled_from([1.0, 0.0, -1.0, 0.6, 2.0])
early = st.sampled_from(["false", "true", "never"])


@lru_cache
def engine_of(name: str) -> Engine:
    config, tensors = MODELS[name]
    weights = pack(nest(tensors, config.n_layer))
    return Engine(weights, config, eos_ids=(), kv_bytes=3000 * kv_bytes_per_token(config, "float32"))


def find(engine: Engine, prompts: list[Prompt]) -> list[Completion]:
    """All completions, by row and sample; nothing stays in the arena."""
    found = sorted(engine.generate(prompts), key=lambda one: (one.row, one.sample))
    assert engine.arena.free == [(0, engine.arena.n_tokens)]
    return found


def rules_of(params: SamplingParams, stops: tuple[int, ...] = ()) -> Rules:
    stops = (*params.stop_token_ids, *stops)
    return Rules(params.num_beams, params.max_tokens, stops, params.length_penalty, params.early_stopping)


def agree(found: list[Completion], expected: list[Any], stops: tuple[int, ...]) -> None:
    assert [one.token_ids for one in found] == [
        tuple(ids[:-1]) if ids[-1] in stops else tuple(ids) for _, ids in expected
    ]
    scores = [score for score, _ in expected]
    assert [one.beam_score for one in found] == pytest.approx(scores, rel=1e-5, abs=1e-5)


# ---- what is found


@pytest.mark.parametrize("case", CASES["cases"])
def test_completions_and_scores_are_those_of_transformers(case):
    params = SamplingParams(**case["params"])
    words = tuple(map(tuple, case["bad_words"]))
    one = Prompt(0, tuple(case["prompt"]), params, (0,) * params.n, bad_words=words)
    agree(find(engine_of(case["model"]), [one]), case["found"], params.stop_token_ids)


@settings(max_examples=40, deadline=None)
@given(small_seeds, st.integers(2, 4), st.integers(1, 6), st.integers(0, 2), penalties, early)
def test_a_search_finds_what_a_plain_one_in_float64_finds(seed, num_beams, max_tokens, n_stop, penalty, early):
    config = replace(SMALL, n_vocab=7)
    tensors = sharp_tensors(config, seed)
    rng = np.random.default_rng(seed)
    ids = tuple(rng.integers(0, config.n_vocab, 3).tolist())
    params = SamplingParams(
        num_beams=num_beams,
        n=num_beams,
        max_tokens=max_tokens,
        length_penalty=penalty,
        early_stopping=early,
        stop_token_ids=tuple(range(n_stop)),
    )

    def next_logprobs(new: tuple[int, ...]) -> Any:
        row = reference.logits([*ids, *new], tensors, config.n_head)[-1]
        return row - row.max() - np.log(np.exp(row - row.max()).sum())

    expected, margin = search(next_logprobs, rules_of(params))
    engine = Engine(pack(nest(tensors, 1)), config, eos_ids=(), kv_bytes=2**20)
    if margin > MARGIN:
        agree(find(engine, [Prompt(0, ids, params, (0,) * num_beams)]), expected, params.stop_token_ids)


@settings(max_examples=15, deadline=None)
@given(small_seeds, st.integers(1, 3), st.booleans())
def test_as_many_beams_as_there_are_completions_find_the_best_of_all(seed, max_tokens, stops):
    tensors = sharp_tensors(SMALL, seed)
    engine = Engine(pack(nest(tensors, 1)), SMALL, eos_ids=(0,) if stops else (), kv_bytes=2**20)

    def next_logprobs(new: tuple[int, ...]) -> Any:
        row = reference.logits([1, *new], tensors, SMALL.n_head)[-1]
        return row - row.max() - np.log(np.exp(row - row.max()).sum())

    every = every_completion(next_logprobs, SMALL.n_vocab, max_tokens, engine.eos_ids)[:4]
    if min(-np.diff([total for total, _ in every])) > MARGIN:
        num_beams = SMALL.n_vocab**max_tokens
        params = {"length_penalty": 0.0, "early_stopping": "never", "max_tokens": max_tokens, "n": len(every)}
        agree(find(engine, [prompt(0, [1], num_beams=num_beams, **params)]), every, engine.eos_ids)


def test_one_beam_is_greedy():
    ids = list(range(20))
    greedy = run([prompt(0, ids, max_tokens=30)])
    assert run([prompt(0, ids, max_tokens=30, num_beams=1, length_penalty=2.0, early_stopping=True)]) == greedy
    assert greedy[0, 0].beam_score is None


def test_the_power_of_a_length_is_that_of_python():
    for length in (1, 7, 1024):
        for penalty in (-10.0, -1.0, 0.0, 0.3, 1.0, 2.5, 10.0):
            assert power(length, penalty) == pytest.approx(length**penalty, rel=1e-15)


# ---- in every batch


def beam_prompts(seed: int, n: int = 16) -> list[Prompt]:
    """Searches of every kind among other prompts; some begin alike, some are equal."""
    kinds = [
        {"num_beams": 3, "n": 2, "logprobs": 2},
        {"num_beams": 2, "length_penalty": 0.0, "early_stopping": True, "stop_token_ids": (3, 4, 5)},
        {"num_beams": 6, "n": 6, "repetition_penalty": 1.3, "prompt_logprobs": 1, "stop_loops": True},
    ]
    found = []
    for one in mixed_prompts(seed, n):
        params = SamplingParams(max_tokens=one.params.max_tokens, **kinds[one.row % 3])
        searched = Prompt(one.row, one.token_ids, params, (0,) * params.n, scored=1 if one.row % 3 == 2 else None)
        found.append(one if one.row % 4 == 0 else searched)
    return found


@pytest.mark.parametrize("precision", get_args(Precision))
@settings(max_examples=8, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 40), st.booleans(), st.sampled_from([2000, 20_000]), st.randoms())
def test_a_search_does_not_depend_on_its_batch(precision, seed, max_batch, share_prefixes, tokens, shuffler):
    prompts = beam_prompts(seed)
    expected = run(prompts, precision=precision)
    shuffled = list(prompts)
    shuffler.shuffle(shuffled)
    assert run(shuffled, tokens, precision, max_batch=max_batch, share_prefixes=share_prefixes) == expected
    assert run(shuffled, tokens, precision, rows=64, max_batch=max_batch) == expected


@pytest.mark.parametrize("n_prompt", [1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 7])
def test_a_search_over_several_blocks_finds_what_one_without_a_cache_finds(n_prompt):
    engine = engine_of("tiny")
    ids = tuple(np.random.default_rng(n_prompt).integers(0, EOS, n_prompt).tolist())
    params = SamplingParams(num_beams=4, n=4, max_tokens=BLOCK + 9)
    arena, forward = KVArena(TINY, 256), Forward(engine.forward.weights, TINY, 256, 1)

    @lru_cache(None)
    def next_logprobs(new: tuple[int, ...]) -> Any:
        arena.clear()
        segment = arena.allocate(256, 0)
        row = forward(prefills=[Prefill(segment, (*ids, *new), 1)])[0].astype(np.float64)
        return row - row.max() - np.log(np.exp(row - row.max()).sum())

    expected, margin = search(next_logprobs, rules_of(params))
    assert margin > 1e-6
    agree(find(engine, [Prompt(0, ids, params, (0,) * 4)]), expected, ())


def test_equal_searches_are_done_once():
    same = [prompt(row, [1, 2, 3], max_tokens=4, num_beams=3, n=3) for row in range(3)]
    engine = engine_of("tiny")
    before = engine.work.generated
    found = find(engine, same)
    assert engine.work.generated - before == 12
    assert [replace(one, row=0) for one in found[3:6]] == found[:3]
    assert [(one.row, one.sample) for one in found] == [(row, sample) for row in range(3) for sample in range(3)]
    assert [one.beam_score for one in found[:3]] == sorted((one.beam_score for one in found[:3]), reverse=True)


def test_the_work_of_searches_is_num_beams_sequences():
    engine = Engine(pack(nest(MODELS["tiny"][1], TINY.n_layer)), TINY, eos_ids=(EOS,), kv_bytes=2**25)
    for _ in engine.steps([one for one in beam_prompts(3) if one.params.searches]):
        work = engine.work
        assert work.started - work.finished <= work.batch
        assert work.finished <= work.started <= work.sequences
        assert work.finished_tokens <= work.generated <= work.max_tokens
    assert engine.work.started == engine.work.finished == engine.work.ended == engine.work.sequences
    assert engine.work.finished_tokens == engine.work.ended_tokens == engine.work.generated
    assert engine.work.read == engine.work.prompt_tokens


def test_a_step_names_a_row_for_each_completion_that_its_search_returns():
    asked = prompt(7, [1, 2, 3], max_tokens=5, num_beams=4, n=2)
    named: list[list[int]] = []
    [*engine_of("tiny").generate([asked], lambda _starting, running, _reading: named.append(running))]
    assert named == [[], *[[7, 7]] * 4]


def test_an_abandoned_search_leaves_nothing_in_the_arena():
    engine = engine_of("tiny")
    steps = engine.steps(beam_prompts(1))
    for _ in range(5):
        next(steps)
    steps.close()
    assert engine.arena.free == [(0, engine.arena.n_tokens)]


# ---- memory


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 150), st.integers(1, 90), st.randoms(use_true_random=False))
def test_beams_share_what_they_have_in_common_and_write_to_no_block_of_another(width, n_prompt, n_steps, rng):
    """Each position of a beam holds what its own past wrote there; unused blocks are free, and all are at the end."""
    config = GPT2Config(n_vocab=9, n_ctx=512, n_embd=1, n_head=1, n_layer=1)
    n_tail = (n_prompt - 1) % BLOCK + 1
    arena = KVArena(config, beam_tokens_needed(n_prompt, n_steps, width))
    room = arena.allocate(beam_tokens_needed(n_prompt, n_steps, width), n_prompt - n_tail)
    blocks = Blocks(arena, room)
    every = len(blocks.free)

    def beam(segment: Any) -> Sequence:
        params = SamplingParams(num_beams=max(width, 2), max_tokens=n_steps)
        return Sequence(Prompt(0, (1,), params, (0,)), 0, 0, segment=segment)

    def value(segment: Any, at: int) -> float:
        return float(arena.memory[segment.base + BLOCK + at])  # the values of one head follow the keys

    def write(segment: Any, number: float) -> None:
        arena.memory[segment.base + segment.length] = number
        arena.memory[segment.base + BLOCK + segment.length] = number
        segment.length += 1

    beams = [beam(blocks.take(n_prompt - n_tail, None))]
    pasts: list[list[float]] = [[float(i) for i in range(n_tail)]]
    for number in pasts[0]:
        write(beams[0].segment, number)
    for step in range(n_steps):
        chosen = [rng.randrange(len(beams)) for _ in range(width)]
        children = [beam(beams[at].segment) for at in chosen]
        pasts = [[*pasts[at], 1000.0 * (step + 1) + number] for number, at in enumerate(chosen)]
        blocks.move(beams, children)
        beams = children
        for one, past in zip(beams, pasts, strict=True):
            write(one.segment, past[-1])
        for one, past in zip(beams, pasts, strict=True):
            assert [value(part, at) for part in one.segment.path for at in range(part.length)] == past
        used = {part for one in beams for part in one.segment.path}
        assert used == blocks.users.keys()
        assert len({one.segment for one in beams}) == width
        assert len(blocks.free) == every - len(used)
        assert sum(blocks.users.values()) == width + sum(part.parent is not None for part in used)
    blocks.move(beams, [])
    assert sorted(blocks.free) == [*range(every)]
    assert not blocks.users


def test_a_search_needs_memory_for_all_of_its_beams_and_says_so():
    config, tensors = MODELS["tiny"]
    weights, per_token = pack(nest(tensors, config.n_layer)), kv_bytes_per_token(config, "float32")
    asked = prompt(0, list(range(100)), max_tokens=100, num_beams=5)
    needed = search_tokens_needed(100, 100, 5)
    enough = Engine(weights, config, eos_ids=(), kv_bytes=needed * per_token, max_batch=1, share_prefixes=False)
    assert len(find(enough, [asked])) == 1
    small = Engine(weights, config, eos_ids=(), kv_bytes=(needed - 16) * per_token)
    with pytest.raises(UsageError, match=r"row 0: num_beams 5 needs .* 1,088 tokens at once, .*; lower num_beams or"):
        next(small.steps([asked]))


# ---- with other parameters


class EvenGuide:
    """Even tokens alone; the fifth one completes the text."""

    def __init__(self, taken: tuple[int, ...] = ()) -> None:
        self.taken = taken

    def allowed(self) -> Any:
        return np.full(-(-TINY.n_vocab // 32), 0x55555555, np.uint32)

    def advance(self, token: int) -> bool:
        self.taken = (*self.taken, token)
        return len(self.taken) == 5

    def copy(self) -> "EvenGuide":
        return type(self)(self.taken)


def test_each_beam_has_a_guide_of_its_own():
    asked = replace(prompt(0, [1, 2, 3], max_tokens=9, num_beams=4, n=4), make_guide=EvenGuide)
    found = find(engine_of("tiny"), [asked])
    assert len({one.token_ids for one in found}) == 4
    for one in found:
        assert len(one.token_ids) == 5
        assert all(token % 2 == 0 for token in one.token_ids)
        assert one.finish_reason == "stop"


class NoGuide(EvenGuide):
    """Only token 2, then the end: one completion."""

    def allowed(self) -> Any:
        mask = np.zeros(-(-TINY.n_vocab // 32), np.uint32)
        mask[0] = 4
        return mask


def test_a_search_returns_no_more_than_there_is():
    asked = replace(prompt(0, [1, 2, 3], max_tokens=9, num_beams=4, n=4), make_guide=NoGuide)
    assert [one.token_ids for one in find(engine_of("tiny"), [asked])] == [(2,) * 5]


def test_a_beam_after_which_no_token_may_come_is_complete():
    """As a greedy sequence is; its score has no token more."""
    options = {"max_tokens": 9, "allowed_token_ids": (4, 7), "no_repeat_ngram_size": 1, "logprobs": 0}
    found = find(engine_of("tiny"), [prompt(0, [1, 2], num_beams=3, n=2, **options), prompt(1, [4, 7], num_beams=3)])
    first, second, other = found
    assert ({first.token_ids, second.token_ids}, other.finish_reason) == ({(4, 7), (7, 4)}, "length")
    for one in (first, second):
        assert one.finish_reason == "blocked"
        assert one.beam_score == pytest.approx(sum(one.logprobs) / 2, rel=1e-6)
    [empty] = find(engine_of("tiny"), [prompt(1, [4, 7], num_beams=3, **options)])
    assert (empty.token_ids, empty.finish_reason, empty.beam_score) == ((), "blocked", 0.0)


def test_log_probabilities_are_those_of_reading_the_completion():
    """Of the model itself, whatever changes the search; so are the prompt's."""
    engine, ids = engine_of("tiny"), [*range(70)]
    asked = prompt(0, ids, max_tokens=30, num_beams=4, n=4, logprobs=2, prompt_logprobs=0, repetition_penalty=1.5)
    for one in find(engine, [replace(asked, scored=1)]):
        whole = (*ids, *one.token_ids)
        reading = Prompt(0, whole, SamplingParams(max_tokens=0, prompt_logprobs=2), (0,), scored=1)
        [read] = find(engine, [reading])
        assert read.prompt_logprobs == (*one.prompt_logprobs, *one.logprobs)
        assert one.top_logprobs == read.prompt_top_logprobs[-30:]


def test_a_search_ends_at_what_a_caller_stops():
    """As at a stop token, but for the token: it stays, and counts."""
    engine = engine_of("tiny")
    plain = prompt(0, [1, 2, 3], max_tokens=12, num_beams=4, n=4, length_penalty=0.0)
    stops = tuple({one.token_ids[5] for one in find(engine, [plain])})
    expected = find(engine, [replace(plain, params=replace(plain.params, stop_token_ids=stops))])
    assert any(one.finish_reason == "stop" for one in expected)
    found = list(engine.generate([plain], None, lambda one: "stop" if one.token_ids[-1] in stops else None))
    cut = [one.token_ids[:-1] if one.finish_reason == "stop" else one.token_ids for one in found]
    assert cut == [one.token_ids for one in expected]
    assert [one.beam_score for one in found] == [one.beam_score for one in expected]


def test_nothing_is_searched_if_nothing_is_generated():
    asked = prompt(0, [1, 2, 3], max_tokens=0, num_beams=4, n=2, prompt_logprobs=0)
    found = find(engine_of("tiny"), [replace(asked, scored=1)])
    assert [(one.sample, one.token_ids, one.beam_score) for one in found] == [(0, (), None), (1, (), None)]


def test_a_search_continues_no_begun_samples():
    asked = replace(prompt(0, [1], max_tokens=4, num_beams=4), begun=(Begun(0, (1,)),))
    with pytest.raises(UsageError, match=r"row 0: beam search \(num_beams 4\) continues no begun samples"):
        next(engine_of("tiny").steps([asked]))
