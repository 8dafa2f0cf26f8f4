"""worker.py: rows in are rows out, the receipt is small and adds up, and no worker outlives its parent."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from batchgen.gpt2.config import GPT2Config
from batchgen.models.model import Model
from batchgen.output.ledger import work_directory
from batchgen.output.schema import Columns
from batchgen.planning import default_kv_bytes
from batchgen.progress import status_path
from batchgen.types import Chunk, Rejected, SamplingParams, TokenizedRequest
from batchgen.workers import complete, worker
from batchgen.workers.marker import Phase, read_sightings
from batchgen.workers.worker import ChunkError, WorkerSetup, run_chunk
from tests.support.command import batchgen
from tests.support.models import BYTES, write_byte_model

pytestmark = pytest.mark.processes

SLOW = GPT2Config(n_vocab=257, n_ctx=128, n_embd=256, n_head=8, n_layer=4)
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_byte_model(tmp_path_factory.mktemp("worker") / "bytes")


@pytest.fixture
def attempt(tmp_path: Path) -> str:
    (tmp_path / "attempt").mkdir()
    return str(tmp_path / "attempt")


def setup(model: Path, **changes) -> WorkerSetup:
    values = {
        "model": str(model),
        "model_hash": Model.load(model).hash,
        "kv_bytes": default_kv_bytes(BYTES, "float32"),
        "precision": "float32",
        "max_batch": 8,
    }
    values |= {
        "share_prefixes": True,
        "columns": Columns(token_ids=True),
        "parent": os.getpid(),
        "params": SamplingParams(),
    }
    return WorkerSetup(**values | changes)


def request(row: int, **params) -> TokenizedRequest:
    text = "abcdefgh"[: 1 + row % 8]
    return TokenizedRequest(row, f"p:{row}", f"id-{row}", text, tuple(text.encode()), SamplingParams(**params))


def rejected(row: int, prompt_tokens: int | None = None) -> Rejected:
    return Rejected(row, f"p:{row}", None, None, f"p:{row}: not JSON", prompt_tokens)


MIXED = Chunk(
    3,
    (
        rejected(96),
        request(97, max_tokens=4),
        request(98, max_tokens=4, temperature=0.9, n=3),
        rejected(99, 200),
        request(100, max_tokens=6, n=2),
        request(101, max_tokens=4),
        request(109, max_tokens=4),  # the same text as 101
    ),
)
EXPECTED = [(96, 0), (97, 0), (98, 0), (98, 1), (98, 2), (99, 0), (100, 0), (100, 1), (101, 0), (109, 0)]


def part(receipt) -> list[dict]:
    return pq.read_table(receipt.path).to_pylist()


def test_rows_in_are_rows_out_in_order(model, attempt):
    rows = part(run_chunk(setup(model), MIXED, attempt))
    assert [(row["row"], row["sample"]) for row in rows] == EXPECTED
    assert [row["row"] for row in rows if row["status"] == "rejected"] == [96, 99]
    for row in rows:
        item = next(item for item in MIXED.items if item.row == row["row"])
        assert (row["id"], row["prompt"]) == (item.id, item.prompt)
        if row["status"] == "ok":
            assert row["error"] is None
            assert row["prompt_tokens"] == len(item.prompt_token_ids)
            assert row["completion_tokens"] == len(row["completion_token_ids"]) <= item.params.max_tokens
        else:
            assert row["error"] == item.error
            assert row["prompt_tokens"] == item.prompt_tokens
            assert {row[name] for name in ("completion", "completion_tokens", "finish_reason", "seed")} == {None}


@pytest.mark.parametrize("items", [(rejected(0),), (request(0, max_tokens=1),), tuple(map(rejected, range(20)))])
def test_a_chunk_with_only_one_kind_of_row_is_done(model, attempt, items):
    rows = part(run_chunk(setup(model), Chunk(0, items), attempt))
    assert [row["row"] for row in rows] == [item.row for item in items]


def test_the_receipt_is_small_and_adds_up(model, attempt):
    receipt = run_chunk(setup(model), MIXED, attempt)
    rows = part(receipt)
    assert len(pickle.dumps(receipt)) < 1000
    assert (receipt.chunk, receipt.input_rows, receipt.rows) == (3, len(MIXED.items), len(rows))
    assert receipt.ok + receipt.rejected + receipt.failed == receipt.rows
    ok = [row for row in rows if row["status"] == "ok"]
    assert (receipt.ok, receipt.rejected, receipt.failed) == (len(ok), len(rows) - len(ok), 0)
    assert receipt.completion_tokens == sum(row["completion_tokens"] for row in ok)
    assert receipt.prompt_tokens == sum(row["prompt_tokens"] for row in ok)


def test_a_chunk_done_again_is_the_same_part(model, attempt):
    first = run_chunk(setup(model), MIXED, attempt)
    assert run_chunk(setup(model), MIXED, attempt).sha256 == first.sha256
    assert run_chunk(setup(model, max_batch=16), Chunk(4, MIXED.items), attempt).sha256 != first.sha256  # its receipt


def test_only_sampled_rows_have_a_seed(model, attempt):
    rows = part(run_chunk(setup(model), MIXED, attempt))
    assert {row["row"] for row in rows if row["seed"] is not None} == {98}
    assert len({row["seed"] for row in rows if row["row"] == 98}) == 3


def test_a_worker_is_sent_paths_and_numbers_and_no_weights(model):
    assert len(pickle.dumps(setup(model))) < 1000


# ---- its marker


def test_a_chunk_counts_its_input_rows_and_its_tokens(model, attempt):
    receipt = run_chunk(setup(model), MIXED, attempt)
    [seen] = read_sightings(Path(attempt))
    assert (seen.rows, seen.prompt_tokens) == (len(MIXED.items), receipt.prompt_tokens)
    assert seen.completion_tokens == receipt.completion_tokens


def test_the_error_of_a_chunk_carries_the_rows_in_flight(model, attempt, monkeypatch):
    monkeypatch.setattr(complete, "completed_row", lambda *_: 1 / 0)
    with pytest.raises(ChunkError, match="ZeroDivisionError") as error:
        run_chunk(setup(model), MIXED, attempt)
    assert error.value.sighting.chunk == 3
    assert error.value.sighting.suspects[0] in {97, 98, 100, 101, 109}
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)
    [seen] = read_sightings(Path(attempt))
    assert (seen.phase, seen.rows) == (Phase.IDLE, 0)


def test_no_row_is_in_flight_while_the_part_is_written(model, attempt, monkeypatch):
    seen = []
    write = worker._write_part
    monkeypatch.setattr(
        worker, "_write_part", lambda *args: (seen.extend(read_sightings(Path(attempt))), write(*args))[1]
    )
    for chunk in (MIXED, Chunk(0, (rejected(0),))):
        run_chunk(setup(model), chunk, attempt)
    assert [(one.phase, one.in_flight) for one in seen] == [(Phase.WRITING, ())] * 2


def test_a_row_that_the_engine_refuses_is_named_and_does_not_end_the_job(model, attempt):
    """Only a ChunkError is the chunk's own; the pool then fails the rows in flight, if they raise again."""
    beyond = replace(request(98, max_tokens=4), prompt_token_ids=(97, 257))
    chunk = Chunk(3, (request(97, max_tokens=4), beyond, request(99, max_tokens=4)))
    with pytest.raises(ChunkError, match="row 98: token id 257 is outside the vocabulary of 257") as error:
        run_chunk(setup(model), chunk, attempt)
    assert error.value.sighting.in_flight == (98,)


# ---- the parent's death


def processes_of(session: int) -> list[int]:
    """The living processes of a session: a command started in its own session, and its children."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its_session = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it has ended
            continue
        if int(its_session) == session and state != "Z":
            found.append(int(path.parent.name))
    return found


def wait_for(condition, seconds: float) -> bool:
    """Wait until the condition holds, at most so many seconds: many times what it takes."""
    until = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < until:
        time.sleep(0.02)
    return bool(value)


def arguments(model: Path, prompts: Path, out: Path) -> list[object]:
    options = ["--model", model, "--chunk-rows", 8, "--jobs", 2, "--max-tokens", 16, "--temperature", 0.7]
    return ["generate", prompts, "-o", out, *options, "--show", 0]


class Run:
    """`batchgen generate` with two workers in its own session, to be interrupted."""

    def __init__(self, model: Path, prompts: Path, out: Path) -> None:
        self.out = out
        command = [sys.executable, "-m", "batchgen.jobs.cli", *arguments(model, prompts, out)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            list(map(str, command)),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def wait_for_parts(self, n: int) -> None:
        """Until n chunks are committed."""
        directory = work_directory(self.out) / "parts"
        assert wait_for(lambda: self.process.poll() is not None or len(list(directory.glob("*-*"))) >= n, 60)
        assert self.process.poll() is None, self.process.communicate()

    def finish(self) -> int:
        """Wait for the end and return the exit code; the lines of standard error are in `said`."""
        _, err = self.process.communicate(timeout=120)
        self.said = err.splitlines()
        return self.process.returncode


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory) -> tuple[Path, Path, bytes]:
    """A model slow enough to be interrupted, prompts for it, and what an undisturbed run writes."""
    folder = tmp_path_factory.mktemp("disturbed")
    model = write_byte_model(folder / "slow", SLOW)
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "{"abcdefghij"[row % 10] * (1 + row % 40)}"}}\n' for row in range(120)))
    assert batchgen(*arguments(model, prompts, folder / "out.parquet")).returncode == 0
    return model, prompts, (folder / "out.parquet").read_bytes()


def test_loky_does_not_restart_a_worker_that_maps_much_memory():
    code = (
        "import os; from joblib.externals.loky import process_executor as loky; import batchgen.workers.worker;"
        "loky._USE_PSUTIL = True; batchgen.workers.worker.become_worker(os.getppid()); print(loky._USE_PSUTIL)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG and /proc are Linux's")
def test_workers_die_with_a_killed_parent_and_the_next_run_finishes(disturbed, tmp_path):
    model, prompts, expected = disturbed
    out = tmp_path / "out.parquet"
    for parts in (2, 6):
        run = Run(model, prompts, out)
        run.wait_for_parts(parts)
        workers = processes_of(run.process.pid)
        assert len(workers) >= 3
        os.kill(run.process.pid, signal.SIGKILL)
        assert wait_for(lambda run=run: processes_of(run.process.pid) == [], 15)  # loky alone leaves them for 25 s
        assert (run.finish(), run.said) == (-signal.SIGKILL, [])
        assert not out.exists()
    assert batchgen(*arguments(model, prompts, out)).returncode == 0
    assert out.read_bytes() == expected
    assert sorted(os.listdir(tmp_path)) == ["out.parquet", "out.parquet.status.json"]


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")
@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_end_by_signal_prints_one_line_that_the_status_has_too(disturbed, tmp_path, number, code, word):
    model, prompts, expected = disturbed
    run = Run(model, prompts, tmp_path / "out.parquet")
    run.wait_for_parts(2)
    (os.killpg if number == signal.SIGINT else os.kill)(run.process.pid, number)  # Ctrl-C goes to all of them
    assert run.finish() == code
    [line] = run.said  # and no library's warning
    kept = int(line.removeprefix(f"batchgen: {word}: ").split(" of 120 rows are kept; run the same command again")[0])
    parts = len(os.listdir(work_directory(run.out) / "parts"))
    assert kept in (8 * parts, 8 * parts - 8)  # a part may be on disk and not counted yet
    status = json.loads(status_path(run.out).read_text())
    assert (status["state"], status["exit_code"], f"batchgen: {status['error']}") == ("stopped", code, line)
    assert wait_for(lambda: processes_of(run.process.pid) == [], 15)
    assert sorted(os.listdir(work_directory(run.out))) == ["lock", "parts", "plan.json"]
    assert batchgen(*arguments(model, prompts, run.out)).returncode == 0
    assert run.out.read_bytes() == expected


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")
def test_ctrl_c_while_workers_start_prints_one_line(disturbed, tmp_path):
    model, prompts, _ = disturbed
    run = Run(model, prompts, tmp_path / "out.parquet")
    workers = lambda: run.process.poll() is not None or len(processes_of(run.process.pid)) >= 4  # noqa: E731
    assert wait_for(workers, 60)
    os.killpg(run.process.pid, signal.SIGINT)
    assert run.finish() == 130
    [line] = run.said
    assert re.fullmatch(r"batchgen: interrupted(: 0 of 120 rows are kept)?; run the same command again to resume", line)
