"""validation.py: prompt_tokens + max_tokens <= n_ctx for every policy, and a remedy for every rejection."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchgen.errors import InputError
from batchgen.input.validation import make_check
from batchgen.job import EmptyPrompt, OnTooLong, Policy
from batchgen.text.special_tokens import SpecialTokens
from batchgen.types import Rejected, Request, SamplingParams, TokenizedRequest

N_CTX = 1024


class Letters:
    """One token for each character, its code point; counts the calls of encode."""

    special = SpecialTokens(end=(50256,), start=50256)
    special_ids = frozenset({50256})
    n_vocab = n_tokens = 50257
    longest_token_bytes = 4

    def __init__(self) -> None:
        self.calls = 0

    def has_id(self, token_id: int) -> bool:
        return 0 <= token_id < self.n_vocab

    def reads_special_as_text(self, text: str) -> bool:
        return "<|endoftext|>" in text

    def encode(self, text: str, special_tokens: str = "auto", last: int | None = None) -> list[int]:
        self.calls += 1
        return [ord(letter) for letter in text][-(last or 0) :]

    def encode_part(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode_bytes(self, ids: Sequence[int], *, skip_special: bool = False) -> bytes:
        return self.decode(ids).encode()

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))


def validate(
    request: Request | Rejected,
    tokenizer: Letters,
    n_ctx: int,
    on_too_long: OnTooLong = "reject",
    empty_prompt: EmptyPrompt = "reject",
    trim: bool = False,
) -> TokenizedRequest | Rejected:
    return make_check(tokenizer, n_ctx, Policy(on_too_long, empty_prompt, trim))(request)


def request(prompt: str, max_tokens: int = 40, min_tokens: int = 0) -> Request:
    return Request(16, "prompts.jsonl:17", "a", prompt, SamplingParams(max_tokens=max_tokens, min_tokens=min_tokens))


def accepted(outcome: TokenizedRequest | Rejected) -> TokenizedRequest:
    assert isinstance(outcome, TokenizedRequest), outcome
    return outcome


def rejected(outcome: TokenizedRequest | Rejected) -> Rejected:
    assert isinstance(outcome, Rejected), outcome
    return outcome


def test_a_short_prompt_passes_unchanged() -> None:
    got = accepted(validate(request("fox"), Letters(), N_CTX))
    assert got == TokenizedRequest(16, "prompts.jsonl:17", "a", "fox", (102, 111, 120), SamplingParams())


@pytest.mark.parametrize("on_too_long", ["reject", "truncate-left", "shorten"])
def test_exact_fit_is_accepted(on_too_long: OnTooLong) -> None:
    prompt = "x" * (N_CTX - 40)
    got = accepted(validate(request(prompt), Letters(), N_CTX, on_too_long))
    assert (len(got.prompt_token_ids), got.params.max_tokens) == (N_CTX - 40, 40)


def test_one_token_too_many_is_rejected_with_place_values_limit_and_remedy() -> None:
    got = rejected(validate(request("x" * 1009), Letters(), N_CTX))
    assert got.error == (
        "prompts.jsonl:17: 1009 prompt tokens + 40 max_tokens exceed n_ctx 1024; "
        "lower max_tokens to 15 or pass --on-too-long truncate-left"
    )
    assert (got.row, got.id, got.prompt, got.prompt_tokens) == (16, "a", "x" * 1009, 1009)


@pytest.mark.parametrize("length", [1024, 1500])
def test_if_no_max_tokens_helps_none_is_named(length: int) -> None:
    got = rejected(validate(request("x" * length), Letters(), N_CTX))
    assert got.error == (
        f"prompts.jsonl:17: {length} prompt tokens + 40 max_tokens exceed n_ctx 1024; pass --on-too-long truncate-left"
    )


@pytest.mark.parametrize(
    ("length", "on_too_long", "remedy"),
    [
        (5, "reject", "lower max_tokens to 1019 or pass --on-too-long shorten"),
        (5, "truncate-left", "lower max_tokens to 1019 or pass --on-too-long shorten"),
        (1024, "reject", "lower max_tokens below 1024 and pass --on-too-long truncate-left"),
        (1024, "shorten", "lower max_tokens below 1024 and pass --on-too-long truncate-left"),
        (1024, "truncate-left", "lower max_tokens below 1024"),
    ],
)
def test_max_tokens_of_the_whole_context_has_its_own_remedy(length: int, on_too_long: OnTooLong, remedy: str) -> None:
    got = rejected(validate(request("x" * length, max_tokens=1024), Letters(), N_CTX, on_too_long))
    assert got.error.endswith(f"+ 1024 max_tokens exceed n_ctx 1024; {remedy}")


def test_truncate_left_keeps_the_last_tokens() -> None:
    prompt = "".join(chr(1000 + index) for index in range(1009))
    got = accepted(validate(request(prompt), Letters(), N_CTX, "truncate-left"))
    assert got.prompt_token_ids == tuple(range(1000 + 25, 1000 + 1009))
    assert (got.params.max_tokens, got.prompt) == (40, prompt)


def test_shorten_lowers_max_tokens_and_with_it_min_tokens() -> None:
    got = accepted(validate(request("x" * 1009, min_tokens=20), Letters(), N_CTX, "shorten"))
    assert (len(got.prompt_token_ids), got.params.max_tokens, got.params.min_tokens) == (1009, 15, 15)


def test_shorten_rejects_a_prompt_that_leaves_no_room() -> None:
    assert accepted(validate(request("x" * 1023), Letters(), N_CTX, "shorten")).params.max_tokens == 1
    got = rejected(validate(request("x" * 1024), Letters(), N_CTX, "shorten"))
    assert (got.error.split("; ")[1], got.prompt_tokens) == ("pass --on-too-long truncate-left", 1024)


def test_an_empty_prompt_is_rejected_with_its_remedy() -> None:
    got = rejected(validate(request(""), Letters(), N_CTX))
    assert got.error.startswith("prompts.jsonl:17: the prompt is empty")
    assert got.error.endswith("pass --empty-prompt unconditional")
    assert got.prompt_tokens == 0


def test_unconditional_starts_from_the_end_of_text_token() -> None:
    got = accepted(validate(request(""), Letters(), N_CTX, empty_prompt="unconditional"))
    assert (got.prompt, got.prompt_token_ids) == ("", (50256,))


def test_unconditional_needs_an_end_of_text_token() -> None:
    tokenizer = Letters()
    tokenizer.special = SpecialTokens()
    got = rejected(validate(request(""), tokenizer, N_CTX, empty_prompt="unconditional"))
    assert "no <|endoftext|>" in got.error


def test_the_end_of_text_token_takes_its_place_in_the_context() -> None:
    got = validate(request("", max_tokens=1024), Letters(), N_CTX, empty_prompt="unconditional")
    assert "lower max_tokens to 1023" in rejected(got).error


def test_rejected_rows_pass_through_unchanged() -> None:
    row = Rejected(3, "p.jsonl:4", "x", None, "p.jsonl:4: not JSON")
    assert validate(row, Letters(), N_CTX) is row


@pytest.mark.parametrize("on_too_long", ["reject", "shorten"])
def test_a_prompt_of_megabytes_is_rejected_without_being_tokenized(on_too_long: OnTooLong) -> None:
    tokenizer = Letters()
    got = rejected(validate(request("x" * 20_000_000), tokenizer, N_CTX, on_too_long))
    assert tokenizer.calls == 0
    assert got.error == (
        "prompts.jsonl:17: more than 1024 prompt tokens + 40 max_tokens exceed n_ctx 1024; "
        "pass --on-too-long truncate-left"
    )
    assert got.prompt_tokens is None


def test_the_longest_prompt_that_could_fit_is_tokenized() -> None:
    tokenizer = Letters()
    validate(request("x" * N_CTX * tokenizer.longest_token_bytes), tokenizer, N_CTX)
    assert tokenizer.calls == 1


@given(
    length=st.integers(0, 40),
    max_tokens=st.integers(1, 40),
    n_ctx=st.integers(1, 32),
    on_too_long=st.sampled_from(["reject", "truncate-left", "shorten"]),
)
def test_every_accepted_request_fits_and_every_remedy_works(
    length: int, max_tokens: int, n_ctx: int, on_too_long: OnTooLong
) -> None:
    asked = request("x" * length, max_tokens)
    got = validate(asked, Letters(), n_ctx, on_too_long, "unconditional")
    if isinstance(got, TokenizedRequest):
        assert 1 <= len(got.prompt_token_ids) <= n_ctx - got.params.max_tokens
        return
    lower = got.error.partition("lower max_tokens to ")[2].split(" ")[0]
    if lower:
        retry = replace(asked, params=SamplingParams(max_tokens=int(lower)))
        assert isinstance(validate(retry, Letters(), n_ctx, "reject", "unconditional"), TokenizedRequest)
    if got.error.endswith("or pass --on-too-long shorten"):
        assert isinstance(validate(asked, Letters(), n_ctx, "shorten", "unconditional"), TokenizedRequest)
    if got.error.endswith("pass --on-too-long truncate-left") and max_tokens < n_ctx:
        assert isinstance(validate(asked, Letters(), n_ctx, "truncate-left", "unconditional"), TokenizedRequest)


# ---- several prompts, token ids, ids named in parameters


def several(*prompts: str | tuple[int, ...], **params) -> Request:
    return Request(0, "b.jsonl:1", "a", prompts[0], SamplingParams(**params), prompts[1:])


def test_every_prompt_of_a_row_is_tokenized() -> None:
    got = accepted(validate(several("ab", (99, 100), "e"), Letters(), N_CTX))
    assert got.prompts == (("ab", (97, 98)), ("cd", (99, 100)), ("e", (101,)))


def test_one_prompt_that_does_not_fit_rejects_the_row() -> None:
    assert "1020 prompt tokens" in rejected(validate(several("ab", "x" * 1020), Letters(), N_CTX)).error
    assert "the prompt is empty" in rejected(validate(several("ab", ""), Letters(), N_CTX)).error
    assert "token id 50257, outside" in rejected(validate(several("ab", (50257,)), Letters(), N_CTX)).error


def test_a_row_of_several_prompts_is_shortened_to_what_fits_the_longest() -> None:
    got = accepted(validate(several("ab", "x" * 1000, "c"), Letters(), N_CTX, "shorten"))
    assert got.params.max_tokens == 24
    cut = accepted(validate(several("ab", "x" * 1000), Letters(), N_CTX, "truncate-left"))
    assert [len(ids) for _, ids in cut.prompts] == [2, 984]


@pytest.mark.parametrize("name", ["stop_token_ids", "logit_bias", "allowed_token_ids"])
def test_a_parameter_with_a_token_outside_the_vocabulary_rejects_the_row(name: str) -> None:
    value = ((50257, 1.0),) if name == "logit_bias" else (50257,)
    got = rejected(validate(several("a", **{name: value}), Letters(), N_CTX))
    assert got.error == f"b.jsonl:1: {name} has token id 50257, outside the vocabulary (0 to 50256); correct it"
    inside = ((0, 1.0),) if name == "logit_bias" else (50256,)
    accepted(validate(several("a", **{name: inside}), Letters(), N_CTX))


BANNING = {
    "bad_words": ({"allowed_token_ids": (97,), "bad_words": "a"}, "are all banned by bad_words"),
    "min_tokens": (
        {"allowed_token_ids": (9,), "stop_token_ids": (9,), "min_tokens": 1},
        "are all banned by min_tokens",
    ),
    "bad_words and min_tokens": (
        {"allowed_token_ids": (97, 9), "stop_token_ids": (9,), "bad_words": "a", "min_tokens": 1},
        "are all banned by bad_words and min_tokens",
    ),
    "allowed_token_ids": ({"allowed_token_ids": (97,), "choices": ("b", "ab")}, "can spell none of the choices"),
    "allowed_token_ids, bad_words": (
        {"allowed_token_ids": (97, 98), "bad_words": "a", "choices": ("ba",)},
        "that are not banned by bad_words can spell none of the choices",
    ),
}


@pytest.mark.parametrize("causes", BANNING)
def test_parameters_that_ban_every_allowed_token_reject_the_row_and_the_remedies_work(causes: str) -> None:
    options, words = BANNING[causes]
    error = rejected(validate(several("a", **options), Letters(), N_CTX)).error
    assert f"allowed_token_ids {words}; allow " in error
    for more in ({"allowed_token_ids": (*options["allowed_token_ids"], 98, 99)}, {"allowed_token_ids": ()}):
        accepted(validate(several("a", **options | {"choices": ()} | more), Letters(), N_CTX))


def test_trim_removes_spaces_from_the_end_only() -> None:
    got = accepted(validate(several(" a b\n  ", (32,), "c "), Letters(), N_CTX, trim=True))
    assert [text for text, _ in got.prompts] == [" a b\n", " ", "c"]
    assert accepted(validate(several("a "), Letters(), N_CTX)).prompt == "a "
    assert "the prompt is empty" in rejected(validate(several("   "), Letters(), N_CTX, trim=True)).error


def test_trim_removes_spaces_from_the_prompt_of_a_rejected_row_too() -> None:
    def shown(row: Request | Rejected) -> str | None:
        return rejected(validate(row, Letters(), N_CTX, trim=True)).prompt

    too_long = request("x" * N_CTX + "  ")
    unread = Rejected(1, "b.jsonl:2", None, "a ", "b.jsonl:2: temperature -1 is out of range")
    assert (shown(too_long), shown(unread), shown(replace(unread, prompt=None))) == ("x" * N_CTX, "a", None)
    assert rejected(validate(unread, Letters(), N_CTX)) == unread


@pytest.mark.parametrize("length", [1, N_CTX, N_CTX + 1])
@pytest.mark.parametrize("on_too_long", ["reject", "shorten", "truncate-left"])
def test_a_prompt_of_which_nothing_is_generated_may_fill_the_context(on_too_long: OnTooLong, length: int) -> None:
    text = "".join(chr(100 + number % 500) for number in range(length))
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    item = validate(Request(0, "p:1", None, text, params), Letters(), N_CTX, on_too_long)
    if length > N_CTX and on_too_long != "truncate-left":
        assert isinstance(item, Rejected)
        assert item.error == "p:1: 1025 prompt tokens exceed n_ctx 1024; pass --on-too-long truncate-left"
    else:
        assert isinstance(item, TokenizedRequest)
        assert item.prompt_token_ids == tuple(map(ord, text[-N_CTX:]))
        assert item.params == params


def test_the_text_of_token_ids_is_that_of_those_that_are_kept() -> None:
    """So that it can be begun with again: an output row has these ids alone."""
    ids = tuple(100 + number % 500 for number in range(N_CTX))
    item = validate(Request(0, "p:1", None, ids, SamplingParams()), Letters(), N_CTX, "truncate-left")
    assert isinstance(item, TokenizedRequest)
    assert item.prompt_token_ids == ids[40:]
    assert item.prompt == "".join(map(chr, ids[40:]))


def test_a_prompt_that_the_vocabulary_cannot_spell_is_a_rejected_row() -> None:
    class NoQ(Letters):
        def encode(self, text: str, special_tokens: str = "auto", last: int | None = None) -> list[int]:
            raise InputError("no token for q")

    assert rejected(validate(several("q"), NoQ(), N_CTX)).error == "b.jsonl:1: no token for q"


# ---- what random numbers hang on


def key_of(seed_by: str, prompts: Sequence[str | tuple[int, ...]], id_: str | None = "a", row: int = 0, **rules: Any):
    one = Request(row, "p:1", id_, prompts[0], SamplingParams(max_tokens=4), tuple(prompts[1:]))
    return accepted(make_check(Letters(), rules.pop("n_ctx", 99), Policy(**rules), None, seed_by)(one)).seed_key


words = st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=3)


@given(words, words, st.text(max_size=3), st.text(max_size=3))
def test_rows_have_the_same_key_if_what_it_is_made_of_is_the_same(a, b, id_a, id_b) -> None:
    assert (key_of("prompt", a, id_a) == key_of("prompt", b, id_b, row=7)) == (a == b)
    assert (key_of("id", a, id_a) == key_of("id", b, id_b, row=7)) == (id_a == id_b)
    assert key_of("row", a) == ()
    keys = [key_of("id", a, id_a), key_of("prompt", a), key_of("id", a, a[0])]
    assert all(len(key) == 4 and all(0 <= number < 2**32 for number in key) for key in keys)
    assert keys[1] not in keys[::2]


def test_a_key_is_made_of_the_tokens_that_the_model_reads() -> None:
    cut = key_of("prompt", ["xxabc"], n_ctx=7, on_too_long="truncate-left")
    same = [key_of("prompt", ["abc"]), key_of("prompt", [(97, 98, 99)]), key_of("prompt", ["abc  "], trim=True)]
    assert same == [cut] * 3
    digest = hashlib.blake2b(np.array([3, 97, 98, 99], "<u4").tobytes(), digest_size=16, person=b"batchgen prompt")
    assert np.array(cut, "<u4").tobytes() == digest.digest()


@pytest.mark.usefixtures("python_names")
def test_a_row_without_an_id_has_no_random_numbers_by_it() -> None:
    one = Request(3, "p:4", None, "fox", SamplingParams())
    got = rejected(make_check(Letters(), 99, Policy(), None, "id")(one))
    remedy = "give it one (id_column names the column), or pass seed_by='prompt'"
    assert got.error == f"p:4: the row has no id, which seed_by='id' needs; {remedy}"
    assert accepted(make_check(Letters(), 99, Policy(), None, "prompt")(one)).seed_key
