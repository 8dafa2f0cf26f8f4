"""types.py and errors.py: what is out of range is refused by name, and everything crosses between processes."""

import pickle
from collections import Counter
from dataclasses import FrozenInstanceError, fields, is_dataclass, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchgen import errors, run, types
from batchgen.errors import BatchgenError, UsageError
from batchgen.options import shown
from batchgen.types import (
    MAX_INT,
    MAX_LOGPROBS,
    MAX_N,
    MAX_NUM_BEAMS,
    MAX_REASONS,
    MAX_SEED,
    Begun,
    Chunk,
    EmbeddingRow,
    OutputRow,
    Passage,
    Reason,
    Receipt,
    Rejected,
    Request,
    Reused,
    RowParameters,
    SamplingParams,
    ScoreRow,
    TokenizedRequest,
    add_reasons,
)

RANGES = {
    "max_tokens": [1, 2**31 - 1],
    "temperature": [0, 1e-5, 100],
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
    "prompt_logprobs": [None, 0, MAX_LOGPROBS],
    "num_beams": [1, MAX_NUM_BEAMS],
    "length_penalty": [-10, 0, 10],
    "no_repeat_ngram_size": [0, 2**31 - 1],
    "typical_p": [1e-9, 1],
    "top_n_sigma": [0, 100],
    "dry_multiplier": [0, 100],
    "dry_base": [1, 100],
    "dry_allowed_length": [0, 2**31 - 1],
    "xtc_probability": [0, 1],
    "xtc_threshold": [0, 1],
}
BEYOND = {
    "max_tokens": [0, -1, 2**31, 1.0, "4"],
    "temperature": [-1e-9, 100.1, "hot"],
    "top_k": [-2, 2**31, 5.0],
    "top_p": [0, -0.1, 1.0001],
    "min_p": [-0.1, 1.1],
    "repetition_penalty": [0, 0.009, 101],
    "presence_penalty": [-101, 101],
    "frequency_penalty": [-101, 101],
    "min_tokens": [-1, 41],
    "n": [0, MAX_N + 1, 2.0],
    "seed": [-1, MAX_SEED + 1, 1.5],
    "logprobs": [-1, MAX_LOGPROBS + 1, 1.0],
    "num_beams": [0, MAX_NUM_BEAMS + 1, 2.0],
    "no_repeat_ngram_size": [-1, 2**31, 2.0],
    "typical_p": [0, -0.1, 1.1],
    "top_n_sigma": [-0.5, -2, 101],
    "dry_multiplier": [-0.1, 101],
    "dry_base": [0.9, 101],
    "dry_allowed_length": [-1, 1.5],
    "xtc_probability": [-0.1, 1.1],
    "xtc_threshold": [-0.1, 1.1],
    "length_penalty": [-10.5, 10.5],
    "prompt_logprobs": [-1, MAX_LOGPROBS + 1, 1.0],
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
    Reason(3, 7, "p.jsonl:8", "not JSON"),
    RowParameters(Counter(seed=3), results=("parameters",)),
    Passage((1, 2, 3), 1),
    Begun(1, (5, 6)),
    Reused(b"", 2, 1, 7, 7),
    ScoreRow(row=0, id=None, prompt="a", status="ok", tokens=1, logprob=-0.5),
    EmbeddingRow(row=0, id=None, prompt="a", status="ok", embedding=(0.5, 1.0)),
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
        if (name, value) not in (("logprobs", None), ("prompt_logprobs", None)):
            with pytest.raises(UsageError, match=f"^{name} .* is out of range"):
                SamplingParams(**{name: value})


def test_nothing_is_generated_only_if_the_prompt_is_asked_for():
    assert SamplingParams(max_tokens=0, prompt_logprobs=0).max_tokens == 0
    assert SamplingParams(max_tokens=0, echo=True).max_tokens == 0
    with pytest.raises(UsageError, match="^max_tokens 0 is out of range .*prompt_logprobs or echo"):
        SamplingParams(max_tokens=0)


@pytest.mark.parametrize(
    ("given", "error"),
    [
        (
            {"temperature": 0.8},
            "temperature 0.8 changes draws, .* set temperature to 0.0 or num_beams to 1",
        ),
        ({"top_k": 5}, "top_k 5 changes draws, .* set top_k to 0 or num_beams to 1"),
        ({"top_p": 0.5}, "top_p 0.5 changes draws, .* set top_p to 1.0 or num_beams to 1"),
        ({"min_p": 0.5}, "min_p 0.5 changes draws, .* set min_p to 0.0 or num_beams to 1"),
        ({"typical_p": 0.5}, "typical_p 0.5 changes draws, .* set typical_p to 1.0 or num_beams to 1"),
        ({"top_n_sigma": 1.0}, "top_n_sigma 1.0 changes draws, .* set top_n_sigma to 0.0 or num_beams to 1"),
        (
            {"xtc_probability": 0.5},
            "xtc_probability 0.5 changes draws, .* set xtc_probability to 0.0 or num_b.*",
        ),
        ({"n": 5}, "n 5 exceeds num_beams 4, the most completions that a search returns; lower n, or raise num_beams"),
    ],
)
def test_what_beams_cannot_do_is_refused_with_a_remedy_that_works(given, error):
    with pytest.raises(UsageError, match=f"^{error}$"):
        SamplingParams(num_beams=4, **given)
    name = next(iter(given))
    assert SamplingParams(num_beams=1, **given).num_beams == 1
    default = getattr(SamplingParams(), name)
    assert getattr(SamplingParams(num_beams=4, **{name: default}), name) == default
    assert SamplingParams(num_beams=4, seed=5).searches  # a seed draws nothing at temperature 0 either


def test_every_number_among_the_parameters_has_a_range():
    numbers = (int, float, int | None)
    assert {field.name for field in fields(SamplingParams) if field.type in numbers} == set(RANGES)


@pytest.mark.parametrize("bias", [-100.5, 101.0, float("nan"), float("inf")])
def test_a_logit_bias_out_of_range_is_refused(bias):
    with pytest.raises(UsageError, match=r"logit_bias .* of token 7 is out of range \(-100 to 100\)"):
        SamplingParams(logit_bias=((7, bias),))


def test_temperature_zero_alone_is_greedy():
    assert SamplingParams().greedy
    assert not SamplingParams(temperature=1e-5).greedy


@pytest.mark.parametrize("temperature", [1e-6, 9.9e-6, 5e-324])
def test_a_temperature_too_small_to_divide_by_is_greedy(temperature):
    assert SamplingParams(temperature=temperature) == SamplingParams()


@pytest.mark.parametrize("name", ["top_k", "top_n_sigma"])
def test_minus_one_is_off(name):
    assert SamplingParams(**{name: -1}) == SamplingParams(**{name: 0})


@given(st.permutations([(5, "a 'x' 1"), (3, "a 'y' -2.5"), (4, "b"), (9, "a 'z' [1, 2] 1e-06")]))
def test_reasons_of_one_kind_are_counted_together_with_the_first_of_them(rows):
    reasons: dict[str, Reason] = {}
    add_reasons(reasons, [Reason(1, row, f"p:{row}", text) for row, text in rows])
    assert set(reasons.values()) == {
        Reason(2, 3, "p:3", "a 'y' -2.5"),
        Reason(1, 4, "p:4", "b"),
        Reason(1, 9, "p:9", "a 'z' [1, 2] 1e-06"),
    }


QUOTED = st.text("a'\"\\\n[{}]., 7", max_size=90)


@given(st.one_of(QUOTED, st.lists(QUOTED, min_size=1, max_size=9), st.lists(st.floats(), min_size=1), st.floats(1)))
def test_what_a_reason_quotes_is_no_part_of_its_kind(value):
    text = f"stop {shown(value)} is out of range (write it as"
    assert Reason(1, 0, "p:1", text).kind == "stop ... is out of range (write it as"


def test_columns_that_are_null_are_reasons_of_their_own():
    kinds = [Reason(1, 0, "p:1", f"{name!r} is null, and 'x' is 7").kind for name in ("a", "b c")]
    assert kinds == ["'a' is null, and ... is ...", "'b c' is null, and ... is ..."]


def test_reasons_beyond_the_limit_are_counted_in_one():
    reasons: dict[str, Reason] = {}
    add_reasons(reasons, [Reason(1, row, f"p:{row}", chr(97 + row % 26) * (1 + row)) for row in range(100)])
    assert len(reasons) == MAX_REASONS + 1
    assert sum(reason.rows for reason in reasons.values()) == 100
    assert reasons[""].place == f"p:{MAX_REASONS}"


def test_as_dict_makes_the_same_parameters_again():
    for params in (SamplingParams(), SamplingParams(temperature=0.7, n=3, logprobs=2, stop_token_ids=(1, 2))):
        assert SamplingParams(**params.as_dict()) == params


def test_fewer_max_tokens_take_min_tokens_along():
    shorter = TOKENIZED.with_max_tokens(7)
    assert (shorter.params.max_tokens, shorter.params.min_tokens) == (7, 7)
    assert shorter == replace(TOKENIZED, params=shorter.params)


def test_fewer_new_tokens_are_counted_from_those_that_are_begun_with():
    assert TOKENIZED.with_new_tokens(1) == TOKENIZED.with_max_tokens(1)
    assert TOKENIZED.with_new_tokens(MAX_INT) == TOKENIZED
    begun = replace(TOKENIZED, begun=(Begun(1, (5, 6)), Begun(3)))
    assert begun.with_new_tokens(1) == begun.with_max_tokens(3)
    assert begun.first_sample == 1


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_every_record_pickles_and_cannot_be_changed(record):
    assert pickle.loads(pickle.dumps(record)) == record
    with pytest.raises((FrozenInstanceError, TypeError)):
        setattr(record, fields(record)[0].name, None)
    assert not hasattr(record, "__dict__")


def test_no_record_was_forgotten():
    made = {type(record) for record in RECORDS}
    assert made == {kind for kind in vars(types).values() if isinstance(kind, type) and is_dataclass(kind)}


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


def test_numbers_and_arrays_of_numpy_are_pythons():
    given = SamplingParams(
        max_tokens=np.int64(3),
        temperature=np.float32(0.5),
        echo=np.bool_(True),
        stop=np.array(["a"]),
        stop_token_ids=[np.int32(7)],
        logit_bias={np.int64(5): np.float32(1)},
    )
    own = SamplingParams(max_tokens=3, temperature=0.5, echo=True, stop="a", stop_token_ids=[7], logit_bias={5: 1.0})
    assert given == own
    assert repr(given) == repr(own)
    with pytest.raises(UsageError, match=r"max_tokens 3.0 is out of range"):
        SamplingParams(max_tokens=np.float64(3))


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
        "SetupError": 1,
        "UsageError": 2,
        "BusyError": 75,
        "StoppedError": 75,
    }


def test_a_summary_is_exit_code_3_exactly_where_a_row_is_not_ok(tmp_path):
    summary = run.Summary(tmp_path, 5, 5, 0, 0, 0, 9, 9, 1.0, 1, "float32")
    assert (summary.rows, summary.exit_code) == (5, 0)
    assert replace(summary, ok=4, rejected=1).exit_code == 3
    assert replace(summary, ok=4, failed=1).exit_code == 3
    assert replace(summary, input_rows=0, ok=0).exit_code == 0


@pytest.mark.parametrize("text", ["", "é" * 21, "x" * 2000])
def test_a_breaker_of_any_wrong_length_names_the_limit_that_holds(text):
    with pytest.raises(UsageError, match=r"out of range \(strings of 1 to 40 bytes\)"):
        SamplingParams(dry_sequence_breakers=["a", text])
    assert SamplingParams(dry_sequence_breakers=["é" * 20]).dry_sequence_breakers == ("é" * 20,)
