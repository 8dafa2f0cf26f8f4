"""--help and shell completion: every option in a group, an example of every command, names completed."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from batchgen.jobs import panels
from batchgen.jobs.cli import app
from tests.support.models import write_byte_model

ROOT = Path(__file__).parents[1]
COMMANDS = get_command(app).commands


def options(command: str) -> set[str]:
    return {p.name for p in COMMANDS[command].params if p.param_type_name == "option" and p.name != "help"}


def test_every_command_stands_in_a_group():
    assert {name for names in panels.COMMANDS.values() for name in names} == COMMANDS.keys()


@pytest.mark.parametrize("command", panels.MANY_OPTIONS)
def test_every_option_stands_in_a_group(command):
    assert {p.name for p in COMMANDS[command].params if p.name in options(command) and not p.rich_help_panel} == set()


def test_a_group_names_only_options_that_there_are():
    grouped = [name for names in panels.OPTIONS.values() for name in names]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == set().union(*(options(command) for command in panels.MANY_OPTIONS))


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_an_example_that_it_takes(command):
    examples = re.findall(r"^Example: (.*)$", COMMANDS[command].help, re.MULTILINE)
    assert examples
    for example in examples:
        program, name, *arguments = shlex.split(example)
        assert (program, name) == ("batchgen", command)
        COMMANDS[command].make_context(name, arguments)


def completed(*words: str, **environment: str) -> list[str]:
    """What a shell would offer for the last of the words."""
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
