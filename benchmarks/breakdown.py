"""Where the engine's time goes, in one process: python -m benchmarks.breakdown.

Three cases on random weights of 124M's shape: a step of 96 sequences and a step of 256, each at about 124 tokens of
context, and a step of 1,024 prompt tokens. A step is compared with this machine's own rate, measured in the same run:
np.matmul of the same shapes, on matrices that stay in the cache, and nothing else.
"""

import os
import statistics
import sys
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
from threadpoolctl import threadpool_limits

from batchgen.engine import engine as engine_module
from batchgen.engine.engine import MAX_ROWS, Engine
from batchgen.engine.probe import blas_info
from batchgen.engine.sequence import Prompt
from batchgen.gpt2 import forward as forward_module
from batchgen.gpt2.forward import Forward
from batchgen.gpt2.params import Array, nest, random_tensors
from batchgen.types import SamplingParams
from benchmarks.machine import UNSET
from benchmarks.models import SIZE_124M

CONTEXT, STEPS = 124, 16  # 2*STEPS steps about a mean of CONTEXT tokens a sequence
PREFILL_PROMPTS, PREFILL_TOKENS = 8, 128
KV_BYTES = 4 * 2**30
ATTENTION = ("_attend_decode", "_attend_prefill", "_write_cache")

Shape = tuple[int, int, int]  # m, k, n


class Clock:
    """Seconds of each part of the work, and the number of weight products of each shape."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.shapes: Counter[Shape] = Counter()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds[name] += time.perf_counter() - start
            return result

        return wrapped

    def matmul(self, a: Array, b: Array, out: Array | None = None) -> Array:
        """np.matmul; two-dimensional products are with weights, the others are attention's."""
        start = time.perf_counter()
        result = np.matmul(a, b, out=out)
        elapsed = time.perf_counter() - start
        if b.ndim == 2:
            self.seconds["weights"] += elapsed
            self.shapes[len(a), *b.shape] += 1
        else:
            self.seconds["attention's products"] += elapsed
        return result


class TimedNumPy:
    """NumPy with the clock's matmul."""

    def __init__(self, clock: Clock) -> None:
        self.matmul = clock.matmul

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


@contextmanager
def instrument(clock: Clock) -> Iterator[None]:
    """Put the forward pass and the engine on the clock."""
    attention = {name: clock.timed("attention", getattr(Forward, name)) for name in ATTENTION}
    with (
        patch.object(forward_module, "np", TimedNumPy(clock)),
        patch.object(engine_module, "sample", clock.timed("sampling", engine_module.sample)),
        patch.multiple(Forward, **attention),
    ):
        yield


@dataclass(slots=True)
class Case:
    """The seconds of one step: without the clock, and with it, where each part has its own."""

    name: str
    rows: int
    plain: float
    clocked: float
    parts: dict[str, float]
    shapes: dict[Shape, float] = field(default_factory=dict)  # number of products in one step

    @property
    def gflop(self) -> float:
        return sum(2 * m * k * n * count for (m, k, n), count in self.shapes.items()) / 1e9


def prompts(n: int, length: int, max_tokens: int) -> list[Prompt]:
    rng = np.random.default_rng(0)
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    ids = rng.integers(0, 50_256, (n, length)).tolist()
    return [Prompt(row, tuple(ids[row]), params, (0,)) for row in range(n)]


def decode_case(engine: Engine, n: int) -> Case:
    """Steps that decode n sequences; those that finished prefill first are a few tokens ahead."""
    length = CONTEXT - STEPS
    passes = -(-n * length // (MAX_ROWS - n))  # of prefill, at most
    steps = engine.steps(prompts(n, length - passes // 2, passes + 2 * STEPS + 1))
    while len(next(steps)[1]) < n:  # until the last prompt is read; later steps only decode
        pass
    with closing(steps):  # frees the arena
        case = measure(f"Decode, {n} sequences", n, lambda: next(steps))
    if {m for m, _, _ in case.shapes} != {n}:
        raise RuntimeError(f"not every step had {n} sequences: {case.shapes}")
    return case


def prefill_case(engine: Engine) -> Case:
    """One step that reads as many prompts as fit into a pass, and completes them."""
    batch = prompts(PREFILL_PROMPTS, PREFILL_TOKENS, 1)
    rows = PREFILL_PROMPTS * PREFILL_TOKENS
    deque(engine.steps(batch), maxlen=0)
    return measure(f"Prefill, {rows:,} rows", rows, lambda: deque(engine.steps(batch), maxlen=0))


def measure(name: str, rows: int, step: Callable[[], object]) -> Case:
    """STEPS steps without the clock and STEPS with it, in turn."""
    clock = Clock()
    plain, clocked = [], []
    for _ in range(STEPS):
        plain.append(seconds_of(step))
        with instrument(clock):
            clocked.append(seconds_of(step))
    parts = {part: seconds / STEPS for part, seconds in clock.seconds.items()}
    shapes = {shape: count / STEPS for shape, count in clock.shapes.items()}
    return Case(name, rows, statistics.median(plain), statistics.mean(clocked), parts, shapes)


def seconds_of(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def fewest_seconds(shapes: list[Shape], seconds: float = 0.4) -> dict[Shape, float]:
    """The seconds that each product takes at best, on matrices that stay in the cache."""
    best: dict[Shape, float] = {}
    rng = np.random.default_rng(0)
    for m, k, n in shapes:
        a, b = rng.random((m, k), np.float32), rng.random((k, n), np.float32)
        out = np.empty((m, n), np.float32)
        best[m, k, n] = float("inf")
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            start = time.perf_counter()
            np.matmul(a, b, out=out)
            best[m, k, n] = min(best[m, k, n], time.perf_counter() - start)
    return best


def report(case: Case, best: dict[Shape, float]) -> None:
    """The case's table: milliseconds a step and shares of it, and the fraction of the machine's own rate."""
    ideal = sum(best[shape] * count for shape, count in case.shapes.items())
    attention, sampling, weights = (case.parts.get(part, 0.0) for part in ("attention", "sampling", "weights"))
    lines = {
        "products with weights": weights,
        "attention": attention,
        "  of it, products": case.parts.get("attention's products", 0.0),
        "sampling": sampling,
        "the rest": case.clocked - weights - attention - sampling,
        "a step, with the clock": case.clocked,
        "a step": case.plain,
        "the same products alone": ideal,
    }
    print(f"{case.name}, {case.gflop:.1f} GF of products with weights a step\n")
    print("| part                    |      ms |  share |")
    print("| ----------------------- | ------: | -----: |")
    for name, seconds in lines.items():
        print(f"| {name:23} | {seconds * 1e3:7.1f} | {seconds / case.clocked:6.1%} |")
    print(
        f"\n{ideal / case.plain:.0%} of the machine's own sgemm rate at these shapes, all overheads included: "
        f"{case.gflop / case.plain:,.0f} of {case.gflop / ideal:,.0f} GF/s, {case.rows / case.plain:,.0f} rows/s\n"
    )


def unset_variables() -> None:
    """Start again without the variables that change BLAS, if any is set: BLAS reads them when it is loaded."""
    if any(name in os.environ for name in UNSET if "OPENBLAS" in name):
        environment = {name: value for name, value in os.environ.items() if name not in UNSET}
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.breakdown", *sys.argv[1:]], environment)


def main() -> None:
    unset_variables()
    with threadpool_limits(1, user_api="blas"):
        params = nest(random_tensors(SIZE_124M), SIZE_124M.n_layer)
        engine = Engine(params, SIZE_124M, eos_ids=(), kv_bytes=KV_BYTES)
        print(f"{blas_info()}, NumPy {np.__version__}\n")
        for make in (lambda: decode_case(engine, 96), lambda: decode_case(engine, 256), lambda: prefill_case(engine)):
            case = make()
            report(case, fewest_seconds(list(case.shapes)))


if __name__ == "__main__":
    main()
