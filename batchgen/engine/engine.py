"""The engine: schedule, forward, sample, one step after another, until every prompt has its completions."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from copy import copy
from functools import partial
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from batchgen.engine.beams import Search
from batchgen.engine.draw import add_rows
from batchgen.engine.limits import (
    MAX_BATCH,
    check_limits,
    check_prompts,
    check_searches,
    kv_bytes_per_token,
    layer_index,
    tokens_needed,
)
from batchgen.engine.sampler import NO_TOKEN, sample
from batchgen.engine.scheduler import Piece, Scheduler
from batchgen.engine.scores import ROWS, score_prompts
from batchgen.engine.sequence import Completion, Prompt, Sequence, Work, expand, expand_texts, is_loop
from batchgen.gpt2.config import GPT2Config
from batchgen.gpt2.forward import Forward
from batchgen.gpt2.kv_cache import KVArena
from batchgen.gpt2.params import Array
from batchgen.gpt2.weights import Weights
from batchgen.types import MAX_NUM_BEAMS, FinishReason

MAX_ROWS = 1024  # rows of one pass

# Called before each step with the rows that finish prefill and get a token, the rows that decode, and the other rows
# whose prompt is read; a row is there for each of its samples.
OnStep: TypeAlias = Callable[[list[int], list[int], list[int]], None]

# Called after each new token of a sequence; a reason ends the sequence.
ShouldStop: TypeAlias = Callable[[Sequence], FinishReason | None]

# The completions that a step finishes, and the token that each of its sequences gets; a beam's is not certain.
Step: TypeAlias = tuple[list[Completion], list[tuple[Sequence, int]]]

# Of each sequence that is embedded, the sum [n_embd] of its states so far.
Sums: TypeAlias = dict[Sequence, npt.NDArray[np.float64]]


def _adjacency(sequence: Sequence) -> tuple[int, int]:
    """Sort key: sequences that share a prefix become adjacent, the others are in order of length."""
    assert sequence.segment is not None
    has_shared_prefix = sequence.segment.parent is not None
    return (sequence.order, 0) if has_shared_prefix else (-1, sequence.segment.end)


def _is_wanted(sequence: Sequence) -> bool:
    """Whether its tokens count as progress: of a search, those of as many beams as it returns."""
    return sequence.search is None or sequence in sequence.search.beams[: sequence.params.n]


def _names(running: list[Sequence], pieces: list[Piece]) -> tuple[list[int], list[int], list[int]]:
    """The rows of a step, for on_step."""
    starting: list[int] = []
    reading: list[int] = []
    for piece in pieces:
        for sequence in piece.sequences:
            gets_token = piece.is_last and sequence.params.max_tokens
            (starting if gets_token else reading).append(sequence.prompt.row)
    return starting, [sequence.prompt.row for sequence in running if _is_wanted(sequence)], reading


class Engine:
    """One model with its buffers and its cache, for any number of calls, one after another; see `twin`."""

    def __init__(
        self,
        weights: Weights,
        config: GPT2Config,
        *,
        eos_ids: Seq[int],
        kv_bytes: int,
        max_batch: int = MAX_BATCH,
        share_prefixes: bool = True,
    ) -> None:
        """kv_bytes bounds the memory for keys and values. Raises UsageError if not even one sequence fits."""
        check_limits(config, weights.precision, kv_bytes, max_batch)
        self.config, self.eos_ids, self.max_batch, self.share_prefixes = config, eos_ids, max_batch, share_prefixes
        self.work = Work()
        largest = max(max_batch, MAX_NUM_BEAMS) * tokens_needed(config.n_ctx, 0)
        n_tokens = min(kv_bytes // kv_bytes_per_token(config, weights.precision), largest)
        self.arena = KVArena(config, n_tokens, weights.precision)
        self.forward = Forward(weights, config, max(MAX_ROWS, max_batch), max_logits=max(max_batch, ROWS))

    def twin(self) -> "Engine":
        """An engine over the same weights with buffers and a cache of its own."""
        twin = copy(self)
        twin.arena = KVArena(self.config, self.arena.n_tokens, self.forward.weights.precision)
        twin.forward = Forward(self.forward.weights, self.config, self.forward.max_rows, self.forward.max_logits)
        return twin

    def _finish_reason(self, sequence: Sequence, token: int) -> FinishReason | None:
        p = sequence.params
        is_end = token in p.stop_token_ids or (token in self.eos_ids and not p.ignore_eos)
        if is_end and not sequence.is_given(token):
            return "stop"
        return "length" if len(sequence.token_ids) + 1 >= p.max_tokens else None

    def _end(
        self, scheduler: Scheduler, sequence: Sequence, reason: FinishReason, has_stop_token: bool = False
    ) -> list[Completion]:
        scheduler.finish(sequence)
        sequence.guide = None  # one has up to megabytes
        self.work.finished += 1
        self.work.stopped += reason != "length"
        self.work.finished_tokens += len(sequence.token_ids) - sequence.n_begun + has_stop_token
        return sequence.completions(reason)

    def _take(self, sequence: Sequence, token: int, should_stop: ShouldStop | None) -> FinishReason | None:
        """Append a token, except a stop token; why the sequence ends with it, if it does."""
        reason = self._finish_reason(sequence, token)
        if reason == "stop":
            return reason
        sequence.token_ids.append(token)
        if sequence.params.stop_loops and len(sequence.token_ids) >= sequence.params.min_tokens:
            reason = "repetition" if is_loop(sequence.token_ids) else reason
        if should_stop is not None:
            reason = should_stop(sequence) or reason
        if sequence.guide is not None and sequence.guide.advance(token):
            reason = "stop"
        return reason

    def _append(
        self, scheduler: Scheduler, sequences: list[Sequence], tokens: list[int], should_stop: ShouldStop | None
    ) -> list[Completion]:
        """Append its token to each sequence; returns the completions of sequences that end.

        A sequence that got no token ends too.
        """
        finished: list[Completion] = []
        for sequence, token in zip(sequences, tokens, strict=True):
            n = len(sequence.token_ids)
            reason = sequence.reason_without_token() if token == NO_TOKEN else self._take(sequence, token, should_stop)
            if reason:
                finished += self._end(scheduler, sequence, reason, token != NO_TOKEN and len(sequence.token_ids) == n)
        return finished

    def _search(
        self, scheduler: Scheduler, logits: Array, sampled: list[Sequence], should_stop: ShouldStop | None
    ) -> list[Completion]:
        """Advance every beam search of a step by one token; returns the completions of the searches that end."""
        rows = {sequence: row for row, sequence in enumerate(sampled) if sequence.search is not None}
        finished: list[Completion] = []
        for search in dict.fromkeys(sequence.search for sequence in rows):
            assert search is not None
            before, take = search.beams, partial(self._take, should_stop=should_stop)
            search.step(logits[[rows[beam] for beam in before]], self.eos_ids, take)
            scheduler.replace(before, search.beams)
            self.work.generated += search.width
            if not search.beams:
                finished += self._end_search(scheduler, search)
        return finished

    def _end_search(self, scheduler: Scheduler, search: Search) -> list[Completion]:
        scheduler.finish(search.root)
        search.root.guide = None
        self.work.finished += search.width
        self.work.stopped += search.width * (search.n_tokens < search.root.params.max_tokens)
        self.work.finished_tokens += search.width * search.n_tokens
        return [*search.completions()]

    def _read(
        self, scheduler: Scheduler, on_step: OnStep | None, layer: int | None = None
    ) -> tuple[Array, list[Sequence], list[Piece]]:
        """Schedule and forward: states [n_decode + all n_logits, n_embd] of running sequences, then of pieces."""
        running = scheduler.running
        max_rows = self.forward.max_rows - len(running)
        scheduler.admit(max_rows)
        self.work.batch = max(self.work.batch, scheduler.in_flight)
        running.sort(key=_adjacency)
        pieces = scheduler.next_pieces(max_rows)
        if on_step:
            on_step(*_names(running, pieces))
        last_ids = [sequence.token_ids[-1] for sequence in running]
        segments = [sequence.segment for sequence in running if sequence.segment is not None]
        states = self.forward.states(last_ids, segments, [piece.prefill for piece in pieces], layer)
        self.work.read += sum(piece.prefill.n_row for piece in pieces)
        self.work.steps += 1
        return states, list(running), pieces

    def _step(self, scheduler: Scheduler, on_step: OnStep | None, should_stop: ShouldStop | None) -> Step:
        """Schedule, forward, score, sample, append."""
        states, sampled, pieces = self._read(scheduler, on_step)
        score_prompts(self.forward, states, pieces, len(sampled))
        finished: list[Completion] = []
        source = list(range(len(sampled)))  # the row of states of each sequence; those of one prompt share a row
        row = len(sampled)
        for piece in pieces:
            row += piece.prefill.n_logits
            if piece.is_last:
                self._start(scheduler, piece)
                for sequence in piece.sequences:
                    if sequence.params.max_tokens:
                        sampled.append(sequence)
                        source.append(row - 1)
                    else:
                        finished += self._end(scheduler, sequence, "length")
        rows, index = np.unique(np.array(source, np.int64), return_inverse=True)
        logits = self.forward.head(states[rows])  # [n_row, n_vocab]
        if len(source) > len(rows):
            logits = logits[index]  # [n_sampled, n_vocab]
        if any(sequence.search is not None for sequence in sampled):
            finished += self._search(scheduler, logits, sampled, should_stop)
            alone = [row for row, sequence in enumerate(sampled) if sequence.search is None]
            logits, sampled = logits[alone], [sampled[row] for row in alone]
        tokens = sample(logits, sampled, self.eos_ids)
        self.work.generated += len(sampled)
        finished += self._append(scheduler, sampled, tokens, should_stop)
        return finished, list(zip(sampled, tokens, strict=True))

    def _start(self, scheduler: Scheduler, piece: Piece) -> None:
        if piece.sequences:
            scheduler.start(piece.sequences)
            self.work.started += sum(sequence.width for sequence in piece.sequences)

    @contextmanager
    def _scheduled(self, sequences: list[Sequence]) -> Iterator[Scheduler]:
        """A scheduler of what is to read; also if the caller leaves early, nothing is left in the end."""
        scheduler = Scheduler([s for s in sequences if s.read], self.arena, self.max_batch, self.share_prefixes)
        self.work.sequences += sum(sequence.width for sequence in sequences)
        self.work.max_tokens += sum(sequence.width * sequence.n_left for sequence in sequences)
        self.work.prompt_tokens += scheduler.prompt_tokens
        try:
            yield scheduler
        finally:
            self.arena.clear()
            self.work.end_call()

    def steps(
        self, prompts: Seq[Prompt], on_step: OnStep | None = None, should_stop: ShouldStop | None = None
    ) -> Iterator[Step]:
        """Complete the prompts; yields each step. should_stop may depend on the sequence's own tokens alone."""
        check_prompts(prompts, self.config)
        check_searches(prompts, self.config, self.forward.weights.precision, self.arena.n_tokens)
        sequences = expand(prompts)
        with self._scheduled(sequences) as scheduler:
            if unread := [sequence for sequence in sequences if not sequence.read]:
                if on_step:
                    on_step([], [], [sequence.prompt.row for sequence in unread])
                self.work.started += len(unread)
                self.work.finished += len(unread)
                yield [completion for sequence in unread for completion in sequence.completions("length")], []
            while scheduler.is_busy:
                yield self._step(scheduler, on_step, should_stop)

    def generate(
        self, prompts: Seq[Prompt], on_step: OnStep | None = None, should_stop: ShouldStop | None = None
    ) -> Iterator[Completion]:
        """Complete the prompts; yields each sample when it ends, so not in the order of the prompts."""
        for finished, _ in self.steps(prompts, on_step, should_stop):
            yield from finished

    def embed(
        self, prompts: Seq[Prompt], layer: int, pool: Literal["mean", "last"], on_step: OnStep | None = None
    ) -> Iterator[tuple[Prompt, Array]]:
        """The state [n_embd] of each prompt, of max_tokens 0: the mean of its positions, or the last; in any order.

        layer is an index into transformers' hidden_states: 0 is before the first block, -1 after ln_f.
        """
        check_prompts(prompts, self.config, last_is_read=True)
        layer = layer_index(layer, self.config)
        same = expand_texts(prompts, pool)
        with self._scheduled([*same]) as scheduler:
            sums: Sums = defaultdict(lambda: np.zeros(self.config.n_embd))
            while scheduler.is_busy:
                states, _, pieces = self._read(scheduler, on_step, layer)
                for sequence in self._add_states(scheduler, states, pieces, sums):
                    mean = sums.pop(sequence) / (len(sequence.read) - sequence.first_wanted)
                    for prompt in same[sequence]:
                        yield prompt, mean.astype(np.float32)

    def _add_states(self, scheduler: Scheduler, states: Array, pieces: list[Piece], sums: Sums) -> list[Sequence]:
        """Add the pieces' wanted states to the sums of their sequences; returns the sequences that end."""
        finished: list[Sequence] = []
        row = 0
        for piece in pieces:
            wanted = states[row : row + piece.prefill.n_logits]
            row += len(wanted)
            for sequence in piece.sequences:
                add_rows(wanted, sums[sequence])
            if piece.is_last:
                self._start(scheduler, piece)
                for sequence in piece.sequences:
                    self._end(scheduler, sequence, "length")
                finished += piece.sequences
        return finished
