"""From logits to tokens, for all sequences of a step together.

The order: logit_bias, penalties, bad_words, min_tokens, temperature, top_k, top_p, min_p, draw. It is that of
transformers; vLLM's differs in one place, min_p before top_k, which matters only with top_p. Nothing mixes rows: the
token of a row depends on its own logits and its own random number.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from batchgen.engine.sequence import Sequence
from batchgen.gpt2.params import Array

Ids = npt.NDArray[np.intp]
Doubles = npt.NDArray[np.float64]

_LANES = 64  # find_largest cuts the vocabulary into this many runs, _draw_from_all into runs of this many tokens
_NUCLEUS = 128  # candidates of the first attempt if only top_p or min_p limits them
_MAX_SORTED = 2**20  # logits that are sorted and summed together; each takes about 50 bytes meanwhile


@dataclass(slots=True)
class _Filters:
    """The sampling parameters and random numbers of some rows, [n_row] each."""

    temperature: Doubles
    top_k: Ids  # 0 is off
    top_p: Doubles
    min_p: Doubles
    random: Doubles

    def select(self, rows: npt.NDArray[np.bool_] | Ids) -> "_Filters":
        return _Filters(self.temperature[rows], self.top_k[rows], self.top_p[rows], self.min_p[rows], self.random[rows])


def log_softmax(logits: Array) -> Array:
    """[n_row, n_vocab] -> [n_row, n_vocab] log-probabilities."""
    shifted: Array = logits - logits.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def _has_short_cut(k: int, n_vocab: int) -> bool:
    """Whether `find_largest` finds the k largest without sorting all of them."""
    return n_vocab // _LANES >= 2 * k


def find_largest(logits: Array, k: int) -> tuple[Ids, Array]:
    """The k largest of each row and all that equal the k-th: ids and values [n_row, n], largest first.

    Equal values are in the order of their ids. Rows with fewer than n are filled up with -inf. To avoid sorting 50,257
    logits, n_vocab is cut into `_LANES` runs of equal width: their elementwise maximum has n_vocab / _LANES logits of
    the row, so that its k-th largest is a lower bound for the row's.
    """
    n_row, n_vocab = logits.shape
    if not _has_short_cut(k, n_vocab):
        order = np.argsort(-logits, axis=1, kind="stable")
        return order, np.take_along_axis(logits, order, axis=1)
    width = n_vocab // _LANES
    runs = logits[:, : width * _LANES].reshape(n_row, _LANES, width).max(axis=1)  # [n_row, width]
    bound = np.partition(runs, width - k, axis=1)[:, width - k]  # [n_row]
    rows, ids = np.divmod(np.flatnonzero(logits >= bound[:, None]), n_vocab)  # faster than np.nonzero in two dimensions
    counts = np.bincount(rows, minlength=n_row)
    column = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)  # 0, 1, ... within each row
    values = np.full((n_row, int(counts.max())), -np.inf, np.float32)
    values[rows, column] = logits[rows, ids]
    table = np.zeros(values.shape, np.intp)
    table[rows, column] = ids
    order = np.argsort(-values, axis=1, kind="stable")
    return np.take_along_axis(table, order, axis=1), np.take_along_axis(values, order, axis=1)


def penalise(logits: Array, sequence: Sequence, eos_ids: Seq[int]) -> None:
    """logit_bias, penalties, bad_words and min_tokens on one row [n_vocab], in place.

    repetition_penalty (Keskar et al., 2019) and bad_words (transformers) count prompt and generated tokens;
    presence_penalty and frequency_penalty (OpenAI) count generated tokens only.
    """
    p = sequence.params
    for token, bias in p.logit_bias:
        logits[token] += bias
    if p.repetition_penalty != 1.0:
        seen = np.unique(np.array([*sequence.prompt.token_ids, *sequence.token_ids], np.intp))
        x = logits[seen]
        logits[seen] = np.where(x > 0, x / p.repetition_penalty, x * p.repetition_penalty)
    if (p.presence_penalty or p.frequency_penalty) and sequence.token_ids:
        generated, count = np.unique(np.array(sequence.token_ids, np.intp), return_counts=True)
        logits[generated] -= (p.presence_penalty + p.frequency_penalty * count).astype(np.float32)
    for word in sequence.prompt.bad_words:
        if sequence.ends_with(word[:-1]):
            logits[word[-1]] = -np.inf
    if len(sequence.token_ids) < p.min_tokens:
        logits[list(p.stop_token_ids)] = -np.inf
        if not p.ignore_eos:
            logits[list(eos_ids)] = -np.inf


def _draw(weights: Doubles, random: Doubles) -> Ids:
    """Draw an index from each row of weights [n_row, n], whose zeros are at the end -> [n_row]."""
    cumulative = np.cumsum(weights, axis=1)
    index: Ids = (cumulative <= (random * cumulative[:, -1])[:, None]).sum(axis=1)
    last = np.count_nonzero(weights, axis=1) - 1
    np.minimum(index, last, out=index)
    return index


def _draw_from_all(logits: Array, temperature: Doubles, random: Doubles) -> Ids:
    """Draw from the whole softmax [n_row, n_vocab] -> [n_row]: first a run of `_LANES` tokens, then a token in it."""
    n_row, n_vocab = logits.shape
    weights = np.zeros((n_row, -(-n_vocab // _LANES) * _LANES), np.float32)
    used = np.subtract(logits, logits.max(axis=1, keepdims=True), out=weights[:, :n_vocab])
    used *= (1.0 / temperature).astype(np.float32)[:, None]
    np.exp(used, out=used)
    runs = weights.reshape(n_row, -1, _LANES)  # [n_row, n_run, _LANES]
    totals = np.cumsum(runs.sum(axis=2), axis=1, dtype=np.float64)  # [n_row, n_run]
    target = random * totals[:, -1]
    run = np.minimum((totals <= target[:, None]).sum(axis=1), totals.shape[1] - 1)
    rows = np.arange(n_row)
    before = np.where(run > 0, totals[rows, run - 1], 0.0)
    within = np.cumsum(runs[rows, run], axis=1, dtype=np.float64)  # [n_row, _LANES]
    lane: Ids = (within <= (target - before)[:, None]).sum(axis=1)
    last = _LANES - 1 - np.argmax(runs[rows, run, ::-1] > 0, axis=1)  # rounding must not draw a token of weight 0
    np.minimum(lane, last, out=lane)
    lane += run * _LANES
    return lane


def _draw_filtered(logits: Array, f: _Filters, n_candidate: int) -> Ids:
    """Draw after top_k, then top_p, then min_p, from the n_candidate largest of [n_row, n_vocab] -> [n_row].

    Rows whose top_p or min_p may keep more tokens than that are drawn again from all tokens.
    """
    n_row, n_vocab = logits.shape
    if n_row > (most := max(_MAX_SORTED // n_vocab, 1)) and not _has_short_cut(n_candidate, n_vocab):
        parts = np.array_split(np.arange(n_row), -(-n_row // most))
        return np.concatenate([_draw_filtered(logits[part], f.select(part), n_candidate) for part in parts])
    ids, values = find_largest(logits, n_candidate)
    weights = np.exp((values.astype(np.float64) - values[:, :1]) / f.temperature[:, None])
    limited = f.top_k > 0
    kth = values[np.arange(len(values)), np.minimum(np.where(limited, f.top_k, 1), values.shape[1]) - 1]
    weights[(values < kth[:, None]) & limited[:, None]] = 0.0
    cumulative = np.cumsum(weights, axis=1)  # sequential: a value does not depend on how many weights follow
    total = cumulative[:, -1]
    if not limited.all():
        shifted = (logits - values[:, :1]) * (1.0 / f.temperature).astype(np.float32)[:, None]
        total = np.where(limited, total, np.exp(shifted).sum(axis=1))
    keep = (cumulative - weights < (f.top_p * total)[:, None]) & (weights >= f.min_p[:, None] * weights[:, :1])
    all_kept = (keep | np.isneginf(values)).all(axis=1)  # -inf fills up rows with fewer candidates than others
    is_cut_off = ~limited & all_kept & (values.shape[1] < n_vocab)  # tokens past the candidates may be kept too
    tokens = ids[np.arange(len(ids)), _draw(np.where(keep, weights, 0.0), f.random)]
    if is_cut_off.any():
        tokens[is_cut_off] = _draw_filtered(logits[is_cut_off], f.select(is_cut_off), n_vocab)
    return tokens


def _draw_tokens(logits: Array, filters: _Filters) -> Ids:
    """[n_row, n_vocab] logits -> [n_row] drawn token ids; rows without filters need no candidates."""
    tokens = np.empty(len(logits), np.intp)
    free = (filters.top_k == 0) & (filters.top_p == 1.0) & (filters.min_p == 0.0)
    if free.any():
        f = filters.select(free)
        tokens[free] = _draw_from_all(logits if free.all() else logits[free], f.temperature, f.random)
    if not free.all():
        f = filters.select(~free)
        n_candidate = max(int(f.top_k.max()), _NUCLEUS if (f.top_k == 0).any() else 1)
        tokens[~free] = _draw_filtered(logits[~free] if free.any() else logits, f, n_candidate)
    return tokens


def _choose(logits: Array, sequences: Seq[Sequence]) -> Ids:
    """[n_row, n_vocab] logits after penalties -> [n_row] token ids, the most likely or drawn ones."""
    tokens = np.empty(len(sequences), np.intp)
    greedy = np.array([sequence.params.greedy for sequence in sequences])
    if greedy.any():
        tokens[greedy] = (logits if greedy.all() else logits[greedy]).argmax(axis=1)
    if not greedy.all():
        drawn, n_vocab = [sequence for sequence in sequences if not sequence.params.greedy], logits.shape[1]
        filters = _Filters(
            temperature=np.array([s.params.temperature for s in drawn]),
            top_k=np.array([s.params.top_k if s.params.top_k < n_vocab else 0 for s in drawn], np.intp),
            top_p=np.array([s.params.top_p for s in drawn]),
            min_p=np.array([s.params.min_p for s in drawn]),
            random=np.array([s.next_random() for s in drawn]),
        )
        tokens[~greedy] = _draw_tokens(logits[~greedy] if greedy.any() else logits, filters)
    return tokens


def _append_logprobs(logprobs: Array, sequences: Seq[Sequence], tokens: Ids) -> None:
    """Append each token's log-probability, from [n_row, n_vocab], and the highest ones to its sequence."""
    n_top = max(sequence.params.logprobs or 0 for sequence in sequences)
    ids, values = find_largest(logprobs, max(n_top, 1))
    for i, sequence in enumerate(sequences):
        n = sequence.params.logprobs or 0
        sequence.logprobs.append(float(logprobs[i, tokens[i]]))
        top = zip(ids[i, :n].tolist(), values[i, :n].tolist(), strict=True)
        sequence.top_logprobs.append(tuple(pair for pair in top if pair[1] > -np.inf))  # -inf: an id that no token has


def sample(logits: Array, sequences: Seq[Sequence], eos_ids: Seq[int]) -> list[int]:
    """The next token of each sequence from its row of logits [n_row, n_vocab], which is overwritten."""
    with_logprobs = [i for i, sequence in enumerate(sequences) if sequence.params.logprobs is not None]
    logprobs = log_softmax(logits[with_logprobs]) if with_logprobs else None
    for i, sequence in enumerate(sequences):
        penalise(logits[i], sequence, eos_ids)
    tokens = _choose(logits, sequences)
    if logprobs is not None:
        _append_logprobs(logprobs, [sequences[i] for i in with_logprobs], tokens[with_logprobs])
    return [int(token) for token in tokens]
