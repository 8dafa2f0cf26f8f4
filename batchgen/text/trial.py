"""Reads patterns in a process of their own first: some take minutes, or break off the process that reads them.

Three members of a schema can describe an automaton of a million states, and a chain of references can be as deep as
the stack. The process ends itself after SECONDS of work, however busy the machine is, and ends with this one, whose end
closes its input.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from functools import lru_cache

from batchgen.errors import BatchgenError

SECONDS = 3  # of processor time, for one pattern; a schema of 500 properties takes 0.1 s
_STACK = 2**21  # a quarter of what threads have most often, so that what is read there can be read here
_MEMORY = 2**31

# its arguments are the paths from which this process imports, and none is the folder that it is started in
_PROGRAM = f"""
import sys
sys.path[:] = sys.argv[1:]
import json, resource, signal, threading, llguidance
limits, bytes = llguidance.LLParserLimits(verbose_errors=False), llguidance.LLTokenizer("byte")
def answer():
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, {SECONDS})
        matcher = llguidance.LLMatcher(bytes, json.loads(line), log_level=0, limits=limits)
        matcher.compute_bitmask()
        signal.setitimer(signal.ITIMER_PROF, 0)
        print("read", flush=True)
signal.signal(signal.SIGPROF, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_AS, ({_MEMORY}, resource.RLIM_INFINITY))
threading.stack_size({_STACK})
threading.Thread(target=answer).start()
"""
_TOO_LONG = f"it takes more than {SECONDS} s to read"
_TOO_LARGE = "it is nested too deeply, or too large"
# how the process ends over a pattern; 0: an exception, such as MemoryError, ends the thread
_CAUSES = {-signal.SIGPROF: _TOO_LONG} | dict.fromkeys(
    (0, -signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT), _TOO_LARGE
)


class _Reader:
    """The process, started when it is needed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        atexit.register(self.close)

    def read(self, grammar: str) -> str | None:
        """Why the process ended over this grammar; None if it did not. BatchgenError if something else ended it."""
        with self._lock:
            for _ in range(2):  # it may have been killed while it waited
                ended = self._try(grammar)
                if ended is None or ended in _CAUSES:
                    return None if ended is None else _CAUSES[ended]
        assert ended is not None
        what = f"exit code {ended}" if ended > 0 else f"signal {-ended}"
        raise BatchgenError(
            f"the process that reads patterns ended twice with {what}; run again, with more memory free"
        )

    def _try(self, grammar: str) -> int | None:
        """The return code of the process, if it ends over this grammar."""
        process = self._process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        answer = ""
        try:
            print(json.dumps(grammar), file=process.stdin, flush=True)
            answer = process.stdout.readline()
        except OSError:
            pass
        except BaseException:  # Ctrl-C: its answer would be taken for that to the next grammar
            process.kill()
            self.close()
            raise
        if not answer:
            self.close()
        return None if answer else process.wait()

    @staticmethod
    def _start() -> subprocess.Popen[str]:
        """In a session of its own: a Ctrl-C is meant for the run, which may go on reading patterns for a while."""
        pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
        command = [sys.executable, "-c", _PROGRAM, *sys.path]
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=nothing, text=True, start_new_session=True)

    def close(self) -> None:
        """Wait for the process, which ends with its input."""
        process, self._process = self._process, None
        if process is not None:
            with suppress(BrokenPipeError), process:  # closes its pipes; what it did not read is lost
                pass

    def forget(self) -> None:
        """In a forked process: the process is the parent's, and so may be the lock."""
        self._process, self._lock = None, threading.Lock()


_reader = _Reader()
os.register_at_fork(after_in_child=_reader.forget)


@lru_cache(maxsize=256)
def why_unreadable(grammar: str) -> str | None:
    """Why a grammar cannot be read in little time and memory; None if it can, or its error can."""
    return _reader.read(grammar)
