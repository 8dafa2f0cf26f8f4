"""The rows nearest to one of them: python examples/nearest_with_polars.py embeddings.parquet 0"""

import sys

import numpy as np
import polars as pl


def main(output: str, row: str) -> None:
    frame = pl.read_parquet(output).drop_nulls("embedding")  # its type is Array(Float32, n_embd)
    vectors = frame["embedding"].to_numpy()  # [n_row, n_embd]
    [query] = vectors[frame["row"].to_numpy() == int(row)]

    distance = np.linalg.norm(vectors - query, axis=1)
    nearest = frame.select("row", "text", pl.Series("distance", distance)).sort("distance")
    for found in nearest.head(3).iter_rows(named=True):
        print(f"{found['distance']:.2f} {found['row']} {found['text']}")


if __name__ == "__main__":
    main(*sys.argv[1:])
