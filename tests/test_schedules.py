"""jobs/crontab.example and the systemd units: their commands exist, and they handle each exit code correctly."""

import configparser
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from batchgen.jobs.cli import app

JOBS = Path(__file__).parents[1] / "jobs"
SUCCESSES = {0, 3, 75}


def cron_commands() -> list[str]:
    lines = (JOBS / "crontab.example").read_text().splitlines()
    commands = [match[1] for line in lines if (match := re.fullmatch(r"(?:[\d*]+ +){5}(.+)", line))]
    return [command.replace("\\%", "%") for command in commands if "$BATCHGEN" in command]  # as cron runs them


def unit(name: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(JOBS / name)
    return parser


def test_there_is_a_nightly_run_one_for_failed_rows_and_one_for_a_file_each_day():
    assert len(cron_commands()) == 3


@pytest.mark.parametrize("code", [0, 1, 2, 3, 75, 130, 137, 143])
def test_cron_mails_exactly_the_exit_codes_of_failed_runs(tmp_path, code):
    stub = tmp_path / "batchgen"
    stub.write_text(f"#!/bin/sh\nexit {code}\n")
    stub.chmod(0o755)
    command = cron_commands()[0].replace("/data/nightly", shlex.quote(str(tmp_path)))
    done = subprocess.run(["/bin/sh", "-c", command], env={"BATCHGEN": str(stub)}, capture_output=True, text=True)
    assert (done.stdout != "") == (code not in SUCCESSES)
    assert done.stderr == ""
    assert done.returncode == (0 if code in SUCCESSES else code)


@pytest.mark.parametrize("command", [*cron_commands(), unit("batchgen.service")["Service"]["ExecStart"]])
def test_every_option_is_one_of_the_command(command):
    help_text = CliRunner().invoke(app, ["generate", "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    words = command.partition(" generate ")[2].partition(" >")[0].split()
    options = [word for word in words if word.startswith("--")]
    assert options
    for option in options:
        assert option in help_text


def test_systemd_counts_rejected_rows_and_the_time_limit_as_success():
    codes = unit("batchgen.service")["Service"]["SuccessExitStatus"].split()
    assert {int(code) for code in codes} | {0} == SUCCESSES


def test_the_timer_starts_the_service():
    assert unit("batchgen.timer")["Timer"]["OnCalendar"]
    assert (JOBS / "batchgen.timer").stem == (JOBS / "batchgen.service").stem
