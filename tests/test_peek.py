"""peek.py, committed.py: at every moment it shows rows of the finished output, each once, and touches nothing."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchgen.errors import BusyError, InputError, StoppedError
from batchgen.files import JsonObject as Row
from batchgen.job import Job
from batchgen.output.file import FileOutput, write_json_lines, write_parquet
from batchgen.output.ledger import Ledger, open_ledger, work_directory
from batchgen.output.parts import with_receipt, write_part
from batchgen.output.schema import Columns
from batchgen.progress import status_path
from batchgen.review import committed as committed_module
from batchgen.review import peek as looking
from batchgen.review.committed import Target
from batchgen.review.peek import Peek
from batchgen.run import run_job
from batchgen.types import OutputRow, Receipt, SamplingParams
from tests.support.command import batchgen
from tests.support.jobs import change, make_job
from tests.support.models import write_byte_model
from tests.support.plans import plan_of

ROOT = Path(__file__).parents[1]
CHUNKS, WINDOW, ROWS = 6, 3, 4  # three chunks share a window, whose rows are dealt to them in turn
PLAN = plan_of(rows=CHUNKS * ROWS, chunk_rows=ROWS, parameters=SamplingParams(n=2, max_tokens=5))
NASTY = "\x1b[31mred\x9b2J\u202e[bold]x[/bold]\n\ttwo"


class Interrupted(Exception):
    pass


def rows_of(chunk: int, window: int = WINDOW) -> list[OutputRow]:
    first = chunk // window * window * ROWS + chunk % window
    numbers = [first + window * at for at in range(ROWS)]
    made = [OutputRow(n, s, f"i{n}", "p", NASTY, 1, 1, "stop", "ok", None, None) for n in numbers for s in range(2)]
    made[:2] = [replace(made[0], status="rejected", error="too long", completion=None), *made[1:2]]
    return made


def commit(ledger: Ledger, chunk: int, window: int = WINDOW) -> None:
    path = ledger.attempt / f"{chunk:08d}.parquet"
    receipt = Receipt(chunk, str(path), "", ROWS, 2 * ROWS, 2 * ROWS - 1, 1, 0, 8, 8, plan=PLAN.digest)
    schema = with_receipt(Columns().schema(), receipt)
    ledger.commit(receipt.finished(write_part(rows_of(chunk, window), path, schema), 0.5))


def interrupted_run(out: Path, chunks: Any = range(CHUNKS)) -> None:
    with suppress(Interrupted), open_ledger(out) as ledger:
        ledger.adopt(PLAN)
        for chunk in chunks:
            commit(ledger, chunk)
        raise Interrupted


def tree(folder: Path) -> dict[str, Any]:
    """What a look must not change: names, times and bytes."""
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in folder.rglob("*")
    }


def look(out: Path | str, *columns: str) -> Peek:
    return Peek(Target.of(str(out)), columns)


def keys(rows: list[Row]) -> list[tuple[int, int]]:
    return [(row["row"], row["sample"]) for row in rows]


def committed(peek: Peek) -> list[Row]:
    return [row for rows in peek.committed() for row in rows]


def parts(out: Path) -> list[Path]:
    return sorted((work_directory(out) / "parts").iterdir())


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "o.parquet"


# ---- committed parts


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chunks=st.permutations(range(CHUNKS)).flatmap(lambda order: st.integers(0, CHUNKS).map(lambda n: order[:n])))
def test_the_rows_of_any_committed_parts_are_shown_in_order_and_nothing_is_touched(tmp_path_factory, chunks):
    out = tmp_path_factory.mktemp("peek") / "o.parquet"
    interrupted_run(out, chunks)
    before = tree(out.parent)
    rows = committed(look(out))
    assert keys(rows) == sorted((row.row, row.sample) for chunk in chunks for row in rows_of(chunk))
    assert tree(out.parent) == before
    newest = look(out).newest(5)
    assert all(row in rows for row in newest)
    assert len(newest) == min(5, len(rows))
    assert keys(newest) == sorted(keys(newest))


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chunks=st.sets(st.integers(0, CHUNKS - 1)))
def test_every_row_is_found_by_its_number_and_no_other(tmp_path_factory, chunks):
    """Also if only the parts of a window, which may lack some, are looked into."""
    out = tmp_path_factory.mktemp("peek") / "o.parquet"
    interrupted_run(out, chunks)
    there = {(row.row, row.sample) for chunk in chunks for row in rows_of(chunk)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(committed_module, "TOGETHER", WINDOW)
        for number in range(CHUNKS * ROWS + 1):
            assert keys(look(out).find_row(number)) == sorted(key for key in there if key[0] == number)


def test_a_damaged_part_is_named_and_the_others_are_shown(out):
    interrupted_run(out)
    damaged = parts(out)[1]
    damaged.write_bytes(damaged.read_bytes()[:-9])
    rest = sorted((row.row, row.sample) for chunk in range(CHUNKS) if chunk != 1 for row in rows_of(chunk))
    peek = look(out)
    assert keys(committed(peek)) == rest
    assert [str(damaged) in text for text in peek.damaged] == [True]
    done = batchgen("peek", out)
    assert done.returncode == 1
    assert len(done.stdout.splitlines()) == len(rest)
    assert done.stderr.decode() == (
        f"batchgen: {damaged}: the part is damaged: it is not what was committed; the same command makes it again\n"
    )


def test_a_part_of_another_plan_is_not_shown(out, tmp_path):
    interrupted_run(out)
    plan = work_directory(out) / "plan.json"
    plan.write_text(json.dumps(replace(PLAN, rows=99).to_json()))
    peek = look(out)
    assert committed(peek) == []
    assert len(peek.damaged) == CHUNKS


def test_no_rejects_leaves_them_out_here_too(out):
    interrupted_run(out)
    (work_directory(out) / "plan.json").unlink()
    plan = replace(PLAN, rejects=False)
    for path in parts(out):
        path.unlink()
    with suppress(Interrupted), open_ledger(out) as ledger:
        ledger.adopt(plan)
        path = ledger.attempt / "part"
        receipt = Receipt(0, str(path), "", ROWS, 8, 7, 1, 0, 8, 8, plan=plan.digest)
        ledger.commit(receipt.finished(write_part(rows_of(0), path, with_receipt(Columns().schema(), receipt)), 0.5))
        raise Interrupted
    assert [row["status"] for row in committed(look(out))] == ["ok"] * 7


# ---- beside a run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peek")
    lines = [json.dumps({"prompt": f"p{n}" * (n % 3 + 1), "id": n}) for n in range(23)] + ["no JSON"]
    (folder / "p.jsonl").write_text("\n".join(lines))
    write_byte_model(folder / "bytes")
    return folder


@pytest.fixture
def job(folder: Path, tmp_path: Path) -> Job:
    params = SamplingParams(max_tokens=5, temperature=0.8, n=2)
    return make_job(folder / "p.jsonl", tmp_path / "o.parquet", str(folder / "bytes"), params, jobs=1, chunk_rows=4)


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """The rows as a .jsonl output has them."""
    out = tmp_path_factory.mktemp("finished") / "o.jsonl"
    params = SamplingParams(max_tokens=5, temperature=0.8, n=2)
    run_job(make_job(folder / "p.jsonl", out, str(folder / "bytes"), params, jobs=1, chunk_rows=4))
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.parametrize("name", ["o.parquet", "o.jsonl", "o"])
def test_at_every_commit_and_while_the_run_publishes_the_rows_are_those_of_the_output(
    job, finished, tmp_path, monkeypatch, name
):
    out, seen = tmp_path / name, []
    commit, close = Ledger.commit, Ledger.close
    readers: list[tuple[list[Row], Iterator[list[Row]]]] = []

    def look_here(ledger: Ledger) -> None:
        before = tree(ledger.parts_directory)
        rows = committed(look(out))
        assert rows == [row for row in finished if row in rows]
        assert tree(ledger.parts_directory) == before
        seen.append(len(rows))
        begun = look(out).committed()  # it goes on when the run has published
        readers.append((list(next(begun, [])), begun))

    def commit_and_look(ledger: Ledger, receipt: Receipt) -> None:
        commit(ledger, receipt)
        look_here(ledger)

    def close_and_look(ledger: Ledger, **options: bool) -> None:
        assert committed(look(out)) == finished
        close(ledger, **options)
        assert committed(look(out)) == finished

    monkeypatch.setattr(Ledger, "commit", commit_and_look)
    monkeypatch.setattr(Ledger, "close", close_and_look)
    run_job(change(job, out=out, dataset=name == "o"))
    assert seen == sorted(seen)
    assert seen[-1] == len(finished)
    lengths = []
    for begun, rest in readers:
        rows = begun + [row for more in rest for row in more]
        assert rows == [row for row in finished if row in rows]
        lengths.append(len(rows))
    assert lengths[0] < lengths[-1] == len(finished)


@pytest.mark.parametrize("name", ["o.parquet", "o.jsonl", "o"])
def test_follow_shows_every_row_once_to_the_end(job, finished, tmp_path, monkeypatch, name):
    out, shown, commit = tmp_path / name, [], Ledger.commit
    monkeypatch.setattr(looking, "POLL_SECONDS", 0)
    following = look(out).follow()
    assert next(following) == []  # nothing is there yet

    def commit_and_follow(ledger: Ledger, receipt: Receipt) -> None:
        commit(ledger, receipt)
        while rows := next(following):
            shown.extend(rows)

    monkeypatch.setattr(Ledger, "commit", commit_and_follow)
    run_job(change(job, out=out, dataset=name == "o"))
    before = len(shown)
    shown += [row for rows in following for row in rows]
    assert before == len(shown) == len(finished)
    assert sorted(shown, key=lambda row: (row["row"], row["sample"])) == finished
    assert [row for rows in look(out).follow() for row in rows] == finished


@pytest.mark.parametrize("name", ["o.parquet", "o.jsonl", "o"])
@pytest.mark.parametrize("read", [Peek.committed, Peek.follow])
def test_a_look_that_has_begun_goes_on_in_the_published_output(tmp_path, name, read):
    out, window = tmp_path / name, 1 if name == "o" else WINDOW
    with open_ledger(out) as ledger:
        plan = ledger.adopt(PLAN)
        for chunk in range(CHUNKS):
            commit(ledger, chunk, window)
        peek = look(out)
        begun = read(peek)
        shown = next(begun)
        schema = Columns().schema()
        if name == "o":
            ledger.publish_dataset(plan, CHUNKS * ROWS * 2)
        else:
            write = write_json_lines if name == "o.jsonl" else write_parquet
            FileOutput(out, None, write).publish(ledger, plan, schema, CHUNKS * ROWS * 2)
    assert not work_directory(out).exists()
    shown = shown + [row for rows in begun for row in rows]
    assert len(shown) == len(committed(look(out))) == CHUNKS * ROWS * 2
    assert sorted(shown, key=lambda row: (row["row"], row["sample"])) == committed(look(out))
    assert not peek.damaged


def test_follow_says_that_a_run_was_stopped_and_how_to_resume(out, monkeypatch):
    monkeypatch.setattr(looking, "GRACE_SECONDS", 0)
    interrupted_run(out, [0, 1])
    shown = []
    with pytest.raises(StoppedError, match="the run was stopped; .* run the same command again to resume"):
        shown.extend(row for rows in look(out).follow() for row in rows)
    assert len(shown) == 4 * ROWS
    assert batchgen("peek", out, "--follow").returncode == 75


def test_another_run_in_its_place_is_not_mixed_with_it(out):
    interrupted_run(out)
    reading = look(out)
    begun = reading.committed()
    next(begun)
    for path in parts(out):
        path.unlink()
    (work_directory(out) / "plan.json").write_text(json.dumps(replace(PLAN, rows=99).to_json()))
    with pytest.raises(BusyError, match="another run"):
        list(begun)


# ---- the state


@pytest.mark.parametrize(
    ("state", "age", "phase"),
    [
        ("running", 0, "running"),
        ("running", 99, "killed"),
        ("finished", 99, "killed"),  # a run that replaces it, or it was killed at its end
        ("stopped", 99, "stopped"),
        ("failed", 99, "failed"),
    ],
)
def test_the_state_is_that_of_the_status_file_unless_it_is_stale(out, state, age, phase):
    interrupted_run(out, [0])
    updated = (datetime.now(UTC) - timedelta(seconds=age)).isoformat(timespec="seconds")
    status = {"state": state, "updated": updated, "ok": 3, "error": "why"}
    status_path(out).write_text(json.dumps(status))
    found = look(out).state()
    assert found.phase == phase
    assert found.statuses["ok"] == 3
    line = batchgen("peek", out, "--table").stdout.decode().splitlines()[0]
    assert line.startswith(f"{out}: {phase}")
    assert ("run the same command again to resume" in line) == (phase != "running")


def test_without_a_status_file_it_is_not_known_whether_a_run_works(out):
    interrupted_run(out, [0])
    assert look(out).state().phase == "stopped"
    (work_directory(out) / "attempt-1").mkdir()
    assert look(out).state().phase == "unknown"


@pytest.mark.parametrize("state", ["running", "stopped", "failed"])
def test_a_run_that_holds_the_output_is_none_that_is_over_whatever_its_old_status_says(out, state):
    interrupted_run(out, [0])
    old = {"state": state, "updated": "2026-01-01T00:00:00+00:00"}
    status_path(out).write_text(json.dumps(old))
    assert look(out).state().phase in ("killed", state)
    with suppress(Interrupted), open_ledger(out) as ledger:
        ledger.adopt(PLAN)
        assert look(out).state().phase == ("running" if state == "running" else "beginning")
        status_path(out).unlink()
        assert look(out).state().phase == "running"
        raise Interrupted


def test_a_run_that_begins_is_no_error(out):
    work_directory(out).mkdir()
    (work_directory(out) / "lock").touch()
    done = batchgen("peek", out, "--table")
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"a run begins" in done.stdout


# ---- the command


def test_the_lines_are_those_of_the_jsonl_output(job, tmp_path):
    for name in ("o.parquet", "o.jsonl"):
        run_job(change(job, out=tmp_path / name))
    expected = (tmp_path / "o.jsonl").read_bytes()
    for name in ("o.parquet", "o.jsonl"):
        assert batchgen("peek", tmp_path / name).stdout == expected
        last = batchgen("peek", tmp_path / name, "--rows", 3).stdout
        assert last.splitlines() == expected.splitlines()[-3:]
    picked = batchgen("peek", tmp_path / "o.jsonl", "--columns", "status,row", "--row", 23).stdout
    assert picked == b'{"status": "rejected", "row": 23}\n'


def test_a_table_has_the_columns_that_were_asked_for_and_no_others(out):
    interrupted_run(out, [0])
    table = batchgen("peek", out, "--table", "--columns", "error,sample").stdout.decode().splitlines()
    assert table[2].split() == ["error", "sample"]


@pytest.mark.parametrize("dropping", [None, "prompt", "completion", "both"])
def test_a_table_says_that_duplicates_of_completions_are_found_at_the_end(out, dropping):
    with suppress(Interrupted), open_ledger(out) as ledger:
        ledger.adopt(replace(PLAN, drop_duplicates=dropping))
        raise Interrupted
    notes = b"note: duplicates" in batchgen("peek", out, "--table").stdout
    assert notes == (dropping in ("completion", "both"))


def test_no_text_of_a_row_reaches_a_terminal_raw(out):
    interrupted_run(out)
    for options in (["--table"], ["--table", "--row", "0"], ["--table", "--columns", "completion"]):
        text = batchgen("peek", out, *options).stdout.decode()
        assert not {"\x1b", "\x9b", "\u202e"} & {*text}
        assert "[bold]x" in text


def test_on_a_terminal_json_has_its_control_characters_escaped(out, tmp_path):
    import pty

    interrupted_run(out, [0])
    ours, theirs = pty.openpty()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "batchgen", "peek", str(out), "--json", "--rows", "1"]
    process = subprocess.Popen(command, env=environment, stdout=theirs)
    os.close(theirs)
    data = b""
    with suppress(OSError):
        while more := os.read(ours, 4096):
            data += more
    os.close(ours)
    assert process.wait() == 0
    assert "\u202e" not in data.decode()
    assert json.loads(data)["completion"] == NASTY


def test_a_reader_that_goes_away_ends_it_well(out):
    interrupted_run(out)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = f"{sys.executable} -m batchgen peek {out} | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads(done.stdout)["row"] == 0


def test_what_is_no_output_is_refused_in_words(tmp_path, out):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "folder").mkdir()
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    interrupted_run(out, [0])
    for name, options, code, words in [
        ("none.parquet", [], 1, "no such output, and no work of an unfinished run beside it"),
        ("p.jsonl", [], 1, "p.jsonl.plan.json, which would say how it was made, is not beside it"),
        ("folder", [], 1, "not a complete dataset"),
        ("x.parquet", [], 1, "not a Parquet file"),
        ("o.parquet", ["--columns", "nope"], 1, "no column 'nope' is in the output; it has row, sample, id"),
        ("o.parquet", ["--row", "23"], 2, "row 23: this row is not committed yet; "),
        ("o.parquet", ["--row", "24"], 2, "row 24: the output has no such row; "),
        ("o.parquet", ["--follow", "--rows", "1"], 2, "leave out --rows and --row"),
    ]:
        done = batchgen("peek", name, *options, folder=tmp_path)
        assert (done.returncode, done.stdout) == (code, b""), name
        assert words in done.stderr.decode()
        assert len(done.stderr.splitlines()) == 1


def test_a_plan_of_another_version_is_named(out):
    interrupted_run(out, [0])
    (work_directory(out) / "plan.json").write_text('{"batchgen": "9.0", "new": 1}')
    with pytest.raises(InputError, match="batchgen 9.0 began the run; look with that version"):
        look(out).find()


def test_commands_that_want_a_finished_output_name_peek(out):
    interrupted_run(out, [0])
    for command in ("report", "verify"):
        done = batchgen(command, out)
        assert done.returncode == 1
        assert f"its run is not finished; `batchgen peek {out}` shows the rows so far" in done.stderr.decode()


# ---- an output in a store


@pytest.fixture
def store(store_server: Any) -> Iterator[Any]:
    store_server.reset()
    yield store_server
    store_server.reset()
    store_server.clear()


@pytest.mark.parametrize("name", ["april/", "o.parquet", "o.jsonl"])
def test_an_output_in_a_store_is_read_from_its_work_directory_and_then_from_there(
    job, finished, store, tmp_path, monkeypatch, name
):
    address, commit, seen = f"s3://out/{name}", Ledger.commit, []

    def commit_and_look(ledger: Ledger, receipt: Receipt) -> None:
        commit(ledger, receipt)
        rows = committed(Peek(Target.of(address, tmp_path)))
        assert rows == [row for row in finished if row in rows]
        seen.append(len(rows))

    monkeypatch.setattr(Ledger, "commit", commit_and_look)
    run_job(change(job, out=address, work_dir=tmp_path))
    assert seen[-1] == len(finished)
    elsewhere = Peek(Target.of(address, tmp_path / "none"))
    assert committed(elsewhere) == finished
    assert elsewhere.newest(3) == finished[-3:]
    assert elsewhere.state().phase == "finished"
    with pytest.raises(InputError, match="no such output"):
        Peek(Target.of("s3://out/none.parquet", tmp_path)).find()
