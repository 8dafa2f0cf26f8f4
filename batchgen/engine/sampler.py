"""From logits to tokens: the sequences of a step one after another.

The order: logit_bias, penalties, no_repeat_ngram_size, DRY, bad_words, allowed_token_ids, the guide, min_tokens
(penalties.py; whatever bans tokens may be anywhere among them), temperature, top_n_sigma, top_k, typical_p, top_p,
min_p, XTC, draw. Up to min_tokens it is that of transformers, and DRY's place is llama.cpp's, after the penalties; the
rest is llama.cpp's, but for the temperature, which is last there. transformers has typical_p after min_p; vLLM has
min_p before top_k, which matters only with top_p. A token depends on its own row of logits and its own random numbers
alone, and is the same on every processor: what adds up or needs exp and log is in draw.py and cuts.py, and NumPy only
compares, sorts and does single operations. A logit of nan counts as the lowest finite number; -inf marks the ids that
may not be generated, and those that were cut out.
"""

from collections.abc import Sequence as Seq
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from batchgen.engine.cuts import cut_atypical, cut_below_sigmas, cut_top
from batchgen.engine.draw import LANES, LOWEST, add_up, count_kept, draw, find, log_probabilities, score, weigh
from batchgen.engine.penalties import penalise
from batchgen.engine.sequence import Sequence
from batchgen.gpt2.params import Array
from batchgen.types import SamplingParams

Ids = npt.NDArray[np.int64]

NO_TOKEN = -1  # instead of one, if the parameters allow none

_COLUMNS = 1024  # at least; find_largest looks at the largest logit of each column
_NUCLEUS = 128  # candidates of the first attempt, at least, if only top_p limits them


class Buffers(NamedTuple):
    """Memory for one row after another; fresh memory takes longer than the work in it."""

    keys: Ids  # [n_vocab]
    weights: Array  # [n_vocab]
    pairs: Array  # [2, at least n_vocab], in the same memory as the keys


def make_buffers(n_vocab: int) -> Buffers:
    memory = np.empty(n_vocab + LANES, np.int64)
    return Buffers(memory[:n_vocab], np.empty(n_vocab, np.float32), memory.view(np.float32).reshape(2, -1))


def most_likely(row: Array) -> int:
    """The first of the largest logits. A nan becomes the lowest finite number."""
    token = int(row.argmax())  # a nan, if there is one
    if row[token] != row[token]:
        row[np.isnan(row)] = LOWEST
        token = int(row.argmax())
    return token


def _bound(row: Array, k: int) -> np.float32:
    """A value that at least k logits reach, and not many more: the k-th largest of the columns' largest logits.

    At least LOWEST, if any logit reaches that: -inf is no candidate.
    """
    width = max(_COLUMNS, 2 * k)
    height = row.size // width
    if height < 2:
        return LOWEST if row.max() >= LOWEST else np.float32(-np.inf)
    largest = row[: height * width].reshape(height, width).max(axis=0)
    largest.partition(width - k)
    bound = np.float32(largest[width - k])
    return bound if bound >= LOWEST or row.max() < LOWEST else LOWEST


def find_largest(row: Array, k: int, keys: Ids) -> Ids:
    """The ids of the k largest logits and of all that equal the k-th: largest first, equal ones in order of ids.

    Those of -inf are left out, unless all are. keys [n_vocab] is overwritten, and holds the result.
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


class Candidates(NamedTuple):
    """The tokens that may be drawn."""

    ids: Ids | None  # [n], most likely first; None: all tokens, in order of their ids
    weights: Array  # [n], 0 for a token that was cut out


def _limit_to_top_k(row: Array, largest: np.float32, p: SamplingParams, buffers: Buffers) -> Candidates:
    """After top_k, then typical_p, top_p, min_p."""
    ids = find_largest(row, p.top_k, buffers.keys)
    logits = row[ids]
    weights = _weights(logits, largest, p.temperature, buffers.weights)
    if p.typical_p < 1.0:
        ids = ids.copy()  # the pairs are in the memory of the keys
        cut_atypical(logits, weights, largest, 1 / p.temperature, p.typical_p, buffers.pairs)
        ids, weights = ids[weights > 0.0], weights[weights > 0.0]
    kept = count_kept(weights, _needed(weights, p.top_p), p.min_p * float(weights[0]))
    return Candidates(ids[:kept], weights[:kept])


def _limit_to_nucleus(row: Array, everything: Array, p: SamplingParams, keys: Ids) -> Candidates:
    """After top_p, then min_p: the most likely tokens, more of them until one is not kept; everything: [n_vocab]."""
    if p.typical_p < 1.0:
        row[everything == 0.0] = -np.inf
    needed, least = _needed(everything, p.top_p), p.min_p * float(everything.max())
    k = int(np.count_nonzero(everything >= least)) + 1
    if p.top_p < 1.0:  # no weight is above 1
        k = min(k, max(_NUCLEUS, int(2 * needed)))
    while True:
        ids = find_largest(row, k, keys)
        weights = everything[ids]
        kept = count_kept(weights, needed, least)
        if kept < len(ids) or len(ids) < k or k >= row.size:
            return Candidates(ids[:kept], weights[:kept])
        k = 16 * k if 64 * k < row.size else row.size


def _limit(row: Array, largest: np.float32, p: SamplingParams, buffers: Buffers) -> Candidates:
    """After top_n_sigma, top_k, typical_p, top_p, min_p."""
    if p.top_n_sigma:
        cut_below_sigmas(row, largest, p.top_n_sigma)
    if 0 < p.top_k < row.size:
        return _limit_to_top_k(row, largest, p, buffers)
    weights = _weights(row, largest, p.temperature, buffers.weights)
    if p.typical_p < 1.0:
        cut_atypical(row, weights, largest, 1 / p.temperature, p.typical_p, buffers.pairs)
    if p.top_p < 1.0 or p.min_p > 0.0:
        return _limit_to_nucleus(row, weights, p, buffers.keys)
    return Candidates(None, weights)


def find_candidates(row: Array, largest: np.float32, p: SamplingParams, is_cut: bool, buffers: Buffers) -> Candidates:
    """What may be drawn from a row [n_vocab] of logits after penalties, which is overwritten; is_cut: by XTC."""
    found = _limit(row, largest, p, buffers)
    if is_cut:
        cut_top(found.weights, p.xtc_threshold * float(add_up(found.weights)))
    return found


def _choose(row: Array, sequence: Sequence, buffers: Buffers) -> int:
    """The token from a row [n_vocab] of logits after penalties: the most likely or a drawn one, or NO_TOKEN."""
    token, p = most_likely(row), sequence.params
    if row[token] == -np.inf:
        return NO_TOKEN
    if p.greedy:
        return token
    ids, weights = find_candidates(row, row[token], p, sequence.next_is_cut(), buffers)
    drawn = int(draw(weights, sequence.next_random()))
    return drawn if ids is None else int(ids[drawn])


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


def _sample_one(row: Array, sequence: Sequence, eos_ids: Seq[int], buffers: Buffers) -> int:
    model_row = None if sequence.params.logprobs is None else row.copy()
    penalise(row, sequence, eos_ids)
    token = _choose(row, sequence, buffers)
    if model_row is not None and token != NO_TOKEN:
        ids = np.array([0, token])
        found = score_tokens(model_row[None], ids[:1], ids[1:], [sequence.params.logprobs or 0])
        sequence.logprobs += found.logprobs
        sequence.top_logprobs += found.tops
    return token


def sample(logits: Array, sequences: Seq[Sequence], eos_ids: Seq[int]) -> list[int]:
    """The next token of each sequence, or NO_TOKEN, from its row of logits [n_row, n_vocab], which is overwritten."""
    buffers = make_buffers(logits.shape[1])
    with np.errstate(over="ignore"):
        return [_sample_one(row, one, eos_ids, buffers) for row, one in zip(logits, sequences, strict=True)]
