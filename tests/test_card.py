"""card.py: the card says what the metadata say, no text breaks out of it, and its folder stays what it was."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from batchgen.errors import BatchgenError, InputError, OutputError, UsageError
from batchgen.files import CARD, is_sealed_card, seal_card
from batchgen.input.prompts import Prompts
from batchgen.job import EmbedOptions, InputOptions, ScoreOptions
from batchgen.output.reading import read_plan
from batchgen.output.schema import Columns, own_names
from batchgen.review import card as card_module
from batchgen.review.card import Wishes, code, escape, feature, fence, heading, quote, size_category, write_card
from batchgen.run import run_job
from batchgen.types import Kind
from batchgen.workers.supply import Deadline
from tests.support.command import batchgen
from tests.support.models import write_byte_model

HOSTILE = "a`b ````\n---\n# x\n</pre><script>|\u202e\\"
MARKDOWN = MarkdownIt("commonmark").enable(["table"])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_model(tmp_path_factory.mktemp("card") / "bytes")


def make(folder: Path, model: Path, name: str, **options: Any) -> Path:
    """An output of 5 rows, one of which is rejected, with texts that would break a card."""
    folder.mkdir(exist_ok=True)
    lines = [{"id": f"r{i}", "prompt": f"a {i} {HOSTILE}" * (i != 3), "k|`x": HOSTILE} for i in range(5)]
    (folder / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    usual = {"jobs": 1, "chunk_rows": 2, "keep": ("k|`x",), "max_tokens": 4, "n": 2, "temperature": 1.0}
    if options.pop("plain", False):
        usual = {"jobs": 1, "chunk_rows": 2}
    run_job(folder / "p.jsonl", f"{folder}/{name}", model=model, **usual | options)
    return folder / name


def read_head(path: Path) -> dict[str, Any]:
    yaml = pytest.importorskip("yaml")
    start, head, _ = path.read_text().split("---\n", 2)
    assert start == ""
    values: dict[str, Any] = yaml.safe_load(head)
    return values


# ---- text that cannot break out


@given(st.text())
def test_any_text_in_a_fence_is_one_block(text: str) -> None:
    [block] = MARKDOWN.parse("\n".join(fence(text, "json")))
    assert block.type == "fence"
    assert block.content == "\n".join(map(escape, text.split("\n"))) + "\n"


@given(st.text(max_size=300))
def test_any_text_as_code_is_one_cell_of_a_table(text: str) -> None:
    tokens = MARKDOWN.parse(f"| | |\n|---|---|\n| {code(text)} | end |")
    cells = [token for token in tokens if token.type == "inline"][2:]
    assert len(cells) == 2
    [span] = cells[0].children or ()
    assert span.type == "code_inline"
    assert span.content.strip() == escape(text).strip()


@given(st.text())
def test_any_title_is_a_heading_of_text(text: str) -> None:
    _, inline, _ = MARKDOWN.parse(f"# {heading(text)}")
    assert {child.type for child in inline.children or ()} <= {"text", "text_special"}
    shown = "".join(child.content for child in inline.children or ())
    assert shown == (escape(" ".join(text.split())) or "Dataset")


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back_from_yaml(text: str) -> None:
    yaml = pytest.importorskip("yaml")
    assert yaml.safe_load(f"a: {quote(text)}\nb: 1") == {"a": text, "b": 1}


def test_yaml_holds_a_path_that_is_not_utf8() -> None:
    yaml = pytest.importorskip("yaml")
    assert yaml.safe_load(quote("a\udcff")) == "a\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("name", ["c.parquet", "d", "c.jsonl"])
def test_a_card_has_its_own_headings_whatever_the_rows_hold(tmp_path: Path, model: Path, name: str) -> None:
    out = make(tmp_path, model, name, output_format="dataset" if name == "d" else "file")
    text = write_card(out, Wishes(title=HOSTILE)).read_text()
    tokens = MARKDOWN.parse(text.split("---\n", 2)[2])
    headings = [after.content for token, after in zip(tokens, tokens[1:], strict=False) if token.type == "heading_open"]
    checks = [] if name == "c.jsonl" else ["To check it"]
    assert headings[1:] == ["How it was made", "Columns", "To make it again", *checks, "The first 3 of them"]
    html = [token.content for token in tokens if token.type == "html_block"]
    assert len(html) == 1
    assert html[0].startswith("<!-- batchgen card")
    assert not [child for token in tokens for child in token.children or () if child.type == "html_inline"]
    assert "\u202e" not in text


# ---- what it says


@pytest.mark.parametrize("name", ["c.parquet", "d", "c.jsonl"])
def test_a_card_says_what_the_metadata_say(tmp_path: Path, model: Path, name: str) -> None:
    out = make(tmp_path, model, name, output_format="dataset" if name == "d" else "file")
    path = write_card(out, Wishes("CC-BY-4.0", languages=("en",)))
    assert path == (out / CARD if name == "d" else tmp_path / CARD)
    head, text = read_head(path), path.read_text()
    assert (head["license"], head["language"], head["size_categories"]) == ("cc-by-4.0", ["en"], ["n<1K"])
    assert head["tags"] == ["batchgen", "gpt2", "synthetic"]
    assert head["configs"][0]["data_files"] == [{"split": "train", "path": "*.parquet" if name == "d" else name}]
    assert "9 rows from 5 input rows" in text
    assert "8 ok, 1 rejected" in text
    assert "`max_tokens` `4`, `temperature` `1.0`, `n` `2`, all others as by default" in text
    assert "| tokens generated | 32 |" in text
    if name != "c.jsonl":
        plan = read_plan(out)
        assert plan.input in text
        assert plan.model_hash in text
        assert plan.command_line(output=name) in text
        assert f"batchgen verify {name}" in text


@pytest.mark.parametrize("kind", get_args(Kind))
def test_every_column_of_our_own_has_a_meaning(kind: Kind) -> None:
    assert own_names(Columns(kind=kind, answer=True, n_embd=1)) <= card_module._MEANINGS.keys()


@pytest.mark.parametrize("task", ["score", "embed"])
def test_cards_of_other_tasks(tmp_path: Path, model: Path, task: str) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "abc"}\n{"text": "defg"}\n')
    options: dict[str, Any] = {"task": ScoreOptions() if task == "score" else EmbedOptions(), "jobs": 1}
    run_job(tmp_path / "t.jsonl", tmp_path / "s.parquet", model=model, **options)
    path = write_card(tmp_path / "s.parquet")
    text = path.read_text()
    assert f"2 rows, {'scored' if task == 'score' else 'embedded'} by the model" in text
    assert f"batchgen {task} INPUT" in text
    expected = "text-generation" if task == "score" else "feature-extraction"
    assert read_head(path)["task_categories"] == [expected]
    assert "synthetic" not in read_head(path)["tags"]


def test_answers_to_openais_requests_have_a_card(tmp_path: Path, model: Path) -> None:
    body = {"prompt": "a", "max_tokens": 2}
    line = {"custom_id": "x", "method": "POST", "url": "/v1/completions", "body": body}
    (tmp_path / "p.jsonl").write_text(json.dumps(line) + "\n")
    run_job(tmp_path / "p.jsonl", tmp_path / "a.jsonl", model=model, jobs=1)
    path = write_card(tmp_path / "a.jsonl")
    assert "1 choices, completed by" in path.read_text()
    assert '"custom_id": "x"' in path.read_text()
    assert "dataset_info" not in read_head(path)


@pytest.mark.parametrize(
    ("rows", "name"), [(0, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (12_345_678, "10M<n<100M"), (10**12, "n>1T")]
)
def test_sizes_have_the_hubs_names(rows: int, name: str) -> None:
    assert size_category(rows) == name


def test_features_are_written_as_datasets_writes_them() -> None:
    datasets = pytest.importorskip("datasets")
    yaml = pytest.importorskip("yaml")
    kinds: list[Kind] = list(get_args(Kind))
    for kind in kinds:
        schema = Columns(True, True, True, True, kind, per_token=True, answer=True, n_embd=4).schema()
        for one in schema:
            if pa.types.is_fixed_size_list(one.type):  # JSON lines do not say how long
                continue
            [expected] = datasets.Features.from_arrow_schema(pa.schema([one]))._to_yaml_list()
            lines = [f"name: {one.name}", *feature(one.type)]
            assert yaml.safe_load("\n".join(lines)) == expected


# ---- licenses and languages


def test_a_license_is_named_as_it_was_given(tmp_path: Path, model: Path) -> None:
    out = make(tmp_path, model, "c.parquet")
    assert read_head(write_card(out, Wishes("my-terms")))["license"] == "my-terms"
    assert read_head(write_card(out))["license"] == "unknown"


@pytest.mark.parametrize("wrong", [{"license": "a b"}, {"license": ""}, {"languages": ("English!",)}])
def test_names_that_the_hub_refuses_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="is no name that the Hub takes; write it as"):
        Wishes(**wrong)


# ---- the folder


LOAD = """
import json, sys
import datasets
for folder in sys.argv[2:]:
    print(json.dumps(list(datasets.load_dataset(folder, split="train", cache_dir=sys.argv[1]))))
"""


def test_datasets_reads_the_folder_as_it_is(tmp_path: Path, model: Path) -> None:
    """Among other files, other outputs, and with names that are patterns: the rows of the output and no others."""
    pytest.importorskip("datasets")
    folders = []
    for i, name in enumerate(["c.parquet", "o[1]*.jsonl", "d"]):
        folder = tmp_path / f"f{i}"
        out = make(folder, model, name, output_format="dataset" if name == "d" else "file", logprobs=1)
        make(folder, model, "other.parquet", plain=True)
        (folder / "c.html").write_text("<p>")
        write_card(out)
        folders.append(out if out.is_dir() else folder)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-c", LOAD, str(tmp_path / "hf"), *map(str, folders)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    loaded = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    expected = pq.read_table(tmp_path / "f0" / "c.parquet").to_pylist()
    assert len(expected) == 9
    assert loaded == [json.loads(json.dumps(expected))] * 3


def test_a_readme_of_someone_else_or_an_edited_card_is_replaced_only_if_asked(tmp_path: Path, model: Path) -> None:
    out = make(tmp_path, model, "c.parquet")
    (tmp_path / CARD).write_text("my project\n")
    with pytest.raises(OutputError, match="--overwrite to replace it"):
        write_card(out)
    assert (tmp_path / CARD).read_text() == "my project\n"
    write_card(out, overwrite=True)
    first = (tmp_path / CARD).read_bytes()
    assert is_sealed_card(tmp_path / CARD)
    write_card(out)
    assert (tmp_path / CARD).read_bytes() == first
    (tmp_path / CARD).write_bytes(first.replace(b"unknown", b"mit"))
    with pytest.raises(OutputError, match="or that was edited since"):
        write_card(out)


@given(st.text(), st.binary(max_size=20))
def test_an_edit_breaks_the_seal(tmp_path_factory: pytest.TempPathFactory, text: str, more: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "sealed.md"
    path.write_bytes(seal_card(text.encode(errors="replace").decode()))
    assert is_sealed_card(path)
    path.write_bytes(path.read_bytes() + more)
    assert is_sealed_card(path) == (not more)


def test_a_dataset_with_its_card_is_a_dataset(tmp_path: Path, model: Path) -> None:
    """Complete, read as input, and replaced by a later run: the card goes with it."""
    out = make(tmp_path, model, "d", output_format="dataset")
    write_card(out)
    options = {"jobs": 1, "chunk_rows": 2, "keep": ("k|`x",), "max_tokens": 4, "n": 2, "temperature": 1.0}
    again = run_job(tmp_path / "p.jsonl", out, model=model, **options)  # type: ignore[arg-type]
    assert again.complete
    assert len(Prompts.open(InputOptions(out)).sources) == 3
    run_job(tmp_path / "p.jsonl", out, model=model, max_tokens=3, jobs=1, overwrite=True)
    assert not (out / CARD).exists()
    assert read_plan(out).parameters.max_tokens == 3
    assert not (tmp_path / "d.batchgen").exists()


@pytest.mark.parametrize("text", ["mine\n", "edited"])
def test_a_dataset_with_someones_readme_is_never_replaced(tmp_path: Path, model: Path, text: str) -> None:
    out = make(tmp_path, model, "d", output_format="dataset")
    write_card(out)
    old = b"" if text == "mine\n" else (out / CARD).read_bytes()
    (out / CARD).write_bytes(text.encode() + old)
    with pytest.raises(OutputError, match=r"something other than a dataset of batchgen is there \(README.md\)"):
        run_job(tmp_path / "p.jsonl", out, model=model, max_tokens=3, jobs=1, overwrite=True)
    assert (out / CARD).read_bytes() == text.encode() + old


def test_a_card_that_comes_while_a_run_replaces_the_dataset_goes_with_it(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = make(tmp_path, model, "d", output_format="dataset")
    monkeypatch.setattr(Deadline, "check_complete", lambda *_: write_card(out))
    run_job(tmp_path / "p.jsonl", out, model=model, max_tokens=3, jobs=1, overwrite=True)
    assert read_plan(out).parameters.max_tokens == 3
    assert not (out / CARD).exists()
    assert not (tmp_path / "d.batchgen").exists()


# ---- what has no card


def test_what_is_no_complete_output_has_no_card(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Deadline, "check_complete", dies)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path, model, "u.parquet")
    cases: dict[str, str] = {
        "u.parquet": "its run is not finished",
        "no.parquet": "no such file",
        "no.jsonl": "no such file",
        "p.jsonl": "which would say how it was made, is not beside it",
        "folder": "not a complete dataset",
        "damaged.parquet": "not a Parquet file, or a damaged one",
        "lacks": "holds 4 input rows, and its metadata says 5",
    }
    (tmp_path / "folder").mkdir()
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1 no PAR1")
    lacks = make(tmp_path, model, "lacks", output_format="dataset")
    max(lacks.glob("*.parquet")).unlink()
    for name, words in cases.items():
        with pytest.raises(BatchgenError, match=words) as caught:
            write_card(tmp_path / name)
        assert isinstance(caught.value, InputError)
        assert str(tmp_path / name) in str(caught.value)
    assert not list(tmp_path.rglob(CARD))


# ---- the command


def test_the_command_says_where_the_card_is_and_that_a_license_is_missing(tmp_path: Path, model: Path) -> None:
    make(tmp_path, model, "c.parquet")
    done = batchgen("card", "c.parquet", folder=tmp_path)
    assert done.stdout.decode() == "card: README.md\nnote: the license is unknown; --license ID names it\n"
    done = batchgen("card", "c.parquet", "--license", "mit", "--language", "en", "--language", "de", folder=tmp_path)
    assert (done.returncode, done.stdout.decode()) == (0, "card: README.md\n")
    assert read_head(tmp_path / CARD)["language"] == ["en", "de"]
    done = batchgen("card", "s3://bucket/c.parquet", folder=tmp_path)
    assert done.returncode == 2
    assert b"download it first" in done.stderr
