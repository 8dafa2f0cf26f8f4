"""A dataset: a folder of Parquet parts in the order of their names, complete when _SUCCESS is there."""

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from batchgen.errors import OutputError
from batchgen.input.prompts import Facts, Prompts
from batchgen.output.ledger import Ledger, is_dataset
from batchgen.output.place import check_folder, output_errors, refuse_input, refuse_link
from batchgen.output.reading import read_stored
from batchgen.output.rows import Rows, Stored
from batchgen.output.schema import Columns, choose_columns
from batchgen.plan import Plan
from batchgen.types import SamplingParams


def _is_free(path: Path) -> bool:
    """Whether nothing is lost if a dataset takes this place: nothing, an empty folder, or a dataset."""
    return not path.exists() or (path.is_dir() and (is_dataset(path) or not any(path.iterdir())))


@dataclass(frozen=True, slots=True)
class Dataset:
    """A folder that the parts become; it takes the place of an older dataset in two renames."""

    path: Path
    prompts: Prompts
    token_ids: bool = False

    @property
    def where(self) -> Path:
        return self.path

    @property
    def format(self) -> str:
        return "dataset"

    def check(self) -> None:
        """Raise OutputError for a path that cannot become a dataset, or must not be replaced by one."""
        path, inputs = self.path, self.prompts.local_paths
        with output_errors(path):
            refuse_link(path)
            if not _is_free(path):
                raise OutputError(f"{path}: something other than a dataset of batchgen is there; choose another name")
            refuse_input(path, inputs)
            for source in inputs:
                if source.resolve().is_relative_to(path.resolve()):
                    what = f"the input {source} is in it, and would be replaced"
                    raise OutputError(f"{path}: {what}; choose another name")
        check_folder(path, inputs)

    def stored(self) -> Stored | None:
        return read_stored(self.path) if is_dataset(self.path) else None

    def columns(self, facts: Facts, sampling: SamplingParams) -> Columns:
        return choose_columns(self.prompts, facts, sampling, token_ids=self.token_ids)

    def rows_to_do(self, facts: Facts) -> Rows:
        return Rows(facts.rows)

    def claim(self, ledger: Ledger, plan: Plan, automatic: frozenset[str], restart: bool) -> Plan:
        return ledger.adopt(plan, automatic, restart)

    def publish(self, ledger: Ledger, plan: Plan, schema: pa.Schema, rows: int) -> None:
        ledger.publish_dataset(plan)
