"""csv_files.py: every record is one row, with the number of its first line, however broken it is."""

import csv
import io
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchgen.errors import InputError, UsageError
from batchgen.input import csv_files
from batchgen.job import InputOptions
from batchgen.types import Rejected, Request
from tests.support import inputs
from tests.support.inputs import PARAMS, open_prompts, scan

CASES = Path(__file__).parent / "cases"


def read(folder: Path, data: bytes, name: str = "p.csv", **options: str) -> list[Request | Rejected]:
    path = folder / name
    path.write_bytes(data)
    rows = inputs.read(path, **options)
    assert scan(path, **options).rows == len(rows)
    return rows


def prompts(folder: Path, data: bytes, name: str = "p.csv", **options: str) -> list[object]:
    """The prompts of all rows; of a rejected one its reason in a list."""
    rows = read(folder, data, name, **options)
    return [row.prompt if isinstance(row, Request) else [row.error.split(": ", 1)[1]] for row in rows]


def case(name: str) -> list[tuple[str | None, object]]:
    """The ids and prompts of a case; none of its rows is rejected."""
    rows = list(open_prompts(CASES / name).requests(PARAMS))
    assert all(isinstance(row, Request) for row in rows)
    return [(row.id, row.prompt) for row in rows]


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


# ---- cases


def test_case_space_after_comma() -> None:
    assert case("space_after_comma.csv") == [
        ("1", "Once upon a time there was"),
        ("2", "The king"),
        ("3", "The king, who was old"),
    ]


def test_case_semicolons() -> None:
    assert case("semicolons.csv") == [("1", "Once upon a time"), ("2", "The fox, who")]


def test_case_bom_in_the_middle() -> None:
    expected = [("1", "Once upon a time"), ("2", "The king")]
    assert case("bom_in_the_middle.csv") == expected
    assert case("bom_in_the_middle.jsonl") == expected


def test_case_quotes_silent() -> None:
    assert case("quotes_silent.tsv") == [
        ("1", "Once upon a time"),
        ("2", '"I will go away.'),
        ("3", 'And you shall come with me."'),
        ("4", '"It is I."'),
        ("5", "The king"),
    ]


def test_case_quotes_tale() -> None:
    rows = case("quotes_tale.tsv")
    assert [id_ for id_, _ in rows] == list("1234567")
    assert rows[1] == ("2", '"I will go away.')
    assert rows[4:6] == [("5", '"Who is there?" asked'), ("6", '"It is I."')]


def test_case_lists_by_pandas() -> None:
    first, second = open_prompts(CASES / "lists_by_pandas.csv").requests(PARAMS)
    assert isinstance(first, Request)
    assert isinstance(second, Request)
    assert (first.params.stop, first.params.bad_words) == (("King", "."), ())
    assert (second.params.stop, second.params.bad_words) == ((), ("who", "had"))


# ---- dialects


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
@pytest.mark.parametrize("name", ["p.csv", "p.tsv"])
def test_the_delimiter_is_seen_in_the_header(tmp_path: Path, mark: str, name: str) -> None:
    others = ",;|".replace(mark, "")
    data = f"id{mark}prompt\n1{mark}Once{others}upon\n".encode()
    assert prompts(tmp_path, data, name) == [f"Once{others}upon"]


def test_a_delimiter_can_be_given(tmp_path: Path) -> None:
    assert prompts(tmp_path, b"id:prompt\n1:a,b\n", delimiter=":") == ["a,b"]
    assert prompts(tmp_path, b"id\tprompt\n1\ta,b\n", delimiter="\\t") == ["a,b"]
    assert prompts(tmp_path, b"a;b,prompt\n1,a;b\n", prompt_column="a;b") == ["1"]
    with pytest.raises(InputError, match="the header has ';' between its names; leave --delimiter , out"):
        open_prompts(CASES / "semicolons.csv", delimiter=",")
    for wrong in ("", "ab", '"', "\n", " ", 5):
        with pytest.raises(UsageError, match="delimiter .* is out of range"):
            InputOptions("p.csv", delimiter=wrong)  # type: ignore[arg-type]


def test_excel_names_the_delimiter_in_a_first_line(tmp_path: Path) -> None:
    assert prompts(tmp_path, b"sep=\t\nid\tprompt\n1\ta,b\n") == ["a,b"]
    assert read(tmp_path, b"\xef\xbb\xbfsep=;\r\nid;prompt\r\n1;a,b\r\n") == [Request(0, "p.csv:3", "1", "a,b", PARAMS)]


def test_spaces_around_a_quoted_field_are_not_text(tmp_path: Path) -> None:
    data = b'id, "prompt" ,x\n1 , "a, ""b"" , c" ,\n2,  "a\n , ""b"\t, y \n3, a, "" \n'
    assert prompts(tmp_path, data) == ['a, "b" , c', 'a\n , "b', " a"]
    assert [row.id for row in read(tmp_path, data)] == ["1 ", "2", "3"]


def test_a_quoted_name_that_text_follows_is_rejected_with_a_space_too(tmp_path: Path) -> None:
    for data in (b'id,prompt\n1,"Who, he" said\n', b'id,prompt\n1, "Who, he" said\n'):
        assert str(prompts(tmp_path, data)[0]).startswith("['a quote within a quoted field")


def test_quotes_are_text_between_tabs_unless_asked(tmp_path: Path) -> None:
    data = b'prompt\tid\n"a"\t1\n'
    assert prompts(tmp_path, data, "p.tsv") == prompts(tmp_path, data, "p.csv") == ['"a"']
    assert prompts(tmp_path, data, "p.tsv", quotes="yes") == ["a"]
    assert prompts(tmp_path, b'"prompt"\t"id"\n"a\tb"\t1\n', "p.tsv") == ["a\tb"], "quoted names: R, QUOTE_ALL"
    assert prompts(tmp_path, b'prompt,id\n"a",1\n', quotes="no") == ['"a"']
    assert prompts(tmp_path, b'prompt,id\n"a,1\nb,2\n', quotes="no") == ['"a', "b"]


@pytest.mark.parametrize(
    "text", ['"Who?" he said', "a\tb", "a\nb", 'a\n"b"\nc', '"a\n', '\n"', '"', 'a "b"\nc', "a\n\nb"]
)
@pytest.mark.parametrize("last", [True, False])
def test_fields_that_a_program_quoted_between_tabs_are_rejected_not_cut(tmp_path: Path, text: str, last: bool) -> None:
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter="\t", lineterminator="\n")
    writer.writerows([row if last else row[::-1] for row in (["id", "prompt"], ["1", "a"], ["2", text], ["3", "b"])])
    data = out.getvalue().encode()
    found = prompts(tmp_path, data, "p.tsv")
    assert (found[0], found[-1]) == ("a", "b")
    assert all(isinstance(prompt, list) for prompt in found[1:-1])
    assert "--quotes yes" in str(found[1])
    assert prompts(tmp_path, data, "p.tsv", quotes="yes") == ["a", text, "b"]


def test_spaces_around_names_are_not_part_of_them(tmp_path: Path) -> None:
    assert read(tmp_path, b"id , prompt\n1, a\n") == [Request(0, "p.csv:2", "1", " a", PARAMS)]


def test_marks_of_joined_files_are_taken_off_and_their_headers_rejected(tmp_path: Path) -> None:
    mark = "\ufeff".encode()
    data = mark + b"id,prompt\n1,a\n" + mark + b"id,prompt\n" + mark * 2 + b'"2","b\n' + mark + b'c"\n' + mark + b"\n"
    found = prompts(tmp_path, data)
    assert found == ["a", ["the header once more, as if files were joined here; remove the line"], "b\n\ufeffc"]
    assert prompts(tmp_path, mark + b"prompt\nprompt\n" + mark + b"prompt\n") == ["prompt", found[1]]


def test_a_line_of_spaces_is_not_a_row_but_text_within_quotes_is(tmp_path: Path) -> None:
    assert prompts(tmp_path, b'  \nprompt\n   \n"a\n   \n"\n" "\n') == ["a\n   \n", " "]


# ---- broken records


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (b"1", "1 field, and the header has 2; quote a field that holds the delimiter"),
        (b"1,Once, upon", "3 fields, and the header has 2"),
        (b'1,"Once" upon', "a quote within a quoted field; write it as two"),
        (b"1,Once\rupon", "a carriage return within the line"),
        (b"1,a\0b", "a NUL byte in line 3: this is UTF-16 text, or damaged; save the file as UTF-8"),
        (b"1,a\r2,b\r", "a carriage return within the line"),
        (b"id,prompt", "the header once more"),
        (b"prompt, id", "the header once more"),
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
        (b"id;text\n1;a\n", "no column 'prompt'; the columns are 'id', 'text'"),
        (b"id:prompt\n1:a\n", "the header is a single name, 'id:prompt'; separate its columns by commas, name the"),
        (b"prompt id\na 1\n", "the header is a single name, 'prompt id'"),
        (b"myprompt\na\n", "did you mean 'myprompt'? pass it as --prompt-column"),
        (b'"id,prompt"\n"1,a"\n', "the header is a single name, 'id,prompt'"),
        (b"id,prompt\r1,a\r", "p.csv:1: a carriage return within the line; end lines with a line feed"),
        (b"prompt, prompt\na,b\n", "2 columns are called 'prompt'; rename all but one"),
        (b"prompt,prompt\na,b\n", "2 columns are called 'prompt'; rename all but one"),
        (b'"prompt\na\n', "a quote is opened here and never closed"),
        (b"\xff\xff,prompt\na,b\n", "invalid UTF-8 in line 1"),
        ("prompt,id\na,1\n".encode("utf-16"), "this is UTF-16 text, not CSV"),
        ("prompt,id\na,1\n".encode("utf-16-le"), "this is UTF-16 text, or damaged; save the file as UTF-8"),
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
    prompts=st.lists(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12).filter("\\N".__ne__),
        max_size=12,
    ),
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


def test_a_missing_value_of_a_database_is_no_text(tmp_path: Path) -> None:
    data = b"id\tprompt\tseed\tstop\n\\N\tOnce\t\\N\t\n7\t\\N\t5\t\n8\tOnce\t5\t\\N\n9\t\\Nx\t1\t.\n"
    first, no_prompt, no_stop, last = read(tmp_path, data, "p.tsv")
    assert first == Request(0, "p.tsv:2", None, "Once", PARAMS)
    assert isinstance(no_prompt, Rejected)
    assert (no_prompt.id, no_prompt.error[:25]) == ("7", r"p.tsv:3: the prompt is \N")
    assert isinstance(no_stop, Rejected)
    assert isinstance(last, Request)
    assert last.prompt == r"\Nx"


def test_columns_that_ask_for_nothing_are_read_and_others_reject_their_row(tmp_path: Path) -> None:
    data = b"prompt,n,best_of,do_sample,num_beams,length_penalty\na,2,2,False,1,1.0\nb,,,NA,,\nc,2,3,,,\nd,,,TRUE,,\n"
    first, second, best_of, do_sample = read(tmp_path, data)
    assert isinstance(first, Request)
    assert first.params == replace(PARAMS, n=2)
    assert second == Request(1, "p.csv:3", None, "b", PARAMS)
    assert error(best_of) == "p.csv:4: best_of 3 is not supported; leave it out"
    assert error(do_sample).startswith("p.csv:5: do_sample True and temperature 0.0 contradict")
