"""json_text.py and json_columns.py: an array and objects over several lines are rows as lines are, or named."""

import gzip
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchgen.errors import InputError
from batchgen.input import json_text
from batchgen.types import Rejected, Request
from tests.support.inputs import CASES, PARAMS, open_prompts, read, refusal, scan

ROWS = [
    {"id": 1, "prompt": "Once upon a time"},
    {"id": 2, "prompt": '"king", [x]\n'},
    {"id": 3, "prompt": "ü\u2028"},
]


def write(folder: Path, data: str | bytes, name: str = "p.json") -> Path:
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def rows_of(path: Path) -> list[tuple[str | None, Any]]:
    open_prompts(path)
    rows = read(path)
    assert scan(path).rows == len(rows)
    assert [row.row for row in rows] == list(range(len(rows)))
    return [(row.id, row.prompt) for row in rows]


@pytest.mark.parametrize("name", ["array_of_lines.json", "array_pretty.json"])
def test_arrays_in_json_are_rows(name: str) -> None:
    expected = json.loads((CASES / name).read_text())
    assert rows_of(CASES / name) == [(str(row["id"]), row["prompt"]) for row in expected]
    assert [row.place for row in read(CASES / name)][:2] == [f"{name}:row 0", f"{name}:row 1"]


@pytest.mark.parametrize("indent", [None, 0, 2])
@pytest.mark.parametrize("name", ["p.json", "p.jsonl", "p.json.gz"])
def test_every_way_of_writing_an_array_is_the_same_rows(tmp_path: Path, indent: int | None, name: str) -> None:
    expected = [(str(row["id"]), row["prompt"]) for row in ROWS]
    array = json.dumps(ROWS, indent=indent, ensure_ascii=False)
    objects = "\n".join(json.dumps(row, indent=indent) for row in ROWS)
    for text in (array, objects, f"\ufeff\n {array}\n\n", "[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]\n"):
        data = text.encode()
        assert rows_of(write(tmp_path, gzip.compress(data) if name.endswith("gz") else data, name)) == expected


@pytest.mark.parametrize("data", ["[]", "[\n]\n", " [ ] "])
def test_an_empty_array_has_no_rows(tmp_path: Path, data: str) -> None:
    assert rows_of(write(tmp_path, data)) == []


def test_a_bad_item_is_a_rejected_row_and_the_others_are_not(tmp_path: Path) -> None:
    good = b'{"prompt": "a"}'
    items = [
        b"1",
        b'"a"',
        b'{"prompt": "\xff"}',
        b'{"prompt": "a\tb"}',
        b'{"x": 1, "x": 2}',
        b"null",
        b"[[]]",
        b"-1.5e3",
    ]
    path = write(tmp_path, b"[" + b", ".join([good, *items, b"9" * 5000, good]) + b"]")
    rows = read(path)
    assert [type(row) for row in rows] == [Request, *[Rejected] * (len(items) + 1), Request]
    assert rows[3].error == "p.json:row 3: invalid UTF-8 at byte 13 of the line; save the file as UTF-8"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("data", "error"),
    [
        ('[\n{"prompt": "a"},\n{"prompt": "b"', "p.json:3: not JSON: Expecting ',' delimiter"),
        ('[\n{"prompt": "a"},\n{"prompt": "b"}\n', "p.json:4: not JSON: a comma or the closing bracket is missing"),
        ('[\n{"prompt": "a"}\n{"prompt": "b"}]', "p.json:3: not JSON: a comma or the closing bracket is missing"),
        ('[\n{"prompt": "a"},\n]', "p.json:3: not JSON: Expecting value"),
        ('[\n{"prompt": "a"}]\n{"prompt": "b"}', "p.json:3: not JSON: more follows the end of the array"),
        ('{\n"prompt": x}', "p.json:1: not JSON: Expecting value, line 2"),
        ("[\n" + "[" * 100_000, "p.json:2: not JSON: it is nested too deeply"),
        ("[\n" + '"' + "x" * 5000, "p.json:2: not JSON: a value is longer than 1000 bytes or is not closed"),
    ],
)
def test_an_error_that_ends_an_array_is_one_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str, error: str
) -> None:
    monkeypatch.setattr(json_text, "BUFFER_BYTES", 64)
    path = write(tmp_path, data)
    monkeypatch.setattr(json_text, "MAX_LINE_BYTES", 1000 if "xxx" in data else 2**20)
    for run in (scan, read):
        with pytest.raises(InputError) as caught:
            run(path)
        assert str(caught.value).startswith(error)
        assert str(caught.value).endswith("; correct it, or write one object a line")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(items=st.lists(values, max_size=6), indent=st.sampled_from([None, 0, 1]), buffer=st.integers(1, 20))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_an_array_is_cut_as_json_reads_it_whatever_the_buffer(
    tmp_path: Path, items: list[Any], indent: int | None, buffer: int
) -> None:
    text = json.dumps(items, indent=indent, ensure_ascii=False)
    pieces = [text.encode("utf-8", "surrogatepass")[at : at + buffer] for at in range(0, 10**4, buffer)]
    found = [json.loads(item.decode("utf-8", "surrogatepass")) for _, item in json_text._read_items(pieces, SOURCE, 1)]
    assert repr(found) == repr(items)


SOURCE: Any = type("Source", (), {"name": "p.json", "where": "p.json", "packing": ""})


def test_memory_does_not_grow_with_an_array() -> None:
    lengths = []
    text = json_text._Text((b'{"prompt": "a"},' for _ in range(10_000)), 1)
    while text.next_character():
        text.next_value()
        lengths.append(len(text.text))
        text.accept(",")
    assert len(lengths) == 10_000
    assert max(lengths) < 200


# ---- tables in one object


TABLES = {
    "columns": {"id": {"0": 1, "1": 2}, "prompt": {"0": "a", "1": "b"}},
    "lists": {"id": [1, 2], "prompt": ["a", "b"]},
    "split": {"columns": ["id", "prompt"], "index": [0, 1], "data": [[1, "a"], [2, "b"]]},
    "index": {"x": {"id": 1, "prompt": "a"}, "y": {"id": 2, "prompt": "b"}},
    "table": {"schema": {"fields": []}, "data": [{"index": 0, "id": 1, "prompt": "a"}, {"id": 2, "prompt": "b"}]},
    "rows": {"total": 2, "it's": [{"id": 1, "prompt": "a"}, {"id": 2, "prompt": "b"}]},
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("file", ["a b.json", "p.json.gz"])
def test_a_table_in_one_object_is_named_with_the_command_that_mends_it(tmp_path: Path, name: str, file: str) -> None:
    data = json.dumps(TABLES[name], indent=2 if "gz" in file else None).encode()
    path = write(tmp_path, gzip.compress(data) if "gz" in file else data, file)
    error = refusal(path)
    assert "this is one JSON object" in error
    command = error.split("one a line: ", 1)[1].removesuffix(")")
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    assert rows_of(tmp_path / "rows.jsonl") == [("1", "a"), ("2", "b")]


def test_columns_by_pandas_are_named() -> None:
    assert "this is one JSON object, of columns; write its rows" in refusal(CASES / "columns_by_pandas.json")


def test_one_row_that_holds_objects_is_a_row(tmp_path: Path) -> None:
    for row in (
        {"prompt": "a"},
        {"prompt": "a", "data": [{"prompt": "b"}]},
        {"id": 1, "prompt": "a", "meta": {"x": []}},
    ):
        assert len(rows_of(write(tmp_path, json.dumps(row)))) == 1


@pytest.mark.parametrize("column", ["a.b.c", "prompt.text"])
def test_one_row_with_the_prompt_in_objects_is_a_row(tmp_path: Path, column: str) -> None:
    path = write(tmp_path, '{"a": {"b": {"c": "x"}}, "prompt": {"text": "y"}}')
    assert open_prompts(path, column).scan().rows == 1
    write(tmp_path, '{"prompt": {"text": "y"}}')
    assert "name a string in it, such as --prompt-column prompt.text" in refusal(path)


@pytest.mark.parametrize("first", [["a", "b"], [1, 2], {"0": "a"}, None, 5])
def test_a_first_row_without_a_prompt_is_a_row_among_others(tmp_path: Path, first: object) -> None:
    path = write(tmp_path, "".join(json.dumps({"prompt": one}) + "\n" for one in (first, "b")))
    bad, good = open_prompts(path).requests(PARAMS)
    assert isinstance(bad, Rejected)
    assert isinstance(good, Request)
