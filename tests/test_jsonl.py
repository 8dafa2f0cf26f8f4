"""jsonl.py: every line becomes exactly one Request or Rejected, and no bytes crash the reader."""

import gzip
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from batchgen.errors import InputError
from batchgen.input import json_text
from batchgen.types import Rejected, Request
from tests.support.inputs import CASES, PARAMS, facts, open_prompts, read, refusal, scan

GOOD = b'{"id": "a", "prompt": "Once"}'


def read_bytes(folder: Path, data: bytes, **options: Any) -> list[Request | Rejected]:
    path = folder / "p.jsonl"
    path.write_bytes(data)
    return read(path, **options)


def only_error(folder: Path, line: bytes) -> str:
    """The reason why a line is rejected; the good rows before and after it must not change."""
    first, bad, last = read_bytes(folder, GOOD + b"\n" + line + b"\n" + GOOD)
    assert isinstance(first, Request)
    assert isinstance(last, Request)
    assert isinstance(bad, Rejected)
    assert (bad.row, bad.place, last.row, last.place) == (1, "p.jsonl:2", 2, "p.jsonl:3")
    bad.error.encode()  # a file must be able to hold it
    return bad.error


def non_blank(data: bytes) -> int:
    """The number of rows, computed in another way than the reader does."""
    return sum(1 for line in data.split(b"\n") if line.replace(b"\xef\xbb\xbf", b"").translate(None, b" \t\r"))


# ---- what is a row


def test_rows_are_numbered_from_0_and_places_by_physical_line(tmp_path: Path) -> None:
    rows = read_bytes(tmp_path, b"\n" + GOOD + b"\n \t\r\n\r\n" + GOOD)
    assert rows == [Request(row, f"p.jsonl:{line}", "a", "Once", PARAMS) for row, line in [(0, 2), (1, 5)]]


@pytest.mark.parametrize("data", [b"", b"\n", b" \t\r\n\r\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf \n"])
def test_a_file_of_blank_lines_has_no_rows(tmp_path: Path, data: bytes) -> None:
    assert read_bytes(tmp_path, data) == []
    assert scan(tmp_path / "p.jsonl").rows == 0
    open_prompts(tmp_path / "p.jsonl")


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n", b" \t\r\n"])
def test_line_ends_are_not_part_of_a_row(tmp_path: Path, end: bytes) -> None:
    line = b"\xef\xbb\xbf " + GOOD + end
    assert [type(row) for row in read_bytes(tmp_path, line)] == [Request]
    assert [type(row) for row in read_bytes(tmp_path, line + b"\n" + line)] == [Request, Request]


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
    assume(not re.match(rb"[\xef\xbb\xbf\s]*(\[|\{\s*\n)", data))  # which begin an array or an object of several lines
    rows = read_bytes(tmp_path, data)
    assert len(rows) == non_blank(data) == scan(tmp_path / "p.jsonl").rows
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


# ---- what is wrong with a row


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not JSON: Expecting property name enclosed in double quotes at column 2"),
        (b'  {"prompt": x}', "not JSON: Expecting value at column 14"),
        (b"Once upon a time", "not JSON: Expecting value at column 1"),
        (GOOD + GOOD, "not JSON: extra data at column 30; write one object a line"),
        (b'{"prompt": NaN}', "'prompt' is a number (nan); make it a string"),
        (b'{"prompt": "a", "id": NaN}', "'id' is a number (nan); make it a string or a whole number"),
        (b'{"prompt": "a", "temperature": Infinity}', "temperature inf is out of range"),
        (b'{"prompt": {"n": 1, "text": "a"}}', "'prompt' is an object; name a string in it, such as --prompt-column"),
        (b'{"prompt": "a\x00b"}', "not JSON: Invalid control character"),
        (b'{"prompt": "a\tb"}', "not JSON: Invalid control character"),
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
        (b'{"prompt": "a", "prompt": "a"}', "the key 'prompt' appears twice; keep one"),
        (b'{"prompt": "a", "\\u0070rompt": "a"}', "the key 'prompt' appears twice; keep one"),
        (b'{"prompt": "a", "x": {"y": 1, "z": 2, "y": 3}}', "the key 'y' appears twice; keep one"),
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
        (b'{"prompt": "a", "x": [NaN, -Infinity], "y": Infinity}', "a"),
        (b"\xef\xbb\xbf" + b'{"prompt": "a"}', "a"),
        (b'{"prompt": "a", "x": 1e999, "y": {"prompt": 2}, "z": [{"q": 1}, {"q": 2}]}', "a"),
    ],
)
def test_legal_json_is_text(tmp_path: Path, line: bytes, prompt: str) -> None:
    assert read_bytes(tmp_path, line) == [Request(0, "p.jsonl:1", None, prompt, PARAMS)]


@pytest.mark.parametrize(
    ("value", "id_"),
    [("null", None), ('"7"', "7"), ("7", "7"), ("-0", "0"), ("7.0", "7"), ("1" * 400, "1" * 400), ('""', "")],
)
def test_ids_are_strings_or_whole_numbers(tmp_path: Path, value: str, id_: str | None) -> None:
    assert read_bytes(tmp_path, f'{{"id": {value}, "prompt": "a"}}'.encode())[0].id == id_


@pytest.mark.parametrize(
    ("line", "id_", "prompt"),
    [
        *(
            (b'{"id": 7, "prompt": 1}', "7", None),
            (b'{"id": 1.5, "prompt": "a"}', None, "a"),
            (b'{"id": 7}', "7", None),
        ),
        (b'{"id": 9007199254740993.0, "prompt": "a"}', None, "a"),  # it would be the id ...992
    ],
)
def test_a_rejected_row_keeps_its_good_id_or_prompt(
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
    monkeypatch.setattr(json_text, "MAX_LINE_BYTES", 1000)
    monkeypatch.setattr(json_text, "BUFFER_BYTES", 64)
    line = b'{"prompt": "' + b"x" * (1000 + extra - 14) + b'"}'
    long, *rest = read_bytes(tmp_path, line + end)
    assert isinstance(long, Rejected) == (extra > 0)
    assert [(row.row, row.place) for row in rest] == ([(1, "p.jsonl:3")] if GOOD in end else [])
    assert scan(tmp_path / "p.jsonl").rows == 1 + len(rest)
    if isinstance(long, Rejected):
        assert long.error == "p.jsonl:1: the line is longer than 1000 bytes; shorten it"


def test_a_blank_line_over_the_limit_is_not_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_text, "MAX_LINE_BYTES", 1000)
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
    assert isinstance(read_bytes(tmp_path, body.encode() + b"}", row_params=False)[0], Request)
    assert "appears twice; keep one" in only_error(tmp_path, f'{body}, "{key}": ""}}'.encode())


# ---- gzip


@pytest.mark.parametrize("name", ["p.jsonl.gz", "p.ndjson.gz", "p.json.GZ"])
def test_gzip_reads_like_the_plain_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    packed = gzip.compress(GOOD + b"\n\n") + gzip.compress(GOOD)  # two members, as `cat a.gz b.gz` makes them
    path.write_bytes(packed)
    open_prompts(path)
    assert [row.place for row in read(path)] == [f"{name}:1", f"{name}:3"]
    assert scan(path) == facts(2, hashlib.sha256(packed).hexdigest(), len(packed))


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
    for run in (scan, read):
        with pytest.raises(InputError, match=r"^p\.jsonl\.gz:\d+: the gzip data is truncated or damaged") as caught:
            run(path)
        assert "\n" not in str(caught.value)


# ---- files that are refused


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
        (b'["a"]\n["b"]', "p.jsonl:1: the line is an array, not an object"),
        (b'["a", "b"]', "p.jsonl:row 0: the line is a string, not an object"),
        (b"{}\n{}", "none of the first 2 rows is a JSON object with a key; write "),
    ],
)
def test_a_file_of_another_format_is_refused_by_its_name(tmp_path: Path, data: bytes, what: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(data)
    assert what in refusal(path)


def test_a_file_named_gz_that_is_not_gzip_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl.gz").write_bytes(GOOD)
    assert "not a gzip file" in refusal(tmp_path / "p.jsonl.gz")


def test_a_prompt_key_that_all_first_rows_lack_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"text": "a", "id": 1}\nnonsense\n{"Prompt": 2}')
    error = refusal(path)
    assert "in the first 3 rows no key 'prompt'; the keys are 'text', 'id', 'Prompt'; did you mean 'Prompt'" in error
    open_prompts(path, "text")


def test_one_good_row_in_the_first_thousand_is_enough(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"nonsense\n" * 999 + GOOD)
    open_prompts(path)
    path.write_bytes(b'{"x": 1}\n' * 1000 + GOOD)
    assert "in the first 1000 rows no key 'prompt'" in refusal(path)


# ---- keys of objects within


def test_nested_columns_are_named_by_their_path(tmp_path: Path) -> None:
    path = CASES / "nested_prompt.jsonl"
    assert "'prompt' is an object; name a string in it, such as --prompt-column prompt.text" in refusal(path)
    open_prompts(path, "prompt.text", "filename")
    assert [(row.id, row.prompt) for row in read(path, prompt_column="prompt.text", id_column="filename")] == [
        ("0001-aa.txt", "Once upon a time there was a king"),
        ("0002-bb.txt", "The old woman said to the fox,"),
    ]


@pytest.mark.parametrize(
    ("line", "prompt"),
    [
        (b'{"a.b": "flat", "a": {"b": "nested"}}', "flat"),
        (b'{"a": {"b": "nested"}}', "nested"),
        (b'{"a": {"b": 1}, "a.b": "flat"}', "flat"),
        (b'{"a": "x", "b": "y"}', None),
        (b'{"a": null}', None),
        (b'{"a": [{"b": "x"}]}', None),
        (b'{"a": {"b": "\\ud800"}}', None),
    ],
)
def test_a_flat_key_wins_over_a_path_and_a_path_leads_through_objects_only(
    tmp_path: Path, line: bytes, prompt: str | None
) -> None:
    (row,) = read_bytes(tmp_path, line, prompt_column="a.b")
    assert (row.prompt, isinstance(row, Rejected)) == (prompt, prompt is None)
