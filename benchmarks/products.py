"""Products with weights on one core, beside np.matmul, onnxruntime and oneDNN: python -m benchmarks.products.

One pass goes through the weights of 124M's twelve layers, which come from memory, as in a step of the engine. The best
pass counts, in GF/s: a multiplication and an addition are 2 operations, of floats or of bytes.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from batchgen.gpt2.kernels import STORE, linear_float32, linear_int8, quantise
from batchgen.gpt2.microkernels import target_vectors
from batchgen.gpt2.params import Array
from batchgen.gpt2.weights import Float32Linear, Int8Linear, to_int8, to_panels
from benchmarks.machine import blas, processor, without_blas_variables
from benchmarks.peers.protocol import Rates
from benchmarks.systems import ROOT, MissingError, clean_environment, install_environment, python_of, run_logged

SHAPES = [(768, 2304), (768, 768), (768, 3072), (3072, 768)]  # [n_in, n_out] of a layer of 124M
LAYERS = 12
ROWS = (1, 4, 16, 32, 64, 96, 128, 256, 512, 1024)
PEERS = {"onnxruntime": "products_onnxruntime", "transformers": "products_torch"}  # environment: script
FLOP = sum(2 * n_in * n_out for n_in, n_out in SHAPES) * LAYERS  # of one row


class Buffers:
    """Rows of products with each of SHAPES, and room for their results."""

    def __init__(self, m: int, rng: np.random.Generator) -> None:
        self.x = {n_in: rng.standard_normal((m, n_in), dtype=np.float32) for n_in, _ in SHAPES}
        self.out = {n_out: np.empty((m, n_out), np.float32) for _, n_out in SHAPES}
        self.u = {n_in: np.empty((m, n_in), np.uint8) for n_in, _ in SHAPES}
        self.scale, self.zero = np.empty(m, np.float32), np.empty(m, np.int32)


def matmul(w: Array, b: Buffers) -> None:
    np.matmul(b.x[len(w)], w, out=b.out[w.shape[1]])


def float32(linear: Float32Linear, b: Buffers) -> None:
    linear_float32(b.x[linear.panels.shape[1]], linear.panels, linear.b, STORE, b.out[len(linear.b)])


def int8(linear: Int8Linear, b: Buffers) -> None:
    n_in, out = len(linear.inverse), b.out[len(linear.b)]
    quantise(b.x[n_in], linear.inverse, linear.offset, b.u[n_in], b.scale, b.zero)
    weights = linear.panels, linear.scale, linear.column_sum, linear.b
    linear_int8(b.u[n_in], b.scale, b.zero, *weights, STORE, out)


def ours(repeat: int) -> Rates:
    """np.matmul, and the kernels with all that they do: bias, and in int8 rounding rows and dequantising."""
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal(shape, dtype=np.float32) for _ in range(LAYERS) for shape in SHAPES]
    bias = {n_out: np.zeros(n_out, np.float32) for _, n_out in SHAPES}
    kinds = {
        "np.matmul": (matmul, weights),
        "batchgen float32": (float32, [Float32Linear(to_panels(w), bias[w.shape[1]]) for w in weights]),
        "batchgen int8": (int8, [to_int8(w, bias[w.shape[1]]) for w in weights]),
    }
    rates: Rates = {name: {} for name in kinds}
    for m in ROWS:
        buffers = Buffers(m, rng)
        for name, (multiply, packed) in kinds.items():
            best = float("inf")
            for _ in range(repeat):
                start = time.perf_counter()
                for w in packed:
                    multiply(w, buffers)
                best = min(best, time.perf_counter() - start)
            rates[name][str(m)] = m * FLOP / best / 1e9
    return rates


def peers(cache: Path, repeat: int) -> Rates:
    """The rates of libraries that can be installed here."""
    job = json.dumps({"shapes": SHAPES, "rows": ROWS, "layers": LAYERS, "repeat": repeat})
    rates: Rates = {}
    for environment, script in PEERS.items():
        try:
            install_environment(environment, cache)
            command = [str(python_of(environment, cache)), "-m", f"benchmarks.peers.{script}", job]
            output, _ = run_logged(command, cache / "logs" / f"{script}.log", clean_environment(), 600)
            rates |= json.loads(output)
        except MissingError as error:
            print(f"{environment}: missing: {error}", file=sys.stderr)
    return rates


def table(rates: Rates) -> str:
    lines = ["| GF/s at M = | " + " | ".join(map(str, ROWS)) + " |", "|---|" + "--:|" * len(ROWS)]
    lines += [f"| {name} | " + " | ".join(f"{rate[str(m)]:,.0f}" for m in ROWS) + " |" for name, rate in rates.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=ROOT / ".bench")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    without_blas_variables("benchmarks.products")
    with threadpool_limits(1, user_api="blas"):
        print(f"{processor()}, one core; kernels of {target_vectors()}; NumPy {np.__version__}, {blas()}\n", flush=True)
        rates = ours(args.repeat)
    if args.peers:
        rates |= peers(args.cache.resolve(), args.repeat)
    print(table(rates))


if __name__ == "__main__":
    main()
