"""What the system may refuse a process, threads, processes, files and memory, and how an exception says so."""

import errno

from batchgen.errors import BatchgenError
from batchgen.options import say

# For a process that has not loaded NumPy and pyarrow yet. As many BLAS threads as cores would start in each of as many
# workers, although batchgen uses one; and jemalloc, which pyarrow loads beside the allocator that it uses, starts one.
FEW_THREADS = {"OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
NO_THREAD = ("can't start new thread", "Failed to launch worker thread")  # Python, Arrow: neither has an errno


def reached_limit(error: BaseException) -> str | None:
    """The limit that an exception of Python, Arrow or a system call reports, and the remedy; None: it reports none."""
    if isinstance(error, BatchgenError):
        return None
    number, text = getattr(error, "errno", None), str(error)
    if number == errno.EAGAIN or any(words in text for words in NO_THREAD):
        limits = "threads and processes is reached (ulimit -u, a container's pids limit), or that on memory (ulimit -v)"
        return f"the limit on {limits}; raise it or lower {say('jobs')}"
    if number in (errno.EMFILE, errno.ENFILE):
        return "the limit on open files is reached (ulimit -n); raise it"
    if number == errno.ENOMEM or isinstance(error, MemoryError):
        smaller = f"lower {say('kv_bytes')} or {say('batch_size')} with {say('restart', True)}"
        return f"out of memory ({str(error) or 'no more is given'}); lower {say('jobs')}, or {smaller}"
    return None


def reason_of(error: BaseException) -> str:
    """Why something could not be read, written or started: the limit and its remedy, or an error's first line."""
    return reached_limit(error) or (getattr(error, "strerror", None) or str(error)).strip().split("\n")[0]
