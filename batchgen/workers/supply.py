"""Which chunk is next, and until when."""

import logging
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

from batchgen.errors import BatchgenError, StoppedError, UsageError
from batchgen.options import say, shown
from batchgen.progress import Reporter
from batchgen.types import Chunk

logger = logging.getLogger(__name__)

END_OF_ALLOCATION = "SLURM_JOB_END_TIME"  # seconds since 1970, in the environment of each of Slurm's jobs
MARGIN_SECONDS = 60.0  # before it: for the commit of a late chunk, and for the merge of about ten million rows
MAX_SECONDS = 999_999_999.0  # the longest time limit
MAX_END = 253_402_300_799  # the year 9999


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

    def __init__(self, seconds: float | None, allocation: str = "") -> None:
        """seconds from now; None: never. allocation: the words for its end, if that is the reason."""
        self.seconds, self.allocation = seconds, allocation
        self._end = None if seconds is None else time.monotonic() + seconds

    @classmethod
    def find(cls, limit: float | None) -> "Deadline":
        """After the time limit that was given; without one, before the end of the Slurm job that this process is in."""
        text = os.environ.get(END_OF_ALLOCATION, "")
        if limit is not None or not text:
            return cls(limit)
        remedy = f"unset it, or give {say('time_limit')}"
        if not re.fullmatch(r"\d{1,12}", text) or int(text) > MAX_END:
            raise UsageError(f"{END_OF_ALLOCATION}={shown(text)} is no time in seconds since 1970; {remedy}")
        left = int(text) - time.time()
        end = f"the allocation ends at {datetime.fromtimestamp(int(text), UTC):%Y-%m-%d %H:%M:%S} UTC"
        if left <= 0:
            raise UsageError(f"{END_OF_ALLOCATION}={text} is past ({end}); {remedy}")
        if left <= MARGIN_SECONDS:
            what = f"{end} ({END_OF_ALLOCATION}), and a run stops {MARGIN_SECONDS:g} s before it"
            raise StoppedError(f"{what}; nothing was done: run the same command in another")
        logger.warning("note: %s; the run stops %g s before; %s overrides it", end, MARGIN_SECONDS, say("time_limit"))
        return cls(min(left - MARGIN_SECONDS, MAX_SECONDS), end)

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
            longer = "ask for a longer one" if self.allocation else "raise it"
            remedy = "run the same command again to resume" if new else f"nothing was done: {longer}"
            remedy = f"a retry begins anew each time: {longer}" if run.is_retry else remedy
            what = self.allocation or f"{say('time_limit')} {self.seconds:g} s"
            raise StoppedError(f"{what}: {done:,} of {rows:,} rows are done; {remedy}")
        remedy = f"if the input was changed meanwhile, run again with {say('restart', True)}"
        raise BatchgenError(f"input: {rows} rows were counted and {done} were done; {remedy}")
