"""The texts nearest to another: python examples/nearest_with_numpy.py embeddings.parquet "A king had a daughter"

Make the file first: batchgen embed texts.jsonl -o embeddings.parquet
"""

import json
import sys

import numpy as np
import pyarrow.parquet as pq

from batchgen import Generator


def main(output: str, text: str) -> None:
    table = pq.read_table(output, columns=["text", "embedding"]).drop_null()  # rejected rows have no embedding
    vectors = np.stack(table["embedding"].to_numpy(zero_copy_only=False))  # [n_row, n_embd]

    plan = json.loads(table.schema.metadata[b"batchgen"])  # what the run was asked for
    generator = Generator(plan["model"], precision=plan["precision"])
    [query] = generator.embed([text], layer=plan["layer"], pool=plan["pool"])

    centre = vectors.mean(axis=0)  # all of a GPT-2's vectors point in nearly one direction; what differs is the rest
    vectors, query = vectors - centre, query - centre
    similarity = vectors @ query / np.linalg.norm(vectors, axis=1) / np.linalg.norm(query)
    for row in np.argsort(-similarity)[:3]:
        print(f"{similarity[row]:.3f} {table['text'][row]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
