"""Query an output and read its plan: python examples/read_with_duckdb.py completions.parquet

The rows of a dataset are read in the same way, as "completions/*.parquet"; its plan is the file completions/_SUCCESS.
"""

import json
import sys

import duckdb

ROWS = """
    SELECT status, count(*), sum(completion_tokens), min(completion)
    FROM read_parquet(?) GROUP BY status ORDER BY status
"""
PLAN = "SELECT decode(value) FROM parquet_kv_metadata(?) WHERE decode(key) = 'batchgen'"


def main(output: str) -> None:
    for status, rows, tokens, completion in duckdb.execute(ROWS, [output]).fetchall():
        print(f"{status}: {rows} rows, {tokens} tokens, such as {completion!r}")

    found = duckdb.execute(PLAN, [output]).fetchone()
    plan = json.loads(found[0])
    print(f"model {plan['model']}, max_tokens {plan['parameters']['max_tokens']}, NumPy {plan['numpy']}")


if __name__ == "__main__":
    main(*sys.argv[1:])
