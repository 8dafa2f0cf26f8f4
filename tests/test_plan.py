"""plan.py: a plan is stored and read again as it was, says what differs, and writes the command that makes it."""

import hashlib
import json
import shlex
from dataclasses import MISSING, fields, replace
from importlib.metadata import version
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchgen import __version__
from batchgen.errors import UsageError
from batchgen.job import ScoreInput, ScoreOptions
from batchgen.jobs import running
from batchgen.jobs.cli import app
from batchgen.models.registry import check_bare_name
from batchgen.plan import Plan, task_fields
from batchgen.planning import Setting, make_plan
from batchgen.types import MAX_SEED, READING, SamplingParams
from tests.support.models import BYTES
from tests.support.plans import plan_of

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
    prompt_logprobs=st.none() | st.integers(0, 100),
    stop=st.lists(text, max_size=8),
    include_stop=st.booleans(),
    bad_words=st.lists(text, max_size=4),
    echo=st.booleans(),
    stop_loops=st.booleans(),
    skip_special_tokens=st.booleans(),
    no_repeat_ngram_size=st.integers(0, 2**31 - 1),
    typical_p=st.floats(0, 1, exclude_min=True),
    top_n_sigma=st.floats(0, 100),
    dry_multiplier=st.floats(0, 100),
    dry_base=st.floats(1, 100),
    dry_allowed_length=st.integers(0, 2**31 - 1),
    dry_sequence_breakers=st.lists(st.text("ab\n\\'é", min_size=1, max_size=9), max_size=4),
    xtc_probability=st.floats(0, 1),
    xtc_threshold=st.floats(0, 1),
    allowed_token_ids=st.lists(token, max_size=4),
    heal=st.booleans(),
)
plans = st.builds(
    Plan,
    batchgen=st.just(__version__),
    regex=st.just(version("regex")),
    precision=st.sampled_from(["float32", "int8"]),
    portable=st.booleans(),
    input=st.text("0123456789abcdef", min_size=64, max_size=64),
    input_formats=st.sampled_from([("jsonl",), ("csv",), ("tsv",), ("parquet",), ("csv", "jsonl", "csv")]),
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
    template=st.none() | text,
    files=st.lists(st.text("0123456789abcdef", min_size=16, max_size=16), max_size=3).map(tuple),
    seed_by=st.sampled_from(["row", "id", "prompt"]),
).map(lambda plan: replace(plan, prompt_column="prompt") if plan.template else plan)


OPTIONAL = {one.name for one in fields(Plan) if one.default is not MISSING} | {
    "batch_invariant"
}  # older plans lack them


class Stopped(Exception):
    """In the place of a run, with the job that the command line asks for."""


def parse(command: str, monkeypatch):
    """The job that the real command line makes of a command."""

    def stop(job, **_):
        raise Stopped(job)

    monkeypatch.setattr(running, "run_job", stop)
    program, *words = shlex.split(command)
    assert program == "batchgen"
    with pytest.raises(Stopped) as stopped:
        app(words, standalone_mode=False)
    return stopped.value.args[0]


def planned(job, plan):
    """The plan of a job, of the input and the model of another plan, and its automatic fields."""
    facts = {"sha256": plan.input, "formats": plan.input_formats, "rows": plan.rows, "files": plan.files}
    facts |= {"names": (), "bytes": 0, "asks": frozenset(), "template": job.input.template, "before": ""}
    model = SimpleNamespace(name=plan.model, hash=plan.model_hash, config=BYTES, precision=job.work.precision)
    return make_plan(job, SimpleNamespace(**facts), model, Setting(plan.rows, 3, plan.format))


def test_a_plan_of_before_newer_parameters_keeps_its_digest():
    """Parts hold it: those of an interrupted run are good for a version that has more parameters."""
    plan = plan_of(parameters=SamplingParams(max_tokens=5))
    old = plan.to_json()
    names = list(old["parameters"])
    for name in names[names.index("skip_special_tokens") + 1 :]:
        del old["parameters"][name]
    assert (
        plan.digest
        == Plan.from_json(old).digest
        == hashlib.sha256(json.dumps(old, sort_keys=True).encode()).hexdigest()[:16]
    )
    assert plan.digest != replace(plan, parameters=SamplingParams(max_tokens=5, heal=True)).digest


@settings(max_examples=60, deadline=None)
@given(plans)
def test_the_command_line_of_a_plan_gives_the_plan(plan):
    with pytest.MonkeyPatch.context() as monkeypatch:
        job = parse(plan.command_line(), monkeypatch)
    made, automatic = planned(job, plan)
    assert made == plan
    assert automatic == frozenset()  # the command names every size
    for delimiter, quotes in ((";", "no"), ("tab", "auto")):
        other = replace(plan, input_formats=("csv",), delimiter=delimiter, quotes=quotes)
        with pytest.MonkeyPatch.context() as monkeypatch:
            asked = parse(other.command_line(), monkeypatch).input
        assert (asked.delimiter, asked.quotes) == (delimiter, quotes)
    formats = {"auto"} if len(plan.input_formats) > 1 else {plan.input_formats[0]}
    assert {job.input.format} == formats


columns = {
    "text": st.fixed_dictionaries({"text_column": text}),
    "completion": st.fixed_dictionaries({"prompt_column": text, "completion_column": text}),
    "choices": st.fixed_dictionaries({"prompt_column": text, "choices_column": text, "answer_column": text}),
}
tasks = st.one_of(
    st.tuples(
        columns["text"],
        st.builds(ScoreOptions, st.sampled_from(["endoftext", "given"]), st.integers(1, BYTES.n_ctx), st.booleans()),
    ),
    st.tuples(columns["completion"], st.builds(ScoreOptions, per_token=st.booleans(), kind=st.just("completion"))),
    st.tuples(columns["choices"], st.builds(ScoreOptions, per_token=st.booleans(), kind=st.just("choices"))),
)


@settings(max_examples=50, deadline=None)
@given(plans, tasks)
def test_the_command_line_of_a_plan_of_scores_gives_the_plan(plan, found):
    names, task = found
    given = ScoreInput((), id_column=plan.id_column, keep=plan.keep, **names)
    own = {"template": None, "row_params": False, "trim": False, "empty_prompt": "reject", "token_ids": False}
    own |= {"seed_by": "row"}
    own |= {"parameters": READING, "prompt_column": given.prompt_column}
    own |= {"on_too_long": "reject" if plan.on_too_long == "shorten" else plan.on_too_long}
    plan = replace(plan, **own | task_fields(given, task))
    with pytest.MonkeyPatch.context() as monkeypatch:
        job = parse(plan.command_line(), monkeypatch)
    assert job.task.kind == plan.kind
    assert ("--prompt-column" in plan.command_line()) == (plan.prompt_column not in ("prompt", plan.text_column))
    assert planned(job, plan)[0] == plan
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert plan.options() == task


def test_plans_of_scores_differ_in_the_words_of_the_command_line():
    def scores(options=ScoreOptions(stride=128), **columns):  # noqa: B008  # frozen
        given = ScoreInput((), **columns)
        return plan_of(prompt_column=given.prompt_column, **task_fields(given, options))

    changed = scores(ScoreOptions("given", 64, True)).conflict(scores())
    assert changed == (
        "it had --first-token given, --stride 64, --per-token, "
        "and this has --first-token endoftext, --stride 128, no --per-token"
    )
    changed = scores().conflict(scores(text_column="body"))
    assert changed == "it had --text-column text, and this has --text-column body"
    assert plan_of().conflict(scores()) == "it had the command generate, and this has the command score"


def test_plans_of_other_seed_keys_differ_in_the_words_of_the_command_line():
    assert plan_of().conflict(plan_of(seed_by="id")) == "it had --seed-by row, and this has --seed-by id"


@given(plans)
def test_a_plan_is_read_as_it_was_stored(plan):
    stored = json.loads(json.dumps(plan.to_json()))
    assert Plan.from_json(stored) == plan
    assert not {"retry", "delimiter", "quotes", "names"} & stored.keys()
    assert ("files" in stored) == bool(plan.files)
    retry = replace(plan, retry=True)
    assert Plan.from_json(retry.to_json()) == retry


@given(plans, st.data())
def test_what_is_missing_unknown_or_of_another_type_is_named(plan, data):
    stored = plan.to_json()
    name = data.draw(st.sampled_from(sorted(stored.keys() - OPTIONAL)))
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
        ("model", "124M", "it had --model m, and this has --model 124M"),
        ("model_hash", "i", "it had model_hash 'h', and this has model_hash 'i'"),
        ("format", "dataset", "it had --format file, and this has --format dataset"),
        ("input_formats", ("csv",), "it had --input-format jsonl, and this has --input-format csv"),
        ("input", "b", "the input is not what it was (SHA-256 a then, b now)"),
        (
            "parameters",
            SamplingParams(max_tokens=64, seed=7),
            "it had --max-tokens 40, --seed 0, and this has --max-tokens 64, --seed 7",
        ),
        ("parameters", SamplingParams(max_tokens=64), "it had --max-tokens 40, and this has --max-tokens 64"),
        ("trim", True, "it had no --trim, and this has --trim"),
        ("kv_bytes", 77, "it had --kv-memory 1000, and this has --kv-memory 77"),
        ("row_params", False, "it had --row-params, and this has --no-row-params"),
        ("precision", "int8", "it had --precision float32, and this has --precision int8"),
        ("keep", ("a",), "it had no --keep, and this has --keep a"),
        ("regex", "2", "it had the package regex '1', and this has the package regex '2'"),
        ("llguidance", "2", "it had the package llguidance '1', and this has the package llguidance '2'"),
        ("llguidance", "", None),
    ],
)
def test_a_conflict_is_named_in_the_words_of_the_command_line(name, value, words):
    plan = Plan(
        batchgen="0.1.0", input="a", input_formats=("jsonl",), rows=1,
        prompt_column="prompt", id_column="id", keep=(), row_params=True, model="m", model_hash="h",
        parameters=SamplingParams(), on_too_long="reject", empty_prompt="reject", trim=False, format="parquet",
        token_ids=False, chunk_rows=1, batch_size=1, kv_bytes=1000, share_prefixes=True, regex="1", llguidance="1",
    )  # fmt: skip
    other = replace(plan, **{name: value})
    assert plan.conflict(other) == words
    assert plan.conflict(other, {name}) is None


def test_what_an_older_plan_does_not_know_agrees_with_anything_and_what_changes_no_row_is_only_recorded():
    old, new = plan_of(), plan_of(regex="2", numpy="2.4.1", python="3.12.1", pyarrow="21.0.0")
    assert old.conflict(new) is None
    stored = new.to_json()
    assert (stored["numpy"], stored["python"], stored["pyarrow"]) == ("2.4.1", "3.12.1", "21.0.0")
    assert new.conflict(Plan.from_json(stored | {"numpy": "3", "python": "3.13.0", "pyarrow": "22.0.0"})) is None


def test_a_plan_from_before_version_0_3_is_read_as_one_in_float32_whose_bits_are_not_portable():
    older = {"numpy": "2.4.1", "blas": "openblas", "batch_invariant": True, "numpy_kernels": "exp X86_V4"}
    plan = Plan.from_json(plan_of().to_json() | older)
    assert (plan.precision, plan.portable) == ("float32", False)
    assert plan.conflict(plan_of(portable=True)) is None
    assert not {"blas", "numpy_kernels", "batch_invariant", "portable"} & plan.to_json().keys()


def test_a_plan_says_to_other_readers_how_precise_and_how_portable_its_rows_are():
    stored = plan_of(portable=True).to_json()
    assert (stored["batch_invariant"], stored["portable"], stored["precision"]) == (True, True, "float32")
    with pytest.raises(UsageError, match="precision 'int4' is none of float32, int8"):
        Plan.from_json(stored | {"precision": "int4"})


FILES = {"files": ("aa", "bb", "cc"), "names": ("a.jsonl", "b.jsonl", "c.jsonl"), "rows": 12}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"files": ("aa", "b2", "cc"), "rows": 2}, "b.jsonl is not among the inputs that it had (12 rows then, 2 now)"),
        (
            {"files": ("a2", "bb", "c2")},
            "a.jsonl, c.jsonl are not among the inputs that it had (SHA-256 abc then, new now)",
        ),
        ({"files": ("bb", "aa", "cc")}, "the files of the input are in another order (SHA-256 abc then, new now)"),
        (
            {"files": ("aa", "cc"), "rows": 8},
            "the input has fewer files than it had (3 files then, 2 now; 12 rows then, 8 now)",
        ),
        (
            {"files": ("aa", "bb", "cc", "dd"), "names": (*FILES["names"], "d.jsonl"), "rows": 13},
            "d.jsonl is not among the inputs that it had (3 files then, 4 now; 12 rows then, 13 now)",
        ),
    ],
)
def test_a_changed_input_is_named_by_its_files(changes, words):
    assert plan_of(**FILES).conflict(plan_of(**FILES | changes, input="new", input_formats=("csv", "jsonl"))) == words


@pytest.mark.parametrize(
    ("then", "now", "words"),
    [
        (("csv", "tsv", "csv"), ("tsv", "csv", "csv"), "a.jsonl was read as csv, and is read as tsv now"),
        (("csv", "jsonl", "csv"), ("csv",), "b.jsonl was read as jsonl, and is read as csv now"),
        (("csv",), ("csv", "csv", "tsv"), "c.jsonl was read as csv, and is read as tsv now"),
        (("csv", "tsv"), ("csv", "tsv", "csv"), "a file was read as csv or tsv, and is read as csv or tsv or csv now"),
    ],
)
def test_the_file_that_is_read_as_another_format_is_named(then, now, words):
    assert plan_of(**FILES, input_formats=then).conflict(plan_of(**FILES, input_formats=now)) == words


def test_one_input_is_named_as_another_or_a_changed_one_would_be():
    old, new = plan_of(rows=1), plan_of(names=("b.jsonl",), rows=2, input="new")
    assert old.conflict(new) == "b.jsonl is not the input that it had (1 row then, 2 now)"


def test_all_that_differs_is_named_and_nothing_that_follows_from_it():
    old, new = plan_of(trim=True), plan_of(model="124M", model_hash="9", input="x", kv_bytes=1, rows=3)
    assert old.conflict(new, {"kv_bytes"}) == (
        "the input is not what it was (12 rows then, 3 now); "
        "it had --model bytes, --trim, and this has --model 124M, no --trim"
    )


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ("abcd", "n3 is not among the inputs that it had (3 files then, 4 now; 12 rows then, 9 now)"),
        ("abca", "n3 is not among the inputs that it had (3 files then, 4 now; 12 rows then, 9 now)"),
        ("aaabc", "n1, n2 are not among the inputs that it had (3 files then, 5 now; 12 rows then, 9 now)"),
        ("axc", "n1 is not among the inputs that it had (12 rows then, 9 now)"),
        ("aac", "n1 is not among the inputs that it had (12 rows then, 9 now)"),
        (
            "xyzwc",
            "n0, n1, n2 and 1 more are not among the inputs that it had (3 files then, 5 now; 12 rows then, 9 now)",
        ),
        ("ab", "the input has fewer files than it had (3 files then, 2 now; 12 rows then, 9 now)"),
        ("bac", "the files of the input are in another order (12 rows then, 9 now)"),
    ],
)
def test_the_files_that_changed_are_named(files: str, words: str) -> None:
    names = tuple(f"n{index}" for index in range(len(files)))
    old, new = plan_of(files=tuple("abc")), plan_of(input="x", rows=9, files=tuple(files), names=names)
    assert old.conflict(new) == words


@pytest.mark.parametrize("name", ["quotes", "delimiter"])
def test_rows_that_follow_from_how_a_file_is_read_are_not_named(name: str) -> None:
    words = plan_of().conflict(plan_of(rows=3, **{name: "no" if name == "quotes" else ";"}))
    assert words
    assert "rows" not in words
