"""The five workloads: seeded token ids, so that every system gets the same prompts in the same order."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import exp, log
from statistics import NormalDist

import numpy as np

from benchmarks.peers.protocol import Prompts, Task

N_ORDINARY = 50_256  # GPT-2's vocabulary without <|endoftext|>


@dataclass(frozen=True, slots=True)
class Workload:
    """A task with a name and a line of explanation."""

    name: str
    title: str
    task: Task

    @property
    def line(self) -> str:
        t = self.task
        lengths = sorted(map(len, t.prompts))
        samples = f" x {t.n} samples" if t.n > 1 else ""
        return (
            f"{self.title}: {len(lengths)} prompts of {lengths[0]} to {lengths[-1]} tokens "
            f"(median {lengths[len(lengths) // 2]}, {sum(lengths):,} in all){samples}, {t.max_tokens} new tokens each, "
            + (f"temperature {t.temperature:g}, top_k {t.top_k}, top_p {t.top_p:g}" if t.temperature else "greedy")
        )

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Sizes of a static batch to try, the most likely best first; smaller for long prompts and many samples."""
        if self.task.n > 1:
            return 4, 2, 8
        all_long = min(map(len, self.task.prompts)) - self.task.shared_prefix >= 256
        return (8, 4, 16) if all_long else (16, 8, 32)

    def slice(self, jobs: int) -> "Workload":
        """As few prompts as give each of `jobs` cores the largest batch, for choosing settings."""
        step = max(1, len(self.task.prompts) // (jobs * max(self.batch_sizes)))
        return replace(self, name=f"{self.name}-tuning", task=self.task.part(step, self.task.max_tokens))

    @property
    def like(self) -> str:
        """The workload whose settings it uses."""
        return {"W5": "W1"}.get(self.name, self.name)  # the same lengths; only batchgen makes use of equal rows


def log_normal_lengths(n: int, median: float = 66, sigma: float = 0.82) -> list[int]:
    """n lengths of 7 to 700 tokens at evenly spaced quantiles of a log-normal: the same mixture at any n."""
    normal = NormalDist(log(median), sigma)
    return [round(min(max(exp(normal.inv_cdf((i + 0.5) / n)), 7), 700)) for i in range(n)]


def random_prompts(lengths: list[int], rng: np.random.Generator) -> Prompts:
    """A prompt of each length, in random order."""
    return [rng.integers(0, N_ORDINARY, length).tolist() for length in rng.permutation(lengths)]


def mixed(rng: np.random.Generator, scale: float) -> Task:
    return Task(random_prompts(log_normal_lengths(rows(192, scale)), rng), max_tokens=64)


def shared_prefix(rng: np.random.Generator, scale: float) -> Task:
    prefix = rng.integers(0, N_ORDINARY, 480).tolist()
    own = random_prompts(rng.integers(10, 61, rows(192, scale)).tolist(), rng)
    return Task([prefix + prompt for prompt in own], max_tokens=32, shared_prefix=len(prefix))


def samples(rng: np.random.Generator, scale: float) -> Task:
    prompts = random_prompts(log_normal_lengths(rows(24, scale)), rng)
    return Task(prompts, max_tokens=64, n=8, temperature=1.0, top_k=40, top_p=0.95)


def long_prompts(rng: np.random.Generator, scale: float) -> Task:
    lengths = np.linspace(300, 900, rows(64, scale)).round().astype(int).tolist()
    return Task(random_prompts(lengths, rng), max_tokens=8)


def half_duplicates(rng: np.random.Generator, scale: float) -> Task:
    once = random_prompts(log_normal_lengths(rows(192, scale) // 2), rng)
    twice = once + once
    return Task([twice[i] for i in rng.permutation(len(twice))], max_tokens=64)


def rows(n: int, scale: float) -> int:
    """An even number of rows, at least 4."""
    return max(4, 2 * round(n * scale / 2))


KINDS: dict[str, tuple[str, Callable[[np.random.Generator, float], Task]]] = {
    "W1": ("mixed unrelated prompts", mixed),
    "W2": ("a shared prefix of 480 tokens", shared_prefix),
    "W3": ("several samples a prompt", samples),
    "W4": ("long prompts, short completions", long_prompts),
    "W5": ("half of the rows duplicates", half_duplicates),
}


def make_workload(name: str, scale: float = 1.0, seed: int = 0) -> Workload:
    """W1 ... W5; scale multiplies the number of prompts and nothing else."""
    title, make = KINDS[name]
    return Workload(name, title, make(np.random.default_rng((seed, int(name[1:]))), scale))
