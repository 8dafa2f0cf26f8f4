"""What other programs make of an output: the same rows, in the same order, with the same values."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchgen.output.file import write_groups
from batchgen.output.schema import Columns, rows_to_table
from batchgen.run import run_job
from batchgen.types import EmbeddingRow, SamplingParams
from tests.support.jobs import make_job
from tests.support.models import write_byte_model

COLUMNS = [
    "row",
    "sample",
    "id",
    "prompt",
    "completion",
    "completion_tokens",
    "status",
    "error",
    "seed",
    "tags",
    "score",
]


def importorskip(name: str) -> Any:
    return pytest.importorskip(name, reason=f"{name} is not installed (pip install '.[dev]')")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same job's output as Parquet and as JSON lines, with bad rows and kept columns."""
    folder = tmp_path_factory.mktemp("ecosystem")
    model = write_byte_model(folder / "bytes")
    rows = [{"id": n, "prompt": f"Once é {n}", "tags": ["a", str(n)], "score": n / 2} for n in range(30)]
    lines = [json.dumps(row) for row in rows]
    lines[7] = "nonsense"
    (folder / "p.jsonl").write_text("\n".join(lines))
    found = {}
    for suffix in ("parquet", "jsonl"):
        found[suffix] = folder / f"o.{suffix}"
        params = SamplingParams(max_tokens=5, temperature=1.0, n=2)
        run_job(make_job(folder / "p.jsonl", found[suffix], str(model), params, keep=("tags", "score"), jobs=1))
    return found


@pytest.fixture(scope="module")
def expected(outputs: dict[str, Path]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(outputs["parquet"], columns=COLUMNS).to_pylist()
    assert len(rows) == 59
    assert rows[14]["status"] == "rejected"
    return rows


def test_json_lines_hold_what_parquet_holds(outputs: dict[str, Path], expected: list[dict[str, Any]]) -> None:
    lines = [json.loads(line) for line in outputs["jsonl"].read_text().splitlines()]
    assert [{name: line[name] for name in COLUMNS} for line in lines] == expected


def test_pandas_reads_the_output(outputs: dict[str, Path], expected: list[dict[str, Any]]) -> None:
    pandas = importorskip("pandas")
    frame = pandas.read_parquet(outputs["parquet"], dtype_backend="pyarrow")
    back = pa.Table.from_pandas(frame, preserve_index=False)
    assert back.select(COLUMNS).to_pylist() == expected
    lines = pandas.read_json(outputs["jsonl"], lines=True, dtype=False)
    assert lines["prompt"].tolist()[:3] == [row["prompt"] for row in expected[:3]]
    assert len(lines) == len(expected)


def test_polars_reads_the_output(outputs: dict[str, Path], expected: list[dict[str, Any]]) -> None:
    polars = importorskip("polars")
    assert polars.read_parquet(outputs["parquet"]).select(COLUMNS).to_dicts() == expected
    assert polars.read_ndjson(outputs["jsonl"]).select(COLUMNS).to_dicts() == expected


@pytest.fixture(scope="module")
def dataset(outputs: dict[str, Path]) -> Path:
    """The same job's output as a dataset of three parts."""
    folder = outputs["parquet"].parent
    params = SamplingParams(max_tokens=5, temperature=1.0, n=2)
    options: dict[str, Any] = {"keep": ("tags", "score"), "jobs": 1, "chunk_rows": 12}
    run_job(make_job(folder / "p.jsonl", f"{folder}/out/", str(folder / "bytes"), params, **options))
    return folder / "out"


def test_polars_reads_a_dataset_by_a_glob(dataset: Path, expected: list[dict[str, Any]]) -> None:
    polars = importorskip("polars")
    assert polars.read_parquet(dataset / "*.parquet").select(COLUMNS).to_dicts() == expected
    with pytest.raises(polars.exceptions.PolarsError):  # it reads _SUCCESS too: README and formats.md say so
        polars.read_parquet(dataset)


def test_pandas_and_duckdb_read_a_dataset(dataset: Path, expected: list[dict[str, Any]]) -> None:
    pandas, duckdb = importorskip("pandas"), importorskip("duckdb")
    frame = pandas.read_parquet(dataset, dtype_backend="pyarrow").sort_values(["row", "sample"])
    assert pa.Table.from_pandas(frame, preserve_index=False).select(COLUMNS).to_pylist() == expected
    with duckdb.connect() as connection:
        rows = connection.execute(f"SELECT row, completion FROM '{dataset}/*.parquet' ORDER BY row, sample").fetchall()
    assert rows == [(row["row"], row["completion"]) for row in expected]


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_duckdb_reads_the_output(outputs: dict[str, Path], expected: list[dict[str, Any]], suffix: str) -> None:
    duckdb = importorskip("duckdb")
    with duckdb.connect() as connection:
        columns = ", ".join(f'"{name}"' for name in COLUMNS)
        rows = connection.execute(f"SELECT {columns} FROM '{outputs[suffix]}' ORDER BY row, sample").fetchall()
    assert [dict(zip(COLUMNS, row, strict=True)) for row in rows] == expected


READ = """
import json, sys
import datasets
kind, path, cache = sys.argv[1:]
found = datasets.load_dataset(kind, data_files=path, split="train", cache_dir=cache)
print(json.dumps(list(found)))
"""


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_hugging_face_datasets_reads_the_output(
    outputs: dict[str, Path], expected: list[dict[str, Any]], tmp_path: Path, suffix: str
) -> None:
    importorskip("datasets")
    kind = {"parquet": "parquet", "jsonl": "json"}[suffix]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", READ, kind, str(outputs[suffix]), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    assert [{name: row[name] for name in COLUMNS} for row in rows] == expected


# ---- embeddings


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pa.Table]:
    """A file of embeddings, of which every fifth row was rejected, and its table."""
    path = tmp_path_factory.mktemp("embeddings") / "e.parquet"
    vectors = np.random.default_rng(0).standard_normal((50, 24)).astype(np.float32)
    rows = [
        EmbeddingRow(row=row, id=None, prompt=f"é {row}", status="ok", embedding=vector)
        if row % 5
        else EmbeddingRow(row=row, id=None, prompt=None, status="rejected", error="e.jsonl:1: no text")
        for row, vector in enumerate(vectors)
    ]
    schema = Columns(kind="embed", n_embd=24).schema()
    table = rows_to_table(rows, schema)
    with open(path, "wb") as file:
        write_groups(table.to_batches(max_chunksize=20), file, schema)
    return path, table


def vectors_of(rows: Any) -> list[bytes | None]:
    """The bits of the vectors that another program read."""
    return [None if row is None else np.array(row, np.float32).tobytes() for row in rows]


def test_other_programs_read_the_bits_of_embeddings(embeddings: tuple[Path, pa.Table]) -> None:
    path, table = embeddings
    pandas, polars, duckdb = importorskip("pandas"), importorskip("polars"), importorskip("duckdb")
    expected = vectors_of(table["embedding"].to_pylist())
    assert expected.count(None) == 10
    assert vectors_of(pq.read_table(path)["embedding"].to_pylist()) == expected
    assert vectors_of(pandas.read_parquet(path)["embedding"]) == expected
    frame = polars.read_parquet(path)
    assert frame.schema["embedding"] == polars.Array(polars.Float32, 24)
    assert vectors_of(frame["embedding"].to_list()) == expected
    with duckdb.connect() as connection:
        found = connection.execute(f"SELECT embedding FROM '{path}' ORDER BY row").fetchall()
    assert vectors_of(row for (row,) in found) == expected
