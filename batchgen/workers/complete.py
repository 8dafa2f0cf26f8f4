"""Chunks into rows: an engine over a model's shards, and what it makes of a chunk's requests."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import numpy as np

from batchgen.engine.limits import MAX_BATCH, check_prompts
from batchgen.engine.sequence import Completion, Prompt, sample_seeds
from batchgen.models.model import Model
from batchgen.planning import default_kv_bytes
from batchgen.text.stopping import StopStrings, bad_word_ids, completed_text
from batchgen.text.tokenizer import Tokenizer
from batchgen.types import (
    Chunk,
    EmbeddingRow,
    OutputRow,
    Rejected,
    SamplingParams,
    ScoreRow,
    TokenizedRequest,
    encodable,
)
from batchgen.workers.marker import RECORD, Marker, Phase

if TYPE_CHECKING:
    from batchgen.engine.engine import Engine

R = TypeVar("R", ScoreRow, EmbeddingRow)

# of each token, the likeliest ones in its place, with their log-probabilities
Tops: TypeAlias = tuple[tuple[tuple[int, float], ...], ...]


def map_engine(
    model: Model,
    tokenizer: Tokenizer,
    *,
    kv_bytes: int | None = None,
    max_batch: int = MAX_BATCH,
    share_prefixes: bool = True,
) -> "Engine":
    """An engine over the model's shards, mapped and not read yet; an id that no token has is never generated."""
    from batchgen.engine.engine import Engine  # with the kernels, which many commands never need

    weights, absent_ids = model.load_weights(), tokenizer.absent_ids(model.config.n_vocab)
    if absent_ids:
        weights = replace(weights, absent_ids=np.array(absent_ids))
    return Engine(
        weights,
        model.config,
        eos_ids=tokenizer.special.end,
        kv_bytes=default_kv_bytes(model.config, model.precision) if kv_bytes is None else kv_bytes,
        max_batch=max_batch,
        share_prefixes=share_prefixes,
    )


def to_prompts(request: TokenizedRequest, tokenizer: Tokenizer) -> list[Prompt]:
    """The row's prompts, most often one, in the engine's form."""
    params = request.params
    bad_words = bad_word_ids(params.bad_words, tokenizer)
    firsts = range(0, len(request.prompts) * params.n, params.n)
    scored = None if params.prompt_logprobs is None else 1  # nothing is before the first token
    return [
        Prompt(
            request.row, ids, params, sample_seeds(params.seed, request.row, params.n, first), first, bad_words, scored
        )
        for first, (_, ids) in zip(firsts, request.prompts, strict=True)
    ]


# ---- rows


def unfinished_row(item: Rejected) -> OutputRow:
    """The row of a request that is not generated."""
    return OutputRow(
        row=item.row,
        sample=0,
        id=item.id,
        prompt=item.prompt,
        completion=None,
        prompt_tokens=item.prompt_tokens,
        completion_tokens=None,
        finish_reason=None,
        status=item.status,
        error=encodable(item.error),
        seed=None,
    )


def unread_row(item: Rejected, record: type[R]) -> R:
    """The same of a request that is not scored, or not embedded."""
    return record(
        row=item.row,
        id=item.id,
        prompt=item.prompt,
        status=item.status,
        error=encodable(item.error),
        prompt_tokens=item.prompt_tokens,
    )


def completed_row(
    request: TokenizedRequest, completion: Completion, tokenizer: Tokenizer, seed: int, run_params: SamplingParams
) -> OutputRow:
    """The row of one sample. run_params are the run's: the row names those of its own that differ."""
    params = request.params
    prompt_index = completion.sample // params.n
    prompt, prompt_token_ids = request.prompts[prompt_index]
    text, stop_reason = completed_text(completion.token_ids, params, tokenizer)
    prompt_logprobs, prompt_tops = completion.prompt_logprobs, completion.prompt_top_logprobs
    return OutputRow(
        row=request.row,
        sample=completion.sample,
        id=request.id,
        prompt=prompt,
        completion=prompt + text if params.echo else text,
        prompt_tokens=len(prompt_token_ids),
        completion_tokens=len(completion.token_ids),
        finish_reason=completion.finish_reason,
        status="ok",
        error=None,
        seed=None if params.greedy else seed,
        completion_token_ids=completion.token_ids,
        logprobs=completion.logprobs,
        top_logprobs=_with_texts(completion.top_logprobs, tokenizer) if params.logprobs else None,
        stop_reason=stop_reason,
        prompt_index=prompt_index,
        parameters=own_parameters(params, run_params, prompt_token_ids if request.given_as_ids else None),
        prompt_token_ids=None if prompt_logprobs is None else prompt_token_ids,
        prompt_logprobs=None if prompt_logprobs is None else (None, *prompt_logprobs),
        prompt_top_logprobs=(None, *_with_texts(prompt_tops, tokenizer)) if params.prompt_logprobs else None,
    )


def own_parameters(
    params: SamplingParams, run_params: SamplingParams, prompt_token_ids: Sequence[int] | None = None
) -> str | None:
    """JSON of the row's parameters that differ from the run's, and of prompt_token_ids; None if there are none."""
    own = {name: value for name, value in params.as_dict().items() if value != getattr(run_params, name)}
    if prompt_token_ids is not None:
        own["prompt_token_ids"] = prompt_token_ids
    return json.dumps(own, sort_keys=True) if own else None


def _with_texts(tops: Tops | None, tokenizer: Tokenizer) -> tuple[tuple[tuple[int, str, float], ...], ...]:
    """(token id, log-probability) -> (token id, its text, log-probability)"""
    return tuple(tuple((token, tokenizer.token_text(token), logprob) for token, logprob in top) for top in tops or ())


# ---- a chunk


def begin_chunk(
    chunk: Chunk, make_prompts: Callable[[TokenizedRequest], list[Prompt]], engine: "Engine", marker: Marker
) -> tuple[dict[int, TokenizedRequest], list[Prompt]]:
    """The requests of a chunk by row, and the prompts that are made of them; its rejected rows are done."""
    requests = {item.row: item for item in chunk.items if isinstance(item, TokenizedRequest)}
    marker.add(len(chunk.items) - len(requests), 0)
    marker.begin(len(chunk.items), engine.work)
    prompts: list[Prompt] = []
    for request in requests.values():
        try:
            own = make_prompts(request)
            check_prompts(own, engine.config)
        except Exception:
            marker.set_in_flight([request.row])  # to be blamed
            raise
        prompts += own
    return requests, prompts


def complete_chunk(
    chunk: Chunk, params: SamplingParams, engine: "Engine", tokenizer: Tokenizer, marker: Marker | None = None
) -> list[OutputRow]:
    """The chunk's output rows in order: every sample of every request, and a row for each rejected one."""
    marker = marker or Marker(np.zeros(1, RECORD))
    rows = {(item.row, 0): unfinished_row(item) for item in chunk.items if isinstance(item, Rejected)}
    requests, prompts = begin_chunk(chunk, lambda request: to_prompts(request, tokenizer), engine, marker)
    seeds = {(p.row, sample): seed for p in prompts for sample, seed in enumerate(p.seeds, p.first_sample)}
    stop_strings = StopStrings(tokenizer) if any(prompt.params.stop for prompt in prompts) else None
    for completion in engine.generate(prompts, marker.on_step, stop_strings):
        marker.set_in_flight([completion.row])
        key = completion.row, completion.sample
        rows[key] = completed_row(requests[completion.row], completion, tokenizer, seeds[key], params)
        marker.add(int(completion.sample == 0), rows[key].prompt_tokens or 0)
    marker.finish(Phase.WRITING)
    return [rows[key] for key in sorted(rows)]
