"""The matrix: each fault, what causes it, and the function that causes it and checks the outcome."""

from collections.abc import Callable
from dataclasses import dataclass

from tests.faults import cluster, disk, input_swaps, inputs, kills, limits, model_swaps, poison, scale, stops
from tests.faults.bench import Bench


@dataclass(frozen=True, slots=True)
class Case:
    """`cause` returns how often and with which outcome; it raises AssertionError, or Skipped if a tool is missing.

    quick: tests/test_faults.py runs it in a short form; the other faults have tests in their modules.
    """

    name: str
    fault: str
    how: str
    cause: Callable[[Bench], str]
    quick: bool = True


CASES = [
    Case("parent-killed", "the parent is killed at a random moment", "os.kill, seeded delays", kills.kill_parent),
    Case("dataset-killed", "... while it writes a dataset", "os.kill", kills.kill_parent_of_dataset, quick=False),
    Case("parent-killed-at-call", "... at each rename, fsync, unlink", "strace", kills.kill_parent_at_each_call),
    Case("worker-killed", "a worker is killed at a random moment", "os.kill, seeded delays", kills.kill_workers),
    Case("worker-killed-at-fsync", "... when its part is written", "strace", kills.kill_worker_at_fsync, quick=False),
    Case("trial-killed", "... that tries rows alone", "os.kill, slow steps", kills.kill_all_workers, quick=False),
    Case("worker-dies-once", "... in the middle of a row", "a marked row", poison.kill_worker_once, quick=False),
    Case("poison-rows", "rows that end their worker every time", "marked rows", poison.poison_rows, quick=False),
    Case("hanging-rows", "rows that hang their worker", "marked rows, --row-timeout", poison.hang_rows, quick=False),
    Case("slow-disk", "a disk slower than --row-timeout", "a slow fsync", poison.slow_down_disk, quick=False),
    Case("retry-failed", "... and are tried again", "--retry-failed", poison.retry_failed, quick=False),
    Case("signals", "SIGTERM, SIGINT at a random moment", "os.kill, os.killpg", stops.send_signals),
    Case("signals-at-end", "... from the publication on", "strace", stops.send_signals_at_the_end, quick=False),
    Case("signals-hang", "... once and twice, while workers hang", "os.kill", stops.send_signals_while_workers_hang),
    Case("stopped", "processes are stopped, and continue", "SIGSTOP", stops.stop_and_continue, quick=False),
    Case("time-limit", "the time limit is reached", "--time-limit", stops.reach_time_limits, quick=False),
    Case("status-file", "the status is read at any moment", "a loop", stops.read_status, quick=False),
    Case("twenty-starts", "twenty starts on one output", "together", stops.start_twenty),
    Case("error-at-call", "EIO, ENOSPC at each write, fsync, rename", "strace", disk.fail_each_call),
    Case("error-at-worker-fsync", "... at the n-th fsync of a worker", "strace -f", disk.fail_worker_fsync),
    Case("damaged-parts", "a committed part is damaged later", "at random", disk.damage_parts, quick=False),
    Case("file-size-limit", "files that cannot grow", "RLIMIT_FSIZE", disk.limit_file_size),
    Case("disk-full", "a full disk, later with room", "a tmpfs in a namespace", disk.fill_disk),
    Case("read-only", "a read-only folder", "a mount in a namespace", disk.refuse_read_only_folder),
    Case("process-limit", "few processes and threads", "RLIMIT_NPROC", limits.limit_processes, quick=False),
    Case("open-file-limit", "few open files", "RLIMIT_NOFILE", limits.limit_open_files, quick=False),
    Case("no-shared-memory", "no room in /dev/shm", "a tmpfs", limits.fill_shared_memory, quick=False),
    Case("mistakes", "input, output or column not usable", "one mistake a run", inputs.make_mistakes, quick=False),
    Case("input-swapped", "an input is swapped at a random moment", "write, rename, put back", input_swaps.swap_inputs),
    Case("model-swapped", "the model is replaced while workers die", "at random moments", model_swaps.swap_models),
    Case("damaged-shards", "a shard truncated, a byte changed", "at random", inputs.damage_shards),
    Case("server", "a server that drops, stalls, lies", "http.server", inputs.run_download_tests, quick=False),
    Case("bad-lines", "lines that are broken in every way", "fuzzed lines", inputs.fuzz_lines),
    Case("kept-values", "kept values that JSON cannot hold", "Parquet, JSON", inputs.keep_strange_values, quick=False),
    Case("edited-output", "an output edited before a retry", "Parquet", inputs.edit_outputs, quick=False),
    Case("zero-rows", "no rows", "empty and blank files", inputs.read_no_rows, quick=False),
    Case("duplicate-ids", "ids that appear twice", "every id twice", inputs.repeat_ids, quick=False),
    Case("ten-million-rows", "memory with ten times the rows", "a stub model", scale.measure_rows),
    Case("many-chunks", "memory with ten times the chunks", "a stub model", scale.measure_chunks, quick=False),
    Case("cluster-dask", "a Dask worker is killed every 10 s", "os.kill", cluster.kill_dask_workers, quick=False),
    Case("cluster-ray", "a Ray worker is killed every 10 s", "os.kill", cluster.kill_ray_workers, quick=False),
    Case("cluster-partition", "one of two hosts is cut off", "network namespaces", cluster.cut_off_host, quick=False),
    Case("overhead", "none: the time of all this", "beside the bare engine", scale.measure_overhead),
]
