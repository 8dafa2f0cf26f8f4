"""reading.py: an output is read as it was written, and an error names a file that is not one."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchgen.errors import InputError
from batchgen.output.reading import read_batches, read_input_rows, read_plan
from batchgen.output.schema import Columns
from tests.support.plans import plan_of

N = 20_000


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    schema = Columns().schema()
    columns = {name: [None] * N for name in schema.names}
    columns |= {"row": [i // 2 for i in range(N)], "sample": [i % 2 for i in range(N)], "status": ["ok"] * N}
    path = tmp_path_factory.mktemp("output") / "out.parquet"
    table = pa.table(columns, schema).replace_schema_metadata({"batchgen": json.dumps(plan_of().to_json())})
    pq.write_table(table, path, row_group_size=700, write_page_checksum=True, use_dictionary=False)
    return path


def rewritten(output: Path, folder: Path, change, metadata: dict | None = None) -> Path:
    """The same table after a change, as another program would write it."""
    table = pq.read_table(output)
    changed = change(table).replace_schema_metadata(table.schema.metadata if metadata is None else metadata)
    pq.write_table(changed, folder / "changed.parquet")
    return folder / "changed.parquet"


def test_the_plan_is_the_one_that_the_run_wrote(output):
    assert read_plan(output) == plan_of()


def test_batches_are_all_rows_in_order(output):
    assert sum(len(batch) for batch in read_batches(output)) == N
    rows = [row for batch in read_batches(output, ["row", "sample"]) for row in batch.to_pylist()]
    assert rows == [{"row": i // 2, "sample": i % 2} for i in range(N)]


def test_rows_are_found_with_all_their_samples(output):
    found = read_input_rows(output, [3, 349, 350, 9_999], ["row", "sample"])
    assert found.column_names == ["row", "sample"]
    assert found["row"].to_pylist() == [3, 3, 349, 349, 350, 350, 9_999, 9_999]
    assert read_input_rows(output, [], ["row"]).num_rows == 0


@pytest.mark.parametrize(
    ("metadata", "line"),
    [
        ({}, "has no metadata under 'batchgen'"),
        ({"pandas": "{}"}, "has no metadata under 'batchgen'"),
        ({"batchgen": "{"}, "is not a plan of this version .Expecting"),
        ({"batchgen": b"\xff"}, "is not a plan of this version .*decode"),
        ({"batchgen": "[" * 100_000}, "is not a plan of this version .*recursion"),
        ({"batchgen": "[1]"}, "is not a plan of this version .it is not an object"),
        (
            {"batchgen": "{}"},
            "is not a plan of this version .*missing.; it was changed, or another version of batchgen wrote it",
        ),
    ],
)
def test_metadata_that_no_run_wrote_is_named(output, tmp_path, metadata, line):
    with pytest.raises(InputError, match=line):
        read_plan(rewritten(output, tmp_path, lambda table: table, metadata))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda table: table.drop_columns("status"), "no column 'status'"),
        (lambda table: table.append_column("row", table["row"]), "2 columns 'row'"),
        (lambda table: table.set_column(0, "row", pa.array(["x"] * N)), "column 'row' is of type string"),
        (lambda table: table.set_column(4, "completion", pa.array([1] * N)), "column 'completion' is of type int64"),
    ],
)
def test_columns_that_no_run_wrote_are_named(output, tmp_path, change, line):
    with pytest.raises(InputError, match=line):
        read_plan(rewritten(output, tmp_path, change))


def test_a_row_without_a_number_is_named(output, tmp_path):
    nulls = pa.array([None] * N, pa.int64())
    with pytest.raises(InputError, match="row is null in a row; it was changed"):
        list(read_batches(rewritten(output, tmp_path, lambda table: table.set_column(0, "row", nulls))))


def test_another_programs_text_is_text(output, tmp_path):
    text = pa.array(["x"] * N, pa.large_string())
    assert read_plan(rewritten(output, tmp_path, lambda table: table.set_column(4, "completion", text)))


@pytest.mark.parametrize(
    ("content", "line"), [(None, "no such file"), (b"", "not a Parquet file"), (b"PAR1 PAR1", "not a Parquet file")]
)
def test_what_is_no_parquet_file_is_named(tmp_path, content, line):
    if content is not None:
        (tmp_path / "x.parquet").write_bytes(content)
    with pytest.raises(InputError, match=f"x.parquet: {line}"):
        read_plan(tmp_path / "x.parquet")


def test_a_pipe_is_named_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "p.parquet")
    with pytest.raises(InputError, match="p.parquet: not a regular file"):
        read_plan(tmp_path / "p.parquet")


def test_a_folder_and_json_lines_are_named(tmp_path):
    with pytest.raises(InputError, match="a folder without batchgen's _SUCCESS, so not a complete dataset"):
        read_plan(tmp_path)
    with pytest.raises(InputError, match="JSON lines have no place"):
        read_plan(tmp_path / "out.jsonl")


def test_a_flipped_bit_is_named(output, tmp_path):
    data = bytearray(output.read_bytes())
    column = pq.read_metadata(output).row_group(5).column(0)
    data[column.data_page_offset + column.total_compressed_size // 2] ^= 255
    (tmp_path / "x.parquet").write_bytes(data)
    with pytest.raises(InputError, match="a damaged one"):
        list(read_batches(tmp_path / "x.parquet", ["row"]))
