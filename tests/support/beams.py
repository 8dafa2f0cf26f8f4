"""Beam search written plainly in float64, from the rules of docs/parameters.md; it shares no code with batchgen.

It knows nothing of caches or batches: a beam is a tuple of token ids, and what may follow it is asked anew each time.
"""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ids = tuple[int, ...]
NextLogprobs = Callable[[Ids], npt.NDArray[np.float64]]  # of every token after these generated ones


class Found(NamedTuple):
    """A completion; its ids have the token that ended it."""

    score: float
    ids: Ids


@dataclass(frozen=True)
class Rules:
    """What a search is asked for."""

    num_beams: int
    max_tokens: int
    stops: tuple[int, ...] = ()
    length_penalty: float = 1.0
    early_stopping: str = "false"


def _gap(values: list[float]) -> float:
    """The smallest difference of two adjacent values, in descending order."""
    return min((a - b for a, b in itertools.pairwise(values)), default=np.inf)


def _candidates(beams: list[tuple[float, Ids]], next_logprobs: NextLogprobs) -> list[tuple[float, Ids]]:
    rows = ((total, ids, next_logprobs(ids)) for total, ids in beams)
    every = [(total + row[t], (*ids, t)) for total, ids, row in rows for t in np.flatnonzero(row > -np.inf).tolist()]
    return sorted(every, key=lambda one: -one[0])


def search(next_logprobs: NextLogprobs, rules: Rules) -> tuple[list[Found], float]:
    """The completions, best first, and the smallest difference of two numbers of which the greater decided."""
    n, margin = rules.num_beams, np.inf
    beams: list[tuple[float, Ids]] = [(0.0, ())]
    done: list[Found] = []
    most = max(2, 1 + len({*rules.stops})) * n
    for length in range(1, rules.max_tokens + 1):
        candidates = _candidates(beams, next_logprobs)
        margin = min(margin, _gap([total for total, _ in candidates[: most + 1]]))
        ends = [ids[-1] in rules.stops or length == rules.max_tokens for _, ids in candidates[:most]]
        beams = [one for one, is_end in zip(candidates, ends, strict=False) if not is_end][:n]
        new = [
            Found(total / length**rules.length_penalty, ids)
            for (total, ids), is_end in zip(candidates[:n], ends, strict=False)
            if is_end
        ]
        every = sorted([*done, *new], key=lambda one: -one.score)
        margin = min(margin, _gap([one.score for one in every[: n + 1]]))
        done = every[:n]
        if not beams:
            break
        if len(done) == n:
            longest = rules.early_stopping == "never" and rules.length_penalty > 0
            best = beams[0][0] / (rules.max_tokens if longest else length) ** rules.length_penalty
            margin = min(margin, abs(best - done[-1].score))
            if rules.early_stopping == "true" or best <= done[-1].score:
                break
    return done, margin


def every_completion(
    next_logprobs: NextLogprobs, n_vocab: int, max_tokens: int, stops: Iterable[int]
) -> list[tuple[float, Ids]]:
    """The log-probability of each completion that there is, best first."""
    ends, found, open_ = {*stops}, [], [(0.0, ())]
    for length in range(1, max_tokens + 1):
        longer = [
            (total + row[token], (*ids, token))
            for total, ids in open_
            for row in [next_logprobs(ids)]
            for token in range(n_vocab)
        ]
        found += [one for one in longer if one[1][-1] in ends or length == max_tokens]
        open_ = [one for one in longer if one[1][-1] not in ends]
    return sorted(found, reverse=True)
