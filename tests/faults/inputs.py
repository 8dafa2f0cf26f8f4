"""Inputs, models and output paths that cannot be used, and a million fuzzed lines."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from batchgen.output.schema import Columns
from tests.faults.bench import ROOT, Bench, Run


def make_mistakes(bench: Bench) -> str:
    """Mistakes with input and output, all with a damaged model: the error names the mistake, not the damage."""
    folder = bench.new_folder()
    model = Path(shutil.copytree(bench.model, folder / "damaged"))
    (model / "manifest.json").write_text("{")
    (folder / "folder.parquet").mkdir()
    (folder / "link.parquet").symlink_to("elsewhere")
    (folder / "numbers.jsonl").write_text('{"text": "a"}\n')
    pq.write_table(pa.table({"prompt": [1, 2]}), folder / "numbers.parquet")
    good = bench.prompts
    mistakes = [
        (folder / "missing.jsonl", "o.parquet", "no such file"),
        (folder / "numbers.jsonl", "o.parquet", "no key 'prompt'"),
        (folder / "numbers.parquet", "o.parquet", "int64"),
        (good, "folder.parquet", "a directory"),
        (good, "link.parquet", "a symbolic link"),
        (good, "missing/o.parquet", "no such folder"),
        (folder / "numbers.jsonl", "numbers.jsonl", "no key|the input"),
        (good, "o.csv", "the suffix '.csv'"),
    ]
    for prompts, name, reason in mistakes:
        before = _contents(folder)
        run = bench.start(folder / name, "--model", model, prompts=prompts)
        assert run.finish() in (1, 2), run.said
        bench.assert_one_line(run)
        assert re.search(reason, run.said[0]), run.said
        assert _contents(folder) == before, "something was written"
    return f"{len(mistakes)} mistakes: one line each, nothing written"


def _contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def damage_shards(bench: Bench) -> str:
    """Shards that are truncated or have one byte changed, at random."""
    rng = random.Random(5)
    times = 60 if bench.full else 2
    model = Path(shutil.copytree(bench.model, bench.new_folder() / "model"))
    for i in range(times):
        shard = rng.choice(sorted(model.glob("*.npy")))
        intact = shard.read_bytes()
        damaged = bytearray(intact)
        if i % 2:
            damaged[rng.randrange(len(damaged))] ^= rng.randrange(1, 256)
        else:
            del damaged[rng.randrange(len(damaged)) :]
        shard.unlink()
        shard.write_bytes(damaged)
        out = bench.new_output()
        run = bench.start(out, "--model", model)
        assert run.finish() == 1, run.said
        bench.assert_one_line(run)
        assert shard.name in run.said[0], run.said
        assert os.listdir(out.parent) == [], "something was written"
        shard.unlink()
        shard.write_bytes(intact)
    return f"{times} damages: exit 1 with one line that names the shard, nothing written"


def read_no_rows(bench: Bench) -> str:
    """An empty file, and a file of blank lines."""
    for text in ("", "\n \r\n\t\n\n"):
        path = bench.new_folder() / "prompts.jsonl"
        path.write_text(text)
        out = bench.new_output()
        run = bench.start(out, prompts=path)
        assert run.finish() == 0, run.said
        assert pq.read_table(out).num_rows == 0
        assert pq.read_schema(out).remove_metadata() == Columns().schema()
    return "2 inputs: exit 0, an empty Parquet file of the full schema"


def keep_strange_values(bench: Bench) -> str:
    """What Python or JSON cannot hold, in kept columns: only the row with such a value is rejected, if any."""
    folder = bench.new_folder()
    texts = pa.array([b"a", b"\xff", b"b"]).cast(pa.string(), safe=False)
    times = pa.array([2**62, 0, None], pa.timestamp("us", "Nowhere/Land"))
    pq.write_table(pa.table({"prompt": ["a", "b", "c"], "text": texts, "time": times}), folder / "p.parquet")
    deep = '{"a":' * 970 + "1" + "}" * 970
    asking = '{"prompt": "b", "text": "x", "time": 1, "log\\u0070robs": 0}'
    (folder / "p.jsonl").write_text(f'{{"prompt": "a", "text": {deep}}}\n{asking}\n')
    runs = [
        ("p.parquet", ".parquet", ["ok", "ok", "ok"]),
        ("p.parquet", ".jsonl", ["ok", "rejected", "ok"]),
        ("p.jsonl", ".jsonl", ["rejected", "ok"]),
    ]
    for name, suffix, expected in runs:
        out = bench.new_output(suffix=suffix)
        run = bench.start(out, "--keep", "text", "--keep", "time", prompts=folder / name)
        assert run.finish() == (3 if "rejected" in expected else 0), run.said
        if suffix == ".parquet":
            assert pq.ParquetFile(out).read(["status"])["status"].to_pylist() == expected
            continue
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert [row["status"] for row in rows] == expected
        assert name != "p.jsonl" or rows[1]["logprobs"], "no log-probabilities"
    return f"{len(runs)} runs: no traceback, rejected rows only in JSON lines"


def edit_outputs(bench: Bench) -> str:
    """An output with fewer rows or with each twice: a retry refuses it, and it stays as it is."""
    out = bench.new_output()
    assert bench.start(out).finish() == 0
    whole = pq.ParquetFile(out).read()
    for table in (whole.slice(1), pa.concat_tables([whole, whole])):
        pq.write_table(table, out)
        before = out.read_bytes()
        run = bench.start(out, "--retry-failed")
        assert run.finish() == 1, run.said
        assert "input rows, and its metadata says" in run.said[-1], run.said
        assert out.read_bytes() == before
    return "2 retries: refused"


def repeat_ids(bench: Bench) -> str:
    """Every id twice: a row's key is its number."""
    lines = bench.prompts.read_text().splitlines()
    path = bench.new_folder() / "prompts.jsonl"
    path.write_text("".join(line + "\n" for line in (*lines, *lines)))
    out = bench.new_output()
    run = bench.start(out, "--temperature", "0", prompts=path)
    assert run.finish() == 0, run.said
    rows = pq.read_table(out).to_pylist()
    assert [row["row"] for row in rows] == list(range(2 * len(lines)))
    halves = rows[: len(lines)], rows[len(lines) :]
    assert all({**a, "row": b["row"]} == b for a, b in zip(*halves, strict=True))
    return f"{len(lines)} ids twice: {len(rows)} rows"


def run_download_tests(bench: Bench) -> str:
    """The tests of downloading: their server does all this."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/test_download.py"]
    done = subprocess.run(command, cwd=ROOT, env=bench.environment, capture_output=True, text=True, timeout=600)
    last = (done.stdout.splitlines() or [done.stderr])[-1]
    assert done.returncode == 0, last
    return f"tests/test_download.py: {last}"


# ---- lines


INTERESTING = [
    b"\0",
    b"\xff",
    b"\xed\xa0\x80",
    b"\\ud800",
    b"\\u0000",
    b"\xef\xbb\xbf",
    b"\xe2\x80\xa8",
    b"\xc2\x85",
    b"\r",
    b"\x0b",
    b"\x1c",
    b"NaN",
    b"1e999",
    b"-0",
    b'"',
    b"{",
    b"[",
    b"}",
    b",",
    b":",
    b'"prompt":',
    b'"id":',
    b"null",
    b"9" * 400,
]
LARGE = [b"[" * 100_000, b'{"prompt": "' + b"x" * 20_000_000 + b'"}', b'{"prompt": ' + b"9" * 5000 + b"}"]


def fuzz_lines(bench: Bench) -> str:
    """Good lines with bytes changed, inserted and removed; the model is a stub."""
    n = 1_000_000 if bench.full else 5_000
    path = bench.new_folder() / "prompts.jsonl"
    with open(path, "wb") as file:
        file.writelines(line + b"\n" for line in _fuzz(random.Random(7), n))
    places = _row_places(path)
    out = bench.new_output()
    run: Run = bench.start(out, "--chunk-rows", "512", prompts=path, driver="run_stub")
    assert run.finish(3600) == 3, run.said
    counts: Counter[str] = Counter()
    row = 0
    for batch in pq.ParquetFile(out).iter_batches(columns=["row", "status", "error", "prompt", "completion"]):
        for found in batch.to_pylist():
            assert found["row"] == row, f"row {found['row']} instead of {row}"
            counts[found["status"]] += 1
            rejected = found["status"] == "rejected"
            assert rejected == (found["completion"] is None)
            assert not rejected or found["error"].startswith(f"{path.name}:{places[row]}: "), found["error"]
            row += 1
    assert row == len(places), f"{len(places)} lines are rows, and the output has {row}"
    assert counts.keys() == {"ok", "rejected"}, counts
    ok, rejected = counts["ok"], counts["rejected"]
    return f"{n:,} lines, {len(places):,} of them rows: {ok:,} ok + {rejected:,} rejected; {run.seconds:.0f} s"


def _row_places(path: Path) -> list[int]:
    """The numbers of the lines that are not blank, counted in another way than the reader counts."""
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    return [number for number, line in enumerate(lines, 1) if not re.fullmatch(rb"[ \t\r]*", line)]


def _fuzz(rng: random.Random, n: int) -> Iterator[bytes]:
    yield from LARGE
    for i in range(n - len(LARGE)):
        line = bytearray(json.dumps({"prompt": "abc é" * rng.randrange(5), "id": i}, ensure_ascii=bool(i % 2)).encode())
        for _ in range(rng.randrange(4)):
            at, what = rng.randrange(len(line) + 1), rng.randrange(5)
            if what == 0:
                line[at:at] = rng.choice(INTERESTING)
            elif what == 1:
                line[at : at + rng.choice((1, 4))] = rng.randbytes(1)
            elif what == 2:
                del line[at : at + rng.choice((1, 3, 20))]
            elif what == 3 and at < len(line):
                line[at] ^= 1 << rng.randrange(8)
            else:
                line[at:at] = line[: rng.randrange(20)]
        yield bytes(line) if rng.random() > 0.01 else rng.choice((b"", b" \t", b"\r"))
