"""passages.py: what is scored after what, against plain references and the rules of lm-evaluation-harness."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from batchgen.errors import UsageError
from batchgen.input import passages
from batchgen.input.passages import windows_of
from batchgen.input.validation import make_check
from batchgen.job import EmbedOptions, Policy, ScoreOptions
from batchgen.text.tokenizer import Tokenizer
from batchgen.types import READING, Passage, Rejected, Request, TokenizedRequest
from tests.support.vocabulary import gpt2_vocabulary_dir

PARAMS = READING
END = 50256
CUT = Policy("truncate-left")

words = st.lists(
    st.sampled_from(["The", " fox", "lo", "Hel", "12", "3", " ", "  ", "\n", "é", "...", "'s", "\xa0", "\x1c", "名"]),
    max_size=6,
).map("".join)


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return Tokenizer.load(gpt2_vocabulary_dir())


def check(
    tokenizer: Tokenizer, prompt: str, *targets: str, n_ctx: int = 64, policy: Policy | None = None, **options: Any
) -> TokenizedRequest | Rejected:
    request = Request(0, "p:1", None, prompt, PARAMS, targets=targets)
    kind = ("text", "completion", "choices")[min(len(targets), 2)]
    return make_check(tokenizer, n_ctx, policy or Policy(), ScoreOptions(**{"kind": kind} | options))(request)


def accepted(outcome: TokenizedRequest | Rejected, n_ctx: int = 64) -> TokenizedRequest:
    assert isinstance(outcome, TokenizedRequest), outcome
    for passage in outcome.passages:
        assert 2 <= len(passage.token_ids) <= n_ctx + 1
        assert 1 <= passage.scored < len(passage.token_ids)
    assert outcome.passages[0].token_ids[: outcome.passages[0].scored] == outcome.prompt_token_ids
    return outcome


def reason(outcome: TokenizedRequest | Rejected) -> str:
    assert isinstance(outcome, Rejected), outcome
    return outcome.error.removeprefix("p:1: ")


def with_special(tokenizer: Tokenizer, **special: Any) -> Tokenizer:
    """The same tokenizer, with other tokens beside BPE's."""
    made = replace(tokenizer.special, **special)
    return Tokenizer(tokenizer.encoder, tokenizer._merged, tokenizer.token_bytes, made)


# ---- the border of prompt and completion


def pair_of(prompt: str, completion: str, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """What lm-evaluation-harness reads and scores, written plainly; it moves spaces one by one."""
    while prompt and prompt[-1].isspace():
        prompt, completion = prompt[:-1], prompt[-1] + completion
    both, before = tokenizer.encode(prompt + completion), tokenizer.encode(prompt)
    return before or [END], both[len(before) :]


@given(prompt=words, completion=words.filter(bool))
@example("The ", "fox")
@example("Hel", "lo")
@example(" ", "fox")
@example("", " fox")
@settings(deadline=None)
def test_the_border_is_that_of_encoding_together(gpt2: Tokenizer, prompt: str, completion: str) -> None:
    before, scored = pair_of(prompt, completion, gpt2)
    got = check(gpt2, prompt, completion)
    if not scored:
        assert "adds no token to the prompt: they merge" in reason(got)
    else:
        assert accepted(got).passages == (Passage((*before, *scored), len(before)),)


@given(prompt=words, completion=words.filter(bool))
@settings(deadline=None)
def test_a_completion_that_merges_is_accepted_after_a_space(gpt2: Tokenizer, prompt: str, completion: str) -> None:
    accepted(check(gpt2, prompt, f" {completion}"))


def test_of_a_prompt_of_nothing_endoftext_is_read_once(gpt2: Tokenizer) -> None:
    """So lm-evaluation-harness has it, if the completion begins with the mark."""
    parsed = Policy(special_tokens="parse")
    for text, policy in (("fox", Policy()), ("<|endoftext|>fox", parsed)):
        got = accepted(check(gpt2, "", text, policy=policy))
        assert got.passages == (Passage((END, *gpt2.encode("fox")), 1),)
    assert "adds no token" in reason(check(gpt2, "", "<|endoftext|>", policy=parsed))


def test_choices_share_the_prompt(gpt2: Tokenizer) -> None:
    got = accepted(check(gpt2, "The answer: ", "fox", "a dog", "7"))
    assert got.targets == ("fox", "a dog", "7")
    assert {one.token_ids[: one.scored] for one in got.passages} == {got.prompt_token_ids}
    assert [gpt2.decode(one.token_ids[one.scored :]) for one in got.passages] == [" fox", " a dog", " 7"]


def test_trim_removes_the_space_that_would_go_to_the_completion(gpt2: Tokenizer) -> None:
    got = accepted(check(gpt2, "The ", "fox", policy=Policy(trim=True)))
    assert got.prompt == "The"
    assert gpt2.decode(got.passages[0].token_ids) == "Thefox"


@pytest.mark.parametrize("begin", [(END,), (7, END)])
def test_what_begins_every_prompt_is_read_and_never_scored(gpt2: Tokenizer, begin: tuple[int, ...]) -> None:
    begun, fox = with_special(gpt2, begin=begin), tuple(gpt2.encode(" fox"))
    the = tuple(gpt2.encode("The"))
    assert accepted(check(begun, "The", " fox")).passages == (Passage(begin + the + fox, len(begin) + 1),)
    assert accepted(check(begun, "", " fox")).passages == (Passage(begin + fox, len(begin)),)
    assert accepted(check(begun, "The fox")).passages == (Passage(begin + the + fox, len(begin)),)
    given_first = accepted(check(begun, "The fox", first_token="given"))
    assert given_first.passages == (Passage(begin + the + fox, len(begin) + 1),)


def test_a_target_of_nothing_is_rejected_even_after_a_space(gpt2: Tokenizer) -> None:
    assert reason(check(gpt2, "a ", "")).startswith("the completion, '', is empty")
    assert reason(check(gpt2, "a ", "b", "")).startswith("choice 1 (from 0), '', is empty")


def test_a_single_choice_is_called_a_choice(gpt2: Tokenizer) -> None:
    assert reason(check(gpt2, "The ki", "ng", kind="choices")).startswith("choice 0 (from 0), 'ng', adds no token")
    assert reason(check(gpt2, "", "x " * 80, kind="choices")).startswith("choice 0 (from 0), 'x x")


def test_without_a_mark_to_start_from_there_must_be_a_prompt(gpt2: Tokenizer) -> None:
    bare = with_special(gpt2, start=None)
    assert reason(check(bare, "", "fox")).endswith("; write a prompt")
    assert reason(check(bare, "The fox")).endswith("; pass --first-token given")
    accepted(check(bare, "The fox", first_token="given"))
    accepted(check(bare, "The", " fox"))


# ---- rows that are too long


@given(n_prompt=st.integers(1, 12), n_targets=st.lists(st.integers(1, 12), min_size=1, max_size=3))
@settings(deadline=None)
def test_truncation_keeps_every_target_and_the_end_of_the_prompt(
    gpt2: Tokenizer, n_prompt: int, n_targets: list[int]
) -> None:
    """The longest target decides, so that all choices follow the same prompt."""
    n_ctx, prompt = 8, "".join(f" {letter}" for letter in "abcdefghijkl"[:n_prompt])
    targets = [" x" * n for n in n_targets]
    ids, room = tuple(gpt2.encode(prompt)), n_ctx + 1 - max(n_targets)
    for policy in (Policy(), CUT):
        got = check(gpt2, prompt, *targets, n_ctx=n_ctx, policy=policy)
        if n_prompt <= room or (policy == CUT and room > 0):
            kept = ids[-room:]
            x = gpt2.encode(" x")[0]
            wanted = tuple(Passage((*kept, *[x] * n), len(kept)) for n in n_targets)
            assert accepted(got, n_ctx).passages == wanted
        elif room > 0:
            assert reason(got).endswith(f"; shorten the prompt to {room} or pass --on-too-long truncate-left")
        else:
            assert reason(got).endswith("tokens, and n_ctx 8 leaves none to the prompt; shorten it")


def test_what_begins_every_prompt_stays_in_front_of_one_that_is_cut(gpt2: Tokenizer) -> None:
    begun = with_special(gpt2, begin=(END,))
    (got,) = accepted(check(begun, " a b c d e f", " x x", n_ctx=4, policy=CUT), 4).passages
    assert (got.token_ids[0], gpt2.decode(got.token_ids[1:])) == (END, " e f x x")
    assert accepted(check(begun, " a b", " x x x x", n_ctx=4, policy=CUT), 4).passages[0].scored == 1


def test_a_prompt_of_megabytes_is_not_tokenized_to_be_too_long(gpt2: Tokenizer, monkeypatch: Any) -> None:
    monkeypatch.setattr(passages, "encode_text", None)
    got = reason(check(gpt2, "x" * 10**6, " a", " b"))
    assert got == "the prompt has more tokens than n_ctx 64; shorten it or pass --on-too-long truncate-left"


# ---- windows


def blocks_of(ids: Sequence[int], n_ctx: int, stride: int) -> list[tuple[list[int], list[int]]]:
    """lm-evaluation-harness's windows, written plainly: the tokens that each reads, and those that it predicts."""
    blocks = [list(ids[1 : n_ctx + 1])]
    rest = list(ids[n_ctx + 1 :])
    while rest:
        blocks.append(rest[:stride])
        rest = rest[stride:]
    found, end = [], 1
    for block in blocks:
        end += len(block)
        found.append((list(ids[:end])[-n_ctx - 1 : -1], block))
    return found


sizes = st.integers(1, 12).flatmap(lambda n_ctx: st.tuples(st.just(n_ctx), st.integers(1, n_ctx)))


@given(n=st.integers(2, 60), size=sizes)
def test_windows_are_those_of_lm_evaluation_harness(n: int, size: tuple[int, int]) -> None:
    n_ctx, stride = size
    found = [
        (list(one.token_ids[:-1]), list(one.token_ids[one.scored :]))
        for one in windows_of(tuple(range(n)), 1, n_ctx, stride)
    ]
    assert found == blocks_of(range(n), n_ctx, stride)


@given(n=st.integers(1, 60), first=st.integers(1, 3), size=sizes)
def test_each_token_is_scored_once_after_n_ctx_less_the_stride_or_all_before_it(
    n: int, first: int, size: tuple[int, int]
) -> None:
    """Also with more than one token in front, such as begin tokens."""
    n_ctx, stride = size
    assume(first <= n_ctx)
    seen = []
    for passage in windows_of(tuple(range(n + first)), first, n_ctx, stride):
        assert passage.token_ids == tuple(range(passage.token_ids[0], passage.token_ids[-1] + 1))
        assert 1 <= passage.scored < len(passage.token_ids) <= n_ctx + 1
        for at in range(passage.scored, len(passage.token_ids)):
            seen.append(passage.token_ids[at])
            assert at >= min(passage.token_ids[at], n_ctx - stride)
    assert seen == list(range(first, n + first))


@given(text=words.filter(bool), stride=st.integers(1, 4))
@settings(deadline=None)
def test_a_text_is_scored_to_its_end_whatever_begins_it(gpt2: Tokenizer, text: str, stride: int) -> None:
    ids = tuple(gpt2.encode(text))
    for first_token, whole in (("endoftext", (END, *ids)), ("given", ids)):
        got = check(gpt2, text, n_ctx=4, stride=stride, first_token=first_token)
        if len(whole) == 1:
            assert "the text is 1 token" in reason(got)
            continue
        assert accepted(got, 4).prompt_token_ids == whole[:1]
        assert got.targets == ()
        scored = [token for one in got.passages for token in one.token_ids[one.scored :]]
        assert scored == list(whole[1:])


def test_a_text_of_no_token_is_rejected(gpt2: Tokenizer) -> None:
    for options in ({}, {"first_token": "given"}, {"policy": Policy(empty_prompt="unconditional")}):
        assert reason(check(gpt2, "", **options)).startswith("the text is empty")
    assert reason(check(gpt2, "  ", policy=Policy(trim=True))).startswith("the text is empty")


def test_windows_that_would_fill_the_memory_are_refused_with_a_remedy_that_works(
    gpt2: Tokenizer, monkeypatch: Any
) -> None:
    monkeypatch.setattr(passages, "MAX_READ", 1000)
    text = " x" * 200
    assert "exceed 1000 tokens; raise --stride or cut the text" in reason(check(gpt2, text, n_ctx=32, stride=1))
    got = accepted(check(gpt2, text, n_ctx=32), 32)
    assert sum(len(one.token_ids) for one in got.passages) <= 1000
    assert reason(check(gpt2, " x" * 2000, n_ctx=32)).endswith("; cut the text")
    accepted(check(gpt2, " x" * 32, n_ctx=32, stride=1), 32)  # one window, however large n_ctx and small the stride


# ---- options of the job, and what to embed


@pytest.mark.parametrize("options", [ScoreOptions(), EmbedOptions()])
def test_shorten_means_nothing_where_nothing_is_generated(gpt2: Tokenizer, options: ScoreOptions) -> None:
    with pytest.raises(UsageError, match="--on-too-long shorten lowers max_tokens"):
        make_check(gpt2, 64, Policy("shorten"), options)


@given(n=st.integers(0, 9), unconditional=st.booleans(), cut=st.booleans())
@settings(deadline=None)
def test_what_is_embedded_is_the_text_or_its_end(gpt2: Tokenizer, n: int, unconditional: bool, cut: bool) -> None:
    policy = Policy("truncate-left" if cut else "reject", "unconditional" if unconditional else "reject")
    text = "".join(f" {letter}" for letter in "abcdefghi"[:n])
    got = make_check(gpt2, 6, policy, EmbedOptions())(Request(0, "p:1", None, text, PARAMS))
    if isinstance(got, Rejected):
        assert (n == 0 and not unconditional) or (n > 6 and not cut)
        remedy = "pass --empty-prompt unconditional" if n == 0 else "pass --on-too-long truncate-left"
        assert got.error.endswith(remedy)
        assert "max_tokens" not in got.error
    else:
        assert got.prompt_token_ids == (tuple(gpt2.encode(text))[-6:] or (END,))
        assert (got.prompt, got.passages, got.targets) == (text, (), ())


def test_a_special_token_in_a_completion_is_reported_as_one_in_a_prompt_is(gpt2: Tokenizer) -> None:
    assert accepted(check(gpt2, "a", " b<|endoftext|>")).has_special_text
    assert not accepted(check(gpt2, "a", " b")).has_special_text
