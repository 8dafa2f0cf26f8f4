"""complete.py: what a row asks of a prompt's tokens reaches the engine, and its answer the row."""

from dataclasses import replace
from math import fsum
from typing import Any

import pytest

from batchgen.engine.engine import Engine
from batchgen.job import ScoreOptions
from batchgen.models.model import Model
from batchgen.text.tokenizer import Tokenizer
from batchgen.types import READING, Chunk, OutputRow, Passage, SamplingParams, ScoreRow, TokenizedRequest
from batchgen.workers.complete import complete_chunk, map_engine
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
