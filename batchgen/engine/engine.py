"""The engine: schedule, forward, sample, one step after another, until every prompt has its completions."""

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from copy import copy
from typing import TypeAlias

from batchgen.engine.limits import MAX_BATCH, check_limits, check_prompts, kv_bytes_per_token, tokens_needed
from batchgen.engine.sampler import sample
from batchgen.engine.scheduler import Scheduler
from batchgen.engine.sequence import Completion, Prompt, Sequence, Work, expand, is_loop
from batchgen.gpt2.config import GPT2Config
from batchgen.gpt2.forward import Forward
from batchgen.gpt2.kv_cache import KVArena
from batchgen.gpt2.weights import Weights
from batchgen.types import FinishReason

MAX_ROWS = 1024  # rows of one pass

# Called before each step with the rows that finish prefill and the rows that decode.
OnStep: TypeAlias = Callable[[list[int], list[int]], None]

# Called after each new token of a sequence; a reason ends the sequence.
ShouldStop: TypeAlias = Callable[[Sequence], FinishReason | None]

# The completions that a step finishes, and the token that each of its sequences gets.
Step: TypeAlias = tuple[list[Completion], list[tuple[Sequence, int]]]


def _adjacency(sequence: Sequence) -> tuple[int, int]:
    """Sort key: sequences that share a prefix become adjacent, the others are in order of length."""
    assert sequence.segment is not None
    has_shared_prefix = sequence.segment.parent is not None
    return (sequence.order, 0) if has_shared_prefix else (-1, sequence.segment.end)


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
        largest = max_batch * tokens_needed(config.n_ctx, 0)
        n_tokens = min(kv_bytes // kv_bytes_per_token(config, weights.precision), largest)
        self.arena = KVArena(config, n_tokens, weights.precision)
        self.forward = Forward(weights, config, max_rows=max(MAX_ROWS, max_batch), max_logits=max_batch)

    def twin(self) -> "Engine":
        """An engine over the same weights with buffers and a cache of its own."""
        twin = copy(self)
        twin.arena = KVArena(self.config, self.arena.n_tokens, self.forward.weights.precision)
        twin.forward = Forward(self.forward.weights, self.config, self.forward.max_rows, self.max_batch)
        return twin

    def _finish_reason(self, sequence: Sequence, token: int) -> FinishReason | None:
        p = sequence.params
        if token in p.stop_token_ids or (token in self.eos_ids and not p.ignore_eos):
            return "stop"
        return "length" if len(sequence.token_ids) + 1 >= p.max_tokens else None

    def _append(
        self, scheduler: Scheduler, sequences: list[Sequence], tokens: list[int], should_stop: ShouldStop | None
    ) -> list[Completion]:
        """Append its token to each sequence, except a stop token; returns the completions of sequences that end."""
        finished: list[Completion] = []
        for sequence, token in zip(sequences, tokens, strict=True):
            reason = self._finish_reason(sequence, token)
            is_stop_token = reason == "stop"
            if not is_stop_token:
                sequence.token_ids.append(token)
                if sequence.params.stop_loops and len(sequence.token_ids) >= sequence.params.min_tokens:
                    reason = "repetition" if is_loop(sequence.token_ids) else reason
                if should_stop is not None:
                    reason = should_stop(sequence) or reason
            if reason:
                scheduler.finish(sequence)
                self.work.finished += 1
                self.work.stopped += reason != "length"
                self.work.finished_tokens += len(sequence.token_ids) + is_stop_token
                finished += sequence.completions(reason)
        return finished

    def _step(self, scheduler: Scheduler, on_step: OnStep | None, should_stop: ShouldStop | None) -> Step:
        """Schedule, forward, sample, append."""
        scheduler.admit()
        self.work.batch = max(self.work.batch, len(scheduler.running) + scheduler.n_pending)
        running = scheduler.running
        running.sort(key=_adjacency)
        prefills, ready = scheduler.next_prefills(self.forward.max_rows - len(running))
        if on_step:
            on_step([s.prompt.row for same in ready for s in same], [s.prompt.row for s in running])
        last_ids = [sequence.token_ids[-1] for sequence in running]
        segments = [sequence.segment for sequence in running if sequence.segment is not None]
        logits = self.forward(last_ids, segments, prefills)  # [n_running + n_ready, n_vocab]
        sampled = list(running)
        source = list(range(len(running)))  # the row of logits of each sequence; those of one prompt share a row
        for row, same in enumerate(ready, start=len(running)):
            scheduler.start(same)
            sampled += same
            source += [row] * len(same)
        if len(source) > len(logits):
            logits = logits[source]  # [n_sampled, n_vocab]
        tokens = sample(logits, sampled, self.eos_ids)
        self.work.read += sum(len(prefill.token_ids) for prefill in prefills)
        self.work.started += len(sampled) - len(last_ids)
        self.work.generated += len(sampled)
        self.work.steps += 1
        return self._append(scheduler, sampled, tokens, should_stop), list(zip(sampled, tokens, strict=True))

    def steps(
        self, prompts: Seq[Prompt], on_step: OnStep | None = None, should_stop: ShouldStop | None = None
    ) -> Iterator[Step]:
        """Complete the prompts; yields each step. should_stop may depend on the sequence's own tokens alone."""
        check_prompts(prompts, self.config)
        sequences = expand(prompts)
        scheduler = Scheduler(sequences, self.arena, self.max_batch, self.share_prefixes)
        self.work.sequences += len(sequences)
        self.work.max_tokens += sum(sequence.params.max_tokens for sequence in sequences)
        self.work.prompt_tokens += scheduler.prompt_tokens
        try:
            while scheduler.is_busy:
                yield self._step(scheduler, on_step, should_stop)
        finally:  # also if the caller closes the iterator early
            self.arena.clear()
            self.work.end_call()

    def generate(
        self, prompts: Seq[Prompt], on_step: OnStep | None = None, should_stop: ShouldStop | None = None
    ) -> Iterator[Completion]:
        """Complete the prompts; yields each sample when it ends, so not in the order of the prompts."""
        for finished, _ in self.steps(prompts, on_step, should_stop):
            yield from finished
