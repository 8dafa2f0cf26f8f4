"""The distribution of a drawn token by the definition of each parameter, in float64, by sorting all tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from batchgen.types import SamplingParams

Floats = npt.NDArray[np.float64]


@dataclass
class Distribution:
    """p [n_vocab]; margin: how near any token was to being cut out or not, or infinity."""

    p: Floats
    margin: float = field(default=np.inf)

    def keep(self, is_kept: npt.NDArray[np.bool_], values: Floats, bound: float) -> None:
        """Cut out all others. values: what was compared with a bound, to see how near they are."""
        near = np.abs(values[self.p > 0] - bound) / (abs(bound) + 1e-3)
        self.margin = min(self.margin, near.min(initial=np.inf))
        self.p = np.where(is_kept, self.p, 0.0)
        self.p /= self.p.sum()


def distribution(row: npt.NDArray[np.float32], p: SamplingParams, is_cut: bool = False) -> Distribution:
    """Of logits [n_vocab] after penalties; is_cut: XTC's decision."""
    x = np.where(np.isnan(row), -np.inf, row).astype(np.float64)
    is_left = x > -np.inf
    if p.top_n_sigma:
        bound = x.max() - p.top_n_sigma * x[is_left].std()
        near = np.abs(x[is_left] - bound) / (abs(bound) + 1e-3)
        is_left &= x >= bound
    if 0 < p.top_k < is_left.sum():
        is_left &= x >= np.sort(x[is_left])[-p.top_k]
    weights = np.where(is_left, np.exp((x - x.max()) / p.temperature), 0.0)
    found = Distribution(weights / weights.sum(), near.min() if p.top_n_sigma else np.inf)
    if p.typical_p < 1.0:
        _limit_to_typical(found, p.typical_p)
    if p.top_p < 1.0:
        order = np.lexsort((np.arange(len(x)), -x, -found.p))
        before = np.empty(len(x))
        before[order] = np.cumsum(found.p[order]) - found.p[order]
        found.keep(before < p.top_p, before, p.top_p)
    if p.min_p:
        found.keep(found.p >= p.min_p * found.p.max(), found.p / found.p.max(), p.min_p)
    if is_cut:
        _exclude_top(found, x, p.xtc_threshold)
    return found


def _limit_to_typical(found: Distribution, typical_p: float) -> None:
    """As transformers' TypicalLogitsWarper: all that are as near to the entropy as the last that is needed."""
    q = found.p
    surprise = -np.log(q, out=np.full(len(q), -np.inf), where=q > 0)
    distances = np.where(q > 0, np.abs(surprise - (q[q > 0] * surprise[q > 0]).sum()), np.inf)
    order = np.argsort(distances, kind="stable")
    upto: Floats = np.cumsum(q[order])
    last = distances[order[min(int((upto < typical_p).sum()), int((q > 0).sum()) - 1)]]
    last = last * (1 + 1e-9) + 1e-12  # equal logits
    found.margin = min(found.margin, float(np.abs(upto - typical_p).min()))
    found.keep(distances <= last, np.where(np.abs(distances - last) < 1e-8, np.inf, distances), last)


def _exclude_top(found: Distribution, x: Floats, threshold: float) -> None:
    order: Sequence[int] = np.lexsort((np.arange(len(x)), -x)).tolist()
    top = [token for token in order if found.p[token] >= threshold and found.p[token] > 0]
    is_kept = np.ones(len(x), np.bool_)
    is_kept[top[:-1]] = False
    found.keep(is_kept, found.p, threshold)
