"""input/shots.py: the same examples before every prompt, drawn by the seed, in the order of their file."""

import hashlib
import json
import shlex
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchgen.errors import InputError, UsageError
from batchgen.input.shots import open_prompts, read_shots
from batchgen.job import InputOptions, Job, OutputOptions, ScoreInput, ScoreOptions
from batchgen.output.reading import read_plan
from batchgen.review.forecast import forecast_job
from batchgen.review.replay import replay
from batchgen.run import run_job
from batchgen.selection import select_rows
from batchgen.types import SamplingParams
from tests.support.inputs import PARAMS
from tests.test_plan import parse

TEMPLATE = "Q: {q}\nA:"


def write(folder: Path, name: str, *rows: object) -> Path:
    path = folder / name
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def examples(n: int) -> list[dict[str, str]]:
    return [{"q": f"q{i}", "completion": f" a{i}"} for i in range(n)]


@pytest.fixture
def few(tmp_path) -> Path:
    return write(tmp_path, "few.jsonl", *examples(8))


@pytest.fixture
def rows(tmp_path) -> Path:
    return write(tmp_path, "rows.jsonl", *({"q": f"who is {i}?"} for i in range(3)))


@given(st.integers(1, 40), st.data(), st.integers(0, 2**63 - 1))
def test_examples_are_drawn_without_replacement_in_the_order_of_their_file(tmp_path_factory, n, data, seed):
    few = write(tmp_path_factory.mktemp("few"), "few.jsonl", *examples(n))
    wanted = data.draw(st.integers(1, n))
    options = InputOptions("rows.jsonl", template="{q}", shots=few, n_shots=wanted, shots_end="|")
    shots = read_shots(options, seed)
    drawn = [int(part.partition(" a")[2]) for part in shots.text.split("|")[:-1]]
    assert (len(drawn), shots.number) == (wanted, wanted)
    assert drawn == sorted(set(drawn))
    assert read_shots(options, seed).text == shots.text
    if wanted < n:  # a larger draw has the smaller one
        more = read_shots(replace(options, n_shots=wanted + 1), seed)
        assert {*shots.text.split("|")} < {*more.text.split("|")}


def test_another_seed_draws_others(few):
    options = InputOptions("rows.jsonl", template="{q}", shots=few, n_shots=4)
    assert len({read_shots(options, seed).text for seed in range(20)}) > 5


def test_an_example_is_a_prompt_with_its_completion_and_its_end(few, rows, tmp_path):
    options = InputOptions(rows, template=TEMPLATE, shots=few, n_shots=2, shots_end="\n###\n")
    items = list(open_prompts(options, 0).requests(PARAMS))
    before = items[0].prompt.partition("Q: who")[0]
    assert before.count("\n###\n") == 2
    assert [item.prompt for item in items] == [f"{before}Q: who is {i}?\nA:" for i in range(3)]
    plain = InputOptions(rows, "q", shots=few, n_shots=8)
    prompts = [item.prompt for item in open_prompts(plain, 0).requests(PARAMS)]
    assert prompts[2] == "".join(f"q{i} a{i}\n\n" for i in range(8)) + "who is 2?"


@pytest.mark.parametrize("kind", ["csv", "parquet", "json"])
def test_examples_may_be_in_any_format_and_their_completions_any_value(tmp_path, rows, kind):
    made = [{"q": f"q{i}", "answer": i} for i in range(3)]
    file = tmp_path / f"few.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(made), file)
    else:
        lines = "".join(f"{row['q']},{row['answer']}\n" for row in made)
        file.write_text(json.dumps(made) if kind == "json" else f"q,answer\n{lines}")
    options = InputOptions(rows, template="{q}=", shots=file, shots_column="answer", shots_end=";")
    assert read_shots(options, 0).text == "q0=0;q1=1;q2=2;"


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        (examples(2), {"n_shots": 3}, "few.jsonl: has 2 rows; lower --n-shots 3, or add rows"),
        (examples(1), {"n_shots": 3}, "few.jsonl: has 1 row; "),
        ([], {}, "few.jsonl: has 0 rows; add rows"),
        ([{"q": "x"}], {}, "no key 'completion'; the keys are 'q'; name the right one with --shots-column"),
        (examples(2), {"shots_column": "Completion"}, "did you mean 'completion'[?] pass it as --shots-column"),
        ([{"Q": "x", "completion": "y"}], {}, r"no key 'q'; .* did you mean \{Q\}[?] correct the template"),
        ([*examples(1), {"q": "x"}], {}, "few.jsonl:2: no key 'completion', which its prompt needs"),
        ([*examples(1), {"q": None, "completion": "x"}], {}, "few.jsonl:2: 'q' is null"),
        ([*examples(1), "not JSON"], {}, "few.jsonl:2: not JSON"),
        (["not JSON"], {}, "none of the first 1 rows is a JSON object"),
        ([{"custom_id": "1", "url": "x", "body": {}}], {}, "one of OpenAI's batch files"),
        ([{"q": "x" * 2**22, "completion": "y"}], {}, "1 examples have more than 4,194,304 characters; draw fewer"),
    ],
)
def test_examples_that_are_none_are_an_error_of_the_job(tmp_path, rows, lines, options, message):
    few = write(tmp_path, "few.jsonl", *lines)
    with pytest.raises((InputError, UsageError), match=f"^--shots.*{message}"):
        open_prompts(InputOptions(rows, template=TEMPLATE, shots=few, **options), 0)


def test_a_bad_row_that_is_not_drawn_is_no_error(tmp_path, rows):
    few = write(tmp_path, "few.jsonl", *examples(5), "not JSON")
    options = InputOptions(rows, template=TEMPLATE, shots=few, n_shots=3)
    for seed in range(20):
        if 5 not in select_rows(6, sample=3, seed=seed):
            assert read_shots(options, seed).number == 3
        else:
            with pytest.raises(InputError, match="few.jsonl:6: not JSON"):
                read_shots(options, seed)


@pytest.mark.parametrize("name", ["n_shots", "shots_column", "shots_end"])
def test_an_option_of_examples_needs_examples(name):
    flag = name.replace("_", "-")
    with pytest.raises(UsageError, match=f"--{flag} is about examples, and there are none; add --shots"):
        InputOptions("rows.jsonl", **{name: 3 if name == "n_shots" else "x"})


@pytest.mark.parametrize("shots", ["", "-", 5])
def test_examples_are_a_file(shots):
    with pytest.raises(UsageError, match="is no file of examples; name one"):
        InputOptions("rows.jsonl", shots=shots)


def test_examples_before_a_text_alone_are_refused(few):
    with pytest.raises(UsageError, match="--shots puts examples before a prompt, and a text has none"):
        ScoreInput("rows.jsonl", shots=few)
    ScoreInput("rows.jsonl", shots=few, completion_column="completion")


def test_examples_that_fill_the_context_are_an_error_of_the_job(tmp_path, rows):
    for number, words in ((200, r"[\d,]+ tokens"), (2000, "more than 512 tokens")):
        few = write(tmp_path, "few.jsonl", *examples(number))
        with pytest.raises(InputError, match=f"--shots: the examples have {words}, and no prompt fits after them"):
            run_job(rows, tmp_path / "o.parquet", template=TEMPLATE, shots=few)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["few.jsonl", "rows.jsonl"]
    summary = run_job(
        rows, tmp_path / "o.parquet", template=TEMPLATE, shots=few, on_too_long="truncate-left", max_tokens=2
    )
    assert summary.exit_code == 0


# ---- runs


def test_a_run_with_examples_is_the_run_of_whole_prompts_and_reads_them_nearly_once(tmp_path, few, rows):
    options = InputOptions(rows, template=TEMPLATE, shots=few, n_shots=5)
    sampling = SamplingParams(max_tokens=3, temperature=1.0)
    run_job(Job(options, tmp_path / "a.parquet", sampling=sampling))
    made = pq.read_table(tmp_path / "a.parquet")
    whole = write(tmp_path, "whole.jsonl", *({"prompt": text} for text in made["prompt"].to_pylist()))
    run_job(Job(whole, tmp_path / "b.parquet", sampling=sampling))
    assert pq.read_table(tmp_path / "b.parquet") == made
    before = made["prompt"][0].as_py().partition("Q: who")[0]
    assert before.count("Q: ") == 5
    forecast = forecast_job(Job(options, OutputOptions(""), sampling=sampling), measure_time=False, show=1)
    assert forecast.first[0].texts == (f"{before}Q: who is 0?\nA:",)
    assert forecast.shared_tokens > 0.8 * forecast.tokens * 2 / 3
    assert replay(tmp_path / "a.parquet", 3).differences == ()


def test_the_command_of_a_plan_makes_its_output_again(tmp_path, few, rows, monkeypatch):
    options = {"template": TEMPLATE, "shots": few, "n_shots": 3, "shots_end": "\n#\t", "max_tokens": 2, "seed": 4}
    run_job(rows, tmp_path / "a.parquet", **options)
    plan = read_plan(tmp_path / "a.parquet")
    words = shlex.split(plan.command_line())
    assert words[words.index("--shots") + 1] == "SHOTS"
    assert words[words.index("--shots-end") + 1] == r"\n#\t"
    assert words[words.index("--template") + 1] == r"Q: {q}\nA:"
    job = parse(plan.command_line(), monkeypatch)
    found = read_shots(replace(job.input, shots=few), job.sampling.seed)
    assert hashlib.sha256(found.text.encode()).hexdigest()[:16] == plan.shots


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_shots": 4}, r"the examples of --shots are not what they were \(--n-shots 3 then, --n-shots 4 now\)"),
        ({"shots": None, "n_shots": None}, "it had examples of --shots before its prompts, and this has no examples"),
        ({"template": "{q}"}, r"it had --template 'Q: \{q\}\\nA:', and this has --template '?\{q\}"),
    ],
)
def test_other_examples_are_another_job(tmp_path, few, rows, changes, message):
    options = {"template": TEMPLATE, "shots": few, "n_shots": 3, "max_tokens": 2}
    run_job(rows, tmp_path / "a.parquet", **options)
    with pytest.raises(UsageError, match=message):
        run_job(rows, tmp_path / "a.parquet", **options | changes)


def test_an_edited_file_of_examples_is_another_job(tmp_path, few, rows):
    options = {"template": TEMPLATE, "shots": few, "max_tokens": 2}
    run_job(rows, tmp_path / "a.parquet", **options)
    write(tmp_path, "few.jsonl", *examples(7))
    with pytest.raises(UsageError, match=r"--shots are not what they were \(SHA-256 \w{8} then, \w{8} now\)"):
        run_job(rows, tmp_path / "a.parquet", **options)


def test_examples_stand_before_a_prompt_that_is_scored_with_its_completion(tmp_path, few):
    pairs = write(tmp_path, "pairs.jsonl", {"q": "x", "completion": " y"})
    run_job(
        pairs, tmp_path / "a.parquet", task=ScoreOptions(), template=TEMPLATE, completion_column="completion", shots=few
    )
    (row,) = pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert row["prompt"].endswith("Q: q7\nA: a7\n\nQ: x\nA:")
    assert (row["completion"], row["tokens"]) == (" y", 1)
