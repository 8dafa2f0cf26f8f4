"""stream.py: what is streamed is, joined, what a job writes for row 0, piece by piece in whole characters."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from batchgen.engine.probe import is_batch_invariant
from batchgen.errors import UsageError
from batchgen.run import Job, run_job
from batchgen.stream import stream_completion
from batchgen.types import SamplingParams
from tests.support.models import BYTES, sharp_params, write_byte_model

INVARIANT = is_batch_invariant(sharp_params(BYTES), BYTES)
COMPANY = ["abc", "the second", "x" * 90] if INVARIANT else []
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
    return write_byte_model(tmp_path_factory.mktemp("stream") / "bytes")


@pytest.mark.parametrize("params", PARAMETERS, ids=range(len(PARAMETERS)))
def test_the_pieces_are_row_0_of_a_job(model, tmp_path, params):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in ["Once upon", *COMPANY]))
    run_job(Job(path, tmp_path / "out.parquet", str(model), params, jobs=1))
    row = pq.read_table(tmp_path / "out.parquet").to_pylist()[0]
    assert "".join(stream_completion(model, "Once upon", params)) == row["completion"]


def test_text_comes_while_it_is_made(model):
    pieces = stream_completion(model, "Once upon", SamplingParams(max_tokens=100))
    assert sum(bool(piece) for piece in pieces) > 10


def test_a_stream_may_be_left_early_and_another_begun(model):
    params = SamplingParams(max_tokens=50)
    whole = "".join(stream_completion(model, "Once", params))
    pieces = stream_completion(model, "Once", params)
    begun = next(pieces) + next(pieces)
    pieces.close()
    assert whole.startswith(begun)
    assert "".join(stream_completion(model, "Once", params)) == whole


@pytest.mark.parametrize(("prompt", "named"), [("", "the prompt is empty"), ("x" * 120, "exceed n_ctx 128")])
def test_what_a_job_would_reject_is_refused(model, prompt, named):
    with pytest.raises(UsageError, match=named):
        next(stream_completion(model, prompt, SamplingParams(max_tokens=9)))


def test_the_options_that_a_refusal_names_are_there(model):
    nine, eight = (SamplingParams(max_tokens=n, ignore_eos=True) for n in (9, 8))
    shortened = stream_completion(model, "x" * 120, nine, on_too_long="shorten")
    assert "".join(shortened) == "".join(stream_completion(model, "x" * 120, eight))
    truncated = stream_completion(model, "y" * 9 + "x" * 119, nine, on_too_long="truncate-left")
    assert "".join(truncated) == "".join(stream_completion(model, "x" * 119, nine))
    assert "".join(stream_completion(model, "", nine, empty_prompt="unconditional"))
