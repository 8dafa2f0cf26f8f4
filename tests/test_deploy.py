"""deploy/: its command lines are valid, and its files handle every exit code as docs/deploy.md and docs/cron.md say."""

import configparser
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import typer
import yaml

from batchgen.errors import BatchgenError, BusyError, StoppedError, UsageError
from batchgen.jobs.cli import app
from batchgen.options import SLURM_ARRAY
from tests.support.command import batchgen, restored
from tests.support.models import write_byte_model

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
INSTALLED = "/opt/batchgen/.venv/bin/batchgen"
STOPPED, USAGE, SOME_REJECTED = StoppedError.exit_code, UsageError.exit_code, 3
SUCCESSES = {0, SOME_REJECTED, STOPPED}  # of a night
CODES = [0, 1, 2, 3, 4, 75, 130, 137, 143]
COMMAND = re.compile(r'(?:\$BATCHGEN|[ /]batchgen|\$batchgen") ((?:generate|merge|verify|plan|card|peek) [^>&;\n]*)')
TASK = {  # SLURM_JOB_ID may be that of the whole array
    "SLURM_ARRAY_JOB_ID": "71",
    "SLURM_ARRAY_TASK_ID": "3",
    "SLURM_ARRAY_TASK_COUNT": "8",
    "SLURM_ARRAY_TASK_MIN": "1",
    "SLURM_ARRAY_TASK_MAX": "8",
}
QUEUED = "requeue 71_3\n"
VARIABLES = TASK | {"SLURM_CPUS_PER_TASK": "1", "SHARDS": "8", "shard": "3", "day": "monday.jsonl"}


def command_lines() -> list[Any]:
    """Each command of batchgen in deploy/, those in comments too, with the variables as its file writes them."""
    found = []
    for path in sorted(DEPLOY.iterdir()):
        text = path.read_text().replace("\\\n", " ")
        text = text.replace("\\%", "%").replace("%I", "3/8").replace("%i", "3-8")  # of cron, of systemd
        found += [pytest.param(command, id=f"{path.name}-{at}") for at, command in enumerate(COMMAND.findall(text))]
    return found


def unit(name: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(DEPLOY / name)
    return parser


def manifest(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text())


def container(name: str) -> Any:
    (only,) = manifest(name)["spec"]["template"]["spec"]["containers"]
    return only


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


# ---- the command lines


@pytest.mark.parametrize("line", command_lines())
def test_every_command_line_is_valid(line: str, tmp_path: Path) -> None:
    """As a shell reads it: by the parser of the command; and `plan` takes every option of generate, and checks them."""
    for folder in ("shards", "done"):
        (tmp_path / folder).mkdir()
    (tmp_path / "shards" / "1-8.parquet").touch()
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Once"}\n' * 8)
    (tmp_path / "monday.jsonl").write_text('{"prompt": "Once"}\n')
    environment = os.environ | VARIABLES
    shell = ["bash", "-c", f"printf '%s\\0' {line}"]
    done = subprocess.run(shell, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    name, *words = done.stdout.split("\0")[:-1]
    group: Any = typer.main.get_command(app)
    with restored():  # --log-json changes the handlers of this process
        group.commands[name].make_context(name, list(words))
    if name == "generate" and "--retry-failed" not in words:  # which needs a finished output; test_cron.py runs it
        words = ["tales" if before == "--model" else word for before, word in zip(["", *words], words, strict=False)]
        planned = batchgen("plan", *words, "--no-time", folder=tmp_path, environment=environment, together=True)
        assert planned.returncode == 0, planned.stdout.decode()


def test_every_file_but_the_timer_has_a_command_line() -> None:
    without = {path.name for path in DEPLOY.iterdir() if not COMMAND.search(path.read_text())}
    assert without == {"batchgen.timer"}


def test_every_exit_code_that_the_files_name_is_one_of_the_library() -> None:
    codes = {error.exit_code for error in (BatchgenError, *BatchgenError.__subclasses__())}
    assert codes | {0, 3, 4} == {0, 1, 2, 3, 4, 75}
    assert BusyError.exit_code == STOPPED


# ---- cron


def cron_commands() -> list[str]:
    lines = (DEPLOY / "crontab.example").read_text().splitlines()
    commands = [match[1] for line in lines if (match := re.fullmatch(r"(?:[\d*]+ +){5}(.+)", line))]
    return [command.replace("\\%", "%") for command in commands if "$BATCHGEN" in command]  # as cron runs them


def test_there_is_a_nightly_run_one_for_failed_rows_and_one_for_a_file_each_day() -> None:
    assert len(cron_commands()) == 3


@pytest.mark.parametrize("code", CODES)
def test_cron_mails_exactly_the_exit_codes_of_failed_runs(tmp_path: Path, code: int) -> None:
    stub = script(tmp_path / "batchgen", f"exit {code}")
    command = cron_commands()[0].replace("/data/nightly", shlex.quote(str(tmp_path)))
    done = subprocess.run(["/bin/sh", "-c", command], env={"BATCHGEN": str(stub)}, capture_output=True, text=True)
    assert (done.stdout != "") == (code not in SUCCESSES)
    assert done.stderr == ""
    assert done.returncode == (0 if code in SUCCESSES else code)


# ---- systemd


def test_systemd_counts_rejected_rows_and_the_time_limit_as_success() -> None:
    codes = unit("batchgen.service")["Service"]["SuccessExitStatus"].split()
    assert {int(code) for code in codes} | {0} == SUCCESSES


def test_the_timer_starts_the_service() -> None:
    assert unit("batchgen.timer")["Timer"]["OnCalendar"]
    assert (DEPLOY / "batchgen.timer").stem == (DEPLOY / "batchgen.service").stem


def test_a_shard_of_systemd_starts_again_when_the_same_command_would_do_something_else() -> None:
    service = unit("batchgen-shard@.service")["Service"]
    assert int(service["RestartForceExitStatus"]) == STOPPED
    assert int(service["SuccessExitStatus"]) == SOME_REJECTED
    assert service["Restart"] == "on-abnormal"  # after signals, not after other exit codes


@pytest.mark.parametrize("name", ["batchgen.service", "batchgen-shard@.service"])
def test_units_run_as_a_user_who_is_not_root_and_stop_the_run_itself_first(name: str) -> None:
    service = unit(name)["Service"]
    assert service["User"] not in ("", "root")
    assert (service["KillSignal"], service["KillMode"]) == ("SIGTERM", "mixed")
    assert service["ExecStart"].startswith(f"{INSTALLED} generate ")


# ---- Slurm


@pytest.fixture
def slurm(tmp_path: Path) -> Any:
    """Runs a script as a task of an array, with a stub of batchgen; returns its exit code and its calls of Slurm."""
    bin = tmp_path / "bin"
    bin.mkdir()
    script(bin / "scontrol", f'echo "$@" >> {tmp_path}/calls')
    script(bin / "squeue", "date --date '1 hour' +%Y-%m-%dT%H:%M:%S")
    base = {"PATH": f"{bin}:/usr/bin:/bin", "HOME": str(tmp_path), "BATCHGEN": str(bin / "batchgen")} | VARIABLES

    def start(name: str, changes: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        environment = base | dict(changes or {})
        return subprocess.Popen(
            ["bash", DEPLOY / name], cwd=tmp_path, env=environment, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(name: str, changes: Mapping[str, str] | None = None) -> tuple[int, str, str]:
        process = start(name, changes)
        printed = process.communicate(timeout=300)[0]
        calls = tmp_path / "calls"
        return process.returncode, calls.read_text() if calls.exists() else "", printed

    run.start, run.bin = start, bin  # type: ignore[attr-defined]
    return run


@pytest.mark.parametrize("code", CODES)
def test_a_task_of_slurm_is_queued_again_only_if_it_was_stopped_in_time(slurm: Any, code: int) -> None:
    script(slurm.bin / "batchgen", f"exit {code}")
    ended, calls, _ = slurm("slurm-array.sh")
    assert ended == (0 if code == SOME_REJECTED else code)
    assert calls == (QUEUED if code == STOPPED else "")


def test_a_task_of_slurm_that_gets_nowhere_is_not_queued_for_ever(slurm: Any) -> None:
    script(slurm.bin / "batchgen", f"exit {STOPPED}")
    ended, calls, printed = slurm("slurm-array.sh", {"SLURM_RESTART_COUNT": "100"})
    assert (ended, calls) == (STOPPED, "")
    assert "submit it again to resume" in printed


@pytest.mark.parametrize("given", [None, "1700000000"])
def test_the_end_of_the_allocation_is_known_with_any_version_of_slurm(slurm: Any, tmp_path: Path, given: str) -> None:
    script(slurm.bin / "batchgen", f'echo "$SLURM_JOB_END_TIME" > {tmp_path}/end')
    now = int(time.time())
    assert slurm("slurm-array.sh", {"SLURM_JOB_END_TIME": given} if given else {})[0] == 0
    end = int((tmp_path / "end").read_text())
    assert end == int(given) if given else now + 3599 <= end <= now + 3900


@pytest.mark.processes
@pytest.mark.parametrize(("number", "queued"), [(signal.SIGUSR1, QUEUED), (signal.SIGTERM, "")])
def test_slurms_last_signal_stops_the_run_and_queues_the_task(
    slurm: Any, tmp_path: Path, number: signal.Signals, queued: str
) -> None:
    """But not SIGTERM, which Slurm sends to all processes of a cancelled task."""
    script(slurm.bin / "batchgen", f"trap 'touch {tmp_path}/over; exit 143' TERM; echo on; while :; do sleep 0.1; done")
    process = slurm.start("slurm-array.sh")
    assert process.stdout.readline() == "on\n"
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(number)
    if not queued:  # to all processes
        for child in children:
            os.kill(int(child), number)
    process.communicate(timeout=60)
    calls = tmp_path / "calls"
    assert (calls.read_text() if calls.exists() else "") == queued
    assert process.returncode == (STOPPED if queued else -signal.SIGTERM)
    assert (tmp_path / "over").exists() or not queued


@pytest.mark.processes
def test_the_tasks_of_slurm_and_their_merge_are_one_run(slurm: Any, tmp_path: Path) -> None:
    model = write_byte_model(tmp_path / "models" / "124M").parent
    run = f"PYTHONPATH={ROOT} BATCHGEN_MODELS={model} exec {sys.executable} -m batchgen"
    script(slurm.bin / "batchgen", f'case $1 in generate) {run} "$@" --max-tokens 4;; *) {run} "$@";; esac')
    rows = [f'{{"prompt": "{"ab" * (at % 5)}"}}' for at in range(8)]  # two of them are empty
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    for task in ("2", "1"):
        changes = {"SLURM_ARRAY_TASK_ID": task, "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MAX": "2"}
        code, calls, printed = slurm("slurm-array.sh", changes)
        assert (code, calls) == (0, ""), printed
    code, _, printed = slurm("slurm-merge.sh")
    assert code == 0, printed
    options = ("--max-tokens", "4", "--model", model / "124M", "--jobs", "1")
    assert batchgen("generate", "prompts.jsonl", "-o", "one.parquet", *options, folder=tmp_path).returncode == 3
    assert pq.read_table(tmp_path / "completions.parquet").equals(pq.read_table(tmp_path / "one.parquet"))


def test_the_array_counts_from_one_without_gaps() -> None:
    """So that the task's number is the shard's, in the name of its output too."""
    text = (DEPLOY / "slurm-array.sh").read_text()
    assert re.search(r"^#SBATCH --array=1-\d+ ", text, re.MULTILINE)
    assert {name for name in SLURM_ARRAY if name in text} == {"SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"}


# ---- Kubernetes


def rules() -> dict[str, set[int]]:
    """By action of the Job's pod failure policy, its exit codes."""
    found: dict[str, set[int]] = {}
    for rule in manifest("kubernetes-job.yaml")["spec"]["podFailurePolicy"]["rules"]:
        found.setdefault(rule["action"], set()).update(rule.get("onExitCodes", {}).get("values", []))
    return found


def test_kubernetes_tries_again_what_was_stopped_and_not_what_is_wrong() -> None:
    assert rules() == {"Ignore": {STOPPED}, "FailJob": {USAGE}, "FailIndex": {4}}
    (rule,) = manifest("kubernetes-merge.yaml")["spec"]["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [BatchgenError.exit_code, USAGE]


def test_kubernetes_does_every_shard() -> None:
    spec = manifest("kubernetes-job.yaml")["spec"]
    environment = {one["name"]: one["value"] for one in container("kubernetes-job.yaml")["env"]}
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == int(environment["SHARDS"]) >= spec["parallelism"]


@pytest.mark.parametrize("name", ["kubernetes-job.yaml", "kubernetes-merge.yaml"])
def test_pods_have_no_rights_that_they_do_not_need(name: str) -> None:
    pod, one = manifest(name)["spec"]["template"]["spec"], container(name)
    user = re.search(r"^USER (\d+)$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    assert user
    assert pod["securityContext"]["runAsUser"] == int(user[1]) > 0
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["restartPolicy"] == "Never"  # a pod failure policy needs it
    assert one["securityContext"]["readOnlyRootFilesystem"] is True
    assert one["securityContext"]["allowPrivilegeEscalation"] is False
    assert {mount["name"] for mount in one["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert one["image"] == container("kubernetes-job.yaml")["image"]


@pytest.mark.parametrize("name", ["kubernetes-job.yaml", "kubernetes-merge.yaml"])
@pytest.mark.parametrize("code", CODES)
def test_a_pod_ends_as_the_run_but_rejected_rows_are_no_failure(tmp_path: Path, name: str, code: int) -> None:
    script(tmp_path / "batchgen", f'echo "$@"; exit {code}')
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "JOB_COMPLETION_INDEX": "2", "SHARDS": "8"}
    one = container(name)
    command = [*one["command"], *one["args"]]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == (0 if code == SOME_REJECTED else code)
    assert done.stderr == ""
    assert name != "kubernetes-job.yaml" or "-o shards/3-8.parquet --shard 3/8 " in done.stdout


@pytest.mark.processes
def test_a_pod_that_is_to_end_stops_the_run(tmp_path: Path) -> None:
    stub = f"trap 'touch {tmp_path}/over; exit 143' TERM; echo on; while :; do sleep 0.1; done"
    script(tmp_path / "batchgen", stub)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "JOB_COMPLETION_INDEX": "2", "SHARDS": "8"}
    one = container("kubernetes-job.yaml")
    command = [*one["command"], *one["args"]]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "on\n"
        process.terminate()
        assert process.wait(60) == 143
    assert (tmp_path / "over").exists()


# ---- Docker


def instructions() -> list[tuple[str, str]]:
    text = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.split(" ", 1) for line in text.splitlines() if line and not line.startswith("#")]
    return [(name, rest) for name, rest in lines]


def test_the_image_copies_what_exists_and_what_is_not_ignored() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignored[1] == "*"
    allowed = [line[1:] for line in ignored if line.startswith("!")]
    copied = [rest.split()[:-1] for name, rest in instructions() if name == "COPY" and "--from" not in rest]
    sources = [source for line in copied for source in line]
    assert sorted(sources) == sorted(allowed)
    assert all((ROOT / source).exists() for source in sources)


def test_the_image_installs_the_locked_packages_but_tensorflow() -> None:
    """Its filter of the lock is run here: it removes whole packages, with their hashes, and no other that is needed."""
    (command,) = (rest for name, rest in instructions() if name == "RUN" and "sed" in rest)
    filter, _, install = command.partition(" && ")
    assert "--require-hashes" in install
    done = subprocess.run(["sh", "-c", filter.partition(">")[0]], cwd=ROOT, capture_output=True, text=True, check=True)
    lock = (ROOT / "requirements" / "run.txt").read_text()
    package = re.compile(r"^([a-z0-9-]+)==.*\n(?: +--hash=.*\n)+", re.MULTILINE)
    before, after = ({one[1]: one[0] for one in package.finditer(text)} for text in (lock, done.stdout))
    assert package.sub("", done.stdout) == package.sub("", lock)
    assert after.items() <= before.items()
    assert "tensorflow-cpu" in before.keys() - after.keys()
    needed = {"joblib", "numba", "numpy", "pyarrow", "regex", "requests", "rich", "safetensors", "typer", "urllib3"}
    assert needed | {"hatchling", "matplotlib"} <= after.keys()


def test_the_image_is_small_and_runs_as_a_user_who_is_not_root() -> None:
    stages = [rest for name, rest in instructions() if name == "FROM"]
    assert all(stage.split()[0].endswith("-slim") for stage in stages)
    assert ("ENTRYPOINT", '["batchgen"]') in instructions()
    users = [rest for name, rest in instructions() if name == "USER"]
    assert [int(user) > 0 for user in users] == [True]
