"""A simulated run: a parent sends chunks and commits them, a scheduler gives them to workers, workers are lost.

The parent does one thing at a time, as workers/pool.py does: it prepares and sends chunks while fewer than
workers + look_ahead are in flight, checks which are finished, commits those one after another, and starts over. The
scheduler gives a chunk to the worker that is free first. A lost worker loses its chunk, and a worker does the chunk
again after the loss is noticed. Idle workers are never lost. Equal parameters give equal results, bit for bit.
"""

from collections import Counter
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Any

import numpy as np

WORKER_ACTIVITIES = ("generating", "lost work", "writing parts", "starting", "down", "idle")
OTHER_ACTIVITIES = ("parent: sending", "parent: committing", "parent: checking", "scheduler")

# Measured numbers, here and below, are of two cores of an Intel Xeon (AVX-512), ext4 on a virtual disk, 2026-11-25.
# Cost of a row by rows of a chunk, relative to 192 rows; few rows make matrix products slow (shape of 124M).
RELATIVE_COST = ((16, 1.82), (64, 1.14), (192, 1.0))
OPEN_S = 2e-3  # assumed: open or remove a file of a shared file system that is in no cache
OUTSIDE_S = {  # of the parent outside the chunks: seconds for each part, seconds for each row
    "scan": (0.0, 1.2e-6),  # count and hash
    "read again": (0.0, 6.2e-6),  # on resume
    "check parts": (1.4e-4 + OPEN_S, 1.7e-7),  # on resume: hash a part and read its receipt
    "merge": (8.2e-4 + OPEN_S, 1.9e-6),
    "remove parts": (7e-6 + OPEN_S, 0.0),
}


def parameter(default: Any, meaning: str) -> Any:
    """A field of Cluster, which is also an option of the command line."""
    return field(default=default, metadata={"meaning": meaning})


@dataclass(frozen=True, slots=True)
class Cluster:
    """A job and the cluster that runs it. A field that ends in _s is in seconds."""

    rows: int = parameter(1_000_000_000, "chosen: input rows")
    chunk_rows: int = parameter(512, "chosen: rows of a chunk (batchgen chooses 512 at most)")
    workers: int = parameter(1000, "chosen: worker processes, one on each core")
    workers_per_node: int = parameter(32, "chosen: worker processes of one node")
    look_ahead: int = parameter(1, "chosen: chunks in flight beyond one for each worker (batchgen: 1)")
    seed: int = parameter(0, "chosen: seed of every random draw")
    row_s: float = parameter(0.291, "measured: a worker generates a row of W1: 64 tokens at 220/s, shape of 124M")
    row_spread_s: float = parameter(0.103, "measured: its standard deviation: prompts of W1 at 840 tokens/s")
    validate_s: float = parameter(40e-6, "measured: the parent reads, tokenizes (as GPT-2) and validates a row")
    pickle_s: float = parameter(5.2e-6, "measured: the parent pickles a row")
    row_bytes: float = parameter(835.0, "measured: bytes of a pickled row")
    wait_s: float = parameter(0.35e-6, "measured: the parent checks which chunks are finished, for each in flight")
    network: float = parameter(1.25e9, "assumed: bytes/s that the parent and the scheduler send: 10 Gbit/s")
    scheduler_s: float = parameter(1e-3, "assumed: the scheduler handles a chunk, without its bytes (Dask's figure)")
    startup_s: float = parameter(2.0, "assumed: a worker imports and maps the model (measured for tales on loky: 1)")
    write_s: float = parameter(0.02, "assumed: a worker writes, fsyncs and reads back a part (local disk: 0.004)")
    commit_s: float = parameter(4e-3, "assumed: the parent renames a part, fsyncs the folder (local disk: 0.00015)")
    node_spread: float = parameter(0.1, "assumed: sigma of the log-normal speeds of nodes; the median is 1")
    straggler_share: float = parameter(0.02, "assumed: share of slow nodes")
    straggler_speed: float = parameter(1 / 3, "assumed: speed of a slow node")
    worker_mtbf_s: float = parameter(720 * 3600.0, "assumed: mean time between losses of one worker; inf: never")
    node_mtbf_s: float = parameter(6000 * 3600.0, "assumed: mean time between losses of one node; inf: never")
    worker_restart_s: float = parameter(30.0, "assumed: until a lost worker is back")
    node_restart_s: float = parameter(900.0, "assumed: until a lost node is back")
    worker_notice_s: float = parameter(1.0, "assumed: until the loss of a worker is noticed: its connection closes")
    node_notice_s: float = parameter(300.0, "assumed: until the loss of a silent node is noticed (Dask's worker-ttl)")
    relative_cost: tuple[tuple[int, float], ...] = RELATIVE_COST  # no option

    @property
    def chunks(self) -> int:
        return -(-self.rows // self.chunk_rows)

    @property
    def mean_row_s(self) -> float:
        """Seconds that a worker needs for a row in chunks of this size."""
        sizes, costs = np.transpose(self.relative_cost)
        return self.row_s * float(np.interp(np.log(self.chunk_rows), np.log(sizes), costs))

    @property
    def send_s(self) -> float:
        """Seconds that the parent needs to prepare and send a full chunk."""
        return self.chunk_rows * (self.validate_s + self.pickle_s + self.row_bytes / self.network)

    @property
    def schedule_s(self) -> float:
        """Seconds that the scheduler needs for a full chunk: it receives the bytes and sends them."""
        return self.scheduler_s + 2 * self.chunk_rows * self.row_bytes / self.network

    def outside_s(self, name: str) -> float:
        """Seconds that the parent needs for one of OUTSIDE_S."""
        return self.chunks * OUTSIDE_S[name][0] + self.rows * OUTSIDE_S[name][1]


class Run:
    """The state of a run and, at its end, its result. Times are in seconds from its start."""

    def __init__(self, c: Cluster) -> None:
        rng, nodes = np.random.default_rng(c.seed), -(-c.workers // c.workers_per_node)
        speeds = rng.lognormal(0.0, c.node_spread, nodes)
        speeds[rng.permutation(nodes)[: round(c.straggler_share * nodes)]] *= c.straggler_speed
        rows = np.minimum(c.chunk_rows, c.rows - c.chunk_rows * np.arange(c.chunks))  # of each chunk
        work = rng.normal(rows * c.mean_row_s, np.sqrt(rows) * c.row_spread_s)  # as of sums of many rows
        self.cluster, self.rng = c, rng
        self.speeds: list[float] = np.repeat(speeds, c.workers_per_node)[: c.workers].tolist()  # of workers
        self.work_s: list[float] = np.maximum(work, 0.0).tolist()  # of chunks, at speed 1
        self.ideal = sum(self.work_s) / sum(self.speeds)
        self.node_lost_at = [-1.0] * nodes  # the next loss; a time in the past means that it is not drawn yet
        # heaps, by time
        self.free = [
            (0.0, worker, c.startup_s) for worker in range(c.workers)
        ]  # workers, with the seconds to start them
        self.finished: list[tuple[float, int]] = []  # chunks that the parent has not seen
        self.lost: list[tuple[float, int]] = []  # chunks, by the time when their loss is noticed
        self.now = self.scheduler_free_at = 0.0
        self.sent_at: list[float] = []  # of each chunk
        self.commits = [0] * c.chunks
        self.in_flight = self.losses = 0  # chunks
        self.spent: Counter[str] = Counter()  # seconds by activity; those of workers are sums over all workers

    def run(self) -> "Run":
        c = self.cluster
        while self.in_flight or len(self.sent_at) < c.chunks:
            while self.lost and self.lost[0][0] <= self.now:
                self.assign(*heappop(self.lost))
            if len(self.sent_at) < c.chunks and self.in_flight < c.workers + c.look_ahead:
                self.now += self.spend("parent: sending", c.send_s)
                self.assign(self.now, len(self.sent_at))
                self.sent_at.append(self.now)
                self.in_flight += 1
            elif self.finished and self.finished[0][0] <= self.now:
                self.commit()
            else:
                self.now = min(heap[0][0] for heap in (self.finished, self.lost) if heap)
        self.spent["idle"] = self.now * c.workers - sum(self.spent[activity] for activity in WORKER_ACTIVITIES)
        return self

    def assign(self, time: float, chunk: int) -> None:
        """Give the chunk to a worker; draw whether it ends well or with the loss of the worker or its node."""
        c, (free_at, worker, startup_s) = self.cluster, heappop(self.free)
        node, work_s = worker // c.workers_per_node, self.work_s[chunk] / self.speeds[worker]
        self.scheduler_free_at = max(self.scheduler_free_at, time) + self.spend("scheduler", c.schedule_s)
        begin = max(self.scheduler_free_at, free_at)
        end = begin + startup_s + work_s + c.write_s
        if self.node_lost_at[node] < begin:
            self.node_lost_at[node] = begin + c.node_mtbf_s * self.rng.exponential()
        worker_lost_at = begin + c.worker_mtbf_s * self.rng.exponential()  # memoryless: drawn anew for each chunk
        worker_loss = worker_lost_at, c.worker_notice_s, c.worker_restart_s
        node_loss = self.node_lost_at[node], c.node_notice_s, c.node_restart_s
        lost_at, notice_s, restart_s = min(worker_loss, node_loss)
        if end < lost_at:
            heappush(self.free, (end, worker, 0.0))
            heappush(self.finished, (end, chunk))
            spent = {"generating": work_s, "starting": startup_s, "writing parts": c.write_s}
        else:
            heappush(self.free, (lost_at + restart_s, worker, c.startup_s))
            heappush(self.lost, (lost_at + notice_s, chunk))
            self.losses += 1
            spent = {"lost work": lost_at - begin, "down": restart_s}
        self.spent.update(spent)

    def commit(self) -> None:
        """Commit the chunks that are finished now."""
        checked_at = self.now
        self.now += self.spend("parent: checking", self.cluster.wait_s * self.in_flight)
        while self.finished and self.finished[0][0] <= checked_at:
            _, chunk = heappop(self.finished)
            self.now += self.spend("parent: committing", self.cluster.commit_s)
            self.commits[chunk] += 1
            self.in_flight -= 1

    def spend(self, activity: str, seconds: float) -> float:
        self.spent[activity] += seconds
        return seconds

    @property
    def rate_share(self) -> float:
        """Chunks/s sent in the second half, without start and end, relative to workers that never wait nor fail."""
        first, *_, last = times = self.sent_at[len(self.sent_at) // 2 :]
        return min((len(times) - 1) / (last - first) * self.ideal / len(self.sent_at), 1.0)


def simulate(cluster: Cluster) -> Run:
    return Run(cluster).run()
