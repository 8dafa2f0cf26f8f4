"""The records of the engine: its input (Prompt), its state (Sequence) and its output (Completion)."""

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from operator import attrgetter
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from batchgen.gpt2.kv_cache import Segment
from batchgen.types import Begun, FinishReason, Guide, Mask, SamplingParams, make_mask

if TYPE_CHECKING:
    from batchgen.engine.beams import Search

LOOP_PERIOD = 64  # a loop is a block of up to this many tokens,
LOOP_REPEATS = 3  # at least this many times in a row,
LOOP_TOKENS = 24  # and at least this many tokens in all


class Breakers(NamedTuple):
    """Token sequences that no repetition goes past, in order of their first tokens."""

    marks: Mask  # of the first tokens
    heads: npt.NDArray[np.int32]  # [n] first tokens
    bounds: npt.NDArray[np.int32]  # [n + 1] the others of sequence i are tails[bounds[i] : bounds[i + 1]]
    tails: npt.NDArray[np.int32]


@lru_cache(maxsize=64)
def make_breakers(sequences: tuple[tuple[int, ...], ...]) -> Breakers:
    """((9, 4), (7,)) -> heads [7, 9], bounds [0, 0, 1], tails [4]"""
    ordered = sorted(sequences)
    bounds = np.cumsum([0, *(len(one) - 1 for one in ordered)])
    tails = [token for one in ordered for token in one[1:]]
    heads = [one[0] for one in ordered]
    return Breakers(make_mask(heads), np.array(heads, np.int32), bounds.astype(np.int32), np.array(tails, np.int32))


_mask_of = lru_cache(maxsize=64)(make_mask)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt, and which of its samples to generate. A row with several prompts numbers theirs consecutively."""

    row: int  # the caller's key, returned with each completion
    token_ids: tuple[int, ...]
    params: SamplingParams
    seeds: tuple[int, ...]  # one for each of the params.n samples
    first_sample: int = 0  # the number of this prompt's first sample within the row
    bad_words: tuple[tuple[int, ...], ...] = ()  # token sequences that no generated token may complete
    scored: int | None = None  # log-probabilities are wanted of its tokens from this index on, 1 or more; None: of none
    begun: tuple[Begun, ...] | None = None  # the samples to generate, some from their first tokens on; None: all n
    make_guide: Callable[[], Guide] | None = field(default=None, compare=False)  # of a sample; None: any token may come
    breakers: Breakers = field(default=make_breakers(()), compare=False)  # of dry_sequence_breakers
    guided_by: object = None  # what the guide depends on besides the parameters; equal for equal guides
    given: bytes = b""  # of the prompt's text, what the completion's tokens begin with by their guide; text/healing.py

    @property
    def samples(self) -> tuple[Begun, ...]:
        """The samples to generate."""
        if self.begun is not None:
            return self.begun
        return tuple(map(Begun, range(self.first_sample, self.first_sample + len(self.seeds))))

    @property
    def read(self) -> tuple[int, ...]:
        """The tokens that are read: without the last one if nothing follows it, and none if no logits are wanted."""
        if self.params.max_tokens:
            return self.token_ids
        return () if self.scored in (None, len(self.token_ids)) else self.token_ids[:-1]


@dataclass(frozen=True, slots=True)
class Completion:
    """One sample of one prompt, without the token that ended it."""

    row: int
    sample: int
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[float, ...] | None = None  # of the model itself, before penalties and temperature
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] | None = None  # (token id, log-probability), best first
    prompt_logprobs: tuple[float, ...] | None = None  # of the prompt's tokens from its `scored` on
    prompt_ranks: tuple[int, ...] | None = None  # of the same tokens; 1 is the likeliest, equal ones by token id
    prompt_top_logprobs: tuple[tuple[tuple[int, float], ...], ...] | None = None
    beam_score: float | None = None  # of beam search; the samples of a prompt are in its order


def sample_seeds(seed: int, row: int, n: int, first: int = 0, key: tuple[int, ...] = ()) -> tuple[int, ...]:
    """The seeds of n samples of a row, 63 bits each; a seed depends on (seed, row, sample) alone.

    With a key, 4 words of 32 bits, on (seed, key, sample): the row may then stand anywhere.
    """
    return tuple(
        int(np.random.SeedSequence(_entropy(seed, row, sample, key)).generate_state(1, np.uint64)[0] >> np.uint64(1))
        for sample in range(first, first + n)
    )


def _entropy(seed: int, row: int, sample: int, key: tuple[int, ...]) -> tuple[int, ...]:
    """What SeedSequence mixes: the three numbers, or two words of each if one of them is 2**32 or more.

    SeedSequence cuts a number into as many words of 32 bits as it needs: (2**32, 5, 0) and (0, 1, 5) would be the same.
    With a key there are 7 words, which never equal 3 or 6: only up to 4 words does it fill up with zeros.
    """
    if key:
        return (seed % 2**32, seed >> 32, *key, sample)
    numbers = (seed, row, sample)
    if max(numbers) < 2**32:
        return numbers
    return tuple(word for number in numbers for word in (number % 2**32, number >> 32))


def uniforms(seed: int, n: int, stream: int = 0) -> npt.NDArray[np.float64]:
    """[n] random numbers in [0, 1) of a sample; number i depends on (seed, stream, i) alone (Philox).

    Stream 0 draws the tokens, stream 1 decides whether XTC cuts.
    """
    return np.random.Generator(np.random.Philox(key=seed + (stream << 64))).random(n)


@dataclass(slots=True)
class Work:
    """What an engine was given and what of it is done, in all its calls; equal greedy requests count once."""

    sequences: int = 0  # a search has num_beams of them
    max_tokens: int = 0  # new ones, summed over the sequences
    prompt_tokens: int = 0  # to read, with those that are begun with; those of a shared prefix once
    read: int = 0  # of the prompt tokens
    started: int = 0  # sequences whose prompt is read
    finished: int = 0  # of the started sequences
    stopped: int = 0  # of the finished ones, before their max_tokens
    generated: int = 0  # tokens
    finished_tokens: int = 0  # of the generated tokens, those of finished sequences
    steps: int = 0
    batch: int = 0  # sequences in flight, at most
    ended: int = 0  # sequences of calls that are at their end
    ended_tokens: int = 0  # of these sequences

    def counts(self) -> tuple[int, ...]:
        return _counts(self)

    def end_call(self) -> None:
        """Nothing is left of what was given."""
        self.read, self.finished_tokens = self.prompt_tokens, self.generated
        self.started = self.finished = self.ended = self.sequences
        self.ended_tokens = self.generated


_counts: Callable[[Work], tuple[int, ...]] = attrgetter(*(one.name for one in fields(Work)))


@dataclass(slots=True, eq=False)
class Sequence:
    """The state of one sample in generation, or of a prompt that is only read."""

    prompt: Prompt
    sample: int
    seed: int
    read: tuple[int, ...] = ()  # tokens of the prompt, and those that are begun with
    first_wanted: int = 0  # the first of these positions whose state is wanted; those of all after it are, too
    scored: range = range(0)  # of the prompt's tokens and those that are begun with, the ones to score, by their index
    order: int = 0  # set by the scheduler; sequences that share a prefix are adjacent
    duplicates: list[tuple[int, int]] = field(default_factory=list)  # (row, sample) of equal greedy requests
    segment: Segment | None = None  # the last on the path of its keys and values
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)  # of the prompt's scored tokens, as far as it is read
    prompt_ranks: list[int] = field(default_factory=list)
    prompt_top_logprobs: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    random: npt.NDArray[np.float64] | None = None  # [max_tokens], made for the first draw: many sequences may wait
    chances: npt.NDArray[np.float64] | None = None  # the same, of XTC
    n_begun: int = 0  # of token_ids, those that are begun with
    guide: Guide | None = None
    allowed: "Mask | None" = None  # allowed_token_ids, if any
    total: float = 0.0  # of a beam: the sum of the log-probabilities of its generated tokens
    search: "Search | None" = None  # whose beam it is, once there is memory for it

    def __post_init__(self) -> None:
        self.allowed = _mask_of(ids) if (ids := self.params.allowed_token_ids) else None

    @property
    def params(self) -> SamplingParams:
        return self.prompt.params

    @property
    def width(self) -> int:
        """The sequences that this one becomes."""
        return self.params.num_beams if self.params.searches else 1

    def fork(self, total: float) -> "Sequence":
        """A beam that goes on from this one."""
        guide = self.guide and self.guide.copy()
        ids, logprobs, tops = [*self.token_ids], [*self.logprobs], [*self.top_logprobs]
        return replace(self, token_ids=ids, logprobs=logprobs, top_logprobs=tops, guide=guide, total=total)

    @property
    def n_left(self) -> int:
        """Tokens that may still be generated."""
        return self.params.max_tokens - len(self.token_ids)

    @property
    def context(self) -> npt.NDArray[np.int32]:
        """Prompt and generated tokens."""
        return np.array([*self.prompt.token_ids, *self.token_ids], np.int32)

    def is_given(self, token: int) -> bool:
        """Whether this token, if it is the next, is no end: it lies within the prompt's text."""
        return self.guide is not None and self.guide.is_given(token)

    def reason_without_token(self) -> FinishReason:
        """Why it ends if its parameters allow no token."""
        return "stop" if self.guide is not None and self.guide.may_end() else "blocked"

    def next_random(self) -> float:
        """The number in [0, 1) that draws the next token."""
        if self.random is None:
            self.random = uniforms(self.seed, self.params.max_tokens)
        return float(self.random[len(self.token_ids)])

    def next_is_cut(self) -> bool:
        """Whether XTC cuts the next token's distribution."""
        if not self.params.xtc_probability:
            return False
        if self.chances is None:
            self.chances = uniforms(self.seed, self.params.max_tokens, stream=1)
        return float(self.chances[len(self.token_ids)]) < self.params.xtc_probability

    def ends_with(self, tail: tuple[int, ...]) -> bool:
        """Whether prompt and generated tokens together end with these tokens."""
        n_prompt = max(len(tail) - len(self.token_ids), 0)
        generated = tail[n_prompt:]
        if generated and tuple(self.token_ids[-len(generated) :]) != generated:
            return False
        return not n_prompt or self.prompt.token_ids[-n_prompt:] == tail[:n_prompt]

    def completions(self, finish_reason: FinishReason) -> list[Completion]:
        """The finished sample, for its own request and for each duplicate."""
        has_logprobs, n = self.params.logprobs is not None, len(self.token_ids)  # [:n] leaves out that of a stop token
        is_scored = self.prompt.scored is not None
        return [
            Completion(
                row,
                sample,
                tuple(self.token_ids),
                finish_reason,
                tuple(self.logprobs[:n]) if has_logprobs else None,
                tuple(self.top_logprobs[:n]) if has_logprobs else None,
                tuple(self.prompt_logprobs) if is_scored else None,
                tuple(self.prompt_ranks) if is_scored else None,
                tuple(self.prompt_top_logprobs) if is_scored else None,
            )
            for row, sample in [(self.prompt.row, self.sample), *self.duplicates]
        ]


def is_loop(token_ids: list[int]) -> bool:
    """Whether the tokens end in a loop: LOOP_REPEATS or more of a block of up to LOOP_PERIOD, LOOP_TOKENS in all.

    So a block of 1 token must occur 24 times, a block of 5 tokens 5 times, a block of 20 tokens 3 times.
    """
    for period in range(1, min(LOOP_PERIOD, len(token_ids) // LOOP_REPEATS) + 1):
        if token_ids[-1] != token_ids[-1 - period]:
            continue
        length = max(LOOP_REPEATS, -(-LOOP_TOKENS // period)) * period
        if len(token_ids) >= length and token_ids[-length:-period] == token_ids[period - length :]:
            return True
    return False


def expand(prompts: Seq[Prompt]) -> list[Sequence]:
    """A sequence for each sample or search; equal requests that draw nothing share one, equal sampled ones do not."""
    sequences: list[Sequence] = []
    greedy: dict[tuple[object, ...], Sequence] = {}
    for prompt in prompts:
        draws = prompt.params.max_tokens > 0 and not prompt.params.greedy
        for one in prompt.samples[:1] if prompt.params.searches else prompt.samples:
            key = (prompt.token_ids, prompt.params, prompt.bad_words, prompt.scored, prompt.guided_by, one.token_ids)
            if not draws and key in greedy:
                greedy[key].duplicates.append((prompt.row, one.sample))
                continue
            sequences.append(_begin(prompt, one))
            if not draws:
                greedy[key] = sequences[-1]
    return sequences


def _begin(prompt: Prompt, one: Begun) -> Sequence:
    """The sequence of one sample, as if it had generated its first tokens itself."""
    read, seed = prompt.read + one.token_ids, prompt.seeds[one.sample - prompt.first_sample]
    n_prompt, n_begun = len(prompt.token_ids), len(one.token_ids)
    scored = range(prompt.scored or n_prompt, n_prompt if prompt.params.logprobs is None else n_prompt + n_begun)
    first_wanted = (scored.start if scored else len(read)) - 1
    guide = prompt.make_guide() if prompt.make_guide else None
    if guide is not None:
        for token in one.token_ids:
            guide.advance(token)
    ids = list(one.token_ids)
    return Sequence(prompt, one.sample, seed, read, first_wanted, scored, token_ids=ids, n_begun=n_begun, guide=guide)


def expand_texts(prompts: Iterable[Prompt], pool: Literal["mean", "last"]) -> dict[Sequence, list[Prompt]]:
    """A sequence for each text to embed, with the prompts that are this text."""
    same: dict[tuple[int, ...], list[Prompt]] = {}
    for prompt in prompts:
        same.setdefault(prompt.token_ids, []).append(prompt)
    return {Sequence(own[0], 0, 0, ids, 0 if pool == "mean" else len(ids) - 1): own for ids, own in same.items()}
