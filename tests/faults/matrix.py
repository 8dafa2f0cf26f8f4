"""The matrix: what goes wrong, how it is made to, and the function that does so and looks at what came of it."""

from collections.abc import Callable
from dataclasses import dataclass

from tests.faults import cluster, disk, inputs, kills, poison, scale, stops
from tests.faults.bench import Bench


@dataclass(frozen=True, slots=True)
class Case:
    """make_happen returns how often and with what result; it raises AssertionError, or Skipped with what is missing.

    quick: a short form of it is among the other tests; what is not has tests of its own there.
    """

    name: str
    fault: str
    how: str
    make_happen: Callable[[Bench], str]
    quick: bool = True


CASES = [
    Case("parent-killed", "the parent killed at a random moment", "os.kill, seeded delays", kills.parent_at_random),
    Case("dataset-killed", "... while it writes a dataset", "os.kill", kills.dataset_at_random, quick=False),
    Case("parent-killed-at-call", "... at each rename, fsync, unlink", "strace", kills.parent_at_each_change),
    Case("worker-killed", "a worker killed at a random moment", "os.kill, seeded delays", kills.workers_at_random),
    Case("worker-killed-at-fsync", "... when its part is written", "strace", kills.a_worker_at_each_fsync, quick=False),
    Case("worker-dies-once", "... in the middle of a row", "a marked row", poison.worker_dies_once, quick=False),
    Case("poison-rows", "rows that end their worker every time", "marked rows", poison.poison_rows, quick=False),
    Case("hanging-rows", "rows that hang their worker", "marked rows, --row-timeout", poison.hanging_rows, quick=False),
    Case("retry-failed", "... and are tried once more", "--retry-failed", poison.retry_failed, quick=False),
    Case("signals", "SIGTERM, SIGINT at a random moment", "os.kill, os.killpg", stops.signalled),
    Case("signals-hang", "... once and twice, while workers hang", "os.kill", stops.signalled_while_a_worker_hangs),
    Case("time-limit", "the time is over", "--time-limit", stops.time_limit, quick=False),
    Case("status-file", "somebody reads the status at any moment", "a loop", stops.status_file, quick=False),
    Case("twenty-starts", "twenty starts on one output", "at once", stops.twenty_at_once),
    Case("error-at-call", "EIO, ENOSPC at each write, fsync, rename", "strace", disk.error_at_each_call),
    Case("error-at-worker-fsync", "... at the n-th fsync of a worker", "strace -f", disk.error_at_fsync_of_a_worker),
    Case("file-size-limit", "files that may not grow", "RLIMIT_FSIZE", disk.file_size_limit),
    Case("disk-full", "a full disk, and then room", "a tmpfs in a namespace", disk.small_tmpfs),
    Case("read-only", "a read-only folder", "a mount in a namespace", disk.read_only),
    Case("mistakes", "input, output or column not usable", "as named", inputs.refused_before_any_model, quick=False),
    Case("damaged-shards", "a shard truncated, a byte changed", "at random", inputs.damaged_shards),
    Case("server", "a server that drops, stalls, lies", "http.server", inputs.server, quick=False),
    Case("bad-lines", "lines that are broken in every way", "fuzzed lines", inputs.fuzzed_lines),
    Case("zero-rows", "no rows", "empty and blank files", inputs.zero_rows, quick=False),
    Case("duplicate-ids", "ids that come twice", "every id twice", inputs.duplicate_ids, quick=False),
    Case("ten-million-rows", "memory with ten times the rows", "a stub model", scale.ten_million_rows),
    Case("many-chunks", "memory with ten times the chunks", "a stub model", scale.hundred_thousand_chunks),
    Case("cluster-dask", "a Dask worker killed every 10 s", "os.kill", cluster.dask_workers_killed, quick=False),
    Case("cluster-ray", "a Ray worker killed every 10 s", "os.kill", cluster.ray_workers_killed, quick=False),
    Case("cluster-partition", "a host of two cut off", "network namespaces", cluster.partition, quick=False),
    Case("overhead", "nothing at all", "beside the bare engine", scale.overhead),
]
