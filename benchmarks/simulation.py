"""A run on a cluster, simulated event by event: a parent, a scheduler, workers that are slow, die and come back.

The parent does what run.py and pool.py do, one thing at a time: give out chunks (read, tokenize, validate, pickle)
while fewer than workers + look_ahead are out, look which have come back, commit those one by one, begin again. The
scheduler hands a chunk to a worker that has none. A worker that is lost costs the chunk that it was on, which is
done again once that is noticed. Equal parameters give equal results, to the bit.
"""

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from math import log
from typing import Any

import numpy as np

MEASURED, ASSUMED, CHOSEN = "measured", "assumed", "chosen"


def parameter(default: Any, basis: str, meaning: str) -> Any:
    return field(default=default, metadata={"basis": basis, "meaning": meaning})


@dataclass(frozen=True, slots=True)
class Cluster:
    """A job and what it runs on; times in seconds, sizes in bytes. Each field says whether it was measured."""

    rows: int = parameter(1_000_000_000, CHOSEN, "input rows")
    chunk_rows: int = parameter(512, CHOSEN, "rows a chunk (--chunk-rows; 512 is the most that auto takes)")
    workers: int = parameter(1000, CHOSEN, "worker processes, one a core")
    workers_per_node: int = parameter(32, CHOSEN, "of them on one node")
    look_ahead: int = parameter(1, CHOSEN, "chunks given out beyond one a worker (pool.py: 1)")
    seed: int = parameter(0, CHOSEN, "of everything random")
    # ---- a worker
    row_s: float = parameter(0.291, MEASURED, "of one worker for a row: 64 tokens at 220/s, 124M's shape, workload W1")
    row_spread_s: float = parameter(0.103, MEASURED, "standard deviation of that: W1's prompts at 840 tokens/s")
    startup_s: float = parameter(
        2.0, ASSUMED, "before a process's first chunk: imports, mapping (tales on loky: 1 s, measured)"
    )
    node_spread: float = parameter(0.1, ASSUMED, "sigma of the log-normal speeds of nodes, median 1")
    straggler_share: float = parameter(0.02, ASSUMED, "of the nodes, which are slow")
    straggler_speed: float = parameter(1 / 3, ASSUMED, "of a slow node")
    # ---- what goes wrong
    worker_mtbf_s: float = parameter(720 * 3600.0, ASSUMED, "between two losses of one worker process")
    node_mtbf_s: float = parameter(6000 * 3600.0, ASSUMED, "between two losses of one node (0: never; so above)")
    worker_restart_s: float = parameter(30.0, ASSUMED, "until a lost process is back")
    node_restart_s: float = parameter(900.0, ASSUMED, "until a lost node is back")
    worker_notice_s: float = parameter(1.0, ASSUMED, "until its loss is known: a connection that closes")
    node_notice_s: float = parameter(300.0, ASSUMED, "the same of a node that falls silent (dask's worker-ttl)")
    cut_off_share: float = parameter(0.1, ASSUMED, "of the lost nodes: cut off, their results come late and twice")
    # ---- the parent
    validate_s: float = parameter(40e-6, MEASURED, "of the parent a row: read, tokenize (as GPT-2), validate")
    pickle_s: float = parameter(5.2e-6, MEASURED, "of the parent a row: pickled for sending")
    payload: float = parameter(835.0, MEASURED, "bytes a row on the wire")
    network: float = parameter(1.25e9, ASSUMED, "bytes/s out of the parent, and of the scheduler: 10 Gbit/s")
    wait_s: float = parameter(0.35e-6, MEASURED, "of the parent for each chunk that is out, each time it looks")
    scheduler_s: float = parameter(1e-3, ASSUMED, "of the scheduler for a chunk, besides its bytes (dask's own figure)")
    # ---- the shared file system
    write_s: float = parameter(
        0.02, ASSUMED, "of a worker for a part: create, write, fsync, read back; mean (local 4e-3)"
    )
    write_sigma: float = parameter(1.5, ASSUMED, "its tail: sigma of a log-normal, 0 is none")
    commit_s: float = parameter(
        4e-3, ASSUMED, "of the parent for a part: rename, fsync of the folder; mean (local 0.15e-3)"
    )
    commit_sigma: float = parameter(1.0, ASSUMED, "its tail")

    @property
    def chunks(self) -> int:
        return -(-self.rows // self.chunk_rows)

    @property
    def nodes(self) -> int:
        return -(-self.workers // self.workers_per_node)

    @property
    def give_out_s(self) -> float:
        """Of the parent for a full chunk, up to the last byte sent."""
        return self.chunk_rows * (self.validate_s + self.pickle_s + self.payload / self.network)

    @property
    def handle_s(self) -> float:
        """Of the scheduler for a full chunk: it takes the bytes in and sends them out."""
        return self.scheduler_s + 2 * self.chunk_rows * self.payload / self.network


def basis_of(name: str) -> tuple[str, str]:
    """(measured, assumed or chosen; meaning) of a parameter."""
    found = next(f for f in fields(Cluster) if f.name == name)
    return found.metadata["basis"], found.metadata["meaning"]


@dataclass(slots=True)
class Result:
    """What became of a simulated run, in seconds; those of workers are sums over them, with idle what remains."""

    cluster: Cluster
    ideal: float  # all work over all speed
    makespan: float = 0.0
    useful: float = 0.0  # of workers: chunks that were committed
    wasted: float = 0.0  # ... chunks that were lost, or came a second time
    writing: float = 0.0
    starting: float = 0.0
    down: float = 0.0
    giving_out: float = 0.0  # of the parent
    looking: float = 0.0
    committing: float = 0.0
    handling: float = 0.0  # of the scheduler
    half_given: float = 0.0  # when half of the chunks had been given out, and when all
    last_given: float = 0.0
    losses: int = 0  # chunks
    twice: int = 0  # results that came for a committed chunk
    commits: list[int] = field(default_factory=list)  # by chunk

    @property
    def efficiency(self) -> float:
        return self.ideal / self.makespan

    @property
    def utilisation(self) -> float:
        return self.useful / (self.makespan * self.cluster.workers)

    @property
    def idle(self) -> float:
        worked = self.useful + self.wasted + self.writing + self.starting + self.down
        return self.makespan * self.cluster.workers - worked

    @property
    def parent_busy(self) -> float:
        return (self.giving_out + self.looking + self.committing) / self.makespan


def log_normal(rng: np.random.Generator, mean: float, sigma: float, n: int) -> list[float]:
    """n draws of that mean; sigma 0 is the mean itself."""
    if mean <= 0:
        return [0.0] * n
    values: list[float] = rng.lognormal(log(mean) - sigma**2 / 2, sigma, n).tolist()
    return values


def draw_speeds(c: Cluster, rng: np.random.Generator) -> list[float]:
    """Of each worker: that of its node."""
    nodes = rng.lognormal(0.0, c.node_spread, c.nodes)
    slow = rng.permutation(c.nodes)[: round(c.straggler_share * c.nodes)]
    nodes[slow] *= c.straggler_speed
    speeds: list[float] = np.repeat(nodes, c.workers_per_node)[: c.workers].tolist()
    return speeds


def draw_work(c: Cluster, rng: np.random.Generator) -> list[float]:
    """Seconds of a worker of speed 1 for each chunk: sums of rows, drawn from a gamma of their mean and variance."""
    rows = np.full(c.chunks, float(c.chunk_rows))
    rows[-1] = c.rows - (c.chunks - 1) * c.chunk_rows
    if c.row_spread_s == 0:
        return list((rows * c.row_s).tolist())
    shape, scale = (c.row_s / c.row_spread_s) ** 2, c.row_spread_s**2 / c.row_s
    return list(rng.gamma(rows * shape, scale).tolist())


# kinds of events, in the order in which they happen at one instant
DONE, UP, AGAIN, RECEIPT, PARENT, WORKER_LOST, NODE_LOST = range(7)
NONE = -1


class Simulation:
    """The state of one run; `run` ends it. Events are (time, number, kind, a, b), the number breaking ties."""

    def __init__(self, cluster: Cluster, starts: Sequence[float] = ()) -> None:
        c = self.c = cluster
        rng = np.random.default_rng(c.seed)
        self.speed, self.work = draw_speeds(c, rng), draw_work(c, rng)
        self.write = log_normal(rng, c.write_s, c.write_sigma, c.chunks)
        self.commit = log_normal(rng, c.commit_s, c.commit_sigma, c.chunks)
        self.random = np.random.default_rng((c.seed, 1))
        self.result = Result(c, sum(self.work) / sum(self.speed), commits=[0] * c.chunks)
        self.events: list[tuple[float, int, int, int, int]] = []
        self.n_events = 0
        # workers
        self.on = [NONE] * c.workers  # the chunk that each has
        self.since = [0.0] * c.workers  # when it began that
        self.life = [0] * c.workers  # goes up with every loss: what a lost worker would have done is void
        self.up = [True] * c.workers
        self.fresh = [True] * c.workers  # its process has not had a chunk yet
        self.idle = deque(range(len(starts), c.workers))
        for worker, at in enumerate(starts):
            self.up[worker] = False
            self._push(at, UP, worker)
        # scheduler
        self.queue: deque[int] = deque()
        self.scheduler_free = 0.0
        # parent
        self.next_chunk = self.out = self.done = 0
        self.inbox: deque[int] = deque()
        self.batch: deque[int] = deque()  # of the inbox, what it has seen
        self.asleep = False
        self.doing = NONE  # the chunk that it is committing

    def run(self) -> Result:
        c, events = self.c, self.events
        self._push(0.0, PARENT)
        self._next_loss(0.0, WORKER_LOST, c.worker_mtbf_s / c.workers)
        self._next_loss(0.0, NODE_LOST, c.node_mtbf_s / c.nodes)
        handlers = [self._worker_done, self._worker_up, self._again, self._receipt, self._parent]
        handlers += [self._worker_lost, self._node_lost]
        while self.done < c.chunks:
            now, _, kind, a, b = heapq.heappop(events)
            handlers[kind](now, a, b)
        self.result.makespan = now
        for worker in range(c.workers):
            self._close_account(worker, now)
        return self.result

    def _push(self, time: float, kind: int, a: int = NONE, b: int = NONE) -> None:
        self.n_events += 1
        heapq.heappush(self.events, (time, self.n_events, kind, a, b))

    # ---- the parent

    def _parent(self, now: float, *_: int) -> None:
        """What it was doing is done; go on with the next thing."""
        c, r = self.c, self.result
        if self.doing != NONE:
            r.commits[self.doing] += 1
            self.done += 1
            self.out -= 1
            self.doing = NONE
        while self.batch:
            chunk = self.batch.popleft()
            if r.commits[chunk]:
                r.twice += 1
                continue
            self.doing = chunk
            r.committing += self.commit[chunk]
            self._push(now + self.commit[chunk], PARENT)
            return
        if self.next_chunk < c.chunks and self.out < c.workers + c.look_ahead:
            seconds = c.give_out_s
            r.giving_out += seconds
            if self.next_chunk == c.chunks // 2:
                r.half_given = now + seconds
            r.last_given = now + seconds
            self._schedule(now + seconds, self.next_chunk)
            self.next_chunk += 1
            self.out += 1
            self._push(now + seconds, PARENT)
        elif self.inbox:
            self.batch, self.inbox = self.inbox, deque()
            seconds = c.wait_s * self.out
            r.looking += seconds
            self._push(now + seconds, PARENT)
        else:
            self.asleep = True

    def _receipt(self, now: float, chunk: int, _: int) -> None:
        self.inbox.append(chunk)
        if self.asleep:
            self.asleep = False
            self._push(now, PARENT)

    # ---- the scheduler

    def _handled(self, now: float, seconds: float) -> float:
        """When the scheduler, which does one thing after another, is done with this."""
        self.result.handling += seconds
        self.scheduler_free = max(self.scheduler_free, now) + seconds
        return self.scheduler_free

    def _schedule(self, now: float, chunk: int, *, first: bool = False) -> None:
        at = self._handled(now, self.c.handle_s)
        while self.idle:
            worker = self.idle.popleft()
            if self.up[worker] and self.on[worker] == NONE:
                self._begin(at, worker, chunk)
                return
        if first:
            self.queue.appendleft(chunk)
        else:
            self.queue.append(chunk)

    def _again(self, now: float, chunk: int, _: int) -> None:
        """A chunk is known to be lost."""
        if not self.result.commits[chunk]:
            self._schedule(now, chunk, first=True)

    # ---- workers

    def _begin(self, now: float, worker: int, chunk: int) -> None:
        seconds = self.work[chunk] / self.speed[worker] + self.write[chunk]
        if self.fresh[worker]:
            seconds += self.c.startup_s
        self.on[worker], self.since[worker] = chunk, now
        self._push(now + seconds, DONE, worker, self.life[worker])

    def _worker_done(self, now: float, worker: int, life: int) -> None:
        if life != self.life[worker]:
            return
        chunk, r = self.on[worker], self.result
        if r.commits[chunk]:
            r.wasted += self.work[chunk] / self.speed[worker]
        else:
            r.useful += self.work[chunk] / self.speed[worker]
        r.writing += self.write[chunk]
        r.starting += self.c.startup_s if self.fresh[worker] else 0.0
        self.fresh[worker], self.on[worker] = False, NONE
        self._push(now, RECEIPT, chunk)
        self._take_next(now, worker)

    def _take_next(self, now: float, worker: int) -> None:
        if self.queue:
            self._begin(max(now, self.scheduler_free), worker, self.queue.popleft())
        else:
            self.idle.append(worker)

    def _next_loss(self, now: float, kind: int, mean: float) -> None:
        if mean > 0:
            self._push(now + self.random.exponential(mean), kind)

    def _worker_lost(self, now: float, *_: int) -> None:
        worker = int(self.random.integers(self.c.workers))
        self._lose(now, worker, self.c.worker_notice_s, self.c.worker_restart_s, cut_off=False)
        self._next_loss(now, WORKER_LOST, self.c.worker_mtbf_s / self.c.workers)

    def _node_lost(self, now: float, *_: int) -> None:
        first = int(self.random.integers(self.c.nodes)) * self.c.workers_per_node
        cut_off = self.random.random() < self.c.cut_off_share
        for worker in range(first, min(first + self.c.workers_per_node, self.c.workers)):
            self._lose(now, worker, self.c.node_notice_s, self.c.node_restart_s, cut_off=cut_off)
        self._next_loss(now, NODE_LOST, self.c.node_mtbf_s / self.c.nodes)

    def _lose(self, now: float, worker: int, notice: float, restart: float, *, cut_off: bool) -> None:
        if not self.up[worker]:
            return
        chunk, r = self.on[worker], self.result
        if chunk != NONE:
            r.losses += 1
            r.wasted += max(now - self.since[worker], 0.0)
            self._push(now + notice, AGAIN, chunk)
            if cut_off:
                self._push(now + restart, RECEIPT, chunk)
        self.up[worker], self.on[worker], self.fresh[worker], self.since[worker] = False, NONE, True, now
        self.life[worker] += 1
        self._push(now + restart, UP, worker)

    def _worker_up(self, now: float, worker: int, _: int) -> None:
        self.up[worker] = True
        self.result.down += now - self.since[worker]
        self._take_next(now, worker)

    def _close_account(self, worker: int, now: float) -> None:
        """At the end: what is down, or doing for the second time what is committed."""
        if not self.up[worker]:
            self.result.down += now - self.since[worker]
        elif self.on[worker] != NONE:
            self.result.wasted += max(now - self.since[worker], 0.0)


def simulate(cluster: Cluster, starts: Sequence[float] = ()) -> Result:
    """Run a job on a cluster that is not there; starts: when the first workers come, where not all are there at 0."""
    return Simulation(cluster, starts).run()
