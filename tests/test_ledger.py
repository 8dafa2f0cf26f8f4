"""ledger.py: what was finished is kept, what is damaged is made again, and one run at a time holds the output."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchgen.errors import BusyError, OutputError, UsageError
from batchgen.output.ledger import COUNTS, Ledger, is_dataset, open_ledger, parse_plan, work_directory
from batchgen.output.parts import with_receipt, write_part
from batchgen.output.schema import Columns
from batchgen.plan import Plan
from batchgen.types import OutputRow, Reason, Receipt
from tests.support.plans import plan_of

PLAN = plan_of()
AUTOMATIC = frozenset({"chunk_rows"})
SCHEMA = Columns().schema()
ROOT = Path(__file__).parents[1]


class Interrupted(Exception):
    pass


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.parquet"


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything under a folder: its files' bytes, and None for each directory."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def write_chunk(ledger: Ledger, chunk: int, reasons: tuple[Reason, ...] = ()) -> Receipt:
    """Do what a worker does: write a part in the attempt's directory; returns its receipt."""
    rows = [
        OutputRow(row, 0, None, "a", "b", 1, 1, "stop", "ok", None, None) for row in range(4 * chunk, 4 * chunk + 4)
    ]
    path = ledger.attempt / f"{chunk:08d}.parquet"
    receipt = Receipt(chunk, str(path), "", 4, 4, 4, 0, 0, 4, 4, reasons=reasons, plan=ledger.read_plan().digest)
    return receipt.finished(write_part(rows, path, with_receipt(SCHEMA, receipt)), 0.5)


def interrupted_run(out: Path, chunks: range = range(3), plan: Plan = PLAN) -> None:
    """A run that commits some chunks and stops before the merge."""
    with suppress(Interrupted), open_ledger(out) as ledger:
        ledger.adopt(plan, AUTOMATIC)
        for chunk in chunks:
            ledger.commit(write_chunk(ledger, chunk))
        raise Interrupted


def test_a_resumed_run_knows_the_reasons_of_the_parts_that_are_done(out):
    with suppress(Interrupted), open_ledger(out) as ledger:
        ledger.adopt(PLAN, AUTOMATIC)
        for chunk in (1, 0):
            reasons = (Reason(2, 4 * chunk, f"p.jsonl:{chunk}", f"n {chunk} is out of range"),)
            ledger.commit(write_chunk(ledger, chunk, reasons))
        raise Interrupted
    with suppress(Interrupted), open_ledger(out) as ledger:
        ledger.adopt(PLAN, AUTOMATIC)
        assert list(ledger.reasons.values()) == [Reason(4, 0, "p.jsonl:0", "n 0 is out of range")]
        raise Interrupted


def full(*_) -> None:
    raise OSError(28, "No space left on device")


def resumed_chunks(out: Path, plan: Plan = PLAN, *, restart: bool = False) -> list[int]:
    """The chunks that another run finds done; it stops there."""
    with suppress(Interrupted), open_ledger(out) as ledger:
        ledger.adopt(plan, AUTOMATIC, restart)
        assert all(part.exists() for part in ledger.parts())
        found = sorted(ledger.committed)
        raise Interrupted
    return found


def parts(out: Path) -> list[Path]:
    return sorted((work_directory(out) / "parts").iterdir())


# ---- the directory, during a run and after it


def test_a_finished_run_leaves_nothing_behind(out):
    with open_ledger(out) as ledger:
        ledger.adopt(PLAN, AUTOMATIC)
        ledger.commit(write_chunk(ledger, 0))
        assert work_directory(out).is_dir()
    assert os.listdir(out.parent) == []


def test_a_run_that_fails_before_its_plan_leaves_nothing_behind(out):
    with pytest.raises(Interrupted), open_ledger(out):
        raise Interrupted
    assert os.listdir(out.parent) == []


def test_a_stopped_run_keeps_its_plan_and_its_parts_alone(out):
    interrupted_run(out)
    assert sorted(os.listdir(work_directory(out))) == ["lock", "parts", "plan.json"]
    assert len(parts(out)) == 3


def test_a_commit_is_one_rename_of_what_the_worker_wrote(out, monkeypatch):
    with open_ledger(out) as ledger:
        ledger.adopt(PLAN, AUTOMATIC)
        receipt = write_chunk(ledger, 7)
        data = Path(receipt.path).read_bytes()
        renames = []
        monkeypatch.setattr(os, "replace", lambda *paths: renames.append(paths) or shutil.move(*map(str, paths)))
        assert parts(out) == []
        ledger.commit(receipt)
        assert [path.name for path in parts(out)] == [f"00000007-{receipt.sha256[:16]}.parquet"]
        assert ledger.part(7).read_bytes() == data
        assert len(renames) == 1


def test_a_commit_that_fails_leaves_no_part(out, monkeypatch):
    def run_until_the_disk_is_full() -> None:
        with open_ledger(out) as ledger:
            ledger.adopt(PLAN, AUTOMATIC)
            ledger.commit(write_chunk(ledger, 0))
            receipt = write_chunk(ledger, 1)
            monkeypatch.setattr(os, "replace", full)
            ledger.commit(receipt)

    with pytest.raises(OutputError, match="No space left on device; what is finished is kept in .*run again"):
        run_until_the_disk_is_full()
    monkeypatch.undo()
    assert resumed_chunks(out) == [0]


def test_an_error_says_that_work_is_kept_only_if_it_is(out, monkeypatch):
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutputError, match="No space left on device; run again"), open_ledger(out) as ledger:
        ledger.adopt(PLAN, AUTOMATIC)
    assert os.listdir(out.parent) == []


def test_parts_come_in_the_order_of_the_input_for_any_order_of_commits(out):
    with open_ledger(out) as ledger:
        ledger.adopt(PLAN, AUTOMATIC)
        for chunk in (2, 0, 1):
            ledger.commit(write_chunk(ledger, chunk))
        rows = [row for part in ledger.parts() for row in pq.read_table(part)["row"].to_pylist()]
    assert rows == list(range(12))


# ---- resuming


def test_a_resumed_run_finds_what_was_committed(out):
    interrupted_run(out, range(2))
    with open_ledger(out) as ledger:
        plan = ledger.adopt(replace(PLAN, chunk_rows=99), AUTOMATIC)
        assert plan.chunk_rows == 4  # what it had, not what it would be now
        assert sorted(ledger.committed) == [0, 1]
        eights = ("input_rows", "rows", "ok", "prompt_tokens", "completion_tokens")
        assert ledger.counts == {name: 8 if name in eights else 0 for name in COUNTS}


def test_the_plan_that_holds_is_the_one_on_disk(out):
    with open_ledger(out) as ledger:
        assert ledger.adopt(PLAN, AUTOMATIC) == PLAN
        assert json.loads((work_directory(out) / "plan.json").read_text()) == PLAN.to_json()
        assert ledger.read_plan() == PLAN


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"input": "abd"}, r"the input is not what it was \(SHA-256 abc then, abd now\)"),
        ({"rows": 13}, "it had rows 12, and this has rows 13"),
        ({"chunk_rows": 5}, "it had --chunk-rows 4, and this has --chunk-rows 5"),
        ({"parameters": replace(PLAN.parameters, n=2)}, "it had --n 1, and this has --n 2"),
        ({"retry": True}, "it had retry False, and this has retry True"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_different_plan_is_refused_by_the_name_of_what_differs(out, change, named):
    interrupted_run(out)
    before = tree(out.parent)
    with pytest.raises(UsageError, match=f"{named}; run it as before, or pass --restart"), open_ledger(out) as led:
        led.adopt(replace(PLAN, **change))
    assert tree(out.parent) == before


def test_a_plan_of_another_version_is_refused(out):
    interrupted_run(out)
    (work_directory(out) / "plan.json").write_text(json.dumps(PLAN.to_json() | {"of_old": 1}))
    with pytest.raises(OutputError, match="not a plan \\('of_old' is not known here\\); pass --restart to begin again"):
        resumed_chunks(out)


def test_the_unfinished_run_of_version_0_2_is_refused_by_its_version(out):
    interrupted_run(out)
    older = PLAN.to_json() | {"batchgen": "0.2.0", "blas": "openblas", "batch_invariant": True, "numpy_kernels": "exp"}
    (work_directory(out) / "plan.json").write_text(json.dumps(older))
    with pytest.raises(UsageError, match="it had batchgen '0.2.0', and this has batchgen '1.0'; run it as before, or"):
        resumed_chunks(out)


def test_an_option_that_was_automatic_may_be_given_with_the_same_value(out):
    interrupted_run(out)
    with suppress(Interrupted), open_ledger(out) as ledger:
        assert ledger.adopt(PLAN) == PLAN
        assert sorted(ledger.committed) == [0, 1, 2]
        raise Interrupted


def test_restart_discards(out):
    interrupted_run(out)
    assert resumed_chunks(out, replace(PLAN, input="new"), restart=True) == []
    assert parts(out) == []


@pytest.mark.parametrize("garbage", [b"", b"{", b"[1]", b"\xff\xfe", b"null", b"[" * 100_000], ids=repr)
def test_a_damaged_plan_is_refused_and_a_restart_replaces_it(out, garbage):
    interrupted_run(out)
    (work_directory(out) / "plan.json").write_bytes(garbage)
    with pytest.raises(OutputError, match="plan.json: not a plan.*; pass --restart to begin again"):
        resumed_chunks(out)
    assert len(parts(out)) == 3
    assert resumed_chunks(out, restart=True) == []


def test_an_interrupted_retry_is_never_resumed(out):
    interrupted_run(out, plan=replace(PLAN, retry=True))
    assert resumed_chunks(out, replace(PLAN, retry=True)) == []
    interrupted_run(out, plan=replace(PLAN, retry=True))
    assert resumed_chunks(out) == []


@pytest.mark.parametrize("data", [b"[1]", b'"a"', b"{}", b'{"parameters": 5}', b'{"rows": 1, "rows": 1}', b"[" * 10**5])
def test_what_is_wrong_with_a_stored_plan_is_a_value_error(data):
    with pytest.raises(ValueError, match="."):
        parse_plan(data)


def test_a_stored_plan_with_a_wrong_value_is_a_value_error():
    values = PLAN.to_json()
    for changes in ({"rows": "12"}, {"keep": "k"}, {"parameters": {"n": 0}}, {"parameters": {"stop": [[]]}}):
        with pytest.raises(ValueError, match="."):
            parse_plan(json.dumps(values | changes))
    assert parse_plan(json.dumps(values)) == PLAN


def test_a_dataset_is_known_by_its_success_file_and_its_plan(tmp_path):
    assert not is_dataset(tmp_path)
    for data, whole in [("", False), ("[]", False), ("{}", True), (json.dumps(PLAN.to_json()), True)]:
        (tmp_path / "_SUCCESS").write_text(data)
        assert is_dataset(tmp_path) == whole
    assert is_dataset(tmp_path, PLAN)
    assert not is_dataset(tmp_path, replace(PLAN, rows=13))


# ---- what is not trusted


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "flipped":
        path.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    elif how == "truncated":
        path.write_bytes(data[:-1])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "longer":
        path.write_bytes(data + b"\0")
    elif how == "renamed":
        path.rename(path.with_name(path.name.replace("00000001", "00000009")))
    elif how == "directory":
        path.unlink()
        path.mkdir()
    elif how == "gone":
        path.unlink()


@pytest.mark.parametrize("how", ["flipped", "truncated", "empty", "longer", "renamed", "directory", "gone"])
def test_a_damaged_part_is_made_again(out, how):
    interrupted_run(out)
    damage(parts(out)[1], how)
    assert resumed_chunks(out) == [0, 2]
    assert len(parts(out)) == 2


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.randoms(use_true_random=False))
def test_every_flipped_bit_is_found(out, rng):
    shutil.rmtree(work_directory(out), ignore_errors=True)
    interrupted_run(out, range(1))
    (part,) = parts(out)
    data = bytearray(part.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    part.write_bytes(data)
    assert resumed_chunks(out) == []


@pytest.mark.parametrize(
    "name", ["notes.txt", ".00000001.swp", "00000001.parquet", "00000001-0123456789abcdef.parquet"]
)
def test_a_foreign_file_among_the_parts_is_not_taken_for_one(out, name):
    interrupted_run(out)
    (work_directory(out) / "parts" / name).write_bytes(b"PAR1")
    assert resumed_chunks(out) == [0, 1, 2]
    assert len(parts(out)) == 3


def test_a_file_whose_name_fits_its_bytes_still_needs_a_receipt(out):
    interrupted_run(out, range(1))
    for number, data in enumerate([b"not a Parquet file", b""], 5):
        sha256 = hashlib.sha256(data).hexdigest()
        (work_directory(out) / "parts" / f"{number:08d}-{sha256[:16]}.parquet").write_bytes(data)
    bare = out.with_name("bare.parquet")
    sha256 = write_part([], bare, SCHEMA)
    bare.rename(work_directory(out) / "parts" / f"00000007-{sha256[:16]}.parquet")
    assert resumed_chunks(out) == [0]


def test_a_part_that_another_plan_made_is_made_again(out):
    """Whole, with the name of its bytes: copied from another work directory, or left by an edit of plan.json."""
    other, changed = out.with_name("other.parquet"), replace(PLAN, parameters=replace(PLAN.parameters, seed=7))
    interrupted_run(out)
    interrupted_run(other, plan=changed)
    parts(out)[0].unlink()
    shutil.copy(parts(other)[0], work_directory(out) / "parts")
    assert resumed_chunks(out) == [1, 2]
    assert resumed_chunks(other, changed) == [0, 1, 2]
    (work_directory(other) / "plan.json").write_text(json.dumps(PLAN.to_json()))
    assert resumed_chunks(other) == []


def test_what_is_not_batchgens_is_never_taken_for_a_work_directory_nor_removed(out):
    work = work_directory(out)
    (work / "labels").mkdir(parents=True)
    with pytest.raises(OutputError, match=r"labels: not batchgen's, .* move it away"):
        interrupted_run(out)
    assert tree(work) == {"labels": None}
    (work / "labels").rmdir()
    with open_ledger(out) as ledger:
        ledger.adopt(PLAN)
        (work / "notes.txt").write_text("mine")  # during the run
    assert tree(work) == {"notes.txt": b"mine"}


def test_the_attempts_of_killed_runs_are_deleted(out):
    interrupted_run(out)
    for name in ("attempt-1", "attempt-2"):
        (work_directory(out) / name).mkdir()
        (work_directory(out) / name / "00000000.parquet").write_bytes(b"half")
    assert resumed_chunks(out) == [0, 1, 2]
    assert sorted(os.listdir(work_directory(out))) == ["lock", "parts", "plan.json"]


def test_parts_without_a_plan_are_not_resumed_from(out):
    interrupted_run(out)
    (work_directory(out) / "plan.json").unlink()
    assert resumed_chunks(out) == []


def test_a_plan_whose_parts_are_gone_begins_again(out):
    interrupted_run(out)
    shutil.rmtree(work_directory(out) / "parts")
    assert resumed_chunks(out) == []


# ---- one at a time


def test_a_second_holder_is_refused_and_changes_nothing(out):
    with open_ledger(out) as ledger:
        ledger.adopt(PLAN, AUTOMATIC)
        ledger.commit(write_chunk(ledger, 0))
        before = tree(out.parent)
        with pytest.raises(BusyError, match="another run holds it; nothing was touched") as caught, open_ledger(out):
            raise AssertionError("two hold it")
        assert caught.value.exit_code == 75
        assert tree(out.parent) == before


def test_the_lock_is_free_after_a_run_that_failed(out):
    interrupted_run(out)
    assert resumed_chunks(out) == [0, 1, 2]


def test_a_file_in_the_place_of_the_work_directory_is_named(out):
    work_directory(out).write_text("mine")
    with pytest.raises(OutputError, match="out.parquet.batchgen/lock: Not a directory"), open_ledger(out):
        raise AssertionError("held")
    assert work_directory(out).read_text() == "mine"


def in_processes(script: str, *arguments: object) -> str:
    """Run a script that forks, in a process without threads; stands in for many runs at once."""
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True).stdout


FORKING = """
import os, sys
from pathlib import Path
from batchgen.errors import BusyError
from batchgen.output.ledger import open_ledger
from tests.support.plans import plan_of

out, n = Path(sys.argv[1]), int(sys.argv[2])
go, closed = os.pipe()

def child():
    os.close(closed)
    os.read(go, 1)  # until the parent lets all of them start
    return work()

def fork_all():
    pids = []
    for _ in range(n):
        pid = os.fork()
        if not pid:
            os._exit(child())
        pids.append(pid)
    os.close(closed)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
"""


def test_exactly_one_of_twenty_runs_at_once_gets_the_lock(tmp_path):
    script = f"""{FORKING}
done, last = os.pipe()

def work():
    os.close(last)
    try:
        with open_ledger(out) as ledger:
            ledger.adopt(plan_of())
            os.read(done, 1)  # hold it until the others have been refused
            return 0
    except BusyError as error:
        return error.exit_code

pids = []
for _ in range(n):
    pid = os.fork()
    if not pid:
        os._exit(child())
    pids.append(pid)
os.close(closed)
codes = [os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(n - 1)]
os.close(last)
print(codes, os.waitstatus_to_exitcode(os.wait()[1]))
"""
    assert in_processes(script, tmp_path / "out.parquet", 20) == f"{[75] * 19} 0\n"
    assert os.listdir(tmp_path) == []


def test_the_directory_may_come_and_go_under_many_runs(tmp_path):
    script = f"""{FORKING}
def work():
    turns = 0
    while turns < 10:
        try:
            with open_ledger(out) as ledger:
                ledger.adopt(plan_of())
                mine = os.open(out, os.O_CREAT | os.O_EXCL)  # FileExistsError: two at once
                (ledger.parts_directory / "x").touch()
                (ledger.attempt / "y").touch()
                os.close(mine)
                out.unlink()
                turns += 1
        except BusyError:
            pass
    return 0

print(fork_all())
"""
    assert in_processes(script, tmp_path / "out.parquet", 6) == f"{[0] * 6}\n"
    assert os.listdir(tmp_path) == []


def test_an_output_may_have_any_name(tmp_path):
    for name in ["a b.parquet", "-o.parquet", "ü\n.parquet", os.fsdecode(b"\xff.parquet")]:
        interrupted_run(tmp_path / name, range(1))
        assert resumed_chunks(tmp_path / name) == [0]
