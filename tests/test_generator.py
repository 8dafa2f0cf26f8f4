"""generator.py and the package itself: what a job writes, for prompts in memory."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import batchgen
from batchgen import Generator, Job, SamplingParams, run_job
from batchgen.engine.probe import is_batch_invariant
from batchgen.errors import ModelError, UsageError
from tests.support.jobs import make_job
from tests.support.models import BYTES, sharp_params, write_byte_model

INVARIANT = is_batch_invariant(sharp_params(BYTES), BYTES)
OTHERS = ["abc", "the second", "x" * 90] if INVARIANT else []
PARAMETERS = [
    SamplingParams(max_tokens=100),
    SamplingParams(max_tokens=1),
    SamplingParams(max_tokens=90, temperature=0.9, seed=3),
    SamplingParams(max_tokens=90, temperature=1.5, top_k=200, repetition_penalty=1.2, seed=11),
    SamplingParams(max_tokens=60, temperature=5.0, ignore_eos=True, min_tokens=60),
    SamplingParams(max_tokens=90, temperature=2.0, seed=5, stop=("e", "ab", "the end")),
    SamplingParams(max_tokens=90, temperature=2.0, seed=6, stop=("\ufffd",), include_stop=True, echo=True),
    SamplingParams(max_tokens=90, temperature=2.0, seed=7, stop=("zz",), min_tokens=20, bad_words=("a", "e")),
    SamplingParams(max_tokens=90, logit_bias=((195, 100.0),), stop_loops=True),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_byte_model(tmp_path_factory.mktemp("generator") / "bytes")


@pytest.fixture(scope="module")
def generator(model) -> Generator:
    return Generator(model)


@pytest.mark.skipif(not INVARIANT, reason="a row depends on its batch here")
def test_rows_are_those_of_a_job(generator, model, tmp_path):
    prompts = ["abc" * (1 + row % 9) for row in range(40)]
    (tmp_path / "p.jsonl").write_text("".join(f'{{"prompt": "{prompt}"}}\n' for prompt in prompts))
    params = SamplingParams(max_tokens=7, temperature=0.9, n=2, seed=5)
    run_job(Job(tmp_path / "p.jsonl", tmp_path / "o.parquet", str(model), params))
    written = pq.read_table(tmp_path / "o.parquet").to_pylist()
    rows = generator.generate(prompts, params)
    columns = ("row", "sample", "prompt", "completion", "completion_tokens", "finish_reason", "seed", "status")
    assert [[getattr(row, name) for name in columns] for row in rows] == [
        [row[name] for name in columns] for row in written
    ]


def test_options_are_the_fields_of_sampling_params(generator):
    [row] = generator.generate(["abc"], max_tokens=3, ignore_eos=True)
    assert (row.completion_tokens, row.finish_reason) == (3, "length")
    assert generator.generate(["abc"], SamplingParams(max_tokens=3, ignore_eos=True)) == [row]


def test_more_prompts_than_a_chunk_come_back_in_order(generator):
    rows = generator.generate((f"{row}" for row in range(1100)), max_tokens=1)
    assert [row.prompt for row in rows] == [f"{row}" for row in range(1100)]
    assert [row.row for row in rows] == list(range(1100))


def test_no_prompts_are_no_rows(generator):
    assert generator.generate([]) == []


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (["a", ""], {}, r"prompts\[1\]: the prompt is empty"),
        (["a" * 500], {}, r"prompts\[0\]: .*exceed n_ctx 128"),
        (["\ud800"], {}, r"prompts\[0\]: .*surrogate"),
        (["a"], {"max_tokens": 0}, "max_tokens 0 is out of range"),
        ([""], {}, "pass empty_prompt='unconditional'"),
        (["a" * 500], {}, "pass on_too_long='truncate-left'"),
        ("abc", {}, r"prompts is one string \('abc'\); give a list of them: \[prompt\]"),
        (["a"], {"params": SamplingParams(), "seed": 1}, "params and seed were given; give the one or the others"),
    ],
)
def test_what_a_job_would_reject_is_an_error_that_names_the_prompt(python_names, generator, prompts, options, message):
    with pytest.raises(UsageError, match=message):
        generator.generate(prompts, **options)


def test_lists_are_written_as_in_python(generator):
    whole = generator.generate(["abc"], max_tokens=20, ignore_eos=True)[0].completion
    tuples = generator.generate(["abc"], max_tokens=20, ignore_eos=True, stop=(whole[5],), logit_bias=((1, -5.0),))
    written = {"stop": whole[5], "logit_bias": {1: -5.0}}
    assert generator.generate(["abc"], max_tokens=20, ignore_eos=True, **written) == tuples
    assert len(tuples[0].completion) <= 5


def test_an_unknown_option_is_an_error(generator):
    with pytest.raises(UsageError, match="'max_tokenz' is not an option; did you mean 'max_tokens'"):
        generator.generate(["a"], max_tokenz=3)


def test_a_model_that_is_not_there_is_named():
    with pytest.raises(ModelError, match="unknown model 'nowhere'"):
        Generator("nowhere")


# ---- stream


def stream_completion(model: Path, prompt: str, params: SamplingParams, **policy):
    return Generator(model, batch_size=1).stream(prompt, params, **policy)


@pytest.mark.parametrize("params", PARAMETERS, ids=range(len(PARAMETERS)))
def test_the_joined_pieces_are_row_0_of_a_job(model, tmp_path, params):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in ["Once upon", *OTHERS]))
    run_job(make_job(path, tmp_path / "out.parquet", str(model), params, jobs=1))
    row = pq.read_table(tmp_path / "out.parquet").to_pylist()[0]
    assert "".join(stream_completion(model, "Once upon", params)) == row["completion"]


def test_a_stream_yields_text_while_it_is_generated(model):
    pieces = stream_completion(model, "Once upon", SamplingParams(max_tokens=100))
    assert sum(bool(piece) for piece in pieces) > 10


def test_a_stream_may_be_closed_early_and_another_begun(model):
    params = SamplingParams(max_tokens=50)
    whole = "".join(stream_completion(model, "Once", params))
    pieces = stream_completion(model, "Once", params)
    begun = next(pieces) + next(pieces)
    pieces.close()
    assert whole.startswith(begun)
    assert "".join(stream_completion(model, "Once", params)) == whole


@pytest.mark.parametrize(("prompt", "named"), [("", "the prompt is empty"), ("x" * 120, "exceed n_ctx 128")])
def test_a_stream_refuses_what_a_job_would_reject(model, prompt, named):
    with pytest.raises(UsageError, match=named):
        next(stream_completion(model, prompt, SamplingParams(max_tokens=9)))


def test_a_stream_has_the_options_that_its_errors_name(model):
    nine, eight = (SamplingParams(max_tokens=n, ignore_eos=True) for n in (9, 8))
    shortened = stream_completion(model, "x" * 120, nine, on_too_long="shorten")
    assert "".join(shortened) == "".join(stream_completion(model, "x" * 120, eight))
    truncated = stream_completion(model, "y" * 9 + "x" * 119, nine, on_too_long="truncate-left")
    assert "".join(truncated) == "".join(stream_completion(model, "x" * 119, nine))
    assert "".join(stream_completion(model, "", nine, empty_prompt="unconditional"))


# ---- the package


def test_all_public_names_can_be_imported():
    for name in batchgen.__all__:
        assert getattr(batchgen, name)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        batchgen.nothing  # noqa: B018


def test_importing_the_package_imports_no_numpy():
    code = "import sys, batchgen; sys.exit('numpy' in sys.modules or 'pyarrow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
