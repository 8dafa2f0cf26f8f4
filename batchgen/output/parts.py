"""Parts: the finished rows of one chunk as a Parquet file, with the chunk's receipt in its metadata."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.errors import OutputError
from batchgen.files import PART, sha256_of
from batchgen.options import say
from batchgen.output.place import output_errors
from batchgen.output.schema import rows_to_table
from batchgen.types import OutputRow, Reason, Receipt

GROUP_ROWS = 65_536  # of a row group at most
BATCH_ROWS = 8_192
RECEIPT_KEY = "batchgen_receipt"
METADATA_KEY = "batchgen"  # in the metadata of a file of all rows: the plan
FEW_VALUES = ["finish_reason", "status", "error", "parameters"]  # worth a dictionary; other columns rarely repeat

PARQUET_OPTIONS: dict[str, object] = {
    "compression": "zstd",
    "use_dictionary": FEW_VALUES,
    "write_statistics": ["row", "sample", "status"],
    "write_page_checksum": True,
}


@contextmanager
def open_writer(file: BinaryIO, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    """A pq.ParquetWriter that is always closed here, never by the garbage collector."""
    writer = pq.ParquetWriter(file, schema, **PARQUET_OPTIONS)
    try:
        yield writer
    except BaseException:
        with suppress(OSError, pa.ArrowException):  # the first error is the one to raise; the file is removed
            writer.close()
        raise
    writer.close()


def part_name(chunk: int, sha256: str) -> str:
    """What the ledger calls a part: its chunk and the start of its SHA-256."""
    return f"{chunk:08d}-{sha256[:16]}.parquet"


def write_part(rows: Sequence[OutputRow], path: Path, schema: pa.Schema, kept: pa.Table | None = None) -> str:
    """Write one chunk's rows to a new file, on disk when this returns its SHA-256; equal rows give equal bytes.

    kept is a table of the columns that come from the input, as long as rows.
    """
    with output_errors(path):
        with open(path, "xb") as file:
            with open_writer(file, schema) as writer:
                writer.write_table(rows_to_table(rows, schema, kept), row_group_size=GROUP_ROWS)
            file.flush()
            os.fsync(file.fileno())
        return sha256_of(path)


def read_parts(parts: Iterable[Path], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Yield the parts' record batches in order, with their checksums verified; OutputError names a damaged part."""
    for part in parts:
        try:
            with open(part, "rb") as raw, pq.ParquetFile(raw, page_checksum_verification=True) as file:
                if not file.schema_arrow.equals(schema):
                    what = "the part has other columns than this run's"
                    raise OutputError(f"{part}: {what}; run again with {say('restart', True)}")
                yield from file.iter_batches(BATCH_ROWS, use_threads=False)
        except (OSError, pa.ArrowException) as error:
            reason = str(error).split("\n")[0]
            raise OutputError(f"{part}: the part is damaged ({reason}); delete it and run again") from error


def with_receipt(schema: pa.Schema, receipt: Receipt) -> pa.Schema:
    """The schema of a part that carries its receipt, without the fields that are only known of the finished file."""
    values = {key: value for key, value in asdict(receipt).items() if key not in ("path", "sha256")}
    return schema.with_metadata({RECEIPT_KEY: json.dumps(values)})


def read_receipt(path: Path) -> Receipt | None:
    """The receipt of a committed part, or None if the file is not what its name says."""
    match = PART.fullmatch(path.name)
    if not match or not path.is_file():
        return None
    sha256 = sha256_of(path)
    if sha256[:16] != match[2]:
        return None
    try:
        with open(path, "rb") as file:
            values = json.loads(pq.read_schema(file).metadata[RECEIPT_KEY.encode()])
        reasons = tuple(Reason(**reason) for reason in values.pop("reasons", ()))
        receipt = Receipt(**values, path=path.name, sha256=sha256, reasons=reasons)
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError):
        return None
    return receipt if receipt.chunk == int(match[1]) else None
