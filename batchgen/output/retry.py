"""A finished output read again: how it was made, which rows failed, and the same rows with those replaced."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchgen.errors import OutputError
from batchgen.output.writer import BATCH_ROWS, METADATA_KEY


@contextmanager
def _opened(out: Path) -> Iterator[pq.ParquetFile]:
    try:
        with open(out, "rb") as raw, pq.ParquetFile(raw, page_checksum_verification=True) as file:
            yield file
    except FileNotFoundError as error:
        raise OutputError(f"{out}: no such file; run without --retry-failed first") from error
    except (OSError, pa.ArrowException) as error:
        reason = str(error).split("\n")[0]
        raise OutputError(f"{out}: not a whole Parquet file ({reason}); name an output of batchgen generate") from error


def read_manifest(out: Path) -> dict[str, Any]:
    """The plan that made a Parquet output, from its metadata; OutputError where there is none."""
    with _opened(out) as file:
        text = (file.schema_arrow.metadata or {}).get(METADATA_KEY.encode())
    try:
        manifest = json.loads(text or b"")
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict):
        raise OutputError(f"{out}: has no batchgen metadata; name an output of batchgen generate")
    return manifest


def failed_rows(out: Path) -> tuple[list[int], Counter[str]]:
    """The input rows that failed, in order, and the number of output rows of each status."""
    rows: list[int] = []
    counts: Counter[str] = Counter()
    with _opened(out) as file:
        if missing := {"row", "status"} - set(file.schema_arrow.names):
            raise OutputError(f"{out}: has no column {min(missing)!r}; take the file as batchgen wrote it")
        for batch in file.iter_batches(BATCH_ROWS, columns=["row", "status"], use_threads=False):
            counts.update(batch["status"].to_pylist())
            rows.extend(batch.filter(pc.field("status") == "failed")["row"].to_pylist())
    return rows, counts


def with_rows_replaced(out: Path, parts: Iterable[Path]) -> Iterator[Any]:
    """The output's record batches, in order, with the parts' rows in the place of those that had failed.

    Memory is that of the parts' rows and one batch.
    """
    with _opened(out) as file:
        schema = file.schema_arrow.remove_metadata()
        new = pa.concat_tables([schema.empty_table(), *(pq.read_table(part).cast(schema) for part in parts)])
        for batch in file.iter_batches(BATCH_ROWS, use_threads=False):
            failed = batch.filter(pc.field("status") == "failed")["row"]
            kept = pa.Table.from_batches([batch.filter(pc.field("status") != "failed")], schema)
            table = pa.concat_tables([kept, new.filter(pc.is_in(new["row"], failed))])
            yield from table.sort_by([("row", "ascending"), ("sample", "ascending")]).combine_chunks().to_batches()
