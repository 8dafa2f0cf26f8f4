"""A dataset: a folder of Parquet parts in the order of their names, complete when _SUCCESS is there."""

from dataclasses import dataclass

import pyarrow as pa

from batchgen.errors import OutputError
from batchgen.input.prompts import Facts
from batchgen.output.ledger import Ledger, is_dataset, refuse_foreign
from batchgen.output.place import check_folder, output_errors, refuse_input, refuse_link
from batchgen.output.reading import read_stored
from batchgen.output.rows import LocalOutput, Stored
from batchgen.output.schema import Columns, choose_columns
from batchgen.plan import Plan


@dataclass(frozen=True, slots=True)
class Dataset(LocalOutput):
    """A folder that the parts become; it takes the place of an older dataset in two renames."""

    @property
    def format(self) -> str:
        return "dataset"

    def check(self) -> None:
        """Raise OutputError for a path that cannot become a dataset, or holds what must not be removed."""
        path, inputs = self.path, self.prompts.local_paths
        with output_errors(path):
            refuse_link(path)
            if path.exists():
                refuse_foreign(path, path)
            refuse_input(path, inputs)
            for source in inputs:
                if source.resolve().is_relative_to(path.resolve()):
                    what = f"the input {source} is in it, and would be replaced"
                    raise OutputError(f"{path}: {what}; choose another name")
        check_folder(path, inputs)

    def stored(self) -> Stored | None:
        return read_stored(self.path) if is_dataset(self.path) else None

    def columns(self, facts: Facts, plan: Plan, n_embd: int = 0) -> Columns:
        return choose_columns(self.prompts, facts, plan, n_embd)

    def publish(self, ledger: Ledger, plan: Plan, schema: pa.Schema, rows: int) -> None:
        ledger.publish_dataset(plan, rows)
