"""generator.py and the package itself: what a job writes, for prompts in memory."""

import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import batchgen
from batchgen import Generator, Job, SamplingParams, run_job
from batchgen.engine.probe import is_batch_invariant
from batchgen.errors import ModelError, UsageError
from tests.support.models import BYTES, sharp_params, write_byte_model


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_byte_model(tmp_path_factory.mktemp("generator") / "bytes")


@pytest.fixture(scope="module")
def generator(model) -> Generator:
    return Generator(model)


@pytest.mark.skipif(not is_batch_invariant(sharp_params(BYTES), BYTES), reason="a row depends on its company here")
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
        ([""], {}, 'pass empty_prompt="unconditional"'),
        (["a" * 500], {}, 'pass on_too_long="truncate-left"'),
        ("abc", {}, r"prompts is one string \('abc'\); give a list of them: \[prompt\]"),
        (["a"], {"params": SamplingParams(), "seed": 1}, "params and seed were given; give the one or the others"),
    ],
)
def test_what_a_job_would_reject_is_an_error_that_names_the_prompt(generator, prompts, options, message):
    with pytest.raises(UsageError, match=message):
        generator.generate(prompts, **options)


def test_lists_are_written_as_in_python(generator):
    whole = generator.generate(["abc"], max_tokens=20, ignore_eos=True)[0].completion
    tuples = generator.generate(["abc"], max_tokens=20, ignore_eos=True, stop=(whole[5],), logit_bias=((1, -5.0),))
    written = {"stop": whole[5], "logit_bias": {1: -5.0}}
    assert generator.generate(["abc"], max_tokens=20, ignore_eos=True, **written) == tuples
    assert len(tuples[0].completion) <= 5


def test_an_unknown_option_is_an_error(generator):
    with pytest.raises(TypeError, match="max_tokenz"):
        generator.generate(["a"], max_tokenz=3)


def test_a_model_that_is_not_there_is_named():
    with pytest.raises(ModelError, match="no model is called 'nowhere'"):
        Generator("nowhere")


def test_all_that_is_promised_can_be_imported():
    for name in batchgen.__all__:
        assert getattr(batchgen, name)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        batchgen.nothing  # noqa: B018


def test_importing_the_package_imports_no_numpy():
    code = "import sys, batchgen; sys.exit('numpy' in sys.modules or 'pyarrow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
