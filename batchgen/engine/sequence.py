"""What the engine is asked for (Prompt), what it is doing (Sequence) and what came of it (Completion)."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from batchgen.gpt2.kv_cache import Segment
from batchgen.types import FinishReason, SamplingParams

LOOP_PERIOD = 64
LOOP_REPEATS = 3
LOOP_TOKENS = 24


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt; seeds has a seed for each of its params.n samples. `row` is the caller's key, handed back.

    Prompts of one row count their samples on: those of this one are first_sample, first_sample + 1, ...
    bad_words are token sequences of which none may be completed by a generated token.
    """

    row: int
    token_ids: tuple[int, ...]
    params: SamplingParams
    seeds: tuple[int, ...]
    first_sample: int = 0
    bad_words: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """One sample of one prompt, without the token that ended it.

    logprobs are of the tokens under the model itself (before penalties and temperature); top_logprobs the most
    likely tokens at each position with theirs, best first.
    """

    row: int
    sample: int
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[float, ...] | None = None
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] | None = None


def sample_seeds(seed: int, row: int, n: int, first: int = 0) -> tuple[int, ...]:
    """The seeds of n samples of a row, from the first on: from (seed, row, sample) alone, 63 bits each."""
    return tuple(
        int(np.random.SeedSequence((seed, row, sample)).generate_state(1, np.uint64)[0] >> np.uint64(1))
        for sample in range(first, first + n)
    )


def uniforms(seed: int, n: int) -> npt.NDArray[np.float64]:
    """The n random numbers in [0, 1) that draw a sample's tokens; the i-th depends on (seed, i) alone (Philox)."""
    return np.random.Generator(np.random.Philox(key=seed)).random(n)


@dataclass(slots=True, eq=False)
class Sequence:
    """One sample being generated. Its keys and values end in `segment`, a path of segments back to position 0."""

    prompt: Prompt
    sample: int
    order: int  # neighbours in this order share prefixes
    seed: int
    duplicates: list[tuple[int, int]] = field(default_factory=list)  # (row, sample) of the requests equal to this
    segment: Segment | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    random: npt.NDArray[np.float64] | None = None  # made when the first is drawn: many sequences may be waiting

    @property
    def params(self) -> SamplingParams:
        return self.prompt.params

    def next_random(self) -> float:
        """The number in [0, 1) that draws the next token."""
        if self.random is None:
            self.random = uniforms(self.seed, self.params.max_tokens)
        return float(self.random[len(self.token_ids)])

    def ends_in(self, tail: tuple[int, ...]) -> bool:
        """Whether prompt and generated tokens together end in these."""
        n_prompt = max(len(tail) - len(self.token_ids), 0)
        generated = tail[n_prompt:]
        if generated and tuple(self.token_ids[-len(generated) :]) != generated:
            return False
        return not n_prompt or self.prompt.token_ids[-n_prompt:] == tail[:n_prompt]

    def completions(self, finish_reason: FinishReason) -> list[Completion]:
        """The finished sample, once for every request that it answers."""
        wanted, n = self.params.logprobs is not None, len(self.token_ids)  # a stop token's log-probability goes with it
        return [
            Completion(
                row,
                sample,
                tuple(self.token_ids),
                finish_reason,
                tuple(self.logprobs[:n]) if wanted else None,
                tuple(self.top_logprobs[:n]) if wanted else None,
            )
            for row, sample in [(self.prompt.row, self.sample), *self.duplicates]
        ]


def is_loop(token_ids: list[int]) -> bool:
    """Whether the tokens end in a block of 1 to LOOP_PERIOD tokens, LOOP_REPEATS times or more, LOOP_TOKENS in all.

    A block of 1 counts from 24 times on, one of 5 from 5 times on, one of 20 from 3 times on.
    """
    for period in range(1, min(LOOP_PERIOD, len(token_ids) // LOOP_REPEATS) + 1):
        if token_ids[-1] != token_ids[-1 - period]:
            continue
        length = max(LOOP_REPEATS, -(-LOOP_TOKENS // period)) * period
        if len(token_ids) >= length and token_ids[-length:-period] == token_ids[period - length :]:
            return True
    return False


def expand(prompts: Seq[Prompt]) -> list[Sequence]:
    """A sequence for every sample; equal greedy requests are one sequence, sampled ones never are."""
    sequences: list[Sequence] = []
    greedy: dict[tuple[tuple[int, ...], SamplingParams], Sequence] = {}
    for prompt in prompts:
        for sample, seed in enumerate(prompt.seeds, start=prompt.first_sample):
            if not prompt.params.greedy:
                sequences.append(Sequence(prompt, sample, 0, seed))
                continue
            key = (prompt.token_ids, prompt.params)
            if key in greedy:
                greedy[key].duplicates.append((prompt.row, sample))
            else:
                greedy[key] = Sequence(prompt, sample, 0, seed)
                sequences.append(greedy[key])
    return sequences
