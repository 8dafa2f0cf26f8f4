"""report/: the page shows what the output holds; what others wrote is only ever text in it."""

import builtins
import errno
import json
import math
import os
import re
import shlex
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.main import get_command
from typer.testing import CliRunner

from batchgen.errors import BatchgenError, InputError, OutputError, UsageError
from batchgen.jobs.cli import app
from batchgen.models.model import Model
from batchgen.output.reading import read_plan
from batchgen.output.schema import Columns
from batchgen.review.report import counts, page, plots
from batchgen.review.report.compare import compare_rows, render_comparison
from batchgen.review.report.counts import SHOWN_REJECTS, SHOWN_SAMPLES, count_output, read_status
from batchgen.review.report.markup import Markup, element, join, visible
from batchgen.review.report.measures import measure_output
from batchgen.review.report.page import render, write_report
from batchgen.run import run_job
from batchgen.types import MAX_REASONS, EmbeddingRow, SamplingParams, ScoreRow
from tests.support.jobs import make_job
from tests.support.models import write_byte_model
from tests.support.plans import plan_of
from tests.support.scores import KINDS, write_rows, write_scores

HOSTILE = [
    "<script>alert(1)</script>",
    "</title></style></script></body></html>",
    "<img src=x onerror=alert(2)>",
    "\" onmouseover='alert(3)' x=\"",
    "&lt;b&gt; &amp;",
    "\x00\x1b[2J\x07\x9b31m",
    "\u202eright to left\u2066",
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "\ufffe\U000e0001\ue000",
    "--><!--]]>",
]
VOID = {"meta"}


class Page(HTMLParser):
    """What a browser would see: elements with their attributes, and the text outside of style."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.open = "", []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data

    def names(self) -> set[str]:
        return {name for name, _ in self.elements}


ELEMENTS = {
    "html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "div", "b", "i", "span", "figure", "tr",
    "table", "th", "td", "details", "summary", "pre", "code", "svg", "g", "path", "defs", "use", "text", "rect",
    "clippath",
}  # fmt: skip


def write_output(path: Path, rows: list[dict], plan: dict | None = None) -> Path:
    """An output of any rows: what is not given is null. `plan` has other fields of its plan."""
    schema = Columns().schema()
    base = dict.fromkeys(schema.names) | {"sample": 0, "status": "ok"}
    values = {"model": "m", "rows": len(rows), "input": "0" * 64, "parameters": SamplingParams()}
    metadata = json.dumps(plan_of(**values | (plan or {})).to_json())
    table = pa.Table.from_pylist([base | {"row": number} | row for number, row in enumerate(rows)], schema)
    with open(path, "wb") as file:  # opened here: Arrow itself does not take every name
        pq.write_table(table.replace_schema_metadata({"batchgen": metadata}), file)
    return path


def ok(completion: str = "said", **more: object) -> dict:
    row = {"prompt": "Once", "completion": completion, "prompt_tokens": 4, "completion_tokens": 3}
    return row | {"finish_reason": "stop"} | more


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    """An output of a run, with good rows and bad."""
    folder = tmp_path_factory.mktemp("report")
    lines = [json.dumps({"id": f"r{i}", "prompt": "word " * (1 + i % 20)}) for i in range(60)]
    (folder / "p.jsonl").write_text("\n".join([*lines, "not JSON", '{"prompt": ""}', '{"prompt": ""}']))
    params = SamplingParams(max_tokens=9, temperature=0.7, n=2)
    model = str(write_byte_model(folder / "m"))
    run_job(make_job(folder / "p.jsonl", folder / "out.parquet", model, params, jobs=1, status=False))
    return folder / "out.parquet"


# ---- what it shows


def test_the_page_shows_what_the_run_made(real):
    seen = Page(render(real))
    table = pq.read_table(real)
    assert "123 rows from 63 prompts: 120 ok, 3 rejected, 0 failed." in seen.text
    assert f"{sum(table['completion_tokens'].drop_null().to_pylist()):,}completion tokens" in seen.text
    assert "Rows without a completion: 3" in seen.text
    assert "not JSON" in seen.text
    assert f"{SHOWN_SAMPLES} completions, drawn from all" in seen.text
    assert "temperature0.7" in seen.text
    assert (
        "batchgen generate INPUT -o out.parquet --model m --input-format jsonl --max-tokens 9 --temperature 0.7 --n 2"
        in seen.text
    )
    assert "OUTPUT.status.json, beside the output) is missing" in seen.text
    assert sum(name == "svg" for name, _ in seen.elements) == 2
    assert seen.names() <= ELEMENTS


def test_equal_outputs_give_equal_pages(real, tmp_path):
    write_report(real, tmp_path / "a.html")
    write_report(real, tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    write_report(real, tmp_path / "a.html")


def test_only_a_report_is_replaced_by_a_report(real, tmp_path):
    (tmp_path / "a.html").write_text("<!doctype html><p>mine")
    with pytest.raises(OutputError, match="no report of batchgen; choose another name, or move it away"):
        write_report(real, tmp_path / "a.html")
    assert (tmp_path / "a.html").read_text() == "<!doctype html><p>mine"


def test_the_page_needs_nothing_but_itself(real):
    html = render(real)
    seen = Page(html)
    for _, attributes in seen.elements:
        links = {"src", "href", "xlink:href", "srcset", "action", "data"} & attributes.keys()
        assert all((attributes[link] or "").startswith("#") for link in links)
    assert not re.search(r"@import|url\((?!#)", html)
    policy = next(a["content"] for _, a in seen.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    assert '<meta name="viewport"' in html
    assert "prefers-color-scheme: dark" in html


def test_names_in_the_plots_are_of_one_plot_each(real):
    ids = [attributes["id"] for _, attributes in Page(render(real)).elements if "id" in attributes]
    assert ids
    assert len(ids) == len(set(ids))


def test_counts_are_those_of_the_rows(tmp_path):
    rows = [ok(completion_tokens=i % 7, prompt_tokens=5, row=i // 2, sample=i % 2) for i in range(200)]
    rows += [{"status": "rejected", "error": f"p.jsonl:{i}: bad", "row": 100 + i} for i in range(80)]
    rows += [{"status": "failed", "error": "it died", "row": 180}]
    found = count_output(write_output(tmp_path / "out.parquet", rows))
    assert found.statuses == {"ok": 200, "rejected": 80, "failed": 1}
    assert found.input_rows == 181
    assert found.prompt_tokens == {5: 100}
    assert found.completion_tokens == Counter(i % 7 for i in range(200))
    assert [(reason.rows, reason.text) for reason in found.reasons.values()] == [(80, "bad"), (1, "it died")]
    assert len(found.rejects) == SHOWN_REJECTS
    assert len(found.samples) == SHOWN_SAMPLES


def test_samples_are_drawn_from_all_rows(tmp_path):
    rows = [ok(str(i)) if i % 2 else {"status": "rejected"} for i in range(30_000)]
    drawn = [row["row"] for row in count_output(write_output(tmp_path / "out.parquet", rows)).samples]
    assert drawn == sorted(set(drawn))
    assert len(drawn) == SHOWN_SAMPLES
    assert all(row % 2 for row in drawn)
    assert min(drawn) < 10_000
    assert max(drawn) > 20_000


def test_reasons_that_are_all_different_are_bounded(tmp_path):
    rows = [{"status": "rejected", "error": "x" * i} for i in range(1, 2 * MAX_REASONS)]
    found = count_output(write_output(tmp_path / "out.parquet", rows))
    assert sum(reason.rows for reason in found.reasons.values()) == len(rows)
    assert len(found.reasons) <= MAX_REASONS + 1


def test_a_reason_is_shown_as_its_first_error_says_it(tmp_path):
    rows = [{"status": "rejected", "error": f"p.jsonl:{i}: {200 + i} prompt tokens exceed 128"} for i in (7, 9)]
    text = Page(render(write_output(tmp_path / "out.parquet", rows))).text
    assert "why: the first of each kindrowsp.jsonl:7: 207 prompt tokens exceed 1282" in text
    assert "N prompt tokens" not in text


def test_the_shortest_the_least_likely_and_the_repeated_are_those_of_all_rows(tmp_path):
    rows = [ok(f"text {i % 90}", completion_tokens=5 + i % 50, id=str(i)) for i in range(100)]
    rows[70] |= {"completion_tokens": 0, "completion": ""}
    rows[20] = {"status": "rejected", "error": "p.jsonl:20: bad"}
    found = count_output(write_output(tmp_path / "out.parquet", rows))
    assert [row["row"] for row in found.shortest] == [70, 0, 50, 1, 51]
    assert found.repeated == 10
    assert [(often, row["row"]) for often, row in found.most_repeated] == [(2, i) for i in range(5)]
    assert found.least_likely == []


def test_the_least_likely_completions_have_the_lowest_mean(tmp_path):
    path = write_output(tmp_path / "out.parquet", [ok(f"text {i}") for i in range(8)])
    table = pq.read_table(path)
    values = [[-1.0, -1.0], [-9.0], None, [], [-3.0, -5.0], [-2.0], [-0.5], [-0.1]]
    pq.write_table(table.append_column("logprobs", pa.array(values, pa.list_(pa.float32()))), path)
    found = count_output(path)
    assert [row["row"] for row in found.least_likely][:5] == [1, 4, 5, 0, 6]
    assert found.mean_logprob == pytest.approx(-21.6 / 8)


@given(st.lists(st.integers(0, 50), min_size=1), st.sampled_from([1, 5, 25, 50, 75, 99, 100]))
def test_percentiles_are_those_of_numpy(numbers, percent):
    expected = np.percentile(numbers, percent, method="inverted_cdf")
    assert counts.percentile(Counter(numbers), percent) == expected


def test_the_last_part_of_a_resumed_run_is_told_apart(tmp_path):
    path = write_output(tmp_path / "out.parquet", [ok() for _ in range(10)])
    status = {"timeline": [[0, 6, 0], [2, 10, 12]], "rows_resumed": 6, "completion_tokens": 12, "ok": 10}
    (tmp_path / "out.parquet.status.json").write_text(json.dumps(status))
    text = Page(render(path)).text
    assert "10prompts10completions40prompt tokens30completion tokens" in text
    assert "earlier parts did 6 of the prompts:4prompts12completion tokens6tokens/s2.0 srun time" in text


def test_the_head_says_what_when_and_where(tmp_path):
    path = write_output(tmp_path / "out.parquet", [ok()])
    assert "model: m" in Page(render(path)).text
    status = {"input": ["a.jsonl", "b.csv"], "started": "2026-03-01T22:00:05+00:00", "host": "night-1"}
    (tmp_path / "out.parquet.status.json").write_text(json.dumps(status))
    assert "input: a.jsonl, b.csv; model: m; 2026-03-01 22:00 UTC; on night-1" in Page(render(path)).text


# ---- two outputs


def test_two_outputs_are_compared_in_numbers_parameters_and_rows(tmp_path):
    one = [ok(f"text {i}") for i in range(6)]
    other = [ok(f"text {i}" if i != 3 else "<b>other") for i in range(6)]
    a = write_output(tmp_path / "a.parquet", one)
    b = write_output(tmp_path / "b.parquet", other, {"parameters": SamplingParams(temperature=0.5)})
    seen = Page(render_comparison((a, b)))
    assert "5 of 6 rows that both have are the same." in seen.text
    assert "temperature0.00.5" in seen.text
    assert "A: row 3, sample 0" in seen.text
    assert "<b>other" in seen.text
    assert seen.names() <= ELEMENTS


def test_outputs_of_other_samples_are_compared_where_both_have_a_row(tmp_path):
    a = write_output(tmp_path / "a.parquet", [ok("x", row=i // 2, sample=i % 2) for i in range(8)])
    b = write_output(tmp_path / "b.parquet", [ok("x", row=i + 1) for i in range(5)])
    common = compare_rows(a, b)
    assert (common.rows, common.equal) == (3, 3)


def test_outputs_of_other_inputs_are_not_compared_row_by_row(tmp_path):
    a = write_output(tmp_path / "a.parquet", [ok()])
    b = write_output(tmp_path / "b.parquet", [ok()], {"input": "1" * 64})
    assert "The inputs differ" in Page(render_comparison((a, b))).text


# ---- the plots


@pytest.mark.parametrize(
    ("lowest", "highest", "width"), [(0, 39, 1), (0, 40, 2), (0, 1023, 50), (7, 7, 1), (1000, 1039, 1)]
)
def test_bins_are_few_and_round(lowest, highest, width):
    assert plots.bin_width(lowest, highest) == width


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_bins_are_enough(lowest, more):
    width = plots.bin_width(lowest, lowest + more)
    assert (lowest + more) // width - lowest // width < plots.BINS


def test_the_speed_between_two_points_is_that_of_their_difference():
    edges, rates = plots.rates_between([(0.0, 0, 0), (1.0, 1, 10), (3.0, 2, 50)])
    assert edges.tolist() == [0.0, 1.5, 3.0]
    assert np.allclose(rates, [20 / 1.5, 20])
    edges, rates = plots.rates_between([(float(i), i, 5 * i) for i in range(200)])
    assert len(rates) == plots.STEPS
    assert np.allclose(rates, 5)


def test_the_speed_of_a_timeline_is_drawn(tmp_path):
    path = write_output(tmp_path / "out.parquet", [ok()])
    status = tmp_path / "out.parquet.status.json"
    status.write_text(json.dumps({"timeline": [[0, 0, 0], [0, 0, 0], [60, 1, 600], [120, 2, 1200]]}))
    seen = Page(render(path))
    assert "10tokens/s" in seen.text
    assert "2 min 0 srun time" in seen.text
    assert any(a.get("aria-label", "").startswith("Speed: 10 tokens a second") for _, a in seen.elements)


def test_a_run_ends_where_its_status_says(tmp_path):
    path = write_output(tmp_path / "out.parquet", [ok()])
    status = {"timeline": [[0, 0, 0], [60, 1, 600]], "seconds": 100, "rows_done": 1, "completion_tokens": 3000}
    (tmp_path / "out.parquet.status.json").write_text(json.dumps(status))
    assert read_status(path, count_output(path)).timeline[-1] == (100.0, 1, 3000)
    assert "30tokens/s" in Page(render(path)).text


@pytest.mark.parametrize(
    "status",
    [
        "", "{", "[]", "null", '{"timeline": null}', '{"timeline": []}', '{"timeline": [[0, 0, 0]]}', "[" * 10**5,
        '{"timeline": [[0, 0, 0], [0, 1, 1]]}', '{"timeline": [[0, 0, 9], [1, 1, 1]]}',
        '{"timeline": [[0, 0, 0], [1e999, 1, 1]]}',
        '{"timeline": [[0, 0, 0], [NaN, 1, 1]]}', '{"timeline": [[0, 0, 0], [1, 1]]}',
        '{"timeline": [[1, 0, 0], [0, 1, 1]]}',
        '{"timeline": [[0, 0, 0], ["<script>", 1, 1]]}', '{"timeline": [[0, 0, 0], [1, 1, 1' + "0" * 400 + "]]}",
        '{"timeline": [[0, 0, 0], [1, 1, Infinity]]}', "\ud800",
    ],
)  # fmt: skip
def test_a_status_file_without_a_timeline_counts_as_none(tmp_path, status):
    path = write_output(tmp_path / "out.parquet", [ok()])
    (tmp_path / "out.parquet.status.json").write_text(status, errors="surrogatepass")
    assert read_status(path, count_output(path)).timeline is None
    assert "Not known" in Page(render(path)).text


def test_a_status_file_of_another_run_counts_as_none(tmp_path):
    path = write_output(tmp_path / "out.parquet", [ok()])
    for number, expected in [(1, True), (2, False)]:
        status = {"timeline": [[0, 0, 0], [1, 1, 3]], "ok": number, "rejected": 0}
        (tmp_path / "out.parquet.status.json").write_text(json.dumps(status))
        assert bool(read_status(path, count_output(path)).timeline) is expected


def test_the_error_without_the_plotting_library_says_how_to_install_it(real, tmp_path, monkeypatch):
    load = builtins.__import__

    def without(name, *rest):
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError(name)
        return load(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(BatchgenError, match=r"^a report needs matplotlib; install it with: pip install matplotlib$"):
        write_report(real, tmp_path / "a.html")
    assert list(tmp_path.iterdir()) == []


# ---- what others wrote


@given(st.text(), st.text())
def test_text_is_text_whatever_it_holds(text, value):
    seen = Page(element("p", visible(text), title=value))
    assert seen.names() <= {"p", "i"}
    assert seen.text == "".join(Page(visible(character)).text for character in text)
    assert seen.elements[0][1]["title"] == value


def test_only_markup_goes_in_as_it_is():
    assert join("<b>", Markup("<b>")) == "&lt;b&gt;<b>"
    assert element("td", "a < b", class_="n", id=None) == '<td class="n">a &lt; b</td>'


def test_what_is_unseen_is_shown():
    assert Page(visible("a\x1b\u202e\ud800\u2028b")).text == r"a\x1b\u202e\ud800\u2028b"
    family = "\U0001f468\u200d\U0001f469"
    assert visible(f"tab\tline\n\u00a0{family}") == f"tab\tline\n\u00a0{family}"


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_that_a_row_holds_becomes_an_element(tmp_path, text):
    rows = [
        ok(text, prompt=text, id=text, finish_reason=text),
        {"status": "rejected", "error": f"{text}:1: {text}", "id": text},
    ]
    plan = {"model": text, "parameters": SamplingParams(stop=(text,)), "keep": (text,), "input": text, "regex": text}
    html = render(write_output(tmp_path / "out.parquet", rows, plan | {"prompt_column": text, "id_column": text}))
    seen = Page(html)
    assert seen.names() <= ELEMENTS
    assert not any(key.startswith("on") for _, attributes in seen.elements for key in attributes)
    assert not any(ord(c) < 32 and c != "\n" for c in html)
    assert "\u202e" not in html


@pytest.mark.parametrize(
    "name", ["<script>.parquet", "a b'c\".parquet", "line\nfeed.parquet", "\x1b[31m.parquet", "\udcff.parquet"]
)
def test_a_file_of_any_name_has_a_page(tmp_path, name):
    write_report(write_output(tmp_path / name, [ok()]), tmp_path / "page.html")
    assert Page((tmp_path / "page.html").read_text(encoding="utf-8")).names() <= ELEMENTS


def test_huge_prompts_and_empty_completions_do_not_fill_the_page(tmp_path):
    rows = [ok("", prompt="<" * 10**6), ok("x" * 10**6, prompt=None, id="y" * 10**6)]
    rows += [{"status": "rejected", "error": "z" * 10**6}]
    html = render(write_output(tmp_path / "out.parquet", rows, {"regex": "y" * 10**5}))
    assert len(html) < 100_000
    assert "(empty)" in html
    assert "999,400 characters before" in html


@pytest.mark.parametrize("rows", [[], [{"status": "rejected", "error": "no"}], [ok(None)], [{"status": "odd"}]])
def test_an_output_without_completions_has_a_page(tmp_path, rows):
    seen = Page(render(write_output(tmp_path / "out.parquet", rows)))
    assert f"{len(rows)} rows" in seen.text


@pytest.mark.parametrize("kind", [pa.int64(), pa.uint64()])
def test_numbers_that_only_another_program_writes_have_a_page(tmp_path, kind):
    path = write_output(tmp_path / "out.parquet", [ok(), ok()])
    table = pq.read_table(path)
    place = table.column_names.index("completion_tokens")
    pq.write_table(table.set_column(place, "completion_tokens", pa.array([0, 2**63 - 1], kind)), path)
    assert "9,223,372,036,854,775,807" in Page(render(path)).text


def test_numbers_beyond_any_run_have_a_page(tmp_path):
    rows = [ok(prompt_tokens=-5, completion_tokens=2**31 - 1), ok(completion_tokens=0), ok(prompt_tokens=None)]
    assert Page(render(write_output(tmp_path / "out.parquet", rows, {"rows": 10**400}))).text


# ---- scores and embeddings


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_byte_model(tmp_path_factory.mktemp("scores") / "m")


@pytest.mark.parametrize("kind", KINDS)
def test_scores_have_a_page_with_their_measure(model, tmp_path, kind):
    path = write_scores(tmp_path / "out.parquet", kind, model)
    found, seen = measure_output(path, read_plan(path)), Page(render(path))
    rows = [row for row in pq.read_table(path).to_pylist() if row["status"] == "ok"]
    lowest, highest = found.lowest[0]["row"], found.highest[0]["row"]
    at = {row["row"]: value for row, value in zip(rows, found.values.tolist(), strict=True)}
    assert (at[lowest], at[highest]) == (min(at.values()), max(at.values()))
    assert "12 rows from 12 rows: 11 ok, 1 rejected, 0 failed." in seen.text
    assert "p:11: " in seen.text
    assert f"batchgen {'embed' if kind == 'embed' else 'score'} INPUT -o out.parquet" in seen.text
    assert all(name in seen.text and value in seen.text for name, value in found.totals.items())
    assert seen.names() <= ELEMENTS


def test_totals_are_those_of_all_tokens_and_all_answers(model, tmp_path):
    text, completion, choices = (
        (path := write_scores(tmp_path / f"{kind}.parquet", kind, model), pq.read_table(path).to_pylist()[:11])
        for kind in KINDS[:3]
    )
    totals = [measure_output(path, read_plan(path)).totals for path, _ in (text, completion, choices)]
    nats, tokens, n_bytes = (sum(row[name] for row in text[1]) for name in ("nats", "tokens", "bytes"))
    assert totals[0] == {
        "perplexity": f"{math.exp(nats / tokens):,.2f}",
        "bits per byte": f"{nats / math.log(2) / n_bytes:.4f}",
    }
    nats, tokens = -sum(row["logprob"] for row in completion[1]), sum(row["tokens"] for row in completion[1])
    assert totals[1] == {"perplexity": f"{math.exp(nats / tokens):,.2f}", "wholly greedy": "0.0 %"}
    answered = [row for row in choices[1] if row["answer"] is not None]
    right = sum(row["best"] == row["answer"] for row in answered)
    assert totals[2]["accuracy"] == f"{100 * right / len(answered):.1f} %"


@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_no_row_or_of_rejected_ones_alone_have_a_page_and_a_comparison(model, tmp_path, kind):
    whole = write_scores(tmp_path / "whole.parquet", kind, model)
    record = EmbeddingRow if kind == "embed" else ScoreRow
    rejected = record(row=0, id=None, prompt=None, status="rejected", error="p:1: no")
    for rows in ([], [rejected], [replace(rejected, status="ok", error=None)]):
        path = write_rows(tmp_path / "out.parquet", kind, Model.open(str(model)), rows)
        assert f"{len(rows)} rows" in Page(render(path)).text
        assert f"0 of {len(rows)} rows that both have are the same." in Page(render_comparison((path, whole))).text


@pytest.mark.parametrize("kind", KINDS)
def test_equal_scores_are_the_same_and_a_moved_one_is_shown(model, tmp_path, kind):
    path = write_scores(tmp_path / "a.parquet", kind, model)
    assert "12 of 12 rows that both have are the same." in Page(render_comparison((path, path))).text
    table = pq.read_table(path)
    name = {"text": "bits_per_byte", "completion": "logprob", "choices": "logprobs", "embed": "embedding"}[kind]
    rows = table.to_pylist()
    rows[3][name] = [2 * value for value in rows[3][name]] if isinstance(rows[3][name], list) else 2 * rows[3][name]
    pq.write_table(pa.Table.from_pylist(rows, table.schema), tmp_path / "b.parquet")
    text = Page(render_comparison((path, tmp_path / "b.parquet"))).text
    assert "11 of 12 rows that both have are the same." in text
    assert "A: r3: row 3" in text
    assert " at most." in text


def test_scores_are_not_compared_with_completions(model, real, tmp_path):
    path = write_scores(tmp_path / "a.parquet", "text", model)
    plan = json.dumps(json.loads(pq.read_schema(path).metadata[b"batchgen"]) | {"input": read_plan(real).input})
    pq.write_table(pq.read_table(path).replace_schema_metadata({"batchgen": plan}), path)
    assert (
        "The tasks differ, so rows of the same number are not compared." in Page(render_comparison((path, real))).text
    )


# ---- how to make it again


def command_in(page: Page) -> list[str]:
    """The words of the page's `batchgen generate` command."""
    line = next(line for line in page.text.splitlines() if "batchgen generate" in line)
    return shlex.split(line[line.index("batchgen generate") :].partition("INPUT is the file")[0])


def test_the_command_names_only_options_that_generate_has(tmp_path):
    plan = {
        "model": "m", "prompt_column": "text", "id_column": "key", "on_too_long": "shorten", "token_ids": True,
        "empty_prompt": "unconditional", "precision": "int8", "chunk_rows": 8, "batch_size": 4, "kv_bytes": 2**20,
        "row_params": False, "keep": ("a", "b"), "trim": True, "share_prefixes": False,
    }  # fmt: skip
    ones = {name: 1 for name in ("max_tokens", "min_tokens", "top_k", "n", "seed", "logprobs", "prompt_logprobs")}
    given = {"temperature": 0.5, "ignore_eos": True, "stop": ("a b", "-c"), "stop_token_ids": (1, 2)}
    params = SamplingParams(**ones, **given, logit_bias=((3, -1.0),), bad_words=("x",), echo=True)
    known = {option for p in get_command(app).commands["generate"].params for option in p.opts + p.secondary_opts}
    page = Page(render(write_output(tmp_path / "out.parquet", [ok()], plan | {"parameters": params})))
    command = command_in(page)
    assert {word.partition("=")[0] for word in command if word.startswith("-")} <= known
    assert command[command.index("--kv-memory") + 1] == str(2**20)


def test_the_command_makes_the_output_again(real, tmp_path, monkeypatch):
    monkeypatch.setenv("BATCHGEN_MODELS", str(real.parent))
    command = command_in(Page(render(real)))
    command[command.index("INPUT")] = str(real.parent / "p.jsonl")
    command[command.index("out.parquet")] = str(tmp_path / "again.parquet")
    done = CliRunner().invoke(app, [*command[1:], "--progress", "none", "-j", "1"])
    assert done.exit_code == 3, done.output
    assert pq.read_table(tmp_path / "again.parquet").equals(pq.read_table(real))


def test_lists_are_an_option_for_each(tmp_path):
    params = SamplingParams(stop=("a b", "c"))
    command = command_in(Page(render(write_output(tmp_path / "out.parquet", [ok()], {"parameters": params}))))
    place = command.index("--stop")
    assert command[place : place + 4] == ["--stop", "a b", "--stop", "c"]


def test_metadata_that_is_not_a_plan_has_no_page(real, tmp_path):
    table = pq.read_table(real)
    values = json.loads(table.schema.metadata[b"batchgen"])
    for change in (
        {"new": "x"},
        {"rows": "63"},
        {"parameters": [1]},
        {"parameters": {"<script>": 1}},
        {"trim": 1},
        {"on_too_long": "x"},
    ):
        with open(tmp_path / "out.parquet", "wb") as file:
            pq.write_table(table.replace_schema_metadata({"batchgen": json.dumps(values | change)}), file)
        with pytest.raises(InputError, match="is not a plan of this version"):
            render(tmp_path / "out.parquet")


# ---- the command


def test_the_page_goes_beside_the_output_or_where_it_is_asked_for(real, tmp_path):
    done = CliRunner().invoke(app, ["report", str(real)])
    assert (done.exit_code, done.output) == (0, f"report: {real.with_suffix('.html')}\n")
    assert CliRunner().invoke(app, ["report", str(real), "-o", str(tmp_path / "x.html")]).exit_code == 0
    assert (tmp_path / "x.html").read_bytes() == real.with_suffix(".html").read_bytes()


def test_a_run_can_write_its_report(real, tmp_path):
    command = ["generate", str(real.parent / "p.jsonl"), "--model", str(real.parent / "m"), "--report", "-j", "1"]
    done = CliRunner().invoke(app, [*command, "-o", str(tmp_path / "out.parquet")])
    assert done.exit_code == 3
    assert f"report: {tmp_path / 'out.html'}\n" in done.output
    write_report(tmp_path / "out.parquet", tmp_path / "again.html")
    assert (tmp_path / "out.html").read_bytes() == (tmp_path / "again.html").read_bytes()


def test_a_run_that_cannot_be_reported_on_does_not_begin(real, tmp_path):
    command = ["generate", str(real.parent / "p.jsonl"), "--model", str(real.parent / "m"), "--report"]
    done = CliRunner().invoke(app, [*command, "-o", str(tmp_path / "out.jsonl")])
    assert "which JSON lines lack" in str(done.exception)
    done = CliRunner().invoke(app, [*command, "-o", "s3://out/x/"])
    assert "a report is about a local output" in str(done.exception)
    (tmp_path / "out.html").mkdir()
    done = CliRunner().invoke(app, [*command, "-o", str(tmp_path / "out.parquet")])
    assert "a directory" in str(done.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["out.html"]


@pytest.mark.parametrize(
    ("page", "kind", "line"),
    [
        ("out.parquet", UsageError, "the suffix '.parquet' is not .html"),
        ("nowhere/x.html", OutputError, "is not a folder; create it"),
        ("folder.html", OutputError, "a directory"),
        ("link.html", OutputError, "a symbolic link"),
    ],
)
def test_a_page_that_must_not_be_written_is_refused_before_any_work(real, tmp_path, monkeypatch, page, kind, line):
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "link.html").symlink_to(real)
    before = real.read_bytes()
    with pytest.raises(kind, match=line):
        write_report(real, tmp_path / page)
    assert real.read_bytes() == before


def test_a_full_disk_is_one_line_and_leaves_nothing(real, tmp_path, monkeypatch):
    def full(temporary: Path, out: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("batchgen.files.os.replace", full)
    with pytest.raises(OutputError, match="x.html: cannot be written: No space left on device"):
        write_report(real, tmp_path / "x.html")
    assert list(tmp_path.iterdir()) == []


def test_a_page_does_not_take_the_place_of_its_output(real, tmp_path):
    (tmp_path / "out.html").write_bytes(real.read_bytes())
    with pytest.raises(UsageError, match="is the output itself"):
        write_report(tmp_path / "out.html", tmp_path / "out.html")


def test_what_is_no_output_is_named_and_leaves_no_page(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="not a Parquet file"):
        write_report(tmp_path / "x.parquet", tmp_path / "x.html")
    with pytest.raises(UsageError, match="which JSON lines lack"):
        write_report(tmp_path / "x.jsonl", tmp_path / "x.html")
    assert [path.name for path in tmp_path.iterdir()] == ["x.parquet"]


def test_durations_are_said_as_one_would():
    assert [page.duration(s) for s in (4.21, 200, 18_180)] == ["4.2 s", "3 min 20 s", "5 h 3 min"]
