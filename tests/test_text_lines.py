"""text_lines.py: every line of a text file that is not blank is a prompt, unchanged."""

import gzip
from pathlib import Path

import pytest

from batchgen.types import Rejected, Request
from tests.support.inputs import PARAMS, open_prompts, read, refusal, scan


def test_a_txt_has_a_prompt_a_line(tmp_path: Path) -> None:
    data = '\ufeffOnce upon \r\n\n \t\n  {"prompt": 1},"a"\tb\nno end'.encode()
    for name, stored in (("p.txt", data), ("p.TXT.gz", gzip.compress(data))):
        path = tmp_path / name
        path.write_bytes(stored)
        open_prompts(path)
        assert read(path) == [
            Request(row, f"{name}:{line}", None, prompt, PARAMS)
            for row, (line, prompt) in enumerate([(1, "Once upon "), (4, '  {"prompt": 1},"a"\tb'), (5, "no end")])
        ]
        assert scan(path).rows == 3


@pytest.mark.parametrize(
    ("text", "format"),
    [
        *(("prompt\nOnce\n", "csv"), ("id,prompt\n1,Once\n", "csv"), ('\ufeff"id";"prompt"\r\n1;Once\r\n', "csv")),
        *(("id\tprompt\n1\tOnce\n", "tsv"), ('{"prompt": "Once"}\n', "jsonl"), ('[\n{"prompt": "Once"}\n]', "jsonl")),
    ],
)
def test_a_table_in_a_txt_is_refused_unless_its_format_is_named(tmp_path: Path, text: str, format: str) -> None:
    (tmp_path / "p.txt").write_text(text)
    remedy = f"pass --input-format {format}, or --input-format txt if each line is a prompt"
    assert refusal(tmp_path / "p.txt").endswith(remedy)
    rows = list(open_prompts(tmp_path / "p.txt", format=format).requests(PARAMS))
    assert [item.prompt for item in rows] == ["Once"]
    assert open_prompts(tmp_path / "p.txt", format="txt").scan().rows == len(text.splitlines())


def test_a_line_of_text_that_is_not_utf8_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"a\n\xff\n")
    good, bad = read(tmp_path / "p.txt")
    assert isinstance(good, Request)
    assert isinstance(bad, Rejected)
    assert bad.error.startswith("p.txt:2: invalid UTF-8 at byte 1 of the line")


def test_text_has_no_columns_to_name(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"a\n")
    assert "no column 'text'; the columns are 'prompt'" in refusal(tmp_path / "p.txt", "text")
    (tmp_path / "p.txt").write_bytes("a\n".encode("utf-16"))
    assert "this is UTF-16 text" in refusal(tmp_path / "p.txt")
