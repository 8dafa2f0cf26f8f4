"""The rows nearest to one of them: python examples/nearest_with_duckdb.py embeddings.parquet 0"""

import sys

import duckdb

NEAREST = """
    WITH embedded AS MATERIALIZED (SELECT row, text, embedding FROM read_parquet($output) WHERE status = 'ok')
    SELECT list_distance(other.embedding, one.embedding) AS distance, other.row, other.text
    FROM embedded AS other, embedded AS one WHERE one.row = $row
    ORDER BY distance, other.row LIMIT 3
"""  # materialized: without it, DuckDB may compute distances from the nulls of rejected rows, and refuses them


def main(output: str, row: str) -> None:
    for distance, number, text in duckdb.execute(NEAREST, {"output": output, "row": int(row)}).fetchall():
        print(f"{distance:.2f} {number} {text}")


if __name__ == "__main__":
    main(*sys.argv[1:])
