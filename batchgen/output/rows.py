"""The input rows that a run generates, what is known of an output that is there, and what local outputs share."""

from collections import Counter
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from batchgen.input.prompts import Prompts
from batchgen.output.ledger import Ledger
from batchgen.plan import Plan
from batchgen.selection import Selection
from batchgen.types import STATUSES, Reason

# What --no-rejects leaves out: output rows by status, and under "rows" the input rows of which nothing is there
LeftOut: TypeAlias = Counter[str]


def statuses_of(left_out: LeftOut) -> Counter[str]:
    """The output rows that are left out, by status."""
    return Counter({status: left_out[status] for status in STATUSES if left_out[status]})


def read_counts(values: object) -> LeftOut:
    """Counts that were stored as JSON; ValueError if they are something else."""
    if not isinstance(values, dict) or not all(type(count) is int and count >= 0 for count in values.values()):
        raise ValueError("it does not hold counts of rows")
    return Counter(values)


@dataclass(frozen=True, slots=True)
class Rows:
    """Input rows to generate, by number."""

    count: int
    numbers: Container[int]
    in_all: int  # input rows that the output holds
    staying: Counter[str] = field(default_factory=Counter)  # output rows that stay as they are, by status
    reasons: Iterable[Reason] = ()  # why output rows that stay were rejected


@dataclass(frozen=True, slots=True)
class Stored:
    """A complete output: the plan that made it, and its rows by status."""

    plan: Plan
    statuses: Counter[str]  # those that are left out count too
    left_out: LeftOut = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class LocalOutput:
    """A file or a dataset on this machine; see outputs.Output."""

    path: Path
    prompts: Prompts

    @property
    def where(self) -> Path:
        return self.path

    def rows_to_do(self, selection: Selection) -> Rows:
        return Rows(len(selection), selection, len(selection))

    def claim(self, ledger: Ledger, plan: Plan, automatic: frozenset[str], restart: bool) -> Plan:
        return ledger.adopt(plan, automatic, restart)
