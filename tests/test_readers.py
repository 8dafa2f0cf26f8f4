"""Rows in are rows out: every line or record becomes exactly one Request or Rejected, and no bytes crash a reader."""

import gzip
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from batchgen.errors import InputError
from batchgen.input import readers
from batchgen.input.readers import InputFacts, check_input, read_requests, scan_input
from batchgen.types import Rejected, Request, SamplingParams

PARAMS = SamplingParams(max_tokens=8)
GOOD = b'{"id": "a", "prompt": "Once"}'


def read(path: Path, **options: Any) -> list[Request | Rejected]:
    return list(read_requests(path, params=PARAMS, **options))


def read_bytes(folder: Path, data: bytes, **options: Any) -> list[Request | Rejected]:
    path = folder / "p.jsonl"
    path.write_bytes(data)
    return read(path, **options)


def only_error(folder: Path, line: bytes) -> str:
    """The line's rejection, after a good row and before another, neither of which it may disturb."""
    first, bad, last = read_bytes(folder, GOOD + b"\n" + line + b"\n" + GOOD)
    assert isinstance(first, Request)
    assert isinstance(last, Request)
    assert isinstance(bad, Rejected)
    assert (bad.row, bad.place, last.row, last.place) == (1, "p.jsonl:2", 2, "p.jsonl:3")
    bad.error.encode()  # must be writable, whatever the line held
    return bad.error


def non_blank(data: bytes) -> int:
    """The law, said another way than the reader says it."""
    return sum(1 for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.translate(None, b" \t\r"))


# ---- JSON lines: what is a row


def test_rows_are_numbered_from_0_and_places_by_physical_line(tmp_path: Path) -> None:
    rows = read_bytes(tmp_path, b"\n" + GOOD + b"\n \t\r\n\r\n" + GOOD)
    assert rows == [Request(row, f"p.jsonl:{line}", "a", "Once", PARAMS) for row, line in [(0, 2), (1, 5)]]


def test_rows_go_on_from_first_row(tmp_path: Path) -> None:
    assert [row.row for row in read_bytes(tmp_path, GOOD + b"\n" + GOOD, first_row=40)] == [40, 41]


@pytest.mark.parametrize("data", [b"", b"\n", b" \t\r\n\r\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf \n"])
def test_a_file_of_blank_lines_has_no_rows(tmp_path: Path, data: bytes) -> None:
    assert read_bytes(tmp_path, data) == []
    assert scan_input(tmp_path / "p.jsonl").rows == 0
    check_input(tmp_path / "p.jsonl")


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n", b" \t\r\n"])
def test_line_ends_are_not_part_of_a_row(tmp_path: Path, end: bytes) -> None:
    assert [type(row) for row in read_bytes(tmp_path, b"\xef\xbb\xbf " + GOOD + end)] == [Request]


def test_only_newline_ends_a_line(tmp_path: Path) -> None:
    prompt = "a\u2028b\u0085c\u000bd"
    (row,) = read_bytes(tmp_path, json.dumps({"prompt": prompt}, ensure_ascii=False).replace("\v", "\\u000b").encode())
    assert isinstance(row, Request)
    assert row.prompt == prompt


@given(
    lines=st.lists(
        st.one_of(
            st.binary(max_size=30),
            st.sampled_from(
                [GOOD, b"", b" \r", b"\t", b"[]", b'{"prompt": 1}', b'{"prompt": "\\ud800"}', b"\xef\xbb\xbf"]
            ),
            st.text(max_size=20).map(lambda text: json.dumps({"prompt": text}).encode()),
            st.builds(
                lambda line, at, byte: line[:at] + bytes([byte]) + line[at + 1 :],
                st.just(b'{"id": 12, "prompt": "Once \\u00e9", "more": {"a": [1.5, null, true]}}'),
                st.integers(0, 75),
                st.integers(0, 255),
            ),
        ),
        max_size=12,
    ),
    end=st.sampled_from([b"\n", b"\r\n"]),
)
@example(lines=[b"\xef\xbb\xbf", b"\xef\xbb\xbf" + GOOD], end=b"\n")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_every_non_blank_line_is_one_row(tmp_path: Path, lines: list[bytes], end: bytes) -> None:
    data = end.join(lines)
    rows = read_bytes(tmp_path, data)
    assert len(rows) == non_blank(data) == scan_input(tmp_path / "p.jsonl").rows
    assert [row.row for row in rows] == list(range(len(rows)))
    physical = data.split(b"\n")
    for row in rows:
        line = physical[int(row.place.removeprefix("p.jsonl:")) - 1]
        for text in (row.id, row.prompt, getattr(row, "error", None)):
            assert text is None or text.encode().decode() == text
        if isinstance(row, Request):
            assert json.loads(line.decode("utf-8-sig"))["prompt"] == row.prompt
        else:
            assert row.error.startswith(f"{row.place}: ")


# ---- JSON lines: what is wrong with a row


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not JSON: Expecting property name enclosed in double quotes at column 2"),
        (b'  {"prompt": x}', "not JSON: Expecting value at column 14"),
        (b"Once upon a time", "not JSON: Expecting value at column 1"),
        (GOOD + GOOD, "not JSON: extra data at column 30; write one object a line"),
        (b'{"prompt": NaN}', "NaN is not a JSON value"),
        (b'{"prompt": "a", "x": [-Infinity]}', "-Infinity is not a JSON value"),
        (b'{"prompt": "a\x00b"}', "not JSON: Invalid control character"),
        (b'{"prompt": "a\tb"}', "not JSON: Invalid control character"),
        (b"\xef\xbb\xbf" + GOOD, "not JSON"),
        (b'["Once"]', "the line is an array, not an object"),
        (b'"Once"', "the line is a string, not an object"),
        (b"17", "the line is a number (17), not an object"),
        (b"null", "the line is null, not an object"),
        (b"{}", "no key 'prompt'; there are no keys at all"),
        (b'{"x": 1}', "no key 'prompt'; the keys are 'x'; name the right one with --prompt-column"),
        (b'{"Prompt": "a"}', "did you mean 'Prompt'? pass it as --prompt-column"),
        (b'{"prompt": null}', "'prompt' is null; make it a string"),
        (b'{"prompt": 1.5}', "'prompt' is a number (1.5); make it a string"),
        (b'{"prompt": 1e999}', "'prompt' is a number (inf); make it a string"),
        (b'{"prompt": true}', "'prompt' is a boolean (True); make it a string"),
        (b'{"prompt": ["a"]}', "'prompt' is an array; make it a string"),
        (b'{"id": 1.5, "prompt": "a"}', "'id' is a number (1.5); make it a string or a whole number"),
        (b'{"id": false, "prompt": "a"}', "'id' is a boolean (False); make it"),
        (b'{"id": {}, "prompt": "a"}', "'id' is an object; make it"),
        (b'{"prompt": "a", "prompt": "a"}', "the key 'prompt' is there twice; keep one"),
        (b'{"prompt": "a", "\\u0070rompt": "a"}', "the key 'prompt' is there twice; keep one"),
        (b'{"prompt": "a", "x": {"y": 1, "z": 2, "y": 3}}', "the key 'y' is there twice; keep one"),
        (b'{"prompt": "\xff"}', "invalid UTF-8 at byte 13 of the line"),
        (b'{"prompt": "\xed\xa0\x80"}', "invalid UTF-8 at byte 13 of the line"),
        (b'{"prompt": "\\ud800"}', "'prompt' has a lone surrogate (\\ud800)"),
        (b'{"prompt": "\\udc00\\ud800"}', "'prompt' has a lone surrogate (\\udc00)"),
        (b'{"id": "\\ud800", "prompt": "a"}', "'id' has a lone surrogate (\\ud800)"),
        (b'{"prompt": "a", "\\ud800": 1}', "the key '\\ud800' has a lone surrogate (\\ud800)"),
        (b'{"prompt": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"prompt": ' + b'{"a":' * 100_000, "nested too deeply"),
        (b'{"prompt": "a", "x": ' + b"1" * 5_000 + b"}", "too many digits"),
        (b'{"prompt": ' + b"[" * 12 + b'"a"' + b"]" * 12 + b"}", "'prompt' is an array"),
    ],
)
def test_a_bad_line_is_rejected_with_its_reason(tmp_path: Path, line: bytes, reason: str) -> None:
    error = only_error(tmp_path, line)
    assert error.startswith("p.jsonl:2: ")
    assert reason in error
    assert len(error) < 300


@pytest.mark.parametrize(
    ("line", "prompt"),
    [
        (rb'{"prompt": "a\u0000b"}', "a\0b"),
        (rb'{"prompt": "\ud83e\udd8a"}', "\U0001f98a"),
        (rb'{"prompt": "\\ud800"}', r"\ud800"),
        (rb'{"prompt": ""}', ""),
        (rb'{"prompt": "<|endoftext|>"}', "<|endoftext|>"),
        (b'{"prompt": "a", "x": 1e999, "y": {"prompt": 2}, "z": [{"q": 1}, {"q": 2}]}', "a"),
    ],
)
def test_legal_json_is_text(tmp_path: Path, line: bytes, prompt: str) -> None:
    assert read_bytes(tmp_path, line) == [Request(0, "p.jsonl:1", None, prompt, PARAMS)]


@pytest.mark.parametrize(
    ("value", "id_"), [("null", None), ('"7"', "7"), ("7", "7"), ("-0", "0"), ("1" * 400, "1" * 400), ('""', "")]
)
def test_ids_are_strings_or_whole_numbers(tmp_path: Path, value: str, id_: str | None) -> None:
    assert read_bytes(tmp_path, f'{{"id": {value}, "prompt": "a"}}'.encode())[0].id == id_


@pytest.mark.parametrize(
    ("line", "id_", "prompt"),
    [(b'{"id": 7, "prompt": 1}', "7", None), (b'{"id": 1.5, "prompt": "a"}', None, "a"), (b'{"id": 7}', "7", None)],
)
def test_a_rejected_row_keeps_what_was_good_of_it(
    tmp_path: Path, line: bytes, id_: str | None, prompt: str | None
) -> None:
    (row,) = read_bytes(tmp_path, line)
    assert isinstance(row, Rejected)
    assert (row.id, row.prompt) == (id_, prompt)


def test_columns_can_be_named(tmp_path: Path) -> None:
    (row,) = read_bytes(tmp_path, b'{"prompt": 1, "text": "a", "key": 5}', prompt_column="text", id_column="key")
    assert row == Request(0, "p.jsonl:1", "5", "a", PARAMS)
    (row,) = read_bytes(tmp_path, b'{"text": "a"}', prompt_column="text", id_column="text")
    assert (row.id, row.prompt) == ("a", "a")


def test_a_line_of_20_megabytes_is_a_row(tmp_path: Path) -> None:
    (row,) = read_bytes(tmp_path, b'{"prompt": "' + b"x" * 20_000_000 + b'"}')
    assert isinstance(row, Request)
    assert len(row.prompt) == 20_000_000


@pytest.mark.parametrize("end", [b"", b"\n", b"\n\n" + GOOD])
@pytest.mark.parametrize("extra", [0, 1, 5000])
def test_a_line_over_the_limit_is_one_rejected_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: bytes, extra: int
) -> None:
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 1000)
    monkeypatch.setattr(readers, "BUFFER_BYTES", 64)
    line = b'{"prompt": "' + b"x" * (1000 + extra - 14) + b'"}'
    long, *rest = read_bytes(tmp_path, line + end)
    assert isinstance(long, Rejected) == (extra > 0)
    assert [(row.row, row.place) for row in rest] == ([(1, "p.jsonl:3")] if GOOD in end else [])
    assert scan_input(tmp_path / "p.jsonl").rows == 1 + len(rest)
    if isinstance(long, Rejected):
        assert long.error == "p.jsonl:1: the line is longer than 1000 bytes; shorten it"


def test_a_blank_line_over_the_limit_is_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 1000)
    (row,) = read_bytes(tmp_path, b" " * 5000 + b"\n" + GOOD)
    assert (row.row, row.place) == (0, "p.jsonl:2")


@given(
    fields=st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=4),
    again=st.integers(0, 3),
    escape=st.booleans(),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_duplicate_keys_are_found_however_they_are_written(
    tmp_path: Path, fields: dict[str, str], again: int, escape: bool
) -> None:
    fields["prompt"] = "a:b"
    twice = sorted(fields)[again % len(fields)]
    key = "".join(f"\\u{ord(c):04x}" if escape and ord(c) < 0x10000 else json.dumps(c)[1:-1] for c in twice)
    body = json.dumps(fields)[:-1]
    assert isinstance(read_bytes(tmp_path, body.encode() + b"}", own_params=False)[0], Request)
    assert "is there twice" in only_error(tmp_path, f'{body}, "{key}": ""}}'.encode())


# ---- gzip


@pytest.mark.parametrize("name", ["p.jsonl.gz", "p.ndjson.gz", "p.json.GZ"])
def test_gzip_reads_like_the_plain_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    packed = gzip.compress(GOOD + b"\n\n") + gzip.compress(GOOD)  # two members, as `cat a.gz b.gz` makes them
    path.write_bytes(packed)
    check_input(path)
    assert [row.place for row in read(path)] == [f"{name}:1", f"{name}:3"]
    assert scan_input(path) == InputFacts(2, hashlib.sha256(packed).hexdigest(), len(packed))


@pytest.mark.parametrize("damage", ["cut", "flip", "tail"])
def test_a_damaged_gzip_is_found_by_the_scan(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "p.jsonl.gz"
    lines = b"".join(b'{"prompt": "%d"}\n' % (number**7) for number in range(5000))
    packed = bytearray(gzip.compress(lines))
    if damage == "cut":
        del packed[len(packed) // 2 :]
    elif damage == "flip":
        packed[len(packed) // 2] ^= 0xFF
    else:
        packed += b"tail"
    path.write_bytes(packed)
    for run in (scan_input, read):
        with pytest.raises(InputError, match=r"^p\.jsonl\.gz:\d+: the gzip data is truncated or damaged") as caught:
            run(path)
        assert "\n" not in str(caught.value)


# ---- Parquet


def parquet(folder: Path, columns: dict[str, Any], **options: Any) -> Path:
    path = folder / "p.parquet"
    pq.write_table(pa.table(columns), path, **options)
    return path


def not_utf8(kind: pa.DataType) -> pa.Array:
    return pa.array([b"a", b"\xff", None, b"b"]).cast(kind, safe=False)


TEXT_TYPES = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]


@pytest.mark.parametrize("kind", TEXT_TYPES, ids=str)
def test_every_arrow_text_type_is_a_prompt(tmp_path: Path, kind: pa.DataType) -> None:
    path = parquet(tmp_path, {"prompt": pa.array(["Once", None, "", "é\0"]).cast(kind), "other": [1, 2, 3, 4]})
    check_input(path)
    rows = read(path)
    assert [row.prompt for row in rows] == ["Once", None, "", "é\0"]
    assert rows[0] == Request(0, "p.parquet:row 0", None, "Once", PARAMS)
    assert rows[1] == Rejected(
        1, "p.parquet:row 1", None, None, "p.parquet:row 1: the prompt is null; make it a string"
    )


@pytest.mark.parametrize(
    ("ids", "texts"),
    [
        (pa.array([1, None], pa.uint64()), ["1", None]),
        (pa.array(["x", "y"]).dictionary_encode(), ["x", "y"]),
        (pa.array([7, 7]).dictionary_encode(), ["7", "7"]),
        (pa.array([True, False]), ["true", "false"]),
        (pa.nulls(2), [None, None]),
        (pa.array([0, 1], pa.date32()), ["1970-01-01", "1970-01-02"]),
    ],
)
def test_ids_become_strings(tmp_path: Path, ids: pa.Array, texts: list[str | None]) -> None:
    path = parquet(tmp_path, {"prompt": ["a", "b"], "id": ids})
    check_input(path)
    assert [row.id for row in read(path)] == texts


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()], ids=str)
def test_text_that_is_not_utf8_is_rejected_by_row(tmp_path: Path, kind: pa.DataType) -> None:
    rows = read(parquet(tmp_path, {"prompt": not_utf8(kind), "id": not_utf8(kind).take(pa.array([3, 0, 1, 1]))}))
    assert [(type(row), row.id, row.prompt) for row in rows] == [
        (Request, "b", "a"),
        (Rejected, "a", None),
        (Rejected, None, None),
        (Rejected, None, "b"),
    ]
    assert [row.error.split(": ")[1].split(";")[0] for row in rows if isinstance(row, Rejected)] == [
        "the prompt is not UTF-8",
        "the prompt is null",
        "the id is not UTF-8",
    ]


def test_rows_keep_their_numbers_over_batches_and_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "BATCH_ROWS", 7)
    path = parquet(tmp_path, {"prompt": [str(row) for row in range(100)]}, row_group_size=30)
    assert [(row.row, row.place, row.prompt) for row in read(path, first_row=5)] == [
        (5 + row, f"p.parquet:row {row}", str(row)) for row in range(100)
    ]


def test_one_column_can_be_prompt_and_id(tmp_path: Path) -> None:
    (row,) = read(parquet(tmp_path, {"text": ["a"]}), prompt_column="text", id_column="text")
    assert (row.id, row.prompt) == ("a", "a")


def test_a_parquet_scan_counts_and_hashes(tmp_path: Path) -> None:
    path = parquet(tmp_path, {"prompt": ["a", None, "b"]})
    data = path.read_bytes()
    assert scan_input(path) == InputFacts(3, hashlib.sha256(data).hexdigest(), len(data))


def test_zero_parquet_rows_are_fine(tmp_path: Path) -> None:
    path = parquet(tmp_path, {"prompt": pa.array([], pa.string())})
    check_input(path)
    assert (read(path), scan_input(path).rows) == ([], 0)


def test_a_flipped_bit_in_parquet_is_an_input_error(tmp_path: Path) -> None:
    path = parquet(tmp_path, {"prompt": ["Once upon a time"] * 9}, compression="none", write_page_checksum=True)
    data = bytearray(path.read_bytes())
    data[data.index(b"upon a")] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"^p\.parquet:row 0: the Parquet data is damaged here or later"):
        read(path)


@given(at=st.integers(0, 10_000), byte=st.integers(0, 255), cut=st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_damaged_parquet_file_is_read_or_named(tmp_path: Path, at: int, byte: int, cut: bool) -> None:
    path = parquet(tmp_path, {"prompt": ["a", "b", None] * 20, "id": list(range(60))}, write_page_checksum=True)
    data = bytearray(path.read_bytes())
    at %= len(data)
    data[at] = byte
    path.write_bytes(data[:at] if cut else data)
    try:
        check_input(path)
        scan_input(path)
        read(path)
    except InputError as error:
        assert str(error).startswith((f"{path}: ", "p.parquet:row "))  # noqa: PT017  # both outcomes are lawful
        assert "\n" not in str(error)  # noqa: PT017


# ---- check_input


def refusal(path: Path, *columns: str) -> str:
    with pytest.raises(InputError) as caught:
        check_input(path, *columns)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_file_names_its_nearest(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_bytes(GOOD)
    assert f"did you mean {tmp_path}/prompts.jsonl?" in refusal(tmp_path / "promts.jsonl")
    assert "check the name" in refusal(tmp_path / "entirely different.parquet")
    assert "no such file" in refusal(tmp_path / "nowhere" / "prompts.jsonl")


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").mkdir()
    os.mkfifo(tmp_path / "f.jsonl")
    assert "no file in this directory" in refusal(tmp_path / "d.jsonl")
    assert "a pipe or device" in refusal(tmp_path / "f.jsonl")
    assert "cannot be read" in refusal(tmp_path / "d.jsonl" / ("x" * 300))


@pytest.fixture
def unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "p.jsonl"
    path.write_bytes(GOOD)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")  # as root, file modes refuse nothing

    monkeypatch.setattr("builtins.open", refuse)
    yield path
    monkeypatch.undo()


def test_an_unreadable_file_is_refused(unreadable: Path) -> None:
    assert refusal(unreadable) == f"{unreadable}: cannot be read: Permission denied"


@pytest.mark.parametrize("name", ["p.xlsx", "p", "p.txt.gz", "p.parquet.gz", "p.gz", "p.csv.bz2"])
def test_an_unknown_suffix_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(GOOD)
    assert "rename or convert" in refusal(tmp_path / name)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        ('{"prompt": "a"}'.encode("utf-16"), "UTF-16"),
        ('{"prompt": "a"}'.encode("utf-16-le"), "UTF-16"),
        ('{"prompt": "a"}'.encode("utf-16-be"), "UTF-16"),
        (b"PAR1....", "a Parquet file, not JSON lines; name it .parquet"),
        (gzip.compress(GOOD, mtime=0), "a gzip file"),
        (b"PK\x03\x04....", "a zip file"),
        (bytes(range(256)) * 10, "none of the first 11 rows is a JSON object"),
        (b"id,prompt\n1,Once\n", "none of the first 2 rows is a JSON object with a key; p.jsonl:1: not JSON"),
        (b'[{"prompt": "a"}]', "p.jsonl:1: the line is an array, not an object"),
        (b"{}\n{}", "none of the first 2 rows is a JSON object with a key; write "),
    ],
)
def test_what_is_not_json_lines_is_named(tmp_path: Path, data: bytes, what: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(data)
    assert what in refusal(path)


def test_a_gzip_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl.gz").write_bytes(GOOD)
    assert "not a gzip file" in refusal(tmp_path / "p.jsonl.gz")


def test_a_prompt_key_that_no_row_has_is_a_bad_job(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"text": "a", "id": 1}\nnonsense\n{"Prompt": 2}')
    error = refusal(path)
    assert "in the first 3 rows no key 'prompt'; the keys are 'text', 'id', 'Prompt'; did you mean 'Prompt'" in error
    check_input(path, "text")


def test_one_good_row_in_the_first_thousand_makes_a_good_job(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"nonsense\n" * 999 + GOOD)
    check_input(path)
    path.write_bytes(b'{"x": 1}\n' * 1000 + GOOD)
    assert "in the first 1000 rows no key 'prompt'" in refusal(path)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_only_the_default_id_column_may_be_absent(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"p.{suffix}"
    if suffix == "jsonl":
        path.write_bytes(b'{"prompt": "a", "idx": 1}')
    else:
        parquet(tmp_path, {"prompt": ["a"], "idx": [1]})
    check_input(path)
    check_input(path, "prompt", "idx")
    assert "did you mean 'idx'? pass it as --id-column" in refusal(path, "prompt", "index")


def test_parquet_columns_that_cannot_be_prompts_are_refused(tmp_path: Path) -> None:
    assert "no column 'prompt'; the columns are 'text'" in refusal(parquet(tmp_path, {"text": ["a"]}))
    assert "'prompt' is of type int64; cast it to string" in refusal(parquet(tmp_path, {"prompt": [1]}))
    assert "'prompt' is of type binary; cast it to string" in refusal(parquet(tmp_path, {"prompt": [b"a"]}))
    assert "'prompt' is of type null; cast it to string" in refusal(parquet(tmp_path, {"prompt": pa.nulls(2)}))
    assert "is of type struct<" in refusal(parquet(tmp_path, {"prompt": [{"a": "b"}]}))


@pytest.mark.parametrize("ids", [[b"a"], [["a"]], [{"a": 1}]])
def test_parquet_columns_that_cannot_be_ids_are_refused(tmp_path: Path, ids: list[Any]) -> None:
    path = parquet(tmp_path, {"prompt": ["a"], "id": ids})
    assert "cast it to string or an integer type" in refusal(path)


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table([["a"], ["b"]], names=["prompt", "prompt"]), path)
    assert "2 columns are called 'prompt'" in refusal(path)


@pytest.mark.parametrize("data", [b"", b"PAR1", GOOD, b"PAR1" + b"\0" * 100 + b"PAR1"])
def test_what_is_not_parquet_is_named(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "p.parquet"
    path.write_bytes(data)
    assert "not a Parquet file, or a damaged one" in refusal(path)


def test_places_can_be_written_whatever_the_file_is_called(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"p\xff.jsonl")
    path.write_bytes(b"nonsense")
    (row,) = read(path)
    assert isinstance(row, Rejected)
    assert row.error.encode().startswith("p\ufffd.jsonl:1: not JSON".encode())


def test_the_samples_are_all_good_rows() -> None:
    path = Path(__file__).parents[1] / "data" / "prompts" / "sample.jsonl"
    check_input(path)
    rows = read(path)
    assert len(rows) == len({row.id for row in rows}) == 12
    assert all(isinstance(row, Request) and row.id and row.prompt for row in rows)


# ---- parameters of a row's own


@pytest.fixture(params=["jsonl", "parquet"])
def rows(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Path]:
    """Writes columns in either format."""

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
    got = [item.params for item in read_requests(path, params=base) if isinstance(item, Request)]
    assert got == [
        SamplingParams(max_tokens=3, stop=("x",), logit_bias=((5, 1.0),)),
        SamplingParams(max_tokens=9, stop=("s",), echo=True),
        SamplingParams(max_tokens=5, stop=("y", "z")),
    ]
    assert {item.params for item in read_requests(path, params=base, own_params=False)} == {base}


def test_a_rows_parameter_out_of_range_rejects_that_row_alone(rows: Callable[..., Path]) -> None:
    path = rows(prompt=["a", "b", "c"], id=["x", "y", "z"], temperature=[0.5, -1.0, None])
    first, bad, last = read_requests(path, params=SamplingParams())
    assert isinstance(bad, Rejected)
    assert (bad.id, bad.prompt, bad.row) == ("y", "b", 1)
    assert bad.error == f"{bad.place}: temperature -1.0 is out of range (0 (greedy), or 0.001 to 100)"
    assert isinstance(first, Request)
    assert isinstance(last, Request)


def test_a_prompt_column_called_like_a_parameter_is_the_prompt(rows: Callable[..., Path]) -> None:
    path = rows(stop=["a"], seed=["i"])
    (item,) = read_requests(path, prompt_column="stop", id_column="seed", params=SamplingParams())
    assert (item.prompt, item.id, item.params) == ("a", "i", SamplingParams())


def test_a_misspelt_parameter_is_a_rejected_row_of_json_and_a_refused_parquet_file(tmp_path: Path) -> None:
    error = only_error(tmp_path, b'{"prompt": "a", "max_token": 3}')
    assert error.endswith("'max_token' is no parameter; did you mean 'max_tokens'? rename it")
    path = parquet(tmp_path, {"prompt": ["a"], "max_token": [3]})
    with pytest.raises(InputError, match="column 'max_token' is no parameter.*--no-row-params"):
        check_input(path)
    check_input(path, own_params=False)


def test_parameter_columns_that_are_not_text_or_twice_are_told(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    table = pa.table({"prompt": ["a", "b"], "stop": not_utf8(pa.string())[:2]})
    pq.write_table(table, path)
    assert all(isinstance(item, (Request, Rejected)) for item in read_requests(path, params=SamplingParams()))
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array([1]), pa.array([2])], ["prompt", "n", "n"])
    pq.write_table(twice, path)
    with pytest.raises(InputError, match="2 columns are called 'n'"):
        check_input(path)


def test_the_scan_tells_whether_a_row_may_ask_for_logprobs(rows: Callable[..., Path]) -> None:
    assert scan_input(rows(prompt=["a", "b"], logprobs=[None, 1])).logprobs
    assert not scan_input(rows(prompt=["a", 'say \\"logprobs\\"'], n=[1, 2])).logprobs
