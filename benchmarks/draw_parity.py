"""Compare typical_p, top_n_sigma and XTC with their peers: python -m benchmarks.draw_parity LLAMA_CPP [--write].

typical_p with transformers' TypicalLogitsWarper, and all three with llama.cpp's samplers (LLAMA_CPP is a folder with
its sources, see llama_parity.py), on random logits: wide and flat ones, with -inf, with ties, at some temperatures.
Each must keep the same tokens with the same probabilities within 1e-6, unless the definition in float64 has a token
within 1e-4 of the border: the peers add up in float32. Not compared with llama.cpp: which of equal tokens it keeps
(any; batchgen all for typical_p, as transformers, and the last for XTC), and typical_p with -inf (a nan there). --write
puts some cases into tests/cases/, for the tests.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from ctypes import c_float, c_size_t, c_uint32, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers.generation.logits_process import TypicalLogitsWarper

from batchgen.engine import sampler
from batchgen.gpt2.params import Array
from batchgen.types import SamplingParams
from benchmarks.llama_parity import PEER, Llama, probabilities
from tests.support.distribution import distribution

CASES = Path(__file__).resolve().parents[1] / "tests" / "cases" / "draws_peers.json"
N_RANDOM, N_WRITTEN, TOLERANCE, MARGIN = 3000, 40, 1e-6, 1e-4
TRANSFORMERS = f"transformers {transformers.__version__}"


@dataclass(frozen=True)
class DrawCase:
    """Logits, and one parameter besides the temperature."""

    logits: Array
    temperature: float
    name: str
    value: float

    @property
    def params(self) -> SamplingParams:
        more = {"xtc_probability": 1.0} if self.name == "xtc_threshold" else {}
        return SamplingParams(temperature=self.temperature, **{self.name: self.value}, **more)

    @property
    def scaled(self) -> Array:
        return np.ascontiguousarray(self.logits / np.float32(self.temperature))


def by_transformers(case: DrawCase) -> Array:
    """[n_vocab] logits after the warper."""
    found = TypicalLogitsWarper(case.value)(torch.zeros((1, 0), dtype=torch.long), torch.tensor(case.scaled[None]))
    return np.asarray(found[0].numpy(), np.float32)


def by_llama(llama: Llama, case: DrawCase) -> Array:
    make = getattr(llama.library, f"llama_sampler_init_{case.name.removesuffix('_p').removesuffix('_threshold')}")
    make.restype = c_void_p
    value, more = c_float(case.value), c_size_t(1)
    given: dict[str, tuple[Any, ...]] = {"typical_p": (value, more), "top_n_sigma": (value,)}
    made = make(*given.get(case.name, (c_float(1.0), value, more, c_uint32(7))))
    return llama.apply(c_void_p(made), case.scaled)


def by_batchgen(case: DrawCase) -> Array:
    """[n_vocab] probabilities."""
    row, buffers = case.logits.copy(), sampler.make_buffers(case.logits.size)
    found = sampler.find_candidates(row, row.max(), case.params, case.name == "xtc_threshold", buffers)
    p = np.zeros(case.logits.size, np.float64)
    p[slice(None) if found.ids is None else found.ids] = found.weights
    return np.asarray(p / p.sum())


def random_cases(seed: int, n: int, largest: int) -> Iterator[DrawCase]:
    rng = np.random.default_rng(seed)
    for _ in range(n):
        logits = rng.normal(0, rng.choice([0.3, 2.0, 6.0]), rng.integers(2, largest)).astype(np.float32)
        if rng.random() < 0.3:
            logits = np.round(logits)
        if rng.random() < 0.3:
            logits[1:][rng.random(logits.size - 1) < 0.3] = -np.inf
        name = str(rng.choice(["typical_p", "top_n_sigma", "xtc_threshold"]))
        highest = {"typical_p": 0.999, "top_n_sigma": 3.0, "xtc_threshold": 0.3}[name]
        value = float(np.float32(rng.uniform(0.001, highest)))
        yield DrawCase(logits, float(rng.choice([0.5, 1.0, 2.0])), name, value)


def peers_of(llama: Llama, case: DrawCase) -> Iterator[tuple[str, Array]]:
    """What each peer makes of a case."""
    finite = case.logits[np.isfinite(case.logits)]
    if case.name == "typical_p":
        yield TRANSFORMERS, by_transformers(case)
    has_ties, has_others = np.unique(finite).size < finite.size, finite.size < case.logits.size
    is_undefined = case.name == "typical_p" and (has_ties or has_others) or case.name == "xtc_threshold" and has_ties
    if not is_undefined:
        yield PEER, by_llama(llama, case)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path, metavar="LLAMA_CPP")
    parser.add_argument("--write", action="store_true", help="write the cases of the tests")
    args = parser.parse_args()
    counts: dict[str, list[int]] = {}
    written: list[dict[str, Any]] = []
    worst = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        llama = Llama(args.sources, Path(scratch))
        for case in [*random_cases(0, N_RANDOM, 60), *random_cases(1, N_RANDOM // 10, 50_257)]:
            is_near = distribution(case.logits, case.params, case.name == "xtc_threshold").margin < MARGIN
            for peer, logits in peers_of(llama, case):
                difference = float(np.abs(by_batchgen(case) - probabilities(logits)).max())
                count = counts.setdefault(f"{case.name}, {peer}", [0, 0, 0])
                count[0] += 1
                count[1] += is_near
                count[2] += difference > TOLERANCE and not is_near
                worst = max(worst, 0.0 if is_near else difference)
                if len(written) < N_WRITTEN and not is_near and case.logits.size < 30:
                    kept = np.flatnonzero(logits > -np.inf).tolist()
                    values = {"temperature": case.temperature, case.name: case.value}
                    shown = [None if x == -np.inf else x for x in case.logits.tolist()]
                    written.append({"peer": peer, "logits": shown, "params": values, "kept": kept})
    for name, (n, near, wrong) in counts.items():
        print(f"{name}: {n:,} cases, {near} of them at a border; {wrong} differ")
    print(f"probabilities differ by {worst:.1e} at most")
    if args.write:
        CASES.write_text(json.dumps(written) + "\n", encoding="utf-8")
    raise SystemExit(int(worst > TOLERANCE))


if __name__ == "__main__":
    main()
