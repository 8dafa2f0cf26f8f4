"""parquet.py: every record is one row, for every type of its columns."""

import hashlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchgen.errors import InputError
from batchgen.input import parquet as parquet_format
from batchgen.types import Rejected, Request
from tests.support.inputs import PARAMS, facts, not_utf8, open_prompts, parquet, read, refusal, scan

# ---- rows


TEXT_TYPES = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]


@pytest.mark.parametrize("kind", TEXT_TYPES, ids=str)
def test_every_arrow_text_type_is_a_prompt(tmp_path: Path, kind: pa.DataType) -> None:
    path = parquet(tmp_path, {"prompt": pa.array(["Once", None, "", "é\0"]).cast(kind), "other": [1, 2, 3, 4]})
    open_prompts(path)
    rows = read(path)
    assert [row.prompt for row in rows] == ["Once", None, "", "é\0"]
    assert rows[0] == Request(0, "p.parquet:row 0", None, "Once", PARAMS)
    assert rows[1] == Rejected(
        1, "p.parquet:row 1", None, None, "p.parquet:row 1: the prompt is null; make it a string"
    )


@pytest.mark.parametrize(
    ("ids", "texts"),
    [
        (pa.array([1, None], pa.uint64()), ["1", None]),
        (pa.array(["x", "y"]).dictionary_encode(), ["x", "y"]),
        (pa.array([7, 7]).dictionary_encode(), ["7", "7"]),
        (pa.array([True, False]), ["true", "false"]),
        (pa.nulls(2), [None, None]),
        (pa.array([0, 1], pa.date32()), ["1970-01-01", "1970-01-02"]),
    ],
)
def test_ids_become_strings(tmp_path: Path, ids: pa.Array, texts: list[str | None]) -> None:
    path = parquet(tmp_path, {"prompt": ["a", "b"], "id": ids})
    open_prompts(path)
    assert [row.id for row in read(path)] == texts


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()], ids=str)
def test_text_that_is_not_utf8_is_rejected_by_row(tmp_path: Path, kind: pa.DataType) -> None:
    rows = read(parquet(tmp_path, {"prompt": not_utf8(kind), "id": not_utf8(kind).take(pa.array([3, 0, 1, 1]))}))
    assert [(type(row), row.id, row.prompt) for row in rows] == [
        (Request, "b", "a"),
        (Rejected, "a", None),
        (Rejected, None, None),
        (Rejected, None, "b"),
    ]
    assert [row.error.split(": ")[1].split(";")[0] for row in rows if isinstance(row, Rejected)] == [
        "the prompt is not UTF-8",
        "the prompt is null",
        "the id is not UTF-8",
    ]


def test_rows_keep_their_numbers_over_batches_and_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_format, "BATCH_ROWS", 7)
    path = parquet(tmp_path, {"prompt": [str(row) for row in range(100)]}, row_group_size=30)
    assert [(row.row, row.place, row.prompt) for row in read(path)] == [
        (row, f"p.parquet:row {row}", str(row)) for row in range(100)
    ]


def test_one_column_can_be_prompt_and_id(tmp_path: Path) -> None:
    (row,) = read(parquet(tmp_path, {"text": ["a"]}), prompt_column="text", id_column="text")
    assert (row.id, row.prompt) == ("a", "a")


def test_a_parquet_scan_counts_and_hashes(tmp_path: Path) -> None:
    path = parquet(tmp_path, {"prompt": ["a", None, "b"]})
    data = path.read_bytes()
    assert scan(path) == facts(3, hashlib.sha256(data).hexdigest(), len(data), "parquet")


def test_zero_parquet_rows_are_fine(tmp_path: Path) -> None:
    path = parquet(tmp_path, {"prompt": pa.array([], pa.string())})
    open_prompts(path)
    assert (read(path), scan(path).rows) == ([], 0)


def test_a_flipped_bit_in_parquet_is_an_input_error(tmp_path: Path) -> None:
    path = parquet(tmp_path, {"prompt": ["Once upon a time"] * 9}, compression="none", write_page_checksum=True)
    data = bytearray(path.read_bytes())
    data[data.index(b"upon a")] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"^p\.parquet:row 0: the Parquet data is damaged here or later"):
        read(path)


@given(at=st.integers(0, 10_000), byte=st.integers(0, 255), cut=st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_damaged_parquet_file_is_read_or_named(tmp_path: Path, at: int, byte: int, cut: bool) -> None:
    path = parquet(tmp_path, {"prompt": ["a", "b", None] * 20, "id": list(range(60))}, write_page_checksum=True)
    data = bytearray(path.read_bytes())
    at %= len(data)
    data[at] = byte
    path.write_bytes(data[:at] if cut else data)
    try:
        open_prompts(path)
        scan(path)
        read(path)
    except InputError as error:
        assert str(error).startswith((f"{path}: ", "p.parquet:row "))  # noqa: PT017  # both outcomes are lawful
        assert "\n" not in str(error)  # noqa: PT017


# ---- files that are refused


def test_parquet_columns_that_cannot_be_prompts_are_refused(tmp_path: Path) -> None:
    assert "no column 'prompt'; the columns are 'text'" in refusal(parquet(tmp_path, {"text": ["a"]}))
    assert "'prompt' is of type int64; cast it to string" in refusal(parquet(tmp_path, {"prompt": [1]}))
    assert "'prompt' is of type binary; cast it to string" in refusal(parquet(tmp_path, {"prompt": [b"a"]}))
    assert "'prompt' is of type null; cast it to string" in refusal(parquet(tmp_path, {"prompt": pa.nulls(2)}))
    assert "is of type struct<" in refusal(parquet(tmp_path, {"prompt": [{"a": "b"}]}))


@pytest.mark.parametrize("ids", [[b"a"], [["a"]], [{"a": 1}]])
def test_parquet_columns_that_cannot_be_ids_are_refused(tmp_path: Path, ids: list[Any]) -> None:
    path = parquet(tmp_path, {"prompt": ["a"], "id": ids})
    assert "cast it to string or an integer type" in refusal(path)


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table([["a"], ["b"]], names=["prompt", "prompt"]), path)
    assert "2 columns are called 'prompt'" in refusal(path)


@pytest.mark.parametrize("data", [b"", b"PAR1", b"prompt,id", b"PAR1" + b"\0" * 100 + b"PAR1"])
def test_a_file_that_is_not_parquet_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "p.parquet"
    path.write_bytes(data)
    assert "not a Parquet file, or a damaged one" in refusal(path)


def test_parameter_columns_may_be_broken_text_but_not_there_twice(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    table = pa.table({"prompt": ["a", "b"], "stop": not_utf8(pa.string())[:2]})
    pq.write_table(table, path)
    assert all(isinstance(item, (Request, Rejected)) for item in read(path))
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array([1]), pa.array([2])], ["prompt", "n", "n"])
    pq.write_table(twice, path)
    with pytest.raises(InputError, match="2 columns are called 'n'"):
        open_prompts(path)
