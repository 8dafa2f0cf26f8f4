"""csv_files.py: every record is one row, with the number of its first line, however broken it is."""

import csv
import io
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchgen.errors import InputError
from batchgen.input import csv_files
from batchgen.types import Rejected, Request
from tests.support import inputs
from tests.support.inputs import PARAMS, open_prompts, scan


def read(folder: Path, data: bytes, name: str = "p.csv") -> list[Request | Rejected]:
    path = folder / name
    path.write_bytes(data)
    rows = inputs.read(path)
    assert scan(path).rows == len(rows)
    return rows


def error(row: Request | Rejected) -> str:
    assert isinstance(row, Rejected)
    return row.error


def test_fields_are_columns_and_places_the_first_lines(tmp_path: Path) -> None:
    data = b'\xef\xbb\xbfid,prompt,more\r\n1,Once,x\r\n\r\n,"a ""b"", c\nd",\n007,"",y'
    assert read(tmp_path, data) == [
        Request(0, "p.csv:2", "1", "Once", PARAMS),
        Request(1, "p.csv:4", None, 'a "b", c\nd', PARAMS),
        Request(2, "p.csv:6", "007", "", PARAMS),
    ]
    open_prompts(tmp_path / "p.csv")


def test_tabs_separate_in_tsv(tmp_path: Path) -> None:
    assert [row.prompt for row in read(tmp_path, b'prompt\tid\nOnce, upon\t1\n"a\tb"\t2\n', "p.tsv")] == [
        "Once, upon",
        "a\tb",
    ]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (b"1", "1 field, and the header has 2; quote a field that holds the delimiter"),
        (b"1,Once, upon", "3 fields, and the header has 2"),
        (b'1,"Once" upon', "a quote within a quoted field; write it as two"),
        (b"1,Once\rupon", "a carriage return within the line"),
        (b"1,\xff\xfe", "invalid UTF-8 in line 3; save the file as UTF-8"),
        (b'1,"a\n\xff"', "invalid UTF-8 in line 4"),
        (b'1,"\xed\xa0\x80"', "invalid UTF-8 in line 3"),
    ],
)
def test_only_the_bad_record_is_rejected_with_its_reason(tmp_path: Path, record: bytes, reason: str) -> None:
    rows = read(tmp_path, b"id,prompt\n0,a\n" + record + b"\n2,b\n")
    assert [row.row for row in rows] == [0, 1, 2]
    assert (rows[0].prompt, rows[2].prompt) == ("a", "b")
    assert error(rows[1]).startswith(f"p.csv:3: {reason}")


def test_an_open_quote_is_one_rejected_row_up_to_the_end(tmp_path: Path) -> None:
    rows = read(tmp_path, b'id,prompt\n0,a\n1,"b\n2,c\n')
    assert len(rows) == 2
    assert error(rows[1]).startswith("p.csv:3: a quote is opened here and never closed")


def test_a_null_character_is_text(tmp_path: Path) -> None:
    assert [row.prompt for row in read(tmp_path, b"prompt,x\na\0b,\n")] == ["a\0b"]


def test_a_quote_within_a_plain_field_is_text(tmp_path: Path) -> None:
    assert [row.prompt for row in read(tmp_path, b'prompt\n5" pipe\n')] == ['5" pipe']


@pytest.mark.parametrize("quote", [b"", b'"'])
def test_a_record_over_the_limit_is_one_rejected_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quote: bytes
) -> None:
    monkeypatch.setattr(csv_files, "MAX_RECORD_BYTES", 1000)
    monkeypatch.setattr(csv_files, "BUFFER_BYTES", 64)
    rows = read(tmp_path, b"prompt\na\n" + quote + b"x" * 5000 + quote + b"\nb\n")
    assert [row.prompt for row in rows] == ["a", None, "b"]
    assert "the record is longer than" in error(rows[1])


def test_an_open_quote_swallows_no_more_than_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_files, "MAX_RECORD_BYTES", 1000)
    rows = read(tmp_path, b'prompt\n"open\n' + b"row\n" * 1000)
    assert "the record is longer than" in error(rows[0])
    assert {row.prompt for row in rows[1:]} == {"row"}
    assert len(rows) > 700


@pytest.mark.parametrize("data", [b"", b"\n\n", b"prompt\n", b"\xef\xbb\xbfprompt"])
def test_a_file_without_records_has_no_rows(tmp_path: Path, data: bytes) -> None:
    assert read(tmp_path, data) == []
    open_prompts(tmp_path / "p.csv")


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"text,id\na,1\n", "no column 'prompt'; the columns are 'text', 'id'; name the right one"),
        (
            b"prompt,maxTokens\na,1\n",
            "'maxTokens' is not a parameter; did you mean 'max_tokens'? rename it, or pass --no-row",
        ),
        (b"Prompt\na\n", "did you mean 'Prompt'? pass it as --prompt-column"),
        (b"id;prompt\n1;a\n", "no column 'prompt'; the columns are 'id;prompt'"),
        (b"prompt,prompt\na,b\n", "2 columns are called 'prompt'; rename all but one"),
        (b'"prompt\na\n', "a quote is opened here and never closed"),
        (b"\xff\xff,prompt\na,b\n", "invalid UTF-8 in line 1"),
        ("prompt,id\na,1\n".encode("utf-16"), "this is UTF-16 text, not CSV"),
        ("prompt,id\na,1\n".encode("utf-16-le"), "this is UTF-16 text or no text at all, not CSV"),
        (b"PAR1....", "this is a Parquet file, not CSV; name it .parquet"),
    ],
)
def test_a_file_that_is_not_a_csv_of_prompts_is_refused(tmp_path: Path, data: bytes, what: str) -> None:
    (tmp_path / "p.csv").write_bytes(data)
    with pytest.raises(InputError) as caught:
        open_prompts(tmp_path / "p.csv")
    assert what in str(caught.value)
    assert "\n" not in str(caught.value)


def test_parameters_are_written_as_in_json(tmp_path: Path) -> None:
    data = b"""prompt,temperature,stop,max_tokens,logit_bias,stop_token_ids
a,0.8,5,,,
b,,"[""x"", ""y""]",3,"{""7"": -1}","[1, 2]"
c,warm,,,,
d,,,1.5,,
e,NaN,,,,
f,,,,"[[[",
"""
    rows = read(tmp_path, data)
    first, second = rows[0], rows[1]
    assert isinstance(first, Request)
    assert isinstance(second, Request)
    assert first.params == replace(PARAMS, temperature=0.8, stop=("5",))
    assert second.params == replace(
        PARAMS, stop=("x", "y"), max_tokens=3, logit_bias=((7, -1.0),), stop_token_ids=(1, 2)
    )
    assert [error(row).split(" is out of range")[0] for row in rows[2:]] == [
        "p.csv:4: temperature 'warm'",
        "p.csv:5: max_tokens 1.5",
        "p.csv:6: temperature nan",
        "p.csv:7: logit_bias",
    ]


@given(
    prompts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=12), max_size=12),
    end=st.sampled_from(["\n", "\r\n"]),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_what_the_csv_module_writes_is_read_back(tmp_path: Path, prompts: list[str], end: str) -> None:
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerows([["prompt"], *([prompt] for prompt in prompts)])
    assert [row.prompt for row in read(tmp_path, out.getvalue().encode())] == prompts


@given(data=st.lists(st.sampled_from([b"a", b",", b'"', b"\n", b"\r", b"\xff", b"\0", b" "]), max_size=40))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_no_bytes_crash_the_reader(tmp_path: Path, data: list[bytes]) -> None:
    rows = read(tmp_path, b"prompt,id\n" + b"".join(data))
    assert [row.row for row in rows] == list(range(len(rows)))
    for row in rows:
        assert isinstance(row, Request) or row.error.startswith(f"{row.place}: ")
