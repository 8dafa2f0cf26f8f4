"""cluster/: a Dask or Ray cluster writes what one machine writes, even if some of its processes die."""

import json
import logging
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from queue import Empty, SimpleQueue
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest

from batchgen.errors import BatchgenError, StoppedError, UsageError
from batchgen.files import stamp_of
from batchgen.gpt2.config import GPT2Config
from batchgen.input.prompts import Prompts
from batchgen.job import Job, WorkOptions
from batchgen.models.model import Model
from batchgen.options import flags_in_use
from batchgen.output.ledger import work_directory
from batchgen.output.schema import Columns
from batchgen.run import run_job
from batchgen.types import Chunk, Receipt, Rejected, SamplingParams
from batchgen.workers.blame import MAX_LOSSES, STALL_SECONDS
from batchgen.workers.cluster import connection, driver, lease, pool
from batchgen.workers.cluster.messages import Event, NodeSetup, Order, Reply
from batchgen.workers.supply import Deadline
from batchgen.workers.worker import WorkerSetup
from batchgen.workers.workers import open_workers
from tests.support.clusters import ROOT, Cluster, DaskCluster, MissingError, RayCluster, free_port, kill, wait_for
from tests.support.command import batchgen
from tests.support.jobs import change_job, make_job
from tests.support.models import BYTES, write_byte_model
from tests.support.plans import plan_for

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc"),
]

SLOW = replace(BYTES, n_embd=320, n_head=8, n_layer=6)
PARAMS = SamplingParams(max_tokens=80, temperature=0.7)
ROWS, CHUNK_ROWS = 64, 4
CHUNKS = ROWS // CHUNK_ROWS
KINDS = {"dask": DaskCluster, "ray": RayCluster}


@contextmanager
def running(kind: str, folder: Path, **more: object) -> Iterator[Cluster]:
    try:
        cluster = KINDS[kind](folder, **more)
    except MissingError as reason:
        pytest.skip(str(reason))
    try:
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(params=KINDS, scope="module")
def cluster(request, tmp_path_factory) -> Iterator[Cluster]:
    """One of each kind for all tests of this module; pytest runs those of one kind before those of the other."""
    with running(request.param, tmp_path_factory.mktemp(request.param)) as cluster:
        yield cluster


on_dask = pytest.mark.parametrize("cluster", ["dask"], indirect=True)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> tuple[Path, Path, bytes]:
    """A model, prompts for it, and what one machine writes."""
    return prepare(tmp_path_factory.mktemp("undisturbed"), BYTES)


@pytest.fixture(scope="module")
def slow(tmp_path_factory) -> tuple[Path, Path, bytes]:
    """The same with a model slow enough to be interrupted."""
    return prepare(tmp_path_factory.mktemp("slow"), SLOW)


def prepare(folder: Path, config: GPT2Config) -> tuple[Path, Path, bytes]:
    model = write_byte_model(folder / "model", config)
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "{"abcdefghij"[row % 10] * (1 + row % 40)}"}}\n' for row in range(ROWS)))
    run_job(plain_job((model, prompts), folder / "out.parquet"))
    return model, prompts, (folder / "out.parquet").read_bytes()


def plain_job(prepared: tuple, out: Path, **changes: object) -> Job:
    model, prompts = prepared[:2]
    options = {"jobs": 2, "chunk_rows": CHUNK_ROWS, "status": False} | changes
    return make_job([prompts], out, model, PARAMS, **options)


def job_on(cluster: Cluster, prepared: tuple, out: Path, **changes: object) -> Job:
    address = {"dask": "scheduler", "ray": "address"}[cluster.backend]
    return plain_job(prepared, out, backend=cluster.backend, **{address: cluster.address}, **changes)


class Run:
    """The same run as a command in its own process."""

    def __init__(self, cluster: Cluster, prepared: tuple, out: Path) -> None:
        model, prompts = prepared[:2]
        options = [
            "--model",
            model,
            "--chunk-rows",
            CHUNK_ROWS,
            "--jobs",
            2,
            "--max-tokens",
            PARAMS.max_tokens,
            "--temperature",
            0.7,
        ]
        command = [
            sys.executable,
            "-m",
            "batchgen.jobs.cli",
            "generate",
            prompts,
            "-o",
            out,
            *options,
            *cluster.options,
        ]
        self.out = out
        self.process = subprocess.Popen(
            [str(word) for word in [*command, "--show", 0, "--progress", "none"]],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def wait_for_parts(self, n: int) -> None:
        assert wait_for(lambda: self.process.poll() is not None or parts(self.out) >= n)
        assert self.process.poll() is None, self.process.communicate()

    def finish(self) -> tuple[int, list[str]]:
        _, err = self.process.communicate(timeout=120)
        return self.process.returncode, err.splitlines()


def parts(out: Path) -> int:
    return len(list((work_directory(out) / "parts").glob("*-*")))


class Disturbed:
    """Disturbs a run in this process when it has committed n chunks."""

    def __init__(self, out: Path, n: int, disturb) -> None:
        self.out, self.n, self.disturb, self.done = out, n, disturb, False

    def __enter__(self) -> "Disturbed":
        self._thread = threading.Thread(target=self._act)
        self._thread.start()
        return self

    def _act(self) -> None:
        if wait_for(lambda: parts(self.out) >= self.n):
            self.disturb()
            self.done = True

    def __exit__(self, *_: object) -> None:
        self._thread.join()


# ---- the same bytes


def test_a_cluster_writes_what_one_machine_writes(cluster, prepared, tmp_path):
    summary = run_job(job_on(cluster, prepared, tmp_path / "out.parquet"))
    assert (summary.ok, summary.jobs, summary.exit_code) == (ROWS, 2, 0)
    assert (tmp_path / "out.parquet").read_bytes() == prepared[2]
    assert os.listdir(tmp_path) == ["out.parquet"]
    assert wait_for(lambda: not cluster.nodes() and not cluster.generating())  # they end with the run


def test_a_cluster_is_sent_rows_of_an_older_output_to_copy_and_to_continue(cluster, prepared, tmp_path):
    half, older = prepared[1].with_name("half.jsonl"), prepared[1].with_name("out.parquet")
    half.write_text("".join(prepared[1].read_text().splitlines(keepends=True)[: ROWS // 2]) + '{"prompt": "new"}\n')
    more = {"input": [half], "sampling": replace(PARAMS, n=2)}
    run_job(change_job(plain_job(prepared, tmp_path / "full.parquet"), **more))
    job = job_on(cluster, prepared, tmp_path / "out.parquet", reuse=(str(older),))
    summary = run_job(change_job(job, **more))
    assert (summary.reused, summary.extended) == (0, ROWS // 2)
    assert pq.read_table(tmp_path / "out.parquet").equals(pq.read_table(tmp_path / "full.parquet"))
    assert run_job(job).reused == ROWS


@on_dask
def test_a_cluster_resumes_a_run_of_one_machine_and_the_reverse(cluster, prepared, tmp_path, monkeypatch):
    out = tmp_path / "out.parquet"
    for first, second in ((plain_job, job_on), (job_on, plain_job)):
        makers = {plain_job: (prepared, out), job_on: (cluster, prepared, out)}
        with pytest.raises(BatchgenError, match="cut short"), cut_short(monkeypatch, 5):
            run_job(first(*makers[first]))
        assert 0 < parts(out) < CHUNKS
        assert 0 < run_job(second(*makers[second])).resumed < ROWS
        assert out.read_bytes() == prepared[2]
        out.unlink()


@contextmanager
def cut_short(monkeypatch, chunks: int) -> Iterator[None]:
    chunks_of = Prompts.chunks

    def some(*arguments: object) -> Iterator[Chunk]:
        for number, chunk in enumerate(chunks_of(*arguments)):
            if number == chunks:
                raise BatchgenError("cut short")
            yield chunk

    with monkeypatch.context() as patch:
        patch.setattr(Prompts, "chunks", some)
        yield


@on_dask
def test_workers_of_a_cluster_are_used_as_those_of_this_machine(cluster, prepared, tmp_path):
    model, options = Model.open(str(prepared[0])), WorkOptions(backend="dask", scheduler=cluster.address)
    with open_workers(options, model, tmp_path) as workers:
        assert workers.slots == 2
        for n in (3, 1):
            receipts = list(workers.run(plan_for(model), Columns(), map(rejected_chunk, range(n)), n, Deadline(None)))
            assert sorted(receipt.chunk for receipt in receipts) == list(range(n))
            assert all(Path(receipt.path).is_file() for receipt in receipts)
            assert workers.jobs == min(n, 2)
        next(iter(workers.run(plan_for(model), Columns(), map(rejected_chunk, range(50)), 50, Deadline(None))))
        assert (tmp_path / lease.NAME).exists()
    assert not (tmp_path / lease.NAME).exists()


@on_dask
def test_a_cluster_runs_from_the_nodes_cache(cluster, prepared, tmp_path):
    out, cache = tmp_path / "out.parquet", tmp_path / "cache"
    run_job(job_on(cluster, prepared, out, model_cache=cache))
    assert len(list(cache.iterdir())) == 1
    assert out.read_bytes() == prepared[2]


# ---- processes that die


def test_the_output_is_the_same_if_an_engines_worker_is_killed(cluster, slow, tmp_path):
    out = tmp_path / "out.parquet"
    killed = []

    def kill_one() -> None:
        assert wait_for(cluster.engine_workers)
        killed.append(cluster.engine_workers()[0])
        kill(killed[0])

    with Disturbed(out, 3, kill_one):
        summary = run_job(job_on(cluster, slow, out))
    assert killed
    assert summary.ok == ROWS
    assert out.read_bytes() == slow[2]
    assert wait_for(lambda: not cluster.nodes() and not cluster.generating())


@on_dask
def test_the_output_is_the_same_if_a_node_process_or_its_worker_is_killed(cluster, slow, tmp_path):
    out = tmp_path / "out.parquet"
    with Disturbed(out, 2, lambda: [kill(pid) for pid in cluster.nodes()[:1]]) as one:  # noqa: SIM117
        with Disturbed(out, 6, lambda: [kill(pid) for pid in cluster.generating()[:1]]) as other:
            assert run_job(job_on(cluster, slow, out)).ok == ROWS
    assert one.done
    assert other.done
    assert out.read_bytes() == slow[2]


@on_dask
def test_a_client_that_dies_is_a_lost_scheduler(cluster):
    with connection.connect("dask", cluster.address) as here:
        assert here.slots == 2
        kill(here._driver.pid)
        with pytest.raises(StoppedError, match=r"dask at tcp://.* is lost: its client ended"):
            assert not wait_for(lambda: here.event(1.0))


def test_workers_may_join_while_the_run_waits_and_have_several_threads(prepared, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(pool, "NO_WORKERS_SECONDS", 0.1)
    out = tmp_path / "out.parquet"
    with running("dask", tmp_path / "cluster", workers=0) as cluster:
        come = lambda: "no workers" in caplog.text and not cluster.add_workers(1, threads=2)  # noqa: E731
        comer = threading.Thread(target=lambda: wait_for(come))
        comer.start()
        with caplog.at_level(logging.WARNING):
            assert run_job(job_on(cluster, prepared, out)).ok == ROWS
        comer.join()
    assert out.read_bytes() == prepared[2]


def test_a_killed_run_leaves_no_process_and_the_next_one_finishes(cluster, slow, tmp_path):
    run = Run(cluster, slow, tmp_path / "out.parquet")
    run.wait_for_parts(3)
    assert cluster.generating()
    os.kill(run.process.pid, signal.SIGKILL)
    run.finish()
    assert wait_for(lambda: not cluster.nodes() and not cluster.generating(), 20)  # sooner than a lease gets stale
    run_job(plain_job(slow, run.out))
    assert run.out.read_bytes() == slow[2]


STOPS = {"dask": (signal.SIGTERM, 143, "terminated"), "ray": (signal.SIGINT, 130, "inter")}


def test_a_stopped_run_prints_one_line_and_leaves_no_process(cluster, slow, tmp_path):
    number, code, word = STOPS[cluster.backend]
    run = Run(cluster, slow, tmp_path / "out.parquet")
    run.wait_for_parts(3)
    (os.killpg if number == signal.SIGINT else os.kill)(run.process.pid, number)  # Ctrl-C goes to all of them
    ended, said = run.finish()
    assert ended == code
    assert len(said) == 1
    assert word in said[0]
    assert wait_for(lambda: not cluster.nodes() and not cluster.generating(), 20)
    assert sorted(os.listdir(work_directory(run.out))) == ["lock", "parts", "plan.json"]


@on_dask  # a node finds the rows, of whichever kind the cluster is
def test_rows_that_kill_hang_or_break_their_worker_fail(cluster, prepared, tmp_path, caplog):
    words = {3: "kill-first", 17: "raise-last", 30: "hang-first", 45: "kill-first-once"}
    model = write_byte_model(tmp_path / "model")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{words.get(row, 'row')} {row}"}) + "\n" for row in range(60)))
    out = tmp_path / "out" / "out.parquet"
    out.parent.mkdir()
    job = job_on(cluster, (model, prompts), out, chunk_rows=15, row_timeout=2.0)
    with caplog.at_level(logging.WARNING):
        summary = run_job(job)
    rows = pq.read_table(out).to_pylist()
    assert [row["row"] for row in rows] == list(range(60))
    assert {row["row"] for row in rows if row["status"] == "failed"} == {3, 17, 30}
    assert "its worker died (SIGKILL(-9))" in rows[3]["error"]
    assert "took no step for 2 s" in rows[30]["error"]
    assert (summary.failed, summary.exit_code) == (3, 3)
    assert "prompts.jsonl:4: its worker died" in caplog.text  # in the run's own log
    assert os.listdir(out.parent) == ["out.parquet"]


# ---- errors before the first chunk


def refused(prepared: tuple, folder: Path, *options: object, code: int) -> str:
    """The one line that a command prints."""
    out = folder / "out.parquet"
    done = batchgen("generate", prepared[1], "-o", out, "--model", prepared[0], *options)
    said = [line for line in done.stderr.decode().splitlines() if not re.fullmatch(r"\d+ of \d+ rows.*", line)]
    assert (done.returncode, len(said)) == (code, 1), done.stderr
    assert not out.exists()
    assert not work_directory(out).exists() or not parts(out)
    return said[0]


@pytest.mark.parametrize("kind", KINDS)
def test_an_absent_scheduler_is_a_one_line_error(kind, prepared, tmp_path):
    port = free_port()
    address = {"dask": f"tcp://127.0.0.1:{port}", "ray": f"127.0.0.1:{port}"}[kind]
    said = refused(prepared, tmp_path, "--backend", kind, KINDS[kind].option, address, code=1)
    assert f"no cluster at {address}" in said
    assert KINDS[kind].option in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "dask"}, r"which cluster\? give --scheduler"),
        ({"address": "host:6379"}, "--address names a Ray cluster, and this is --backend loky; add --backend ray"),
        ({"model_cache": Path("cache")}, "--model-cache is for a cluster; add --backend"),
    ],
)
def test_options_that_do_not_go_together_are_refused(prepared, tmp_path, changes, message):
    with pytest.raises(UsageError, match=message):
        run_job(plain_job(prepared, tmp_path / "out.parquet", **changes))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scheduler", "tcp://host:8786"], "--scheduler names a Dask cluster, and this is --backend loky"),
        (["--backend", "dask", "--address", "host:6379"], "--address names a Ray cluster, and this is --backend dask"),
    ],
)
def test_a_cluster_of_the_other_kind_is_refused(prepared, tmp_path, options, message):
    assert message in refused(prepared, tmp_path, *options, code=2)


def test_the_error_for_a_missing_engine_says_how_to_install_it(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(connection, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match="install it with: pip install ray$"):
        run_job(plain_job(prepared, tmp_path / "out.parquet", backend="ray"))


# ---- an unfit node


@pytest.fixture
def setup(prepared, tmp_path) -> NodeSetup:
    """What a node process is sent."""
    from batchgen.models.shards import load_manifest, model_hash

    attempt = tmp_path / "attempt"
    attempt.mkdir()
    worker = WorkerSetup(
        model=str(prepared[0]),
        model_hash=model_hash(load_manifest(prepared[0])),
        precision="float32",
        kv_bytes=2**26,
        max_batch=64,
        share_prefixes=True,
        columns=Columns(),
        params=PARAMS,
        parent=os.getpid(),
    )
    return NodeSetup(worker, str(attempt), flags=flags_in_use())


def rejected_chunk(index: int, rows: int = 2) -> Chunk:
    return Chunk(index, tuple(Rejected(rows * index + k, "p:1", None, None, "no") for k in range(rows)))


def asked(setup: NodeSetup, *chunks: Chunk, version: str | None = None) -> list[Reply]:
    """The replies of a node process to chunks, one after the other."""
    from batchgen import __version__
    from batchgen.workers.cluster.task import _idle, do_chunk

    with lease.hold_lease(Path(setup.attempt)) if Path(setup.attempt).exists() else contextmanager(lambda: (yield))():
        replies = [
            pickle.loads(do_chunk(version or __version__, setup.attempt, pickle.dumps(setup), pickle.dumps(chunk)))
            for chunk in chunks
        ]
        for node in _idle.pop(setup.attempt, []):
            node.end()
    return replies


def test_a_node_process_never_uses_the_name_of_a_part_twice(setup):
    chunks = [rejected_chunk(0), rejected_chunk(1), rejected_chunk(0)]
    replies = asked(setup, *chunks)
    paths = [reply.receipt.path for reply in replies]
    assert len(set(paths)) == 3
    assert len({Path(path).parent for path in paths}) == 1
    for reply, chunk in zip(replies, chunks, strict=True):
        part = Path(setup.attempt, reply.receipt.path)
        assert part.stat().st_size == reply.size
        assert pq.read_table(part)["row"].to_pylist() == [item.row for item in chunk.items]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"regex": "1.0"}, r"regex .*, and the run was planned with 1\.0; install the same"),
        (
            {"attempt": "/nowhere/attempt"},
            "/nowhere/attempt: no such folder on this node; .* file system that all nodes share",
        ),
        ({"hash": "0123456789abcdef"}, "has model .*, and the run needs 0123456789abcdef"),
        ({"model": "/nowhere/model"}, "/nowhere/model: is not a model"),
        ({"max_batch": 10**9, "kv_bytes": 2**50}, "GB of memory are free, .* lower --kv-memory"),
        ({"version": "0.0.1"}, r"batchgen .*, and the run 0\.0\.1; install the same"),
    ],
)
def test_an_unfit_node_reports_its_name_and_the_reason(setup, changes, message):
    version = changes.pop("version", None)
    worker = setup.worker
    worker = replace(
        worker,
        model_hash=changes.pop("hash", worker.model_hash),
        **{name: changes.pop(name) for name in ("model", "max_batch", "kv_bytes") if name in changes},
    )
    [reply] = asked(replace(setup, worker=worker, **changes), rejected_chunk(0), version=version)
    assert isinstance(reply.error, BatchgenError)
    assert str(reply.error).startswith(f"node {os.uname().nodename}: ")
    assert re.search(message, str(reply.error))


def test_a_model_is_copied_to_the_nodes_cache_once_and_checked(setup, tmp_path):
    setup = replace(setup, model_cache=str(tmp_path / "cache"))
    assert asked(setup, rejected_chunk(0))[0].receipt
    [copy] = (tmp_path / "cache").iterdir()
    before = stamp_of(copy)
    assert asked(setup, rejected_chunk(0))[0].receipt
    assert stamp_of(copy) == before
    shard = next(copy.glob("h0.mlp.c_fc.w.panels.npy"))
    shard.write_bytes(shard.read_bytes()[:-4])
    other_run = replace(setup, attempt=str(tmp_path / "other"))  # a node checks every shard once in a run
    Path(other_run.attempt).mkdir()
    [reply] = asked(other_run, rejected_chunk(0))
    assert re.search(r"node .*h0\.mlp\.c_fc\.w\.panels\.npy: expected .* bytes", str(reply.error))


# ---- the lease


def test_a_lease_that_is_gone_or_stale_ends_a_node(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr(lease.time, "monotonic", lambda: now)
    path = tmp_path / lease.NAME
    path.write_text("0")
    watch = lease.LeaseWatch(tmp_path, stale=60.0)
    for now, content, ended in [(0, "0", ""), (59, "0", ""), (59.5, "1", ""), (119, "1", ""), (120, "1", "no sign")]:  # noqa: B007
        path.write_text(content)
        assert watch.end_reason().startswith(ended)
        assert bool(watch.end_reason()) == bool(ended)
    path.unlink()
    assert "over" in watch.end_reason()


def test_a_lease_changes_while_it_is_held_and_is_removed_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "REFRESH_SECONDS", 0.01)
    with lease.hold_lease(tmp_path) as path:
        before = path.read_bytes()
        assert wait_for(lambda: path.read_bytes() != before)
        assert len(path.read_bytes()) == len(before)  # needs no room on a full disk
    assert not path.exists()


def test_a_node_process_ends_with_its_run(setup, tmp_path):
    from batchgen import __version__
    from batchgen.workers.cluster.messages import send

    command = [sys.executable, "-m", "batchgen.workers.cluster.node", __version__, str(os.getpid())]
    with lease.hold_lease(Path(setup.attempt)):
        node = subprocess.Popen(
            command,
            env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        send(node.stdin, pickle.dumps(setup))
        assert wait_for(lambda: list(tmp_path.glob("batchgen-*/node-*")))
    assert node.wait(timeout=60) == 0
    _, err = node.communicate()
    assert b"the run is over" in err
    assert not list(tmp_path.glob("batchgen-*/node-*"))


# ---- the run's side, with a scripted scheduler


class Scripted(connection.Connection):
    """Answers each chunk with the events of a function."""

    def __init__(self, answer, slots: int = 2) -> None:
        self.where, self.slots, self._heard = "script at here", slots, float("inf")
        self._asked = time.monotonic()
        self._events, self._answer = SimpleQueue(), answer
        self.most = self.out = 0

    def order(self, order: Order) -> None:
        if order.arguments:
            self.out += 1
            self.most = max(self.most, self.out)
            for event in self._answer(order.ticket, pickle.loads(order.arguments[3])):
                self._events.put(event)

    def event(self, seconds: float) -> Event | None:
        event = super().event(0.0)
        self.out -= event is not None
        return event


def finished(setup: NodeSetup, ticket: int, chunk: Chunk, **changes: object) -> Event:
    """A reply whose part is there."""
    path = Path("node-1", f"{chunk.index:08d}-{ticket}.parquet")
    Path(setup.attempt, "node-1").mkdir(exist_ok=True)
    Path(setup.attempt, path).write_bytes(b"part")
    receipt = Receipt(chunk.index, str(path), "0" * 64, len(chunk.items), 2, 0, 2, 0, 0, 0)
    reply = replace(Reply("node", receipt=receipt, size=4), **changes)
    return Event(ticket, reply=pickle.dumps(reply))


def test_a_receipt_that_comes_twice_counts_once(setup):
    cluster = Scripted(lambda ticket, chunk: [finished(setup, ticket, chunk)] * 2)
    receipts = list(pool.ClusterPool(cluster, setup).receipts(map(rejected_chunk, range(20))))
    assert sorted(receipt.chunk for receipt in receipts) == list(range(20))
    assert all(Path(receipt.path).is_file() for receipt in receipts)
    assert os.listdir(setup.attempt) == ["node-1"]  # the lease is gone


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": 5},
        {"receipt": Receipt(7, "node-1/00000007-1.parquet", "", 2, 2, 0, 2, 0, 0, 0)},
        {"receipt": Receipt(0, "../00000000-1.parquet", "", 2, 2, 0, 2, 0, 0, 0)},
        {"receipt": Receipt(0, "node-1/00000000-99.parquet", "", 2, 2, 0, 2, 0, 0, 0)},
        {"receipt": None, "lost": "its node process ended"},
    ],
)
def test_a_chunk_is_done_again_if_its_part_is_not_as_the_receipt_says(setup, wrong, caplog):
    first = iter([wrong])
    cluster = Scripted(lambda ticket, chunk: [finished(setup, ticket, chunk, **next(first, {}))])
    with caplog.at_level(logging.WARNING):
        receipts = list(pool.ClusterPool(cluster, setup).receipts(iter([rejected_chunk(0)])))
    assert [receipt.path for receipt in receipts] == [str(Path(setup.attempt, "node-1/00000000-2.parquet"))]
    assert "chunk 0 is lost and done again" in caplog.text


def test_a_chunk_that_is_lost_again_and_again_ends_the_run(setup):
    tries = []
    cluster = Scripted(lambda ticket, chunk: tries.append(chunk.index) or [Event(ticket, lost="KilledWorker: w1 died")])
    with pytest.raises(
        BatchgenError, match=r"input rows 0 to 1: lost 5 times, the last time because KilledWorker: w1 died"
    ):
        list(pool.ClusterPool(cluster, setup).receipts(map(rejected_chunk, range(1))))
    assert len(tries) == MAX_LOSSES


def test_chunks_that_are_out_far_too_long_are_given_out_anew(setup, monkeypatch, caplog):
    """A late first answer does not count."""
    monkeypatch.setattr(pool, "STALL_SECONDS", 0.0)
    tickets = []

    def answer(ticket: int, chunk: Chunk) -> list[Event]:
        if chunk.index == 1:
            tickets.append((ticket, chunk))
            return [timed(*given) for given in tickets] if len(tickets) == 2 else []
        return [timed(ticket, chunk)]

    def timed(ticket: int, chunk: Chunk) -> Event:
        reply = pickle.loads(finished(setup, ticket, chunk).reply)
        return Event(ticket, reply=pickle.dumps(replace(reply, receipt=replace(reply.receipt, seconds=1e-6))))

    with caplog.at_level(logging.WARNING):
        receipts = list(pool.ClusterPool(Scripted(answer), setup).receipts(map(rejected_chunk, range(2))))
    assert sorted(receipt.chunk for receipt in receipts) == [0, 1]
    assert Path(receipts[-1].path).name == f"00000001-{tickets[1][0]}.parquet"
    assert "given out anew" in caplog.text


def test_chunks_that_are_out_again_have_twice_as_long_until_one_answers(setup):
    """A node that searches for rows that hang takes long, and it must end once."""
    this = pool.ClusterPool(Scripted(lambda ticket, chunk: []), setup)
    this.longest = 1.0
    taken = []
    for patience in (1, 2, 4):
        for late in (-1.0, 1.0):
            this._give_out(rejected_chunk(0))
            this._answered = time.monotonic() - patience * STALL_SECONDS - late
            taken.append(len(list(this._take_back_overdue())))
    assert taken == [0, 2, 0, 2, 0, 2]
    assert not this._out


def test_a_run_that_was_stopped_does_not_take_its_scheduler_for_lost(monkeypatch):
    clock = SimpleNamespace(now=0.0)

    def stop(timeout: float) -> Event:
        clock.now += 1000.0
        raise Empty

    monkeypatch.setattr(connection, "time", SimpleNamespace(monotonic=lambda: clock.now))
    cluster = Scripted(lambda ticket, chunk: [])
    cluster._heard, cluster._asked, cluster._events = 0.0, 0.0, SimpleNamespace(get=stop)
    assert [cluster.event(0.0) for _ in range(3)] == [None] * 3


def test_a_task_that_cannot_run_at_all_ends_the_run_and_says_what_nodes_need(setup):
    cluster = Scripted(lambda ticket, chunk: [Event(ticket, error="ModuleNotFoundError: No module named 'batchgen'")])
    with pytest.raises(BatchgenError, match=r"No module named 'batchgen'\); all nodes need this batchgen, "):
        list(pool.ClusterPool(cluster, setup).receipts(map(rejected_chunk, range(3))))


def test_an_unfit_node_ends_the_run(setup):
    reply = pickle.dumps(Reply("node", error=BatchgenError("node n1: its regex is another")))
    cluster = Scripted(lambda ticket, chunk: [Event(ticket, reply=reply)])
    with pytest.raises(BatchgenError, match="node n1: its regex is another"):
        list(pool.ClusterPool(cluster, setup).receipts(map(rejected_chunk, range(3))))


def test_only_a_tasks_own_error_is_a_fault():
    def breaks() -> bytes:
        raise OSError("Connection reset\nby peer")

    assert driver.outcome(1, lambda: b"reply", lambda _: True) == Event(1, reply=b"reply")
    assert driver.outcome(1, breaks, lambda _: True) == Event(1, error="OSError: by peer")
    assert driver.outcome(1, breaks, lambda _: False) == Event(1, lost="OSError: by peer")


@pytest.mark.parametrize("kind", KINDS)
def test_nodes_without_batchgen_end_the_run_and_it_says_what_they_need(kind, prepared, tmp_path):
    message = f"{kind} at .* cannot run batchgen's tasks .*; all nodes need this"
    with (
        running(kind, tmp_path / "cluster", BATCHGEN_MISSING="1") as cluster,
        pytest.raises(BatchgenError, match=message),
    ):
        run_job(job_on(cluster, prepared, tmp_path / "out.parquet"))


@pytest.mark.parametrize(("slots", "jobs", "most"), [(2, None, 2), (16, None, 16), (16, 4, 4), (2, 4, 2), (0, None, 1)])
def test_as_many_chunks_are_out_as_there_are_slots(setup, slots, jobs, most):
    cluster = Scripted(lambda ticket, chunk: [finished(setup, ticket, chunk)], slots)
    assert len(list(pool.ClusterPool(cluster, setup, jobs).receipts(map(rejected_chunk, range(40))))) == 40
    assert cluster.most == most


def test_the_run_waits_for_workers_and_warns_until_the_deadline(setup, monkeypatch, caplog):
    monkeypatch.setattr(pool, "NO_WORKERS_SECONDS", 0.0)
    cluster = Scripted(lambda ticket, chunk: [], slots=0)
    with caplog.at_level(logging.WARNING):
        assert list(pool.ClusterPool(cluster, setup, deadline=Deadline(0.0)).receipts(iter([rejected_chunk(0)]))) == []
    assert "script at here has no workers; waiting for some" in caplog.text


def test_a_scheduler_that_falls_silent_is_lost(setup):
    cluster = Scripted(lambda ticket, chunk: [])
    cluster._heard = 0.0
    with pytest.raises(
        StoppedError, match="script at here is lost: it sent nothing for .* run the same command to resume"
    ):
        list(pool.ClusterPool(cluster, setup).receipts(iter([rejected_chunk(0)])))


# ---- the last of each cluster


def test_a_lost_scheduler_ends_the_run_and_the_next_one_finishes(cluster, slow, tmp_path, monkeypatch):
    """It kills the cluster of all tests above."""
    monkeypatch.setattr(connection, "SILENCE_SECONDS", 5.0)
    out, kind = tmp_path / "out.parquet", cluster.backend
    # Ray's workers finish their tasks without a head: if only its GCS is killed, a short run may complete.
    victims = lambda: [cluster.scheduler.pid] if kind == "dask" else cluster.head_processes()  # noqa: E731
    with Disturbed(out, 3, lambda: [kill(pid) for pid in victims()]) as disturbed:  # noqa: SIM117
        with pytest.raises(StoppedError, match=f"{kind} at .*{cluster.port} is lost.* run the same command") as end:
            run_job(job_on(cluster, slow, out))
    assert disturbed.done
    assert end.value.exit_code == 75
    assert 3 <= parts(out) < CHUNKS
    assert wait_for(lambda: not cluster.nodes() and not cluster.generating())
    assert run_job(plain_job(slow, out)).resumed >= 3 * CHUNK_ROWS
    assert out.read_bytes() == slow[2]
