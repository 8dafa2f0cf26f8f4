"""tables.py: the files of a table are never read without its log; the command in the error exports its rows."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.inputs import open_prompts, read, refusal

MARKERS = {
    "_delta_log/00000000000000000000.json": "a Delta table",
    "metadata/00000-9b4e555d.metadata.json": "an Iceberg table",
    "metadata/v1.metadata.json.gz": "an Iceberg table",
    ".hoodie/hoodie.properties": "a Hudi table",
    "_spark_metadata/0": "the output of a Spark stream",
}


def make_table(folder: Path, marker: str) -> Path:
    for path in (folder / "data" / "lang=en" / "part-0.parquet", folder / marker):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    pq.write_table(pa.table({"prompt": ["removed"]}), folder / "data" / "lang=en" / "part-0.parquet")
    return folder


@pytest.mark.parametrize("marker", MARKERS)
@pytest.mark.parametrize(
    "given",
    ["d/table", "d", "d/table/data/lang=en", "d/*/data/*/*.parquet", "d/**/*.parquet", "d/table/data/*/part-0.parquet"],
)
def test_a_table_as_a_folder_is_refused_by_name_however_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, marker: str, given: str
) -> None:
    monkeypatch.chdir(tmp_path)
    table = make_table(tmp_path / "d" / "table", marker)
    error = refusal(given)
    assert error.startswith(f"{table}: this is {MARKERS[marker]}, and only its log says which of its files hold rows")
    assert "; then give prompts.parquet" in error


def test_a_file_or_a_link_into_a_table_is_refused_too(tmp_path: Path) -> None:
    file = make_table(tmp_path / "table", "_delta_log/0.json") / "data" / "lang=en" / "part-0.parquet"
    (tmp_path / "link.parquet").symlink_to(file)
    for given in (file, tmp_path / "link.parquet"):
        assert f"{tmp_path}/table: this is a Delta table" in refusal(str(given))


def test_folders_that_only_look_like_a_table_are_read(tmp_path: Path) -> None:
    for name in ("metadata/notes.json", "data/metadata.json/p.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"prompt": "a"}\n')
    open_prompts(tmp_path)
    assert len(read(tmp_path)) == 2
    make_table(tmp_path / "beside", ".hoodie/hoodie.properties")
    assert len(read(tmp_path / "metadata")) == 1


def test_the_newest_metadata_of_iceberg_is_named(tmp_path: Path) -> None:
    for name in ("v9", "v10", "v2"):
        make_table(tmp_path / "table", f"metadata/{name}.metadata.json")
    assert "v10.metadata.json" in refusal(tmp_path / "table")


def test_the_command_for_a_delta_table_exports_the_rows_that_it_has(tmp_path: Path) -> None:
    pytest.importorskip("deltalake", reason="deltalake is not installed")
    table = tmp_path / "table"
    table.mkdir()
    actions: list[object] = [
        {"protocol": {"minReaderVersion": 1, "minWriterVersion": 2}},
        {
            "metaData": {
                "id": "t",
                "format": {"provider": "parquet", "options": {}},
                "schemaString": json.dumps(
                    {
                        "type": "struct",
                        "fields": [{"name": "prompt", "type": "string", "nullable": True, "metadata": {}}],
                    }
                ),
                "partitionColumns": [],
                "configuration": {},
            }
        },
    ]
    for name in ("kept", "removed"):
        pq.write_table(pa.table({"prompt": [name]}), table / f"{name}.parquet")
        size = (table / f"{name}.parquet").stat().st_size
        change = {"path": f"{name}.parquet", "dataChange": True, "modificationTime": 1, "partitionValues": {}}
        actions.append({"add": change | {"size": size}})
    (table / "_delta_log").mkdir()
    write_log(table, 0, actions)
    write_log(table, 1, [{"remove": {"path": "removed.parquet", "dataChange": True, "deletionTimestamp": 1}}])
    words = shlex.split(refusal(table).split("; python -c ", 1)[1])
    code = words[0].rstrip(";")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert [row.prompt for row in read(tmp_path / "prompts.parquet")] == ["kept"]


def write_log(table: Path, version: int, actions: list[object]) -> None:
    (table / "_delta_log" / f"{version:020}.json").write_text("\n".join(map(json.dumps, actions)))
