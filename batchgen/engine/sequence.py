"""What the engine is asked for (Prompt), what it is doing (Sequence) and what came of it (Completion)."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from batchgen.gpt2.kv_cache import Segment
from batchgen.types import FinishReason, SamplingParams


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt; seeds has a seed for each of its params.n samples. `row` is the caller's key, handed back."""

    row: int
    token_ids: tuple[int, ...]
    params: SamplingParams
    seeds: tuple[int, ...]


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


def sample_seeds(seed: int, row: int, n: int) -> tuple[int, ...]:
    """The seeds of a row's n samples: from (seed, row, sample) alone, 63 bits each."""
    return tuple(
        int(np.random.SeedSequence((seed, row, sample)).generate_state(1, np.uint64)[0] >> np.uint64(1))
        for sample in range(n)
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
    random: npt.NDArray[np.float64] | None  # None: greedy
    duplicates: list[tuple[int, int]] = field(default_factory=list)  # (row, sample) of the requests equal to this
    segment: Segment | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[tuple[tuple[int, float], ...]] = field(default_factory=list)

    @property
    def params(self) -> SamplingParams:
        return self.prompt.params

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


def expand(prompts: Seq[Prompt]) -> list[Sequence]:
    """A sequence for every sample; equal greedy requests are one sequence, sampled ones never are."""
    sequences: list[Sequence] = []
    greedy: dict[tuple[tuple[int, ...], SamplingParams], Sequence] = {}
    for prompt in prompts:
        for sample in range(prompt.params.n):
            if not prompt.params.greedy:
                random = uniforms(prompt.seeds[sample], prompt.params.max_tokens)
                sequences.append(Sequence(prompt, sample, 0, random))
                continue
            key = (prompt.token_ids, prompt.params)
            if key in greedy:
                greedy[key].duplicates.append((prompt.row, sample))
            else:
                greedy[key] = Sequence(prompt, sample, 0, None)
                sequences.append(greedy[key])
    return sequences
