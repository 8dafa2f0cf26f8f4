"""Chunks into scores: each passage of a row is read once, and the log-probabilities of its tokens are added up."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from batchgen.engine.sequence import Completion, Prompt
from batchgen.job import FirstToken, ScoreOptions
from batchgen.progress import perplexity
from batchgen.text.tokenizer import Tokenizer
from batchgen.types import Chunk, Floats, Ids, Kind, Rejected, ScoreRow, TokenizedRequest
from batchgen.workers.complete import begin_chunk, unfinished_row, words_of_odd
from batchgen.workers.marker import Marker, Phase

if TYPE_CHECKING:
    from batchgen.engine.engine import Engine


def to_prompts(request: TokenizedRequest) -> list[Prompt]:
    """The row's passages in the engine's form; nothing is generated, so the seed is nothing's."""
    return [
        Prompt(request.row, passage.token_ids, request.params, (0,), number, scored=passage.scored)
        for number, passage in enumerate(request.passages)
    ]


# ---- rows


class Read(NamedTuple):
    """A passage that is read: its scored tokens."""

    token_ids: Ids
    logprobs: Floats
    ranks: Ids


def _with_targets(row: ScoreRow, targets: tuple[str, ...], kind: Kind) -> ScoreRow:
    """The row with what the input gives to score after the prompt."""
    if kind == "completion" and targets:
        return replace(row, completion=targets[0])
    return replace(row, choices=targets or None)


def unscored_row(item: Rejected, kind: Kind) -> ScoreRow:
    """The row of a request that is not scored."""
    return _with_targets(unfinished_row(item, ScoreRow), item.targets, kind)


def _count_bytes(request: TokenizedRequest, tokenizer: Tokenizer, first_token: FirstToken) -> int:
    """The bytes of a text that are scored: its own, and not those of a space that the tokenizer puts before it."""
    n_bytes = len(request.prompt.encode())
    if first_token == "endoftext":
        return n_bytes
    first = tokenizer.decode_bytes(request.prompt_token_ids[-1:])
    return n_bytes - len(first if request.prompt.startswith(" ") else first.removeprefix(b" "))


def score_text(row: ScoreRow, read: Sequence[Read], n_bytes: int) -> ScoreRow:
    """The row with the scores of a text alone, of one passage or several."""
    ids, logprobs, ranks = (tuple(chain(*parts)) for parts in zip(*read, strict=True))
    nats = -math.fsum(logprobs)
    return replace(
        row,
        tokens=len(ids),
        bytes=n_bytes,
        nats=nats,
        bits_per_byte=nats / math.log(2) / n_bytes if n_bytes else None,
        perplexity=perplexity(nats, len(ids)),
        token_ids=ids,
        token_logprobs=logprobs,
        token_ranks=ranks,
    )


def score_completion(row: ScoreRow, one: Read) -> ScoreRow:
    """The row with the scores of its completion."""
    return replace(
        row,
        tokens=len(one.token_ids),
        logprob=math.fsum(one.logprobs),
        greedy=set(one.ranks) == {1},
        token_ids=one.token_ids,
        token_logprobs=one.logprobs,
        token_ranks=one.ranks,
    )


def score_choices(row: ScoreRow, read: Sequence[Read], choices: Sequence[str], answer: int | None) -> ScoreRow:
    """The row with the scores of its choices; the best one is the first of equal ones."""
    logprobs = tuple(math.fsum(one.logprobs) for one in read)
    by_token = tuple(logprob / len(one.token_ids) for logprob, one in zip(logprobs, read, strict=True))
    by_byte = tuple(logprob / len(text.encode()) for logprob, text in zip(logprobs, choices, strict=True))
    return replace(
        row,
        choice_tokens=tuple(len(one.token_ids) for one in read),
        logprobs=logprobs,
        logprobs_by_token=by_token,
        logprobs_by_byte=by_byte,
        best=logprobs.index(max(logprobs)),
        best_by_token=by_token.index(max(by_token)),
        best_by_byte=by_byte.index(max(by_byte)),
        answer=answer,
        token_ids=tuple(one.token_ids for one in read),
        token_logprobs=tuple(one.logprobs for one in read),
        token_ranks=tuple(one.ranks for one in read),
    )


def scored_row(
    request: TokenizedRequest, found: Sequence[Completion], tokenizer: Tokenizer, task: ScoreOptions
) -> ScoreRow:
    """The row of a request, of the completions of its passages in order; a failed one if the model gave no numbers."""
    read = [
        Read(passage.scored_ids, one.prompt_logprobs or (), one.prompt_ranks or ())
        for passage, one in zip(request.passages, found, strict=True)
    ]
    odd = next((logprob for one in read for logprob in one.logprobs if not math.isfinite(logprob)), None)
    if odd is not None:
        return unscored_row(request.failed(words_of_odd(odd)), task.kind)
    n_read = len(request.prompt_token_ids)
    row = ScoreRow(row=request.row, id=request.id, prompt=request.prompt, status="ok", prompt_tokens=n_read)
    if task.kind == "text":
        return score_text(row, read, _count_bytes(request, tokenizer, task.first_token))
    row = _with_targets(row, request.targets, task.kind)
    if task.kind == "completion":
        return score_completion(row, read[0])
    return score_choices(row, read, request.targets, request.answer)


# ---- a chunk


def score_chunk(
    chunk: Chunk, task: ScoreOptions, engine: "Engine", tokenizer: Tokenizer, marker: Marker
) -> list[ScoreRow]:
    """The chunk's rows in order."""
    requests, prompts = begin_chunk(chunk, to_prompts, engine, marker)
    rows = {item.row: unscored_row(item, task.kind) for item in chunk.items if isinstance(item, Rejected)}
    read: dict[int, dict[int, Completion]] = {row: {} for row in requests}
    for one in engine.generate(prompts, marker.on_step):
        marker.set_in_flight([one.row])
        request, done = requests[one.row], read[one.row]
        done[one.sample] = one
        marker.add_scored(len(one.prompt_logprobs or ()))
        if len(done) == len(request.passages):
            rows[one.row] = scored_row(request, [done[number] for number in sorted(done)], tokenizer, task)
            del read[one.row]
            marker.add(1, len(request.prompt_token_ids))
    marker.finish(Phase.WRITING)
    return [rows[row] for row in sorted(rows)]


def scored_tokens(row: ScoreRow) -> int:
    return sum(row.choice_tokens or ()) if row.tokens is None else row.tokens


def count_scores(rows: Sequence[ScoreRow]) -> dict[str, int]:
    """The totals of a chunk's rows as whole numbers; see TOTALS."""
    answered = [row for row in rows if row.answer is not None and row.best is not None]
    return {
        "nanonats": sum(round(1e9 * (row.nats if row.nats is not None else -(row.logprob or 0.0))) for row in rows),
        "scored_bytes": sum(row.bytes or 0 for row in rows),
        "greedy": sum(row.greedy is True for row in rows),
        "answered": len(answered),
        "right": sum(row.best == row.answer for row in answered),
        "right_by_token": sum(row.best_by_token == row.answer for row in answered),
        "right_by_byte": sum(row.best_by_byte == row.answer for row in answered),
    }
