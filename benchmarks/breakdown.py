"""Where the engine's time goes, in one process, in both precisions: python -m benchmarks.breakdown.

Three cases on random weights of 124M's shape: a step of 96 sequences and a step of 256, each at about 124 tokens of
context, and a step of 1,024 prompt tokens. A step is compared with the same products and nothing else, measured in the
same run, and with np.matmul of the same shapes. --score: instead, a step that scores every token of 5 texts of 200
tokens. --picture FILE.svg draws tokens/s over the number in flight.
"""

import argparse
import statistics
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args
from unittest.mock import patch

import numpy as np
from threadpoolctl import threadpool_limits

from batchgen.engine import engine as engine_module
from batchgen.engine import scores as scores_module
from batchgen.engine.engine import MAX_ROWS, Engine
from batchgen.engine.sequence import Prompt
from batchgen.gpt2 import forward as forward_module
from batchgen.gpt2.microkernels import target_vectors
from batchgen.gpt2.params import nest
from batchgen.gpt2.weights import pack
from batchgen.types import READING, Precision, SamplingParams
from benchmarks.machine import blas, processor, without_blas_variables
from benchmarks.models import SIZE_124M
from benchmarks.picture import Line, draw
from tests.support.tensors import random_tensors

CONTEXT, STEPS = 124, 16  # 2*STEPS steps about a mean of CONTEXT tokens a sequence
PREFILL_PROMPTS, PREFILL_TOKENS = 8, 128
SCORE_TEXTS, SCORE_TOKENS, SCORE_STEPS = 5, 200, 5
IN_FLIGHT = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256)
SCORE = READING
KV_BYTES = 4 * 2**30
PARTS = {  # kernels of the forward pass: part of a step
    "linear_float32": "products with weights",
    "linear_int8": "products with weights",
    "quantise": "rounding rows to bytes",
    "attend": "attention",
    "write": "writing keys and values",
    "layer_norm": "layer norm",
}
OTHER_PARTS = {"sample": "sampling", "score_tokens": "log-softmax and ranks"}

Shape = tuple[int, int, int]  # m, k, n


class Clock:
    """Seconds of each part of the work, and the number of weight products of each shape."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.shapes: Counter[Shape] = Counter()

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any) -> Any:
            start = time.perf_counter()
            result = function(*args)
            self.seconds[part] += time.perf_counter() - start
            if part == "products with weights":
                self.shapes[len(args[0]), args[0].shape[1], args[-1].shape[1]] += 1
            return result

        return wrapped


@contextmanager
def instrument(clock: Clock) -> Iterator[None]:
    """Put the kernels of the forward pass, and sampling, on the clock."""
    with ExitStack() as stack:
        for module, name in ((engine_module, "sample"), (scores_module, "score_tokens")):
            stack.enter_context(patch.object(module, name, clock.timed(OTHER_PARTS[name], getattr(module, name))))
        for name, part in PARTS.items():
            kernel = getattr(forward_module, name)
            stack.enter_context(patch.object(forward_module, name, clock.timed(part, kernel)))
        yield


@dataclass(slots=True)
class Case:
    """The seconds of one step: without the clock, and with it, where each part has its own."""

    name: str
    rows: int
    plain: float
    clocked: float
    parts: dict[str, float]
    shapes: dict[Shape, float]  # number of products in one step
    products_alone: float

    @property
    def gflop(self) -> float:
        return sum(2 * m * k * n * count for (m, k, n), count in self.shapes.items()) / 1e9


def prompts(n: int, length: int, max_tokens: int) -> list[Prompt]:
    rng = np.random.default_rng(0)
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    ids = rng.integers(0, 50_256, (n, length)).tolist()
    return [Prompt(row, tuple(ids[row]), params, (0,)) for row in range(n)]


def decode_steps(engine: Engine, n: int, steps: int) -> Iterator[object]:
    """Steps that decode n sequences about CONTEXT tokens; those that finish prefill first are a few tokens ahead."""
    length = CONTEXT - steps // 2
    passes = -(-n * length // (MAX_ROWS - n))  # of prefill, at most
    found = engine.steps(prompts(n, length - passes // 2, passes + steps + 1))
    while len(next(found)[1]) < n:  # until the last prompt is read; later steps only decode
        pass
    return found


def decode_case(engine: Engine, n: int) -> Case:
    with closing(decode_steps(engine, n, 2 * STEPS)) as steps:  # closing frees the arena
        case = measure(engine, f"Decode, {n} sequences", n, lambda: next(steps))
    if {m for m, _, _ in case.shapes} != {n}:
        raise RuntimeError(f"not every step had {n} sequences: {case.shapes}")
    return case


def prefill_case(engine: Engine) -> Case:
    """One step that reads as many prompts as fit into a pass, and completes them."""
    batch = prompts(PREFILL_PROMPTS, PREFILL_TOKENS, 1)
    rows = PREFILL_PROMPTS * PREFILL_TOKENS
    deque(engine.steps(batch), maxlen=0)
    return measure(engine, f"Prefill, {rows:,} rows", rows, lambda: deque(engine.steps(batch), maxlen=0))


def score_case(engine: Engine) -> Case:
    """One step that reads as many texts as fit into a pass, and scores all their tokens but the first."""
    batch = [replace(one, params=SCORE, scored=1) for one in prompts(SCORE_TEXTS, SCORE_TOKENS + 1, 1)]
    rows = SCORE_TEXTS * SCORE_TOKENS
    deque(engine.steps(batch), maxlen=0)
    return measure(engine, f"Score, {rows:,} rows", rows, lambda: deque(engine.steps(batch), maxlen=0), SCORE_STEPS)


def measure(engine: Engine, name: str, rows: int, step: Callable[[], object], steps: int = STEPS) -> Case:
    """So many steps without the clock and as many with it, in turn."""
    clock = Clock()
    plain, clocked = [], []
    for _ in range(steps):
        plain.append(seconds_of(step))
        with instrument(clock):
            clocked.append(seconds_of(step))
    parts = {part: seconds / steps for part, seconds in clock.seconds.items()}
    shapes = {shape: count / steps for shape, count in clock.shapes.items()}
    precision = engine.forward.weights.precision
    name = f"{name}, {precision}"
    return Case(name, rows, statistics.median(plain), statistics.mean(clocked), parts, shapes, alone(engine, shapes))


def seconds_of(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def alone(engine: Engine, shapes: dict[Shape, float]) -> float:
    """The seconds of a step's products at best: all layers and the head, one after another, and nothing else."""
    forward, weights = engine.forward, engine.forward.weights
    linears = [w for block in weights.blocks for w in (block.c_attn, block.attn_proj, block.c_fc, block.mlp_proj)]
    linears.append(weights.lm_head)
    by_shape: dict[tuple[int, int], list[Any]] = defaultdict(list)
    for linear in linears:
        n_in = linear.panels.shape[1] * (1 if weights.precision == "float32" else linear.panels.shape[3])
        by_shape[n_in, len(linear.b)].append(linear)
    rng, total = np.random.default_rng(0), 0.0
    for (m, n_in, n_out), count in shapes.items():
        x, out = rng.random((m, n_in), np.float32), np.empty((m, n_out), np.float32)
        clock = Clock()
        with instrument(clock):
            for _ in range(4):
                for linear in by_shape[n_in, n_out]:
                    forward._linear(x, linear, 0, out)
        total += clock.seconds["products with weights"] / 4 / len(by_shape[n_in, n_out]) * count
    return total


def matmul_seconds(shapes: dict[Shape, float], seconds: float = 0.3) -> float:
    """The seconds of np.matmul at best for the same products, on matrices that stay in the cache."""
    total = 0.0
    rng = np.random.default_rng(0)
    for (m, k, n), count in shapes.items():
        a, b, out = rng.random((m, k), np.float32), rng.random((k, n), np.float32), np.empty((m, n), np.float32)
        best, end = float("inf"), time.perf_counter() + seconds
        while time.perf_counter() < end:
            best = min(best, seconds_of(lambda: np.matmul(a, b, out=out)))  # noqa: B023
        total += best * count
    return total


def report(case: Case) -> None:
    """The case's table: milliseconds a step and shares of it, and the fraction of the kernels' own rate."""
    parts = case.parts | {"the rest": case.clocked - sum(case.parts.values())}
    lines = sorted(parts.items(), key=lambda item: -item[1])
    lines += [("a step, with the clock", case.clocked), ("a step", case.plain)]
    lines += [("the same products alone", case.products_alone), ("np.matmul of them", matmul_seconds(case.shapes))]
    print(f"{case.name}, {case.gflop:.1f} GF of products with weights a step\n")
    print("| part                    |      ms |  share |")
    print("| ----------------------- | ------: | -----: |")
    for name, seconds in lines:
        print(f"| {name:23} | {seconds * 1e3:7.1f} | {seconds / case.clocked:6.1%} |")
    print(
        f"\n{case.products_alone / case.plain:.0%} of the product kernels' own rate, all overheads included: "
        f"{case.gflop / case.plain:,.0f} of {case.gflop / case.products_alone:,.0f} GF/s, "
        f"{case.rows / case.plain:,.0f} rows/s\n"
    )


def in_flight(engine: Engine) -> Line:
    """Tokens/s of decoding over the number of sequences in flight."""
    rates = []
    for n in IN_FLIGHT:
        with closing(decode_steps(engine, n, 8)) as steps:
            rates.append(n / min(seconds_of(lambda: next(steps)) for _ in range(8)))  # noqa: B023
    points = list(zip(IN_FLIGHT, rates, strict=True))
    print(f"{engine.forward.weights.precision}: " + ", ".join(f"{n}: {rate:,.0f}" for n, rate in points))
    return Line(engine.forward.weights.precision, points)


def main() -> None:
    without_blas_variables("benchmarks.breakdown")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", type=Path, help="draw tokens/s over the number of sequences in flight")
    parser.add_argument("--score", action="store_true", help="measure the scoring of texts instead")
    args = parser.parse_args()
    with threadpool_limits(1, user_api="blas"):
        print(f"{processor()}, one core, {target_vectors()}; NumPy {np.__version__}, {blas()}\n")
        lines = []
        params = nest(random_tensors(SIZE_124M), SIZE_124M.n_layer)
        for precision in get_args(Precision):
            engine = Engine(pack(params, precision), SIZE_124M, eos_ids=(), kv_bytes=KV_BYTES)
            if args.picture:
                lines.append(in_flight(engine))
                continue
            if args.score:
                report(score_case(engine))
                continue
            for n in (96, 256):
                report(decode_case(engine, n))
            report(prefill_case(engine))
    if args.picture:
        title = f"Tokens/s of one core while decoding at about {CONTEXT} keys, by sequences in flight ({processor()})"
        args.picture.write_text(draw(title, lines), encoding="utf-8")


if __name__ == "__main__":
    main()
