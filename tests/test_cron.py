"""deploy/crontab.example: its lines do, as cron runs them, what it and docs/cron.md say."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.models import write_byte_model

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "deploy" / "crontab.example"
LINE = re.compile(r"((?:\S+ ){4}\S+)\s+(.*)")


def read_crontab(text: str) -> tuple[dict[str, str], dict[str, str]]:
    """Its environment, and its commands by their times, as cron reads them: \\% is %, and a bare % ends the command."""
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    environment = dict(line.split("=", 1) for line in lines if re.match(r"\w+=", line))
    found = [match for line in lines if (match := LINE.fullmatch(line))]
    assert len(found) + len(environment) == len(lines)
    commands = {match[1]: re.split(r"(?<!\\)%", match[2])[0].replace("\\%", "%") for match in found}
    return environment, commands


@pytest.fixture
def cron(tmp_path: Path) -> Any:
    """Runs a command of the example by its time, as cron does; returns its exit code and what cron would mail."""
    model = write_byte_model(tmp_path / "models" / "124M")
    programme = tmp_path / "batchgen"
    programme.write_text(
        f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m batchgen "$@" --max-tokens 4 --jobs 1\n'
    )
    programme.chmod(0o755)
    text = EXAMPLE.read_text().replace("/opt/batchgen/.venv/bin/batchgen", str(programme))
    text = text.replace("/data/", f"{tmp_path}/").replace("--model 124M", f"--model {model}")
    variables, commands = read_crontab(text)
    for folder in ("nightly", "daily/done"):
        (tmp_path / folder).mkdir(parents=True)

    def run(when: str) -> tuple[int, str]:
        environment = {"HOME": str(tmp_path), "LOGNAME": "you", "SHELL": "/bin/sh", "PATH": "/usr/bin:/bin"} | variables
        done = subprocess.run(
            ["/bin/sh", "-c", commands[when]], env=environment, cwd=tmp_path, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout

    return run


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Everything but the logs."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".log"]
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


@pytest.mark.processes
def test_two_nights_one_of_which_fails(cron: Any, tmp_path: Path) -> None:
    nightly = tmp_path / "nightly"
    code, mail = cron("0 22 * * *")  # the prompts are not there yet
    assert code == 1
    assert "batchgen: prompts.jsonl: no such file" in mail
    assert f"batchgen: exit code 1, see {nightly}/night-" in mail
    code, mail = cron("0 12 * * *")
    assert code == 1
    assert "completions.parquet: no such file; run without --retry-failed first" in mail or "prompts.jsonl" in mail
    (nightly / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": ""}\n')
    assert cron("0 22 * * *") == (0, "")  # of the case: batchgen's own is 3
    status = json.loads((nightly / "completions.parquet.status.json").read_text())
    assert (status["state"], status["exit_code"], status["rows_done"]) == ("finished", 3, 2)
    before = files(nightly)
    assert cron("0 12 * * *") == (0, "")  # nothing has failed
    assert cron("0 22 * * *") == (0, "")  # it is complete
    assert files(nightly) == before
    (nightly / "prompts.jsonl").write_text('{"prompt": "b"}\n')
    code, mail = cron("0 22 * * *")
    assert code == 2
    assert "completions.parquet is complete: " in mail
    assert "--overwrite" in mail
    logs = sorted(path.name for path in nightly.glob("*.log"))
    assert all(re.fullmatch(r"(night|noon)-\d{4}-\d\d-\d\d\.log", name) for name in logs)


@pytest.mark.processes
def test_days_that_are_done_are_passed_over(cron: Any, tmp_path: Path) -> None:
    daily = tmp_path / "daily"
    (daily / "monday.jsonl").write_text('{"prompt": "a"}\n')
    (daily / "tuesday.jsonl").mkdir()  # which cannot be read
    code, mail = cron("30 22 * * *")
    assert "exit code 1 for" in mail
    assert "tuesday.jsonl" in mail
    before = files(daily)
    (daily / "tuesday.jsonl").rmdir()
    (daily / "tuesday.jsonl").write_text('{"prompt": "b"}\n')
    assert cron("30 22 * * *") == (0, "")
    after = files(daily)
    assert before.items() <= after.items()
    assert {"monday.parquet", "tuesday.parquet"} <= after.keys()
    old = daily / "night-2001-01-01.log"
    old.touch()
    os.utime(old, (0, 0))
    assert cron("0 6 1 * *") == (0, "")
    assert not old.exists()
    assert list(daily.glob("*.log"))
