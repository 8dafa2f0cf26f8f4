"""How far a run is, and the seconds that are left: from the tokens that workers have done and those that are to do.

Nothing here reads a file or asks for the time. A marker may be read while it is written: its numbers nearly agree.
"""

import math
from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass, field

from batchgen.engine.sequence import Work
from batchgen.progress import Progress, WorkerState
from batchgen.workers.marker import Phase, Sighting

# What costs time, in generated tokens: about the same for all sizes of GPT-2, and errors even out over chunks.
READ_COST = 0.4  # a prompt token
STEP_COST = 32.0  # a step, besides its tokens: at the end of a chunk few sequences run
RECENT = 2.0
SURE_SECONDS = 2.0  # of work: before that, a step that ends just now makes the pace too high


def add_progress(
    done: Counter[str], resumed: Counter[str], sightings: Sequence[Sighting], committed: Container[int], rows: int
) -> Progress:
    """What is committed (`done`, of it `resumed` by earlier attempts) and what workers report; without the times."""
    now = [sighting for sighting in sightings if sighting.chunk not in committed]
    new = done - resumed
    return Progress(
        rows=min(done["input_rows"] + sum(s.rows for s in now), rows),
        rows_in_all=rows,
        prompt_tokens=new["prompt_tokens"] + sum(s.prompt_tokens for s in now),
        completion_tokens=new["completion_tokens"] + sum(s.completion_tokens for s in now),
        seconds=0.0,
        resumed_rows=resumed["input_rows"],
        workers=tuple(WorkerState(s.pid, s.chunk, s.rows, len(s.in_flight)) for s in sightings),
    )


# ---- the time left


def cost(read: float, steps: float, generated: float) -> float:
    return READ_COST * read + STEP_COST * steps + generated


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long sequences become."""

    most: float  # max_tokens, their mean
    stop: float  # the probability that a token is a sequence's last
    mean: float = 0.0  # of chunks that are done; 0: there are none yet

    def expected(self, age: float = 0.0) -> float:
        """Tokens that a sequence of this age will still have."""
        most = max(self.most - age, 0.0)
        if self.stop >= 1:
            return min(most, 1.0)
        return -math.expm1(most * math.log1p(-self.stop)) / self.stop if self.stop else most

    def longest(self, sequences: float, age: float = 0.0) -> float:
        """Tokens that the longest of several sequences will still have."""
        most = max(self.most - age, 0.0)
        return min(most, math.log(sequences + 1) / self.stop) if self.stop else most


def cost_left(one: Work, lengths: Lengths) -> float:
    """The cost of what is left of what one worker was given."""
    running, waiting = max(one.started - one.finished, 0), max(one.sequences - one.started, 0)
    if not running + waiting:
        return 0.0
    age = (one.generated - one.finished_tokens) / max(running, 1)
    mean = lengths.mean or lengths.expected()
    tokens = running * lengths.expected(age) + waiting * mean
    if lengths.mean:  # of the whole chunk; short sequences end first, so it says more than those that run now
        most = running * max(lengths.most - age, 1.0) + waiting * lengths.most
        tokens = min((one.sequences - one.ended) * mean - (one.generated - one.ended_tokens), most)
        tokens = max(tokens, running + waiting)
    last = min(max(one.batch, 1), running + waiting)  # sequences that run when no more wait
    alone = lengths.longest(last) - mean if waiting else lengths.longest(last, age) - tokens / last
    return cost(max(one.prompt_tokens - one.read, 0), tokens / last + max(alone, 0.0), tokens)


def makespan(workers: list[float], waiting: float, chunks: int) -> float:
    """When the last worker ends, if each first does what it has, and then takes chunks, which cost `waiting` in all."""
    workers = list(workers)
    few = min(chunks, 16 * len(workers))  # more even out
    for _ in range(few):
        workers[workers.index(min(workers))] += waiting / chunks
    return max(workers) + (waiting / chunks * (chunks - few) / len(workers) if chunks else 0.0)


@dataclass(slots=True)
class RecentMean:
    """A mean in which time t counts as t ** (RECENT - 1): it forgets a slow start, and soon notices a change."""

    value: float = 0.0
    time: float = 0.0

    def add(self, amount: float, time: float) -> None:
        """Something that took so much of whatever is the time here."""
        if time > 0:
            self.time += time
            self.value += min(RECENT * time / self.time, 1.0) * (max(amount, 0.0) / time - self.value)


@dataclass(slots=True)
class Outlook:
    """Sees the same run again and again. The pace is that of this attempt, from its first token on."""

    rows: int  # to do, in all attempts
    resumed: int = 0  # rows of earlier attempts
    _begun: int = 0  # rows of chunks that were begun or are done
    _chunk: int = 1  # rows of the largest chunk
    _seen: dict[int, Work] = field(default_factory=dict)  # by process id, at the last look
    _pace: RecentMean = field(default_factory=RecentMean)  # work of one worker in a second
    _stop: RecentMean = field(default_factory=RecentMean)  # sequences stopped at a token
    _looked: float | None = None  # seconds at the last look, if it saw work

    def look(
        self, sightings: Sequence[Sighting], committed: Container[int], rows_committed: int, seconds: float
    ) -> float | None:
        """Seconds left at this time of the attempt; None in its first seconds."""
        now = [sighting for sighting in sightings if sighting.chunk not in committed]
        # A worker that has begun its next chunk no longer shows the one that is about to be committed.
        self._begun = max(self._begun, min(rows_committed + sum(s.chunk_rows for s in now), self.rows))
        self._chunk = max([self._chunk, *(sighting.chunk_rows for sighting in now)])
        self._learn(sightings, seconds)
        if not sightings:  # a cluster has no markers here: rows are all that is known
            new = rows_committed - self.resumed
            return (self.rows - rows_committed) * seconds / new if new else None
        is_sure = self._pace.value and self._pace.time > SURE_SECONDS
        return self._cost_left(sightings) / self._pace.value if is_sure else None

    def _learn(self, sightings: Sequence[Sighting], seconds: float) -> None:
        """Update the pace, and how often sequences stop."""
        done = 0.0
        for sighting in sightings:
            new, old = sighting.work, self._seen.get(sighting.pid, Work())
            done += max(cost(new.read - old.read, new.steps - old.steps, new.generated - old.generated), 0.0)
            self._stop.add(new.stopped - old.stopped, new.generated - old.generated)
            self._seen[sighting.pid] = new
        if done and self._looked is not None:
            busy = sum(sighting.phase != Phase.IDLE for sighting in sightings)
            self._pace.add(done, (seconds - self._looked) * max(busy, 1))
        self._looked = seconds if done else self._looked

    def _cost_left(self, sightings: Sequence[Sighting]) -> float:
        """The cost of what is left to the worker that ends last."""
        whole = Work(*map(sum, zip(*(sighting.work.counts() for sighting in sightings), strict=True)))
        mean = whole.ended_tokens / whole.ended if whole.ended else 0.0
        lengths = Lengths(whole.max_tokens / max(whole.sequences, 1), min(self._stop.value, 0.99), mean)
        each = [cost_left(sighting.work, lengths) for sighting in sightings]
        share = self._chunk / max(sum(sighting.rows_begun for sighting in sightings), 1)
        batch = max(sighting.work.batch for sighting in sightings)
        chunk = Work(
            sequences=round(whole.sequences * share), prompt_tokens=round(whole.prompt_tokens * share), batch=batch
        )
        waiting = (self.rows - self._begun) / self._chunk
        return makespan(each, cost_left(chunk, lengths) * waiting, math.ceil(waiting))
