"""kept.py: a kept column has the values and types of the input, beside the right rows."""

import datetime
import json
import math
import os
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchgen.errors import InputError, UsageError
from batchgen.input import formats, json_text
from batchgen.input import parquet as parquet_format
from batchgen.input.formats import Rows
from batchgen.input.jsonl import MAX_NESTING
from batchgen.input.kept import kept_columns
from batchgen.jobs.report import sample_lines
from batchgen.output.ledger import Ledger
from batchgen.output.retried import replace_failed
from batchgen.output.schema import check_keep
from batchgen.review.replay import replay
from batchgen.review.report.compare import compare_rows
from batchgen.review.report.counts import count_output
from batchgen.run import run_job
from batchgen.types import Receipt, Rejected, SamplingParams
from tests.support.inputs import chunks, open_prompts
from tests.support.jobs import change, make_job
from tests.support.models import write_byte_model

PARAMS = SamplingParams(max_tokens=3)


def row_numbers(rows: Any) -> npt.NDArray[np.int64]:
    return np.array(rows)


def kept(files: Any, *columns: str) -> pa.Table:
    """The kept columns as a worker gets them, in one chunk."""
    prompts = open_prompts(files, keep=columns)
    facts = prompts.scan()
    assert facts.rows == sum(1 for _ in prompts.requests(PARAMS))
    (chunk,) = chunks(prompts)
    table = kept_columns(chunk, row_numbers(range(facts.rows)))
    assert table.schema == facts.kept
    return table


def jsonl(path: Path, *values: Any, key: str = "k") -> Path:
    path.write_text("".join(json.dumps({"prompt": "a", key: value}) + "\n" for value in values))
    return path


def parquet(path: Path, **columns: Any) -> Path:
    length = len(next(iter(columns.values())))
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"prompt": ["a"] * length} | columns), path)
    return path


# ---- JSON: one type for all values, or text of JSON


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1, None, -(2**63), 2**63 - 1], pa.int64()),
        ([1, 2.5], pa.float64()),
        ([2**53, 0.5], pa.float64()),
        ([True, None], pa.bool_()),
        (["x", "", "7"], pa.string()),
        ([None, None], pa.string()),
        ([[1, 2], [], None, [None]], pa.list_(pa.int64())),
        ([[], []], pa.list_(pa.string())),
        ([{"a": 1, "b": None}, {"b": "x", "a": 2.5}], pa.struct([("a", pa.float64()), ("b", pa.string())])),
        ([[{"a": [1]}], [{"a": None}]], pa.list_(pa.struct([("a", pa.list_(pa.int64()))]))),
    ],
)
def test_values_of_one_type_have_that_type(tmp_path: Path, values: list[Any], kind: pa.DataType) -> None:
    table = kept(jsonl(tmp_path / "p.jsonl", *values), "k")
    assert table.schema.field("k").type == kind
    assert table["k"].to_pylist() == values


@pytest.mark.parametrize(
    "values",
    [
        [1, "1"],
        [True, 1],
        [2**63, 1],
        [2**53 + 1, 0.5],
        [{"a": 1}, {"b": 1}],
        [{"a": 1}, {}],
        [{"": 1}],
        [[1], 1],
        [[1, "x"]],
        [{"a": [1]}, {"a": ["x"]}],
        ["x", "\ud800"],
        [{"a": "\udfff"}],
        [eval("[" * 40 + "]" * 40)],
    ],
    ids=lambda values: str(values)[:30].encode("ascii", "replace").decode(),
)
def test_values_of_several_types_are_json_text(tmp_path: Path, values: list[Any]) -> None:
    table = kept(jsonl(tmp_path / "p.jsonl", *values, None), "k")
    assert table.schema.field("k").type == pa.string()
    *texts, last = table["k"].to_pylist()
    assert last is None
    assert [json.loads(text) for text in texts] == values


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=8,
)


@given(values=st.lists(json_values, min_size=1, max_size=6))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_json_is_kept_unchanged(tmp_path: Path, values: list[Any]) -> None:
    lines = [json.dumps({"prompt": "a", "k": value}) for value in values]
    (tmp_path / "p.jsonl").write_text("\n".join([*lines, '{"prompt": "a", "k": null}']))
    table = kept(tmp_path / "p.jsonl", "k")
    found = table["k"].to_pylist()[:-1]
    if table.schema.field("k").metadata:
        found = [value if value is None else json.loads(value) for value in found]
    assert found == values
    pq.write_table(table, tmp_path / "t.parquet")
    assert pq.read_table(tmp_path / "t.parquet").equals(table)


def test_json_is_kept_to_a_depth_that_python_can_always_write(tmp_path: Path) -> None:
    inner = MAX_NESTING - 1
    path = jsonl(tmp_path / "p.jsonl", eval("[" * inner + "]" * inner), 1)
    with open(path, "a") as file:
        file.write('{"prompt": "a", "k": ' + "[" * (inner + 1) + "]" * (inner + 1) + "}\n")
        file.write('{"prompt": "a", "k": ' + '{"a":' * 970 + "1" + "}" * 971 + "\n")
    assert kept(path, "k")["k"].to_pylist() == ["[" * inner + "]" * inner, "1", None, None]
    *good, bad, worse = open_prompts(path).requests(PARAMS)
    assert not any(isinstance(row, Rejected) for row in good)
    for row in (bad, worse):
        assert isinstance(row, Rejected)
        assert row.error.endswith("the JSON is nested too deeply (over 200 levels); flatten it")


def test_a_broken_row_or_one_without_the_key_has_null(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_text, "MAX_LINE_BYTES", 100)
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": 1, "k": 5}\nnonsense\n\n{"prompt": "a"}\n{"k": "' + b"x" * 200 + b'"}\n{"k": 6}')
    assert kept(path, "k")["k"].to_pylist() == [5, None, None, None, 6]


def test_the_type_is_that_of_all_rows_of_all_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "BATCH_ROWS", 3)
    a, b = jsonl(tmp_path / "a.jsonl", *range(10)), jsonl(tmp_path / "b.jsonl", 0.5)
    assert kept([a, b], "k")["k"].to_pylist() == [*map(float, range(10)), 0.5]
    assert kept(a, "k").schema.field("k").type == pa.int64()


def test_a_path_keeps_what_it_leads_to(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "p.jsonl", {"b": {"c": 1}}, {"b": None}, None)
    assert kept(path, "k.b.c")["k.b.c"].to_pylist() == [1, None, None]


def test_nan_of_json_is_kept_as_a_number_and_is_null_in_json_text(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "p.jsonl", math.nan, math.inf, 1)
    assert str(kept(path, "k")["k"].to_pylist()) == "[nan, inf, 1.0]"
    path = jsonl(tmp_path / "p.jsonl", [math.nan, "NaN"], 1)
    assert kept(path, "k")["k"].to_pylist() == ['[null, "NaN"]', "1"]


# ---- CSV: strings


def test_csv_is_kept_as_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text('prompt,k,x\na,007,\nb\nc," 1.0 ",y\n')
    assert kept(path, "x", "k").to_pydict() == {"x": ["", None, "y"], "k": ["007", None, " 1.0 "]}


# ---- Parquet: any type

NANO = datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC)
COLUMNS = {
    "bool": pa.array([True, None]),
    "int8": pa.array([-1, 2], pa.int8()),
    "uint64": pa.array([2**64 - 1, None], pa.uint64()),
    "float16": pa.array([1.5, None], pa.float32()).cast(pa.float16()),
    "float32": pa.array([math.pi, math.nan], pa.float32()),
    "double": pa.array([math.inf, -0.0]),
    "decimal": pa.array([Decimal("1.23456789012345678901"), None]),
    "date32": pa.array([0, None], pa.date32()),
    "time64": pa.array([1, None], pa.time64("ns")),
    "timestamp_ns": pa.array([1, None], pa.timestamp("ns", "Europe/Berlin")),
    "timestamp_us": pa.array([1, None], pa.timestamp("us")),
    "duration": pa.array([1, None], pa.duration("ms")),
    "binary": pa.array([b"\xff\0", None]),
    "fixed": pa.array([b"ab", None], pa.binary(2)),
    "large_binary": pa.array([b"\xff", None], pa.large_binary()),
    "string": pa.array(["é", ""]),
    "large_string": pa.array(["é", None], pa.large_string()),
    "string_view": pa.array(["a string that is longer than twelve", None], pa.string_view()),
    "dictionary": pa.array(["x", None]).dictionary_encode(),
    "list": pa.array([[1, None], []], pa.list_(pa.int16())),
    "large_list": pa.array([["x"], None], pa.large_list(pa.string())),
    "fixed_list": pa.array([[1.0, 2.0], None], pa.list_(pa.float32(), 2)),
    "struct": pa.array([{"a": 1, "b": [{"c": b"x"}]}, None]),
    "map": pa.array([[("k", 1)], None], pa.map_(pa.string(), pa.int64())),
    "uuid": pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"\0" * 16, None], pa.binary(16))),
    "null": pa.nulls(2),
    "nested_time": pa.array([[datetime.timedelta(1)], None]),
    # what Python, or Arrow's own filters and casts, cannot hold
    "far": pa.array([2**62, None], pa.timestamp("us")),
    "far_with_zone": pa.array([2**62, -1], pa.timestamp("us", "UTC")),
    "unknown_zone": pa.array([1, None], pa.timestamp("us", "Nowhere/Land")),
    "far_date": pa.array([2**30, None], pa.date32()),
    "far_duration": pa.array([2**60, None], pa.duration("s")),
    "decimal256": pa.array([Decimal(10) ** 60, None], pa.decimal256(76, 3)),
    "binary_view": pa.array([b"\xff" * 20, None], pa.binary_view()),
    "views": pa.array([["a string that is longer than twelve"], None], pa.list_(pa.string_view())),
    "list_view": pa.array([["x"], None], pa.list_view(pa.string())),
    "map_of_times": pa.array([[(1, 1)], None], pa.map_(pa.timestamp("ns"), pa.timestamp("ns"))),
    "json": pa.ExtensionArray.from_storage(pa.json_(), pa.array(['{"a": 1}', None])),
    "twins": pa.StructArray.from_arrays([pa.array([1, 2]), pa.array([3, 4])], ["a", "a"]),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_model(tmp_path_factory.mktemp("keep") / "bytes")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """The output of a job that keeps a column of every type, from p.parquet beside it."""
    folder = tmp_path_factory.mktemp("every") / "day=5"  # which Arrow may take for a column
    source = parquet(folder / "p.parquet", **COLUMNS)
    run_job(make_job(source, folder / "o.parquet", str(model), replace(PARAMS, n=2), keep=tuple(COLUMNS), jobs=1))
    return folder / "o.parquet"


def test_every_arrow_type_is_carried_through_a_job_unchanged(finished: Path) -> None:
    expected = pq.ParquetFile(finished.parent / "p.parquet").read(list(COLUMNS))
    expected = pa.concat_tables([expected.slice(row, 1) for row in (0, 0, 1, 1)])
    found = pq.ParquetFile(finished).read()
    for name in COLUMNS:
        if name != "null":
            assert found.schema.field(name).type == expected.schema.field(name).type
            assert found[name].combine_chunks().equals(expected[name].combine_chunks()) or name == "float32"
    assert str(found["float32"].to_pylist()) == str(expected["float32"].to_pylist())  # NaN equals nothing
    assert found["null"].null_count == 4


def test_every_arrow_type_can_be_written_as_json_lines(tmp_path: Path, model: Path) -> None:
    source = parquet(tmp_path / "p.parquet", **COLUMNS)
    job = make_job(source, tmp_path / "o.jsonl", str(model), PARAMS, keep=tuple(COLUMNS), jobs=1)
    run_job(job)

    def no_constant(name: str) -> None:
        raise AssertionError(name)

    rows = [json.loads(line, parse_constant=no_constant) for line in job.output.path.read_text().splitlines()]
    first = {name: rows[0][name] for name in COLUMNS}
    assert first["double"] is None
    assert rows[1]["float32"] is None
    assert (first["binary"], first["decimal"]) == ("/wA=", "1.23456789012345678901")
    assert first["timestamp_ns"].startswith("1970-01-01 01:00:00.000000001")
    assert (first["date32"], first["struct"]) == ("1970-01-01", {"a": 1, "b": [{"c": "eA=="}]})
    assert (first["map"], first["fixed_list"], first["float16"]) == ([["k", 1]], [1.0, 2.0], 1.5)
    out_of_range = f"<value out of range: {2**62}>"
    assert (first["far"], first["far_with_zone"], first["unknown_zone"]) == (
        *(out_of_range, out_of_range),
        "1970-01-01 00:00:00.000001Z",
    )
    assert (first["twins"], first["views"], first["list_view"]) == (
        [["a", 1], ["a", 3]],
        COLUMNS["views"][0].as_py(),
        ["x"],
    )
    assert first["map_of_times"] == [["1970-01-01 00:00:00.000000001"] * 2]


def test_every_kept_type_is_there_when_its_output_is_read_again(finished: Path, model: Path) -> None:
    assert [line.split("]")[0] for line in sample_lines(finished, 3)] == ["[row 0", "[row 0", "[row 1"]
    assert count_output(finished).rows == 4
    assert compare_rows(finished, finished).equal == 4
    assert replay(finished, 2, model=str(model)).differences == ()


def test_every_kept_type_is_carried_through_a_retry(finished: Path) -> None:
    whole = pq.ParquetFile(finished).read()
    status = whole.schema.get_field_index("status")
    failed = whole.slice(0, 3).set_column(status, whole.schema.field(status), [["ok", "ok", "failed"]])
    pq.write_table(failed, finished.with_name("failed.parquet"))
    again = pa.Table.from_batches(replace_failed(finished.with_name("failed.parquet"), whole.slice(2).to_batches()))
    assert again.drop_columns("float32").equals(whole.drop_columns("float32"))  # NaN equals nothing


@pytest.mark.parametrize("name", COLUMNS)
def test_no_type_of_a_parameter_or_an_id_ends_a_job(tmp_path: Path, name: str) -> None:
    """Each row is a request, or rejected with its reason."""
    column = COLUMNS[name]
    path = parquet(tmp_path / "p.parquet", id=column, seed=column, sampling_params=column)
    assert len(list(open_prompts(path).requests(PARAMS))) == 2


def test_showing_rows_fails_no_run(tmp_path: Path) -> None:
    (tmp_path / "o.parquet").write_bytes(b"PAR1")
    (line,) = sample_lines(tmp_path / "o.parquet", 3)
    assert line.startswith("note: the first rows cannot be shown (")


NOT_UTF8 = pa.array([b"a", b"\xff", None]).cast(pa.string(), safe=False)


@pytest.mark.parametrize(
    "array",
    [
        NOT_UTF8,
        NOT_UTF8.cast(pa.string_view()),
        NOT_UTF8.cast(pa.large_string()),
        pa.StructArray.from_arrays([NOT_UTF8, pa.array([1, 2, 3])], ["a", "b"]),
        pa.ListArray.from_arrays([0, 1, 2, 3], NOT_UTF8),
    ],
    ids=lambda array: str(array.type),
)
def test_only_a_row_with_text_that_json_cannot_hold_is_rejected_before_it_is_generated(
    tmp_path: Path, array: pa.Array
) -> None:
    """If the output is JSON lines, and if files that disagree make JSON text of the column."""
    source = parquet(tmp_path / "p.parquet", k=array)
    prompts = open_prompts(source, keep=("k",))
    (carried,) = chunks(prompts)
    assert not any(isinstance(item, Rejected) for item in carried.items)
    assert kept_columns(carried, row_numbers(range(3))).column("k").combine_chunks().equals(array)
    (checked,) = chunks(prompts, as_json=True)
    both = [source, jsonl(tmp_path / "p.jsonl", 1)]
    for chunk in (checked, *chunks(open_prompts(both, keep=("k",)))):
        good, bad, also_good = chunk.items[:3]
        assert (good.row, also_good.row) == (0, 2)
        assert not isinstance(good, Rejected)
        assert isinstance(bad, Rejected)
        assert bad.error == (
            "p.parquet:row 1: the kept 'k' is not UTF-8, and JSON is to hold it; write it as UTF-8, or as binary"
        )
        assert kept_columns(chunk, row_numbers([0, 1]))["k"].is_valid().to_pylist() == [True, False]


def test_text_that_is_not_utf8_is_kept_in_parquet_and_rejects_its_row_in_json(tmp_path: Path, model: Path) -> None:
    source = parquet(tmp_path / "p.parquet", k=pa.array([b"\xff"]).cast(pa.string(), safe=False))
    job = make_job(source, tmp_path / "o.parquet", str(model), PARAMS, keep=("k",), jobs=1)
    run_job(job)
    assert pq.read_table(job.output.path)["k"].cast(pa.binary()).to_pylist() == [b"\xff"]
    assert run_job(change(job, out=tmp_path / "o.jsonl")).rejected == 1
    assert json.loads((tmp_path / "o.jsonl").read_text())["k"] is None


# ---- files that differ


def test_if_a_file_lacks_a_column_it_is_null(tmp_path: Path) -> None:
    a = parquet(tmp_path / "a.parquet", k=pa.array([1], pa.int16()), x=["x"])
    b = parquet(tmp_path / "b.parquet", other=[True])
    c = parquet(tmp_path / "c.parquet", k=pa.nulls(1))
    d = tmp_path / "d.jsonl"
    d.write_text('{"prompt": "a"}\n')
    e = tmp_path / "e.csv"
    e.write_text("prompt,x\na,y\n")
    table = kept([b, a, c, d, e], "k", "x")
    assert table.to_pydict() == {"k": [None, 1, None, None, None], "x": [None, "x", None, None, "y"]}
    assert table.schema.types == [pa.int16(), pa.string()]


SPELLINGS = [
    ([pa.array([1], pa.int32()), pa.array([2**40])], pa.int64()),
    ([pa.array([200], pa.uint8()), pa.array([-1], pa.int8())], pa.int16()),
    ([pa.array([0.5], pa.float32()), pa.array([0.1])], pa.float64()),
    ([pa.array(["x"]), pa.array(["y"], pa.large_string()), pa.array(["z"], pa.string_view())], pa.large_string()),
    ([pa.array(["x"]).dictionary_encode(), pa.array(["y"])], pa.large_string()),
    ([pa.array([b"x"]), pa.array([b"y"], pa.binary(1))], pa.large_binary()),
    ([pa.array([Decimal("0.5")]), pa.array([Decimal("100.25")])], pa.decimal128(5, 2)),
    ([pa.array([[1]], pa.list_(pa.int8())), pa.array([[2, 3]], pa.large_list(pa.int32()))], pa.list_(pa.int32())),
    ([pa.nulls(1), pa.array([1])], pa.int64()),
]


@pytest.mark.parametrize(("arrays", "kind"), SPELLINGS, ids=lambda value: str(value)[:20])
def test_files_that_spell_a_type_differently_have_one_that_holds_all_values(
    tmp_path: Path, arrays: list[pa.Array], kind: pa.DataType
) -> None:
    files = [parquet(tmp_path / f"{number}.parquet", k=array) for number, array in enumerate(arrays)]
    table = kept(files, "k")
    assert table.schema.field("k").type == kind
    assert table["k"].to_pylist() == [value for array in arrays for value in array.to_pylist()]
    assert kept(files[::-1], "k").schema == table.schema


def test_files_that_disagree_about_a_type_have_json_text(tmp_path: Path) -> None:
    day, big = datetime.date(2024, 1, 2), 2**53 + 1
    text = parquet(tmp_path / "d" / "lang=en" / "text.parquet", k=["7"])
    files = [
        parquet(tmp_path / "d" / "lang=7" / "a.parquet", k=[big, 7]),
        parquet(tmp_path / "b.parquet", k=[7.0, 0.5]),
        parquet(tmp_path / "c.parquet", k=[day], lang=[1.5]),
        parquet(tmp_path / "u.parquet", k=pa.array([2**64 - 1], pa.uint64())),
        parquet(tmp_path / "l.parquet", k=[[{"x": b"\xff", "y": None}]]),
        jsonl(tmp_path / "d.jsonl", 7, "x"),
        jsonl(tmp_path / "e.jsonl", "7"),
        text,
    ]
    table = kept(files, "k")
    assert table.schema.field("k").metadata == {b"batchgen": b"JSON text"}
    assert table["k"].to_pylist() == [
        *(str(big), "7", "7", "0.5", '"2024-01-02"', str(2**64 - 1), '[{"x": "/w==", "y": null}]'),
        *("7", '"x"', '"7"', '"7"'),
    ]
    pq.write_table(table, tmp_path / "again.parquet")
    again = kept([parquet(tmp_path / "n.parquet", k=[7]), parquet(tmp_path / "s.parquet", k=["s"])], "k")
    pq.write_table(again.append_column("prompt", [["a", "b"]]), tmp_path / "again.parquet")
    assert kept([tmp_path / "again.parquet", text], "k")["k"].to_pylist() == ["7", '"s"', '"7"']
    lang = kept([tmp_path / "d", tmp_path / "c.parquet"], "lang")
    assert lang["lang"].to_pylist() == ["7", "7", '"en"', "1.5"]


def test_decimals_that_no_type_holds_together_are_json_text(tmp_path: Path) -> None:
    large = parquet(tmp_path / "a.parquet", k=pa.array([Decimal(10) ** 70], pa.decimal256(76, 0)))
    fine = parquet(tmp_path / "b.parquet", k=pa.array([Decimal("0.5")], pa.decimal256(76, 70)))
    assert kept([large, fine], "k")["k"].to_pylist() == [f'"1{"0" * 70}"', f'"0.5{"0" * 69}"']


def test_a_number_keeps_its_sign_if_files_disagree(tmp_path: Path) -> None:
    files = [parquet(tmp_path / "a.parquet", k=[-0.0, 7.0]), parquet(tmp_path / "b.parquet", k=["x"])]
    assert kept(files, "k")["k"].to_pylist() == ["-0.0", "7", '"x"']


def test_the_types_of_files_without_rows_count_only_if_no_file_has_rows(tmp_path: Path) -> None:
    empty = parquet(tmp_path / "e.parquet", k=pa.array([], pa.int8()))
    assert open_prompts(empty, keep=("k",)).scan().kept.field("k").type == pa.int8()
    assert kept([empty, parquet(tmp_path / "b.parquet", k=["x"])], "k").schema.field("k").type == pa.string()


def test_a_path_keeps_a_member_of_a_struct(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", k=[{"b": {"c": 1, "d": 2}}, {"b": None}, None])
    assert kept(path, "k.b.c", "k")["k.b.c"].to_pylist() == [1, None, None]


def test_a_column_that_no_file_has_is_refused_with_the_nearest(tmp_path: Path) -> None:
    a = parquet(tmp_path / "a.parquet", label=["x"])
    with pytest.raises(
        InputError, match=r"a\.parquet: no column 'lable'; .*; did you mean 'label'\? pass it as --keep"
    ):
        kept(a, "lable")
    with pytest.raises(InputError, match=r"a\.jsonl and 1 more: no column 'lable'; the columns are 'prompt', 'k'"):
        kept([jsonl(tmp_path / "a.jsonl", 1), jsonl(tmp_path / "b.jsonl", 1)], "lable")
    path = tmp_path / "twice.parquet"
    pq.write_table(pa.table([["a"], [1], [2]], names=["prompt", "k", "k"]), path)
    with pytest.raises(InputError, match="2 columns are called 'k'; rename all but one"):
        kept(path, "k")
    (tmp_path / "twice.csv").write_text("prompt,k,k\na,b,c\n")
    with pytest.raises(InputError, match="2 columns are called 'k'; rename all but one"):
        kept(tmp_path / "twice.csv", "k")


@pytest.mark.parametrize("name", ["prompt", "id", "row", "completion", "logprobs", "completion_token_ids"])
def test_a_column_name_of_the_output_is_refused(name: str) -> None:
    with pytest.raises(
        UsageError, match=rf"--keep .*{name}.*: the output has a column of its own by that name; rename"
    ):
        check_keep([name])
    with pytest.raises(UsageError, match="--keep .*k.*: named 2 times; name it once"):
        check_keep(["k", "k"])


# ---- what folders say


def test_folders_are_columns(tmp_path: Path) -> None:
    for folder, value in [("lang=en/year=2023", 1), ("lang=__HIVE_DEFAULT_PARTITION__/year=2024", 2)]:
        parquet(tmp_path / "d" / folder / "part-0.parquet", k=[value, value])
    table = kept(tmp_path / "d", "year", "lang", "k")
    assert table.schema.types == [pa.int64(), pa.string(), pa.int64()]
    assert table.to_pylist()[1:3] == [
        {"year": 2024, "lang": None, "k": 2},
        {"year": 2023, "lang": "en", "k": 1},
    ]


def test_a_kept_folder_that_is_no_text_is_refused(tmp_path: Path) -> None:
    parquet(tmp_path / "d" / "k=x" / "p.parquet", n=[1])
    (tmp_path / "d" / "k=x").rename(os.fsdecode(os.fsencode(tmp_path) + b"/d/k=\xff"))
    with pytest.raises(InputError, match="the folder of 'k' is not UTF-8; rename it"):
        open_prompts(tmp_path / "d", keep=("k",))


def test_folders_with_leading_zeros_are_strings(tmp_path: Path) -> None:
    for value in ("007", "8"):
        parquet(tmp_path / "d" / f"part={value}" / "p.parquet", k=[1])
    assert kept(tmp_path / "d", "part")["part"].to_pylist() == ["007", "8"]


def test_a_column_of_the_file_goes_before_its_folder(tmp_path: Path) -> None:
    parquet(tmp_path / "d" / "k=7" / "p.parquet", k=["own"])
    assert kept(tmp_path / "d", "k")["k"].to_pylist() == ["own"]
    (tmp_path / "e" / "k=7").mkdir(parents=True)
    (tmp_path / "e" / "k=7" / "p.csv").write_text("prompt,k\na,own\nb\n")
    assert kept(tmp_path / "e", "k")["k"].to_pylist() == ["own", None]
    jsonl(tmp_path / "e" / "k=7" / "p.csv", "own").rename(tmp_path / "e" / "k=7" / "p.jsonl")
    assert kept(tmp_path / "e", "k")["k"].to_pylist() == [7]


# ---- beside the right rows


@given(
    rows=st.lists(st.booleans(), min_size=1, max_size=42),
    chunk_rows=st.integers(1, 7),
    batch=st.integers(1, 9),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_each_chunk_gets_the_values_of_its_rows(tmp_path: Path, rows: list[bool], chunk_rows: int, batch: int) -> None:
    """Rows of False are in no chunk."""
    path = parquet(
        tmp_path / "p.parquet",
        k=list(range(100, 100 + len(rows))),
        d=pa.array(["x"] * len(rows)).dictionary_encode(),
    )
    wanted = [row for row, is_wanted in enumerate(rows) if is_wanted]
    prompts = open_prompts(path, keep=("k", "d"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet_format, "BATCH_ROWS", batch)
        found = chunks(prompts, chunk_rows, rows=set(wanted))
        assert [item.row for chunk in found for item in chunk.items] == wanted
        for chunk in found:
            numbers = [item.row for item in chunk.items for _ in range(2)]
            table = kept_columns(chunk, row_numbers(numbers))
            assert table["k"].to_pylist() == [100 + row for row in numbers]
            assert table.schema.equals(prompts.scan().kept)


TEXTS = [f"{row:>4}" * 100 for row in range(500)]
SHARING = {
    "dictionary": pa.array(TEXTS).dictionary_encode(),
    "ordered": pa.array(TEXTS).cast(pa.dictionary(pa.int16(), pa.string(), ordered=True)),
    "view": pa.array(TEXTS, pa.string_view()),
    "list view": pa.array([[text] for text in TEXTS], pa.list_view(pa.string())),
    "dictionary in a list": pa.ListArray.from_arrays(range(501), pa.array(TEXTS).dictionary_encode()),
}


@pytest.mark.parametrize("kind", SHARING)
def test_rows_that_are_taken_hold_nothing_of_the_others(kind: str) -> None:
    table = pa.table({"k": SHARING[kind]})
    taken = Rows(range(500), table, range(500)).take([7, 400]).kept  # type: ignore[arg-type]
    assert taken is not None
    assert taken.schema.equals(table.schema)
    assert taken.to_pylist() == [table.to_pylist()[row] for row in (7, 400)]
    assert taken.get_total_buffer_size() < 5_000


def test_if_nothing_is_kept_chunks_carry_nothing(tmp_path: Path) -> None:
    (chunk,) = chunks(open_prompts(parquet(tmp_path / "p.parquet", k=[1])))
    assert chunk.kept is None
    assert kept_columns(chunk, []).column_names == []


def test_kept_columns_are_the_same_after_an_interruption(tmp_path: Path, model: Path) -> None:
    values = list(range(20))
    path = jsonl(tmp_path / "p.jsonl", *values)
    job = make_job(path, tmp_path / "o.parquet", str(model), PARAMS, keep=("k",), jobs=1, chunk_rows=4)

    class Stop(Exception):
        pass

    commit, done = Ledger.commit, []

    def stopping(ledger: Ledger, receipt: Receipt) -> None:
        if len(done) == 2:
            raise Stop
        done.append(receipt)
        commit(ledger, receipt)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ledger, "commit", stopping)
        with pytest.raises(Stop):
            run_job(job)
    with pytest.raises(UsageError, match="had --keep"):
        run_job(change(job, keep=()))
    run_job(job)
    table = pq.read_table(job.output.path)
    assert table["k"].to_pylist() == values
    assert table.column_names[-1] == "k"


def test_the_parts_of_a_dataset_have_the_kept_columns(tmp_path: Path, model: Path) -> None:
    path = jsonl(tmp_path / "p.jsonl", *range(10))
    run_job(make_job(path, tmp_path / "o", str(model), PARAMS, keep=("k",), jobs=1, chunk_rows=4, dataset=True))
    parts = sorted((tmp_path / "o").glob("*.parquet"))
    assert [pq.read_table(part)["k"].to_pylist() for part in parts] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
