"""The input rows that a run generates, and what is known of an output that is there."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from batchgen.plan import Plan
from batchgen.types import Reason


@dataclass(frozen=True, slots=True)
class Rows:
    """Input rows to generate: all (numbers None), or some by number.

    `staying` counts, by status, the output rows that stay as they are; `reasons` are those of the rejected ones.
    """

    count: int
    numbers: frozenset[int] | None = None
    staying: Counter[str] = field(default_factory=Counter)
    reasons: Iterable[Reason] = ()


@dataclass(frozen=True, slots=True)
class Stored:
    """A complete output: the plan that made it, and its rows by status."""

    plan: Plan
    statuses: Counter[str]
