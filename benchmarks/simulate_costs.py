"""What the parts of a run cost on this machine, measured on the code itself: for benchmarks.simulate_cluster.

Every figure is the best of several, as others may be at work on the machine: seconds of the processor where nothing
else is waited for, and of the clock where the disk is. Files are written where TMPDIR says.
"""

import json
import os
import pickle
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
from threadpoolctl import threadpool_limits

from batchgen.engine.engine import Engine
from batchgen.gpt2.config import GPT2Config
from batchgen.gpt2.params import nest, random_tensors
from batchgen.input.readers import read_requests, scan_input
from batchgen.input.validation import validate
from batchgen.models.registry import find_model
from batchgen.models.shards import load_manifest
from batchgen.output.ledger import Ledger, open_ledger, with_receipt
from batchgen.output.schema import output_schema
from batchgen.output.writer import merge_parts, write_part
from batchgen.planning import default_kv_bytes
from batchgen.run import Job, Model, checked, validated
from batchgen.text.tokenizer import Tokenizer
from batchgen.types import Chunk, OutputRow, Receipt, Request, SamplingParams, TokenizedRequest
from batchgen.workers.worker import map_engine, to_prompts
from benchmarks.models import SIZE_124M
from benchmarks.workloads import log_normal_lengths

ROUNDS = 5
NEW_TOKENS = 64  # as in workload W1
CHARACTERS = 4  # of English, about so many a token


Clock = Callable[[], float]


def best(work: Callable[[], object], rounds: int = ROUNDS, clock: Clock = time.process_time) -> float:
    """Seconds of the fastest round, by default those of the processor: they are the same on a busy machine."""
    seconds = []
    for _ in range(rounds):
        start = clock()
        work()
        seconds.append(clock() - start)
    return min(seconds)


def line_through(small: tuple[float, float], large: tuple[float, float]) -> tuple[float, float]:
    """Of two points (size, seconds): seconds at size 0, and seconds for each unit."""
    slope = (large[1] - small[1]) / (large[0] - small[0])
    return max(small[1] - slope * small[0], 0.0), slope


# ---- rows such as W1's


def prompt_texts(n: int, seed: int = 0) -> list[str]:
    """English of Python's own help topics, as long as W1's prompts are in tokens."""
    text = " ".join(" ".join(topics.values()).split())
    rng = np.random.default_rng(seed)
    lengths = CHARACTERS * rng.permutation(log_normal_lengths(n))
    starts = rng.integers(0, len(text) - 4000, n)
    return [text[start : start + length] for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)]


def write_prompts(path: Path, n: int) -> Path:
    lines = (json.dumps({"prompt": text, "id": row}) + "\n" for row, text in enumerate(prompt_texts(n)))
    path.write_text("".join(lines), encoding="utf-8")
    return path


def output_rows(n: int) -> list[OutputRow]:
    """Rows with a prompt and 64 tokens of completion."""
    texts, more = prompt_texts(n), prompt_texts(n, seed=1)
    rows = []
    for row, (text, other) in enumerate(zip(texts, more, strict=True)):
        completion = (other * 40)[: CHARACTERS * NEW_TOKENS]
        rows.append(OutputRow(row, 0, str(row), text, completion, 66, NEW_TOKENS, "length", "ok", None, None))
    return rows


def receipt_of(chunk: int, path: Path, rows: int, sha256: str = "0" * 64) -> Receipt:
    return Receipt(chunk, str(path), sha256, rows, rows, rows, 0, 0, 92 * rows, NEW_TOKENS * rows)


# ---- what the parent does


def reading_costs(folder: Path, n: int = 20_000) -> dict[str, float]:
    """Of the input: one pass that counts and hashes, one that reads, one that tokenizes and validates too."""
    path = write_prompts(folder / "prompts.jsonl", n)
    directory = find_model("tales")
    job = checked(Job(path, folder / "none.parquet", "tales", SamplingParams(max_tokens=NEW_TOKENS)))
    model = Model(directory, load_manifest(directory))
    read = lambda: [0 for _ in read_requests(job.input, prompt_column="prompt", id_column="id", params=job.params)]  # noqa: E731
    return {
        "scan_s_per_row": best(lambda: scan_input(job.input)) / n,
        "read_s_per_row": best(read) / n,
        "validate_s_per_row": best(lambda: [0 for _ in validated(job, model)]) / n,
        "input_bytes_per_row": path.stat().st_size / n,
    }


def gpt2_validate_cost(n: int = 10_000) -> float:
    """Seconds to tokenize and validate a row with GPT-2's own vocabulary; its words come up often, as Python's do."""
    from tests.support.vocabulary import gpt2_vocabulary_dir

    tokenizer, params = Tokenizer.load(gpt2_vocabulary_dir()), SamplingParams(max_tokens=NEW_TOKENS)
    requests = [Request(row, f"prompts.jsonl:{row}", None, text, params) for row, text in enumerate(prompt_texts(n))]
    return best(lambda: [validate(request, tokenizer, 1024) for request in requests]) / n


def chunk_of(rows: int) -> Chunk:
    tokenizer = Tokenizer.load(find_model("tales"))
    params = SamplingParams(max_tokens=NEW_TOKENS)
    items = [
        TokenizedRequest(row, f"prompts.jsonl:{row + 1}", str(row), text, tuple(tokenizer.encode(text)), params)
        for row, text in enumerate(prompt_texts(rows))
    ]
    return Chunk(0, tuple(items))


def sending_costs() -> dict[str, float]:
    """Of a chunk on its way to a worker, and of looking which of many has come back."""
    chunk = chunk_of(512)
    futures: list[Future[int]] = [Future() for _ in range(1000)]
    futures[0].set_result(0)
    wait_s = best(lambda: wait(futures, timeout=0, return_when=FIRST_COMPLETED), 50)
    return {
        "pickle_s_per_row": best(lambda: pickle.dumps(chunk)) / 512,
        "payload_bytes_per_row": len(pickle.dumps(chunk)) / 512,
        "wait_s_per_slot": wait_s / 1000,
    }


def commit_costs(folder: Path, entries: Sequence[int] = (1_000, 10_000, 100_000)) -> dict[int, tuple[float, float]]:
    """Of Ledger.commit beside so many parts: seconds of the best and of the median."""
    out = folder / "commits.parquet"
    costs = {}
    with open_ledger(out) as ledger:
        ledger.settle({"chunk_rows": 1}, {}, restart=False)
        made = 0
        for n in entries:
            for i in range(made, n):
                (ledger.parts_directory / f"{i:08d}-{i:016x}.parquet").touch()
            os.sync()
            costs[n] = _commit_times(ledger, n, 200)
            made = n + 200
    return costs


def _commit_times(ledger: Ledger, first: int, n: int) -> tuple[float, float]:
    seconds = []
    for chunk in range(first, first + n):
        path = ledger.attempt / f"{chunk:08d}.parquet"
        path.write_bytes(b"a part, which is on disk before its rename")
        receipt = receipt_of(chunk, path, 1)
        start = time.perf_counter()
        ledger.commit(receipt)
        seconds.append(time.perf_counter() - start)
    return min(seconds), float(np.median(seconds))


def memory_costs(folder: Path, n: int = 50_000) -> dict[str, float]:
    """Bytes that the parent keeps of each committed chunk, and those it needs at once when it takes stock of parts."""
    parts = folder / "listed"
    parts.mkdir()
    for chunk in range(n):
        (parts / f"{chunk:08d}-{chunk:016x}.parquet").touch()
    with open_ledger(folder / "memory.parquet") as ledger:
        tracemalloc.start()
        for chunk in range(n):
            ledger._count(receipt_of(chunk, Path("part"), 1, f"{chunk:064x}"))
        kept = tracemalloc.get_traced_memory()[0]
        listed = sorted(parts.iterdir())  # as Ledger._collect_parts does
        held = tracemalloc.get_traced_memory()[0] - kept
        tracemalloc.stop()
    return {"ledger_bytes_per_chunk": kept / n, "listing_bytes_per_part": held / len(listed)}


def unlink_cost(folder: Path, n: int = 500) -> float:
    """Seconds to remove a file."""
    paths = [folder / f"file-{i}" for i in range(n)]
    for path in paths:
        path.write_bytes(bytes(50_000))
    seconds = []
    for path in paths:
        start = time.perf_counter()
        path.unlink()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


# ---- parts


def part_costs(folder: Path, sizes: Sequence[tuple[int, int]] = ((16, 400), (512, 40))) -> dict[str, float]:
    """Of parts of two sizes (rows, and how many parts): written as by a worker, taken stock of and merged."""
    points: dict[str, list[tuple[float, float]]] = {"write": [], "resume": [], "merge": []}
    bytes_per_row = 0.0
    for rows, parts in sizes:
        size, seconds = _parts_of(folder / f"{rows}.parquet", rows, parts)
        bytes_per_row = size / rows
        for name, value in seconds.items():
            points[name].append((rows, value))
    costs = {"part_bytes_per_row": bytes_per_row}
    for name, (small, large) in points.items():
        costs[f"{name}_s_per_part"], costs[f"{name}_s_per_row"] = line_through(small, large)
    return costs


def _parts_of(out: Path, rows: int, parts: int) -> tuple[int, dict[str, float]]:
    """The size of such a part, and seconds for each of `parts` of them."""
    written, schema, values = [], output_schema(), output_rows(rows)
    with open_ledger(out) as ledger:
        ledger.settle({"chunk_rows": rows}, {}, restart=False)
        for chunk in range(parts):
            path = ledger.attempt / f"{chunk:08d}.parquet"
            receipt = receipt_of(chunk, path, rows)
            start = time.perf_counter()
            sha256 = write_part(values, path, with_receipt(schema, receipt))
            written.append(time.perf_counter() - start)
            ledger.commit(replace(receipt, sha256=sha256))
        size = ledger.part(0).stat().st_size
        resume = best(ledger._collect_parts, clock=time.perf_counter)
        merge = best(lambda: merge_parts(ledger.parts(), out, schema, {}, rows * parts), clock=time.perf_counter)
    return size, {"write": min(written), "resume": resume / parts, "merge": merge / parts}


# ---- workers


def row_costs(engine: Engine, chunk: Chunk, sizes: Sequence[int], rounds: int) -> dict[int, float]:
    """Seconds a row of one worker, by rows a chunk."""
    tokenizer = Tokenizer.load(find_model("tales"))
    prompts = [prompt for item in chunk.items for prompt in to_prompts(item, tokenizer)]  # type: ignore[arg-type]
    spread = lambda n: [prompts[i] for i in np.linspace(0, len(prompts) - 1, n).astype(int)]  # noqa: E731
    return {n: best(lambda n=n: list(engine.generate(spread(n))), rounds) / n for n in sizes}


def tales_row_costs(sizes: Sequence[int] = (16, 64, 192, 512)) -> dict[int, float]:
    directory = find_model("tales")
    manifest = load_manifest(directory)
    n_ctx = manifest.config.n_ctx
    items = tuple(i for i in chunk_of(512).items if len(i.prompt_token_ids) + NEW_TOKENS <= n_ctx)  # type: ignore[union-attr]
    engine = map_engine(directory, manifest, Tokenizer.load(directory))
    return row_costs(engine, Chunk(0, items), [n for n in sizes if n <= 512], 2)


def random_row_costs(config: GPT2Config = SIZE_124M, sizes: Sequence[int] = (16, 64, 192)) -> dict[int, float]:
    """The same of 124M's shape with random weights (a minute)."""
    rng = np.random.default_rng(0)
    params = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
    lengths = rng.permutation(log_normal_lengths(max(sizes))).tolist()
    items = tuple(
        TokenizedRequest(row, "", None, "", tuple(rng.integers(0, 50_000, n).tolist()), params)
        for row, n in enumerate(lengths)
    )
    engine = Engine(
        nest(random_tensors(config), config.n_layer), config, eos_id=None, kv_bytes=default_kv_bytes(config)
    )
    return row_costs(engine, Chunk(0, items), sizes, 1)


def measure(large: bool) -> dict[str, object]:
    """All of it; large measures 124M's shape too, and a directory of 100,000 parts."""
    with tempfile.TemporaryDirectory(prefix="batchgen-costs-") as name, threadpool_limits(1, user_api="blas"):
        folder = Path(name)
        return {
            **reading_costs(folder),
            "gpt2_validate_s_per_row": gpt2_validate_cost(),
            **sending_costs(),
            **memory_costs(folder),
            "unlink_s": unlink_cost(folder),
            **part_costs(folder),
            "commit_s": commit_costs(folder, (1_000, 10_000, 100_000) if large else (1_000,)),
            "tales_s_per_row": tales_row_costs(),
            "shape_124m_s_per_row": random_row_costs() if large else {},
        }
