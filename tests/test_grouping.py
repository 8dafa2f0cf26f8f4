"""grouping.py: each row is in one chunk, equal and related rows are together, and all chunks take as long."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchgen.input.grouping import SHARED_BYTES, Item, share_out
from batchgen.planning import auto_chunk_rows, plan_chunks
from batchgen.review.forecast import ChunkCost, Forecast, chunk_cost
from batchgen.types import READING, Rejected, Request, SamplingParams, TokenizedRequest
from benchmarks.workloads import make_workload

GREEDY = SamplingParams(max_tokens=8)
SCORED = READING
PREFIX = "p" * SHARED_BYTES

texts = st.one_of(st.text("ab", max_size=3), st.text("ab", max_size=3).map(PREFIX.__add__))
prompts = st.one_of(texts, st.lists(st.integers(-1, 2**40), max_size=3).map(tuple))
params = st.sampled_from([GREEDY, SCORED, SamplingParams(max_tokens=200), SamplingParams(temperature=1.0, n=3)])


@st.composite
def items(draw: st.DrawFn) -> list[Item]:
    made: list[Item] = []
    for row in range(draw(st.integers(1, 40))):
        if draw(st.integers(0, 9)) == 0:
            made.append(Rejected(row, "p:1", None, None, "no"))
        else:
            others = (draw(prompts),) if draw(st.integers(0, 9)) == 0 else ()
            asked = draw(params)
            targets = tuple(draw(st.lists(texts, max_size=2))) if asked == SCORED else ()
            made.append(Request(row, "p:1", None, draw(prompts), asked, others, targets))
    return made


def chunks_of(rows: Sequence[Item], most: int) -> list[list[int]]:
    return share_out(rows, -(-len(rows) // most), most)


@given(rows=items(), most=st.integers(1, 45))
@settings(deadline=None)
def test_every_row_is_in_one_chunk_and_no_chunk_is_empty_or_too_large(rows: list[Item], most: int) -> None:
    chunks = chunks_of(rows, most)
    assert sorted(index for chunk in chunks for index in chunk) == list(range(len(rows)))
    assert all(1 <= len(chunk) <= most for chunk in chunks)
    assert all(a < b for chunk in chunks for a, b in pairwise(chunk))
    assert all(a[0] < b[0] for a, b in pairwise(chunks))


@given(rows=items(), most=st.integers(1, 45))
@settings(deadline=None)
def test_equal_greedy_requests_are_in_more_than_one_chunk_only_for_want_of_room(rows: list[Item], most: int) -> None:
    """However many are equal, not more are generated again than there are cuts, of chunks and of large units."""
    chunks = chunks_of(rows, most)
    keys = [
        {
            (item.prompt, item.params, item.others, item.targets)
            for item in (rows[index] for index in chunk)
            if is_greedy(item)
        }
        for chunk in chunks
    ]
    assert sum(map(len, keys)) - len(set().union(*keys)) <= 2 * (len(chunks) - 1)


def is_greedy(item: Item) -> bool:
    return isinstance(item, Request) and item.params.greedy


def test_the_chunks_do_not_depend_on_what_is_not_in_the_rows() -> None:
    rows = [Request(row, f"p:{row}", str(row), PREFIX + "ab" * (row % 7), GREEDY) for row in range(50)]
    moved = [
        Request(row + 9, "elsewhere", None, PREFIX + "ab" * (row % 7), SamplingParams(max_tokens=8))
        for row in range(50)
    ]
    assert chunks_of(rows, 8) == chunks_of(moved, 8)


def test_rows_that_share_a_prefix_go_to_as_few_chunks_as_hold_them() -> None:
    names = ["x", "y", "z", "w"]
    rows = [Request(row, "", None, names[row % 4] * 4 * SHARED_BYTES + str(row), GREEDY) for row in range(32)]
    assert chunks_of(rows, 8) == [list(range(first, 32, 4)) for first in range(4)]


def test_a_prompt_that_is_too_long_to_be_generated_costs_no_more_than_one_that_fits() -> None:
    rows = [Request(row, "", None, f"{row} " + "x" * (10**6 if row == 5 else 100), GREEDY) for row in range(1000)]
    assert min(map(len, chunks_of(rows, 990))) > 400


# ---- rows to score


def scored(row: int, prompt: str, *targets: str) -> Request:
    return Request(row, "", None, prompt, SCORED, targets=targets)


def test_rows_of_one_prompt_go_to_one_chunk_whatever_is_scored_after_it() -> None:
    rows = [scored(row, "xyzw"[row % 4] * 4 * SHARED_BYTES, f" choice {row}", " other") for row in range(32)]
    assert chunks_of(rows, 8) == [list(range(first, 32, 4)) for first in range(4)]


def test_targets_count_and_rows_of_one_prompt_with_other_targets_are_no_copies() -> None:
    rows = [scored(row, "Q", f"{row}" * (50 if row < 4 else 1)) for row in range(40)]
    assert [len([row for row in chunk if row < 4]) for chunk in share_out(rows, 4, 40)] == [1] * 4


def test_texts_that_begin_alike_are_spread_as_each_is_scored_for_itself() -> None:
    """They would be in one chunk if they were prompts, which are read once as far as they are equal."""
    rows = [scored(row, PREFIX * 4 + f"{row} " * 40) for row in range(64)]
    assert [len(chunk) for chunk in share_out(rows, 4, 64)] == [16] * 4


def test_a_text_costs_its_whole_length_and_equal_beginnings_make_no_copy() -> None:
    rows = [scored(row, "x" * (10**6 if row == 5 else 1000)) for row in range(1001)]
    assert sorted(map(len, share_out(rows, 2, 1001))) == [1, 1000]
    long = [scored(row, "x" * (10**5 + row)) for row in range(8)]
    assert [len(chunk) for chunk in share_out(long, 4, 8)] == [2] * 4


# ---- the workloads of the benchmark


def costs(name: str, jobs: int) -> list[ChunkCost]:
    """The chunks of a workload, counted as the engine does their work."""
    task = make_workload(name).task
    sampled = {"temperature": task.temperature, "top_k": task.top_k, "top_p": task.top_p} if task.temperature else {}
    asked = SamplingParams(max_tokens=task.max_tokens, n=task.n, **sampled)  # type: ignore[arg-type]
    rows = [TokenizedRequest(row, "", None, "", tuple(ids), asked) for row, ids in enumerate(task.prompts)]
    cut = plan_chunks(rows, auto_chunk_rows(len(rows), jobs, task.n), together=64)
    return [chunk_cost(chunk, Forecast(), share=True) for chunk in cut]


@pytest.mark.parametrize("name", ["W1", "W2", "W3", "W4", "W5"])
def test_two_workers_have_half_the_work_of_one(name: str) -> None:
    """W2 reads its prefix once for each worker, and nothing else is done twice: each of W5's pairs is in one chunk."""
    work = lambda cost: 0.4 * cost.prompt_tokens + cost.sum_max_tokens  # noqa: E731
    (alone,), both = costs(name, 1), costs(name, 2)
    assert len(both) == 2
    assert sum(cost.sum_max_tokens for cost in both) == alone.sum_max_tokens
    assert work(alone) / max(map(work, both)) > (1.95 if name == "W2" else 1.99)
