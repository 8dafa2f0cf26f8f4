"""Samples whose completion an earlier row or sample of the output has: decided when the rows are merged.

Deciding again gives the same rows, and over other rows what they give: merged shards are decided as one run's.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batchgen.input.duplicates import FirstSeen, hash128

_SAMPLES = 2**32  # a row's samples have numbers below this


def made(batch: pa.RecordBatch) -> pa.BooleanArray:
    """Which output rows have a completion that was generated: those that are ok, or that repeat another's."""
    is_whole = pc.is_in(batch["status"], pa.array(["ok", "dropped"]))
    return pc.and_(is_whole, pc.is_valid(batch["completion"]))


def drop_repeated(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Yield the batches, which are in order; of samples with equal completions, all but the first get status dropped.

    Their other columns stay. In memory is a hash of each completion; see FirstSeen.
    """
    first = FirstSeen()  # of each completion, row * _SAMPLES + sample
    return (_decide(batch, first) for batch in batches)


def _decide(batch: pa.RecordBatch, first: FirstSeen) -> pa.RecordBatch:
    is_made = made(batch)
    indices = np.flatnonzero(is_made.to_numpy(zero_copy_only=False))
    texts = batch["completion"].cast(pa.binary()).take(pa.array(indices)).to_pylist()
    places = batch["row"].to_numpy()[indices] * _SAMPLES + batch["sample"].to_numpy()[indices]
    errors: list[str | None] = [None] * len(batch)
    for index, text, place in zip(indices.tolist(), texts, places.tolist(), strict=True):
        if (there := first.find(hash128(text), place)) is not None:
            errors[index] = f"the completion of row {there // _SAMPLES}, sample {there % _SAMPLES} again"
    words = pa.array(errors, pa.string())
    is_repeated = pc.is_valid(words)
    status = pc.if_else(is_repeated, "dropped", pc.if_else(is_made, "ok", batch["status"]))
    error = pc.if_else(is_made, words, batch["error"])
    columns = dict(zip(batch.schema.names, batch.columns, strict=True)) | {"status": status, "error": error}
    return pa.RecordBatch.from_arrays([*columns.values()], schema=batch.schema)
