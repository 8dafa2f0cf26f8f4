"""types.py and errors.py: what is out of range is refused by name, and everything crosses between processes."""

import pickle
from dataclasses import FrozenInstanceError, fields, is_dataclass, replace

import pytest

from batchgen import errors, run, types
from batchgen.errors import BatchgenError, UsageError
from batchgen.types import (
    MAX_LOGPROBS,
    MAX_N,
    MAX_SEED,
    Chunk,
    OutputRow,
    Receipt,
    Rejected,
    Request,
    SamplingParams,
    TokenizedRequest,
)

RANGES = {
    "max_tokens": [1, 2**31 - 1],
    "temperature": [0, 0.001, 100],
    "top_k": [0, 2**31 - 1],
    "top_p": [1e-9, 1],
    "min_p": [0, 1],
    "repetition_penalty": [0.01, 100],
    "presence_penalty": [-100, 100],
    "frequency_penalty": [-100, 100],
    "min_tokens": [0, 40],
    "n": [1, MAX_N],
    "seed": [0, MAX_SEED],
    "logprobs": [None, 0, MAX_LOGPROBS],
}
BEYOND = {
    "max_tokens": [0, -1, 2**31, 1.0, "4"],
    "temperature": [-1e-9, 100.1, 0.0009, "hot"],
    "top_k": [-1, 2**31, 5.0],
    "top_p": [0, -0.1, 1.0001],
    "min_p": [-0.1, 1.1],
    "repetition_penalty": [0, 0.009, 101],
    "presence_penalty": [-101, 101],
    "frequency_penalty": [-101, 101],
    "min_tokens": [-1, 41],
    "n": [0, MAX_N + 1, 2.0],
    "seed": [-1, MAX_SEED + 1, 1.5],
    "logprobs": [-1, MAX_LOGPROBS + 1, 1.0],
}
NO_NUMBERS = [float("nan"), float("inf"), float("-inf"), True, False, "1", [], None]

REQUEST = Request(3, "p.jsonl:4", "a", "Once", SamplingParams(max_tokens=5))
REJECTED = Rejected(4, "p.jsonl:5", None, None, "p.jsonl:5: not JSON")
TOKENIZED = TokenizedRequest(3, "p.jsonl:4", "a", "Once", (1, 2), SamplingParams(min_tokens=30))
RECORDS = [
    SamplingParams(temperature=0.5, logit_bias=((1, 2.0),), stop_token_ids=(3,), stop=("a",), bad_words=("b",)),
    REQUEST,
    REJECTED,
    TOKENIZED,
    Chunk(2, (TOKENIZED, REJECTED)),
    OutputRow(0, 0, None, "a", "b", 1, 1, "stop", "ok", None, 7, (1,), (-0.5,)),
    Receipt(0, "p", "0" * 64, 2, 3, 1, 1, 1, 9, 9),
]
ERRORS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, BatchgenError)]


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in RANGES.items() for value in values])
def test_the_ends_of_every_range_are_inside(name, value):
    assert getattr(SamplingParams(**{name: value}), name) == value


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BEYOND.items() for value in values])
def test_a_value_out_of_range_is_refused_by_name_value_and_range(name, value):
    with pytest.raises(UsageError) as caught:
        SamplingParams(**{name: value})
    assert str(caught.value).startswith(f"{name} {value!r}")
    assert "out of range (" in str(caught.value) or "exceeds max_tokens 40" in str(caught.value)


@pytest.mark.parametrize("name", RANGES)
def test_what_is_no_finite_number_is_refused_everywhere(name):
    for value in NO_NUMBERS:
        if (name, value) != ("logprobs", None):
            with pytest.raises(UsageError, match=f"^{name} .* is out of range"):
                SamplingParams(**{name: value})


def test_every_number_among_the_parameters_has_a_range():
    unranged = {"logit_bias", "stop_token_ids", "stop", "bad_words"}
    unranged |= {"ignore_eos", "include_stop", "echo", "stop_loops"}
    assert {field.name for field in fields(SamplingParams)} - unranged == set(RANGES)


@pytest.mark.parametrize("bias", [-100.5, 101.0, float("nan"), float("inf")])
def test_a_logit_bias_out_of_range_is_refused(bias):
    with pytest.raises(UsageError, match=r"logit_bias .* of token 7 is out of range \(-100 to 100\)"):
        SamplingParams(logit_bias=((7, bias),))


def test_temperature_zero_alone_is_greedy():
    assert SamplingParams().greedy
    assert not SamplingParams(temperature=0.001).greedy


def test_as_dict_makes_the_same_parameters_again():
    for params in (SamplingParams(), SamplingParams(temperature=0.7, n=3, logprobs=2, stop_token_ids=(1, 2))):
        assert SamplingParams(**params.as_dict()) == params


def test_fewer_max_tokens_take_min_tokens_along():
    shorter = TOKENIZED.with_max_tokens(7)
    assert (shorter.params.max_tokens, shorter.params.min_tokens) == (7, 7)
    assert shorter == replace(TOKENIZED, params=shorter.params)


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_every_record_pickles_and_cannot_be_changed(record):
    assert pickle.loads(pickle.dumps(record)) == record
    with pytest.raises((FrozenInstanceError, TypeError)):
        setattr(record, fields(record)[0].name, None)
    assert not hasattr(record, "__dict__")


def test_no_record_was_forgotten():
    made = {type(record) for record in RECORDS}
    assert made == {kind for kind in vars(types).values() if is_dataclass(kind)}


@pytest.mark.parametrize("kind", ERRORS)
def test_every_error_pickles_with_its_text(kind):
    copy = pickle.loads(pickle.dumps(kind("a.jsonl: no such file")))
    assert type(copy) is kind
    assert str(copy) == "a.jsonl: no such file"


def test_what_is_nested_too_deeply_to_be_shown_is_refused_all_the_same():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    for name in ("max_tokens", "stop", "stop_token_ids", "echo"):
        with pytest.raises(UsageError, match=f"{name} .*nested too deeply.* is out of range"):
            SamplingParams(**{name: [deep] if name.startswith("stop") else deep})


def test_lists_become_tuples_that_can_be_keys():
    params = SamplingParams(stop="ab", bad_words=["a", "b"], stop_token_ids=[1, 2], logit_bias={3: -1.0, 4: 2})
    assert params.stop == ("ab",)
    assert params.bad_words == ("a", "b")
    assert params.stop_token_ids == (1, 2)
    assert params.logit_bias == ((3, -1.0), (4, 2)) == SamplingParams(logit_bias=[[3, -1.0], [4, 2]]).logit_bias
    hash(params)


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("stop", 5, "strings"),
        ("bad_words", None, "strings"),
        ("stop_token_ids", 13, "token ids"),
        ("stop_token_ids", "13", "token ids"),
        ("logit_bias", 1.5, "pairs"),
        ("logit_bias", [1, 2], "pairs of a token id and a bias"),
        ("logit_bias", [(1, 2, 3)], "pairs of a token id and a bias"),
    ],
)
def test_what_is_no_list_is_refused_by_name(name, value, what):
    with pytest.raises(UsageError, match=f"{name} .* is out of range \\(a list of {what}\\)"):
        SamplingParams(**{name: value})


def test_exit_codes_tell_kinds_of_failure_apart():
    codes = {kind.__name__: kind.exit_code for kind in ERRORS}
    assert codes == {
        "BatchgenError": 1,
        "InputError": 1,
        "OutputError": 1,
        "ModelError": 1,
        "UsageError": 2,
        "BusyError": 75,
        "StoppedError": 75,
    }


def test_a_summary_is_exit_code_3_exactly_where_a_row_is_not_ok(tmp_path):
    summary = run.Summary(tmp_path, 5, 5, 0, 0, 0, 9, 9, 1.0, 1, "blas")
    assert (summary.rows, summary.exit_code) == (5, 0)
    assert replace(summary, ok=4, rejected=1).exit_code == 3
    assert replace(summary, ok=4, failed=1).exit_code == 3
    assert replace(summary, input_rows=0, ok=0).exit_code == 0
