"""Which chunk is next, and until when."""

import time
from collections import deque
from collections.abc import Callable, Iterator

from batchgen.errors import BatchgenError, StoppedError
from batchgen.options import say
from batchgen.progress import Reporter
from batchgen.types import Chunk


class Supply:
    """Chunks to give out: first those that are done again, then those of the run."""

    def __init__(self, chunks: Iterator[Chunk]) -> None:
        self.again: deque[Chunk] = deque()
        self.failure: Exception | None = None  # raised by `chunks`; for the end, when all given-out chunks are done
        self._chunks = chunks

    def take(self) -> Chunk | None:
        """The next chunk; None if there is none now."""
        if self.again:
            return self.again.popleft()
        try:
            return next(self._chunks, None)
        except Exception as error:
            self._chunks, self.failure = iter(()), error
            return None


class Deadline:
    """When a run must stop."""

    def __init__(self, seconds: float | None) -> None:
        """seconds from now; None: never."""
        self.seconds = seconds
        self._end = None if seconds is None else time.monotonic() + seconds

    def is_over(self, margin: float = 0.0) -> bool:
        """Whether fewer than `margin` seconds are left; a negative margin adds time."""
        return self._end is not None and time.monotonic() + margin > self._end

    def limit(self, chunks: Iterator[Chunk], longest: Callable[[], float]) -> Iterator[Chunk]:
        """Yield chunks only while they will probably be done in time; longest() is the seconds of the longest so far.

        A chunk that is given out waits for a worker about as long as it then takes.
        """
        for chunk in chunks:
            if self.is_over(2 * longest()):
                return
            yield chunk

    def check_complete(self, run: Reporter, rows: int) -> None:
        """Raise StoppedError if rows are missing because time was over, and BatchgenError if they are for no reason."""
        done = run.counts["input_rows"]
        if done == rows:
            return
        if self.seconds is not None and done < rows:
            new = done > run.resumed["input_rows"]
            remedy = "run the same command again to resume" if new else "nothing was done: raise it"
            remedy = "a retry begins anew each time: raise it" if run.is_retry else remedy
            raise StoppedError(f"{say('time_limit')} {self.seconds:g} s: {done:,} of {rows:,} rows are done; {remedy}")
        remedy = f"if the input was changed meanwhile, run again with {say('restart', True)}"
        raise BatchgenError(f"input: {rows} rows were counted and {done} were done; {remedy}")
