"""The engine: schedule, forward, sample, step after step, until every prompt has its completions."""

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq

import numpy as np

from batchgen.engine.sampler import sample
from batchgen.engine.scheduler import Scheduler, tokens_needed
from batchgen.engine.sequence import Completion, Prompt, Sequence, expand, is_loop
from batchgen.errors import UsageError
from batchgen.gpt2.config import GPT2Config
from batchgen.gpt2.forward import Forward
from batchgen.gpt2.kv_cache import KVArena
from batchgen.gpt2.params import Params
from batchgen.types import FinishReason

MAX_BATCH = 256  # sequences in flight; past it products gain nothing
LARGEST_BATCH = 4096
MAX_ROWS = 1024  # rows of one pass
MIB = 2**20

# told before every step which rows have their prompts read to the end in it, and which go on
OnStep = Callable[[list[int], list[int]], None]

# asked after every token that a sequence has got; what it answers ends the sequence there
ShouldStop = Callable[[Sequence], FinishReason | None]


def kv_bytes_per_token(config: GPT2Config) -> int:
    return 2 * config.n_layer * config.n_embd * 4


def check_limits(config: GPT2Config, kv_bytes: int, max_batch: int) -> None:
    """Raise UsageError, saying what would do, where an engine cannot be built within these limits."""
    if not 1 <= max_batch <= LARGEST_BATCH:
        raise UsageError(
            f"--batch-size {max_batch} is out of range (1 to {LARGEST_BATCH}); past {MAX_BATCH} nothing gains"
        )
    needed = tokens_needed(config.n_ctx, 0) * kv_bytes_per_token(config)
    if kv_bytes < needed:
        raise UsageError(
            f"memory budget {kv_bytes / MIB:.0f} MiB is too small for one sequence of n_ctx {config.n_ctx}: "
            f"its keys and values need {needed / MIB:.0f} MiB; raise --kv-memory to {-(-needed // MIB)}M"
        )


class Engine:
    """One model with its buffers and its cache, to be used for one list of prompts after another."""

    def __init__(
        self,
        params: Params,
        config: GPT2Config,
        *,
        eos_id: int | None,
        kv_bytes: int,
        max_batch: int = MAX_BATCH,
        share_prefixes: bool = True,
    ) -> None:
        """kv_bytes bounds the keys and values in flight; raises UsageError where not even one sequence fits."""
        self.config, self.eos_id, self.share_prefixes = config, eos_id, share_prefixes
        self.max_batch = max_batch
        check_limits(config, kv_bytes, max_batch)
        largest = max_batch * tokens_needed(config.n_ctx, 0)
        self.arena = KVArena(config, min(kv_bytes // kv_bytes_per_token(config), largest))
        self.forward = Forward(params, config, max_rows=max(MAX_ROWS, max_batch), max_logits=max_batch)

    def generate(
        self, prompts: Seq[Prompt], on_step: OnStep | None = None, should_stop: ShouldStop | None = None
    ) -> Iterator[Completion]:
        """Complete the prompts; yields each sample as it ends, so not in the prompts' order."""
        for finished, _ in self.steps(prompts, on_step, should_stop):
            yield from finished

    def steps(
        self, prompts: Seq[Prompt], on_step: OnStep | None = None, should_stop: ShouldStop | None = None
    ) -> Iterator[tuple[list[Completion], list[tuple[Sequence, int]]]]:
        """One step of all running sequences after another: what it finished, and each sequence's new token.

        should_stop must judge a sequence by its own tokens for completions not to depend on their company.
        """
        self._check(prompts)
        scheduler = Scheduler(expand(prompts), self.arena, self.max_batch, self.share_prefixes)
        try:
            while scheduler.busy:
                yield self._step(scheduler, on_step, should_stop)
        finally:  # a caller that stops listening leaves no memory taken
            self.arena.clear()

    def _step(
        self, scheduler: Scheduler, on_step: OnStep | None, should_stop: ShouldStop | None
    ) -> tuple[list[Completion], list[tuple[Sequence, int]]]:
        scheduler.admit()
        running = scheduler.running
        running.sort(key=_neighbours)
        prefills, ready = scheduler.next_prefills(self.forward.max_rows - len(running))
        if on_step:
            starting = [sequence for leader, followers in ready for sequence in (leader, *followers)]
            on_step([s.prompt.row for s in starting], [s.prompt.row for s in running])
        last_ids = [sequence.token_ids[-1] for sequence in running]
        segments = [sequence.segment for sequence in running if sequence.segment is not None]
        logits = self.forward(last_ids, segments, prefills)
        sampled = list(running)
        source = list(range(len(running)))  # the row of logits of each
        for row, (leader, followers) in enumerate(ready, start=len(running)):
            scheduler.start(leader, followers)
            sampled += [leader, *followers]
            source += [row] * (1 + len(followers))
        if len(source) > len(logits):
            logits = logits[source]
        tokens = sample(logits, sampled, self.eos_id)
        return self._append(scheduler, sampled, tokens, should_stop), list(zip(sampled, tokens, strict=True))

    def _append(
        self, scheduler: Scheduler, sequences: list[Sequence], tokens: list[int], should_stop: ShouldStop | None
    ) -> list[Completion]:
        finished: list[Completion] = []
        for sequence, token in zip(sequences, tokens, strict=True):
            reason = self._finish_reason(sequence, token)
            if reason != "stop":
                sequence.token_ids.append(token)
                if sequence.params.stop_loops and len(sequence.token_ids) >= sequence.params.min_tokens:
                    reason = "repetition" if is_loop(sequence.token_ids) else reason
                if should_stop is not None:
                    reason = should_stop(sequence) or reason
            if reason:
                scheduler.finish(sequence)
                finished += sequence.completions(reason)
        return finished

    def _finish_reason(self, sequence: Sequence, token: int) -> FinishReason | None:
        p = sequence.params
        if token in p.stop_token_ids or (token == self.eos_id and not p.ignore_eos):
            return "stop"
        return "length" if len(sequence.token_ids) + 1 >= p.max_tokens else None

    def _check(self, prompts: Seq[Prompt]) -> None:
        """The caller has validated the prompts; this guards the arrays against a caller that has not."""
        n_vocab, n_ctx = self.config.n_vocab, self.config.n_ctx
        for prompt in prompts:
            ids = np.asarray(prompt.token_ids)
            p = prompt.params
            if not len(ids) or len(ids) + p.max_tokens > n_ctx:
                raise UsageError(
                    f"row {prompt.row}: {len(ids)} prompt tokens + {p.max_tokens} max_tokens; "
                    f"there must be at least one and at most n_ctx {n_ctx}"
                )
            bad = [token for word in prompt.bad_words for token in word]
            named = [*p.stop_token_ids, *(token for token, _ in p.logit_bias), *bad]
            for token in (int(ids.min()), int(ids.max()), *named):
                if not 0 <= token < n_vocab:
                    raise UsageError(f"row {prompt.row}: token id {token} is outside the vocabulary of {n_vocab}")


def _neighbours(sequence: Sequence) -> tuple[int, int]:
    """Sort key that brings together sequences that share a prefix, then those of similar length."""
    assert sequence.segment is not None
    shares = sequence.segment.parent is not None
    return (sequence.order, 0) if shares else (-1, sequence.segment.end)
