"""From logits to tokens: the sequences of a step one after another.

The order: logit_bias, penalties, bad_words, min_tokens, temperature, top_k, top_p, min_p, draw. It is that of
transformers; vLLM's differs in one place, min_p before top_k, which matters only with top_p. A token depends on its own
row of logits and its own random number alone, and is the same on every processor: what adds up or needs exp and log is
in draw.py, and NumPy only compares, sorts and does single operations. A logit of nan counts as the lowest finite
number; -inf marks the ids that may not be generated.
"""

from collections.abc import Sequence as Seq
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from batchgen.engine.draw import LOWEST, add_up, count_kept, draw, find, log_probabilities, score, weigh
from batchgen.engine.sequence import Sequence
from batchgen.gpt2.params import Array

Ids = npt.NDArray[np.int64]

_COLUMNS = 1024  # at least; find_largest looks at the largest logit of each column
_NUCLEUS = 128  # candidates of the first attempt, at least, if only top_p limits them


class _Buffers(NamedTuple):
    """Memory for one row after another, [n_vocab] each; fresh memory takes longer than the work in it."""

    keys: Ids
    weights: Array


def penalise(row: Array, sequence: Sequence, eos_ids: Seq[int]) -> None:
    """logit_bias, penalties, bad_words and min_tokens on one row [n_vocab], in place.

    repetition_penalty (Keskar et al., 2019) and bad_words (transformers) count prompt and generated tokens;
    presence_penalty and frequency_penalty (OpenAI) count generated tokens only.
    """
    p = sequence.params
    for token, bias in p.logit_bias:
        row[token] += bias
    if p.repetition_penalty != 1.0:
        seen = np.array([*sequence.prompt.token_ids, *sequence.token_ids], np.intp)
        x = row[seen]
        row[seen] = np.where(x > 0, x / p.repetition_penalty, x * p.repetition_penalty)
    if (p.presence_penalty or p.frequency_penalty) and sequence.token_ids:
        generated, count = np.unique(np.array(sequence.token_ids, np.intp), return_counts=True)
        row[generated] -= (p.presence_penalty + p.frequency_penalty * count).astype(np.float32)
    for word in sequence.prompt.bad_words:
        if sequence.ends_with(word[:-1]):
            row[word[-1]] = -np.inf
    if len(sequence.token_ids) < p.min_tokens:
        row[list(p.stop_token_ids)] = -np.inf
        if not p.ignore_eos:
            row[list(eos_ids)] = -np.inf


def most_likely(row: Array) -> int:
    """The first of the largest logits. A nan becomes the lowest finite number."""
    token = int(row.argmax())  # a nan, if there is one
    if row[token] != row[token]:
        row[np.isnan(row)] = LOWEST
        token = int(row.argmax())
    return token


def _bound(row: Array, k: int) -> np.float32:
    """A value that at least k logits reach, and not many more: the k-th largest of the columns' largest logits."""
    width = max(_COLUMNS, 2 * k)
    height = row.size // width
    if height < 2:
        return np.float32(-np.inf)
    largest = row[: height * width].reshape(height, width).max(axis=0)
    largest.partition(width - k)
    return np.float32(largest[width - k])


def find_largest(row: Array, k: int, keys: Ids) -> Ids:
    """The ids of the k largest logits and of all that equal the k-th: largest first, equal ones in order of ids.

    keys [n_vocab] is overwritten, and holds the result.
    """
    keys = keys[: find(row, _bound(row, k), keys)]
    keys.sort()
    ids: Ids = np.bitwise_and(keys, 0xFFFFFFFF, out=keys)
    n = k + int(np.count_nonzero(row[ids[k:]] == row[ids[k - 1 : k]]))
    return ids[:n]


def _weights(logits: Array, largest: np.float32, temperature: float, out: Array) -> Array:
    """[n] logits -> [n] weights, in `out`, which may be longer."""
    weights = out[: logits.size]
    weigh(logits, largest, 1 / temperature, weights)
    return weights


def _needed(weights: Array, top_p: float) -> float:
    """The sum at which top_p has enough tokens; infinite if it is off, so that rounding leaves out no token."""
    return top_p * float(add_up(weights)) if top_p < 1.0 else np.inf


def _draw_top_k(row: Array, largest: np.float32, sequence: Sequence, buffers: _Buffers) -> int:
    """Draw after top_k, then top_p, then min_p."""
    p = sequence.params
    ids = find_largest(row, p.top_k, buffers.keys)
    weights = _weights(row[ids], largest, p.temperature, buffers.weights)
    kept = count_kept(weights, _needed(weights, p.top_p), p.min_p)
    return int(ids[draw(weights[:kept], sequence.next_random())])


def _draw_nucleus(row: Array, largest: np.float32, sequence: Sequence, buffers: _Buffers) -> int:
    """Draw after top_p, then min_p, from the most likely tokens: from more of them until one is not kept."""
    p = sequence.params
    everything = _weights(row, largest, p.temperature, buffers.weights)
    needed = _needed(everything, p.top_p)
    k = int(np.count_nonzero(everything >= p.min_p)) + 1
    if p.top_p < 1.0:  # no weight is above 1
        k = min(k, max(_NUCLEUS, int(2 * needed)))
    while True:
        ids = find_largest(row, k, buffers.keys)
        weights = everything[ids]
        kept = count_kept(weights, needed, p.min_p)
        if kept < len(ids) or len(ids) == row.size:
            return int(ids[draw(weights[:kept], sequence.next_random())])
        k = 16 * k if 64 * k < row.size else row.size


def _choose(row: Array, sequence: Sequence, buffers: _Buffers) -> int:
    """The token from a row [n_vocab] of logits after penalties: the most likely or a drawn one."""
    token, p = most_likely(row), sequence.params
    if p.greedy:
        return token
    if 0 < p.top_k < row.size:
        return _draw_top_k(row, row[token], sequence, buffers)
    if p.top_p < 1.0 or p.min_p > 0.0:
        return _draw_nucleus(row, row[token], sequence, buffers)
    return int(draw(_weights(row, row[token], p.temperature, buffers.weights), sequence.next_random()))


Top = tuple[tuple[int, float], ...]  # (token id, log-probability), best first


def _top(row: Array, n: int, largest: np.float32, total: float) -> Top:
    """The n highest log-probabilities of a row [n_vocab]."""
    if not n:
        return ()
    ids = find_largest(row, n, np.empty(row.size, np.int64))[:n]
    values = np.empty(len(ids), np.float32)
    log_probabilities(row[ids], largest, total, values)
    pairs = zip(ids.tolist(), values.tolist(), strict=True)
    return tuple(pair for pair in pairs if pair[1] > -np.inf)  # -inf: an id that no token has


class Scores(NamedTuple):
    """Of some tokens, each under a row of the model's own logits."""

    logprobs: list[float]
    ranks: list[int]  # 1: the likeliest
    tops: list[Top]


def score_tokens(logits: Array, rows: Ids, tokens: Ids, n_tops: Seq[int]) -> Scores:
    """The scores of tokens [n], each under its row of logits [n_row, n_vocab]; rows are in order."""
    n = len(rows)
    logprobs, ranks = np.empty(n, np.float32), np.empty(n, np.int64)
    largest, totals = np.empty(n, np.float32), np.empty(n)
    score(logits, rows, tokens, logprobs, ranks, largest, totals)
    each = zip(rows, n_tops, largest, totals, strict=True)
    return Scores(
        logprobs.tolist(), ranks.tolist(), [_top(logits[row], k, high, total) for row, k, high, total in each]
    )


def _sample_one(row: Array, sequence: Sequence, eos_ids: Seq[int], buffers: _Buffers) -> int:
    model_row = None if sequence.params.logprobs is None else row.copy()
    penalise(row, sequence, eos_ids)
    token = _choose(row, sequence, buffers)
    if model_row is not None:
        ids = np.array([0, token])
        found = score_tokens(model_row[None], ids[:1], ids[1:], [sequence.params.logprobs or 0])
        sequence.logprobs += found.logprobs
        sequence.top_logprobs += found.tops
    return token


def sample(logits: Array, sequences: Seq[Sequence], eos_ids: Seq[int]) -> list[int]:
    """The next token of each sequence from its row of logits [n_row, n_vocab], which is overwritten."""
    buffers = _Buffers(np.empty(logits.shape[1], np.int64), np.empty(logits.shape[1], np.float32))
    with np.errstate(over="ignore"):
        return [_sample_one(row, one, eos_ids, buffers) for row, one in zip(logits, sequences, strict=True)]
