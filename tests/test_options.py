"""options.py: an option is declared once, and is read, written, checked and named from its declaration."""

import dataclasses
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchgen.errors import UsageError
from batchgen.job import FLAGS, RECORDS, InputOptions, Job, OutputOptions, Policy, WorkOptions, as_job
from batchgen.options import (
    arguments,
    flag_of,
    options_of,
    parse_auto,
    parse_biases,
    parse_count,
    parse_duration,
    parse_escapes,
    parse_size,
    parse_token_ids,
    say,
    show_auto,
    show_biases,
    show_duration,
    show_escapes,
    show_token_ids,
    use_flags,
)
from batchgen.run import run_job
from batchgen.types import SamplingParams

pytestmark = pytest.mark.usefixtures("python_names")


def test_every_field_of_a_record_is_an_option():
    for record in RECORDS:
        assert options_of(record).keys() == {field.name for field in dataclasses.fields(record)}


def test_no_two_options_have_one_flag_or_one_name():
    flags = [flag_of(name, one) for record in RECORDS for name, one in options_of(record).items() if not one.argument]
    names = [one.key or name for record in RECORDS for name, one in options_of(record).items()]
    assert len(flags) == len(set(flags))
    assert len(names) == len(set(names))


def test_an_option_is_named_as_its_reader_writes_it():
    assert say("on_too_long", "shorten") == "on_too_long='shorten'"
    assert say("kv_bytes") == "kv_bytes"
    use_flags(FLAGS)
    assert say("on_too_long", "shorten") == "--on-too-long shorten"
    assert say("kv_bytes", "64M") == "--kv-memory 64M"
    assert say("restart", True) == say("restart") == "--restart"
    assert say("row_params", False) == "--no-row-params"
    assert say("output_format", "dataset") == "--format dataset"


def test_a_record_is_written_as_the_words_of_a_command_line():
    assert list(arguments(SamplingParams())) == []
    assert list(arguments(SamplingParams(max_tokens=8, stop=("a", "-b"), ignore_eos=True))) == [
        *("--max-tokens", "8"),
        "--ignore-eos",
        *("--stop", "a", "--stop=-b"),
    ]
    none = SamplingParams(dry_sequence_breakers=())
    assert [*arguments(none)] == ["--dry-sequence-breakers", ""]
    assert SamplingParams(dry_sequence_breakers="") == none
    assert list(arguments(WorkOptions(share_prefixes=False, kv_bytes=2**30, time_limit=5400.0))) == [
        *("--kv-memory", str(2**30)),
        "--no-share-prefixes",
        *("--time-limit", "5400s"),
    ]


# ---- escapes

any_text = st.text(st.characters() | st.sampled_from("\\nrtxuU0dDfF\ud83d\ude00"))


@given(any_text)
def test_escapes_that_are_written_are_read_as_the_text_that_they_were(text):
    written = show_escapes(text)
    assert parse_escapes(written) == text
    assert all(character.isprintable() or "\ud800" <= character <= "\udfff" for character in written)


@given(any_text.map(lambda text: text.replace("\\", "")))
def test_a_text_without_a_backslash_is_itself(text):
    assert parse_escapes(text) == text


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (r"a\nb\tc\r", "a\nb\tc\r"),
        (r"\\n", r"\n"),
        (r"\\\n", "\\\n"),
        (r"\d \x4 \u00e \N{DASH} \'", r"\d \x4 \u00e \N{DASH} \'"),
        (r"\xe9 \u00e9 \U000000E9", "é é é"),
        (r"\ud83d\ude00", "\U0001f600"),
        ("\\", "\\"),
        ("a\nb", "a\nb"),
    ],
)
def test_an_escape_is_one_character_and_any_other_backslash_itself(written, read):
    assert parse_escapes(written) == read


@pytest.mark.parametrize("code", [r"\ud83d", r"\ude00\ud83d", r"\uD83Dx", r"\U00110000", r"\Uffffffff"])
def test_the_code_of_no_character_is_refused(code):
    with pytest.raises(ValueError, match="is the code of no character; correct it, or write .* for a backslash"):
        parse_escapes(code)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (lambda: SamplingParams(max_tokens=0), r"max_tokens 0 is out of range \(1 or more\)"),
        (lambda: SamplingParams(max_tokens=True), "max_tokens True is out of range"),
        (lambda: SamplingParams(top_k=1.5), "top_k 1.5 is out of range"),
        (lambda: SamplingParams(temperature=float("nan")), "temperature nan is out of range"),
        (lambda: SamplingParams(echo=1), r"echo 1 is out of range \(true or false\)"),
        (lambda: Policy(on_too_long="cut"), "on_too_long 'cut' is none of reject, truncate-left, shorten"),
        (lambda: InputOptions("p.jsonl", format="xml"), "format 'xml' is none of auto, jsonl"),
        (lambda: WorkOptions(backend="spark"), "backend 'spark' is none of loky, dask, ray"),
        (lambda: WorkOptions(backend="dask"), "which cluster"),
        (lambda: WorkOptions(scheduler="tcp://h:1"), "scheduler names a Dask cluster"),
        (lambda: WorkOptions(model_cache="/cache"), "model_cache is for a cluster"),
    ],
)
def test_a_value_out_of_range_is_refused_when_the_record_is_built(record, message):
    with pytest.raises(UsageError, match=message):
        record()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((None, "o.parquet"), "None is not a path"),
        ((3, "o.parquet"), "3 is not a path"),
        ((["a.jsonl", None], "o.parquet"), "None is not a path"),
        (("a.jsonl", None), "None is not a path"),
        (("a.jsonl", 3), "3 is not a path"),
        (("a.jsonl", "o.parquet", "tales", {"n": 2}), "sampling {'n': 2} is not a SamplingParams; write Sampl"),
    ],
)
def test_a_job_refuses_what_is_neither_a_path_nor_its_record(given, words):
    with pytest.raises(UsageError, match=words):
        Job(*given)


def test_a_job_takes_strings_and_paths():
    job = Job("p.jsonl", "o.parquet")
    assert job == Job(InputOptions(("p.jsonl",)), OutputOptions("o.parquet"))
    assert Job(["a.jsonl", "b.jsonl"], "o.parquet").input.files == ("a.jsonl", "b.jsonl")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: SamplingParams(max_tokenz=3),
            "'max_tokenz' is not an option of SamplingParams; did you mean 'max_tokens'?",
        ),
        (lambda: WorkOptions(job=2), "'job' is not an option of WorkOptions; did you mean 'jobs'?"),
        (lambda: Policy(on_long="shorten"), "did you mean 'on_too_long'?"),
        (lambda: InputOptions("p", prompt_col="q"), "did you mean 'prompt_column'?"),
        (lambda: OutputOptions("o", fmt="dataset"), "did you mean 'format'?"),
        (lambda: Job("p", "o", modle="m"), "'modle' is not an option of Job; did you mean 'model'?"),
        (lambda: run_job("p", "o", temprature=1.0), "did you mean 'temperature'?"),
        (lambda: run_job("p", "o", xyzzy=1.0), "; these are: prompt_column, "),
        (lambda: run_job(Job("p", "o"), jobs=2), "a Job and jobs were given"),
        (lambda: Job("p", "o", sampling={"n": 2}), "sampling .* is not a SamplingParams"),
        (lambda: run_job("p"), "an input and no output was given"),
        (lambda: WorkOptions(jobs=-1), "jobs '-1': must be a whole number from 1 on"),
        (lambda: WorkOptions(jobs=2.5), "jobs '2.5': must be a whole number from 1 on"),
        (lambda: WorkOptions(time_limit=["1h"]), r"time_limit \['1h'\] is of the wrong type; give a number"),
        (lambda: WorkOptions(kv_bytes="two"), "kv_bytes 'two': not a size; write it as 1536M or 2G"),
    ],
)
def test_a_slip_in_python_is_named_with_its_remedy(make, message):
    with pytest.raises(UsageError, match=message):
        make()


def test_texts_are_read_as_at_a_command_line():
    work = WorkOptions(jobs="2", kv_bytes="2G", time_limit="1h30m", model_cache=None)
    assert work == WorkOptions(jobs=2, kv_bytes=2**31, time_limit=5400.0)
    assert OutputOptions("o", work_dir="here").work_dir == Path("here")
    assert WorkOptions(time_limit=1 / 3).time_limit == 1 / 3


def test_a_job_is_made_of_paths_and_the_options_of_its_records():
    options = {"model": "m", "max_tokens": 4, "jobs": 2, "on_too_long": "shorten", "input_format": "csv"}
    made = as_job([Path("p"), "q"], Path("o"), options | {"output_format": "dataset"})
    assert made == Job(
        InputOptions([Path("p"), "q"], format="csv"),
        OutputOptions(Path("o"), format="dataset"),
        "m",
        SamplingParams(max_tokens=4),
        Policy("shorten"),
        WorkOptions(2),
    )
    assert Job("p", "o", Path("models/mine")).model == "models/mine"


@given(st.lists(st.tuples(st.integers(0, 10**8), st.floats(-100, 100)), unique_by=lambda pair: pair[0]))
def test_biases_are_read_as_they_are_written(biases):
    assert parse_biases(show_biases(tuple(biases))) == tuple(biases)


@given(st.lists(st.integers(0, 10**8)))
def test_token_ids_are_read_as_they_are_written(ids):
    assert parse_token_ids(show_token_ids(tuple(ids))) == tuple(ids)


@given(st.floats(1e-6, 1e8))
def test_durations_are_read_as_they_are_written(seconds):
    assert parse_duration(show_duration(seconds)) == pytest.approx(seconds, abs=1e-9)


@given(st.none() | st.integers(1, 10**8))
def test_counts_are_read_as_they_are_written(count):
    assert parse_auto(parse_count)(show_auto(count)) == count


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("1.5s", 1.5), ("50m", 3000), ("1h30m", 5400), ("2d", 172800)]
)
def test_durations_are_seconds(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    ("text", "remedies"),
    [
        ("8", ["8s", "8m", "8h"]),
        ("0.5", ["0.5s", "0.5m", "0.5h"]),
        ("1h30", ["1h30s", "1h30m"]),
        ("1h2m5", ["1h2m5s"]),
        ("1d12", ["1d12s", "1d12m", "1d12h"]),
    ],
)
def test_a_duration_needs_a_unit_below_the_one_before_and_the_remedy_works(text, remedies):
    with pytest.raises(ValueError, match=f"'{text}' has no unit; write ") as error:
        parse_duration(text)
    assert re.findall(r"[0-9.hmsd]+[smhd]\b", str(error.value).partition("write")[2]) == remedies
    assert all(parse_duration(remedy) > 0 for remedy in remedies)


def test_sizes_have_units():
    assert parse_size("1536M") == parse_size("1536MiB") == 1536 * 2**20
    assert (parse_size("2g"), parse_size("77")) == (2 * 2**30, 77)
    assert parse_auto(parse_size)("auto") is None


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        *((parse_size, text) for text in ("lots", "0", "", "-1", "1T", "1.5G")),
        *((parse_duration, text) for text in ["", "0", "-5", "m", "5x", "5 m", "1e3", "nan", "inf", "9999999999"]),
        *((parse_count, text) for text in ("0", "-1", "1.5", "many", "")),
        *((parse_token_ids, text) for text in ("a", "1;2", "1,,2", "1,", "-1", "1" * 10)),
        *((parse_biases, text) for text in ("5", "5=", "5=1,", "x=1", "1=high")),
    ],
)
def test_a_text_that_is_no_value_is_refused(parse, text):
    with pytest.raises(ValueError, match=r"'"):
        parse(text)
