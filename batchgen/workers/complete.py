"""Chunks into rows: an engine over a model's shards, and what it makes of a chunk's requests."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import numpy as np

from batchgen.engine.limits import MAX_BATCH, check_prompts
from batchgen.engine.sequence import Completion, Prompt, is_loop, make_breakers, sample_seeds
from batchgen.errors import UsageError
from batchgen.input.parameters import own_parameters
from batchgen.models.model import Model
from batchgen.options import say
from batchgen.planning import default_kv_bytes
from batchgen.text.guided import compile_guide, pattern_of
from batchgen.text.guided import find_failure as find_pattern_failure
from batchgen.text.healing import HealingGuide, beginnings_of
from batchgen.text.stopping import StopStrings, bad_word_ids, breaker_ids, completed_text, has_stop
from batchgen.text.tokenizer import Tokenizer
from batchgen.types import (
    Begun,
    Chunk,
    EmbeddingRow,
    Guide,
    Ids,
    OutputRow,
    Rejected,
    SamplingParams,
    ScoreRow,
    TokenizedRequest,
    encodable,
    is_in,
)
from batchgen.workers.marker import RECORD, Marker, Phase

if TYPE_CHECKING:
    from batchgen.engine.engine import Engine

R = TypeVar("R", OutputRow, ScoreRow, EmbeddingRow)

NGRAM = 4  # tokens
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
    """The row's prompts, most often one, in the engine's form; none of those whose samples are all done."""
    params, begun = asked_params(request), request.begun
    bad_words = bad_word_ids(params.bad_words, tokenizer)
    firsts = range(0, len(request.prompts) * params.n, params.n)
    breakers = make_breakers(breaker_ids(params.dry_sequence_breakers, tokenizer) if params.dry_multiplier else ())
    scored = None if params.prompt_logprobs is None else 1  # nothing is before the first token
    prompts = []
    for first, (_, ids), again in zip(firsts, request.prompts, request.all_again, strict=True):
        if (own := samples_of(begun, first, params.n)) != ():
            seeds = sample_seeds(params.seed, request.row, params.n, first, request.seed_key)
            prompt = Prompt(request.row, ids, params, seeds, first, bad_words, scored, own, breakers=breakers)
            prompts.append(_with_guide(prompt, again, tokenizer))
            for one in own or ():
                _check_begun(prompts[-1], one, tokenizer)
    return prompts


def _with_guide(prompt: Prompt, again: Ids, tokenizer: Tokenizer) -> Prompt:
    """The prompt, with what makes its guides: for its pattern, and for tokens that are drawn again."""
    given = tokenizer.decode_bytes(again)
    guide: Guide | None = compile_guide(prompt.params, tokenizer, given)
    if again:
        guide = HealingGuide(beginnings_of(tokenizer), again, guide)
    return replace(prompt, make_guide=guide.copy if guide else None, guided_by=again, given=given)


def asked_params(request: TokenizedRequest) -> SamplingParams:
    """The row's parameters, with log-probabilities if their mean is wanted."""
    params = request.params
    return replace(params, logprobs=0) if "mean_logprob" in request.measured and params.logprobs is None else params


def samples_of(begun: Sequence[Begun] | None, first: int, n: int) -> tuple[Begun, ...] | None:
    """Of the samples that a row asks for, those of the prompt whose n samples are from `first` on; None: all."""
    return None if begun is None else tuple(one for one in begun if first <= one.sample < first + n)


def _check_begun(prompt: Prompt, one: Begun, tokenizer: Tokenizer) -> None:
    """Raise UsageError for first tokens that a rule of the row has ended, or bans: those of an edited output."""
    params, ids = prompt.params, [*one.token_ids]
    ends = {*params.stop_token_ids, *(() if params.ignore_eos else tokenizer.special.end)}
    is_over = has_stop(ids, params, tokenizer, len(prompt.given))
    if prompt.make_guide is None:
        is_over |= not ends.isdisjoint(ids)
    else:
        guide = prompt.make_guide()
        is_over |= any(
            not is_in(token, guide.allowed()) or (token in ends and not guide.is_given(token)) or guide.advance(token)
            for token in ids
        )
    if params.stop_loops:
        is_over |= any(is_loop(ids[:n]) for n in range(max(params.min_tokens, 1), len(ids) + 1))
    if is_over:
        what = f"its first {len(ids)} tokens, taken from an older output, end it already, so they were changed there"
        raise UsageError(f"row {prompt.row}, sample {one.sample}: {what}")


# ---- what is measured of a completion


def mean_logprob(logprobs: Sequence[float]) -> float | None:
    """The mean of log-probabilities (natural logarithms): of their exact sum, so that it depends on no order."""
    return math.fsum(logprobs) / len(logprobs) + 0.0 if logprobs else None  # -0.0 + 0.0 is 0.0


def repetition(token_ids: Sequence[int]) -> float | None:
    """The share of the 4-grams that occurred before: 1 - distinct / all, as Welleck et al. (2020).

    It is their seq-rep-4 (https://arxiv.org/abs/1908.04319). Fewer than 4 tokens have no 4-gram, and so no share.

    1 2 3 4 5 -> 0.0; 1 1 1 1 1 1 -> 2/3; 1 2 3 -> None
    """
    n = len(token_ids) - NGRAM + 1
    if n < 1:
        return None
    return (n - len(set(zip(*(token_ids[first : first + n] for first in range(NGRAM)), strict=True)))) / n


def words_of_odd(logprob: float) -> str:
    """Why a row fails to which the model gives this log-probability, which is no number or infinite."""
    what = f"the model gives a token the log-probability {logprob}, so its weights are damaged or overflow"
    return f"{what}; use another model, or {say('precision', 'float32')}"


def find_failure(request: TokenizedRequest, completion: Completion, tokenizer: Tokenizer) -> str | None:
    """Why a row fails with this completion."""
    for logprob in completion.logprobs or () if "mean_logprob" in request.measured else ():
        if not math.isfinite(logprob):
            return words_of_odd(logprob)
    if completion.finish_reason != "blocked":
        return None
    params, ids = request.params, completion.token_ids
    given = tokenizer.decode_bytes(request.all_again[completion.sample // params.n])
    reason = find_pattern_failure(params, tokenizer, ids, given)
    return reason and f"{pattern_of(params)} is too large to follow after {len(ids)} tokens ({reason}); make it simpler"


def find_short(requests: Mapping[int, TokenizedRequest], rows: Iterable[tuple[int, int]]) -> Iterator[tuple[int, str]]:
    """The rows whose searches found fewer completions than n, and why they fail; rows: (row, sample) of all found."""
    counts = Counter((row, sample // requests[row].params.n) for row, sample in rows if row in requests)
    for row, request in requests.items():
        for prompt in range(len(request.prompts)) if request.params.searches else ():
            p, n = request.params, counts[row, prompt]
            if n < p.n:
                what = f"beam search (num_beams {p.num_beams}) found {n} completions, and n is {p.n}"
                remedy = f"lower n to {n}" if n else "let more tokens or texts be generated"
                yield row, f"{what}: nothing else may be generated; {remedy}"
                break


# ---- rows


def unfinished_row(item: Rejected, record: type[R]) -> R:
    """The row of a request that is not generated, scored or embedded."""
    error, tokens = encodable(item.error), item.prompt_tokens
    return record(
        row=item.row, sample=0, id=item.id, prompt=item.prompt, status=item.status, error=error, prompt_tokens=tokens
    )


def completed_row(
    request: TokenizedRequest, completion: Completion, tokenizer: Tokenizer, seed: int, run_params: SamplingParams
) -> OutputRow:
    """The row of one sample. run_params are the run's: the row names those of its own that differ."""
    params = request.params
    prompt_index = completion.sample // params.n
    prompt, prompt_token_ids = request.prompts[prompt_index]
    n_given = len(tokenizer.decode_bytes(request.all_again[prompt_index]))
    text, stop_reason = completed_text(completion.token_ids, params, tokenizer, n_given)
    measured = request.measured
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
        seed=None if params.greedy else seed,
        completion_token_ids=completion.token_ids,
        logprobs=None if params.logprobs is None else completion.logprobs,
        top_logprobs=_with_texts(completion.top_logprobs, tokenizer) if params.logprobs else None,
        stop_reason=stop_reason,
        prompt_index=prompt_index,
        parameters=own_parameters(params, run_params, prompt_token_ids if request.given_as_ids else None),
        prompt_token_ids=None if prompt_logprobs is None else prompt_token_ids,
        prompt_logprobs=None if prompt_logprobs is None else (None, *prompt_logprobs),
        prompt_top_logprobs=(None, *_with_texts(prompt_tops, tokenizer)) if params.prompt_logprobs else None,
        beam_score=completion.beam_score,
        mean_logprob=mean_logprob(completion.logprobs or ()) if "mean_logprob" in measured else None,
        repetition=repetition(completion.token_ids) if "repetition" in measured else None,
    )


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
    """The chunk's output rows in order: every sample that its requests ask for, and a row for each rejected one."""
    marker = marker or Marker(np.zeros(1, RECORD))
    rows = {(item.row, 0): unfinished_row(item, OutputRow) for item in chunk.items if isinstance(item, Rejected)}
    failed_rows: dict[int, OutputRow] = {}
    requests, prompts = begin_chunk(chunk, lambda request: to_prompts(request, tokenizer), engine, marker)
    seeds = {(p.row, sample): seed for p in prompts for sample, seed in enumerate(p.seeds, p.first_sample)}
    stop_strings = StopStrings(tokenizer) if any(prompt.params.stop for prompt in prompts) else None
    for completion in engine.generate(prompts, marker.on_step, stop_strings):
        marker.set_in_flight([completion.row])
        key, request = (completion.row, completion.sample), requests[completion.row]
        rows[key] = completed_row(request, completion, tokenizer, seeds[key], params)
        if reason := find_failure(request, completion, tokenizer):
            failed_rows[request.row] = unfinished_row(request.failed(reason), OutputRow)
        marker.add(int(completion.sample == request.first_sample), rows[key].prompt_tokens or 0)
    marker.finish(Phase.WRITING)
    for row, words in find_short(requests, rows):
        failed_rows[row] = unfinished_row(requests[row].failed(words), OutputRow)
    rows = {key: row for key, row in rows.items() if row.row not in failed_rows}  # a row fails as a whole
    rows |= {(number, 0): row for number, row in failed_rows.items()}
    return [rows[key] for key in sorted(rows)]
