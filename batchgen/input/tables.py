"""Folders that are tables of another system: a log says which of their files hold rows, and some hold none any more.

Delta, Iceberg and Hudi keep files whose rows were deleted or rewritten, and a stream of Spark those of failed attempts.
"""

import json
import re
import shlex
from collections.abc import Iterable, Iterator
from pathlib import PurePath

from batchgen.errors import InputError

_POLARS = 'import polars; polars.scan_{}({}).sink_parquet("prompts.parquet")'
_HUDI = (
    "import hudi, pyarrow, pyarrow.parquet as p; table = hudi.HudiTableBuilder.from_base_uri({table}).build(); "
    'p.write_table(pyarrow.Table.from_batches(table.read()), "prompts.parquet")'
)
_SPARK = (
    "from pyspark.sql import SparkSession; "
    'SparkSession.builder.getOrCreate().read.load({table}).write.save("prompts.parquet")'
)
# what a table has in its folder: what the table is, the packages that read it, and the Python that exports its rows
_TABLES = {
    "_delta_log": ("a Delta table", "polars deltalake", _POLARS.format("delta", "{table}")),
    "metadata": ("an Iceberg table", "polars pyiceberg", _POLARS.format("iceberg", "{log}")),
    ".hoodie": ("a Hudi table", "hudi pyarrow", _HUDI),
    "_spark_metadata": ("the output of a Spark stream", "pyspark", _SPARK),
}
PATTERNS = ("_delta_log", "metadata/*.metadata.json*", ".hoodie", "_spark_metadata")  # below the folder of a table
_LOG = re.compile(
    r"(.+?)/(?:(_delta_log|\.hoodie|_spark_metadata)(?:/.*)?|(metadata)/[^/]+\.metadata\.json(?:\.gz)?)", re.DOTALL
)


def folders_of(files: Iterable[str]) -> Iterator[str]:
    """Every folder that a file is in, at any depth, once: a/b/c.jsonl -> a/b, a"""
    seen = {".", ""}
    for folder in dict.fromkeys(PurePath(file).parent for file in files):
        for one in map(str, (folder, *folder.parents)):
            if one in seen:
                break
            seen.add(one)
            yield one


def refuse_tables(files: Iterable[str], paths: Iterable[str], before: str = "") -> None:
    """Raise InputError if a file is in a table. paths: what exists in or above the folders; before: `s3://`."""
    logs: dict[str, tuple[str, str]] = {}
    for path in paths:
        if found := _LOG.fullmatch(path):
            logs[found[1]] = max(logs.get(found[1], ("", "")), (found[2] or found[3], path), key=_version)
    if not logs:
        return
    for folder in folders_of(files):
        if folder in logs:
            marker, log = logs[folder]
            what, packages, code = _TABLES[marker]
            code = code.format(table=json.dumps(before + folder), log=json.dumps(before + log))
            raise InputError(
                f"{before}{folder}: this is {what}, and only its log says which of its files hold rows; export them: "
                f"pip install {packages}; python -c {shlex.quote(code)}; then give prompts.parquet"
            )


def _version(log: tuple[str, str]) -> tuple[int, str]:
    """The version of Iceberg's metadata: v12.metadata.json, 00012-9b4e.metadata.json -> 12"""
    digits = re.match(r"v?(\d+)", PurePath(log[1]).name)
    return int(digits[1]) if digits else -1, log[1]
