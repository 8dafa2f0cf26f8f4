"""guided.py: every completion is what its pattern says, or is marked, in any batch, run and way to cut it."""

import json
import random
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pyarrow.parquet as pq
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from batchgen.errors import SetupError, UsageError
from batchgen.input.parameters import override_params
from batchgen.input.validation import validate
from batchgen.job import Policy
from batchgen.models.model import Model
from batchgen.options import read_grammar, read_schema
from batchgen.output.reading import read_plan
from batchgen.review.replay import replay
from batchgen.run import run_job
from batchgen.text import guided
from batchgen.text.guided import Choices, Pattern, compile_guide
from batchgen.text.special_tokens import AddedToken, SpecialTokens
from batchgen.text.tokenizer import Tokenizer, get_encoder
from batchgen.types import Begun, Chunk, Guide, OutputRow, Rejected, Request, SamplingParams, TokenizedRequest
from batchgen.workers.complete import complete_chunk, map_engine, to_prompts
from tests.support import reference
from tests.support.command import batchgen
from tests.support.jobs import make_job
from tests.support.models import BYTES, sharp_tensors, write_byte_model
from tests.support.vocabulary import gpt2_tokenizer

ROOT = Path(__file__).parents[1]
END = 256  # of the byte vocabulary
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 9},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
SCHEMAS = [
    PERSON,
    {"type": "array", "items": {"enum": ["red", "green", 5, None]}, "minItems": 1, "maxItems": 4},
    {"type": "object", "properties": {"a": {"type": "boolean"}, "b": {"type": "number"}}, "required": ["b"]},
    {"anyOf": [{"type": "string", "pattern": "^[a-c]{1,5}$"}, {"const": {"x": []}}]},
]
PATTERNS: list[dict[str, Any]] = [
    {"choices": ("yes", "no", "not", "né")},
    {"regex": r"[0-9]{4}-[0-9]{2}"},
    {"regex": "(ab|b)*c?[^a-z]"},
    {"regex": "^(?:é/|a)$"},
    {"json_schema": PERSON},
    {"grammar": 'start: list\nlist: "[" (NUMBER ("," list)?)? "]"\nNUMBER: /[0-9]{1,3}/'},
]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Tokenizer]:
    model = Model.open(str(write_byte_model(tmp_path_factory.mktemp("models") / "bytes")))
    return model, model.load_tokenizer()


@pytest.fixture(scope="module")
def tales() -> Tokenizer:
    return get_encoder("tales", ROOT / "data" / "models")


def request(prompt: str, params: SamplingParams, tokenizer: Tokenizer, row: int = 0) -> TokenizedRequest:
    return TokenizedRequest(row, f"p:{row}", None, prompt, tuple(tokenizer.encode(prompt)), params)


def complete(
    parts: tuple[Model, Tokenizer], params: SamplingParams, prompts: list[str], **engine: Any
) -> list[OutputRow]:
    items = tuple(request(prompt, params, parts[1], row) for row, prompt in enumerate(prompts))
    return complete_chunk(Chunk(0, items), params, map_engine(*parts, **engine), parts[1])


def ids_of(guide: Choices | Pattern) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(guide.allowed().view(np.uint8), bitorder="little")).tolist())


def guide_of(tokenizer: Tokenizer, before: bytes = b"", **params: Any) -> Choices | Pattern:
    first = compile_guide(SamplingParams(**params), tokenizer, before)
    assert first is not None
    return first.copy()


def holds(params: SamplingParams, text: str) -> bool:
    """Whether a text is what the parameters ask for, by other libraries."""
    if params.choices:
        return text in params.choices
    if params.regex:
        return regex.fullmatch(params.regex, text) is not None
    if params.json_schema:
        jsonschema.validate(json.loads(text), json.loads(params.json_schema))
        return True
    return regex.fullmatch(r"\[([0-9]{1,3}(,(?R))?)?\]", text) is not None


# ---- which tokens may come

words = st.lists(st.text("abé", min_size=1, max_size=6), min_size=1, max_size=5)


@given(words, st.randoms(use_true_random=False), st.booleans())
def test_a_choice_goes_on_with_each_token_that_leaves_a_choice_and_no_other(
    tales: Tokenizer, choices: list[str], rng: random.Random, with_space: bool
) -> None:
    texts = [f" {text}".encode() if with_space else text.encode() for text in choices]
    guide, done = guide_of(tales, choices=[text.decode() for text in texts]), b""
    while True:
        expected = {
            token
            for token, data in tales.token_bytes.items()
            if token not in tales.special.end and any(text.startswith(done + data) for text in texts)
        }
        assert ids_of(guide) == expected | set(tales.special.end if done in texts else ())
        token = rng.choice(sorted(ids_of(guide)))
        if token in tales.special.end:
            break
        done += tales.token_bytes[token]
        if guide.advance(token):
            break
    assert done in texts


atoms = st.sampled_from(["a", "b", "[ab]", "[^a]", ".", "1", r"\.", " "])
expressions = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.builds("{}{}".format, inner, inner),
        st.builds("(?:{}|{})".format, inner, inner),
        st.builds("(?:{}){}".format, inner, st.sampled_from(["*", "+", "?", "{2}", "{0,3}", "{2,}"])),
    ),
    max_leaves=5,
)


@settings(deadline=None)
@given(expressions, st.randoms(use_true_random=False))
def test_a_regex_goes_on_with_each_character_that_leaves_a_match_and_no_other(
    parts: tuple[Model, Tokenizer], pattern: str, rng: random.Random
) -> None:
    guide, done = guide_of(parts[1], regex=pattern), ""
    for _ in range(12):
        expected = {i for i in range(128) if regex.fullmatch(pattern, done + chr(i), partial=True)}
        is_end = regex.fullmatch(pattern, done) is not None
        assert {token for token in ids_of(guide) if token < 128} == expected
        assert (END in ids_of(guide)) == is_end
        if not expected:
            break
        token = rng.choice(sorted(expected))
        done += chr(token)
        if guide.advance(token):
            assert regex.fullmatch(pattern, done)
            assert not any(regex.fullmatch(pattern, done + chr(i), partial=True) for i in range(128))
            break


@pytest.mark.parametrize("params", PATTERNS)
def test_any_way_to_cut_a_text_into_tokens_is_allowed(params: dict[str, Any]) -> None:
    """So a mask depends on the bytes so far, and not on the tokens that they came in."""
    tokenizer = gpt2_tokenizer()
    text = {"choices": "né", "regex": "2024-10", "json_schema": '{"name": "Zoë", "age": 12}', "grammar": "[12,[345]]"}
    name = next(iter(params))
    text["regex"] = {"(ab|b)*c?[^a-z]": "abbabc!", "^(?:é/|a)$": "é/"}.get(str(params[name]), text["regex"])
    data = text[name].encode()
    one_by_one, whole = guide_of(tokenizer, **params), guide_of(tokenizer, **params)
    ids = tokenizer.encode(text[name])
    assert len(ids) < len(data)
    for guide, tokens in ((whole, ids), (one_by_one, [tokenizer._byte_ids[byte] for byte in data])):
        *first, last = tokens
        for token in first:
            assert token in ids_of(guide)
            assert not guide.advance(token)
        assert last in ids_of(guide)
        assert guide.advance(last) or name == "choices"
    assert ids_of(whole) == ids_of(one_by_one)


@pytest.mark.parametrize("params", PATTERNS)
def test_a_copy_goes_on_by_itself(parts: tuple[Model, Tokenizer], params: dict[str, Any]) -> None:
    guide = guide_of(parts[1], **params)
    before = ids_of(guide)
    other = guide.copy()
    other.advance(min(before))
    assert ids_of(guide) == before
    again = guide.copy()
    again.advance(min(before))
    assert ids_of(again) == ids_of(other)


@pytest.mark.parametrize("params", PATTERNS)
def test_bytes_before_a_pattern_are_part_of_the_first_tokens(
    parts: tuple[Model, Tokenizer], tales: Tokenizer, params: dict[str, Any]
) -> None:
    """What token healing asks for: the prompt's last bytes, then the pattern."""
    guide, plain = guide_of(parts[1], " é./".encode(), **params), guide_of(parts[1], **params)
    for byte in " é./".encode():
        assert ids_of(guide) == {byte}
        assert not guide.advance(byte)
    for _ in range(3):
        assert ids_of(guide) == ids_of(plain)
        token = min(ids_of(plain))
        if guide.advance(token) | plain.advance(token):
            break
    with pytest.raises(UsageError, match="cannot go on from a part of a character, which heal draws again"):
        guide_of(parts[1], b"\xa9", regex="a")
    first = guide_of(tales, b" ", choices=["the king", "queen"])
    assert {tales.token_text(token) for token in ids_of(first)} >= {" ", " t", " the", " qu"}


def test_special_tokens_and_holes_are_never_part_of_a_text() -> None:
    tokens = {i: bytes([i]) for i in range(97, 123)} | {130: b"abc", 131: b"<x>", 140: b"<end>", 141: b"</s>"}
    added = (AddedToken(131, "<x>", special=True), AddedToken(140, "<end>", special=True), AddedToken(130, "abc"))
    tokenizer = Tokenizer({}, [], tokens, SpecialTokens(added, end=(140, 141, 150)))
    for params in ({"regex": "(?s:.)*"}, {"grammar": "start: /(.|<)*/"}):
        assert ids_of(guide_of(tokenizer, **params)) == {*range(97, 123), 130, 140, 141}
    assert ids_of(guide_of(tokenizer, choices=["abc"])) == {97, 130}
    with pytest.raises(UsageError, match=r"^choices '<x>' cannot be made of this vocabulary's tokens"):
        guide_of(tokenizer, choices=["<x>"])
    with pytest.raises(UsageError, match="^regex '<x>' matches no text that this model can write"):
        guide_of(tokenizer, regex="<x>")


def test_without_an_end_token_the_first_complete_text_ends() -> None:
    tokenizer = Tokenizer({}, [], {i: bytes([i]) for i in range(128)}, SpecialTokens())
    guide = guide_of(tokenizer, regex="[ab]+c?")
    assert ids_of(guide) == {97, 98}
    assert guide.advance(97)
    with pytest.raises(UsageError, match="^choices 'yes!' begins with 'yes', which would always end it: this model"):
        guide_of(tokenizer, choices=["yes", "yes!"])


# ---- completions

PROMPTS = ["Once", "The king said ", "né", "1234 ", "a"]


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("draws", [{}, {"temperature": 1.5, "n": 3}, {"temperature": 3.0, "top_p": 0.9, "seed": 5}])
def test_every_completion_is_what_its_pattern_says_or_is_marked(
    parts: tuple[Model, Tokenizer], precision: str, pattern: dict[str, Any], draws: dict[str, Any]
) -> None:
    params = SamplingParams(max_tokens=60, **pattern, **draws)
    parts = parts[0].with_precision(precision), parts[1]
    rows = complete(parts, params, PROMPTS)
    assert len(rows) == len(PROMPTS) * params.n
    for row in rows:
        assert row.finish_reason in ("stop", "length")
        assert row.finish_reason == "length" or holds(params, row.completion)
        assert parts[1].decode(row.completion_token_ids) == row.completion or row.finish_reason == "length"
    assert any(row.finish_reason == "stop" for row in rows)
    for one, prompt in enumerate(PROMPTS):
        alone = replace(request(prompt, params, parts[1], one))
        engine = map_engine(*parts, max_batch=1, share_prefixes=False)
        assert complete_chunk(Chunk(0, (alone,)), params, engine, parts[1]) == [row for row in rows if row.row == one]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.sampled_from(SCHEMAS), min_size=1, max_size=3), st.integers(0, 99))
def test_json_is_of_its_schema(parts: tuple[Model, Tokenizer], schemas: list[dict[str, Any]], seed: int) -> None:
    schema = {"anyOf": schemas} if len(schemas) > 1 else schemas[0]
    params = SamplingParams(max_tokens=100, temperature=1.5, seed=seed, json_schema=schema, n=2)
    for row in complete(parts, params, PROMPTS[:2]):
        assert row.finish_reason == "length" or holds(params, row.completion)


def test_the_likeliest_choice_is_that_of_a_plain_reference(parts: tuple[Model, Tokenizer]) -> None:
    tensors = {name: tensor.astype(np.float64) for name, tensor in sharp_tensors(BYTES).items()}
    choices = ["yes", "no", "not", "maybe", "né", "n"]
    params = SamplingParams(max_tokens=9, choices=choices)
    texts = [choice.encode() for choice in choices]
    for row in complete(parts, params, PROMPTS):
        done = b""
        while True:
            logits = reference.logits([*row.prompt.encode(), *done], tensors, BYTES.n_head)[-1]
            may = [i for i in range(256) if any(text.startswith(done + bytes([i])) for text in texts)]
            may += [END] if done in texts else []
            token = max(may, key=lambda i: logits[i])
            if token == END:
                break
            done += bytes([token])
            if done in texts and not any(text.startswith(done) and text != done for text in texts):
                break
        assert (row.completion, row.finish_reason) == (done.decode(), "stop")


def test_a_pattern_that_allows_every_text_changes_nothing(tales: Tokenizer) -> None:
    model = Model.open(str(ROOT / "data" / "models" / "tales"))
    params = SamplingParams(max_tokens=30, temperature=0.8, n=2, logprobs=1)
    plain = complete((model, tales), params, PROMPTS)
    assert complete((model, tales), replace(params, regex="(?s:.*)"), PROMPTS) == [
        replace(row, parameters=None) for row in plain
    ]


def test_a_sample_goes_on_from_its_first_tokens_as_if_it_had_made_them(parts: tuple[Model, Tokenizer]) -> None:
    for pattern in PATTERNS:
        params = SamplingParams(max_tokens=40, temperature=1.5, seed=3, **pattern)
        (whole,) = complete(parts, params, ["Once"])
        for n in range(1, len(whole.completion_token_ids)):
            item = request("Once", params, parts[1])
            begun = replace(item, begun=(Begun(0, whole.completion_token_ids[:n]),))
            assert complete_chunk(Chunk(0, (begun,)), params, map_engine(*parts), parts[1]) == [whole]
        edited = replace(request("Once", params, parts[1]), begun=(Begun(0, (1, 2)),))
        with pytest.raises(UsageError, match="they were changed there"):
            complete_chunk(Chunk(0, (edited,)), params, map_engine(*parts), parts[1])


@pytest.mark.parametrize("draws", [{}, {"temperature": 1.0, "logprobs": 2}, {"temperature": 1.0, "top_k": 3}])
def test_a_completion_that_can_only_go_on_with_banned_tokens_ends_as_blocked(
    parts: tuple[Model, Tokenizer], draws: dict[str, Any]
) -> None:
    params = SamplingParams(choices=("aaab",), bad_words=("ab",), **draws)
    (row,) = complete(parts, params, ["Once"])
    assert (row.completion, row.finish_reason, row.status) == ("aaa", "blocked", "ok")
    assert row.logprobs is None or len(row.logprobs) == 3


@pytest.mark.parametrize("more", [{}, {"temperature": 1.0}, {"num_beams": 3}, {"heal": True}])
@pytest.mark.parametrize("pattern", [{"choices": ("aa", "aab")}, {"regex": "aab?"}])
def test_a_complete_completion_after_which_no_token_may_come_is_no_blocked_one(
    parts: tuple[Model, Tokenizer], pattern: dict[str, Any], more: dict[str, Any]
) -> None:
    (token,) = parts[1].encode("a")
    params = SamplingParams(allowed_token_ids=(token,), **pattern, **more)
    (row,) = complete(parts, params, ["Once"])
    assert (row.completion, row.finish_reason) == ("aa", "stop")


@pytest.mark.parametrize(
    "pattern",
    [
        {"regex": "(a{1000}){1000}"},
        {"regex": "(a?){300}b{300}"},
        {"regex": "(.*x.*y){200}"},
        {"regex": r"(\p{L}{1,500}[0-9]?){500}"},
        {"grammar": 'start: a\na: "x" a'},
        {"json_schema": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}},
        {"json_schema": {"type": "array", "minItems": 100_000}},
        {"json_schema": {"enum": [f"value {i}" for i in range(4000)]}},
    ],
)
def test_a_pattern_that_grows_without_bound_only_never_completes(
    parts: tuple[Model, Tokenizer], pattern: dict[str, Any]
) -> None:
    (row,) = complete(parts, SamplingParams(max_tokens=9, **pattern), ["Once"])
    assert (row.finish_reason, row.completion_tokens) == ("length", 9)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_guide_lives_no_longer_than_its_sequence(parts: tuple[Model, Tokenizer], beams: int) -> None:
    params, alive = SamplingParams(regex="[a-c]{1,9}", num_beams=beams), weakref.WeakSet()
    prompts = [
        p for row, text in enumerate(PROMPTS) for p in to_prompts(request(text, params, parts[1], row), parts[1])
    ]

    def record(make: Callable[[], Guide]) -> Guide:
        guide = make()
        alive.add(guide)
        return guide

    prompts = [replace(prompt, make_guide=partial(record, prompt.make_guide)) for prompt in prompts]
    done = 0
    for done, _ in enumerate(map_engine(*parts, max_batch=beams).generate(prompts), 1):
        assert len(alive) <= len(PROMPTS) - done
    assert done == len(PROMPTS)


def test_a_pattern_that_grows_too_large_on_its_way_fails_its_row(parts: tuple[Model, Tokenizer]) -> None:
    params = SamplingParams(max_tokens=9, regex="[a-z]*" * 2000)
    (row,) = complete(parts, params, ["Once"])
    assert (row.status, row.completion) == ("failed", None)
    assert regex.match(
        r"p:0: regex is too large to follow after \d tokens \(lexer error: .*\); make it simpler$", row.error
    )


def test_runs_replays_and_reused_rows_agree(tmp_path: Path, parts: tuple[Model, Tokenizer]) -> None:
    lines = [{"prompt": prompt, "n": 2} | pattern for prompt in PROMPTS for pattern in PATTERNS]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    params = SamplingParams(max_tokens=30, temperature=1.2, seed=1)
    outputs = []
    for name, options in {
        "short": {"sampling": replace(params, max_tokens=5)},
        "whole": {},
        "again": {"reuse": (str(tmp_path / "short.parquet"),)},
    }.items():
        options = {"sampling": params, "jobs": 1, "token_ids": True, "chunk_rows": 7} | options
        run_job(make_job(tmp_path / "p.jsonl", tmp_path / f"{name}.parquet", parts[0].directory, **options))
        outputs.append(pq.read_table(tmp_path / f"{name}.parquet").to_pylist())
    assert outputs[1] == outputs[2]
    assert {row["status"] for row in outputs[1]} == {"ok"}
    assert not replay(tmp_path / "whole.parquet", 99, model=str(parts[0].directory)).differences
    assert read_plan(tmp_path / "whole.parquet").llguidance == ""  # which rows have a pattern, no plan knows


# ---- what is refused

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"regex": "a", "choices": ["b"]}, "choices and regex cannot both say what the completion may be; keep one"),
    ({"regex": "a", "stop": "."}, r"stop \('.',\) and regex contradict: regex says where it ends; leave stop out"),
    ({"regex": "a", "min_tokens": 2}, "min_tokens 2 and regex contradict"),
    ({"regex": "a", "ignore_eos": True}, "ignore_eos True and regex contradict"),
    ({"choices": ["a"], "stop_token_ids": [5]}, r"stop_token_ids \(5,\) and choices contradict"),
    ({"choices": ["a", ""]}, "choices '' is out of range"),
    ({"regex": "a" * 2**15}, r"regex has 32768 bytes, which is out of range \(up to 16384\)"),
    ({"json_schema": {"enum": ["a" * 2**20]}}, "json_schema has .* bytes, which is out of range"),
    ({"json_schema": "[]"}, r"json_schema '\[\]' is out of range \(a JSON object of a schema\)"),
    ({"json_schema": '{"a": 1, "a": 2}'}, "json_schema .* is out of range"),
    ({"json_schema": {"const": float("nan")}}, "json_schema .* is out of range"),
    ({"grammar": 5}, "grammar 5 is out of range"),
    ({"regex": "\ud800"}, "regex .* is out of range"),
]
SLOW = {"type": "integer", "allOf": [{"multipleOf": n} for n in (97, 89, 83, 79)]}
DEEP = {"$defs": {f"{i}": {"items": {"$ref": f"#/$defs/{i + 1}"}} for i in range(1500)}, "$ref": "#/$defs/0"}
CHAIN = "start: a0\n" + "\n".join(f"a{i}: a{i + 1}" for i in range(4500)) + '\na4500: "x"'
REJECTED: list[tuple[dict[str, Any], str]] = [
    ({"regex": "("}, r"regex '\(' cannot be used: unclosed group; correct it"),
    ({"regex": "a\\"}, r"regex 'a\\\\' cannot be used: no character follows the last backslash; correct it"),
    ({"json_schema": {"x-guidance": 5}}, "json_schema .* cannot be used: invalid type: integer `5`, .*; correct it"),
    ({"regex": "a(?=b)"}, "regex .* cannot be used: look-around, .* is not supported; correct it"),
    ({"regex": "(" * 300 + ")" * 300}, "regex .* cannot be used: .*; correct it"),
    ({"regex": "[a&&b]"}, "regex .* matches no text that this model can write; correct it"),
    ({"regex": "(a|b){0}"}, "regex .* matches no text but the empty one; correct it"),
    ({"grammar": "good"}, "grammar 'good' cannot be used: line 1, column .*; correct it"),
    ({"grammar": 'root ::= "a"'}, "grammar .* cannot be used: line 1, column 7: .*; this is GBNF: write it in Lark's"),
    ({"grammar": 'start: "a" <|endoftext|>'}, "grammar .* cannot be used: line 1, column 8: unknown special token"),
    ({"json_schema": {"type": "text"}}, "json_schema .* cannot be used: Invalid type: text; correct it"),
    ({"json_schema": {"enum": []}}, "json_schema .* cannot be used: Unsatisfiable schema"),
    ({"json_schema": {"$ref": "http://127.0.0.1:9/a"}}, "json_schema .* cannot be used: Resource"),
    ({"json_schema": SLOW}, "json_schema .* cannot be used: it takes more than 3 s to read; make it simpler"),
    ({"json_schema": DEEP}, "json_schema .* cannot be used: it is nested too deeply, or too large; make it simpler"),
    ({"grammar": CHAIN}, "grammar .* cannot be used: it is nested too deeply, or too large; make it simpler"),
    ({"choices": ["yes", "no way"], "max_tokens": 4}, "choices 'no way' needs 6 tokens or more, and max_tokens is 4"),
    ({"choices": ["a" * 990 + str(i) for i in range(99)]}, "choices have 98198 bytes in all, and 65536 is the most"),
    ({"choices": ["a"], "bad_words": ["a"]}, "bad_words leave no token with which choices may begin; change one"),
    ({"regex": "a+", "allowed_token_ids": [98]}, "allowed_token_ids leave no token with which regex may begin"),
]


@pytest.mark.parametrize(("params", "error"), REFUSED)
def test_what_contradicts_a_pattern_is_named(params: dict[str, Any], error: str) -> None:
    with pytest.raises(UsageError, match=f"^{error}"):
        SamplingParams(**params)


@pytest.mark.parametrize(("params", "error"), REJECTED)
def test_a_pattern_that_cannot_be_met_rejects_its_row(
    parts: tuple[Model, Tokenizer], params: dict[str, Any], error: str
) -> None:
    one = Request(0, "p.jsonl:1", None, "Once", SamplingParams(**params))
    found = validate(one, parts[1], 128, Policy())
    assert isinstance(found, Rejected)
    assert regex.match(f"p.jsonl:1: {error}", found.error)
    assert "\n" not in found.error
    assert len(found.error) < 400


def test_a_pattern_is_read_once_also_if_it_is_refused(
    parts: tuple[Model, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    for params in ({"regex": "(once"}, {"choices": ["a" * 999 + str(i) for i in range(99)]}):
        for _ in range(2):
            with pytest.raises(UsageError):
                compile_guide(SamplingParams(**params), parts[1])
            monkeypatch.setattr(guided, "Pattern", None)
            monkeypatch.setattr(guided, "Choices", None)
        monkeypatch.undo()


def test_a_context_that_leaves_no_room_for_a_choice_rejects_its_row(parts: tuple[Model, Tokenizer]) -> None:
    one = Request(0, "p:1", None, "x" * 124, SamplingParams(choices=["four", "seventh"]))
    found = validate(one, parts[1], 128, Policy(on_too_long="shorten"))
    assert isinstance(found, Rejected)
    assert "choices 'seventh' needs 7 tokens or more, and max_tokens is 4" in found.error


def test_without_the_extra_choices_work_and_a_pattern_says_what_to_install(
    parts: tuple[Model, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    guided._compile.cache_clear()
    assert [row.finish_reason for row in complete(parts, SamplingParams(choices=["yes", "no"]), PROMPTS)] == [
        "stop"
    ] * 5
    for params in PATTERNS[1:]:
        with pytest.raises(SetupError, match=r"not installed; install it with: pip install llguidance$"):
            validate(Request(0, "p:1", None, "Once", SamplingParams(**params)), parts[1], 128, Policy())


# ---- as rows and command lines write them

FORMATS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"guided_choice": ["a", "b"]}, {"choices": ("a", "b")}),
    ({"guided_regex": "a+"}, {"regex": "a+"}),
    ({"guided_json": {"type": "object"}}, {"json_schema": '{"type":"object"}'}),
    ({"guided_grammar": 'start: "a"'}, {"grammar": 'start: "a"'}),
    ({"structured_outputs": {"choice": ["a"]}}, {"choices": ("a",)}),
    ({"structured_outputs": {"regex": "a", "json": None, "disable_fallback": False}}, {"regex": "a"}),
    ({"guided_decoding": {"json": '{"b": 1, "a": 2}'}}, {"json_schema": '{"b":1,"a":2}'}),
    ({"guided_decoding": {"json_object": True}}, {"json_schema": '{"type":"object"}'}),
    ({"response_format": {"type": "json_object"}}, {"json_schema": '{"type":"object"}'}),
    ({"response_format": {"type": "text"}}, {}),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "p", "strict": True, "schema": PERSON}}},
        {"json_schema": json.dumps(PERSON, separators=(",", ":"))},
    ),
]


@pytest.mark.parametrize(("values", "meant"), FORMATS)
def test_the_names_and_shapes_of_others_are_read(values: dict[str, Any], meant: dict[str, Any]) -> None:
    name, value = next(iter(values.items()))
    assert override_params({"params": values}, SamplingParams()) == SamplingParams(**meant)
    assert override_params({"params": json.dumps(values)}, SamplingParams()) == SamplingParams(**meant)
    if not name.startswith("guided_") or name == "guided_decoding":
        assert override_params({name: value}, SamplingParams()) == SamplingParams(**meant)


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"structured_outputs": {"structural_tag": {}}}, "'structured_outputs.structural_tag' is not supported"),
        ({"guided_decoding": {"regex": "a", "backend": "xgrammar"}}, "'guided_decoding.backend' is not supported"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "choices and regex cannot both"),
        (
            {"structured_outputs": {"json": {"const": 1}, "json_object": True}},
            "structured_outputs.json_object .* differ",
        ),
        ({"structured_outputs": "fast"}, "structured_outputs 'fast' is not an object"),
        ({"response_format": {"type": "xml"}}, "response_format.type 'xml' is not supported"),
        ({"response_format": {"type": "json_schema"}}, "response_format.type 'json_schema' is not supported as it is"),
        ({"response_format": {"type": "text", "more": 1}}, "'response_format.more' is not supported"),
        ({"choices": {"text": ["a", "b"], "label": ["A", "B"]}}, "choices .* rename it or pass --no-row-params"),
        ({"choices": "a, b"}, r"choices 'a, b' is out of range \(a list of strings.*--no-row-params"),
        ({"choices": [1, 2]}, "choices 1 is out of range .*--no-row-params"),
        ({"grammar": 0.5}, "grammar 0.5 is out of range .*--no-row-params"),
    ],
)
def test_what_is_asked_for_and_not_taken_is_named(values: dict[str, Any], error: str) -> None:
    with pytest.raises(UsageError, match=f"^{error}"):
        override_params(values, SamplingParams())


def test_a_rows_pattern_stands_in_place_of_the_jobs() -> None:
    base = SamplingParams(choices=["a"])
    assert override_params({"regex": "b"}, base) == SamplingParams(regex="b")
    assert override_params({"choices": []}, base) == SamplingParams()
    assert override_params({"regex": None}, base) == base
    assert override_params({"regex": ""}, SamplingParams(regex="b")) == SamplingParams()


def test_a_file_is_read_by_a_command_line_and_never_by_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.json").write_text('\ufeff{"type": "object"}')
    (tmp_path / "g.lark").write_text('start: "a"')
    (tmp_path / "binary").write_bytes(b"\xff")
    assert read_schema("s.json") == read_schema("@s.json") == '{"type": "object"}'
    assert read_schema(' {"a": 1}') == ' {"a": 1}'
    assert read_grammar("g.lark") == read_grammar("@g.lark") == read_grammar('start: "a"')
    for read in (read_schema, read_grammar):
        for name in ("none", "binary", "", "\0", "x" * 5000, "."):
            with pytest.raises(ValueError, match="cannot be read as a file"):
                read(name)
    with pytest.raises(UsageError, match="^json_schema '@s.json' is out of range"):
        override_params({"json_schema": "@s.json"}, SamplingParams())
    assert override_params({"regex": "@s.json"}, SamplingParams()).regex == "@s.json"


def test_a_job_keeps_the_schema_of_a_file_that_is_gone(tmp_path: Path, parts: tuple[Model, Tokenizer]) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "Once"}\n')
    (tmp_path / "s.json").write_text(json.dumps(PERSON, indent=1))
    command = ("generate", "p.jsonl", "--model", parts[0].directory, "-o", "o.parquet", "--json-schema", "s.json")
    assert batchgen(*command, "--max-tokens", 60, "--jobs", 1, folder=tmp_path).returncode == 0
    (tmp_path / "s.json").unlink()
    assert not replay(tmp_path / "o.parquet", 9, model=str(parts[0].directory)).differences
    assert read_plan(tmp_path / "o.parquet").llguidance == version("llguidance")
    done = batchgen(*command, folder=tmp_path)
    assert (done.returncode, b"--json-schema 's.json' cannot be read as a file" in done.stderr) == (2, True)
    done = batchgen(*command[:-1], '{"type": "text"}', folder=tmp_path)
    assert (done.returncode, b"Invalid type: text" in done.stderr) == (2, True)
