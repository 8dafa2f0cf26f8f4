"""Beam search: the likeliest continuations of a prompt side by side, as transformers' `_beam_search` finds them.

A beam is a Sequence. A candidate is a beam and a next token; its total is the sum of the log-probabilities of the
generated tokens, and candidates are ordered by it. Of equal totals, that of the better beam comes first, then the
higher log-probability, then the lower token id. The best num_beams candidates that do not end become the next beams.
A candidate that ends is kept as a completion if it is among the best num_beams of all; of the completions, those with
the num_beams best scores stay. `Search.step` says how many candidates it looks at. A log-probability is a log-softmax
in float32 (draw.py), changed by the penalties as in transformers; totals and scores are float64, and depend on the
sequence's own tokens alone.

The beams' keys and values are blocks of one range of the arena. Beams share the blocks of their common past; a beam
copies a block if it is to write to it and others read it too (copy-on-write).
"""

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from decimal import Decimal, localcontext
from functools import lru_cache

import numpy as np

from batchgen.engine.draw import log_softmax
from batchgen.engine.penalties import penalise
from batchgen.engine.sampler import find_largest, score_tokens
from batchgen.engine.sequence import Completion, Sequence
from batchgen.gpt2.attention import copy_segment
from batchgen.gpt2.config import GPT2Config
from batchgen.gpt2.kv_cache import BLOCK, KVArena, Segment
from batchgen.gpt2.params import Array
from batchgen.types import FinishReason

# Append a token to a sequence, unless it is a stop token; why the sequence ends with it, if it does.
Take = Callable[[Sequence, int], FinishReason | None]


# ---- memory


class Blocks:
    """The keys and values of one search after its stem: blocks of BLOCK positions, and who uses them."""

    def __init__(self, arena: KVArena, room: Segment) -> None:
        self.arena, self.room = arena, room
        self.free = [*range(room.size // BLOCK - 1, -1, -1)]  # numbers of blocks; the last one is taken first
        self.users: dict[Segment, int] = {}  # beams that end in it, and blocks that continue it

    def take(self, start: int, parent: Segment | None) -> Segment:
        """An empty block, with one user."""
        offset = self.room.offset + self.free.pop() * BLOCK
        block = self.arena.at(offset, BLOCK, start, parent)
        self.users[block] = 1
        if parent in self.users:
            self.users[parent] += 1
        return block

    def _release(self, segment: Segment | None) -> None:
        """One user less; a block without users is free, and no longer a user of its parent."""
        while segment in self.users:
            self.users[segment] -= 1
            if self.users[segment]:
                return
            del self.users[segment]
            self.free.append((segment.offset - self.room.offset) // BLOCK)
            segment = segment.parent

    def _own(self, config: GPT2Config, segment: Segment) -> Segment:
        """The block that a beam which ends in `segment` writes its next position to: its own."""
        is_full = segment.length == BLOCK
        if not is_full and self.users[segment] == 1:
            return segment
        own = self.take(segment.end, segment) if is_full else self.take(segment.start, segment.parent)
        if not is_full:
            copy_segment(config, segment, own)
        self._release(segment)
        return own

    def move(self, beams: Seq[Sequence], children: Seq[Sequence]) -> None:
        """Take the blocks of beams that have no children, and give each child a block of its own to write to.

        A child has the segment of its beam.
        """
        for child in children:
            assert child.segment is not None
            self.users[child.segment] += 1
        for beam in beams:
            self._release(beam.segment)
        for child in children:
            assert child.segment is not None
            child.segment = self._own(self.arena.config, child.segment)


# ---- candidates


@dataclass(frozen=True, slots=True)
class Candidate:
    """A beam, continued by one token."""

    beam: int
    token: int
    total: float  # the sum of log-probabilities


def find_candidates(
    logits: Array, beams: Seq[Sequence], eos_ids: Seq[int], k: int
) -> tuple[list[Candidate], list[Sequence]]:
    """The k best of all, from the beams' rows of logits [n_beam, n_vocab]; and beams after which no token may come."""
    rows, keys = np.empty_like(logits), np.empty(logits.shape[1], np.int64)
    log_softmax(logits, rows)
    found: list[Candidate] = []
    blocked: list[Sequence] = []
    with np.errstate(over="ignore"):
        for number, (row, beam) in enumerate(zip(rows, beams, strict=True)):
            penalise(row, beam, eos_ids)
            ids = find_largest(row, min(k, row.size), keys)[:k]
            totals = beam.total + row[ids].astype(np.float64)
            pairs = zip(ids.tolist(), totals.tolist(), strict=True)
            own = [Candidate(number, token, total) for token, total in pairs if total > -np.inf]
            found += own
            blocked += [] if own else [beam]
    found.sort(key=lambda one: -one.total)  # equal ones stay in their order
    return found[:k], blocked


@lru_cache(maxsize=4096)
def power(length: int, length_penalty: float) -> float:
    """length ** length_penalty, the same on every processor."""
    with localcontext(prec=40):  # in software
        return float(Decimal(length) ** Decimal(length_penalty))


# ---- the search


@dataclass(frozen=True, slots=True)
class Ended:
    """A completion, and the token that ended it counted in its score."""

    score: float
    sequence: Sequence
    reason: FinishReason


@dataclass(slots=True, eq=False)
class Search:
    """Beam search of one prompt: the beams that run, the best first, and the best completions so far."""

    root: Sequence  # the prompt without a generated token: the first beam
    blocks: Blocks
    stem: Segment | None  # the whole blocks of the prompt that are this search's own
    beams: list[Sequence] = field(init=False)
    ended: list[Ended] = field(default_factory=list)  # best first
    n_tokens: int = 0  # of each beam

    def __post_init__(self) -> None:
        self.beams = [self.root]

    @property
    def width(self) -> int:
        return self.root.params.num_beams

    def step(self, logits: Array, eos_ids: Seq[int], take: Take) -> None:
        """Continue the beams by one token, from their rows of logits [n_beam, n_vocab]; none are left at the end."""
        p, width, before = self.root.params, self.width, self.beams
        n_end = len({*p.stop_token_ids, *(() if p.ignore_eos else eos_ids)})
        candidates, blocked = find_candidates(logits, before, eos_ids, max(2, 1 + n_end) * width)
        self.ended += [Ended(self._score(beam.total), beam, beam.reason_without_token()) for beam in blocked]
        children: list[Sequence] = []
        self.n_tokens += 1
        kept: list[tuple[int, int, Sequence]] = []
        for rank, one in enumerate(candidates):
            if rank >= width and len(children) == width:
                break
            child = before[one.beam].fork(one.total)
            reason = take(child, one.token)
            if reason is None and len(children) < width:
                children.append(child)
            elif reason and rank < width:
                self.ended.append(Ended(self._score(one.total), child, reason))
            else:
                continue
            kept.append((one.beam, one.token, child))
        self.ended = sorted(self.ended, key=lambda end: -end.score)[:width]
        if p.logprobs is not None:
            _add_logprobs(logits, kept)
        self.beams = [] if self._is_over(children) else children
        self.blocks.move(before, self.beams)

    def _score(self, total: float, n_tokens: int = 0) -> float:
        """That of a beam's tokens so far, or if they were so many."""
        return total / power(n_tokens or max(self.n_tokens, 1), self.root.params.length_penalty)

    def _is_over(self, beams: list[Sequence]) -> bool:
        """Whether no beam is left, or none may become better than all completions, as early_stopping counts that."""
        p = self.root.params
        if not beams or len(self.ended) < self.width or p.early_stopping == "true":
            return not beams or len(self.ended) == self.width
        longest = p.early_stopping == "never" and p.length_penalty > 0
        return self._score(beams[0].total, p.max_tokens if longest else 0) <= self.ended[-1].score

    def release(self) -> None:
        """Free its memory."""
        for segment in (self.stem, self.blocks.room):
            if segment is not None:
                self.blocks.arena.release(segment)

    def completions(self) -> Iterator[Completion]:
        """The n best, for the prompt's own request and for each duplicate; fewer if no more were found."""
        for number, end in enumerate(self.ended[: self.root.params.n]):
            for one in end.sequence.completions(end.reason):
                yield replace(one, sample=one.sample + number, beam_score=end.score)


def _add_logprobs(logits: Array, kept: list[tuple[int, int, Sequence]]) -> None:
    """Add to sequences the log-probability that the model gives their last token: (row of logits, token, sequence)."""
    kept = sorted(kept, key=lambda one: one[:2])
    rows, tokens = (np.array([one[at] for one in kept], np.int64) for at in (0, 1))
    n_top = kept[0][2].params.logprobs or 0 if kept else 0
    found = score_tokens(logits, rows, tokens, [n_top] * len(kept))
    for (_, _, sequence), logprob, top in zip(kept, found.logprobs, found.tops, strict=True):
        sequence.logprobs.append(logprob)
        sequence.top_logprobs.append(top)
