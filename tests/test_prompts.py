"""prompts.py: the laws of an input that hold for every format."""

import csv
import gzip
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchgen.errors import InputError
from batchgen.input import formats, jsonl, sources
from batchgen.input import parquet as parquet_format
from batchgen.input.formats import Found, Rows, Scanned
from batchgen.input.kept import kept_columns
from batchgen.input.parameters import WITH_COLUMNS, is_asked
from batchgen.input.prompts import FORMATS, Cut, asked_columns
from batchgen.types import Chunk, Rejected, Request, SamplingParams
from tests.support.inputs import PARAMS, chunks, facts, open_prompts, parquet, read, refusal, scan, unchecked
from tests.support.stand_ins import Prompts as StandIn


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_only_the_default_id_column_may_be_absent(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"p.{suffix}"
    if suffix == "jsonl":
        path.write_bytes(b'{"prompt": "a", "idx": 1}')
    else:
        parquet(tmp_path, {"prompt": ["a"], "idx": [1]})
    open_prompts(path)
    open_prompts(path, "prompt", "idx")
    assert "did you mean 'idx'? pass it as --id-column" in refusal(path, "prompt", "index")


def test_the_samples_are_all_good_rows() -> None:
    path = Path(__file__).parents[1] / "data" / "prompts" / "sample.jsonl"
    open_prompts(path)
    rows = read(path)
    assert len(rows) == len({row.id for row in rows}) == 12
    assert all(isinstance(row, Request) and row.id and row.prompt for row in rows)


# ---- parameters of a row's own


@pytest.fixture(params=["jsonl", "parquet"])
def rows(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Path]:
    """A function that writes columns to a file of this format."""

    def write(**columns: list[Any]) -> Path:
        if request.param == "parquet":
            return parquet(tmp_path, columns)
        path = tmp_path / "p.jsonl"
        records = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return write


def test_a_rows_parameters_win_over_the_jobs_and_null_does_not(rows: Callable[..., Path]) -> None:
    path = rows(
        prompt=["a", "b", "c"],
        max_tokens=[3, None, 5.0],
        stop=[["x"], None, ["y", "z"]],
        echo=[None, True, False],
        logit_bias=[{"5": 1.0}, None, {"5": None}],
        colour=["red", None, "blue"],
    )
    base = SamplingParams(max_tokens=9, stop=("s",))
    got = [item.params for item in read(path, base) if isinstance(item, Request)]
    assert got == [
        SamplingParams(max_tokens=3, stop=("x",), logit_bias=((5, 1.0),)),
        SamplingParams(max_tokens=9, stop=("s",), echo=True),
        SamplingParams(max_tokens=5, stop=("y", "z")),
    ]
    assert {item.params for item in read(path, base, row_params=False)} == {base}


def test_a_rows_parameter_out_of_range_rejects_that_row_alone(rows: Callable[..., Path]) -> None:
    path = rows(prompt=["a", "b", "c"], id=["x", "y", "z"], temperature=[0.5, -1.0, None])
    first, bad, last = read(path, SamplingParams())
    assert isinstance(bad, Rejected)
    assert (bad.id, bad.prompt, bad.row) == ("y", "b", 1)
    assert bad.error == f"{bad.place}: temperature -1.0 is out of range (0 (greedy) to 100)"
    assert isinstance(first, Request)
    assert isinstance(last, Request)


def test_a_prompt_column_called_like_a_parameter_is_the_prompt(rows: Callable[..., Path]) -> None:
    path = rows(stop=["a"], seed=["i"])
    (item,) = read(path, SamplingParams(), prompt_column="stop", id_column="seed")
    assert (item.prompt, item.id, item.params) == ("a", "i", SamplingParams())


def test_a_misspelled_parameter_is_a_rejected_row_of_json_and_a_refused_parquet_file(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "a", "max_token": 3}\n{"prompt": "a"}')
    first, bad, last = read(tmp_path / "p.jsonl")
    assert isinstance(bad, Rejected)
    assert bad.error == "p.jsonl:2: 'max_token' is not a parameter; did you mean 'max_tokens'? rename it"
    assert [type(first), type(last)] == [Request, Request]
    path = parquet(tmp_path, {"prompt": ["a"], "max_token": [3]})
    with pytest.raises(InputError, match="column 'max_token' is not a parameter.*--no-row-params"):
        open_prompts(path)
    open_prompts(path, row_params=False)


@pytest.mark.parametrize("name", WITH_COLUMNS)
def test_the_scan_finds_which_log_probabilities_a_row_may_ask_for(rows: Callable[..., Path], name: str) -> None:
    assert scan(rows(prompt=["a", "b"], **{name: [None, 1]})).asks == {name}
    objects = [{name: 1}, None]
    assert scan(rows(prompt=["a", "b"], params=objects)).asks == {name}
    assert scan(rows(prompt=["a", "b"], params=[json.dumps(one) for one in objects])).asks == {name}
    assert scan(rows(prompt=["a", f'say \\"{name}\\"'], n=[1, 2])).asks == set()


def test_a_scan_names_the_files_and_hashes_each_of_several(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.jsonl", "b.jsonl")]
    for path in paths:
        path.write_text('{"prompt": "a"}\n')
    before = scan(paths)
    paths[1].write_text('{"prompt": "b"}\n')
    after = scan(paths)
    assert before.names == after.names == ("a.jsonl", "b.jsonl")
    assert [old == new for old, new in zip(before.files, after.files, strict=True)] == [True, False]
    assert after.files == tuple(scan(path).sha256[:16] for path in paths)
    assert (scan(paths[0]).files, scan(paths[0]).names) == ((), ("a.jsonl",))


# ---- three openings, one pass for requests and kept columns


def test_a_folder_with_the_name_of_a_parameter_sets_it(tmp_path: Path) -> None:
    for folder in ("temperature=0.5/logprobs=2", "temperature=1", "temperature=__HIVE_DEFAULT_PARTITION__", "id=7"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "temperature": 2}\n')
    prompts = open_prompts(tmp_path)
    assert prompts.scan().asks == {"logprobs"}
    found = [item.params for item in prompts.requests(PARAMS) if isinstance(item, Request)]
    assert [(one.temperature, one.logprobs) for one in found] == [
        *[(0.0, None), (2.0, None), (0.5, 2), (2.0, 2), (1.0, None), (2.0, None), (0.0, None), (2.0, None)]
    ]
    assert prompts.row_parameters.taken == {"temperature": 8, "logprobs": 2}
    assert {item.params for item in read(tmp_path, row_params=False) if isinstance(item, Request)} == {PARAMS}


def test_a_folder_above_what_is_named_is_no_parameter_and_noted(tmp_path: Path) -> None:
    file = tmp_path / "seed=3" / "x=1" / "n=2" / "p.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text('{"prompt": "a"}\n')
    for named, folders in ((file, ("seed=3", "n=2")), (tmp_path / "seed=3", ("seed=3",)), (tmp_path / "*" / "**", ())):
        assert open_prompts(named).row_parameters.folders == folders
        assert open_prompts(named, row_params=False).row_parameters.folders == ()
    assert [item.params for item in open_prompts(file).requests(PARAMS) if isinstance(item, Request)] == [PARAMS]


@pytest.mark.parametrize("folder", ["max_token=5", "temperature=warm", "n=0"])
def test_a_folder_with_a_wrong_parameter_is_refused_before_any_row(tmp_path: Path, folder: str) -> None:
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "p.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(
        InputError, match=f"^{tmp_path}/{folder}/p.jsonl: .*(did you mean|out of range).* --no-row-params$"
    ):
        open_prompts(tmp_path)
    open_prompts(tmp_path, row_params=False)


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    """The records, whose columns are text, in the format that the name says."""
    columns = {name: [record[name] for record in records] for name in records[0]}
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
    elif path.suffix == ".csv":
        text = io.StringIO(newline="")
        csv.writer(text).writerows([columns, *(record.values() for record in records)])
        path.write_text(text.getvalue())
    else:
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


RECORDS = [{"id": str(row), "prompt": "" if row % 5 == 0 else f"p{row}", "k": f"k{row}"} for row in range(30)]
BATCH = [{"custom_id": str(row), "url": "/v1/completions", "body": {"prompt": "a"}, "k": f"k{row}"} for row in range(9)]


@pytest.fixture
def openings(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each local file was opened."""
    counts: Counter[str] = Counter()
    before = sources._LocalFile.open

    def count(file: Any) -> Any:
        counts[file.path.name] += 1
        return before(file)

    monkeypatch.setattr(sources._LocalFile, "open", count)
    return counts


@pytest.mark.parametrize("keep", [(), ("k", "id")])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.parquet"])
def test_a_file_is_opened_once_to_check_once_to_scan_and_once_to_read(
    tmp_path: Path, openings: Counter[str], name: str, keep: tuple[str, ...]
) -> None:
    prompts = open_prompts(write(tmp_path / name, RECORDS), keep=keep)
    assert openings == {name: 1}
    facts = prompts.scan()
    assert openings == {name: 2}
    list(prompts.chunks(facts, PARAMS, lambda item: item, Cut(7)))  # type: ignore[arg-type, return-value]
    assert openings == {name: 3}


def test_a_batch_file_of_openai_is_opened_three_times(tmp_path: Path, openings: Counter[str]) -> None:
    path = tmp_path / "b.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in BATCH))
    chunks(open_prompts(path, keep=("custom_id",)))
    assert openings == {"b.jsonl": 3}


@pytest.mark.parametrize("batch_rows", [1, 4, 1000])
@pytest.mark.parametrize("chunk_rows", [1, 7, 30, 500])
def test_each_chunk_has_its_rows_and_their_kept_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_rows: int, batch_rows: int
) -> None:
    for module in (formats, parquet_format):
        monkeypatch.setattr(module, "BATCH_ROWS", batch_rows)
    files = [write(tmp_path / name, RECORDS) for name in ("a.jsonl", "b.csv", "c.parquet", "d.jsonl.gz")]
    prompts = open_prompts(files, keep=("k", "id"))
    found = chunks(prompts, chunk_rows)
    assert [chunk.index for chunk in found] == list(range(-(-120 // chunk_rows)))
    assert [item for chunk in found for item in chunk.items] == list(prompts.requests(PARAMS))
    assert {len(chunk.items) for chunk in found[:-1]} <= {chunk_rows}
    kept = [row for chunk in found for row in kept_columns(chunk, row_numbers(chunk)).to_pylist()]
    assert kept == [{"k": record["k"], "id": record["id"]} for record in RECORDS] * 4


def row_numbers(chunk: Chunk) -> npt.NDArray[np.int64]:
    return np.array([item.row for item in chunk.items])


@pytest.mark.parametrize("batch_rows", [1, 4, 1000])
def test_a_chunk_ends_with_the_row_that_fills_it_in_bytes_however_the_file_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_rows: int
) -> None:
    for module in (formats, parquet_format):
        monkeypatch.setattr(module, "BATCH_ROWS", batch_rows)
    letters = [3_000 if row % 5 == 0 else 10 for row in range(30)]
    records = [{"prompt": "a", "id": str(row), "k": "k" * letters[row]} for row in range(30)]
    for name in ("a.jsonl", "b.csv", "c.parquet", "d.jsonl.gz"):
        prompts = open_prompts(write(tmp_path / name, records), keep=("k",))
        cut = Cut(8, window_bytes=4_000)
        found = list(prompts.chunks(prompts.scan(), PARAMS, lambda item: item, cut))  # type: ignore[arg-type, return-value]
        cuts = [(chunk.first_row, len(chunk.items)) for chunk in found]
        assert cuts == [(0, 6), (6, 8), (14, 7), (21, 8), (29, 1)]  # long are rows 0, 5, 10 ...
        kept = [row for chunk in found for row in kept_columns(chunk, row_numbers(chunk))["k"].to_pylist()]
        assert kept == [record["k"] for record in records]


@given(done=st.sets(st.integers(0, 20)), window_bytes=st.integers(50, 2_000), batch_rows=st.integers(1, 90))
@settings(deadline=None, max_examples=10)
def test_the_chunks_that_a_resumed_run_does_are_those_of_the_first_run(
    tmp_path_factory: pytest.TempPathFactory, done: set[int], window_bytes: int, batch_rows: int
) -> None:
    """Whatever was committed before, and however the file is read; rows and kept values of all make up the input."""
    folder = tmp_path_factory.mktemp("cut")
    records = [{"prompt": "ab"[row % 2] * 300 + str(row % 7), "k": f"k{row}"} for row in range(80)]
    prompts = open_prompts(write(folder / "a.jsonl", records), keep=("k",))
    cut = {"together": 4, "window_bytes": window_bytes * 100}
    whole = [(chunk.index, chunk.items, kept_texts(chunk)) for chunk in chunks(prompts, 5, **cut)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "BATCH_ROWS", batch_rows)
        rest = [(chunk.index, chunk.items, kept_texts(chunk)) for chunk in chunks(prompts, 5, skip=done, **cut)]
    assert rest == [chunk for chunk in whole if chunk[0] not in done]
    assert [index for index, _, _ in whole] == list(range(len(whole)))
    rows = [(item.row, kept) for _, items, texts in whole for item, kept in zip(items, texts, strict=True)]
    assert sorted(rows) == [(row, f"k{row}") for row in range(80)]


def kept_texts(chunk: Chunk) -> list[str]:
    texts: list[str] = kept_columns(chunk, row_numbers(chunk))["k"].to_pylist()
    return texts


def test_a_chunk_that_is_done_is_counted_and_not_checked(tmp_path: Path) -> None:
    prompts = open_prompts(write(tmp_path / "a.jsonl", RECORDS), keep=("k",))
    checked: list[int] = []

    def check(item: Any) -> Any:
        checked.append(item.row)
        return item

    found = list(prompts.chunks(prompts.scan(), PARAMS, check, Cut(10, skip={0, 2})))
    assert [(chunk.index, chunk.first_row) for chunk in found] == [(1, 10)]
    assert checked == list(range(10, 20))
    assert kept_columns(found[0], row_numbers(found[0]))["k"].to_pylist() == [f"k{row}" for row in range(10, 20)]


def test_rows_to_retry_make_chunks_of_their_own(tmp_path: Path) -> None:
    prompts = open_prompts(write(tmp_path / "a.csv", RECORDS), keep=("k",))
    found = chunks(prompts, 3, rows={29, 2, 3, 17})
    assert [[item.row for item in chunk.items] for chunk in found] == [[2, 3, 17], [29]]
    assert [item.id for chunk in found for item in chunk.items] == ["2", "3", "17", "29"]
    assert kept_columns(found[1], row_numbers(found[1]))["k"].to_pylist() == ["k29"]
    assert chunks(prompts, 3, rows=set()) == []


def test_a_batch_of_text_is_bounded_by_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "BATCH_BYTES", 100)
    prompts = unchecked(write(tmp_path / "a.jsonl", RECORDS))
    sizes = [len(rows.items) for rows in prompts._read(PARAMS, pa.schema([]))]
    assert sum(sizes) == 30
    assert max(sizes) <= 3


def test_rows_before_a_damage_are_yielded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = open_prompts(write(tmp_path / "a.jsonl", RECORDS), keep=("k",))
    facts, read_rows = prompts.scan(), jsonl.read_rows

    def damaged(*args: Any) -> Any:
        yield from islice(read_rows(*args), 12)
        raise InputError("damaged here")

    monkeypatch.setattr(jsonl, "read_rows", damaged)
    found = prompts.chunks(facts, PARAMS, lambda item: item, Cut(4))  # type: ignore[arg-type, return-value]
    assert [next(found).index for _ in range(3)] == [0, 1, 2]
    with pytest.raises(InputError, match="damaged here"):
        next(found)


def test_a_format_is_three_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text file with a prompt a line, added as the docstring of prompts.py says."""

    class Lines:
        def check(self, source: Any, options: Any) -> Found:
            return Found(["prompt"])

        def scan(self, source: Any, keep: Any) -> Scanned:
            return Scanned(2, "0" * 64, 4, asks=frozenset(), columns={})

        def read(self, source: Any, reading: Any, first_row: int) -> Iterator[Rows]:
            with sources.open_bytes(source) as (file, _):
                lines = [line.decode().strip() for line in file]
            items = [Request(row, f"{source.name}:{row}", None, line, PARAMS) for row, line in enumerate(lines)]
            yield Rows(items, None, [2, 2])

    monkeypatch.setitem(FORMATS, "lines", Lines())
    monkeypatch.setitem(sources.SUFFIXES, ".lines", "lines")
    (tmp_path / "p.lines").write_text("a\nb\n")
    prompts = open_prompts(tmp_path / "p.lines")
    assert (prompts.scan().formats, prompts.scan().rows) == (("lines",), 2)
    assert [item.prompt for item in prompts.requests(PARAMS)] == ["a", "b"]


NAMES = '"row", "sample", "completion", "finish_reason", "status", "parameters"'
RESULT = '{"prompt": "a", "logprobs": [1], "prompt_logprobs": [null], ' + NAMES.replace(",", ": 0,") + ": 0"


@pytest.mark.parametrize(
    ("line", "asks"),
    [
        (r'{"prompt": "a", "log\u0070robs": 1}', "logprobs"),
        (r'{"prompt": "a", "prompt\u005flog\u0070robs": 1}', "prompt_logprobs"),
        (r'{"prompt": "a", "sampling_params": {"\u006c\u006Fgprobs": 1}}', "logprobs"),
        (r'{"prompt": "a", "sampling_params": "{\"log\\u0070robs\": 1}"}', "logprobs"),
        (r"""{"prompt": "a", "sampling_params": "{'\\x6cogprobs': 1}"}""", "logprobs"),
        (r"""{"prompt": "a", "sampling_params": "{'prompt\\x5Flogprobs': 1}"}""", "prompt_logprobs"),
        ('{"prompt": "a", "logprobs": 1, "k": [' + NAMES + "]}", "logprobs"),
        ('{"prompt": "a", "prompt_logprobs": 1}', "prompt_logprobs"),
        (RESULT + "}", None),
        (RESULT + ', "sampling_params": {"logprobs": 2}}', "logprobs"),
        (RESULT + ', "sampling_params": {"prompt_logprobs": 2}}', "prompt_logprobs"),
    ],
)
def test_a_row_that_asks_for_logprobs_has_columns_for_them_however_it_is_written(
    tmp_path: Path, line: str, asks: str | None
) -> None:
    (tmp_path / "p.jsonl").write_text(line)
    prompts = open_prompts(tmp_path / "p.jsonl")
    ((item,),) = [chunk.items for chunk in chunks(prompts)]
    assert isinstance(item, Request)
    asked = {name for name in WITH_COLUMNS if is_asked(name, item.params)}
    assert asked == prompts.scan().asks == ({asks} if asks else set())


@pytest.mark.parametrize("name", WITH_COLUMNS)
def test_a_row_that_asks_for_logprobs_in_letters_that_no_scan_sees_is_rejected(tmp_path: Path, name: str) -> None:
    written = f"{name[:-4]}' '{name[-4:]}"
    other = "" if name == "logprobs" else ', "logprobs": 1'
    (tmp_path / "p.jsonl").write_text(f"""{{"prompt": "a"{other}, "sampling_params": "{{'{written}': 2}}"}}""")
    ((item,),) = [chunk.items for chunk in chunks(open_prompts(tmp_path / "p.jsonl"))]
    assert isinstance(item, Rejected)
    assert item.error == f"p.jsonl:1: {name} is written in a way that is found too late; write it in plain letters"


def test_echo_with_logprobs_asks_for_those_of_the_prompt_in_openais_lines_alone() -> None:
    for openai, echo, asks, asked in [
        (True, True, {"logprobs"}, {"logprobs", "prompt_logprobs"}),
        (True, False, {"logprobs", "echo"}, {"logprobs", "prompt_logprobs"}),
        (True, False, {"logprobs"}, {"logprobs"}),
        (True, True, set(), set()),
        (False, True, {"logprobs", "echo"}, {"logprobs"}),
    ]:
        found = replace(facts(1, "0", 1), asks=frozenset(asks))
        assert asked_columns(StandIn(openai=openai), found, replace(PARAMS, echo=echo)) == asked  # type: ignore[arg-type]


def test_a_folder_may_ask_for_the_prompt_alone(tmp_path: Path) -> None:
    (tmp_path / "max_tokens=0").mkdir()
    (tmp_path / "max_tokens=0" / "p.jsonl").write_text('{"prompt": "a"}\n')
    (item,) = open_prompts(tmp_path).requests(replace(PARAMS, prompt_logprobs=0))
    assert isinstance(item, Request)
    assert item.params.max_tokens == 0
