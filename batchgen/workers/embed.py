"""Chunks into embeddings: each text is read once, and its states of one layer become one vector."""

from typing import TYPE_CHECKING

import numpy as np

from batchgen.engine.sequence import Prompt
from batchgen.gpt2.params import Array
from batchgen.job import EmbedOptions
from batchgen.options import say
from batchgen.types import Chunk, EmbeddingRow, Rejected, TokenizedRequest
from batchgen.workers.complete import begin_chunk, unfinished_row
from batchgen.workers.marker import Marker, Phase

if TYPE_CHECKING:
    from batchgen.engine.engine import Engine


def to_prompts(request: TokenizedRequest) -> list[Prompt]:
    """The row's text in the engine's form; nothing is drawn, so the seed is not used."""
    return [Prompt(request.row, request.prompt_token_ids, request.params, (0,))]


def embedded_row(request: TokenizedRequest, vector: Array) -> EmbeddingRow:
    """The row of a text that is read; a failed one if the model gave no numbers."""
    if not np.isfinite(vector).all():
        what = "the model gives a state that is no number, so its weights are damaged or overflow"
        remedy = f"use another model, or {say('precision', 'float32')}"
        return unfinished_row(request.failed(f"{what}; {remedy}"), EmbeddingRow)
    return EmbeddingRow(
        row=request.row,
        id=request.id,
        prompt=request.prompt,
        status="ok",
        prompt_tokens=len(request.prompt_token_ids),
        embedding=vector,
    )


def embed_chunk(chunk: Chunk, task: EmbedOptions, engine: "Engine", marker: Marker) -> list[EmbeddingRow]:
    """The chunk's rows in order."""
    requests, prompts = begin_chunk(chunk, to_prompts, engine, marker)
    rows = {item.row: unfinished_row(item, EmbeddingRow) for item in chunk.items if isinstance(item, Rejected)}
    for prompt, vector in engine.embed(prompts, task.layer, task.pool, marker.on_step):
        marker.set_in_flight([prompt.row])
        rows[prompt.row] = embedded_row(requests[prompt.row], vector)
        marker.add(1, len(prompt.token_ids))
    marker.finish(Phase.WRITING)
    return [rows[row] for row in sorted(rows)]
