"""parameters.py: a row's parameters win, null means the command line's, and a wrong value is named."""

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchgen.errors import UsageError
from batchgen.input.parameters import ALIASES, PARAMETERS, find_misspelled, override_params, parameter_names
from batchgen.options import options_of
from batchgen.types import MAX_STOPS, SamplingParams

BASE = SamplingParams(max_tokens=9, temperature=0.5, seed=7, stop=("x",), logprobs=1)

VALUES: dict[str, list[tuple[Any, Any]]] = {  # as written in a row, as it is then
    "max_tokens": [(3, 3), (3.0, 3)],
    "temperature": [(0, 0), (1.5, 1.5)],
    "top_k": [(40.0, 40)],
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
    "stop": [("a", ("a",)), (["a", "\n\n"], ("a", "\n\n")), ([], ())],
    "include_stop": [(True, True)],
    "bad_words": [("a", ("a",)), (["a", "b"], ("a", "b"))],
    "echo": [(True, True)],
    "stop_loops": [(True, True)],
}
WRONG: dict[str, list[Any]] = {
    "max_tokens": [0, 2.5, "4", True, [3], {}, 10**400, float("inf")],
    "temperature": ["hot", 10**400, float("nan"), 1e308, [0.5]],
    "top_k": [-1],
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
    "stop": [5, [""], "", ["a"] * (MAX_STOPS + 1), [None], {"a": 1}, "x" * 1001, "\ud800", b"a"],
    "include_stop": ["yes"],
    "bad_words": [5, [""], [5], ["a"] * 65],
    "echo": [0],
    "stop_loops": ["no"],
}


def test_every_parameter_is_tried() -> None:
    names = {field.name for field in fields(SamplingParams)}
    assert names == set(VALUES) == set(WRONG) == PARAMETERS


@pytest.mark.parametrize(("name", "written", "meant"), [(n, w, m) for n, pairs in VALUES.items() for w, m in pairs])
def test_a_value_in_a_row_wins_and_leaves_the_others(name: str, written: Any, meant: Any) -> None:
    got = override_params({name: written}, BASE)
    assert getattr(got, name) == meant
    assert type(getattr(got, name)) is type(meant)
    assert got.as_dict() | {name: None} == BASE.as_dict() | {name: None}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_wrong_value_is_refused_by_name_in_one_line(name: str, value: Any) -> None:
    with pytest.raises(UsageError) as caught:
        override_params({name: value}, BASE)
    text = str(caught.value)
    assert text.startswith(name)
    assert "out of range" in text or "exceeds max_tokens" in text
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


def test_every_parameter_is_documented_with_its_range_and_default() -> None:
    text = (Path(__file__).parents[1] / "docs" / "parameters.md").read_text()
    sections = dict(re.findall(r"^### (\w+)\n(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL))
    assert sections.keys() == PARAMETERS
    for field in fields(SamplingParams):
        words = sections[field.name].lower().replace("\n", " ")
        default = f"{field.default:g}" if type(field.default) in (int, float) else str(field.default or "none").lower()
        default = "false" if field.default is False else default
        assert re.search(rf"default {default}\b", words, re.IGNORECASE), field.name
    for name, option in options_of(SamplingParams).items():
        high = option.within[1] if option.within else None
        if high is not None and (high < 2**31 - 1 or name == "seed"):
            assert f"{high:g}" in sections[name] or str(high) in sections[name], name
