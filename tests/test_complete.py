"""complete.py: what a row asks of a prompt's tokens reaches the engine, and its answer the row."""

import random
from dataclasses import replace
from math import fsum
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchgen.engine.engine import Engine
from batchgen.engine.sequence import Prompt
from batchgen.errors import UsageError
from batchgen.input.validation import make_check
from batchgen.job import Policy, ScoreOptions, SeedBy
from batchgen.models.model import Model
from batchgen.text.tokenizer import Tokenizer
from batchgen.types import (
    MEASURED,
    READING,
    Begun,
    Chunk,
    OutputRow,
    Passage,
    Request,
    SamplingParams,
    ScoreRow,
    TokenizedRequest,
)
from batchgen.workers import complete as complete_module
from batchgen.workers.complete import complete_chunk, map_engine, mean_logprob, repetition, to_prompts
from batchgen.workers.marker import RECORD, Marker
from batchgen.workers.tasks import rows_of_chunk
from tests.support.models import write_byte_model

PARAMS = SamplingParams(max_tokens=7, logprobs=2, prompt_logprobs=2, ignore_eos=True)
IDS = [tuple(text.encode()) for text in ("Once upon a time", "Once upon a hill", "Once", "é", "The king, the queen")]


@pytest.fixture(scope="module", params=["float32", "int8"])
def parts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Tokenizer]:
    model = Model.open(str(write_byte_model(tmp_path_factory.mktemp("models") / "bytes")), request.param)
    return model, model.load_tokenizer()


def items(ids: list[tuple[int, ...]], params: SamplingParams, **changes: Any) -> tuple[TokenizedRequest, ...]:
    one = TokenizedRequest(0, "p:1", None, "", (), params, given_as_ids=True)
    return tuple(replace(one, row=row, prompt_token_ids=given, **changes) for row, given in enumerate(ids))


def complete(parts: tuple[Model, Tokenizer], ids: list[tuple[int, ...]], params: SamplingParams) -> list[OutputRow]:
    return complete_chunk(Chunk(0, items(ids, params)), params, map_engine(*parts), parts[1])


def test_those_of_a_prompt_and_its_completion_are_those_of_both_as_a_prompt(parts: tuple[Model, Tokenizer]) -> None:
    """Bit for bit: each token's depends on the tokens before it alone, and not on who wrote them."""
    rows = complete(parts, IDS, replace(PARAMS, temperature=0.8))
    both = [row.prompt_token_ids + row.completion_token_ids for row in rows]
    for row, whole in zip(rows, complete(parts, both, replace(PARAMS, max_tokens=0)), strict=True):
        assert whole.prompt_logprobs == (*row.prompt_logprobs, *row.logprobs)
        assert whole.prompt_logprobs[0] is None
        assert len(whole.prompt_logprobs) == len(whole.prompt_token_ids)
        assert whole.prompt_top_logprobs == (*row.prompt_top_logprobs, *row.top_logprobs)
        assert (whole.completion, whole.completion_tokens, whole.finish_reason) == ("", 0, "length")
        assert (whole.logprobs, whole.top_logprobs) == ((), ())


def test_they_are_the_same_in_any_batch(parts: tuple[Model, Tokenizer]) -> None:
    model, tokenizer = parts
    whole = complete(parts, IDS, PARAMS)
    alone = map_engine(model, tokenizer, max_batch=1, share_prefixes=False)
    for item, row in zip(items(IDS, PARAMS), whole, strict=True):
        assert complete_chunk(Chunk(0, (item,)), PARAMS, alone, tokenizer) == [row]


def test_their_sum_is_the_score_of_the_completion(parts: tuple[Model, Tokenizer]) -> None:
    model, tokenizer = parts
    read_only = READING
    rows = complete(parts, IDS, read_only)
    half = [len(ids) // 2 for ids in IDS]
    scored = tuple(
        replace(item, prompt_token_ids=ids[:n], targets=("x",), passages=(Passage(ids, n),))
        for item, ids, n in zip(items(IDS, read_only), IDS, half, strict=True)
    )
    scores = rows_of_chunk(Chunk(0, scored), ScoreOptions(kind="completion"), read_only, map_engine(*parts), tokenizer)
    for row, n, score in zip(rows, half, scores, strict=True):
        assert isinstance(score, ScoreRow)
        assert score.logprob == fsum(row.prompt_logprobs[n:])


@pytest.mark.parametrize(
    ("asked", "has", "tops"), [({"prompt_logprobs": 0}, True, None), ({"prompt_logprobs": None}, False, None)]
)
def test_a_row_has_what_it_asks_for(
    parts: tuple[Model, Tokenizer], asked: dict[str, Any], has: bool, tops: object
) -> None:
    first, second = complete(parts, [IDS[0]], replace(PARAMS, n=2, **asked))
    assert first.prompt_token_ids == (IDS[0] if has else None)
    assert (first.prompt_logprobs is not None) == has
    assert first.prompt_top_logprobs is tops
    assert second == replace(first, sample=1)


def test_a_prompt_of_one_token_has_null_alone(parts: tuple[Model, Tokenizer]) -> None:
    (row,) = complete(parts, [(97,)], replace(PARAMS, max_tokens=0))
    assert (row.prompt_logprobs, row.prompt_top_logprobs) == ((None,), (None,))


def test_nothing_is_read_of_a_prompt_that_is_only_echoed(parts: tuple[Model, Tokenizer]) -> None:
    params = SamplingParams(max_tokens=0, echo=True, stop="n", stop_loops=True)
    engine: Engine = map_engine(*parts)
    (item,) = items([IDS[0]], params, prompt="Once upon a time")
    (row,) = complete_chunk(Chunk(0, (item,)), params, engine, parts[1])
    assert (row.completion, row.finish_reason, row.stop_reason) == ("Once upon a time", "length", None)
    assert engine.work.read == 0


# ---- what random numbers hang on

SAMPLED = SamplingParams(max_tokens=6, temperature=1.5, n=2)
# id, prompts, parameters; some prompts are equal, and one row has a seed of its own
ROWS = [
    ("a", ("Once",), SAMPLED),
    ("b", ("Once",), SAMPLED),
    ("c", ("Twice",), SAMPLED),
    ("d", ("Once",), replace(SAMPLED, seed=9)),
    ("e", ("Once", "Twice"), replace(SAMPLED, n=1)),
    ("f", ("Once",), replace(SAMPLED, temperature=0.0)),
]


@pytest.fixture(scope="module")
def one_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, Tokenizer]:
    model = Model.open(str(write_byte_model(tmp_path_factory.mktemp("one") / "bytes")))
    return map_engine(model, model.load_tokenizer()), model.load_tokenizer()


def samples(one_model: tuple[Engine, Tokenizer], numbers: list[int], seed_by: SeedBy) -> list[tuple[Any, ...]]:
    """(id, sample, seed, tokens) of these of ROWS as the rows of a file."""
    engine, tokenizer = one_model
    check = make_check(tokenizer, 64, Policy(), None, seed_by)
    rows = [
        check(Request(row, f"p:{row}", ROWS[at][0], ROWS[at][1][0], ROWS[at][2], ROWS[at][1][1:]))
        for row, at in enumerate(numbers)
    ]
    made = complete_chunk(Chunk(0, tuple(rows)), SAMPLED, engine, tokenizer)
    return [(row.id, row.sample, row.seed, row.completion_token_ids) for row in made]


@pytest.mark.parametrize("seed_by", ["id", "prompt"])
@settings(max_examples=15, deadline=None)
@given(st.permutations(range(len(ROWS))), st.integers(1, len(ROWS)))
def test_rows_may_be_moved_added_and_removed(seed_by, one_model, order, n):
    """By id and by prompt, every row has the samples that it has in any other file."""
    whole = samples(one_model, [*range(len(ROWS))], seed_by)
    moved = samples(one_model, order[:n], seed_by)
    assert sorted(moved) == sorted(one for one in whole if one[0] in {ROWS[at][0] for at in order[:n]})


def test_rows_with_one_prompt_have_one_set_of_samples_by_prompt_alone(one_model):
    def tokens(seed_by: SeedBy) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {}
        for id_, _, *what in samples(one_model, [*range(len(ROWS))], seed_by):
            found.setdefault(id_, []).append(what)
        return found

    prompt, id_, row = tokens("prompt"), tokens("id"), tokens("row")
    assert prompt["a"] == prompt["b"] != prompt["c"]
    assert prompt["a"][0] != prompt["a"][1]
    assert prompt["d"] != prompt["a"]  # another seed
    assert prompt["e"][0] != prompt["a"][0]  # other prompts: the key is made of all
    assert id_["a"] != id_["b"]
    assert len({str(found[name]) for found in (prompt, id_, row) for name in "abcde"}) == 14
    assert prompt["f"] == id_["f"] == row["f"]  # greedy


# ---- samples that an older run has begun

KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "n": 3, "logprobs": 2, "top_p": 0.9},
    {"temperature": 0.8, "n": 2, "min_tokens": 9, "repetition_penalty": 1.2, "logprobs": 0, "prompt_logprobs": 1},
    {"temperature": 1.2, "echo": True, "frequency_penalty": 0.5, "presence_penalty": 0.3, "bad_words": ("e",)},
    {"stop_loops": True, "ignore_eos": True, "logit_bias": ((97, 90.0),), "max_tokens": 40},
]


def begun_with(row: OutputRow, n: int) -> Begun:
    return Begun(row.sample, row.completion_token_ids[:n])


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_rows_that_are_begun_become_those_of_a_whole_run(parts, data):
    """With stop strings across the border, in any batch: rows are equal, and those of other samples are not made."""
    model, tokenizer = parts
    engine = map_engine(*parts)
    max_batch = data.draw(st.integers(1, 8))
    again = map_engine(model, tokenizer, max_batch=max_batch, share_prefixes=data.draw(st.booleans()))
    free = items(IDS[:3], SamplingParams(max_tokens=24, ignore_eos=True))
    kinds = data.draw(st.lists(st.sampled_from(KINDS), min_size=3, max_size=3))
    free = tuple(
        replace(
            item, params=replace(item.params, **{"ignore_eos": False} | kind), others=(("", IDS[4]),) if at == 2 else ()
        )
        for at, (item, kind) in enumerate(zip(free, kinds, strict=True))
    )
    stopped = []
    for item in free:  # a stop string of tokens that some sample has
        row = complete_chunk(Chunk(0, (item,)), PARAMS, engine, tokenizer)[-1]
        first = data.draw(st.integers(0, max(len(row.completion_token_ids) - 2, 0)))
        text = tokenizer.decode(row.completion_token_ids[first : first + data.draw(st.integers(1, 5))])
        stops = (text,) if text and "\ufffd" not in text and data.draw(st.booleans()) else ()
        stopped.append(replace(item, params=replace(item.params, stop=stops, include_stop=data.draw(st.booleans()))))
    whole = complete_chunk(Chunk(0, tuple(stopped)), PARAMS, engine, tokenizer)
    begun: dict[int, list[Begun]] = {item.row: [] for item in stopped}
    for row in data.draw(st.lists(st.sampled_from(whole), unique_by=lambda row: (row.row, row.sample))):
        begun[row.row].append(begun_with(row, data.draw(st.integers(0, max(row.completion_tokens - 1, 0)))))
    asked = tuple(replace(item, begun=tuple(begun[item.row])) for item in stopped)
    made = complete_chunk(Chunk(0, asked), PARAMS, again, tokenizer)
    assert made == [row for row in whole if row.sample in {one.sample for one in begun[row.row]}]


@pytest.mark.parametrize(
    ("params", "ids"),
    [
        ({"stop_token_ids": (101,)}, (100, 101, 102)),
        ({}, (100, 256)),
        ({"stop": ("de",)}, (100, 101)),
        ({"stop_loops": True}, (100,) * 24),
    ],
)
def test_tokens_that_end_a_sample_are_none_to_begin_with(one_model, params, ids):
    engine, tokenizer = one_model
    (item,) = items([IDS[0]], SamplingParams(max_tokens=40, **params), begun=(Begun(0, ids),))
    marker = Marker(np.zeros(1, RECORD))
    with pytest.raises(UsageError, match=f"row 0, sample 0: its first {len(ids)} tokens, taken from an older output, "):
        complete_chunk(Chunk(0, (item,)), PARAMS, engine, tokenizer, marker)
    assert marker.abandon().in_flight == (0,)  # the row is to blame
    free = replace(item, params=replace(item.params, stop_token_ids=(), stop=(), stop_loops=False, ignore_eos=True))
    assert complete_chunk(Chunk(0, (free,)), PARAMS, engine, tokenizer)[0].completion_token_ids[: len(ids)] == ids


def test_a_row_of_which_samples_are_left_is_counted_once(one_model):
    engine, tokenizer = one_model
    request = items([IDS[0]], replace(SAMPLED, n=4), begun=(Begun(2), Begun(3)))
    marker = Marker(np.zeros(1, RECORD))
    assert [row.sample for row in complete_chunk(Chunk(0, request), SAMPLED, engine, tokenizer, marker)] == [2, 3]
    assert marker.abandon().rows == 1


# ---- what is measured


@given(ids=st.lists(st.integers(0, 3), max_size=30))
def test_repetition_is_the_share_of_4_grams_that_were_there_before(ids: list[int]) -> None:
    grams = [ids[at : at + 4] for at in range(len(ids) - 3)]
    before = sum(gram in grams[:at] for at, gram in enumerate(grams))
    assert repetition(tuple(ids)) == (before / len(grams) if grams else None)


@given(logprobs=st.lists(st.floats(-50, 0, width=32), max_size=30), seed=st.integers(0, 9))
def test_a_mean_depends_on_no_order(logprobs: list[float], seed: int) -> None:
    mean = mean_logprob(logprobs)
    shuffled = random.Random(seed).sample(logprobs, len(logprobs))
    assert repr(mean_logprob(shuffled)) == repr(mean)
    if logprobs:
        assert mean == pytest.approx(np.mean(logprobs), rel=1e-12)
    assert (mean is None) == (not logprobs)


@pytest.mark.parametrize("logprobs", [None, 0, 2])
def test_measuring_changes_nothing_else(parts: tuple[Model, Tokenizer], logprobs: int | None) -> None:
    """Rows that end early, in several samples, with and without columns of log-probabilities."""
    model, tokenizer = parts
    params = replace(PARAMS, logprobs=logprobs, temperature=0.7, n=3, ignore_eos=False, stop=("e",), stop_loops=True)
    plain = complete_chunk(Chunk(0, items(IDS, params)), params, map_engine(*parts), tokenizer)
    measured = complete_chunk(Chunk(0, items(IDS, params, measured=MEASURED)), params, map_engine(*parts), tokenizer)
    nothing = dict.fromkeys(MEASURED)
    assert [replace(row, **nothing) for row in measured] == plain
    asked = complete_chunk(Chunk(0, items(IDS, replace(params, logprobs=0))), params, map_engine(*parts), tokenizer)
    for row, other in zip(measured, asked, strict=True):
        assert row.mean_logprob == mean_logprob(other.logprobs)
        assert row.repetition == repetition(row.completion_token_ids)
    assert all(row.mean_logprob is not None for row in measured if row.completion_tokens)


def test_a_search_that_finds_less_than_n_completions_fails_its_row_alone(parts: tuple[Model, Tokenizer]) -> None:
    """A guide that allows one completion alone; the remedy works."""
    model, tokenizer = parts
    params = replace(PARAMS, prompt_logprobs=None, num_beams=3, n=2)
    chunk = Chunk(0, items(IDS[:2], params))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(complete_module, "to_prompts", lambda one, _: guided(to_prompts(one, tokenizer), one.row == 0))
        rows = complete_chunk(chunk, params, map_engine(*parts), tokenizer)
        again = complete_chunk(Chunk(0, items(IDS[:1], replace(params, n=1))), params, map_engine(*parts), tokenizer)
    assert [(row.row, row.sample, row.status) for row in rows] == [(0, 0, "failed"), (1, 0, "ok"), (1, 1, "ok")]
    assert rows[0].error == (
        "p:1: beam search (num_beams 3) found 1 completions, and n is 2: nothing else may be generated; lower n to 1"
    )
    assert [row.completion for row in again] == ["AAAAAAA"]


class OnlyA:
    """A guide to one completion."""

    def allowed(self) -> npt.NDArray[np.uint32]:
        mask = np.zeros(9, np.uint32)
        mask[ord("A") // 32] = 1 << ord("A") % 32
        return mask

    def advance(self, _token: int) -> bool:
        return False

    def copy(self) -> "OnlyA":
        return self


def guided(prompts: list[Prompt], is_guided: bool) -> list[Prompt]:
    return [replace(one, make_guide=OnlyA) for one in prompts] if is_guided else prompts


def test_weights_that_are_no_numbers_fail_a_row_as_a_whole(parts: tuple[Model, Tokenizer]) -> None:
    model, tokenizer = parts
    params = replace(PARAMS, logprobs=None, n=2, temperature=0.5)
    engine = map_engine(model, tokenizer)
    weights = engine.forward.weights
    engine.forward.weights = replace(weights, ln_f=weights.ln_f | {"b": np.full_like(weights.ln_f["b"], np.nan)})
    rows = complete_chunk(Chunk(0, items(IDS[:2], params, measured=MEASURED)), params, engine, tokenizer)
    assert [(row.row, row.sample, row.status, row.completion) for row in rows] == [
        (0, 0, "failed", None),
        (1, 0, "failed", None),
    ]
    assert "the log-probability nan, so its weights are damaged or overflow" in str(rows[0].error)
