"""From logits to tokens, for all sequences of a step at once.

Order of work, as in vLLM and transformers: penalties and logit_bias, bad_words, min_tokens, temperature, top_k,
top_p, min_p, draw. Nothing here mixes rows: what a row draws depends on its own logits and its own random number.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from batchgen.engine.sequence import Sequence
from batchgen.gpt2.params import Array

Ids = npt.NDArray[np.intp]
Doubles = npt.NDArray[np.float64]

_LANES = 64  # elements that are compared at once in the search for the largest
_NUCLEUS = 128  # candidates tried first where only top_p or min_p limits them
_SORTED = 2**20  # logits that are sorted and summed at once, at some 50 bytes each meanwhile


@dataclass(slots=True)
class _Filters:
    """The sampling parameters of some rows, as columns."""

    temperature: Doubles
    top_k: Ids
    top_p: Doubles
    min_p: Doubles
    random: Doubles

    def of(self, rows: npt.NDArray[np.bool_] | Ids) -> "_Filters":
        return _Filters(self.temperature[rows], self.top_k[rows], self.top_p[rows], self.min_p[rows], self.random[rows])


def log_softmax(logits: Array) -> Array:
    """[n_row, n_vocab] -> [n_row, n_vocab] log-probabilities."""
    shifted: Array = logits - logits.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def _is_few(k: int, n_vocab: int) -> bool:
    """Whether the k largest are found without sorting all."""
    return n_vocab // _LANES >= 2 * k


def candidates(logits: Array, k: int) -> tuple[Ids, Array]:
    """The k largest of each row and all that tie with the k-th: ids and values [n_row, n], largest first.

    n >= k; rows with fewer than n are filled with -inf. Ties come in the order of their ids. Instead of sorting
    50,257 logits, n_vocab is cut into `_LANES` equal runs, whose elementwise maximum bounds the k-th from below.
    """
    n_row, n_vocab = logits.shape
    if not _is_few(k, n_vocab):
        order = np.argsort(-logits, axis=1, kind="stable")
        return order, np.take_along_axis(logits, order, axis=1)
    width = n_vocab // _LANES
    runs = logits[:, : width * _LANES].reshape(n_row, _LANES, width).max(axis=1)  # [n_row, width]
    bound = np.partition(runs, width - k, axis=1)[:, width - k]
    rows, ids = np.divmod(np.flatnonzero(logits >= bound[:, None]), n_vocab)  # np.nonzero is slow in two dimensions
    counts = np.bincount(rows, minlength=n_row)
    column = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    values = np.full((n_row, int(counts.max())), -np.inf, np.float32)
    values[rows, column] = logits[rows, ids]
    table = np.zeros(values.shape, np.intp)
    table[rows, column] = ids
    order = np.argsort(-values, axis=1, kind="stable")
    return np.take_along_axis(table, order, axis=1), np.take_along_axis(values, order, axis=1)


def penalise(logits: Array, sequence: Sequence, eos_id: int | None) -> None:
    """Penalties, logit_bias, bad_words and min_tokens on one row [n_vocab], in place.

    Repetition (Keskar et al., 2019) counts the prompt and what was generated, and so do bad_words (transformers);
    presence and frequency (OpenAI) only what was generated.
    """
    p = sequence.params
    if p.repetition_penalty != 1.0:
        seen = np.unique(np.array([*sequence.prompt.token_ids, *sequence.token_ids], np.intp))
        x = logits[seen]
        logits[seen] = np.where(x > 0, x / p.repetition_penalty, x * p.repetition_penalty)
    if (p.presence_penalty or p.frequency_penalty) and sequence.token_ids:
        said, count = np.unique(np.array(sequence.token_ids, np.intp), return_counts=True)
        logits[said] -= (p.presence_penalty + p.frequency_penalty * count).astype(np.float32)
    for token, bias in p.logit_bias:
        logits[token] += bias
    for word in sequence.prompt.bad_words:
        if sequence.ends_in(word[:-1]):
            logits[word[-1]] = -np.inf
    if len(sequence.token_ids) < p.min_tokens:
        logits[list(p.stop_token_ids)] = -np.inf
        if eos_id is not None and not p.ignore_eos:
            logits[eos_id] = -np.inf


def _needs_penalties(sequence: Sequence) -> bool:
    p = sequence.params
    return bool(
        p.repetition_penalty != 1.0
        or p.presence_penalty
        or p.frequency_penalty
        or p.logit_bias
        or sequence.prompt.bad_words
        or len(sequence.token_ids) < p.min_tokens
    )


def _draw(weights: Doubles, random: Doubles) -> Ids:
    """The index that each random number falls on, [n_row, n] weights (zeros at the end) -> [n_row]."""
    cumulative = np.cumsum(weights, axis=1)
    index: Ids = (cumulative <= (random * cumulative[:, -1])[:, None]).sum(axis=1)
    last = np.count_nonzero(weights, axis=1) - 1
    np.minimum(index, last, out=index)
    return index


def _draw_from_all(logits: Array, temperature: Doubles, random: Doubles) -> Ids:
    """Draw from the whole softmax: first the run of `_LANES` tokens, then the token within it."""
    n_row, n_vocab = logits.shape
    weights = np.zeros((n_row, -(-n_vocab // _LANES) * _LANES), np.float32)
    used = np.subtract(logits, logits.max(axis=1, keepdims=True), out=weights[:, :n_vocab])
    used *= (1.0 / temperature).astype(np.float32)[:, None]
    np.exp(used, out=used)
    runs = weights.reshape(n_row, -1, _LANES)
    totals = np.cumsum(runs.sum(axis=2), axis=1, dtype=np.float64)  # [n_row, n_run]
    target = random * totals[:, -1]
    run = np.minimum((totals <= target[:, None]).sum(axis=1), totals.shape[1] - 1)
    rows = np.arange(n_row)
    before = np.where(run > 0, totals[rows, run - 1], 0.0)
    within = np.cumsum(runs[rows, run], axis=1, dtype=np.float64)  # [n_row, _LANES]
    lane: Ids = (within <= (target - before)[:, None]).sum(axis=1)
    last = _LANES - 1 - np.argmax(runs[rows, run, ::-1] > 0, axis=1)  # rounding must not pick a token of weight 0
    np.minimum(lane, last, out=lane)
    lane += run * _LANES
    return lane


def _draw_filtered(logits: Array, f: _Filters, n_candidate: int) -> Ids:
    """Draw after top_k, then top_p within it, then min_p; the candidates suffice or are taken anew, all of them."""
    n_row, n_vocab = logits.shape
    if n_row > (most := max(_SORTED // n_vocab, 1)) and not _is_few(n_candidate, n_vocab):
        parts = np.array_split(np.arange(n_row), -(-n_row // most))
        return np.concatenate([_draw_filtered(logits[part], f.of(part), n_candidate) for part in parts])
    ids, values = candidates(logits, n_candidate)
    weights = np.exp((values.astype(np.float64) - values[:, :1]) / f.temperature[:, None])
    limited = f.top_k > 0
    kth = values[np.arange(len(values)), np.minimum(np.where(limited, f.top_k, 1), values.shape[1]) - 1]
    weights[(values < kth[:, None]) & limited[:, None]] = 0.0
    cumulative = np.cumsum(weights, axis=1)  # one after another: its values do not depend on how many follow
    total = cumulative[:, -1]
    if not limited.all():
        shifted = (logits - values[:, :1]) * (1.0 / f.temperature).astype(np.float32)[:, None]
        total = np.where(limited, total, np.exp(shifted).sum(axis=1))
    keep = (cumulative - weights < (f.top_p * total)[:, None]) & (weights >= f.min_p[:, None] * weights[:, :1])
    all_kept = (keep | np.isneginf(values)).all(axis=1)  # -inf fills up rows of fewer candidates than the others'
    short = ~limited & all_kept & (values.shape[1] < n_vocab)  # the nucleus may go on past the candidates
    tokens = ids[np.arange(len(ids)), _draw(np.where(keep, weights, 0.0), f.random)]
    if short.any():
        tokens[short] = _draw_filtered(logits[short], f.of(short), n_vocab)
    return tokens


def _choose(logits: Array, sequences: Seq[Sequence]) -> Ids:
    """[n_row, n_vocab] logits after penalties -> [n_row] token ids."""
    tokens = np.empty(len(sequences), np.intp)
    greedy = np.array([sequence.params.greedy for sequence in sequences])
    if greedy.any():
        tokens[greedy] = logits.argmax(axis=1) if greedy.all() else logits[greedy].argmax(axis=1)
    if greedy.all():
        return tokens
    drawn = [sequence for sequence in sequences if not sequence.params.greedy]
    n_vocab = logits.shape[1]
    filters = _Filters(
        np.array([s.params.temperature for s in drawn]),
        np.array([s.params.top_k if s.params.top_k < n_vocab else 0 for s in drawn], np.intp),
        np.array([s.params.top_p for s in drawn]),
        np.array([s.params.min_p for s in drawn]),
        np.array([s.next_random() for s in drawn]),
    )
    rest = logits if not greedy.any() else logits[~greedy]
    ids = np.empty(len(drawn), np.intp)
    free = (filters.top_k == 0) & (filters.top_p == 1.0) & (filters.min_p == 0.0)
    if free.any():
        few = filters.of(free)
        ids[free] = _draw_from_all(rest if free.all() else rest[free], few.temperature, few.random)
    if not free.all():
        few = filters.of(~free)
        n_candidate = max(int(few.top_k.max()), _NUCLEUS if (few.top_k == 0).any() else 1)
        ids[~free] = _draw_filtered(rest[~free] if free.any() else rest, few, n_candidate)
    tokens[~greedy] = ids
    return tokens


def sample(logits: Array, sequences: Seq[Sequence], eos_id: int | None) -> list[int]:
    """The next token of each sequence from its row of logits [n_row, n_vocab], which are overwritten.

    Appends log-probabilities to the sequences that asked for them.
    """
    asked = [i for i, sequence in enumerate(sequences) if sequence.params.logprobs is not None]
    logprobs = log_softmax(logits[asked]) if asked else None
    for i, sequence in enumerate(sequences):
        if _needs_penalties(sequence):
            penalise(logits[i], sequence, eos_id)
    tokens = _choose(logits, sequences)
    if logprobs is not None:
        _keep_logprobs(logprobs, [sequences[i] for i in asked], tokens[asked])
    return [int(token) for token in tokens]


def _keep_logprobs(logprobs: Array, sequences: Seq[Sequence], tokens: Ids) -> None:
    n_top = max(sequence.params.logprobs or 0 for sequence in sequences)
    ids, values = candidates(logprobs, max(n_top, 1))
    for i, sequence in enumerate(sequences):
        n = sequence.params.logprobs or 0
        sequence.logprobs.append(float(logprobs[i, tokens[i]]))
        sequence.top_logprobs.append(tuple(zip(ids[i, :n].tolist(), values[i, :n].tolist(), strict=True)))
