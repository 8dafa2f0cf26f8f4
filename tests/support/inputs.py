"""Inputs for tests: opened as a run opens them, or without the check that refuses a file of only bad rows."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchgen.errors import InputError
from batchgen.input.prompts import Cut, Facts, Prompts
from batchgen.input.sources import find_sources
from batchgen.job import InputOptions
from batchgen.types import Chunk, Rejected, Request, SamplingParams

PARAMS = SamplingParams(max_tokens=8)
CASES = Path(__file__).parent.parent / "cases"  # inputs as people have them


def open_prompts(files: Any, prompt_column: str = "prompt", id_column: str = "id", **options: Any) -> Prompts:
    """Check the files as a run does; standard input is copied to `spool`."""
    spool = options.pop("spool", None)
    return Prompts.open(InputOptions(files, prompt_column, id_column, **options), spool)


def unchecked(files: Any, **options: Any) -> Prompts:
    asked = InputOptions(files, **options)
    return Prompts(asked, find_sources(asked.files, asked.format), openai=False)


def read(files: Any, params: SamplingParams = PARAMS, **options: Any) -> list[Request | Rejected]:
    """Every row, unchecked."""
    return list(unchecked(files, **options).requests(params))


def scan(files: Any, **options: Any) -> Facts:
    """The facts of an input, unchecked."""
    return unchecked(files, **options).scan()


def facts(rows: int, sha256: str, size: int, format: str = "jsonl") -> Facts:
    """Of an input without log-probabilities and kept columns."""
    return Facts((format,), rows, sha256, size, asks=frozenset(), kept=pa.schema([]))


def chunks(prompts: Prompts, chunk_rows: int = 1000, **cut: Any) -> list[Chunk]:
    """The chunks of an input, scanned first, with their requests as they were read."""
    found = prompts.chunks(prompts.scan(), PARAMS, lambda item: item, Cut(chunk_rows, **cut))  # type: ignore[arg-type, return-value]
    return list(found)


def refusal(files: Any, *columns: str, **options: Any) -> str:
    """The error of an input that is refused, which begins with its file."""
    with pytest.raises(InputError) as caught:
        open_prompts(files, *columns, **options)
    error = str(caught.value)
    assert "\n" not in error
    assert not isinstance(files, Path) or error.startswith(f"{files}: ")
    return error


def parquet(folder: Path, columns: Any, **options: Any) -> Path:
    path = folder / "p.parquet"
    pq.write_table(pa.table(columns), path, **options)
    return path


def not_utf8(kind: pa.DataType) -> pa.Array:
    return pa.array([b"a", b"\xff", None, b"b"]).cast(kind, safe=False)
