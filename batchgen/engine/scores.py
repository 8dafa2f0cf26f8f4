"""The scores of tokens that are given: from the states that the forward pass leaves at the positions before them."""

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from typing import NamedTuple

import numpy as np

from batchgen.engine.sampler import Scores, score_tokens
from batchgen.engine.scheduler import Piece
from batchgen.gpt2.forward import Forward
from batchgen.gpt2.params import Array

# Rows of logits at a time, 51 MB of them for 124M: the product with lm_head reads its weights once for so many. With 96
# rows two float32 workers, which wait for the same memory, are 13 % slower; with 512 they are 3 % faster.
ROWS = 256


class Scored(NamedTuple):
    """A token to score."""

    row: int  # of the states: that of the position before it
    token: int
    n_top: int  # how many of the likeliest tokens are wanted beside it
    scores: Scores  # where its own go, in order


def _scored(pieces: Seq[Piece], row: int) -> Iterator[Scored]:
    """What the pieces' sequences want of their prompts, and of the tokens that they are begun with.

    The states of the first piece are from `row` on.
    """
    for piece in pieces:
        start = piece.end - piece.prefill.n_logits
        for one in (sequence for sequence in piece.sequences if sequence.scored):
            token_ids, n_prompt = (*one.prompt.token_ids, *one.token_ids), len(one.prompt.token_ids)
            of_prompt = (
                one.params.prompt_logprobs or 0,
                Scores(one.prompt_logprobs, one.prompt_ranks, one.prompt_top_logprobs),
            )
            of_begun = one.params.logprobs or 0, Scores(one.logprobs, [], one.top_logprobs)
            for at in range(max(one.scored.start, start + 1), min(one.scored.stop, piece.end + 1)):
                yield Scored(row + at - 1 - start, token_ids[at], *(of_prompt if at < n_prompt else of_begun))
        row += piece.prefill.n_logits


def score_prompts(forward: Forward, states: Array, pieces: Seq[Piece], row: int) -> None:
    """Append to the sequences the scores of the tokens that follow the pieces' states, which are from `row` on.

    Never more than ROWS rows of logits are in memory.
    """
    scored = sorted(_scored(pieces, row), key=lambda one: one.row)
    tokens = np.array([one.token for one in scored], np.int64)
    wanted, index = np.unique(np.array([one.row for one in scored], np.int64), return_inverse=True)
    for first in range(0, len(wanted), ROWS):
        logits = forward.head(states[wanted[first : first + ROWS]])  # [up to ROWS, n_vocab]
        begin, end = np.searchsorted(index, (first, first + ROWS))
        n_tops = [one.n_top for one in scored[begin:end]]
        found = score_tokens(logits, index[begin:end] - first, tokens[begin:end], n_tops)
        for one, logprob, rank, top in zip(scored[begin:end], *found, strict=True):
            one.scores.logprobs.append(logprob)
            one.scores.ranks.append(rank)
            one.scores.tops.append(top)
