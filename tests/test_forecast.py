"""forecast.py: it counts what a run does; its time is a sum of measured costs."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchgen.errors import BatchgenError
from batchgen.input import prompts as prompts_module
from batchgen.job import Job
from batchgen.models.model import Model
from batchgen.output.ledger import work_directory
from batchgen.review import forecast as module
from batchgen.review.forecast import ChunkCost, Forecast, Pace, chunk_cost, forecast_job, measure
from batchgen.run import run_job
from batchgen.types import Begun, Chunk, SamplingParams, TokenizedRequest
from tests.support.inputs import not_utf8, parquet
from tests.support.jobs import make_job
from tests.support.models import write_byte_model
from tests.support.scores import KINDS, TASKS, tokenized, write_scores
from tests.test_worker import setup

PACE = Pace(prompt=0.001, step=0.1, sequence=0.01, stop=0.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_byte_model(tmp_path_factory.mktemp("forecast") / "bytes")


@pytest.fixture
def job(model, tmp_path) -> Job:
    lines = [json.dumps({"prompt": "a" * (1 + row % 100)}) for row in range(150)]
    lines += ["not JSON", '{"prompt": ""}', *['{"prompt": "' + "b" * 200 + '"}'] * 12]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    return make_job(tmp_path / "p.jsonl", tmp_path / "o.parquet", str(model), params, jobs=2, chunk_rows=40)


def request(row: int, text: str, **params) -> TokenizedRequest:
    return TokenizedRequest(row, f"p:{row}", None, text, tuple(text.encode()), SamplingParams(**params))


def test_a_forecast_counts_what_a_run_then_does_and_writes_nothing(job, tmp_path):
    forecast = forecast_job(job)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["p.jsonl"]
    assert not work_directory(job.output.path).exists()
    summary = run_job(job)
    assert forecast.rows == summary.rows == 164
    assert forecast.ok == summary.ok == 150
    assert sum(reject.rows for reject in forecast.rejects.values()) == summary.rejected == 14
    assert sum(length * n for length, n in forecast.lengths.items()) == summary.prompt_tokens
    assert forecast.completion_tokens == pytest.approx(100 * 5)  # the repeats are in the same chunks
    assert len(forecast.chunks) == 5
    assert forecast.seconds is not None
    assert forecast.seconds > 0


def test_chunks_end_where_those_of_a_run_end_and_kept_values_are_read(model, tmp_path, monkeypatch):
    monkeypatch.setattr(prompts_module, "WINDOW_BYTES", 300)
    source = parquet(tmp_path, {"prompt": ["x" * 100] * 4, "k": not_utf8(pa.string())})
    job = make_job(source, tmp_path / "o.jsonl", str(model), SamplingParams(max_tokens=5), keep=("k",))
    forecast = forecast_job(job, measure_time=False)
    assert [chunk.samples for chunk in forecast.chunks] == [
        1,
        1,
    ]  # three rows: two equal ones, one rejected
    (reject,) = forecast.rejects.values()
    assert (reject.rows, "JSON is to hold it" in reject.example) == (1, True)


def test_rejects_are_gathered_by_reason_with_the_first_places(job):
    rejects = sorted(forecast_job(job, measure_time=False).rejects.values(), key=lambda reject: -reject.rows)
    assert [reject.rows for reject in rejects] == [12, 1, 1]
    assert len(rejects[0].places) == 8
    assert rejects[0].places[0] == "p.jsonl:153"
    assert "exceed n_ctx 128" in rejects[0].example


def test_without_measuring_there_is_no_time(job):
    forecast = forecast_job(job, measure_time=False)
    assert (forecast.seconds, forecast.measured_in) == (None, 0.0)


def test_no_rows_are_no_work(job, tmp_path):
    (tmp_path / "p.jsonl").write_text("")
    forecast = forecast_job(job)
    assert (forecast.rows, forecast.ok, forecast.chunks, forecast.seconds) == (0, 0, [], None)


def test_equal_greedy_requests_and_shared_blocks_are_counted_once():
    prefix = "x" * 130
    chunk = Chunk(0, (request(0, prefix + "a"), request(1, prefix + "b"), request(2, prefix + "a"), request(3, "y")))
    forecast = Forecast()
    cost = chunk_cost(chunk, forecast, share=True)
    assert (forecast.duplicates, forecast.shared_tokens) == (1, 128)
    assert (cost.samples, cost.prompt_tokens) == (3, 131 + 3 + 1)
    assert chunk_cost(chunk, Forecast(), share=False).prompt_tokens == 131 + 131 + 1


def test_a_search_is_num_beams_sequences_and_reads_its_prompt_once():
    texts = ["x" * 100, "x" * 100, "x" * 98 + "y"]
    searches = [request(row, text, max_tokens=9, num_beams=5, n=2) for row, text in enumerate(texts)]
    cost = chunk_cost(Chunk(0, tuple(searches)), Forecast(), share=True)
    assert (cost.samples, cost.sum_max_tokens, cost.max_tokens) == (10, 90, 9)
    assert cost.prompt_tokens == 98 + 2 + 1


def test_prompts_with_log_probabilities_are_read_and_share_nothing():
    requests = [request(row, "a" * 100 + f"{row}b", max_tokens=0, prompt_logprobs=0) for row in range(3)]
    cost = chunk_cost(Chunk(0, (*requests, replace(requests[0], row=3))), Forecast(), share=True)
    assert (cost.prompt_tokens, cost.samples, cost.sum_max_tokens) == (3 * 101, 3, 0)  # no last token
    echo = chunk_cost(Chunk(0, (request(0, "ab", max_tokens=0, echo=True),)), Forecast(), share=True)
    assert (echo.prompt_tokens, echo.samples) == (0, 0)


def test_the_work_of_samples_that_are_begun_is_what_is_left_of_them():
    one = request(0, "a" * 100, max_tokens=9, temperature=1.0, n=4)
    begun = replace(one, begun=(Begun(1, (97,) * 8), Begun(3)))
    forecast = Forecast()
    cost = chunk_cost(Chunk(0, (begun,)), forecast, share=True)
    assert (cost.samples, cost.sum_max_tokens, cost.max_tokens) == (2, 1 + 9, 9)
    assert 100 + 8 <= cost.prompt_tokens <= 100 + 8 + 2
    assert (forecast.duplicates, forecast.shared_tokens) == (0, 2 * 100 + 8 - cost.prompt_tokens)


def test_the_log_probabilities_of_tokens_that_are_begun_with_are_work():
    one = request(0, "a" * 100, max_tokens=9, temperature=1.0, n=2)
    both = replace(one, begun=(Begun(0, (97,) * 8), Begun(1, (97,) * 5)))
    for asked in (replace(both, measured=("mean_logprob",)), replace(both, params=replace(both.params, logprobs=2))):
        assert chunk_cost(Chunk(0, (asked,)), Forecast(), share=True).scored == 8 + 5
    assert chunk_cost(Chunk(0, (both,)), Forecast(), share=True).scored == 0


def test_sampled_requests_are_never_one():
    chunk = Chunk(0, tuple(request(row, "same", temperature=1.0, n=3) for row in range(2)))
    forecast = Forecast()
    assert (chunk_cost(chunk, forecast, share=True).samples, forecast.duplicates) == (6, 0)


def test_time_is_reading_and_steps_and_sequences():
    chunk = ChunkCost(prompt_tokens=1000, samples=10, max_tokens=20, sum_max_tokens=200)
    assert PACE.seconds(chunk, 256) == pytest.approx(1.0 + 20 * 0.1 + 200 * 0.01)
    assert PACE.seconds(chunk, 5) == pytest.approx(1.0 + 40 * 0.1 + 200 * 0.01)  # twice as many steps
    assert PACE.seconds(ChunkCost(0, 0, 0, 0), 256) == 0.0


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 1), st.integers(1, 1000))
def test_the_expected_length_is_that_of_a_geometric_distribution_cut_off(stop, max_tokens):
    expected = sum((1 - stop) ** token for token in range(max_tokens))
    assert replace(PACE, stop=stop).expected_tokens(max_tokens) == pytest.approx(expected, rel=1e-6)


def test_a_measurement_is_of_positive_times_and_ends_of_text(model):
    requests = [request(row, "abc" * (1 + row), max_tokens=30, ignore_eos=True) for row in range(16)]
    pace = measure(setup(model, max_batch=16), requests)
    assert pace.prompt > 0
    assert pace.step + pace.sequence > 0
    assert pace.stop == 0


@pytest.mark.parametrize("params", [{}, {"n": 3}, {"temperature": 1.0}, {"max_tokens": 1}])
def test_where_every_completion_ends_at_once_so_does_the_forecast(model, params):
    ending = {"max_tokens": 9, "logit_bias": ((97, 100.0),), "stop_token_ids": (97,)}
    requests = [request(row, "ab", **ending | params) for row in range(4)]  # equal ones, where they are greedy
    pace = measure(setup(model), requests)
    assert pace.stop == 1
    assert pace.expected_tokens(9) == 1
    assert 0 < pace.seconds(chunk_cost(Chunk(0, tuple(requests)), Forecast(), share=True), 8) < 100


def dies(*_):
    os._exit(9)


def test_a_worker_that_dies_in_a_measurement_is_one_line(job, monkeypatch):
    monkeypatch.setattr("batchgen.review.forecast.measure", dies)
    with pytest.raises(BatchgenError, match=r"^a worker died while it measured rows \(EXIT\(9\).*--no-time"):
        forecast_job(job)


def test_one_request_can_be_measured_too(model):
    pace = measure(setup(model), [request(0, "a", max_tokens=1)])
    assert pace.step >= 0


def test_a_forecast_does_not_change_a_run(job):
    run_job(job)
    before = pq.read_table(job.output.path)
    forecast_job(job)
    run_job(job)
    assert pq.read_table(job.output.path).equals(before)


# ---- scores and embeddings


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_for_scores_is_counted_as_the_engine_reads_it(model, kind, share):
    chunk, sent = tokenized(kind, Model.open(str(model))), replace(setup(model, share_prefixes=share), task=TASKS[kind])
    cost = chunk_cost(chunk, forecast := Forecast(), share=share, task=TASKS[kind])
    requests = [item for item in chunk.items if isinstance(item, TokenizedRequest)]
    prompts = [prompt for request in requests for prompt in module.list_prompts(request, TASKS[kind])]
    _, read = module.time_reading(sent, prompts)
    assert cost.prompt_tokens == read
    assert cost.prompt_tokens + forecast.shared_tokens < sum(len(prompt.token_ids) for prompt in prompts)
    assert bool(forecast.shared_tokens) == (kind in ("completion", "choices"))
    assert (cost.samples + forecast.duplicates, cost.sum_max_tokens) == (len(prompts), 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_forecast_of_scores_counts_the_tokens_of_the_output(model, tmp_path, kind):
    table = pq.read_table(write_scores(tmp_path / "scores.parquet", kind, model))
    chunk, forecast, sample = tokenized(kind, Model.open(str(model))), Forecast(task=TASKS[kind].task), []
    for item in chunk.items:
        module.count_row(item, forecast, sample, 1)
    scored = {"choices": lambda row: sum(row["choice_tokens"] or [0]), "embed": lambda row: 0}
    rows = table.to_pylist()
    assert (forecast.rows, forecast.ok, forecast.output_rows) == (12, 11, len(rows))
    assert forecast.scored == sum(map(scored.get(kind, lambda row: row["tokens"] or 0), rows))
    before = sum(row.get("prompt_tokens") or 0 for row in rows if row["status"] == "ok")
    assert forecast.tokens - forecast.scored == (forecast.ok if kind == "text" else before)  # <|endoftext|>


@pytest.mark.parametrize("kind", KINDS)
def test_a_measurement_of_scores_is_of_times_that_are_no_less_than_zero(model, kind):
    requests = [item for item in tokenized(kind, Model.open(str(model))).items if isinstance(item, TokenizedRequest)]
    pace = measure(replace(setup(model), task=TASKS[kind]), requests)
    assert (pace.step, pace.sequence, pace.stop) == (0, 0, 0)
    assert pace.scored >= 0
    assert pace.prompt + pace.scored > 0
    chunk = ChunkCost(1000, 10, 0, 0, 100)
    assert pace.seconds(chunk, 256) == pytest.approx(1000 * pace.prompt + 100 * pace.scored)


def test_the_first_rows_are_shown_with_what_is_scored(model):
    opened, shown = Model.open(str(model)), {}
    for kind in KINDS:
        forecast = Forecast()
        for item in (tokenized(kind, opened).items[10], tokenized(kind, opened).items[9]):
            module.show_first(item, forecast, 3, opened.load_tokenizer())
        shown[kind] = [(one.name, one.tokens, one.texts, one.windows) for one in forecast.first]
    assert shown["completion"][0] == ("r10", 7, ("x", " end 0"), 1)
    assert shown["choices"][0] == ("r10", 9, ("x", " a", " b", " c d"), 1)
    assert shown["embed"][0] == ("r10", 1, ("x",), 1)
    assert shown["text"][0] == ("r10", 2, ("<|endoftext|>", "x"), 1)
    text = "a text of many tokens. " * 20
    assert shown["text"][1] == ("r9", 461, ("<|endoftext|>", text[:128]), 8)
