"""The scores of a prompt's tokens, from the states that the forward pass leaves at the positions before them."""

from collections.abc import Iterator
from collections.abc import Sequence as Seq

import numpy as np

from batchgen.engine.sampler import Top, score_tokens
from batchgen.engine.scheduler import Piece
from batchgen.engine.sequence import Sequence
from batchgen.gpt2.forward import Forward
from batchgen.gpt2.params import Array

# Rows of logits at a time, 51 MB of them for 124M: the product with lm_head reads its weights once for so many. With 96
# rows two float32 workers, which wait for the same memory, are 13 % slower; with 512 they are 3 % faster.
ROWS = 256

Scored = tuple[Sequence, range, tuple[int, ...]]  # rows of states, and the token to score after each


def _scored(pieces: Seq[Piece], row: int) -> Iterator[Scored]:
    """What each sequence wants of each piece; the states of the first piece are from `row` on."""
    for piece in pieces:
        start = piece.end - piece.prefill.n_logits
        for sequence in piece.sequences:
            token_ids, scored = sequence.prompt.token_ids, sequence.prompt.scored
            first = max((scored or len(token_ids)) - 1, start)
            end = max(min(piece.end, len(token_ids) - 1), first)
            if first < end:
                yield sequence, range(row + first - start, row + end - start), token_ids[first + 1 : end + 1]
        row += piece.prefill.n_logits


def score_prompts(forward: Forward, states: Array, pieces: Seq[Piece], row: int) -> None:
    """Append to the sequences the scores of the tokens that follow the pieces' states, which are from `row` on.

    Never more than ROWS rows of logits are in memory.
    """
    scored = list(_scored(pieces, row))
    rows = np.array([one for _, of_sequence, _ in scored for one in of_sequence], np.int64)
    tokens = np.array([token for _, _, of_sequence in scored for token in of_sequence], np.int64)
    n_tops = np.array([s.params.prompt_logprobs or 0 for s, of_sequence, _ in scored for _ in of_sequence], np.int64)
    order = np.argsort(rows, kind="stable")
    wanted, index = np.unique(rows[order], return_inverse=True)  # [n_wanted], [n_pair]
    found: list[tuple[int, float, int, Top]] = []
    for first in range(0, len(wanted), ROWS):
        logits = forward.head(states[wanted[first : first + ROWS]])  # [up to ROWS, n_vocab]
        pairs = slice(*np.searchsorted(index, (first, first + ROWS)))
        of_slice = order[pairs]
        scores = score_tokens(logits, index[pairs] - first, tokens[of_slice], n_tops[of_slice].tolist())
        found += zip(of_slice.tolist(), *scores, strict=True)
    found.sort(key=lambda one: one[0])
    at = 0
    for sequence, of_sequence, _ in scored:
        _, logprobs, ranks, tops = zip(*found[at : at + len(of_sequence)], strict=True)
        sequence.prompt_logprobs += logprobs
        sequence.prompt_ranks += ranks
        sequence.prompt_top_logprobs += tops
        at += len(of_sequence)
