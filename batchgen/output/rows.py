"""The input rows that a run generates."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Rows:
    """Input rows to generate: all (numbers None), or some by number.

    `staying` counts, by status, the output rows that stay as they are.
    """

    count: int
    numbers: frozenset[int] | None = None
    staying: Counter[str] = field(default_factory=Counter)
