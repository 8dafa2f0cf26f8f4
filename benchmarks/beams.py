"""What beam search costs beside greedy decoding: python -m benchmarks.beams [--sequences 96] [--steps 12].

A model of 124M with random weights. A step of N / 4 prompts with 4 beams and a step of N greedy prompts are timed by
turns, in this process, at about the same contexts; and the positions of keys and values that 4 beams of a prompt of 600
tokens hold after 40 tokens are counted, with those of 4 sequences that share nothing.
"""

import argparse
import time
from collections.abc import Iterator
from statistics import median

import numpy as np

from batchgen.engine.engine import Engine
from batchgen.engine.scheduler import Scheduler
from batchgen.engine.sequence import Prompt, expand
from batchgen.gpt2.machine_code import prepare_kernels
from batchgen.gpt2.params import nest
from batchgen.gpt2.weights import pack
from batchgen.types import SamplingParams
from benchmarks.models import END_OF_TEXT
from benchmarks.models import SIZE_124M as CONFIG
from tests.support.tensors import random_tensors

BEAMS, CONTEXT = 4, 64


def prompts(n: int, length: int, params: SamplingParams) -> list[Prompt]:
    ids = np.random.default_rng(0).integers(0, CONFIG.n_vocab, (n, length)).tolist()
    return [Prompt(row, tuple(ids[row]), params, (0,)) for row in range(n)]


def decoding(engine: Engine, asked: list[Prompt]) -> Iterator[object]:
    """The steps after all prompts are read and all beams run."""
    steps = engine.steps(asked)
    read = -1
    while engine.work.read > read:
        read = engine.work.read
        next(steps)
    next(steps)
    return steps


def seconds(steps: Iterator[object]) -> float:
    started = time.perf_counter()
    next(steps)
    return time.perf_counter() - started


def count_positions(engine: Engine, asked: Prompt, n_tokens: int) -> tuple[int, int]:
    """Positions of blocks that the beams of a prompt use after n_tokens, and of sequences that share nothing."""
    used: list[int] = []
    replace = Scheduler.replace

    def counted(self: Scheduler, before: object, beams: list[object]) -> None:
        replace(self, before, beams)  # type: ignore[arg-type]
        if beams:
            used.append(sum(part.size for part in {part for beam in self.running for part in beam.segment.path}))

    Scheduler.replace = counted  # type: ignore[method-assign]
    steps = engine.steps([asked])
    while len(used) < n_tokens:
        next(steps)
    steps.close()  # type: ignore[attr-defined]
    Scheduler.replace = replace  # type: ignore[method-assign]
    [root] = expand([asked])
    return used[-1], BEAMS * (len(root.read) + asked.params.max_tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=96)
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    prepare_kernels()
    weights = pack(nest(random_tensors(CONFIG), CONFIG.n_layer))
    engine = Engine(weights, CONFIG, eos_ids=(END_OF_TEXT,), kv_bytes=2**30)
    n, most = options.sequences, options.steps + 20
    greedy = SamplingParams(max_tokens=most, ignore_eos=True)
    searched = SamplingParams(max_tokens=most, ignore_eos=True, num_beams=BEAMS)
    runs = [
        decoding(engine.twin(), prompts(n // BEAMS, CONTEXT, searched)),
        decoding(engine, prompts(n, CONTEXT, greedy)),
    ]
    beams, alone = zip(*[[seconds(run) for run in runs] for _ in range(options.steps)], strict=True)
    ratios = [a / b for a, b in zip(beams, alone, strict=True)]
    print(
        f"{n // BEAMS} prompts x {BEAMS} beams: {n / median(beams):.0f} tokens/s; {n} greedy: {n / median(alone):.0f} "
        f"tokens/s; a step of beams costs {median(ratios):.3f} of a greedy one ({min(ratios):.3f} to {max(ratios):.3f})"
    )
    asked = prompts(1, 600, SamplingParams(max_tokens=41, ignore_eos=True, num_beams=BEAMS))[0]
    shared, apart = count_positions(engine, asked, 40)
    print(f"keys and values of 600 + 40 tokens, {BEAMS} beams: {shared:,} positions; {apart:,} if nothing is shared")


if __name__ == "__main__":
    main()
