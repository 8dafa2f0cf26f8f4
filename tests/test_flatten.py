"""jobs/flatten.py: the options of a command are the fields of its records, and a command line gives those records."""

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.main import get_command
from typer.testing import CliRunner

from batchgen.errors import UsageError
from batchgen.job import InputOptions, Policy, WorkOptions
from batchgen.jobs.cli import app
from batchgen.jobs.flatten import flatten
from batchgen.options import arguments, flag_of, options_of
from batchgen.types import SamplingParams

texts = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("\\nxu0-"), min_size=1, max_size=12)


def run(*words: str, leave_out: tuple[str, ...] = ()):
    """What a command with four records is called with."""
    called = {}

    @flatten(*leave_out)
    def command(
        input: InputOptions, sampling: SamplingParams, policy: Policy, work: WorkOptions, more: int = 3
    ) -> None:
        called.update(input=input, sampling=sampling, policy=policy, work=work, more=more)

    one = typer.Typer()
    one.command()(command)
    done = CliRunner().invoke(one, words)
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return called


def test_without_options_every_record_has_its_defaults():
    assert run("p.jsonl") == {
        "input": InputOptions("p.jsonl"),
        "sampling": SamplingParams(),
        "policy": Policy(),
        "work": WorkOptions(),
        "more": 3,
    }


def test_options_become_the_fields_of_their_records():
    words = "a.csv b.csv --keep x --keep y --no-row-params --logit-bias 5=-1 --stop=-- --trim --kv-memory 2G --more 7"
    called = run(*words.split(), "--jobs", "auto", "--time-limit", "1h")
    assert called["input"] == InputOptions(("a.csv", "b.csv"), keep=("x", "y"), row_params=False)
    assert called["sampling"] == SamplingParams(logit_bias=((5, -1.0),), stop=("--",))
    assert called["policy"] == Policy(trim=True)
    assert called["work"] == WorkOptions(kv_bytes=2**31, time_limit=3600.0)
    assert called["more"] == 7


def test_texts_of_the_command_line_have_escapes_and_those_of_python_none():
    words = [
        "--stop",
        r"\n",
        "--stop",
        "$\n",
        "--bad-words",
        r"\\n",
        "--template",
        r"{q}\n",
        "--shots",
        "s",
        "--shots-end",
        r"\t",
    ]
    called = run("p.jsonl", *words)
    assert called["sampling"] == SamplingParams(stop=("\n", "$\n"), bad_words=(r"\n",))
    assert called["input"] == InputOptions("p.jsonl", template="{q}\n", shots="s", shots_end="\t")
    assert SamplingParams(stop=r"\n").stop == (r"\n",)
    assert InputOptions("p.jsonl", template=r"{q}\n").template == r"{q}\n"


@given(st.lists(texts, min_size=1, max_size=4), texts, texts)
def test_the_words_of_a_record_give_the_record(stop, template, end):
    sampling, input = SamplingParams(stop=stop), InputOptions("p.jsonl", template=template, shots="s", shots_end=end)
    called = run("p.jsonl", *arguments(sampling), *arguments(input))
    assert (called["sampling"], called["input"]) == (sampling, input)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--kv-memory", "lots"], "--kv-memory 'lots': not a size"),
        (["--jobs", "0"], "--jobs '0': must be a whole number"),
        (["--max-tokens", "0"], "max_tokens 0 is out of range"),
        (["--stop", "a", "--stop", r"\ud800"], r"--stop \\ud800 is the code of no character"),
    ],
)
def test_a_text_that_is_no_value_is_named_with_its_flag(words, message):
    with pytest.raises(UsageError, match=message):
        run("p.jsonl", *words)


def test_fields_that_are_left_out_are_no_options_and_keep_their_defaults():
    assert run("p.jsonl", leave_out=("n", "seed"))["sampling"] == SamplingParams()
    with pytest.raises(AssertionError, match="No such option"):
        run("p.jsonl", "--seed", "3", leave_out=("n", "seed"))


@pytest.mark.parametrize("command", ["generate", "plan"])
def test_every_parameter_is_an_option_of_the_commands_that_generate(command):
    flags = {flag for one in get_command(app).commands[command].params for flag in one.opts}
    for record in (InputOptions, SamplingParams, Policy, WorkOptions):
        wanted = {flag_of(name, one) for name, one in options_of(record).items() if not one.argument}
        assert wanted <= flags
