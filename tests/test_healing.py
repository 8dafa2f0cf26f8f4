"""healing.py: a prompt that ends within a token goes on as if its text were longer, and others as they are."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchgen.engine.engine import Engine
from batchgen.engine.sampler import sample
from batchgen.engine.sequence import Prompt, Sequence
from batchgen.errors import UsageError
from batchgen.generator import Generator
from batchgen.input.validation import make_check
from batchgen.job import Policy
from batchgen.models.model import Model
from batchgen.output.openai import make_answer
from batchgen.text.healing import Beginnings, HealingGuide, beginnings_of
from batchgen.text.special_tokens import AddedToken, SpecialTokens
from batchgen.text.stopping import StopStrings
from batchgen.text.tokenizer import Tokenizer
from batchgen.types import Begun, Chunk, OutputRow, Rejected, Request, SamplingParams, TokenizedRequest
from batchgen.workers.complete import complete_chunk, map_engine, to_prompts
from batchgen.workers.worker import make_receipt
from tests.support.models import MERGES, write_byte_model, write_merged_model, write_merged_vocabulary
from tests.support.plans import plan_of
from tests.support.vocabulary import gpt2_tokenizer

CASES = json.loads((Path(__file__).parent / "cases" / "healing.json").read_text())
HEALED = SamplingParams(max_tokens=6, heal=True, ignore_eos=True)
WORDS = "".join(MERGES).replace(" ", "").replace("Ġ", " ").replace("Ċ", "\n").replace("Ã©", "é")
TEXTS = st.text(WORDS, max_size=20) | st.lists(
    st.sampled_from([" the", " time", " king", "Once", " café", "https://", "...", "\n\n", "    ", " ", "123"]),
    max_size=6,
).map("".join)
PROMPTS = st.tuples(TEXTS, st.integers(1, 99)).map(lambda one: one[0][: one[1]]).filter(bool)


@pytest.fixture(scope="module", params=["float32", "int8"])
def parts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, Tokenizer]:
    model = Model.open(str(write_merged_model(tmp_path_factory.mktemp("models") / "merged")), request.param)
    tokenizer = model.load_tokenizer()
    return map_engine(model, tokenizer), tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_merged_vocabulary(tmp_path_factory.mktemp("merged")))


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Generator:
    return Generator(write_merged_model(tmp_path_factory.mktemp("models") / "merged"))


def checked(
    tokenizer: Tokenizer, prompt: Any, params: SamplingParams = HEALED, n_ctx: int = 128, **policy: Any
) -> TokenizedRequest | Rejected:
    return make_check(tokenizer, n_ctx, Policy(**policy))(Request(0, "p:1", None, prompt, params))


def complete(parts: tuple[Engine, Tokenizer], prompts: list[str], params: SamplingParams) -> list[OutputRow]:
    items = [replace(checked(parts[1], prompt, params), row=row) for row, prompt in enumerate(prompts)]
    return complete_chunk(Chunk(0, tuple(items)), params, *parts)


# ---- which tokens


def naive_back_up(ids: list[int], tokens: dict[int, bytes]) -> int:
    """The first place from which on the tokens are the beginning of a longer one."""
    for at in range(len(ids)):
        text = b"".join(tokens[token] for token in ids[at:])
        is_whole = not 0x80 <= text[0] < 0xC0  # tokens of a part of a character stay
        if is_whole and any(len(data) > len(text) and data.startswith(text) for data in tokens.values()):
            return at
    return len(ids)


@given(PROMPTS)
def test_the_first_token_that_a_longer_one_may_replace_is_drawn_again(tokenizer: Tokenizer, prompt: str) -> None:
    tokens = {token: data for token, data in tokenizer.token_bytes.items() if token != 256}
    ids = tokenizer.encode(prompt)
    at = naive_back_up(ids, tokens)
    read, again = beginnings_of(tokenizer).back_up(tuple(ids))
    assert read == (tuple(ids[:at]) or (256,))
    assert again == tuple(ids[at:])
    if again:
        may_come = {token for token, data in tokens.items() if data.startswith(tokenizer.decode_bytes(again))}
        assert {*beginnings_of(tokenizer).list_ids(again).tolist()} == may_come | {again[0]}


@given(st.text(max_size=12) | PROMPTS)
def test_what_is_read_and_what_is_drawn_again_are_the_prompt(prompt: str) -> None:
    gpt2 = gpt2_tokenizer()
    read, again = beginnings_of(gpt2).back_up(tuple(gpt2.encode(prompt)) or (50256,))
    assert gpt2.decode(tuple(token for token in read if token != 50256) + again) == prompt


def test_llguidance_backs_up_by_the_same_tokens() -> None:
    """After any text, with a grammar of any text; if no token is longer, it draws the last one, which changes nothing.

    That one may be drawn in parts there, which are shorter tokens.
    """
    llguidance = pytest.importorskip("llguidance")
    from llguidance import LLInterpreter, LLTokenizer, TokenizerWrapper

    gpt2 = gpt2_tokenizer()

    class Words:
        eos_token_id, bos_token_id = 50256, None
        tokens = [gpt2.token_bytes[token] if token != 50256 else b"<|endoftext|>" for token in range(50257)]
        special_token_ids = [50256]

        def __call__(self, text: bytes | str) -> list[int]:
            return gpt2.encode(text if isinstance(text, str) else text.decode())

    wrapped = LLTokenizer(TokenizerWrapper(Words()))
    grammar = llguidance.LLMatcher.grammar_from_regex("(?s:.*)")
    text = "Once upon a time, http://www.example.com has 12,345 naïve cafés...\n\n  The unbelievable kings' (sons)!"
    for end in range(1, len(text) + 1):
        ids = tuple(gpt2.encode(text[:end]))
        kept = tuple(LLInterpreter(wrapped, grammar).process_prompt([*ids]))
        read, again = beginnings_of(gpt2).back_up(ids)
        assert kept + (again or ids[-1:]) == ids, text[:end]
        assert read == (kept or (50256,) if again else ids)


def test_tokens_beside_bpe_are_neither_drawn_again_nor_drawn_in_place_of_others(tokenizer: Tokenizer) -> None:
    added = [AddedToken(256, "<|endoftext|>", special=True), AddedToken(280, " king")]
    special = SpecialTokens(tuple(added), begin=(256,), end=(256,), start=256)
    odd = Beginnings(Tokenizer(tokenizer.encoder, tokenizer._merged, tokenizer.token_bytes, special))
    ids = tuple(tokenizer.encode("a the"))
    assert odd.back_up((*ids, 256)) == ((*ids, 256), ())
    assert odd.back_up((*ids, 280)) == ((*ids, 280), ())
    assert not {256, 280} & {*odd.list_ids((107,)).tolist(), *odd.list_ids((32,)).tolist()}
    assert odd.back_up((256, 79)) == ((256,), (79,))


def test_without_an_end_of_text_a_prompt_keeps_its_first_token(tokenizer: Tokenizer) -> None:
    without = Beginnings(Tokenizer(tokenizer.encoder, tokenizer._merged, tokenizer.token_bytes, SpecialTokens()))
    on, n = tokenizer.encode("On"), tokenizer.encode("Onc")[-1]
    assert without.back_up((*on,)) == ((*on,), ())
    assert without.back_up((*on, n)) == ((*on,), (n,))
    assert beginnings_of(tokenizer).back_up((*on, n)) == ((256,), (*on, n))


# ---- what is drawn


@settings(max_examples=40)
@given(st.lists(PROMPTS, min_size=1, max_size=5), st.sampled_from([0.0, 1.0]), st.integers(1, 3))
def test_prompt_and_completion_are_the_text_of_the_tokens(
    parts: tuple[Engine, Tokenizer], prompts: list[str], temperature: float, n: int
) -> None:
    tokenizer, params = parts[1], replace(HEALED, temperature=temperature, n=n)
    for row in complete(parts, prompts, params):
        request = checked(tokenizer, prompts[row.row], params)
        read = tuple(token for token in request.prompt_token_ids if token != 256)
        text = tokenizer.decode(read + row.completion_token_ids)
        assert row.prompt == prompts[row.row]
        assert text.startswith(row.prompt)
        assert (row.prompt + row.completion) == text.rstrip("\ufffd") or "\ufffd" in row.completion
        assert (row.prompt_tokens, row.completion_tokens) == (len(request.prompt_token_ids), 6)


@settings(max_examples=30)
@given(st.lists(PROMPTS, min_size=1, max_size=5))
def test_a_prompt_that_no_longer_token_may_end_is_completed_as_without(
    parts: tuple[Engine, Tokenizer], prompts: list[str]
) -> None:
    params = replace(HEALED, temperature=0.9, logprobs=2)
    whole = [prompt for prompt in prompts if not checked(parts[1], prompt).all_again[0]]
    assert complete(parts, whole, params) == complete(parts, whole, replace(params, heal=False))


@settings(max_examples=20)
@given(st.lists(PROMPTS, min_size=2, max_size=6), st.sampled_from([0.0, 1.0]), st.integers(0, 5))
def test_a_row_is_the_same_alone_and_from_its_first_tokens_on(
    parts: tuple[Engine, Tokenizer], prompts: list[str], temperature: float, n_begun: int
) -> None:
    params = replace(HEALED, temperature=temperature, logprobs=1)
    for row in complete(parts, prompts, params):
        item = replace(checked(parts[1], prompts[row.row], params), row=row.row)
        assert complete_chunk(Chunk(0, (item,)), params, *parts) == [row]
        begun = replace(item, begun=(Begun(0, row.completion_token_ids[:n_begun]),))
        assert complete_chunk(Chunk(0, (begun,)), params, *parts) == [row]


def test_first_tokens_that_do_not_go_on_from_the_prompt_are_refused(parts: tuple[Engine, Tokenizer]) -> None:
    item = replace(checked(parts[1], "a ti"), begun=(Begun(0, (97, 98)),))
    with pytest.raises(UsageError, match="they were changed there"):
        complete_chunk(Chunk(0, (item,)), HEALED, *parts)


def test_equal_texts_with_other_ends_are_no_duplicates(parts: tuple[Engine, Tokenizer]) -> None:
    """Both read the same tokens; what they draw again differs."""
    rows = complete(parts, ["a ti", "a k", "a ti"], HEALED)
    assert rows[0].completion_token_ids == rows[2].completion_token_ids != rows[1].completion_token_ids
    assert {row.prompt_tokens for row in rows} == {1}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_probabilities_are_the_models_renormalised(tokenizer: Tokenizer, temperature: float) -> None:
    beginnings, (again,) = beginnings_of(tokenizer), [tuple(tokenizer.encode(" t"))]
    params = SamplingParams(max_tokens=4000, temperature=temperature, heal=True)
    logits = np.random.default_rng(0).normal(size=tokenizer.n_vocab).astype(np.float32)
    prompt = Prompt(0, (1,), params, (5,), make_guide=lambda: HealingGuide(beginnings, again))
    sequence = Sequence(prompt, 0, 5, guide=HealingGuide(beginnings, again))
    drawn = []
    for _ in range(4000 if temperature else 1):
        drawn += sample(logits[None].copy(), [sequence], (256,))
        sequence.token_ids.append(0)  # the next random number
    ids = beginnings.list_ids(again)
    expected = np.exp(logits[ids]) / np.exp(logits[ids]).sum()
    if temperature:
        assert np.abs(np.bincount(drawn, minlength=tokenizer.n_vocab)[ids] / 4000 - expected).max() < 0.03
    assert {*drawn} <= {*ids.tolist()} if temperature else drawn == [ids[expected.argmax()]]


def test_the_first_token_is_transformers_unless_its_bias_decides(generator: Generator) -> None:
    """Vectors by transformers itself: benchmarks/hf_healing.py."""
    cases = CASES["cases"]
    rows = generator.generate([case["prompt"] for case in cases], replace(HEALED, max_tokens=1))
    assert [row.completion_token_ids for row in rows] == [(case["likeliest"],) for case in cases]
    assert sum(case["likeliest"] == case["theirs"] for case in cases) > len(cases) / 2


# ---- where it ends


def greedy_text(parts: tuple[Engine, Tokenizer], prompt: str, token: str, **changes: Any) -> OutputRow:
    """The completion if these tokens' logits are the largest."""
    ids = parts[1].encode_part(token)
    params = replace(HEALED, logit_bias=tuple((one, 100.0) for one in ids), **changes)
    return complete(parts, [prompt], params)[0]


def test_a_stop_string_is_not_found_in_the_prompt(parts: tuple[Engine, Tokenizer]) -> None:
    row = greedy_text(parts, "a ti", " time", stop=("ti", "m", "ime"))
    assert (row.completion, row.stop_reason, row.finish_reason) == ("", "m", "stop")
    row = greedy_text(parts, "a ti", " time", stop=(" t", " tim"), max_tokens=1)
    assert (row.completion, row.stop_reason, row.finish_reason) == ("me", None, "length")
    row = greedy_text(parts, "a ti", " time", stop=("me",), include_stop=True, echo=True)
    assert row.completion == "a time"


def test_a_stop_token_that_the_prompt_ends_in_ends_nothing(parts: tuple[Engine, Tokenizer]) -> None:
    """Not the line feed that is drawn again, but the next one; nor does min_tokens ban it."""
    line_feed = parts[1].encode_part("\n")[0]
    row = greedy_text(parts, "a\n", "\n", stop_token_ids=(line_feed,))
    assert (row.completion_token_ids, row.completion, row.finish_reason) == ((line_feed,), "", "stop")
    row = greedy_text(parts, "a\n", "\n", stop_token_ids=(line_feed,), min_tokens=2)
    assert row.completion_token_ids[0] == line_feed != row.completion_token_ids[1]
    both = parts[1].encode_part("\n\n")[0]
    row = greedy_text(parts, "a\n", "\n\n", stop_token_ids=(both,))
    assert (row.completion_token_ids, row.finish_reason) == ((), "stop")


def test_an_end_of_text_does_not_come_before_the_prompts_end(parts: tuple[Engine, Tokenizer]) -> None:
    params = replace(HEALED, logit_bias=((256, 100.0),), ignore_eos=False)
    row = complete(parts, ["a ti"], params)[0]
    assert row.finish_reason == "stop"
    assert parts[1].decode(row.completion_token_ids).startswith(" ti")


def test_max_tokens_may_end_within_the_prompt(parts: tuple[Engine, Tokenizer]) -> None:
    on, c = parts[1].encode("Onc")
    row = complete(parts, ["Onc"], replace(HEALED, max_tokens=1, logit_bias=((on, 100.0),)))[0]
    assert (row.completion, row.completion_token_ids, row.prompt_tokens) == ("", (on,), 1)
    row = complete(parts, ["Onc"], replace(HEALED, max_tokens=2, logit_bias=((on, 100.0),)))[0]
    assert row.completion_token_ids == (on, c)


@settings(max_examples=25)
@given(PROMPTS, st.sampled_from([(), ("t",), ("e", " a")]), st.booleans())
def test_a_stream_is_the_rows_text(generator: Generator, prompt: str, stop: tuple[str, ...], echo: bool) -> None:
    params = replace(HEALED, stop=stop, echo=echo, temperature=0.7)
    assert "".join(generator.stream(prompt, params)) == generator.generate([prompt], params)[0].completion


def test_the_stop_strings_of_a_sequence_are_searched_after_the_prompt(tokenizer: Tokenizer) -> None:
    params = SamplingParams(stop=("ab",))
    sequence = Sequence(Prompt(0, (0,), params, (0,), given=b"xa"), 0, 0)
    should_stop, found = StopStrings(tokenizer), []
    for token in b"xabab":
        sequence.token_ids.append(token)
        found.append(should_stop(sequence))
    assert found == [None, None, None, None, "stop"]


@settings(max_examples=40)
@given(PROMPTS, st.lists(TEXTS.filter(bool), min_size=1, max_size=4), st.sampled_from([0.0, 1.5]), st.booleans())
def test_a_pattern_is_of_the_text_after_the_prompt(
    generator: Generator, prompt: str, choices: list[str], temperature: float, is_regex: bool
) -> None:
    pattern: dict[str, Any] = {"choices": choices}
    if is_regex:
        pytest.importorskip("llguidance")
        pattern = {"regex": "|".join(map(re.escape, choices))}
    params = SamplingParams(max_tokens=60, heal=True, temperature=temperature, seed=3, **pattern)
    (row,) = generator.generate([prompt], params)
    assert row.completion in choices
    assert row.finish_reason == "stop"
    item = checked(generator.tokenizer, prompt, params)
    read = tuple(token for token in item.prompt_token_ids if token != 256)
    assert generator.tokenizer.decode(read + row.completion_token_ids) == prompt + row.completion
    begun = replace(item, begun=(Begun(0, row.completion_token_ids[:1]),))
    if len(row.completion_token_ids) > 1:
        assert to_prompts(begun, generator.tokenizer)


def test_openais_offsets_are_of_the_text_that_has_the_tokens(generator: Generator) -> None:
    params = replace(HEALED, logprobs=0, prompt_logprobs=0, max_tokens=2, bad_words=(" ti",))
    for echo, offsets in ((False, [0, 2]), (True, [0, 1, 5, 7])):
        asked = replace(
            params, echo=echo, logit_bias=tuple((one, 100.0) for one in generator.tokenizer.encode(" time"))
        )
        (row,) = generator.generate(["ab ti"], asked)
        assert row.completion[-len("me time") :] == "me time"
        answer = make_answer([asdict(row)], "0" * 32, plan_of(parameters=asked), generator.tokenizer)
        body: Any = answer["response"]
        choice = body["body"]["choices"][0]
        assert choice["text"] == row.completion
        assert choice["logprobs"]["tokens"][-2:] == [" time", " time"]
        assert choice["logprobs"]["text_offset"] == offsets
        assert body["body"]["usage"] == {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4}


def test_each_of_several_prompts_is_healed(parts: tuple[Engine, Tokenizer]) -> None:
    params = replace(HEALED, n=2, temperature=1.0)
    request = Request(0, "p:1", None, "a ti", params, others=("a", "On", "the k"))
    item = make_check(parts[1], 128, Policy())(request)
    rows = complete_chunk(Chunk(0, (item,)), params, *parts)
    for row in rows:
        assert (row.prompt_index, row.prompt) == (row.sample // 2, item.prompts[row.sample // 2][0])
        text = parts[1].decode(tuple(one for one in item.prompts[row.prompt_index][1] if one != 256))
        assert (text + parts[1].decode(row.completion_token_ids)).startswith(row.prompt)
    one = replace(request, prompt="a ti", others=())
    alone = complete_chunk(Chunk(0, (make_check(parts[1], 128, Policy())(one),)), params, *parts)
    assert [row.completion for row in alone] == [row.completion for row in rows[:2]]


# ---- which rows


def test_a_prompt_of_token_ids_is_rejected_and_one_that_is_only_read_is_read_whole(tokenizer: Tokenizer) -> None:
    item = checked(tokenizer, (97, 32))
    assert isinstance(item, Rejected)
    assert item.error.endswith("and --heal is for texts; give its text, or heal false")
    reading = checked(tokenizer, "a ti", replace(HEALED, max_tokens=0, prompt_logprobs=0))
    assert (reading.prompt_token_ids, reading.all_again) == (tuple(tokenizer.encode("a ti")), ((),))


def test_a_row_whose_bans_leave_no_token_is_blocked(parts: tuple[Engine, Tokenizer]) -> None:
    row = complete(parts, ["a ti"], replace(HEALED, bad_words=(" ti", " tim", " time")))[0]
    assert (row.completion, row.completion_token_ids, row.finish_reason) == ("", (), "blocked")
    row = complete(parts, ["a ti"], replace(HEALED, bad_words=(" ti", " time")))[0]
    assert row.completion.startswith("m")


def test_the_length_that_counts_is_of_the_tokens_read(tokenizer: Tokenizer) -> None:
    assert isinstance(checked(tokenizer, "aaaa ti", n_ctx=10), TokenizedRequest)
    rejected = checked(tokenizer, "aaaaa ti", n_ctx=10)
    assert isinstance(rejected, Rejected)
    assert rejected.prompt_tokens == 5
    assert "5 prompt tokens + 6 max_tokens exceed n_ctx 10" in rejected.error


@given(PROMPTS, st.integers(8, 20))
def test_truncation_changes_nothing_at_the_end(tokenizer: Tokenizer, prompt: str, n_ctx: int) -> None:
    whole = checked(tokenizer, prompt)
    cut = checked(tokenizer, prompt, n_ctx=n_ctx, on_too_long="truncate-left")
    assert cut.all_again == whole.all_again
    assert cut.prompt_token_ids == whole.prompt_token_ids[-(n_ctx - 6) :]
    short = checked(tokenizer, prompt, n_ctx=n_ctx, on_too_long="shorten")
    if isinstance(short, TokenizedRequest):
        assert len(short.prompt_token_ids) + short.params.max_tokens <= n_ctx


@given(PROMPTS, PROMPTS)
def test_seeds_by_prompt_depend_on_the_whole_prompt(tokenizer: Tokenizer, one: str, other: str) -> None:
    check = make_check(tokenizer, 128, Policy(), seed_by="prompt")
    keys = [check(Request(0, "p:1", None, prompt, HEALED)).seed_key for prompt in (one, other)]
    assert (keys[0] == keys[1]) == (one == other)


def test_a_healed_prompt_that_ends_in_a_space_is_not_counted(parts: tuple[Engine, Tokenizer], tmp_path: Path) -> None:
    for params, count in ((HEALED, 0), (replace(HEALED, heal=False), 1)):
        chunk = Chunk(0, (checked(parts[1], "a ", params), replace(checked(parts[1], "a", params), row=1)))
        rows = complete_chunk(chunk, params, *parts)
        assert make_receipt(chunk, rows, tmp_path).space_ends == count
    assert checked(parts[1], "a ", trim=True).prompt == "a"


def test_a_beginnings_of_bytes_heals_nothing(tmp_path: Path) -> None:
    generator = Generator(write_byte_model(tmp_path / "bytes"))
    texts = ["a ", "the ti", "é"]
    assert generator.generate(texts, HEALED) == generator.generate(texts, replace(HEALED, heal=False))
