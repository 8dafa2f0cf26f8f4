"""Write prompts as programs and people do, and read them: python -m tests.support.fuzz_inputs [N] [SEED] [KIND ...].

The law: what was written whole is read whole; of any other file, the rows are those that pandas, pyarrow and DuckDB
read, or a row is rejected.
"""

import csv
import io
import json
import random
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from batchgen.errors import InputError
from batchgen.input.prompts import Prompts
from batchgen.job import InputOptions
from batchgen.types import Rejected, Request, SamplingParams

DUCKDB_EVERY = 8  # its start costs more than all the rest
PIECES = (
    *(
        "Once",
        "the king",
        "a",
        " ",
        "  ",
        ",",
        ";",
        "|",
        ", ",
        "\t",
        '"',
        '""',
        ' "',
        '" ',
        "'",
        "\\",
        '\\"',
        "\n",
        "\r\n",
    ),
    *(
        "\r",
        "\u2028",
        "\xa0",
        "\v",
        "\x85",
        "é",
        "名",
        "😀",
        "\ufeff",
        "NA",
        "null",
        "NaN",
        "7",
        "0.5",
        "#",
        "=",
        "[",
        "]",
    ),
    *('"I will go away.', 'And you."', '"It is I."', "<|endoftext|>", "\\n", "{", "}", "-", "[", "]"),
)
EDITS = (b'"', b",", b";", b"\t", b"\n", b"\r", b"\r\n", b"\0", b"\xff", b"\\", b"}", b"\n\n", b"[", b"\xe9")
MARK = "\ufeff"
PARAMS = SamplingParams(max_tokens=8)

Row = tuple[str | None, str | None]
Read = Callable[[Path], list[Row]]


@dataclass(frozen=True)
class Trial:
    """A file to read, and what its rows are."""

    name: str
    data: bytes
    whole: list[Row] | None = None  # what was written, if no row may be rejected
    oracles: dict[str, Read] = field(default_factory=dict)
    options: dict[str, str] = field(default_factory=dict)
    stops: list[tuple[str, ...]] | None = None


def check(trial: Trial, folder: Path) -> str:
    """What became of the file: read, rejected (some rows) or refused; AssertionError if the law is broken."""
    path = folder / trial.name
    path.write_bytes(trial.data)
    try:
        rows = list(Prompts.open(InputOptions(path, **trial.options)).requests(PARAMS))  # type: ignore[arg-type]
    except InputError as error:
        if trial.whole is None and "\n" not in str(error):
            return "refused"
        raise
    found = [(row.id, row.prompt) for row in rows]
    reasons = [row.error for row in rows if isinstance(row, Rejected)]
    if trial.whole is not None:
        assert (found, reasons) == (trial.whole, [])
    if trial.stops is not None:
        assert [row.params.stop for row in rows if isinstance(row, Request)] == trial.stops
    if reasons:
        return "rejected"
    for name, read in trial.oracles.items():
        try:
            expected = read(path)
        except Exception:  # noqa: BLE001, S112  # it refuses the file, each in words of its own
            continue
        assert found == expected, f"{name}: {expected}"
    return "read"


def text(rng: random.Random, most: int = 6) -> str:
    return "".join(rng.choice(PIECES) for _ in range(rng.randrange(most)))


def to_rows(columns: dict[str, list[Any]]) -> list[Row]:
    columns = {name.strip(" "): column for name, column in columns.items()}
    ids = columns.get("id") or [None] * len(columns["prompt"])
    known = [None if id_ is None or id_ == "" else str(id_) for id_ in ids]
    return list(zip(known, columns["prompt"], strict=True))


def damaged(data: bytes, rng: random.Random) -> bytes:
    """One to three edits: bytes put in, cut out or copied, or the end cut off."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        at, length, other = rng.randrange(len(out) + 1), rng.choice((1, 1, 3, 9)), rng.randrange(len(out) + 1)
        kind = rng.randrange(8)
        if kind < 4:
            out[at:at] = rng.choice(EDITS)
        elif kind < 6:
            del out[at : at + length]
        elif kind == 6:
            out[at:at] = out[other : other + length]
        elif len(out) > 20:
            del out[max(at, 20) :]
    return bytes(out)


# ---- CSV and TSV


def by_pandas(delimiter: str, quotes: bool) -> Read:
    quoting: Any = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE

    def read(path: Path) -> list[Row]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # rows with more fields than the header
            frame = pd.read_csv(
                path, sep=delimiter, dtype=str, keep_default_na=False, index_col=False, quoting=quoting
            ).fillna("")
        return to_rows({str(name): list(frame[name]) for name in frame.columns})

    return read


def by_pyarrow(delimiter: str, quotes: bool) -> Read:
    def read(path: Path) -> list[Row]:
        how = pyarrow.csv.ParseOptions(
            delimiter=delimiter, quote_char='"' if quotes else False, newlines_in_values=quotes
        )
        types = pyarrow.csv.ConvertOptions(column_types={"id": pa.string(), "prompt": pa.string()})
        return to_rows(pyarrow.csv.read_csv(path, parse_options=how, convert_options=types).to_pydict())

    return read


def by_duckdb(delimiter: str, quotes: bool) -> Read:
    def read(path: Path) -> list[Row]:
        quote = "'\"'" if quotes else "''"
        how = f"header=true, delim='{delimiter}', quote={quote}, escape={quote}, all_varchar=true, auto_detect=false"
        first = path.read_bytes().decode("utf-8-sig").splitlines()[0]
        assert first.count('"') % 2 == 0, "a name over several lines, which it takes for no rows"
        names = [name.strip('" ') for name in first.split(delimiter)]
        types = ", ".join(f"'{name}': 'VARCHAR'" for name in names)
        table = duckdb.sql(f"SELECT * FROM read_csv('{path}', {how}, columns={{{types}}})").fetchall()  # noqa: S608
        return to_rows({name: [row[i] or "" for row in table] for i, name in enumerate(names)})

    return read


def oracles(rng: random.Random, delimiter: str, quotes: bool, columns: int) -> dict[str, Read]:
    """Who is asked; a blank line in a single column is a row to some, and not to pandas."""
    found = {"pandas": by_pandas(delimiter, quotes)}
    if columns > 1:
        found["pyarrow"] = by_pyarrow(delimiter, quotes)
        if rng.randrange(DUCKDB_EVERY) == 0:
            found["duckdb"] = by_duckdb(delimiter, quotes)
    return found


def listed(rng: random.Random, texts: list[str]) -> str:
    """A list as a program writes it into a field."""
    r = "c(" + ", ".join(json.dumps(one) for one in texts) + ")"
    return rng.choice(
        (repr(texts), repr(tuple(texts) or []), json.dumps(texts), json.dumps(texts, ensure_ascii=False), r)
    )


def table(rng: random.Random) -> tuple[dict[str, list[str]], list[tuple[str, ...]] | None]:
    """Columns of texts, and the stop strings that a column of them means."""
    count = rng.randrange(1, 5)
    columns = {"prompt": [text(rng) for _ in range(count)]}
    stops = None
    if rng.random() < 0.85:
        columns["id"] = [str(i) for i in range(count)]
    if rng.random() < 0.3:
        columns["note"] = [text(rng, 3) for _ in range(count)]
    if rng.random() < 0.3:
        stops = [tuple(text(rng, 3) + "." for _ in range(rng.randrange(3))) for _ in range(count)]
        columns["stop"] = [listed(rng, list(one)) for one in stops]
    names = rng.sample(list(columns), len(columns))
    return {name: columns[name] for name in names}, stops


def by_csv_module(columns: dict[str, list[str]], delimiter: str, end: str, quoting: Any) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=delimiter, lineterminator=end, quoting=quoting)
    writer.writerows([list(columns), *zip(*columns.values(), strict=True)])
    return out.getvalue().encode()


def by_frame(columns: dict[str, list[str]], delimiter: str, end: str, quoting: Any) -> bytes:
    out = io.BytesIO()
    pd.DataFrame(columns).to_csv(out, sep=delimiter, index=False, lineterminator=end, quoting=quoting)
    return out.getvalue()


def by_arrow(columns: dict[str, list[str]], delimiter: str, _end: str, _quoting: Any) -> bytes:
    out = io.BytesIO()
    pyarrow.csv.write_csv(pa.table(columns), out, pyarrow.csv.WriteOptions(delimiter=delimiter))
    return out.getvalue()


def quoted(rng: random.Random, delimiters: str = ",;|\t", least: int = 1) -> tuple[Trial, str]:
    """A file that a program wrote with quotes, and its delimiter."""
    columns, stops = table(rng)
    while len(columns) < least:
        columns, stops = table(rng)
    delimiter = rng.choice(delimiters)
    write = rng.choice((by_csv_module, by_frame, by_arrow))
    quoting = csv.QUOTE_ALL if write is by_arrow else rng.choice((csv.QUOTE_ALL, csv.QUOTE_MINIMAL))
    data = write(columns, delimiter, rng.choice(("\n", "\r\n")), quoting)
    whole: list[Row] | None = to_rows(columns)
    first = next(iter(columns.values()))
    if quoting == csv.QUOTE_MINIMAL and (
        any("\r" in one for column in columns.values() for one in column)  # not quoted by the csv module
        or any(one.startswith(MARK) or (len(columns) == 1 and not one.strip(" \t")) for one in first)
        or any(one.strip() in columns for one in first)
    ):
        whole = None
    options = {"quotes": "yes"} if delimiter == "\t" and quoting == csv.QUOTE_MINIMAL else {}
    if rng.random() < 0.2 or len(columns) == 1:
        options["delimiter"] = "tab" if delimiter == "\t" else delimiter
    name = rng.choice(("p.csv", "p.tsv")) if len(columns) > 1 else "p.csv"
    plain = whole and not any(MARK in one for one in first)
    found = oracles(rng, delimiter, True, len(columns)) if plain else {}
    return Trial(name, data, whole, found, options, stops if whole else None), delimiter


def csv_quoted(rng: random.Random) -> Trial:
    return quoted(rng)[0]


def csv_damaged(rng: random.Random) -> Trial:
    trial, delimiter = quoted(rng)
    data = damaged(trial.data, rng)
    beside = (b' "', b'" ') if delimiter == "\t" else (b' "', b'" ', b'\t"', b'"\t')
    spaced = any(one in data for one in beside)  # such spaces are text to the others
    options = trial.options | {"quotes": "yes", "delimiter": "tab" if delimiter == "\t" else delimiter}
    columns = len(trial.data.split(b"\n")[0].split(delimiter.encode()))
    found = {} if spaced or MARK.encode() in data else oracles(rng, delimiter, True, columns)
    return Trial(trial.name, data, None, found, options)


def csv_by_hand(rng: random.Random) -> Trial:
    """Spaces around quoted fields, blank lines, marks of joined files."""
    columns, stops = table(rng)
    delimiter = rng.choice(",;|")
    spaces = lambda: " " * rng.choice((0, 0, 1, 2))  # noqa: E731
    lines = []
    for record in zip(*columns.values(), strict=True):
        fields = [spaces() + '"' + one.replace('"', '""') + '"' + spaces() for one in record]
        lines.append(rng.choice(("", "", MARK)) + delimiter.join(fields))
        lines += ["", "  ", MARK][: rng.choice((0, 0, 0, 1, 2, 3))]
    header = rng.choice((MARK, "")) + (delimiter + spaces()).join(columns)
    first = [f"sep={delimiter}"] if rng.random() < 0.1 else []
    data = rng.choice(("\n", "\r\n")).join([*first, header, *lines, ""]).encode()
    return Trial("p.csv", data, to_rows(columns), stops=stops)


def tsv_dump(rng: random.Random) -> Trial:
    """Sentences between tabs, as they are: quotes are text."""
    columns, _ = table(rng)
    plain = str.maketrans("", "", "\t\r\n" + MARK)
    columns = {name: [one.translate(plain) for one in column] for name, column in columns.items() if name != "stop"}
    lines = ["\t".join(record) for record in zip(*columns.values(), strict=True)]
    data = "\n".join(["\t".join(columns), *lines]).encode()
    return Trial("p.tsv", data, None, oracles(rng, "\t", False, len(columns)))


def tsv_quoted_silently(rng: random.Random) -> Trial:
    """Written with quotes where they are needed, and nobody says so: rows are the written ones, or one is rejected."""
    columns, _ = table(rng)
    columns = {"id": [str(i) for i in range(len(columns["prompt"]))]} | columns
    columns.pop("stop", None)
    names = rng.sample(list(columns), len(columns))
    columns = {name: [one.replace("\r", "").replace(MARK, "") for one in columns[name]] for name in names}
    data = by_csv_module(columns, "\t", "\n", csv.QUOTE_MINIMAL)
    both = any("\t" in one and "\n" in one for column in columns.values() for one in column)
    return Trial("p.tsv", data, None, {} if both else {"writer": lambda _: to_rows(columns)})  # both: a text may be two


# ---- JSON


def lines_by_python(path: Path) -> list[Row]:
    values = [json.loads(line) for line in path.read_bytes().decode().split("\n") if line.strip(" \t\r")]
    ids = [value.get("id") for value in values]
    return [(id_ if id_ is None else str(id_), value["prompt"]) for id_, value in zip(ids, values, strict=True)]


def lines_by_duckdb(path: Path) -> list[Row]:
    how = "format='newline_delimited', columns={'id': 'VARCHAR', 'prompt': 'VARCHAR'}"
    found = duckdb.sql(f"SELECT id, prompt FROM read_json('{path}', {how})").fetchall()  # noqa: S608
    return [(id_, prompt) for id_, prompt in found]


def objects(rng: random.Random) -> list[dict[str, Any]]:
    kept = ("x", rng.choice((1, 2.5, None, [1], {"a": "b"}, True, "x", 2**70)))
    ids: Callable[[int], Any] = rng.choice((int, str, lambda i: f"a{i}"))
    return [{"id": ids(i), "prompt": text(rng), kept[0]: kept[1]} for i in range(rng.randrange(1, 5))]


def json_lines(rng: random.Random) -> Trial:
    values, out = objects(rng), io.BytesIO()
    if rng.random() < 0.3:
        pd.DataFrame(values).to_json(out, orient="records", lines=True, force_ascii=rng.random() < 0.5)
        data = out.getvalue()
    else:
        plain = rng.random() < 0.5
        marks = [rng.choice(("", "", MARK, MARK * 2)) for _ in values]
        lines = [mark + json.dumps(value, ensure_ascii=plain) for mark, value in zip(marks, values, strict=True)]
        data = rng.choice(("\n", "\r\n", "\n\n")).join(lines).encode()
    whole = [(str(value["id"]), value["prompt"]) for value in values]
    return Trial(rng.choice(("p.jsonl", "p.json", "p.ndjson")), data, whole)


def json_damaged(rng: random.Random) -> Trial:
    data = damaged("\n".join(json.dumps(value, ensure_ascii=False) for value in objects(rng)).encode(), rng)
    found: dict[str, Read] = {"python": lines_by_python}
    if MARK.encode() not in data:
        found |= {"duckdb": lines_by_duckdb} if rng.randrange(DUCKDB_EVERY) == 0 else {}
    return Trial("p.jsonl", data, None, found)


def json_array(rng: random.Random) -> Trial:
    """One array, on a line or pretty-printed, or objects over several lines, or pandas' records."""
    values = objects(rng)
    whole = [(str(value["id"]), value["prompt"]) for value in values]
    indent, plain = rng.choice((None, 0, 1, 4)), rng.random() < 0.5
    kind = rng.randrange(4)
    if kind == 0:
        data = pd.DataFrame(values).to_json(orient="records", indent=indent or 0, force_ascii=plain)
    elif kind == 1:
        data = "\n".join(json.dumps(value, indent=rng.choice((1, 4)), ensure_ascii=plain) for value in values)
    else:
        data = rng.choice(("", MARK)) + json.dumps(values, indent=indent, ensure_ascii=plain)
    return Trial(rng.choice(("p.json", "p.jsonl")), data.encode(), whole)


def array_damaged(rng: random.Random) -> Trial:
    trial = json_array(rng)
    return Trial(trial.name, damaged(trial.data, rng), None, {"python": array_by_python})


def array_by_python(path: Path) -> list[Row]:
    found = json.loads(path.read_bytes())
    values = found if isinstance(found, list) else [found]
    return [(str(value["id"]) if value.get("id") is not None else None, value["prompt"]) for value in values]


# ---- Parquet


def parquet(rng: random.Random) -> Trial:
    texts = [text(rng) for _ in range(rng.randrange(1, 6))]
    kinds = (pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string()))
    ids = pa.array(range(len(texts)), rng.choice((pa.int64(), pa.int8(), pa.uint32())))
    columns: dict[str, pa.Array] = {"prompt": pa.array(texts).cast(rng.choice(kinds)), "id": ids}
    if rng.random() < 0.3:
        columns["id"] = ids.cast(pa.string())
    if rng.random() < 0.3:
        columns["x"] = pa.nulls(len(texts))
    out = io.BytesIO()
    compression, group = rng.choice(("snappy", "zstd", "gzip", "none")), rng.choice((1, 2, 100))
    pq.write_table(
        pa.table(columns), out, row_group_size=group, compression=compression, use_dictionary=rng.random() < 0.5
    )
    found = {"pandas": parquet_by_pandas}
    if rng.randrange(DUCKDB_EVERY) == 0:
        found["duckdb"] = parquet_by_duckdb
    return Trial("p.parquet", out.getvalue(), [(str(i), one) for i, one in enumerate(texts)], found)


def parquet_by_pandas(path: Path) -> list[Row]:
    frame = pd.read_parquet(path)
    return to_rows({name: [str(value) for value in frame[name]] for name in ("id", "prompt")})


def parquet_by_duckdb(path: Path) -> list[Row]:
    found = duckdb.sql(f"SELECT id::VARCHAR, prompt FROM read_parquet('{path}')").fetchall()  # noqa: S608
    return [(id_, prompt) for id_, prompt in found]


KINDS: dict[str, Callable[[random.Random], Trial]] = {
    "csv-quoted": csv_quoted,
    "csv-damaged": csv_damaged,
    "csv-by-hand": csv_by_hand,
    "tsv-dump": tsv_dump,
    "tsv-quoted-silently": tsv_quoted_silently,
    "json-lines": json_lines,
    "json-damaged": json_damaged,
    "json-array": json_array,
    "array-damaged": array_damaged,
    "parquet": parquet,
}


def fuzz(count: int, seed: int = 0, kinds: Sequence[str] = tuple(KINDS)) -> Counter[str]:
    """How many files of each kind were read, with rejected rows or not, or refused; AssertionError for a wrong one."""
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        for i in range(count):
            kind = kinds[i % len(kinds)]
            trial = KINDS[kind](random.Random(f"{kind} {seed} {i}"))
            try:
                found[f"{kind} {check(trial, Path(folder))}"] += 1
            except Exception as error:
                error.add_note(f"{kind}, seed {seed}, file {i}: {trial.name} {trial.options} {trial.data!r}")
                raise
    return found


if __name__ == "__main__":
    words = sys.argv[1:]
    asked = int(words[0]) if words else 1000
    for what, files in sorted(fuzz(asked, int(words[1]) if words[1:] else 0, words[2:] or tuple(KINDS)).items()):
        print(f"{files:>8,} {what}")  # noqa: T201
