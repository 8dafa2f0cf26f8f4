"""plan.py: a plan is stored and read again as it was, says what differs, and writes the command that makes it."""

import json
import shlex
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchgen.jobs import generate
from batchgen.jobs.cli import app
from batchgen.models.registry import check_bare_name
from batchgen.plan import Plan
from batchgen.planning import Arithmetic, Setting, make_plan
from batchgen.types import MAX_SEED, SamplingParams
from tests.support.models import BYTES

text = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=12)
token = st.integers(0, 256)
sampling = st.builds(
    SamplingParams,
    max_tokens=st.integers(5, 2**31 - 1),
    temperature=st.just(0.0) | st.floats(0.001, 100),
    top_k=st.integers(0, 2**31 - 1),
    top_p=st.floats(0, 1, exclude_min=True),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0.01, 100),
    presence_penalty=st.floats(-100, 100),
    frequency_penalty=st.floats(-100, 100),
    logit_bias=st.dictionaries(token, st.floats(-100, 100), max_size=4),
    stop_token_ids=st.lists(token, max_size=4),
    min_tokens=st.integers(0, 5),
    ignore_eos=st.booleans(),
    n=st.integers(1, 1024),
    seed=st.integers(0, MAX_SEED),
    logprobs=st.none() | st.integers(0, 100),
    stop=st.lists(text, max_size=8),
    include_stop=st.booleans(),
    bad_words=st.lists(text, max_size=4),
    echo=st.booleans(),
    stop_loops=st.booleans(),
)
plans = st.builds(
    Plan,
    batchgen=st.just("0.1.0"),
    numpy=st.just("2.4.1"),
    blas=st.just("openblas 0.3.31 Haswell"),
    batch_invariant=st.booleans(),
    input=st.text("0123456789abcdef", min_size=64, max_size=64),
    input_formats=st.sampled_from([("jsonl",), ("csv",), ("tsv",), ("parquet",), ("csv", "jsonl")]),
    rows=st.integers(0, 10**9),
    prompt_column=text,
    id_column=text,
    keep=st.lists(text, unique=True, max_size=3).map(tuple),
    row_params=st.booleans(),
    model=st.from_regex(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,20}", fullmatch=True).map(check_bare_name),
    model_hash=st.just("abc"),
    parameters=sampling,
    on_too_long=st.sampled_from(["reject", "truncate-left", "shorten"]),
    empty_prompt=st.sampled_from(["reject", "unconditional"]),
    trim=st.booleans(),
    format=st.sampled_from(["parquet", "jsonl", "dataset"]),
    token_ids=st.booleans(),
    chunk_rows=st.integers(1, 10**8),
    batch_size=st.integers(1, 4096),
    kv_bytes=st.integers(2**28, 2**45),
    share_prefixes=st.booleans(),
)


class Stopped(Exception):
    """In the place of a run, with the job that the command line asks for."""


def parse(command: str, monkeypatch):
    """The job that the real command line makes of a command."""

    def stop(job, *_):
        raise Stopped(job)

    monkeypatch.setattr(generate, "run_job", stop)
    program, *words = shlex.split(command)
    assert program == "batchgen"
    with pytest.raises(Stopped) as stopped:
        app(words, standalone_mode=False)
    return stopped.value.args[0]


@settings(max_examples=150, deadline=None)
@given(plans)
def test_the_command_line_of_a_plan_gives_the_plan(plan):
    with pytest.MonkeyPatch.context() as monkeypatch:
        job = parse(plan.command_line(), monkeypatch)
    facts = SimpleNamespace(sha256=plan.input, formats=plan.input_formats, rows=plan.rows)
    model = SimpleNamespace(name=plan.model, hash=plan.model_hash, config=BYTES)
    arithmetic = Arithmetic(plan.numpy, plan.blas, plan.batch_invariant)
    made, automatic = make_plan(job, facts, model, Setting(arithmetic, plan.rows, 3, plan.format))
    assert made == plan
    assert automatic == frozenset()  # the command names every size
    formats = {"auto"} if len(plan.input_formats) > 1 else {plan.input_formats[0]}
    assert {job.input.format} == formats


@given(plans)
def test_a_plan_is_read_as_it_was_stored(plan):
    stored = json.loads(json.dumps(plan.to_json()))
    assert Plan.from_json(stored) == plan
    assert "retry" not in stored
    retry = replace(plan, retry=True)
    assert Plan.from_json(retry.to_json()) == retry


@given(plans, st.data())
def test_what_is_missing_unknown_or_of_another_type_is_named(plan, data):
    stored = plan.to_json()
    name = data.draw(st.sampled_from(sorted(stored)))
    with pytest.raises(ValueError, match=f"'{name}' is missing"):
        Plan.from_json({key: value for key, value in stored.items() if key != name})
    with pytest.raises(ValueError, match="'mirostat' is not known here"):
        Plan.from_json(stored | {"mirostat": 2})
    with pytest.raises(ValueError, match="is not known here" if name == "parameters" else name):
        Plan.from_json(stored | {name: {"a": object}})


@given(plans)
def test_equal_plans_do_not_conflict(plan):
    assert plan.conflict(replace(plan)) is None


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("parameters", SamplingParams(max_tokens=64), "it had --max-tokens 40, and this has --max-tokens 64"),
        ("trim", True, "it had no --trim, and this has --trim"),
        ("kv_bytes", 77, "it had --kv-memory 1000, and this has --kv-memory 77"),
        ("row_params", False, "it had --row-params, and this has --no-row-params"),
        ("numpy", "2.5.0", "it had numpy '2.4.1', and this has numpy '2.5.0'"),
        ("keep", ("a",), "it had no --keep, and this has --keep a"),
    ],
)
def test_a_conflict_is_named_in_the_words_of_the_command_line(name, value, words):
    plan = Plan(
        batchgen="0.1.0", numpy="2.4.1", blas="b", batch_invariant=True, input="a", input_formats=("jsonl",), rows=1,
        prompt_column="prompt", id_column="id", keep=(), row_params=True, model="m", model_hash="h",
        parameters=SamplingParams(), on_too_long="reject", empty_prompt="reject", trim=False, format="parquet",
        token_ids=False, chunk_rows=1, batch_size=1, kv_bytes=1000, share_prefixes=True,
    )  # fmt: skip
    other = replace(plan, **{name: value})
    assert plan.conflict(other) == words
    assert plan.conflict(other, {name}) is None
