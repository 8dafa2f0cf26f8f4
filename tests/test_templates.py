"""input/templates.py: a prompt made of columns is what str.format makes of them, in every format of input."""

import csv
import datetime
import decimal
import json
from pathlib import Path
from string import Formatter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from batchgen.errors import InputError, UsageError
from batchgen.input.prompts import Prompts
from batchgen.input.templates import parse_template, with_template
from batchgen.job import InputOptions, ScoreInput
from batchgen.run import run_job
from batchgen.types import Rejected, Request, SamplingParams
from tests.support.inputs import CASES, PARAMS, open_prompts, parquet

names = st.text(
    st.characters(exclude_characters="{}[]!:.\0\r\n\ufeff", exclude_categories=["Cs"]), min_size=1, max_size=6
)
columns = names.filter(lambda name: not name.isdecimal() and name == name.strip(" "))
literals = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("{}"), max_size=6)
pieces = st.lists(st.tuples(literals, columns), min_size=1, max_size=5)


def escape(literal: str) -> str:
    return literal.replace("{", "{{").replace("}", "}}")


def prompts_of(path: Path, template: str, **options) -> list[str | None]:
    return [item.prompt for item in open_prompts(path, template=template, **options).requests(PARAMS)]


def errors_of(path: Path, template: str, **options) -> list[str]:
    items = open_prompts(path, template=template, **options).requests(PARAMS)
    return [item.error if isinstance(item, Rejected) else "" for item in items]


def write_lines(folder: Path, *rows: object) -> Path:
    path = folder / "q.jsonl"
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


# ---- templates


@given(pieces, literals, st.data())
def test_a_template_makes_what_str_format_makes(pieces, end, data):
    text = "".join(f"{escape(literal)}{{{column}}}" for literal, column in pieces) + escape(end)
    values = {column: data.draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=9)) for _, column in pieces}
    made = parse_template(text).fill(values)
    assert made == text.format(**values)
    assert made == "".join(literal + values[column] for literal, column in pieces) + end


@given(st.text(st.sampled_from("{}ab.![]: 0\n"), max_size=12))
@example("{a:}")
@example("{a!r}{b:>3}")
@example("{{{a}}}")
def test_any_text_is_a_template_of_its_columns_or_is_refused_with_the_place_of_its_fault(text):
    try:
        template = parse_template(text)
    except UsageError as error:
        reason = str(error)
        assert "; " in reason
        assert reason.startswith(("it names no column", "line ", "character "))
        if not reason.startswith("it"):
            numbers = [int(word) for word in reason.partition(":")[0].replace(",", "").split() if word.isdecimal()]
            line, character = numbers if len(numbers) == 2 else (1, numbers[0])
            assert text.split("\n")[line - 1][character - 1] in "{}"
        return
    found = [(field, form, conversion) for _, field, form, conversion in Formatter().parse(text) if field is not None]
    assert [field.column for field in template.fields] == [name for name, _, _ in found]
    assert all(not form and not conversion for _, form, conversion in found)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a {b",
            r"^character 3: \{ opens or closes no column; write \{column\}, or for the brace itself \{\{ or \}\}$",
        ),
        ("{a}\n}", r"^line 2, character 1: \} opens or closes no column"),
        ("x{{y}} }", "^character 8: "),
        ("{a{b}}", "^character 1: "),
        ("{}", r"^character 1: \{\} has no name; name a column: \{question\}$"),
        ("{0}", "has no name"),
        (
            "{a:>3}",
            r"\{a:>3\} asks for a format; values are written as they are; write \{a\}, or rename a column that has :",
        ),
        ("{a:}", "asks for a format"),
        ("{a!r}", r"asks for a format; .* write \{a\}, or rename a column that has ! in its name, or"),
        ('{"q": {a}}', r", or write \{\{ and \}\} for braces$"),
        ("{a:{b}}", "asks for a format"),
        ("{a[0]}", r"\{a\[0\]\} asks for an item; name a column, a key of an object as \{a.b\}, or rename"),
        ("", "^it names no column, so every prompt would be the same"),
        ("{{question}}", "^it names no column"),
        ("{a}\ud800", r"a lone surrogate \(\\ud800\) is not a character"),
    ],
)
def test_what_str_format_knows_and_a_template_does_not_is_refused_by_place(text, message):
    with pytest.raises(UsageError, match=message):
        parse_template(text)
    with pytest.raises(UsageError, match="^--template: "):
        open_prompts("none.jsonl", template=text)


# ---- the file of a template


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"Q: {q}\nA:", "Q: {q}\nA:"),
        (b"Q: {q}\nA:\n", "Q: {q}\nA:"),
        (b"Q: {q}\nA:\n\n", "Q: {q}\nA:\n"),
        (b"\xef\xbb\xbfQ: {q}\r\nA:\r\n", "Q: {q}\nA:"),
        (rb"{q}\n", r"{q}\n"),
    ],
)
def test_a_file_is_the_template_without_its_last_line_end(tmp_path, data, text):
    path = tmp_path / "t.txt"
    path.write_bytes(data)
    options = with_template(InputOptions("q.jsonl", template_file=path))
    assert (options.template, options.template_file) == (text, None)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{q}\xff", "invalid UTF-8 at byte 4; save the file as UTF-8"),
        (b"", "it names no column"),
        (b"\n{q", "line 2, character 1: "),
        (b"{q}" * 2**20, "is longer than 1048576 bytes"),
        (None, "cannot be read: No such file or directory; check the name"),
    ],
)
def test_a_file_that_is_no_template_is_named(tmp_path, data, message):
    path = tmp_path / "t.txt"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(UsageError, match=f"^--template-file {path}: .*{message}"):
        open_prompts("none.jsonl", template_file=path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": "{a}", "template_file": "t"}, "--template and --template-file were given; leave one out"),
        ({"template": "{a}", "prompt_column": "q"}, r"write \{q\} in the template, and leave it out"),
        ({"template_file": "t", "prompt_column": "q"}, "--template-file makes the prompt, and --prompt-column names"),
        ({"template": 5}, "template 5 is not a string"),
    ],
)
def test_options_that_contradict_a_template_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        InputOptions("q.jsonl", **options)


# ---- values

texts = st.text(st.characters(exclude_characters="\0\r", exclude_categories=["Cs"]), max_size=8)


@given(st.lists(st.fixed_dictionaries({"a": texts, "b": texts, "n": texts}), min_size=1, max_size=4), literals)
def test_every_format_of_input_gives_the_same_prompts(tmp_path_factory, rows, literal):
    folder = tmp_path_factory.mktemp("formats")
    rows = [{name: value.replace(r"\N", "N") for name, value in row.items()} for row in rows]
    template = f"{{n}}{escape(literal)}{{b}}{{n}}"
    (folder / "q.json").write_text(json.dumps(rows))
    with open(folder / "q.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["a", "b", "n"], quoting=csv.QUOTE_ALL, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    pq.write_table(pa.Table.from_pylist(rows), folder / "q.parquet")
    wanted = [template.format(**row) for row in rows]
    for path in (write_lines(folder, *rows), folder / "q.json", folder / "q.csv", folder / "q.parquet"):
        assert prompts_of(path, template) == wanted


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("", ""),
        ("{b} }{", "{b} }{"),
        ("7.0", "7.0"),
        (7, "7"),
        (7.0, "7"),
        (1.5, "1.5"),
        (-0.0, "-0.0"),
        (10**20, "100000000000000000000"),
        (1e300, "1e+300"),
        (True, "true"),
        ([1, 2.0, "ä", None, True], '[1, 2, "ä", null, true]'),
        ({"b": {"c": []}}, '{"b": {"c": []}}'),
        ("x" * 10_000_000, "x" * 10_000_000),
    ],
)
def test_a_text_is_itself_and_any_other_value_is_json(tmp_path, value, text):
    assert prompts_of(write_lines(tmp_path, {"a": value}, {"a": "y"}), "<{a}>") == [f"<{text}>", "<y>"]
    if isinstance(value, str) or (isinstance(value, int | float) and abs(value) < 2**63) or isinstance(value, dict):
        made = prompts_of(parquet(tmp_path, {"a": [value] if "b" not in str(value) else pa.array([value])}), "<{a}>")
        assert made == [f"<{text}>"] if not isinstance(value, dict) else made == ['<{"b": {"c": []}}>']


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (pa.array([datetime.date(1812, 12, 20)]), "1812-12-20"),
        (
            pa.array([datetime.datetime(1812, 12, 20, 7)], pa.timestamp("s")),
            "1812-12-20 07:00:00.000",
        ),  # Parquet has no seconds
        (pa.array([datetime.timedelta(seconds=5)], pa.duration("s")), "5"),
        (pa.array([decimal.Decimal("1.50")]), "1.50"),
        (pa.array([0.1], pa.float32()), "0.1"),
        (pa.array([np.float16(0.1)], pa.float16()), "0.099975586"),
        (pa.array([7.0], pa.float32()), "7"),
        (pa.array([2**64 - 1], pa.uint64()), "18446744073709551615"),
        (pa.array([b"abc"]), "abc"),
        (pa.array(["x"]).dictionary_encode(), "x"),
        (pa.array([[1, 2]]), "[1, 2]"),
        (pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())), '[["k", 1]]'),
        (pa.array([b"0123456789abcdef"], pa.uuid()), "30313233-3435-3637-3839-616263646566"),
    ],
)
def test_parquet_has_types_of_its_own(tmp_path, array, text):
    assert prompts_of(parquet(tmp_path, {"a": array}), "{a}") == [text]


def test_a_path_leads_into_objects_and_structs_and_a_column_of_that_name_wins(tmp_path):
    rows = [{"a": {"b": {"c": 1}}, "x": "y"}, {"a": {"b": {"c": "z"}}, "x": "y"}]
    assert prompts_of(write_lines(tmp_path, *rows), "{a.b.c}{x}") == ["1y", "zy"]
    table = pa.table({"a": pa.array([{"b": {"c": 1}}, {"b": None}, None])})
    assert prompts_of(parquet(tmp_path, table), "{a.b.c}") == ["1", None, None]
    assert errors_of(parquet(tmp_path, table), "{a.b.c}")[1].startswith("p.parquet:row 1: 'a.b.c' is null")
    both = {"a": {"b": "within"}, "a.b": "itself"}
    assert prompts_of(write_lines(tmp_path, both), "{a.b}") == ["itself"]
    assert prompts_of(parquet(tmp_path, {"a": pa.array([{"b": "within"}]), "a.b": ["itself"]}), "{a.b}") == ["itself"]
    (tmp_path / "q.csv").write_text("a.b,c\nitself,1\n")
    assert prompts_of(tmp_path / "q.csv", "{a.b}") == ["itself"]


# ---- rows and inputs that lack something


def test_a_row_that_lacks_a_value_is_rejected_by_place_and_column(tmp_path):
    rows = write_lines(
        tmp_path, {"id": "1", "q": "x"}, {"id": "2"}, {"id": "3", "q": None}, r'{"q": "\ud800"}', '{"q": NaN}'
    )
    assert errors_of(rows, "{q}") == [
        "",
        "q.jsonl:2: no key 'q', which its prompt needs; the keys are 'id'; write one, or leave the row out",
        "q.jsonl:3: 'q' is null, and its prompt needs a value; write one, or leave the row out",
        r"q.jsonl:4: 'q' has a lone surrogate (\ud800), which is not a character; remove it",
        "q.jsonl:5: 'q' is nan, and its prompt needs a value; write one, or leave the row out",
    ]
    assert [item.id for item in open_prompts(rows, template="{q}").requests(PARAMS)] == ["1", "2", "3", None, None]
    (tmp_path / "q.csv").write_text("id,q\n1,x\n2,\\N\n3,\n4\n")
    assert errors_of(tmp_path / "q.csv", "<{q}>") == [
        "",
        r"q.csv:3: 'q' is \N, as databases write a missing value; leave the row out",
        "",
        "q.csv:5: 1 field, and the header has 2; quote a field that holds the delimiter",
    ]
    path = parquet(tmp_path, {"q": pa.array([b"a", None, b"\xff"]), "x": [1.5, float("nan"), float("inf")]})
    assert [error.partition(": ")[2].partition(";")[0] for error in errors_of(path, "{q}")] == [
        "",
        "'q' is null, and its prompt needs a value",
        "'q' is not UTF-8",
    ]
    assert ["is nan" in error or "is inf" in error for error in errors_of(path, "{x}")] == [False, True, True]


def test_an_input_without_a_column_of_the_template_is_refused_with_the_nearest(tmp_path):
    (tmp_path / "q.csv").write_text("id,question\n1,x\n")
    rows = [write_lines(tmp_path, {"id": 1, "question": "x"}), tmp_path / "q.csv"]
    for path in (*rows, parquet(tmp_path, {"id": [1], "question": ["x"]})):
        with pytest.raises(
            InputError, match=r"no (key|column) 'Question'; .*did you mean \{question\}\? correct the t"
        ):
            open_prompts(path, template="{id}{Question}")
        with pytest.raises(InputError, match=r"no (key|column) 'question.x'; the (key|column)s are 'id', 'question'; "):
            open_prompts(path, template="{id}{question.x}")
    (tmp_path / "q.txt").write_text("a\n")
    assert prompts_of(tmp_path / "q.txt", "<{prompt}>{prompt}") == ["<a>a"]
    with pytest.raises(
        InputError, match=r"no column 'text'; the columns are 'prompt'; write \{prompt\} in the template"
    ):
        open_prompts(tmp_path / "q.txt", template="{text}")


def test_a_table_in_one_object_is_refused_and_a_row_alone_is_not(tmp_path):
    with pytest.raises(InputError, match="this is one JSON object, of columns"):
        open_prompts(write_lines(tmp_path, {"q": ["a", "b"], "n": [1, 2]}), template="{q}")
    with pytest.raises(InputError, match="this is one JSON object, with the rows in 'data'"):
        open_prompts(write_lines(tmp_path, {"data": [{"q": "a"}]}), template="{q}")
    assert prompts_of(write_lines(tmp_path, {"q": ["a", "b"], "n": 3}), "{q}") == ['["a", "b"]']


def test_the_batch_files_of_openai_have_their_own_prompts(tmp_path):
    line = {"custom_id": "1", "url": "/v1/completions", "body": {"prompt": "x"}}
    with pytest.raises(InputError, match="have their prompts in bodies; leave --template out"):
        open_prompts(write_lines(tmp_path, line), template="{body.prompt}")


def test_a_column_of_the_template_is_no_parameter(tmp_path):
    row = {"q": "x", "n": 3, "seed": 5, "max_tokens": 2, "options": {"n": 4}}
    table = parquet(tmp_path, {name: pa.array([value]) for name, value in row.items()})
    (tmp_path / "q.csv").write_text("q,n,seed,max_tokens\nx,3,5,2\n")
    for path in (write_lines(tmp_path, row), table, tmp_path / "q.csv"):
        (item,) = open_prompts(path, template="{n} {seed}: {q}").requests(SamplingParams())
        assert isinstance(item, Request)
        assert (item.prompt, item.params.max_tokens, item.params.seed) == ("3 5: x", 2, 0)
    (item,) = open_prompts(table, template="{options.n}").requests(SamplingParams())
    assert item.params.n == 3


def test_a_delimiter_is_found_by_the_columns_of_the_template(tmp_path):
    path = tmp_path / "q.csv"
    path.write_text("first, name;second\na, b;c\n")
    assert prompts_of(path, "{first, name}-{second}") == ["a, b-c"]


def test_the_size_of_a_row_counts_the_prompt_that_is_made_of_it(tmp_path):
    path = write_lines(tmp_path, {"q": "x" * 100})
    prompts = open_prompts(path, template="{q}" * 50)
    (rows,) = (rows for rows in prompts._read(PARAMS, pa.schema([])) if rows.items)
    assert rows.sizes == [path.stat().st_size - 1 + 5000]


@pytest.mark.parametrize("name", sorted(path.name for path in CASES.glob("*.csv"))[:3])
def test_a_template_of_one_column_gives_the_column(name):
    """Over inputs as people have them, whose prompts have any characters."""
    try:
        plain = Prompts.open(InputOptions(CASES / name))
    except InputError:
        pytest.skip("no input")
    made = list(open_prompts(CASES / name, template="{prompt}").requests(PARAMS))
    assert [item.prompt for item in made] == [item.prompt for item in plain.requests(PARAMS)]


# ---- jobs

TALES = [{"who": "fox", "where": "in the wood", "n": 2}, {"who": "king"}, {"who": "girl", "where": "by the sea"}]
TEMPLATE = "Once upon a time a {who} lived {where}, "


def test_a_run_with_a_template_is_the_run_of_the_prompts_that_it_makes(tmp_path):
    made = [{"prompt": TEMPLATE.format(**row)} | {"n": row.get("n")} for row in TALES if "where" in row]
    whole = write_lines(tmp_path, *made).rename(tmp_path / "whole.jsonl")
    options = {"max_tokens": 4, "trim": True, "jobs": 1, "temperature": 1.0}
    run_job(whole, tmp_path / "whole.parquet", **options)
    file = tmp_path / "template.txt"
    file.write_text(TEMPLATE + "\n")
    rows = write_lines(tmp_path, *(row for row in TALES if "where" in row))
    run_job(rows, tmp_path / "a.parquet", template=TEMPLATE, keep=("who",), **options)
    run_job(rows, tmp_path / "b.parquet", template_file=file, **options)
    wanted = pq.read_table(tmp_path / "whole.parquet")
    assert pq.read_table(tmp_path / "b.parquet") == wanted
    assert pq.read_table(tmp_path / "a.parquet").drop_columns("who") == wanted
    assert wanted["prompt"][0].as_py() == "Once upon a time a fox lived in the wood,"
    assert wanted.num_rows == 3


def test_a_text_to_score_and_the_prompt_of_a_completion_may_be_made_by_a_template(tmp_path):
    rows = write_lines(tmp_path, {"q": "a", "completion": "b"})
    (item,) = Prompts.open(ScoreInput(rows, template="<{q}>")).requests(PARAMS)
    assert (item.prompt, item.targets) == ("<a>", ())
    (item,) = Prompts.open(ScoreInput(rows, template="<{q}>", completion_column="completion")).requests(PARAMS)
    assert (item.prompt, item.targets) == ("<a>", ("b",))
    with pytest.raises(UsageError, match="--template makes the text, and --text-column names one; write {q} in it"):
        ScoreInput(rows, template="<{q}>", text_column="q")
