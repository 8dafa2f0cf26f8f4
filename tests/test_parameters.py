"""parameters.py: a row's parameters win, null means the command line's, and a wrong value is named."""

import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchgen.errors import UsageError
from batchgen.input.parameters import (
    ALIASES,
    ASKING,
    PARAMETERS,
    asked_in,
    find_misspelled,
    find_results,
    override_params,
    parameter_names,
    parse_text,
)
from batchgen.options import options_of
from batchgen.types import MAX_STOPS, PATTERN_NAMES, SamplingParams

BASE = SamplingParams(max_tokens=9, temperature=0.5, seed=7, stop=("x",), logprobs=1)

VALUES: dict[str, list[tuple[Any, Any]]] = {  # as written in a row, as it is then
    "max_tokens": [(3, 3), (3.0, 3)],
    "temperature": [(0, 0), (1.5, 1.5), (1e-6, 0.0)],
    "top_k": [(40.0, 40), (-1, 0)],
    "top_p": [(1, 1)],
    "min_p": [(0.25, 0.25)],
    "repetition_penalty": [(1.5, 1.5)],
    "presence_penalty": [(-1, -1)],
    "frequency_penalty": [(2.0, 2.0)],
    "logit_bias": [({"5": -100, "7": 1.5, "9": None}, ((5, -100), (7, 1.5))), ([(5, 2.0)], ((5, 2.0),)), ({}, ())],
    "stop_token_ids": [([1, 2], (1, 2)), ([], ())],
    "min_tokens": [(4, 4)],
    "ignore_eos": [(True, True)],
    "n": [(2, 2)],
    "seed": [(2**63 - 1, 2**63 - 1)],
    "logprobs": [(0, 0), (5, 5)],
    "prompt_logprobs": [(0, 0), (5.0, 5)],
    "stop": [("a", ("a",)), (["a", "\n\n"], ("a", "\n\n")), ([], ()), ("", ()), (["", "a"], ("a",))],
    "include_stop": [(True, True)],
    "bad_words": [("a", ("a",)), (["a", "b"], ("a", "b"))],
    "echo": [(True, True)],
    "stop_loops": [(True, True)],
    "skip_special_tokens": [(True, True)],
    "choices": [(["a", "b"], ("a", "b")), ([], ())],
    "regex": [("[a-z]", "[a-z]"), ("", None)],
    "json_schema": [({"b": 1, "a": [2]}, '{"b":1,"a":[2]}'), ('{"type": "object"}', '{"type":"object"}'), ("", None)],
    "grammar": [('start: "a"', 'start: "a"')],
    "num_beams": [(1.0, 1)],
    "length_penalty": [(-2, -2), (0.5, 0.5)],
    "early_stopping": [(True, "true"), (False, "false"), ("True", "true"), ("never", "never")],
    "no_repeat_ngram_size": [(3, 3), (0, 0), (2.0, 2)],
    "dry_multiplier": [(0.8, 0.8), (0, 0)],
    "dry_base": [(1, 1), (1.75, 1.75)],
    "dry_allowed_length": [(0, 0), (3.0, 3)],
    "dry_sequence_breakers": [("a", ("a",)), (["\n", ":"], ("\n", ":")), ([], ()), ("", ())],
    "allowed_token_ids": [([1, 2], (1, 2)), ([], ())],
    "heal": [(True, True)],
    "typical_p": [(1, 1), (0.2, 0.2)],
    "top_n_sigma": [(0, 0), (1.5, 1.5), (-1.0, 0.0)],
    "xtc_probability": [(0.5, 0.5), (1, 1)],
    "xtc_threshold": [(0, 0), (0.2, 0.2)],
}
WRONG: dict[str, list[Any]] = {
    "max_tokens": [0, 2.5, "4", True, [3], {}, 10**400, float("inf")],
    "temperature": ["hot", 10**400, float("nan"), 1e308, [0.5]],
    "top_k": [-2],
    "top_p": [0, 2],
    "min_p": [2],
    "repetition_penalty": [0],
    "presence_penalty": [101],
    "frequency_penalty": ["1"],
    "logit_bias": [[5], {"five": 1}, {"-5": 1}, {"5": "1"}, {"5": 101}, {"٣": 1}, 5, "5", [[True, 1.0]], {"5": True}],
    "stop_token_ids": [5, [-1], ["5"], [True], [1.5], list(range(65)), {}],
    "min_tokens": [10],
    "ignore_eos": [1, "true"],
    "n": [0],
    "seed": [-1],
    "logprobs": [101, True],
    "prompt_logprobs": [101, -1, True, "1"],
    "stop": [5, ["a"] * (MAX_STOPS + 1), [None], {"a": 1}, "x" * 1001, "\ud800", b"a"],
    "include_stop": ["yes"],
    "bad_words": [5, [5], ["a"] * 65],
    "echo": [0],
    "stop_loops": ["no"],
    "skip_special_tokens": [1],
    "choices": ["a", {"text": ["a"], "label": ["A"]}, [1], [""], ["a"] * 1025, ["\ud800"], 5],
    "regex": [5, ["a"], "a" * 2**15, "\ud800", True],
    "json_schema": [5, ["a"], "a", "[]", {"a": "x" * 2**17}, '{"a": NaN}'],
    "grammar": [5, {}, "x" * 2**17],
    "num_beams": [0, 65, "4", True],
    "length_penalty": [11, -11, "1", float("nan")],
    "early_stopping": [1, 0, "always", [True], {}],
    "no_repeat_ngram_size": [-1, 1.5, "3", True],
    "dry_multiplier": [-1, 101, "1"],
    "dry_base": [0.5, 101, float("nan")],
    "dry_allowed_length": [-1, 0.5],
    "dry_sequence_breakers": [5, [5], ["a"] * 65, "é" * 21, "\ud800"],
    "allowed_token_ids": [5, [-1], ["5"], [True], [1.5], {}],
    "heal": [1, "yes"],
    "typical_p": [0, 1.1, -1, "0.9", float("nan")],
    "top_n_sigma": [-2, 101, "1"],
    "xtc_probability": [-0.1, 1.5, True],
    "xtc_threshold": [-0.1, 2, [0.1]],
}


def test_every_parameter_is_tried() -> None:
    names = {field.name for field in fields(SamplingParams)}
    assert names == set(VALUES) == set(WRONG) == PARAMETERS


@pytest.mark.parametrize(("name", "written", "meant"), [(n, w, m) for n, pairs in VALUES.items() for w, m in pairs])
def test_a_value_in_a_row_wins_and_leaves_the_others(name: str, written: Any, meant: Any) -> None:
    base = replace(BASE, stop=()) if name in PATTERN_NAMES else BASE
    got = override_params({name: written}, base)
    assert getattr(got, name) == meant
    assert type(getattr(got, name)) is type(meant)
    assert got.as_dict() | {name: None} == base.as_dict() | {name: None}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_wrong_value_is_refused_by_name_in_one_line(name: str, value: Any) -> None:
    with pytest.raises(UsageError) as caught:
        override_params({name: value}, BASE)
    text = str(caught.value)
    assert text.startswith(name)
    assert "out of range" in text or "exceeds max_tokens" in text or "is none of false, true, never" in text
    assert len(text) < 200
    assert "\n" not in text
    text.encode()


def test_null_is_the_command_lines_value() -> None:
    assert override_params(dict.fromkeys(PARAMETERS), BASE) is BASE
    assert override_params({}, BASE) is BASE


@given(
    st.dictionaries(
        st.sampled_from(sorted(PARAMETERS)),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        ),
    )
)
def test_any_json_gives_parameters_or_one_line(values: dict[str, Any]) -> None:
    try:
        got = override_params(values, BASE)
    except UsageError as error:
        text = str(error)
    else:
        text = ""
        assert SamplingParams(**got.as_dict()) == got
        hash(got)
        json.dumps(got.as_dict())
    assert "\n" not in text


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("max_token", "max_tokens"),
        ("maxTokens", "max_tokens"),
        ("max-tokens", "max_tokens"),
        ("temprature", "temperature"),
        ("Temperature", "temperature"),
        ("topp", "top_p"),
        ("top-k", "top_k"),
        ("logprob", "logprobs"),
        ("Stop", "stop"),
        ("frequence_penalty", "frequency_penalty"),
        *ALIASES.items(),
    ],
)
def test_a_misspelled_parameter_is_named_with_the_right_one(name: str, near: str) -> None:
    with pytest.raises(UsageError, match=f"^'{name}' is not a parameter; did you mean '{near}'"):
        parameter_names(("prompt", name), ("prompt",))


@pytest.mark.parametrize(
    "name",
    [
        "topic",
        "text",
        "step",
        "stops_at",
        "N",
        "speed",
        "need",
        "no",
        "m",
        "tokens",
        "n_tokens",
        "prompt_tokens",
        "model",
        "completion_token_ids",
        "top_logprobs",
        "temp",
        "echoes",
        "",
        "x" * 10_000,
        "🦊",
    ],
)
def test_other_columns_are_ignored(name: str) -> None:
    assert find_misspelled(name) is None
    assert parameter_names((name, "seed")) == ("seed",)


def test_the_prompt_and_the_id_are_never_parameters() -> None:
    assert parameter_names(("stop", "seed", "n"), ("stop", "seed")) == ("n",)


# ---- objects of parameters


@pytest.mark.parametrize("column", ["sampling_params", "parameters", "options", "generation_config", "samplingParams"])
@pytest.mark.parametrize("write", [dict, json.dumps, str, lambda members: list(members.items())])
def test_an_object_of_parameters_gives_them_under_any_librarys_names(column: str, write: Any) -> None:
    members = {"max_new_tokens": 3, "stop_sequences": [",", "."], "top_k": -1, "seed": None, "mirostat": None}
    assert override_params({column: write(members)}, BASE) == replace(BASE, max_tokens=3, stop=(",", "."), top_k=0)


@pytest.mark.parametrize(
    ("members", "error"),
    [
        (
            {"max_tokens": 3, "mirostat": 2},
            "'options.mirostat' is not supported; leave it out or pass ",
        ),
        ({"max_tokens": 3, "best_of": 5}, "options.best_of 5 is not supported; leave it out"),
        ({"maxTokens": 3}, "'options.maxTokens' is not supported; did you mean 'max_tokens'?"),
        ({"parameters": {"max_tokens": 3}}, "'options.parameters' is not supported; leave it out"),
        ({"max_tokens": 0}, "max_tokens 0 is out of range (1 or more)"),
        ({"max_tokens": 3, "max_new_tokens": 4}, "options.max_tokens 3 and options.max_new_tokens 4 differ; keep one"),
        ({"seed": 3, 5: 1}, "'options.5' is not supported; leave it out"),
        (
            '{"max_tokens": 3',
            """options '{"max_tokens": 3' is not an object that can be read; write {"max_tokens": 8}""",
        ),
        ('{"top_p": 1, "top_p": 0.5}', """options '{"top_p": 1, "top_p": 0.5}' is not an object"""),
    ],
)
def test_what_an_object_asks_for_and_is_not_taken_is_named(members: Any, error: str) -> None:
    with pytest.raises(UsageError) as caught:
        override_params({"options": members}, BASE)
    assert str(caught.value).startswith(error)


@pytest.mark.parametrize(
    "value", [["a", "b"], {"A": "x", "B": "y"}, "a, b", "{a, b}", "n = 3", 5, {}, [], {5: 6}, '{"A": 1}', [["a", 1]]]
)
def test_options_that_are_no_parameters_are_the_users_own(value: Any) -> None:
    assert override_params({"options": value}, BASE) is BASE


@pytest.mark.parametrize(
    "value",
    [
        *(
            {"until": ["."]},
            {"top_tokens": 5},
            [{"max_tokens": 3}],
            [["max_tokens", 3], ["n"]],
            5,
            "t 0.5",
            "a=1",
            "[1]",
        ),
        json.dumps('{"max_tokens": 3}'),
    ],
)
@pytest.mark.parametrize("column", ["sampling_params", "gen_kwargs", "generationConfig", "decoding_parameters"])
def test_what_an_object_only_of_parameters_asks_for_is_never_ignored(column: str, value: Any) -> None:
    with pytest.raises(UsageError, match=rf"^'?{column}.* (leave it out or|8}} or) pass --no-row-params$"):
        override_params({column: value}, BASE)


@pytest.mark.parametrize("value", [None, "", " ", "greedy", "NA", {}, [], False, 0, {"until": None}])
def test_an_object_of_parameters_that_asks_for_nothing_is_taken(value: Any) -> None:
    assert override_params({"gen_kwargs": value}, BASE) is BASE


@pytest.mark.parametrize("value", [[{"max_tokens": 3}], '"{\\"max_tokens\\": 3}"', "max_tokens=3"])
def test_parameters_in_another_shape_than_an_object_are_named(value: Any) -> None:
    for column in ("parameters", "options", "model_kwargs"):
        with pytest.raises(UsageError, match=f"^{column} .* is not an object that can be read"):
            override_params({column: value}, BASE)


def test_a_column_and_a_member_that_differ_are_named() -> None:
    assert override_params({"n": 2, "params": {"n": 2.0}}, BASE).n == 2
    with pytest.raises(UsageError, match="^n 2 and params.n 3 differ; keep one$"):
        override_params({"n": 2, "params": {"n": 3}}, BASE)


# ---- values that ask for nothing

NOTHING: list[dict[str, Any]] = [
    {"best_of": 2, "n": 2},
    {"best_of": 1, "use_beam_search": False, "num_beams": 1, "length_penalty": 1.0, "early_stopping": False},
    {"truncate_prompt_tokens": None, "prompt_logprobs": None, "typical_p": None},
    {"do_sample": True, "temperature": 0.7},
    {"do_sample": False, "temperature": 0},
]
NO_MEMBERS = {
    "logprobs": False,
    "prompt_logprobs": False,
    "top_logprobs": 0,
    "stream_options": {},
    "extra_body": {},
    "return_token_ids": False,
}


@pytest.mark.parametrize("values", NOTHING)
def test_a_value_that_asks_for_nothing_is_taken(values: dict[str, Any]) -> None:
    assert parameter_names(values) == tuple(values)
    asked = {name: value for name, value in values.items() if name in PARAMETERS and value is not None}
    assert override_params(values, BASE) == override_params({"params": values}, BASE) == replace(BASE, **asked)
    assert override_params({"params": values | NO_MEMBERS}, BASE) == replace(BASE, **asked)


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"best_of": 3, "n": 2}, "best_of 3 is not supported; leave it out"),
        ({"use_beam_search": True}, "use_beam_search True is not supported; give num_beams instead"),
        ({"do_sample": False}, "do_sample False and temperature 0.5 contradict; set temperature to 0"),
        ({"do_sample": True, "temperature": 0}, "do_sample True and temperature 0 contradict; set temperature above 0"),
        (
            {"do_sample": True, "temperature": 0, "num_beams": 4},
            "do_sample True and temperature 0 contradict; "
            "set do_sample to false, or num_beams to 1 and temperature above 0",
        ),
    ],
)
def test_a_value_that_asks_for_something_is_named(values: dict[str, Any], error: str) -> None:
    with pytest.raises(UsageError) as caught:
        override_params(values, BASE)
    assert str(caught.value) == error


# ---- an output of batchgen as an input

OUTPUT = (
    "row",
    "sample",
    "id",
    "prompt",
    "completion",
    "finish_reason",
    "status",
    "seed",
    "parameters",
    "logprobs",
    "prompt_logprobs",
    "prompt_token_ids",
    "prompt_top_logprobs",
    "n",
)


def test_the_results_in_an_output_of_batchgen_are_no_parameters() -> None:
    assert find_results(OUTPUT) == ("seed", "logprobs", "prompt_logprobs", "parameters")
    assert parameter_names(OUTPUT) == ("n",)
    assert find_results(name for name in OUTPUT if name != "finish_reason") == ()


def test_whatever_asks_for_columns_is_sought_under_every_name() -> None:
    names = {name: name for name in ASKING} | {theirs: ours for theirs, ours in ALIASES.items() if ours in ASKING}
    for name, meant in names.items():
        assert asked_in(f'{{"prompt": "a", "body": {{"{name}": 1}}}}'.encode()) == {meant}


def test_every_parameter_is_documented_with_its_range_and_default() -> None:
    text = (Path(__file__).parents[1] / "docs" / "parameters.md").read_text()
    sections = dict(re.findall(r"^### (\w+)\n(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL))
    assert sections.keys() == PARAMETERS
    for field in fields(SamplingParams):
        words = sections[field.name].lower().replace("\n", " ")
        default = f"{field.default:g}" if type(field.default) in (int, float) else str(field.default or "none").lower()
        default = "false" if field.default is False else default
        default = "" if isinstance(field.default, tuple) and field.default else rf"{default}\b"  # texts: in words
        assert re.search(rf"default {default}", words, re.IGNORECASE), field.name
    for name, option in options_of(SamplingParams).items():
        high = option.within[1] if option.within else None
        if high is not None and (high < 2**31 - 1 or name == "seed"):
            assert f"{high:g}" in sections[name] or str(high) in sections[name], name


# ---- CSV


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("stop", "['King', '.']", ["King", "."]),
        ("stop", """["it's", 'a "b"', 'c\\n']""", ["it's", 'a "b"', "c\n"]),
        ("stop", " ['a'] ", ["a"]),
        ("bad_words", "('a',)", ["a"]),
        ("bad_words", "{'b', 'a'}", ["b", "a"]),
        ("stop", 'c("a", "b, c")', ["a", "b, c"]),
        ("stop", 'list("a")', ["a"]),
        ("stop", "c()", []),
        ("stop", "[]", []),
        ("stop", '["a", "b"]', ["a", "b"]),
        ("stop", "a", "a"),
        ("stop", " ", " "),
        ("stop", "(Laughs)", "(Laughs)"),
        ("stop", "{", "{"),
        ("stop", '"a"', '"a"'),
        ("stop_token_ids", "[1, 2]", [1, 2]),
        ("stop_token_ids", "(1, 2)", [1, 2]),
        ("stop_token_ids", "c(1, 2)", [1, 2]),
        ("logit_bias", "{50256: -100}", {50256: -100}),
        ("logit_bias", "{'50256': -1.5}", {"50256": -1.5}),
        ("logit_bias", "[(50256, -1.5)]", [(50256, -1.5)]),
        ("temperature", "NA", None),
        ("echo", "<NA>", None),
        ("seed", r"\N", None),
        ("seed", "", None),
        ("seed", "1e+05", 100000.0),
        ("seed", "0x10", "0x10"),
        ("temperature", ".5", 0.5),
        ("max_tokens", "2.", 2.0),
        ("seed", "007.", "007."),
        ("stop", "'a', 'b'", ("a", "b")),
        ("stop", '"a","b, c"', ("a", "b, c")),
        ("stop", "a, b", "a, b"),
        ("temperature", "0,8", "0,8"),
        ("logit_bias", '{"7": 1, "7": 2}', '{"7": 1, "7": 2}'),
        *(("echo", text, True) for text in ("True", "TRUE", "true", "1", "1.0", "t", " True")),
        *(("stop_loops", text, False) for text in ("False", "FALSE", "false", "0", "0.0", "f")),
        ("echo", "yes", "yes"),
    ],
)
def test_a_field_of_csv_is_read_as_its_writer_meant_it(name: str, text: str, value: object) -> None:
    found = parse_text(name, text)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    "text",
    [
        *("['a' 'b']", "['a'\n 'b']", '["a" "b"]', "[King, .]", "[INST]", "['a', nan]", "['a', 'b", "['a', ...", "["),
        *("array(['a'], dtype=object)", "np.array(['a'])", "'a', 'b' 'c'", "character(0)", 'c("a", NA)'),
        *('c(a = "b")', "{'a': 1}", "{King,.}"),
        *("('a' 'b')", "()", "{}", "[f'a']", "['\\d']", "[1L]", "['a', b]", "['a'" + "[" * 9999),
        *(r"\N", "NA", "nan", "None", "<NA>", "null", "NULL", "['a', 1]", "['a', ...]", "[['a']]", "[b'a']", "[1.5]"),
    ],
)
@pytest.mark.parametrize("name", ["stop", "bad_words"])
def test_a_list_that_cannot_be_read_is_refused_never_a_string(name: str, text: str) -> None:
    with pytest.raises(UsageError) as caught:
        override_params({name: parse_text(name, text)}, BASE)
    error = str(caught.value)
    assert error.startswith(name)
    assert "out of range" in error
    assert "\n" not in error
    assert len(error) < 200


@pytest.mark.parametrize("text", [r"\N", "NA", "nan", "None", " NA ", "null"])
def test_a_missing_value_is_refused_as_a_regex_and_has_a_form_that_is_one(text: str) -> None:
    with pytest.raises(
        UsageError, match=r"^regex .* is out of range \(a text: leave it empty for none, or write"
    ) as caught:
        parse_text("regex", text)
    assert parse_text("regex", str(caught.value).rpartition(" write ")[2][:-1]) == f"(?:{text.strip()})"
    assert parse_text("regex", "") is None
    assert parse_text("regex", "[ab]") == "[ab]"


@given(texts=st.lists(st.text(max_size=8), min_size=1, max_size=4), tokens=st.lists(st.integers(0, 50256), max_size=4))
def test_what_python_and_json_write_of_a_list_is_that_list(texts: list[str], tokens: list[int]) -> None:
    for written in (repr(texts), json.dumps(texts), repr(tuple(texts)), json.dumps(texts, ensure_ascii=False)):
        assert parse_text("stop", written) == texts
    biases = dict.fromkeys(tokens, -1.5)
    assert parse_text("stop_token_ids", repr(tokens)) == tokens
    assert parse_text("logit_bias", repr(biases)) == biases
