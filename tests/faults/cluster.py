"""Faults of a cluster: two workers on loopback, or two hosts in network namespaces."""

import json
import os
import random
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.faults.bench import Bench, Run, Skipped, count_parts, find_tool, wait_for
from tests.support.clusters import Cluster, DaskCluster, MissingError, RayCluster, free_port, kill

KILL_SECONDS = 10.0
SLOWDOWN = 1.5
SECONDS = 900.0  # of one run, at most
SCHEDULER, FAR = "10.86.7.1", "10.86.7.2"


def kill_dask_workers(bench: Bench) -> str:
    return _kill_workers(bench, DaskCluster)


def kill_ray_workers(bench: Bench) -> str:
    return _kill_workers(bench, RayCluster)


def _kill_workers(bench: Bench, kind: type[DaskCluster | RayCluster]) -> str:
    """Every ten seconds, kill one of the cluster's two workers, with its node process, its chunk and its model."""
    prompts, options = _make_prompts(bench, 2000 if bench.full else 200)
    with _start_cluster(kind, bench) as cluster:
        here, undisturbed, disturbed = (bench.new_output() for _ in range(3))
        _finish(bench.start(here, *options, prompts=prompts))
        calm = _finish(bench.start(undisturbed, *options, *cluster.options, prompts=prompts))
        run = bench.start(disturbed, *options, *cluster.options, prompts=prompts)
        kills = _kill_every(KILL_SECONDS if bench.full else calm / 3, cluster, run)
        seconds = _finish(run)
        assert undisturbed.read_bytes() == disturbed.read_bytes() == here.read_bytes()
        bench.assert_alone(disturbed)
        assert kills, "no worker was killed"
        assert seconds < SLOWDOWN * calm or not bench.full, (seconds, calm)
        assert wait_for(lambda: not cluster.nodes(), 20.0), "node processes are left"
    return f"{len(kills)} kills: exit 0, identical to one machine's, {seconds:.1f} s; undisturbed {calm:.1f} s"


def _make_prompts(bench: Bench, n: int) -> tuple[Path, list[str]]:
    """Prompts for the model tales, and the options of a run that completes them."""
    path = bench.new_folder() / "prompts.jsonl"
    lines = [
        json.dumps({"prompt": f"Once upon a time there were {row} brothers, and the", "seed": row}) for row in range(n)
    ]
    path.write_text("\n".join(lines) + "\n")
    more = ["--max-tokens", "100", "--ignore-eos"] if bench.full else []
    return path, ["--model", "tales", "--chunk-rows", "40", *more]


def _finish(run: Run) -> float:
    """Wait for a run that must end well; returns its seconds."""
    assert run.finish(SECONDS) == 0, run.said
    return run.seconds


def _kill_every(seconds: float, cluster: Cluster, run: Run) -> list[int]:
    """Kill a worker every so many seconds, in a thread, while the run lives; the returned list of pids grows."""
    rng, killed = random.Random(6), []

    def kill_workers() -> None:
        while not wait_for(lambda: run.process.poll() is not None, seconds):
            if victims := cluster.engine_workers():
                killed.append(rng.choice(victims))
                kill(killed[-1])

    threading.Thread(target=kill_workers, daemon=True).start()
    return killed


@contextmanager
def _start_cluster(kind: type[DaskCluster | RayCluster], bench: Bench) -> Iterator[DaskCluster | RayCluster]:
    try:
        cluster = kind(bench.new_folder())
    except MissingError as reason:
        raise Skipped(str(reason)) from reason
    try:
        yield cluster
    finally:
        cluster.stop()


# ---- two hosts


def cut_off_host(bench: Bench) -> str:
    """One of two hosts is cut off while it works, for good."""
    prompts, options = _make_prompts(bench, 400 if bench.full else 200)
    here, out = bench.new_output(), bench.new_output()
    _finish(bench.start(here, *options, prompts=prompts))
    with _make_hosts() as (near, far), _start_workers(bench, near, far) as cluster:
        run = bench.start(out, *options, *cluster.options, prompts=prompts, before=(*_run_on(near),))
        run.until(lambda: count_parts(out) >= 2 and len(cluster.nodes()) == 2)
        _ip("netns", "exec", far, "ip", "link", "set", "veth-far", "down")
        committed, started = count_parts(out), time.monotonic()
        _finish(run)
        seconds = time.monotonic() - started
        assert out.read_bytes() == here.read_bytes()
        bench.assert_alone(out)
        assert wait_for(lambda: not cluster.nodes(), 20.0), "node processes are left"
    return f"cut off after {committed} chunks: exit 0 {seconds:.1f} s later, identical"


@contextmanager
def _start_workers(bench: Bench, near: str, far: str) -> Iterator[Cluster]:
    """A scheduler and a worker on the near host, and a worker on the far host."""
    cluster = Cluster(bench.new_folder())
    port = free_port()
    cluster.backend, cluster.option, cluster.address = "dask", "--scheduler", f"tcp://{SCHEDULER}:{port}"
    try:
        command = ["distributed.cli.dask_scheduler", "--host", SCHEDULER, "--port", str(port), "--no-dashboard"]
        cluster.start(*command, before=_run_on(near))
        for host, address in ((near, SCHEDULER), (far, FAR)):
            options = ["--host", address, "--nworkers", "1", "--nthreads", "1", "--no-dashboard"]
            cluster.start("distributed.cli.dask_worker", cluster.address, *options, before=_run_on(host))
        assert wait_for(lambda: cluster.log().count("Starting established connection") >= 2, 60.0), cluster.log()
        yield cluster
    finally:
        cluster.stop()


def _run_on(host: str) -> tuple[str, ...]:
    return find_tool("ip"), "netns", "exec", host


@contextmanager
def _make_hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces joined by a virtual cable; they share this machine's files."""
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
    done = subprocess.run([find_tool("ip"), *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Skipped(f"network namespaces cannot be made here: {done.stderr.strip()}")
