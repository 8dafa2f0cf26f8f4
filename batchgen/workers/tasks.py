"""The rows of a chunk, whatever the run does with them: one entry for workers, `Generator` and `verify`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from batchgen.job import ScoreOptions, TaskOptions
from batchgen.text.tokenizer import Tokenizer
from batchgen.types import Chunk, OutputRow, Row, SamplingParams, ScoreRow
from batchgen.workers.complete import complete_chunk
from batchgen.workers.embed import embed_chunk
from batchgen.workers.marker import RECORD, Marker
from batchgen.workers.score import count_scores, score_chunk, scored_tokens

if TYPE_CHECKING:
    from batchgen.engine.engine import Engine


def rows_of_chunk(
    chunk: Chunk,
    task: TaskOptions | None,
    params: SamplingParams,
    engine: "Engine",
    tokenizer: Tokenizer,
    marker: Marker | None = None,
) -> Sequence[Row]:
    """The chunk's output rows in order. params are the run's, whose tokens are generated if it has no task."""
    marker = marker or Marker(np.zeros(1, RECORD))
    if task is None:
        return complete_chunk(chunk, params, engine, tokenizer, marker)
    if isinstance(task, ScoreOptions):
        return score_chunk(chunk, task, engine, tokenizer, marker)
    return embed_chunk(chunk, task, engine, marker)


def made_tokens(row: Row) -> int:
    """Tokens of a row that were generated or scored."""
    if isinstance(row, OutputRow):
        return row.completion_tokens or 0
    return scored_tokens(row) if isinstance(row, ScoreRow) else 0


def count_totals(rows: Sequence[Row]) -> dict[str, int]:
    """What a Receipt has of these rows besides counts of rows and tokens."""
    return count_scores([row for row in rows if isinstance(row, ScoreRow)])
