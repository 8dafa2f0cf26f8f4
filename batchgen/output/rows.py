"""The input rows that a run generates, what is known of an output that is there, and what local outputs share."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from batchgen.input.prompts import Facts, Prompts
from batchgen.output.ledger import Ledger
from batchgen.plan import Plan
from batchgen.types import Reason


@dataclass(frozen=True, slots=True)
class Rows:
    """Input rows to generate: all, or some by number."""

    count: int
    numbers: frozenset[int] | None = None  # None: all
    staying: Counter[str] = field(default_factory=Counter)  # output rows that stay as they are, by status
    reasons: Iterable[Reason] = ()  # why output rows that stay were rejected


@dataclass(frozen=True, slots=True)
class Stored:
    """A complete output: the plan that made it, and its rows by status."""

    plan: Plan
    statuses: Counter[str]


@dataclass(frozen=True, slots=True)
class LocalOutput:
    """A file or a dataset on this machine; see outputs.Output."""

    path: Path
    prompts: Prompts

    @property
    def where(self) -> Path:
        return self.path

    def rows_to_do(self, facts: Facts) -> Rows:
        return Rows(facts.rows)

    def claim(self, ledger: Ledger, plan: Plan, automatic: frozenset[str], restart: bool) -> Plan:
        return ledger.adopt(plan, automatic, restart)
