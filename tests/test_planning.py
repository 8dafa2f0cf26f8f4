"""planning.py: every row is in exactly one chunk, every worker has work, and memory bounds their number."""

import re
from importlib.metadata import version
from types import SimpleNamespace
from typing import get_args

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from batchgen import planning
from batchgen.engine.engine import Engine
from batchgen.engine.limits import MAX_BATCH, kv_bytes_per_token
from batchgen.errors import BatchgenError, UsageError
from batchgen.gpt2.config import GPT2Config
from batchgen.gpt2.weights import pack
from batchgen.job import EmbedOptions, ScoreOptions
from batchgen.models.model import Model
from batchgen.plan import Plan
from batchgen.planning import (
    FULL_BATCH_ROWS,
    MAX_CHUNK_ROWS,
    MAX_CHUNK_TOKENS,
    MAX_CHUNK_TOPS,
    MIN_CHUNK_ROWS,
    NOMINAL_JOBS,
    Setting,
    auto_chunk_rows,
    available_jobs,
    available_memory,
    check_memory,
    default_kv_bytes,
    fit_task,
    fitting_jobs,
    left_of_cgroup,
    make_plan,
    n_chunks,
    plan_chunks,
    rows_to_hold,
    rows_to_read,
    rows_within,
)
from batchgen.types import Precision, Rejected, SamplingParams
from tests.support.inputs import facts
from tests.support.jobs import make_job
from tests.support.models import BYTES, TINY, sharp_params, write_byte_model

SIZES = [BYTES, TINY, GPT2Config(50257, 1024, 768, 12, 12), GPT2Config(50257, 1024, 1600, 25, 48)]


def rows(n: int) -> list[Rejected]:
    return [Rejected(row, f"p.jsonl:{row + 1}", None, None, "no") for row in range(n)]


@given(st.integers(0, 200), st.integers(1, 250))
def test_chunks_are_contiguous_complete_and_in_order(n, chunk_rows):
    chunks = list(plan_chunks(iter(rows(n)), chunk_rows))
    assert [item for chunk in chunks for item in chunk.items] == rows(n)
    assert [chunk.index for chunk in chunks] == list(range(n_chunks(n, chunk_rows)))
    assert [chunk.first_row for chunk in chunks] == list(range(0, n, chunk_rows))
    assert all(len(chunk.items) == chunk_rows for chunk in chunks[:-1])


def test_chunks_are_cut_on_demand():
    taken = []
    items = (taken.append(item.row) or item for item in rows(100))
    chunks = plan_chunks(items, 10)
    assert taken == []
    next(chunks)
    assert taken == list(range(10))


def test_the_examples_in_the_docstring_hold():
    examples = re.findall(r"rows=([\d_]+), jobs=(\d+)(?:, n=(\d+))? -> (\d+)", auto_chunk_rows.__doc__)
    assert len(examples) == 5
    for n_rows, jobs, n, expected in examples:
        assert auto_chunk_rows(int(n_rows), int(jobs), int(n or 1)) == int(expected)


@given(st.integers(0, 10**7), st.integers(1, 256))
@example(53_249, 256)  # 208 rows a chunk, rounded up, would leave a worker without one
def test_every_worker_gets_a_share_of_chunks_of_bounded_size(n, jobs):
    chunk_rows = auto_chunk_rows(n, jobs)
    assert min(MIN_CHUNK_ROWS, max(n, 1)) <= chunk_rows <= MAX_CHUNK_ROWS
    if n >= jobs * FULL_BATCH_ROWS:  # below it a chunk of less work than its process costs would be no gain
        assert n_chunks(n, chunk_rows) >= jobs


@given(st.integers(0, 10**6), st.integers(1, 64), st.integers(1, 1024))
def test_chunks_are_bounded_in_samples_as_they_are_in_rows(n_rows, jobs, n):
    chunk_rows = auto_chunk_rows(n_rows, jobs, n)
    assert chunk_rows == 1 or 1 <= chunk_rows * n <= MAX_CHUNK_ROWS
    assert auto_chunk_rows(n_rows, jobs, 1) == auto_chunk_rows(n_rows, jobs)


@pytest.mark.parametrize("config", SIZES, ids=lambda config: f"{config.n_layer}x{config.n_embd}")
def test_the_default_memory_holds_four_sequences_of_full_length(config):
    for precision in get_args(Precision):
        assert default_kv_bytes(config, precision) >= 4 * config.n_ctx * kv_bytes_per_token(config, precision)


def test_the_default_memory_suffices_an_engine():
    Engine(pack(sharp_params(TINY)), TINY, eos_ids=(0,), kv_bytes=default_kv_bytes(TINY, "float32"))


def test_at_least_one_job_fits_into_any_memory(monkeypatch):
    for free in (0, -(10**9), 10**6, 10**13):
        monkeypatch.setattr(planning, "available_memory", lambda free=free: free)
        assert 1 <= fitting_jobs(2**30, 10**9) <= available_jobs()


def test_as_many_jobs_as_memory_holds(monkeypatch):
    monkeypatch.setattr(planning, "available_jobs", lambda: 64)
    monkeypatch.setattr(planning, "available_memory", lambda: 5 * (2**30 + planning.WORKER_BYTES) + 500)
    assert fitting_jobs(2**30, 0) == 5
    assert fitting_jobs(2**30, 500) == 5
    assert fitting_jobs(2**30, 501) == 4
    assert fitting_jobs(2**40, 0) == 1


def test_cached_files_are_free_memory_of_a_container(tmp_path):
    assert left_of_cgroup(tmp_path) == planning.UNKNOWN_MEMORY
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert left_of_cgroup(tmp_path) == planning.UNKNOWN_MEMORY
    (tmp_path / "memory.max").write_text("1000\n")
    assert left_of_cgroup(tmp_path) == 100
    (tmp_path / "memory.stat").write_text("anon 150\nfile 750\ninactive_file 500\nactive_file 200\n")
    assert left_of_cgroup(tmp_path) == 800
    (tmp_path / "memory.current").write_text("1100\n")
    (tmp_path / "memory.stat").write_text("anon 1100\ninactive_file 0\nactive_file 0\n")
    assert left_of_cgroup(tmp_path) == 0


def test_this_machine_has_cores_and_memory(monkeypatch):
    assert available_jobs() >= 1
    assert available_memory() > 0
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")
    assert available_jobs() == 1


def test_a_model_larger_than_memory_is_named(model, monkeypatch):
    monkeypatch.setattr(planning, "available_memory", lambda: 4 * 10**9)
    larger = SimpleNamespace(name="1558M", config=SIZES[-1], precision="float32", bytes=6_552_000_000)
    with pytest.raises(
        BatchgenError, match=r"1558M needs 7.. GB of memory \(6.6 of weights in float32, .* 4.0 GB are free"
    ):
        check_memory(larger)
    monkeypatch.setattr(planning, "available_memory", lambda: 16 * 10**9)
    check_memory(larger)


# ---- the plan


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    return Model.open(str(write_byte_model(tmp_path_factory.mktemp("planning") / "bytes")))


def planned(model: Model, *, slots: int = 0, **options) -> tuple[Plan, frozenset[str]]:
    """The plan of 10,000 rows."""
    setting = Setting(10_000, slots, "parquet")
    job = make_job("p.jsonl", "o.parquet", model.directory, **options)
    return make_plan(job, facts(10_000, "0" * 64, 1), model, setting)


def test_what_nobody_asked_for_is_automatic(model):
    plan, automatic = planned(model)
    assert automatic == {"chunk_rows", "batch_size", "kv_bytes"}
    assert (plan.batch_size, plan.kv_bytes) == (MAX_BATCH, default_kv_bytes(model.config, "float32"))
    asked = {"chunk_rows": 7, "batch_size": 3, "kv_bytes": 2**24}
    plan, automatic = planned(model, **asked)
    assert automatic == frozenset()
    assert {name: getattr(plan, name) for name in asked} == asked
    assert planned(model, batch_size=MAX_BATCH)[1] == {"chunk_rows", "kv_bytes"}


def test_a_plan_holds_what_is_asked_for_and_what_is_found(model):
    params = SamplingParams(max_tokens=3, n=2)
    plan, _ = planned(model, params=params, keep=("a",), trim=True, on_too_long="shorten", share_prefixes=False)
    assert (plan.parameters, plan.keep, plan.trim, plan.on_too_long) == (params, ("a",), True, "shorten")
    assert (plan.model, plan.model_hash, plan.share_prefixes) == ("bytes", model.hash, False)
    assert (plan.input, plan.input_formats, plan.rows, plan.format) == ("0" * 64, ("jsonl",), 10_000, "parquet")
    assert (plan.portable, plan.regex, plan.retry) == (True, version("regex"), False)


def test_chunks_are_for_the_jobs_asked_for_else_the_slots_else_a_nominal_number(model):
    for jobs, slots, expected in [(16, 8, 16), (None, 8, 8), (None, 0, NOMINAL_JOBS)]:
        assert planned(model, jobs=jobs, slots=slots)[0].chunk_rows == auto_chunk_rows(10_000, expected)


def test_a_chunk_holds_fewer_rows_of_many_samples(model):
    plan, _ = planned(model, params=SamplingParams(n=100), jobs=2)
    assert plan.chunk_rows == auto_chunk_rows(10_000, 2, 100)


def test_a_short_time_limit_makes_chunks_of_which_several_end_within_it(model):
    usual = planned(model, jobs=2)[0].chunk_rows
    assert planned(model, jobs=2, time_limit=8 * 3600.0)[0].chunk_rows == usual
    assert planned(model, jobs=2, time_limit=1e-3)[0].chunk_rows < usual
    assert planned(model, jobs=2, time_limit=1e-9)[0].chunk_rows == 1
    assert planned(model, jobs=2, time_limit=1e-9, chunk_rows=90)[0].chunk_rows == 90
    gpt2 = 124_000_000 * 4
    assert [rows_within(limit / 4, 40, gpt2) for limit in (8, 60, 3600)] == [10, 75, 4536]


def test_memory_that_holds_no_sequence_is_refused(model):
    with pytest.raises(UsageError, match="--kv-memory"):
        planned(model, kv_bytes=10)


def test_a_plan_has_the_precision_of_the_model_as_it_was_opened(model):
    plan, automatic = planned(model.with_precision("int8"))
    assert (planned(model)[0].precision, plan.precision) == ("float32", "int8")
    assert plan.kv_bytes == default_kv_bytes(model.config, "int8")
    assert "precision" not in automatic  # an output in another precision is another output


# ---- tasks that only read


def test_a_chunk_of_rows_to_read_is_cut_by_what_it_costs_to_read():
    assert rows_to_read(ScoreOptions(), 800, 1024) == 655
    assert rows_to_read(ScoreOptions(stride=64), 800, 1024) == 655  # it has one window
    assert rows_to_read(ScoreOptions(stride=64), 8_000, 1024) == 4  # each token is read 16 times
    assert rows_to_read(EmbedOptions(), 400_000, 1024) == 1
    assert rows_to_read(ScoreOptions(), 0, 1024) == MAX_CHUNK_TOKENS


def test_a_chunk_is_cut_by_the_log_probabilities_that_its_worker_holds():
    def rows(row_bytes=4_000, asks=(), **params):
        return rows_to_hold(SamplingParams(**params), frozenset(asks), row_bytes, 1024)

    assert rows() == MAX_CHUNK_TOPS
    assert (
        rows(prompt_logprobs=100) == rows(asks=["prompt_logprobs"]) == 20
    )  # what rows themselves ask for is not known
    assert rows(prompt_logprobs=100, n=4) == 5
    assert rows(prompt_logprobs=100, row_bytes=10**6) == rows(prompt_logprobs=100, row_bytes=4 * 1024)  # it is cut
    assert rows(logprobs=100) >= MAX_CHUNK_ROWS > rows(logprobs=100, max_tokens=900)
    assert rows(asks=["logprobs", "echo"]) < 20  # in OpenAI's lines these ask for both


def test_a_task_has_the_stride_and_the_layer_that_it_comes_to():
    config = BYTES
    assert fit_task(None, config) is None
    assert fit_task(ScoreOptions(), config) == ScoreOptions(stride=config.n_ctx)
    assert fit_task(ScoreOptions(kind="choices"), config) == ScoreOptions(kind="choices")
    layers = {layer: fit_task(EmbedOptions(layer=layer), config).layer for layer in (-3, -1, 0, 2)}
    assert layers == {-3: 0, -1: 2, 0: 0, 2: 2}  # of 2 blocks
    for layer in (-4, 3):
        with pytest.raises(UsageError, match=rf"--layer {layer} is out of range \(-3 to 2: the model has 2 blocks\)"):
            fit_task(EmbedOptions(layer=layer), config)
