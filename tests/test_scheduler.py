"""engine/scheduler.py: shared prefixes, their order, and memory that always suffices for one sequence."""

import os

from hypothesis import given
from hypothesis import strategies as st

from batchgen.engine.limits import tokens_needed
from batchgen.engine.scheduler import Prefix, PromptGroup, Scheduler, find_prefixes
from batchgen.engine.sequence import Prompt, expand, sample_seeds
from batchgen.gpt2.config import GPT2Config
from batchgen.gpt2.kv_cache import BLOCK, LANES, KVArena
from batchgen.types import SamplingParams

CONFIG = GPT2Config(n_vocab=10, n_ctx=512, n_embd=2, n_head=1, n_layer=1)

# prompts of whole blocks and a tail: "AAB" + 3 tokens
texts = st.lists(st.sampled_from("ABC"), max_size=5).flatmap(
    lambda blocks: st.integers(0 if blocks else 1, 70).map(
        lambda tail: tuple(ord(b) - ord("A") for b in blocks for _ in range(BLOCK)) + (9,) * tail
    )
)


def group_of(token_ids: tuple[int, ...], n: int = 1) -> PromptGroup:
    prompt = Prompt(0, token_ids, SamplingParams(n=n, temperature=1.0), sample_seeds(0, 0, n))
    return PromptGroup(token_ids, expand([prompt]))


def tokens_of(prefix: Prefix | None) -> tuple[int, ...]:
    return tuple(token for part in (prefix.path if prefix else []) for token in part.token_ids)


@given(st.lists(texts, unique=True, max_size=8), st.integers(1, 3))
def test_a_shared_prefix_is_all_whole_blocks_that_two_sequences_share(prompts, n):
    items = [group_of(prompt, n) for prompt in prompts]
    families = find_prefixes(items)
    assert sorted(p.token_ids for family in families for p in family) == sorted(prompts)
    for item in items:
        shared = tokens_of(item.shared)
        assert item.token_ids[: len(shared)] == shared
        assert len(shared) < len(item.token_ids)
        longest = 0
        for blocks in range((len(item.token_ids) - 1) // BLOCK + 1):
            stem = item.token_ids[: blocks * BLOCK]
            users = sum(n for p in prompts if p[: len(stem)] == stem and len(p) > len(stem))
            if users >= 2:
                longest = len(stem)
        assert len(shared) == longest


@given(st.lists(texts, unique=True, max_size=8), st.integers(1, 3))
def test_prompts_that_share_part_of_a_block_copy_it_and_read_their_last_token_themselves(prompts, n):
    items = [group_of(prompt, n) for prompt in prompts]
    find_prefixes(items)
    for item in items:
        start = item.shared.end if item.shared else 0
        others = [o for o in items if o is not item and o.shared is item.shared and not o.copied]
        shared = [len(os.path.commonprefix([item.token_ids[start:-1], o.token_ids[start:-1]])) for o in others]
        assert item.copied or max(shared, default=0) < LANES
        if item.copied:
            family = [o for o in items if o.copied is item.copied]
            common = os.path.commonprefix([o.token_ids[start:-1] for o in family])
            assert item.copied.token_ids == common
            assert len(family) >= 2
            assert LANES <= len(common) < BLOCK
            assert item.copied.unfinished == n * len(family)


@given(st.lists(texts, unique=True, min_size=1, max_size=8))
def test_a_family_is_the_prompts_that_share_a_first_block(prompts):
    for family in find_prefixes([group_of(prompt) for prompt in prompts]):
        roots = {id(p.prefix.path[0]) if p.prefix else None for p in family}
        assert len(roots) == 1
        assert len(family) == 1 or roots != {None}


@given(st.lists(st.tuples(texts, st.integers(1, 40), st.integers(1, 4)), min_size=1, max_size=8), st.integers(1, 5))
def test_all_sequences_run_with_memory_for_one(prompts, max_batch):
    """An arena that holds just the longest sequence still admits all, one after another."""
    params = [SamplingParams(max_tokens=m, n=n, temperature=1.0) for _, m, n in prompts]
    requests = [
        Prompt(row, ids, p, sample_seeds(0, row, p.n))
        for row, ((ids, _, _), p) in enumerate(zip(prompts, params, strict=True))
    ]
    room = max(tokens_needed(len(p.token_ids), p.params.max_tokens) for p in requests)
    scheduler = Scheduler(expand(requests), KVArena(CONFIG, room), max_batch, share_prefixes=True)
    started = []
    while scheduler.is_busy:
        scheduler.admit(100)
        assert len(scheduler.running) <= scheduler.in_flight <= max_batch
        pieces = scheduler.next_pieces(100)
        prefills, ready = [p.prefill for p in pieces], [p.sequences for p in pieces if p.is_last and p.sequences]
        assert sum(p.n_row for p in prefills) <= 100
        for prefill in prefills:
            if prefill.copied:
                assert prefill.copied.length
                assert not prefill.segment.length
                prefill.segment.length = prefill.copied.length
            prefill.segment.length += prefill.n_row
        for sequences in ready:
            assert sequences[0].segment.end == len(sequences[0].prompt.token_ids)
            scheduler.start(sequences)
            started += sequences
        if not prefills:
            scheduler.finish(scheduler.running[0])
    assert sorted((s.prompt.row, s.sample) for s in started) == [
        (p.row, s) for p in requests for s in range(p.params.n)
    ]
    assert scheduler.arena.free == [(0, scheduler.arena.n_tokens)]
    assert not scheduler.prefixes


def test_prompts_that_are_only_read_use_the_memory_of_a_pass_again():
    params, room = SamplingParams(max_tokens=0, prompt_logprobs=0), 20 * 64
    prompts = [Prompt(row, (*range(row // 2, row // 2 + 59), row), params, (0,), scored=1) for row in range(40)]
    arena, ended, rows, least = KVArena(CONFIG, room), [], 0, room
    scheduler = Scheduler(expand(prompts), arena, 40, share_prefixes=True)
    while scheduler.is_busy:
        scheduler.admit(100)
        least = min(least, sum(size for _, size in arena.free))
        for piece in scheduler.next_pieces(100):
            rows += piece.prefill.n_row
            if piece.is_last:
                scheduler.start(piece.sequences)
                ended += piece.sequences
                for sequence in piece.sequences:
                    scheduler.finish(sequence)
    assert sorted(sequence.prompt.row for sequence in ended) == list(range(40))
    assert rows == 20 * 59  # two that differ in their last token, which is not read, are read once
    assert least >= room - 3 * 64


def test_the_choices_of_a_question_share_more_than_the_questions_do():
    """Of a beginning that all share, each question is read once, and its choices read only what is theirs."""
    stem = tuple(range(BLOCK + 20))
    questions = [tuple(range(100 * q, 100 * q + 25)) for q in range(2, 5)]
    groups = [group_of((*stem, *question, choice, 7)) for question in questions for choice in range(4)]
    single = group_of((*stem, *range(1000, 1030)))
    find_prefixes([*groups, single])
    assert [len(tokens_of(group.prefix)) for group in groups] == [len(stem) + 25] * 12
    assert len({group.prefix for group in groups}) == 3
    assert tokens_of(single.prefix) == stem[:BLOCK]
