"""Compare DRY with llama.cpp's own code: python -m benchmarks.llama_parity LLAMA_CPP [--write].

LLAMA_CPP is a folder with llama.cpp's sources (github.com/ggml-org/llama.cpp); its src/llama-sampler.cpp is compiled by
g++ in 10 s. Random contexts, breakers and parameters must give the same probabilities within 1e-6, and texts the same
breakers in GPT-2's vocabulary. --write puts some of them into tests/cases/, for the tests.
"""

import argparse
import ctypes
import json
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from batchgen.engine.draw import LOWEST
from batchgen.engine.repeats import lower_repeated
from batchgen.engine.sequence import make_breakers
from batchgen.gpt2.params import Array
from batchgen.text.stopping import breaker_ids
from batchgen.text.tokenizer import Tokenizer
from tests.support.vocabulary import gpt2_vocabulary_dir

SOURCE = Path(__file__).parent / "peers" / "llama_samplers.cpp"
CASES = Path(__file__).resolve().parents[1] / "tests" / "cases" / "dry_llama_cpp.json"
PEER = "llama.cpp, of llama-cpp-python 0.3.36"
N_RANDOM, N_WRITTEN, TOLERANCE = 20_000, 60, 1e-6
TEXTS = ("\n", ":", '"', "*", "\n\n", "é", "日本", " said the king", "</s>", "<|endoftext|>", "\nUser:", "qq")
_ENCODE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_char), ctypes.c_int, ctypes.POINTER(ctypes.c_int))


@dataclass(frozen=True, slots=True)
class DryCase:
    """What DRY is given."""

    logits: list[float]
    context: list[int]
    breakers: list[list[int]]
    multiplier: float
    base: float
    allowed: int


class Llama:
    """llama.cpp's samplers, compiled from its sources."""

    def __init__(self, sources: Path, scratch: Path) -> None:
        library = scratch / "llama_samplers.so"
        folders = [f"-I{sources / folder}" for folder in ("include", "ggml/include", "src")]
        flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-Wl,-z,lazy", "-Wl,--unresolved-symbols=ignore-all"]
        subprocess.run(["g++", *flags, *folders, str(SOURCE), "-o", str(library)], check=True)
        self.library = ctypes.CDLL(str(library), mode=1)  # RTLD_LAZY: what these samplers never call is missing
        self.library.peer_dry.restype = ctypes.c_void_p

    def dry(self, case: DryCase) -> Array:
        """[n_vocab] logits after DRY."""
        logits = np.array(case.logits, np.float32)
        bounds = np.cumsum([0, *map(len, case.breakers)], dtype=np.int32)
        tokens = np.array([token for one in case.breakers for token in one] or [0], np.int32)
        last_n = max(len(case.context), 1)
        floats = ctypes.c_float(case.multiplier), ctypes.c_float(case.base)
        sampler = ctypes.c_void_p(
            self.library.peer_dry(*floats, case.allowed, last_n, len(case.breakers), _at(bounds), _at(tokens))
        )
        for token in case.context:
            self.library.llama_sampler_accept(sampler, token)
        return self.apply(sampler, logits)

    def apply(self, sampler: Any, logits: Array) -> Array:
        """[n_vocab] logits after a sampler: -inf for tokens that it took away."""
        out = np.empty_like(logits)
        self.library.peer_apply(sampler, logits.size, _at(logits), _at(out))
        self.library.llama_sampler_free(sampler)
        return out

    def breakers(self, texts: Sequence[str], tokenizer: Tokenizer) -> list[list[list[int]]]:
        """The token sequences of each text, in order."""
        words = [tokenizer.decode_bytes([token]) for token in range(tokenizer.n_vocab)]

        def encode(text: Any, n: int, out: Any) -> int:
            ids = tokenizer.encode_part(ctypes.string_at(text, n).decode("utf-8", "replace"))
            for i, token in enumerate(ids):
                out[i] = token
            return len(ids)

        function = _ENCODE(encode)
        pointers = (ctypes.c_char_p * len(words))(*words)
        self.library.peer_vocab(len(words), pointers, _at(np.array([*map(len, words)], np.int32)), function)
        return [self._breakers(text) for text in texts]

    def _breakers(self, text: str) -> list[list[int]]:
        found = np.empty(2**20, np.int32)
        numbers = iter(found[: self.library.peer_breakers(text.encode(), _at(found), found.size)].tolist())
        return sorted([head, *(next(numbers) for _ in range(next(numbers)))] for head in numbers)


def _at(array: npt.NDArray[Any]) -> Any:
    return array.ctypes.data_as(ctypes.c_void_p)


def random_cases(n: int) -> Iterator[DryCase]:
    rng = np.random.default_rng(0)
    for _ in range(n):
        n_vocab = int(rng.integers(2, 9))
        context = rng.integers(0, n_vocab, rng.integers(1, 60)).tolist()
        if rng.random() < 0.3:
            context = context[: len(context) // 5 + 1] * 5
        breakers = {tuple(rng.integers(0, n_vocab, rng.integers(1, 4)).tolist()) for _ in range(rng.integers(0, 3))}
        multiplier, base = float(rng.choice([0.1, 0.8, 2.5, 100])), float(rng.choice([1, 1.1, 1.75, 3.3, 100]))
        logits = rng.normal(0, 4, n_vocab).astype(np.float32).tolist()
        yield DryCase(logits, context, [*map(list, sorted(breakers))], multiplier, base, int(rng.integers(0, 5)))


def lowered(case: DryCase) -> Array:
    """[n_vocab] logits after DRY, by batchgen."""
    logits = np.array(case.logits, np.float32)
    breakers = make_breakers(tuple(map(tuple, case.breakers)))
    floats = float(np.float32(case.multiplier)), float(np.float32(case.base))
    lower_repeated(logits, np.array(case.context, np.int32), *breakers, *floats, case.allowed)
    return logits


def probabilities(logits: Array) -> npt.NDArray[np.float64]:
    """[n] -> [n]; nan if every logit is -inf, as llama.cpp's are if every penalty is too high for a float32."""
    with np.errstate(invalid="ignore"):
        weights = np.exp(logits.astype(np.float64) - logits.max())
        return weights / weights.sum()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path, metavar="LLAMA_CPP")
    parser.add_argument("--write", action="store_true", help="write the cases of the tests")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        llama = Llama(args.sources, Path(scratch))
        tokenizer = Tokenizer.load(gpt2_vocabulary_dir())
        differences = [
            np.abs(probabilities(llama.dry(c)) - probabilities(lowered(c))).max() for c in random_cases(N_RANDOM)
        ]
        n_nan, worst = int(np.isnan(differences).sum()), float(np.nanmax(differences))
        print(f"DRY, {N_RANDOM:,} cases: probabilities differ by {worst:.1e} at most; {n_nan} are nan in llama.cpp")
        theirs = llama.breakers(TEXTS, tokenizer)
        same = [sorted(map(list, breaker_ids((text,), tokenizer))) for text in TEXTS] == theirs
        print(f"breakers of {len(TEXTS)} texts in GPT-2's vocabulary: {'equal' if same else 'NOT equal'}")
        if args.write:
            dry = [asdict(c) | {"lowered": np.maximum(llama.dry(c), LOWEST).tolist()} for c in random_cases(N_WRITTEN)]
            found = dict(zip(TEXTS, theirs, strict=True))
            CASES.write_text(json.dumps({"peer": PEER, "dry": dry, "breakers": found}) + "\n", encoding="utf-8")
    if not same or worst > TOLERANCE:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
