"""What the parameters of decoding cost, and what those against loops do: python -m benchmarks.samplers [--loops].

Costs: the time to sample 96 tokens with each parameter, less that without it, as a share of a step that decodes 96
sequences of 124M at a context of 600 tokens; the sequences share their prompt, which makes the step faster and so the
share larger. --loops: 200 completions of 200 tokens by the embedded model; how many of them loop at some point, by the
rule of stop_loops, and the mean share of their 4-grams that occurred before (seq-rep-4).
"""

import argparse
import statistics
import time
from contextlib import closing
from typing import Any, get_args

import numpy as np
from threadpoolctl import threadpool_limits

from batchgen.engine.engine import Engine
from batchgen.engine.sampler import sample
from batchgen.engine.sequence import Prompt, Sequence, is_loop, make_breakers, sample_seeds
from batchgen.generator import Generator
from batchgen.gpt2.params import Array, nest
from batchgen.gpt2.weights import pack
from batchgen.text.stopping import breaker_ids
from batchgen.text.tokenizer import Tokenizer
from batchgen.types import DRY_BREAKERS, Precision, SamplingParams
from batchgen.workers.complete import repetition
from benchmarks.machine import blas, processor, without_blas_variables
from benchmarks.models import SIZE_124M
from tests.support.tensors import random_tensors
from tests.support.vocabulary import gpt2_vocabulary_dir

BATCH, CONTEXT, STEPS, REPEATS = 96, 600, 8, 12
KV_BYTES = 2 * 2**30

COSTS: dict[str, dict[str, Any]] = {
    "no_repeat_ngram_size 3": {"no_repeat_ngram_size": 3},
    "dry_multiplier 0.8": {"dry_multiplier": 0.8},
    "dry_multiplier 0.8, dry_allowed_length 0": {"dry_multiplier": 0.8, "dry_allowed_length": 0},
    "typical_p 0.9": {"typical_p": 0.9},
    "top_n_sigma 1": {"top_n_sigma": 1.0},
    "xtc_probability 1": {"xtc_probability": 1.0},
    "allowed_token_ids, 2 of them": {"allowed_token_ids": (11, 13)},
    "allowed_token_ids, 40,000 of them": {"allowed_token_ids": tuple(range(40_000))},
}
COSTS["all of these"] = {name: value for one in reversed(COSTS.values()) for name, value in one.items()}

LOOPS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy, no_repeat_ngram_size 3": {"no_repeat_ngram_size": 3},
    "greedy, dry_multiplier 0.8": {"dry_multiplier": 0.8},
    "temperature 0.8": {"temperature": 0.8},
    "temperature 0.8, dry_multiplier 0.8": {"temperature": 0.8, "dry_multiplier": 0.8},
}
BEGINNINGS = (
    *("Once upon a time there was a {} who", "The {} said to his youngest daughter,", "One day the {} went out and"),
    *("In the middle of the forest lived a {}.", "When the {} heard this,", '"Who are you?" asked the {}.'),
    *("There was once a {} who had three sons.", "Then the {} cried:", "Nobody knew where the {}", "The old {} was"),
)
WHO = "king fox wolf giant miller fisherman soldier tailor witch princess bear hare cat mouse boy queen cook bird"
WHOM = (*WHO.split(), "poor woman", "wise man")


def seconds_of_step(engine: Engine) -> float:
    """The median step that decodes BATCH sequences."""
    params = SamplingParams(max_tokens=STEPS + 3, temperature=1.0, n=BATCH, ignore_eos=True)
    ids = np.random.default_rng(0).integers(0, 50_256, CONTEXT).tolist()
    seconds = []
    with closing(engine.steps([Prompt(0, tuple(ids), params, sample_seeds(0, 0, BATCH))])) as steps:
        while len(next(steps)[1]) < BATCH:
            pass
        for _ in range(STEPS):
            start = time.perf_counter()
            next(steps)
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def make_batch(ids: Array, tokenizer: Tokenizer, options: dict[str, Any]) -> list[Sequence]:
    """A sequence for each row of ids [BATCH, CONTEXT], half of them prompt."""
    params = SamplingParams(max_tokens=2 * CONTEXT, temperature=1.0, **options)
    breakers = make_breakers(breaker_ids(DRY_BREAKERS, tokenizer))
    half = CONTEXT // 2
    return [
        Sequence(Prompt(0, tuple(row[:half]), params, (0,), breakers=breakers), 0, 0, token_ids=row[half:])
        for row in ids.tolist()
    ]


def seconds_of_samples(logits: Array, batches: dict[str, list[Sequence]]) -> dict[str, float]:
    """The least time to sample each batch, in turn."""
    seconds = dict.fromkeys(batches, np.inf)
    for _ in range(REPEATS):
        for name, sequences in batches.items():
            rows = logits.copy()
            start = time.perf_counter()
            sample(rows, sequences, ())
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


def print_costs(precisions: tuple[Precision, ...]) -> None:
    tokenizer, rng = Tokenizer.load(gpt2_vocabulary_dir()), np.random.default_rng(1)
    logits = rng.normal(0, 3, (BATCH, SIZE_124M.n_vocab)).astype(np.float32)
    kinds = {"few repeats": 50_000, "many": 20, "one token": 1}
    shares: dict[str, list[float]] = {name: [] for name in COSTS}
    steps = {}
    params = nest(random_tensors(SIZE_124M), SIZE_124M.n_layer)
    sampled = []
    for n_distinct in kinds.values():
        ids = rng.integers(100, 100 + n_distinct, (BATCH, CONTEXT))
        batches = {name: make_batch(ids, tokenizer, options) for name, options in ({"": {}} | COSTS).items()}
        sampled.append(seconds_of_samples(logits, batches))
    for precision in precisions:
        steps[precision] = seconds_of_step(Engine(pack(params, precision), SIZE_124M, eos_ids=(), kv_bytes=KV_BYTES))
        for name in COSTS:
            shares[name] += [(one[name] - one[""]) / steps[precision] for one in sampled]
    names = [f"{precision}, {kind}" for precision in precisions for kind in kinds]
    print(f"{processor()}, one core; NumPy {np.__version__}, {blas()}")
    print("; ".join(f"{name}: {1e3 * seconds:,.0f} ms a step" for name, seconds in steps.items()), "\n")
    print_table(["parameter", *names], [[name, *(f"{s:.2%}" for s in shares[name])] for name in COSTS])


def print_loops() -> None:
    generator = Generator("tales")
    prompts = [beginning.format(who) for beginning in BEGINNINGS for who in WHOM]
    rows = []
    for name, options in LOOPS.items():
        found = [one.completion_token_ids for one in generator.generate(prompts, max_tokens=200, **options)]
        loops = sum(any(is_loop(list(ids[:n])) for n in range(1, len(ids) + 1)) for ids in found if ids)
        repeated = statistics.mean(repetition(ids) or 0.0 for ids in found if ids)
        rows.append([name, f"{loops / len(prompts):.1%}", f"{repeated:.1%}"])
    print_table([f"{len(prompts)} completions", "that loop", "4-grams that occurred before"], rows)


def print_table(head: list[str], rows: list[list[str]]) -> None:
    for cells in (head, ["---", *["--:"] * (len(head) - 1)], *rows):
        print(f"| {' | '.join(cells)} |")


def main() -> None:
    without_blas_variables("benchmarks.samplers")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loops", action="store_true", help="measure loops instead of costs")
    parser.add_argument("--precision", choices=get_args(Precision), help="of costs; both if not given")
    args = parser.parse_args()
    with threadpool_limits(1, user_api="blas"):
        if args.loops:
            print_loops()
        else:
            print_costs((args.precision,) if args.precision else get_args(Precision))


if __name__ == "__main__":
    main()
