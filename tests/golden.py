"""Golden jobs: small jobs over every format and option, and the outcome of each, pinned.

`python -m tests.golden` runs them and compares with golden.json; `--write` writes that file. Of batchgen only its
command line, its files and the embedded model count, so that modules can move. The jobs share a process, and with it
their imports and workers; one that is killed has a process of its own.
"""

import argparse
import gzip
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from datetime import time as time_of_day
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.support.command import Done, batchgen

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).with_name("golden.json")
# A plan that no machine's memory or number of cores has a say in.
PLAN = ["--batch-size", "16", "--chunk-rows", "8", "--kv-memory", "256M"]
OF_THE_MACHINE = {  # not compared, of the metadata
    *("batchgen", "numpy", "model_hash", "regex", "python", "pyarrow")
}
STATUS = ["state", "exit_code", "rows", "rows_done", "ok", "rejected", "failed", "prompt_tokens", "completion_tokens"]


# ---- inputs

NOUNS = ["fox", "king", "giant", "daughter", "miller", "wolf", "tailor"]
PLACES = ["the forest", "a castle", "the sea", "a little house", "the mill"]
OPENINGS = ["Once upon a time there was a {}, who lived in {}", "The {} went out into {} and said,", "In {1} the {0}"]


def prompt(i: int) -> str:
    return OPENINGS[i % 3].format(NOUNS[i % 7], PLACES[i % 5])


def plain_rows(count: int) -> list[dict[str, Any]]:
    return [{"id": f"row-{i}", "prompt": prompt(i)} for i in range(count)]


def with_parameters(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that go on from the prompts of plain_rows, each with parameters of its own."""
    return [{"id": f"row-{i}", "prompt": prompt(i)} | row for i, row in enumerate(rows)]


def json_lines(rows: Sequence[Any]) -> bytes:
    """One line for each; bytes are a line as it is."""
    lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
    return b"".join(line + b"\n" for line in lines)


def delimited(header: Sequence[str], rows: Sequence[Sequence[object]], delimiter: str = ",") -> bytes:
    def quoted(value: object) -> str:
        text = "" if value is None else str(value)
        return '"' + text.replace('"', '""') + '"' if re.search(f'["\n{delimiter}]', text) else text

    return "".join(delimiter.join(map(quoted, row)) + "\n" for row in [header, *rows]).encode()


def write(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: write_files(folder, {name: data})


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def gzipped(data: bytes) -> bytes:
    """Stored in two members: every zlib writes the same bytes of that."""
    half = len(data) // 2
    return b"".join(gzip.compress(part, compresslevel=0, mtime=0) for part in (data[:half], data[half:]))


def zstd(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


def parquet_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=5)
    return sink.getvalue().to_pybytes()


def typed_table() -> pa.Table:
    """Prompts beside columns of many Arrow types, with nulls in each."""
    noon = datetime(2024, 2, 29, 12, 0, 0, 123456, tzinfo=UTC)
    structs = pa.struct([("x", pa.int32()), ("of", pa.list_(pa.struct([("y", pa.string())])))])
    columns = {
        "small": (pa.int8(), lambda i: i - 6),
        "large": (pa.uint64(), lambda i: 2**64 - 1 - i),
        "single": (pa.float32(), lambda i: float("nan") if i == 2 else np.float32(i / 3)),
        "double": (pa.float64(), lambda i: float("inf") if i == 4 else i / 7),
        "flag": (pa.bool_(), lambda i: i % 2 == 0),
        "day": (pa.date32(), lambda i: date(2024, 2, 20) + timedelta(i)),
        "when": (pa.timestamp("us", "UTC"), lambda i: noon + timedelta(hours=i)),
        "clock": (pa.time64("us"), lambda i: time_of_day(i, 30, 0, 5)),
        "lasting": (pa.duration("ms"), lambda i: timedelta(seconds=i)),
        "price": (pa.decimal128(12, 3), lambda i: Decimal(f"{i}.125")),
        "raw": (pa.binary(), lambda i: bytes([i, 255, 0])),
        "fixed": (pa.binary(2), lambda i: bytes([i, i])),
        "long": (pa.large_string(), lambda i: f"größer \U0001f98a {i}"),
        "kind": (pa.dictionary(pa.int32(), pa.string()), lambda i: NOUNS[i % 3]),
        "list": (pa.list_(pa.int32()), lambda i: [*range(i % 4), None]),
        "nested": (pa.list_(pa.list_(pa.string())), lambda i: [[], ["a", None], [str(i)]]),
        "record": (structs, lambda i: {"x": i, "of": [{"y": str(i)}, None]}),
        "map": (pa.map_(pa.string(), pa.int64()), lambda i: [("a", i), ("b", None)]),
    }
    every = {
        name: pa.array([None if i == 7 else of(i) for i in range(12)], kind) for name, (kind, of) in columns.items()
    }
    texts = pa.array([None if i == 9 else prompt(i) for i in range(12)], pa.string())
    numbers = pa.array([100 + i for i in range(12)], pa.int64())
    return pa.table({"prompt": texts, "id": numbers, **every, "nothing": pa.nulls(12)})


TYPED = [name for name in typed_table().column_names if name not in ("prompt", "id")]


def parameter_table() -> pa.Table:
    """Parameters as Parquet columns, with gaps; a whole number may be a float, as pandas has it."""
    return pa.table(
        {
            "prompt": pa.array([prompt(i) for i in range(12)], pa.large_string()),
            "id": [date(2024, 1, 1) + timedelta(i) for i in range(12)],
            "max_tokens": [float(4 + i) if i % 3 else None for i in range(12)],
            "temperature": [0.9 if i % 2 else None for i in range(12)],
            "seed": [i * 10**12 for i in range(12)],
            "stop": [[".", ","] if i % 4 == 1 else None for i in range(12)],
        }
    )


MIXED_KEEPS = [
    {"n1": 1, "mixed": 1, "half": 1, "text": "a", "list": [1, 2], "object": {"a": 1, "b": "x"}, "flag": True},
    {"n1": 2, "mixed": "1", "half": 0.5, "text": "ü\n", "list": [], "object": {"b": None, "a": 2}, "flag": None},
    {"n1": None, "mixed": [1, "x"], "half": None, "text": None, "list": [3], "object": None, "flag": False},
    {
        "n1": 2**62,
        "mixed": None,
        "half": -2,
        "text": "",
        "list": [None],
        "object": {"a": 3, "b": ""},
        "other": {"z": 1},
    },
    {"n1": -5, "mixed": 2**70, "half": 1e300, "text": "\u2028", "list": None, "other": {"y": [1.5, True, None]}},
]

PARAMETER_ROWS = [
    {"max_tokens": 5},
    {"max_tokens": 9.0, "min_tokens": 3},
    {"temperature": 0.9, "seed": 5},
    {"temperature": 1.2, "top_k": 5, "n": 2},
    {"temperature": 1.1, "top_p": 0.7},
    {"temperature": 1.0, "min_p": 0.1, "seed": 9223372036854775807},
    {"stop": [" the", "."]},
    {"stop": ",", "include_stop": True},
    {"stop_token_ids": [11, 13]},
    {"logit_bias": {"372": -100, "464": 2.5}},
    {"bad_words": ["the", "king"]},
    {"repetition_penalty": 1.3},
    {"presence_penalty": 1.0, "frequency_penalty": 0.5},
    {"echo": True},
    {"ignore_eos": True, "max_tokens": 24},
    {"stop_loops": True, "max_tokens": 24},
    {"max_tokens": None, "label": "no parameter", "temperature": None},
    {"id": 17, "n": 3, "temperature": 0.8},
]

BAD_ROWS = [
    {"id": "good", "prompt": prompt(0)},
    b'{"prompt": "cut off',
    b"no JSON",
    b"[1, 2]",
    {"id": "null", "prompt": None},
    {"id": "none"},
    {"id": "number", "prompt": 5},
    {"id": "empty", "prompt": ""},
    {"id": "long", "prompt": "a long way " * 300},
    {"id": "longer", "prompt": "a long way " * 3000},
    {"id": "no room", "prompt": prompt(1), "max_tokens": 600},
    {"id": "range", "prompt": prompt(2), "temperature": -1},
    {"id": "type", "prompt": prompt(2), "max_tokens": "many"},
    {"id": "typo", "prompt": prompt(2), "max_token": 8},
    {"id": "library", "prompt": prompt(2), "max_new_tokens": 8},
    {"id": "token", "prompt": prompt(2), "stop_token_ids": [70000]},
    {"id": "bias", "prompt": prompt(2), "logit_bias": {"70000": 1}},
    {"id": "stops", "prompt": prompt(2), "stop": ["x"] * 9},
    {"id": 1.5, "prompt": prompt(2)},
    b'{"prompt": "a", "prompt": "b"}',
    b'{"prompt": "a", "x": NaN}',
    b'{"prompt": "\xff"}',
    b'{"prompt": "\\ud800"}',
    b"",
    {"id": "last", "prompt": prompt(3)},
]

GOOD_RECORDS = [[1, prompt(0), None, None], [None, prompt(1), 5, '["."]'], [9, prompt(2), 4, "she"]]
BAD_RECORDS = [
    b"3,too few",
    b"4,too,many,for,it",
    b'5,a stray"quote,,',
    b'"6","a stray" quote,,',
    b"7,\xff,,",
    b"8,,,",
    b"",
    b"9,The king,many,",
]
BAD_CSV = delimited(["id", "prompt", "max_tokens", "stop"], GOOD_RECORDS) + b"\n".join(BAD_RECORDS)

BATCH = [
    {"prompt": prompt(0), "max_tokens": 12, "model": "gpt-3.5-turbo-instruct", "user": "me"},
    {"prompt": [prompt(1), prompt(2)], "n": 2, "temperature": 0.8, "seed": 3, "stop": "\n"},
    {"prompt": [464, 1492], "max_tokens": 4, "logprobs": 2},
    {"prompt": [[464, 1492], [257, 640, 13]], "max_tokens": 4},
    {"prompt": [[464, 1492], [70000]], "max_tokens": 4},
    {"prompt": prompt(3), "echo": True, "logit_bias": {"372": -100}, "presence_penalty": 0.5},
    {"prompt": prompt(4), "top_k": 4, "temperature": 0.9, "bad_words": "the"},
    {"prompt": "Once", "best_of": 4},
    {"prompt": "Once", "echo": True, "logprobs": 1},
    {"prompt": [prompt(6), "Été <|endoftext|>"], "echo": True, "logprobs": 2, "max_tokens": 0, "n": 2},
    {"prompt": "Once", "temperature": 3000},
    {"prompt": [prompt(5), ""]},
]


def batch_lines() -> list[Any]:
    """An OpenAI batch file: lines that are answered, and one of each kind that is refused."""
    head = {"method": "POST", "url": "/v1/completions"}
    lines: list[Any] = [{"custom_id": f"line-{i}", **head, "body": body} for i, body in enumerate(BATCH)]
    chat = {"custom_id": "chat", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": []}}
    return [*lines, chat, {"custom_id": "line-0", **head, "body": {"prompt": "Once"}}, b"no JSON"]


def hive_texts(folder: Path) -> None:
    rows = plain_rows(12)
    csv = delimited(["id", "prompt"], [list(row.values()) for row in rows[5:9]])
    parts = {
        "lang=de/year=2024/part-0.jsonl": json_lines(rows[9:]),
        "lang=en/year=2023/part-0.jsonl": json_lines(rows[:5]),
        "lang=en/year=2024/part-1.csv": csv,
    }
    write_files(folder / "data", {**parts, "_SUCCESS": b"", ".hidden.jsonl": b"not read"})


def hive_parquet(folder: Path) -> None:
    for i, name in enumerate(["lang=en", "lang=fr", "lang=de%20at"]):
        table = pa.table({"prompt": [prompt(i + j) for j in range(5)], "score": [i * j / 2 for j in range(5)]})
        write_files(folder / "data" / name, {"part-0.parquet": parquet_bytes(table)})


def resumable(folder: Path) -> None:
    """Long enough to be killed in the middle, in chunks of two rows."""
    rows = [row | {"temperature": 0.9} if i % 5 == 0 else row for i, row in enumerate(plain_rows(30))]
    write("rows.jsonl", json_lines(rows))(folder)


# ---- jobs


@dataclass(frozen=True, slots=True)
class Job:
    """One command in a folder of its own, whose inputs lie in in/; its output is the argument after -o."""

    inputs: Callable[[Path], None]
    arguments: list[str]
    output: str = "out.parquet"
    stdin: str | None = None  # the input's file that is given on standard input
    packed: bool = False  # bytes of a library's version are in the input, so its hash is not compared
    first: list[str] | None = None  # options that only a run before has, of the same output
    then: list[str] = field(default_factory=list)  # those that only the last has
    killed: bool = False  # the run before is ended by SIGKILL
    like: str | None = None  # the job whose golden outcome is this one's
    directory_there: bool = False  # a directory has the output's name already
    command: str = "generate"


def job(inputs: Callable[[Path], None], arguments: str | list[str], output: str = "out.parquet", **more: Any) -> Job:
    words = arguments.split() if isinstance(arguments, str) else arguments
    plan = [] if "--chunk-rows" in words else PLAN
    return Job(inputs, [*words, "-o", output, *plan, *([] if "--jobs" in words else ["--jobs", "1"])], output, **more)


PLAIN = write("rows.jsonl", json_lines(plain_rows(14)))
TWO_FILES = {
    "a.jsonl": json_lines(plain_rows(6)),
    "b.csv": delimited(["prompt"], [[prompt(i)] for i in range(6, 12)]),
}
OWN = write("rows.jsonl", json_lines(with_parameters(PARAMETER_ROWS)))
PARAMETERS_CSV = delimited(
    ["id", "prompt", "max_tokens", "temperature", "stop", "n", "extra"],
    [
        [f"{i:03}", f'"{prompt(i)}"\nsaid', 4 + i, [None, 0.8][i % 2], [None, '["a", "."]', ","][i % 3], None, " x "]
        for i in range(12)
    ],
)
LONG = write(
    "rows.jsonl",
    json_lines([{"prompt": " ".join(prompt(i + j) for j in range(30 + 5 * i))} for i in range(6)]),
)
KEEPS = write("rows.jsonl", json_lines([{"prompt": prompt(i)} | MIXED_KEEPS[i % 5] for i in range(10)]))
KEEP_KEYS = [
    word for key in ("n1", "mixed", "half", "text", "list", "object", "flag", "other") for word in ("--keep", key)
]
SPACES = write("rows.jsonl", json_lines([{"prompt": prompt(i) + " " * (i % 3)} for i in range(10)]))
EMPTY = write("rows.jsonl", json_lines([{"prompt": "" if i % 2 else prompt(i), "seed": i} for i in range(10)]))
OWN_COLUMNS = write(
    "rows.jsonl", json_lines([{"prompt": prompt(i), "n": "x", "seed": -i, "stop": 5} for i in range(10)])
)
RESUMABLE = ["in/rows.jsonl", "--max-tokens", "16", "--batch-size", "16", "--chunk-rows", "2", "--kv-memory", "256M"]

FORMATS = {
    "jsonl-to-parquet": job(PLAIN, "in/rows.jsonl --max-tokens 12 --jobs 2"),
    "jsonl-gz-to-jsonl": job(
        write("rows.jsonl.gz", gzipped(json_lines(plain_rows(20)))), "in/rows.jsonl.gz --max-tokens 8", "out.jsonl"
    ),
    "jsonl-zst-to-parquet": job(
        write("rows.jsonl.zst", zstd(json_lines(plain_rows(10)))), "in/rows.jsonl.zst --max-tokens 8", packed=True
    ),
    "csv-row-parameters": job(write("rows.csv", PARAMETERS_CSV), "in/rows.csv --keep extra --keep stop --seed 3"),
    "tsv-named-columns": job(
        write("rows.tsv", delimited(["key", "text"], [[i, prompt(i)] for i in range(10)], "\t")),
        "in/rows.tsv --max-tokens 8 --prompt-column text --id-column key",
        "out.jsonl",
    ),
    "parquet-row-parameters": job(
        write("rows.parquet", parquet_bytes(parameter_table())), "in/rows.parquet", packed=True
    ),
    "parquet-keep-types": job(
        write("rows.parquet", parquet_bytes(typed_table())),
        ["in/rows.parquet", "--max-tokens", "8", *(word for name in TYPED for word in ("--keep", name))],
        packed=True,
    ),
    "parquet-keep-types-to-jsonl": job(
        write("rows.parquet", parquet_bytes(typed_table())),
        ["in/rows.parquet", "--max-tokens", "8", *(word for name in TYPED for word in ("--keep", name))],
        "out.jsonl",
        packed=True,
    ),
    "hive-of-texts": job(hive_texts, "in/data --max-tokens 8 --keep lang --keep year"),
    "hive-of-parquet": job(hive_parquet, "in/data --max-tokens 8 --keep score --keep lang", packed=True),
    "glob-of-two-formats": job(lambda folder: write_files(folder, TWO_FILES), ["in/*", "--max-tokens", "8"]),
    "two-files-as-dataset": job(
        lambda folder: write_files(folder, TWO_FILES),
        "in/b.csv in/a.jsonl --max-tokens 8 --format dataset --jobs 2",
        "out",
    ),
    "stdin-jsonl-to-parquet": job(PLAIN, "- --max-tokens 8", stdin="rows.jsonl"),
    "stdin-gz-to-stdout": job(
        write("rows.jsonl.gz", gzipped(json_lines(plain_rows(10)))), "- --max-tokens 8", "-", stdin="rows.jsonl.gz"
    ),
    "stdin-csv-to-stdout": job(
        write("rows.csv", PARAMETERS_CSV), "- --input-format csv --keep extra", "-", stdin="rows.csv"
    ),
    "openai-to-jsonl": job(
        write("batch.jsonl", json_lines(batch_lines())), "in/batch.jsonl --max-tokens 8", "out.jsonl"
    ),
    "openai-to-parquet": job(write("batch.jsonl", json_lines(batch_lines())), "in/batch.jsonl --max-tokens 8"),
    "keep-json-types": job(KEEPS, ["in/rows.jsonl", "--max-tokens", "8", *KEEP_KEYS]),
    "keep-json-types-to-jsonl": job(KEEPS, ["in/rows.jsonl", "--max-tokens", "8", *KEEP_KEYS], "out.jsonl"),
    "zero-rows-to-parquet": job(write("rows.jsonl", b"\n  \n"), "in/rows.jsonl"),
    "zero-rows-to-jsonl": job(write("rows.csv", b"id,prompt\n"), "in/rows.csv", "out.jsonl"),
}
PARAMETERS = {
    "json-row-parameters": job(OWN, "in/rows.jsonl --max-tokens 10 --output-token-ids"),
    "no-row-params": job(OWN_COLUMNS, "in/rows.jsonl --max-tokens 8 --no-row-params --keep n --keep stop"),
    "sampled-n": job(PLAIN, "in/rows.jsonl --max-tokens 8 -n 3 --temperature 0.8 --top-k 40 --top-p 0.95 --seed 7"),
    "sampled-by-id": job(PLAIN, "in/rows.jsonl --max-tokens 8 -n 2 --temperature 0.8 --seed-by id"),
    "sampled-by-prompt": job(PLAIN, "in/rows.jsonl --max-tokens 8 -n 2 --temperature 0.8 --seed-by prompt"),
    "selected-shard": job(PLAIN, "in/rows.jsonl --max-tokens 4 --skip-rows 1 --limit 11 --sample 9 --shard 2/3"),
    "template": job(PLAIN, ["in/rows.jsonl", "--max-tokens", "4", "--template", "{id}:\\n{{{prompt}}}"]),
    "measured": job(PLAIN, "in/rows.jsonl --max-tokens 12 --mean-logprob --repetition"),
    "sampled-min-p": job(
        PLAIN, "in/rows.jsonl --max-tokens 12 --temperature 1.3 --min-p 0.05 --jobs 2 --no-share-prefixes"
    ),
    "int8-sampled-n": job(
        PLAIN,
        "in/rows.jsonl --precision int8 --max-tokens 8 -n 3 --temperature 0.8 --top-k 40 --top-p 0.95 --seed 7"
        " --logprobs 2",
    ),
    "int8-greedy-to-jsonl": job(PLAIN, "in/rows.jsonl --precision int8 --max-tokens 12 --logprobs 1", "out.jsonl"),
    "stop-strings": job(
        PLAIN, ["in/rows.jsonl", "--stop", ",", "--stop", " the", "--min-tokens", "2", "--include-stop"]
    ),
    "stop-token-ids": job(PLAIN, "in/rows.jsonl --max-tokens 24 --stop-token-ids 11,13 --output-token-ids"),
    "stop-loops": job(PLAIN, "in/rows.jsonl --max-tokens 40 --stop-loops --ignore-eos"),
    "logit-bias-bad-words": job(
        PLAIN, "in/rows.jsonl --max-tokens 12 --logit-bias 372=-100,464=2.5 --bad-words the --bad-words king"
    ),
    "penalties": job(
        PLAIN,
        "in/rows.jsonl --max-tokens 16 --repetition-penalty 1.3 --presence-penalty 0.7 --frequency-penalty 0.4",
    ),
    "repeats": job(
        PLAIN, "in/rows.jsonl --max-tokens 32 --no-repeat-ngram-size 2 --dry-multiplier 0.8 --dry-allowed-length 1"
    ),
    "cuts": job(
        PLAIN,
        "in/rows.jsonl --max-tokens 16 --temperature 1.2 --seed 3 -n 2 --top-n-sigma 2 --typical-p 0.9"
        " --xtc-probability 0.5 --xtc-threshold 0.05",
    ),
    "allowed-token-ids": job(PLAIN, "in/rows.jsonl --max-tokens 8 --allowed-token-ids 11,13,300,301,302,303,304"),
    "choices": job(
        PLAIN,
        ["in/rows.jsonl", "--logprobs", "2", "--choices", " happy", "--choices", " happy end", "--choices", " sad"],
    ),
    "regex": job(PLAIN, ["in/rows.jsonl", "--regex", " (a|the) [a-z]{3,8}(, [a-z]+)*\\.", "--temperature", "1"]),
    "json-schema": job(
        PLAIN,
        [
            "in/rows.jsonl",
            "--json-schema",
            '{"type": "object", "properties": {"name": {"type": "string", "maxLength": 9}}, '
            '"required": ["name"], "additionalProperties": false}',
        ],
    ),
    "beams": job(PLAIN, "in/rows.jsonl --max-tokens 12 --num-beams 4 -n 2 --length-penalty 0.5 --output-token-ids"),
    "int8-beams": job(PLAIN, "in/rows.jsonl --max-tokens 12 --num-beams 3 --logprobs 1 --precision int8"),
    "healed": job(
        write("rows.jsonl", json_lines([{"id": str(i), "prompt": prompt(i)[: 20 + i]} for i in range(14)])),
        "in/rows.jsonl --max-tokens 8 --heal --temperature 0.7 -n 2",
    ),
    "logprobs-token-ids": job(
        write("rows.jsonl", json_lines(plain_rows(10))), "in/rows.jsonl --max-tokens 8 --logprobs 2 --output-token-ids"
    ),
    "row-logprobs-to-jsonl": job(
        write("rows.jsonl", json_lines(with_parameters([{}, {"logprobs": 1}, {"logprobs": 0}] * 4))),
        "in/rows.jsonl --max-tokens 8 --temperature 0.9 --seed 2",
        "out.jsonl",
    ),
    "truncate-left": job(LONG, "in/rows.jsonl --max-tokens 8 --on-too-long truncate-left"),
    "shorten": job(LONG, "in/rows.jsonl --max-tokens 120 --on-too-long shorten --stop ."),
    "trim-echo": job(SPACES, "in/rows.jsonl --max-tokens 8 --trim --echo"),
    "empty-unconditional": job(EMPTY, "in/rows.jsonl --max-tokens 12 --temperature 0.8 --empty-prompt unconditional"),
    "rejects": job(write("rows.jsonl", json_lines(BAD_ROWS)), "in/rows.jsonl --max-tokens 8"),
    "rejects-csv-to-jsonl": job(write("rows.csv", BAD_CSV), "in/rows.csv --max-tokens 8", "out.jsonl"),
    "rejects-all": job(write("rows.jsonl", json_lines([b"no JSON"] * 10)), "in/rows.jsonl"),
}
LONG_TEXT = " ".join(map(prompt, range(60)))
TEXTS = [prompt(i) for i in range(12)] + ["", None, "x", " ", "Été \U0001f98a", LONG_TEXT, "<|endoftext|>The king"]
TEXT_LINES = write("rows.jsonl", json_lines([{"id": i, "text": text} for i, text in enumerate(TEXTS)]))
PAIRS = [(prompt(i), f" and {PLACES[i % 5]}.") for i in range(10)]
PAIRS += [("The king ", "said"), ("", "Once"), ("The ki", "ng"), ("The king", ""), (LONG_TEXT, " said"), (None, "a")]
PAIR_LINES = [{"prompt": before, "completion": after} for before, after in PAIRS]
CHOICES = [[f" {PLACES[(i + j) % 5]}" for j in range(2 + i % 3)] for i in range(12)]
ANSWERS = [[0, "B", " the sea", None][i % 4] if i != 6 else 9 for i in range(12)]
CHOICE_TABLE = pa.table(
    {
        "prompt": [f"{prompt(0)} {prompt(i % 3)} He saw" for i in range(12)],
        "choices": pa.array([None if i == 7 else CHOICES[i] for i in range(12)], pa.large_list(pa.string())),
        "answer": [None if answer is None else str(answer) for answer in ANSWERS],
    }
)
CHOICE_ROWS = write("rows.parquet", parquet_bytes(CHOICE_TABLE))
BY_CHOICES = "in/rows.parquet --choices-column choices --answer-column answer"
SCORES = {
    "score-texts": job(TEXT_LINES, "in/rows.jsonl --per-token", command="score"),
    "score-texts-stride-to-jsonl": job(
        TEXT_LINES, "in/rows.jsonl --stride 100 --first-token given --jobs 2", "out.jsonl", command="score"
    ),
    "score-completions": job(
        write("rows.csv", delimited(["prompt", "completion"], PAIRS)),
        "in/rows.csv --completion-column completion --per-token",
        command="score",
    ),
    "score-completions-truncate-left": job(
        write("rows.jsonl", json_lines(PAIR_LINES)),
        "in/rows.jsonl --completion-column completion --on-too-long truncate-left --no-share-prefixes",
        "out.jsonl",
        command="score",
    ),
    "score-choices": job(CHOICE_ROWS, BY_CHOICES, packed=True, command="score"),
    "int8-score-choices": job(CHOICE_ROWS, f"{BY_CHOICES} --per-token --precision int8", packed=True, command="score"),
    "embed-texts": job(TEXT_LINES, "in/rows.jsonl", command="embed"),
    "int8-embed-texts": job(
        TEXT_LINES,
        "in/rows.jsonl --layer 2 --pool last --precision int8 --on-too-long truncate-left --empty-prompt unconditional",
        command="embed",
    ),
    "prompt-logprobs": job(PLAIN, "in/rows.jsonl --max-tokens 4 --prompt-logprobs 2 --logprobs 1"),
}
RUNS = {
    "uninterrupted": job(resumable, RESUMABLE),
    "resumed-after-kill": job(resumable, RESUMABLE, first=[], killed=True, like="uninterrupted"),
    "resumed-after-time-limit": job(resumable, RESUMABLE, first=["--time-limit", "0.01s"], like="uninterrupted"),
    "restarted-with-other-seed": job(
        resumable,
        [*RESUMABLE, "--temperature", "0.9"],
        first=["--time-limit", "0.01s"],
        then=["--seed", "5", "--restart"],
    ),
    "finished-again": job(PLAIN, "in/rows.jsonl --max-tokens 8", first=[]),
    "retry-failed-of-none": job(PLAIN, "in/rows.jsonl --max-tokens 8", first=[], then=["--retry-failed"]),
    "no-status": job(PLAIN, "in/rows.jsonl --max-tokens 8 --no-status --quiet --log-json", "out.jsonl"),
}
ERRORS = {
    "error-missing-file": job(PLAIN, "in/none.jsonl"),
    "error-wrong-prompt-column": job(PLAIN, "in/rows.jsonl --prompt-column text"),
    "error-wrong-keep": job(PLAIN, "in/rows.jsonl --keep label"),
    "error-unknown-output-suffix": job(PLAIN, "in/rows.jsonl", "out.txt"),
    "error-unknown-input-suffix": job(write("rows.md", b"Once\n"), "in/rows.md"),
    "error-output-is-directory": job(PLAIN, "in/rows.jsonl", directory_there=True),
    "error-truncated-gzip": job(
        write("rows.jsonl.gz", gzipped(json_lines(plain_rows(10)))[:-30]), "in/rows.jsonl.gz --max-tokens 8"
    ),
    "error-resumed-with-other-seed": job(resumable, RESUMABLE, first=["--time-limit", "0.01s"], then=["--seed", "5"]),
    "error-time-limit": job(resumable, [*RESUMABLE, "--time-limit", "0.01s"]),
    "error-parameter-out-of-range": job(PLAIN, "in/rows.jsonl --temperature -1"),
    "error-unknown-model": job(PLAIN, "in/rows.jsonl --model nobody"),
    "error-same-file-twice": job(PLAIN, "in/rows.jsonl in/rows.jsonl"),
    "error-scheduler-without-dask": job(PLAIN, "in/rows.jsonl --scheduler tcp://127.0.0.1:1"),
    "error-misspelt-parquet-parameter": job(
        write("rows.parquet", parquet_bytes(pa.table({"prompt": ["Once"], "max_token": [3]}))), "in/rows.parquet"
    ),
}
JOBS = {**FORMATS, **PARAMETERS, **SCORES, **RUNS, **ERRORS}


# ---- running one


def run_job(job: Job, folder: Path) -> dict[str, Any]:
    """Run a job in an empty folder; what came of it, as golden.json has it."""
    (folder / "in").mkdir()
    job.inputs(folder / "in")
    if job.directory_there:
        (folder / job.output).mkdir()
    if job.killed:
        kill_midway(job, folder)
    elif job.first is not None:
        run_command(job, folder, job.first)
    outcome = record(job, folder, run_command(job, folder, job.then))
    return json.loads(json.dumps(outcome))  # tuples become lists, as they are in the file


def run_command(job: Job, folder: Path, options: list[str]) -> Done:
    stdin = folder / "in" / job.stdin if job.stdin else os.devnull
    arguments = [job.command, *job.arguments, *options]
    return batchgen(*arguments, folder=folder, stdin=stdin, environment=without_models(folder))


def without_models(folder: Path) -> dict[str, str]:
    """The environment, with the models of whoever runs this hidden."""
    places = {"BATCHGEN_MODELS": folder / "no-models", "XDG_CACHE_HOME": folder / "no-cache", "PYTHONPATH": ROOT}
    return os.environ | {name: str(path) for name, path in places.items()}


def kill_midway(job: Job, folder: Path) -> None:
    """Run a job until two of its chunks are done, and kill it with all of its workers."""
    process = subprocess.Popen(
        [sys.executable, "-m", "batchgen", job.command, *job.arguments, *(job.first or [])],
        cwd=folder,
        env=without_models(folder),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # so that a kill finds its workers, and not this process
    )
    parts = folder / f"{job.output}.batchgen" / "parts"
    until = time.monotonic() + 300
    while len(list(parts.glob("*.parquet"))) < 2:
        if process.poll() is not None or time.monotonic() > until:
            raise RuntimeError("the run ended, or hung, before two of its parts were there")
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if (folder / job.output).exists():
        raise RuntimeError("the run was killed too late; give it more rows")


# ---- what came of it


def record(job: Job, folder: Path, done: Done) -> dict[str, Any]:
    outcome: dict[str, Any] = {"exit_code": done.returncode}
    if done.returncode not in (0, 3, 4):
        outcome["stderr_lines"] = len(done.stderr.splitlines())
    output = folder / job.output
    if job.output == "-":
        outcome |= record_json_lines(done.stdout)
    elif output.suffix == ".jsonl" and output.is_file():
        outcome |= record_json_lines(output.read_bytes())
    elif output.is_file():
        outcome |= record_table(pq.ParquetFile(output).read(), job.packed)
    elif (output / "_SUCCESS").is_file():
        outcome |= record_dataset(output, job.packed)
    if (status := folder / f"{job.output}.status.json").exists():
        values = json.loads(status.read_bytes())
        outcome["status"] = {key: values[key] for key in STATUS}
        if job.killed and not 0 < values["rows_resumed"] < values["rows"]:
            raise RuntimeError(f"{values['rows_resumed']} rows were resumed, so the kill showed nothing")
    outcome["files"] = files_left(folder)
    return outcome if job.first is None else without_tokens(outcome)


def without_tokens(outcome: dict[str, Any]) -> dict[str, Any]:
    """The same without the counts that are of one run, and not of those before it."""
    status = {key: value for key, value in outcome.get("status", {}).items() if not key.endswith("_tokens")}
    return outcome | ({"status": status} if status else {})


def files_left(folder: Path) -> list[str]:
    """Everything but the inputs; a part's name without the hash of its bytes, which pyarrow's version has a say in."""
    paths = (path for path in folder.rglob("*") if path.relative_to(folder).parts[0] != "in")
    names = (path.relative_to(folder).as_posix() + "/" * path.is_dir() for path in paths)
    return sorted(re.sub(r"-[0-9a-f]{16}\.parquet$", "-*.parquet", name) for name in names)


def record_table(table: pa.Table, packed: bool, metadata: bytes | None = None) -> dict[str, Any]:
    columns = [(of.name, arrow_type(of), table.column(i).to_pylist()) for i, of in enumerate(table.schema)]
    made = json.loads(metadata or table.schema.metadata[b"batchgen"])
    compared = {key: value for key, value in made.items() if key not in OF_THE_MACHINE}
    return {
        "rows": table.num_rows,
        **record_columns(columns),
        "error_texts": next(texts(values) for name, _, values in columns if name == "error"),
        "metadata_keys": sorted(made),
        "metadata": compared | ({"input": "not compared"} if packed else {}),
    }


def record_dataset(folder: Path, packed: bool) -> dict[str, Any]:
    tables = [pq.ParquetFile(path).read() for path in sorted(folder.glob("*.parquet"))]
    whole = pa.concat_tables([table.replace_schema_metadata(None) for table in tables])
    parts = {"part_rows": [table.num_rows for table in tables]}
    return parts | record_table(whole, packed, (folder / "_SUCCESS").read_bytes())


def record_json_lines(data: bytes) -> dict[str, Any]:
    rows = [json.loads(line) for line in data.splitlines()]
    if rows and "custom_id" in rows[0]:
        return {"rows": len(rows), "error_texts": [take_error(row) for row in rows], "lines": rows}
    keys = list(dict.fromkeys(key for row in rows for key in row))
    if any(list(row) != keys for row in rows):
        raise RuntimeError(f"lines differ in their keys: {keys}")
    columns = {key: [row[key] for row in rows] for key in keys}
    recorded = record_columns([(name, "JSON", values) for name, values in columns.items()])
    return {"rows": len(rows), **recorded, "error_texts": texts(columns.get("error", []))}


def take_error(line: dict[str, Any]) -> str | None:
    """The message of an OpenAI line's error, which is taken out of the line."""
    error = line["error"] or (line["response"] or {}).get("body", {}).get("error")
    return error.pop("message") if error else None


def arrow_type(of: pa.Field) -> str:
    """Type, whether it can be null, and what batchgen says of the column in its field's metadata."""
    metadata = {key.decode(): value.decode() for key, value in (of.metadata or {}).items() if key[:7] != b"PARQUET"}
    return f"{of.type}{'' if of.nullable else ' not null'}{f' {metadata}' if metadata else ''}"


def record_columns(columns: list[tuple[str, str, list[Any]]]) -> dict[str, Any]:
    """Name, type and hash of each: log-probabilities too are the same bits on every processor."""
    hashes = []
    for name, kind, values in columns:
        if name == "error":  # its wording may change
            values = [value is not None for value in values]
        hashes.append([name, kind, digest(values)])
    return {"columns": hashes}


def digest(values: list[Any]) -> str:
    """SHA-256 of the values as JSON; what JSON has no word for is written with its Python type."""
    text = json.dumps(
        values, sort_keys=True, separators=(",", ":"), default=lambda value: f"{type(value).__name__} {value}"
    )
    return hashlib.sha256(text.encode()).hexdigest()


def texts(values: list[str | None]) -> list[str]:
    return [value for value in values if value is not None]


# ---- comparing


def differences(expected: Any, actual: Any, where: str = "") -> list[str]:
    """Where two outcomes differ, a line for each place."""
    if type(expected) is not type(actual):
        return [f"{where}: {actual!r}, was {expected!r}"]
    if isinstance(expected, dict):
        lines = [f"{where}/{key}: is there now" for key in actual if key not in expected]
        lines += [f"{where}/{key}: is gone" for key in expected if key not in actual]
        for key in (key for key in expected if key in actual):
            lines += differences(expected[key], actual[key], f"{where}/{key}")
        return lines
    if isinstance(expected, list) and len(expected) == len(actual):
        pairs = enumerate(zip(expected, actual, strict=True))
        return [line for i, (old, new) in pairs for line in differences(old, new, f"{where}[{named(old, i)}]")]
    return [] if expected == actual else [f"{where}: {actual!r}, was {expected!r}"]


def named(item: Any, i: int) -> str:
    """How the place of a list's item is said: a column by its name."""
    return item[0] if isinstance(item, list) and item and isinstance(item[0], str) else str(i)


def read_golden() -> dict[str, Any]:
    return json.loads(GOLDEN.read_bytes())


def expected_outcome(name: str, golden: dict[str, Any]) -> dict[str, Any]:
    like = JOBS[name].like
    return without_tokens(golden[like]) if like else golden[name]


def compare(name: str, outcome: dict[str, Any], golden: dict[str, Any]) -> list[str]:
    if name not in golden and not JOBS[name].like:
        return ["not in golden.json"]
    return differences(expected_outcome(name, golden), outcome)


# ---- the command


def laid_out(value: Any, indent: int = 0) -> str:
    """JSON that is easy to review: what fits in a line is one, and short items stand many to a line."""
    short = json.dumps(value, ensure_ascii=False)
    if len(short) + indent <= 120 or not isinstance(value, dict | list) or not value:
        return short
    space = "\n" + " " * (indent + 1)
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    pairs = value.items() if isinstance(value, dict) else ((None, item) for item in value)
    items = [("" if key is None else f"{json.dumps(key)}: ") + laid_out(item, indent + 1) for key, item in pairs]
    separators = [space]
    length = 0
    for item, after in pairwise(items):
        length += len(item) + 2
        fits = max(len(item), len(after)) <= 32 and indent + length + len(after) < 118
        separators.append(" " if fits else space)
        length = length if fits else 0
    commas = [""] + [","] * (len(items) - 1)
    body = "".join(map("".join, zip(commas, separators, items, strict=True)))
    return f"{opening}{body}{space[:-1]}{closing}"


def run_named(name: str) -> tuple[dict[str, Any], float]:
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="golden-") as folder:
        return run_job(JOBS[name], Path(folder)), time.monotonic() - began


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__)
    parser.add_argument("--write", action="store_true", help="Write golden.json instead of comparing with it.")
    parser.add_argument("names", nargs="*", metavar="JOB", help="Only these; otherwise all.")
    asked = parser.parse_args()
    golden = read_golden() if GOLDEN.exists() else {}
    written, different = {}, 0
    for name in asked.names or JOBS:
        outcome, seconds = run_named(name)
        written |= {} if JOBS[name].like else {name: outcome}
        lines = [] if asked.write else compare(name, outcome, golden)
        different += bool(lines)
        word = "written" if asked.write else "DIFFERS" if lines else "same"
        rows = outcome.get("rows", "-")
        sys.stdout.write(f"{name:<34}{outcome['exit_code']:>4}{rows:>6}{seconds:>7.1f} s  {word}\n")
        sys.stdout.writelines(f"    {line}\n" for line in lines)
        sys.stdout.flush()
    if asked.write:
        kept = {name: outcome for name, outcome in golden.items() if asked.names and name in JOBS}
        GOLDEN.write_text(laid_out(kept | written) + "\n", encoding="utf-8")
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
