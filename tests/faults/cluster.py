"""A cluster of two workers on loopback, or of two hosts in network namespaces, and what is done to it."""

import json
import os
import random
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.faults.bench import Bench, Run, Skipped, need, parts, wait_for
from tests.support.clusters import Cluster, DaskCluster, MissingError, RayCluster, free_port, kill

KILL_SECONDS = 10.0
SLOWDOWN = 1.5
SECONDS = 900.0  # of one run, at most
SCHEDULER, FAR = "10.86.7.1", "10.86.7.2"


def dask_workers_killed(bench: Bench) -> str:
    return _workers_killed(bench, DaskCluster)


def ray_workers_killed(bench: Bench) -> str:
    return _workers_killed(bench, RayCluster)


def _workers_killed(bench: Bench, kind: type[DaskCluster | RayCluster]) -> str:
    """One of the engine's two workers is killed every ten seconds: with its node process, its chunk and its model."""
    prompts, options = _tales(bench, 2000 if bench.full else 200)
    with _running(kind, bench) as cluster:
        here, undisturbed, disturbed = (bench.new_output() for _ in range(3))
        _finish(bench.start(here, *options, prompts=prompts))
        calm = _finish(bench.start(undisturbed, *options, *cluster.options, prompts=prompts))
        run = bench.start(disturbed, *options, *cluster.options, prompts=prompts)
        kills = _kill_every(KILL_SECONDS if bench.full else 3.0, cluster, run)
        stormy = _finish(run)
        assert undisturbed.read_bytes() == disturbed.read_bytes() == here.read_bytes()
        bench.assert_alone(disturbed)
        assert len(kills) >= 1, "none was killed"
        assert stormy < SLOWDOWN * calm or not bench.full, (stormy, calm)
        assert wait_for(lambda: not cluster.nodes(), 20.0), "node processes are left"
    return f"{len(kills)} kills: exit 0, identical to one machine's, {stormy:.1f} s; undisturbed {calm:.1f} s"


def _tales(bench: Bench, n: int) -> tuple[Path, list[str]]:
    path = bench.new_folder() / "prompts.jsonl"
    lines = [
        json.dumps({"prompt": f"Once upon a time there were {row} brothers, and the", "seed": row}) for row in range(n)
    ]
    path.write_text("\n".join(lines) + "\n")
    more = ["--max-tokens", "100", "--ignore-eos"] if bench.full else []
    return path, ["--model", "tales", "--chunk-rows", "40", *more]


def _finish(run: Run) -> float:
    assert run.finish(SECONDS) == 0, run.said
    return run.seconds


def _kill_every(seconds: float, cluster: Cluster, run: Run) -> list[int]:
    """From a thread, as long as the run lives; the list of the victims grows."""
    rng, killed = random.Random(6), []

    def storm() -> None:
        while not wait_for(lambda: run.process.poll() is not None, seconds):
            if victims := cluster.engine_workers():
                killed.append(rng.choice(victims))
                kill(killed[-1])

    threading.Thread(target=storm, daemon=True).start()
    return killed


@contextmanager
def _running(kind: type[DaskCluster | RayCluster], bench: Bench) -> Iterator[DaskCluster | RayCluster]:
    try:
        cluster = kind(bench.new_folder())
    except MissingError as reason:
        raise Skipped(str(reason)) from reason
    try:
        yield cluster
    finally:
        cluster.stop()


# ---- two hosts


def partition(bench: Bench) -> str:
    """A host of two is cut off in the middle of its chunks, and never heard of again."""
    prompts, options = _tales(bench, 400 if bench.full else 200)
    here, out = bench.new_output(), bench.new_output()
    _finish(bench.start(here, *options, prompts=prompts))
    with two_hosts() as (near, far), _two_workers(bench, near, far) as cluster:
        run = bench.start(out, *options, *cluster.options, prompts=prompts, before=(*_within(near),))
        run.until(lambda: parts(out) >= 2 and len(cluster.nodes()) == 2)
        _ip("netns", "exec", far, "ip", "link", "set", "veth-far", "down")
        cut, started = parts(out), time.monotonic()
        _finish(run)
        seconds = time.monotonic() - started
        assert out.read_bytes() == here.read_bytes()
        bench.assert_alone(out)
        assert wait_for(lambda: not cluster.nodes(), 20.0), "node processes are left"
    return f"cut off after {cut} chunks: exit 0 {seconds:.1f} s later, identical"


@contextmanager
def _two_workers(bench: Bench, near: str, far: str) -> Iterator[Cluster]:
    """A scheduler and a worker on the near host, and a worker on the far one."""
    cluster = Cluster(bench.new_folder())
    port = free_port()
    cluster.backend, cluster.option, cluster.address = "dask", "--scheduler", f"tcp://{SCHEDULER}:{port}"
    try:
        command = ["distributed.cli.dask_scheduler", "--host", SCHEDULER, "--port", str(port), "--no-dashboard"]
        cluster.start(*command, before=_within(near))
        for host, address in ((near, SCHEDULER), (far, FAR)):
            options = ["--host", address, "--nworkers", "1", "--nthreads", "1", "--no-dashboard"]
            cluster.start("distributed.cli.dask_worker", cluster.address, *options, before=_within(host))
        assert wait_for(lambda: cluster.log().count("Starting established connection") >= 2, 60.0), cluster.log()
        yield cluster
    finally:
        cluster.stop()


def _within(host: str) -> tuple[str, ...]:
    return need("ip"), "netns", "exec", host


@contextmanager
def two_hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces joined by a cable, which share this machine's file system."""
    near, far = f"batchgen-near-{os.getpid()}", f"batchgen-far-{os.getpid()}"
    try:
        for host in (near, far):
            _ip("netns", "add", host)
            _ip("netns", "exec", host, "ip", "link", "set", "lo", "up")
        _ip("link", "add", "veth-near", "netns", near, "type", "veth", "peer", "name", "veth-far", "netns", far)
        for host, end, address in ((near, "veth-near", SCHEDULER), (far, "veth-far", FAR)):
            _ip("netns", "exec", host, "ip", "address", "add", f"{address}/24", "dev", end)
            _ip("netns", "exec", host, "ip", "link", "set", end, "up")
        yield near, far
    finally:
        for host in (near, far):
            subprocess.run(["ip", "netns", "delete", host], stderr=subprocess.DEVNULL, check=False)


def _ip(*words: str) -> None:
    done = subprocess.run([need("ip"), *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Skipped(f"network namespaces cannot be made here: {done.stderr.strip()}")
