"""--help and shell completion: every option in a group, an example of every command, names completed."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from batchgen.job import GROUPS
from batchgen.jobs import panels
from batchgen.jobs.cli import app
from tests.support.models import write_byte_model

ROOT = Path(__file__).parents[1]
COMMANDS = get_command(app).commands


MANY_OPTIONS = ("plan", "generate", "complete", "plan score", "score", "plan embed", "embed")


def groups(command: str) -> dict[str, str | None]:
    """The group of every option of a command."""
    options = [one for one in COMMANDS[command].params if one.param_type_name == "option" and "help" not in one.name]
    return {one.name: one.rich_help_panel for one in options}


def test_every_command_is_in_a_group():
    assert {name for names in panels.COMMANDS.values() for name in names} == COMMANDS.keys()


@pytest.mark.parametrize("command", MANY_OPTIONS)
def test_every_option_is_in_a_group(command):
    assert [name for name, group in groups(command).items() if not group] == []


def test_an_option_is_in_the_same_group_in_every_command():
    found = {(name, group) for command in MANY_OPTIONS for name, group in groups(command).items()}
    assert len(found) == len({name for name, _ in found})


@pytest.mark.parametrize("command", MANY_OPTIONS)
def test_the_groups_of_a_command_are_in_one_order(command):
    assert set(groups(command).values()) <= set(GROUPS)
    order = [GROUPS.index(group) for group in groups(command).values()]
    assert order == sorted(order)


def test_no_group_is_without_options():
    assert set().union(*(groups(command).values() for command in MANY_OPTIONS)) == set(GROUPS)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_an_example_that_it_accepts(command):
    examples = re.findall(r"^Example: (.*)$", COMMANDS[command].help, re.MULTILINE)
    assert examples
    for example in examples:
        words, name = shlex.split(example), ["batchgen", *command.split()]
        assert words[: len(name)] == name
        COMMANDS[command].make_context(command, words[len(name) :])


@pytest.mark.parametrize("asked", ["--help", "--help-all"])
@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_fits_80_columns_and_cuts_no_flag_and_no_word(command, asked):
    if asked == "--help-all" and command not in MANY_OPTIONS:
        pytest.skip("one help is enough")
    done = CliRunner().invoke(app, [*command.split(), asked], env={"COLUMNS": "80"})
    assert done.exit_code == 0
    assert max(map(len, done.output.splitlines())) <= 80
    assert "\u2026" not in done.output
    words = re.findall(r"--[a-z-]+", done.output)
    flags = {flag for one in COMMANDS[command].params for flag in one.opts if flag.startswith("--")}
    assert flags <= set(words)
    assert not [word for word in words if word.endswith("-")]


def test_a_short_help_explains_the_options_that_people_use_and_names_the_others():
    short = CliRunner().invoke(app, ["generate", "--help"], env={"COLUMNS": "80"}).output
    explained, named = short.split("More options, explained by --help-all:")
    assert 10 <= len(re.findall(r"^  -", explained, re.MULTILINE)) <= 18
    for flag, part in (("--max-tokens", explained), ("--output", explained), ("--kv-memory", named)):
        assert flag in part


def test_every_option_of_generate_is_one_of_plan():
    flags = {name: {flag for one in COMMANDS[name].params for flag in one.opts} for name in ("generate", "plan")}
    assert flags["generate"] <= flags["plan"]


def completed(*words: str, **environment: str) -> list[str]:
    """What a shell offers for the last of the words."""
    asked = {"_BATCHGEN_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    script = "import sys; sys.argv[0] = 'batchgen'; from batchgen.jobs.cli import main; main()"
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | asked | environment
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr == ""
    return done.stdout.split()


def test_a_shell_is_offered_commands_options_and_models(tmp_path):
    assert completed("batchgen", "ver") == ["verify"]
    assert completed("batchgen", "generate", "--on-t") == ["--on-too-long"]
    write_byte_model(tmp_path / "mine")
    assert completed("batchgen", "generate", "--model", "mi", BATCHGEN_MODELS=str(tmp_path)) == ["mine"]


def test_completion_is_installed_for_a_shell(tmp_path):
    command = [sys.executable, "-c", "import sys; sys.argv[0] = 'batchgen'; from batchgen.jobs.cli import main; main()"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    done = subprocess.run(
        [*command, "--install-completion", "bash"], env=environment, capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0
    assert "_BATCHGEN_COMPLETE=complete_bash" in (tmp_path / ".bash_completions" / "batchgen.sh").read_text()
