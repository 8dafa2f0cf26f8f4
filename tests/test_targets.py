"""targets.py and the formats: the same rows give the same completions, choices and answers, or the same reason."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from batchgen.errors import InputError, UsageError
from batchgen.input.prompts import Prompts
from batchgen.input.targets import LETTERS, read_answer, read_choices, read_completion
from batchgen.job import InputOptions, ScoreInput
from batchgen.types import READING, Rejected, Request, SamplingParams

PARAMS = READING
COMPLETIONS = {"completion_column": "completion"}
CHOICES = {"choices_column": "choices", "answer_column": "answer"}
ARC = {"choices_column": "choices.text", "answer_column": "answer"}

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=5)
lists = st.lists(texts, min_size=1, max_size=4).map(tuple)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
in_a_file = settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read(path: Path, **options: Any) -> list[Request | Rejected]:
    return list(Prompts.open(ScoreInput(path, **options)).requests(PARAMS))


def write_json(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path = folder / "p.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def write_csv(folder: Path, rows: Sequence[dict[str, Any]], dump: Any = json.dumps) -> Path:
    """Lists as `dump` writes them, null as nothing."""
    path = folder / "p.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({name: dump(value) if isinstance(value, list) else value for name, value in row.items()})
    return path


def write_parquet(folder: Path, rows: Sequence[dict[str, Any]], **types: pa.DataType) -> Path:
    path = folder / "p.parquet"
    columns = {name: pa.array([row.get(name) for row in rows], types.get(name)) for name in rows[0]}
    pq.write_table(pa.table(columns), path)
    return path


def said(rows: Sequence[Request | Rejected]) -> list[Any]:
    """What rows of any file say, without their places."""
    return [
        row.error.split(": ", 1)[1] if isinstance(row, Rejected) else (row.id, row.prompt, row.targets, row.answer)
        for row in rows
    ]


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        read(path, **options)
    return str(caught.value)


# ---- choices


@given(lists)
def test_choices_are_the_same_as_a_list_and_as_text_of_json_or_python(choices: tuple[str, ...]) -> None:
    listed = list(choices)
    assert read_choices(listed) == read_choices(json.dumps(listed)) == read_choices(str(listed)) == choices


@pytest.mark.parametrize("made", [["a", "b"], ["it's", 'a "b"'], ["a" * 90, "b"]])
def test_a_list_as_numpy_prints_it_is_refused_and_not_read_as_one_choice(made: list[str]) -> None:
    for text in (str(np.array(made)), str(np.array(made, dtype=object)), repr(np.array(made))):
        with pytest.raises(UsageError, match=r"neither in JSON nor in Python; write the column with json.dumps$"):
            read_choices(text)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([], "the list of choices is empty; write one or more"),
        ("[]", "the list of choices is empty; write one or more"),
        (None, "the choices are null; make them a list of strings"),
        ({"a": 1}, "the choices are an object; make them a list of strings"),
        ("Paris", "the choices are 'Paris', which is no list; write them as"),
        (["a", 7], r"choice 1 \(from 0\) is a number \(7\); make it a string"),
        (["a", None], r"choice 1 \(from 0\) is null; make it a string"),
        ([["a"]], r"choice 0 \(from 0\) is a list; make it a string"),
        (["a", ""], r"choice 1 \(from 0\) is empty"),
        (["\ud800"], r"choice 0 \(from 0\) has a lone surrogate"),
        (["a", b"\xff"], r"choice 1 \(from 0\) is not UTF-8"),
    ],
)
def test_choices_that_are_none_give_their_place_and_reason(value: object, reason: str) -> None:
    with pytest.raises(UsageError, match=f"^{reason}"):
        read_choices(value)


@given(values)
def test_any_value_is_a_completion_or_has_a_reason(value: object) -> None:
    if isinstance(value, str) and value and not any("\ud800" <= letter <= "\udfff" for letter in value):
        assert read_completion(value) == (value,)
    else:
        with pytest.raises(UsageError, match="^the completion "):
            read_completion(value)


# ---- answers


@given(lists, st.data())
@example(("1", "0"), None)
@example(("a", "a"), None)
@example(("B", "A"), None)
def test_an_answer_is_never_another_choice_than_the_one_that_was_meant(
    choices: tuple[str, ...], data: st.DataObject | None
) -> None:
    """A number is always an index. A text that may mean another choice too is refused, or is the text of one."""
    for index in range(len(choices)) if data is None else [data.draw(st.integers(0, len(choices) - 1))]:
        assert read_answer(index, choices) == read_answer(float(index), choices) == index
        for text in (str(index), f"{index}.0", choices[index], LETTERS[index]):
            try:
                found = read_answer(text, choices)
            except UsageError as error:
                assert "may be choice" in str(error)  # noqa: PT017
            else:
                assert found == index or choices[found or 0] == text


@pytest.mark.parametrize("value", [None, "", float("nan")])
def test_a_row_may_leave_its_answer_out(value: object) -> None:
    assert read_answer(value, ["a", "b"]) is None


@pytest.mark.parametrize("value", [2, -1, 1.5, "2", "-1", "C", "b ", "AB", True, [0], float("inf"), 10**400, b"\xff"])
def test_an_answer_that_is_no_choice_is_refused_with_what_it_may_be(value: object) -> None:
    with pytest.raises(UsageError, match=r"the right choice's index \(0 to 1\), text or its letter"):
        read_answer(value, ["a", "b"])


def test_an_ambiguous_answer_has_a_remedy_that_works() -> None:
    for choices, answer, remedies in [
        (["1", "0"], "1", ["A", "B"]),
        (["a", "a"], "a", ["A", "B"]),
        (["1", "A", "x"], "1", [0, 1]),
    ]:
        with pytest.raises(UsageError, match="may be choice 0 and choice 1") as caught:
            read_answer(answer, choices)
        assert str(caught.value).endswith("; write A or B" if "A" in remedies else "; write its index as a number")
        assert [read_answer(remedy, choices) for remedy in remedies] == [0, 1]


def test_labels_beside_the_choices_name_them_even_if_they_are_numbers() -> None:
    """ARC labels the choices of most rows A to D, and of some 1 to 4: there, 1 is the first."""
    assert [read_answer(answer, "wxyz", "1234") for answer in ("1", "4", 4, "z")] == [0, 3, 3, 3]
    assert [read_answer(answer, "wxyz", "ABCD") for answer in ("A", "D", 0, "3", "z")] == [0, 3, 0, 3, 3]
    for answer, labels in (("0", "1234"), (0, "1234"), ("A", "1234"), ("E", "ABCD")):
        with pytest.raises(UsageError, match="is no choice; write the right choice's .*text or its label"):
            read_answer(answer, "wxyz", labels)
    with pytest.raises(UsageError, match="give each choice a label of its own"):
        read_answer("A", "wx", "AA")


# ---- the same in every format

ROWS = [
    {"id": "a", "prompt": "Q:", "choices": [" red", " blue"], "answer": "1"},
    {"id": "b", "prompt": "é ", "choices": ["it's", 'a "b"'], "answer": "A"},
    {"id": "c", "prompt": "", "choices": [" x", "\n"], "answer": None},
    {"id": "d", "prompt": "Q:", "choices": [" x", ""], "answer": "0"},
    {"id": "e", "prompt": "Q:", "choices": [], "answer": "0"},
    {"id": "f", "prompt": "Q:", "choices": ["x", "y"], "answer": "z"},
    {"id": "g", "prompt": "Q:", "choices": ["1", "0"], "answer": "1"},
]


def test_rows_with_choices_are_the_same_in_every_format(tmp_path: Path) -> None:
    found = said(read(write_json(tmp_path, ROWS), **CHOICES))
    assert found[:3] == [
        ("a", "Q:", (" red", " blue"), 1),
        ("b", "é ", ("it's", 'a "b"'), 0),
        ("c", "", (" x", "\n"), None),
    ]
    assert all(isinstance(reason, str) for reason in found[3:])
    for dump in (json.dumps, str):
        assert said(read(write_csv(tmp_path, ROWS, dump), **CHOICES)) == found
    for kind in (pa.list_(pa.string()), pa.large_list(pa.large_string()), pa.list_(pa.binary())):
        assert said(read(write_parquet(tmp_path, ROWS, choices=kind), **CHOICES)) == found
    listed = [{**row, "choices": json.dumps(row["choices"])} for row in ROWS]
    assert said(read(write_parquet(tmp_path, listed), **CHOICES)) == found
    pairs = [row for row in ROWS if len(row["choices"] or "") == 2]
    fixed = write_parquet(tmp_path, pairs, choices=pa.list_(pa.string(), 2))
    assert said(read(fixed, **CHOICES)) == [one for one, row in zip(found, ROWS, strict=True) if row in pairs]


def test_rows_with_completions_are_the_same_in_every_format(tmp_path: Path) -> None:
    rows = [{"id": None, "prompt": "a ", "completion": text} for text in ("b", " ", "7", "", "é\n")]
    found = said(read(write_json(tmp_path, rows), **COMPLETIONS))
    assert found[0] == (None, "a ", ("b",), None)
    assert found[3] == "the completion is empty, and has no token to score; write it, or leave the row out"
    for path in (write_csv(tmp_path, rows), write_parquet(tmp_path, rows, id=pa.string())):
        assert said(read(path, **COMPLETIONS)) == found


def test_texts_are_the_same_in_every_format(tmp_path: Path) -> None:
    rows = [{"text": text} for text in ("Once ", "7", "é")]
    (tmp_path / "p.txt").write_text("Once \n7\né\n")
    found = said(read(write_json(tmp_path, rows)))
    assert found == [(None, row["text"], (), None) for row in rows]
    for path in (write_csv(tmp_path, rows), write_parquet(tmp_path, rows), tmp_path / "p.txt"):
        assert said(read(path)) == found


def test_choices_and_labels_of_hugging_face_are_read_by_their_path(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Q", "choices": {"text": ["x", "y"], "label": labels}, "answer": answer}
        for labels, answer in [(["A", "B"], "B"), (["1", "2"], "2"), (["1", "2"], "3"), (["A"], "A"), (None, "1")]
    ]
    for path in (write_json(tmp_path, rows), write_parquet(tmp_path, rows)):
        found = said(read(path, **ARC))
        assert [one if isinstance(one, str) else one[3] for one in found] == [
            1,
            1,
            "the answer '3' is no choice; write the right choice's text or its label ('1', '2'), "
            "or null if it is not known",
            "the labels of the choices are 1, and there are 2 choices; write one for each",
            1,
        ]
        reason = refusal(path, **CHOICES)
        assert reason.startswith(f"{path}: ")
        assert reason.endswith("; name a list in it, such as --choices-column choices.text")


def test_choices_are_null_with_the_object_that_they_are_in(tmp_path: Path) -> None:
    rows = [{"prompt": "Q", "choices": choices, "answer": "A"} for choices in ({"text": ["x"], "label": ["A"]}, None)]
    for path in (write_json(tmp_path, rows), write_parquet(tmp_path, rows)):
        assert said(read(path, **ARC))[1] == "the choices are null; make them a list of strings"


def test_a_text_that_is_missing_is_called_a_text(tmp_path: Path) -> None:
    rows = [{"text": "x"}, {"text": None}]
    assert said(read(write_parquet(tmp_path, rows)))[1] == "the text is null; make it a string"
    (tmp_path / "p.csv").write_text("text\nx\n\\N\n")
    assert str(said(read(tmp_path / "p.csv"))[1]).startswith("the text is \\N")


@given(prompt=values, choices=values | lists.map(list), answer=values)
@in_a_file
def test_any_values_in_json_give_targets_or_a_reason(tmp_path: Path, prompt: Any, choices: Any, answer: Any) -> None:
    good = {"prompt": "Q", "choices": ["x", "y"], "answer": 0}
    row = {"prompt": prompt, "choices": choices, "answer": answer}
    first, found = read(write_json(tmp_path, [good, row]), **CHOICES)
    assert said([first]) == [(None, "Q", ("x", "y"), 0)]
    if isinstance(found, Request):
        assert len(found.targets) >= 1
        assert all(found.targets)
        assert found.answer is None or 0 <= found.answer < len(found.targets)
    else:
        found.error.encode()
        assert "\n" not in found.error


@given(choices=st.text(max_size=8) | st.text("[]'\"ab, ", max_size=8), answer=st.text(max_size=3))
@in_a_file
def test_any_text_in_csv_gives_targets_or_a_reason(tmp_path: Path, choices: str, answer: str) -> None:
    if any("\ud800" <= letter <= "\udfff" or letter in "\0\r" for letter in choices + answer):
        return
    row = {"prompt": "Q", "choices": choices, "answer": answer}
    (found,) = read(write_csv(tmp_path, [row]), **CHOICES)
    in_json = read(write_json(tmp_path, [row]), **CHOICES)
    assert said([found])[0] == said(in_json)[0] or r"\N" in (choices, answer)


def test_values_that_are_not_utf8_reject_their_row_alone(tmp_path: Path) -> None:
    bad = pa.array([b"a", b"\xff", b"b"]).cast(pa.string(), safe=False)
    for name, column in (("completion", bad), ("choices", pa.ListArray.from_arrays([0, 1, 2, 3], bad))):
        path = tmp_path / "p.parquet"
        pq.write_table(pa.table({"prompt": ["x", "y", "z"], name: column}), path)
        first, second, third = read(path, **{f"{name}_column": name})
        assert [row.targets for row in (first, third) if isinstance(row, Request)] == [("a",), ("b",)]
        assert isinstance(second, Rejected)
        assert "not UTF-8" in second.error


# ---- errors of the job


def test_a_column_that_is_missing_is_named_with_its_option(tmp_path: Path) -> None:
    row = {"prompt": "x", "completion": "y"}
    for path in (write_json(tmp_path, [row]), write_csv(tmp_path, [row]), write_parquet(tmp_path, [row])):
        kind = "key" if path.suffix == ".jsonl" else "column"
        assert refusal(path).endswith(
            f"no {kind} 'text'; the {kind}s are 'prompt', 'completion'; name the right one with --text-column; "
            "score also takes a prompt with --completion-column or --choices-column"
        )
        wrong = refusal(path, completion_column="completions")
        assert wrong.endswith("did you mean 'completion'? pass it as --completion-column")
        assert "no " + kind + " 'answer'" in refusal(path, **{**CHOICES, "choices_column": "prompt"})


def test_a_row_without_the_key_is_rejected_and_one_without_an_answer_is_not(tmp_path: Path) -> None:
    rows = [{"prompt": "x", "choices": ["a"], "answer": 0}, {"prompt": "x", "choices": ["a"]}, {"prompt": "x"}]
    _, second, third = read(write_json(tmp_path, rows), **CHOICES)
    assert isinstance(second, Request)
    assert second.answer is None
    assert isinstance(third, Rejected)
    assert "no key 'choices'" in third.error


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("prompt,completion,completion\na,b,c\n")
    assert "2 columns are called 'completion'" in refusal(path, **COMPLETIONS)


def test_parquet_that_holds_no_lists_of_text_is_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path, [{"prompt": "x", "choices": [1, 2]}])
    assert refusal(path, choices_column="choices").endswith("; cast it to a list of strings")
    path = write_parquet(tmp_path, [{"prompt": "x", "completion": 7}])
    assert refusal(path, **COMPLETIONS).endswith("is of type int64; cast it to string")


def test_lines_of_text_have_no_completions(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("Once\n")
    assert "a line of text has nothing for --completion-column" in refusal(path, **COMPLETIONS)


def test_openai_batch_files_are_for_generate(tmp_path: Path) -> None:
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}
    assert "pass it to generate" in refusal(write_json(tmp_path, [line]), text_column="prompt")


def test_a_parameter_that_is_not_utf8_rejects_its_row(tmp_path: Path) -> None:
    """It is no text that says so."""
    path = tmp_path / "p.parquet"
    bad = pa.array([b"a", b"\xff"]).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"prompt": ["x", "y"], "stop": bad}), path)
    first, second = Prompts.open(InputOptions(path)).requests(SamplingParams())
    assert isinstance(first, Request)
    assert isinstance(second, Rejected)
    assert "stop b'not UTF-8' is out of range" in second.error


def test_columns_like_parameters_are_no_parameters_of_a_row_to_score(tmp_path: Path) -> None:
    (row,) = read(write_json(tmp_path, [{"text": "x", "max_tokens": 7, "seed": "?", "max_token": 1}]), keep="seed")
    assert isinstance(row, Request)
    assert row.params == PARAMS
