"""The same bits everywhere: whole jobs under other processors, tiles, batches and numbers of workers.

`python -m tests.same_bits` compares all of them, on tiny models and on 2,000 prompts of the embedded model.
tests/test_same_bits.py compares a few. Each target is a process: Numba and NumPy choose theirs when they are loaded.
"""

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow.parquet as pq
from llvmlite.binding import get_host_cpu_features
from numpy._core import _multiarray_umath as umath

from batchgen.gpt2.config import GPT2Config
from batchgen.job import DEFAULT_MODEL
from batchgen.run import run_job
from batchgen.types import Precision, SamplingParams
from tests.support.jobs import make_job
from tests.support.models import BYTES, write_byte_model

ROOT = Path(__file__).parents[1]
WIDTHS = (1, 8, 20, 24, 40, 64, 80, 100)  # of a head
PRECISIONS: tuple[Precision, ...] = ("float32", "int8")

ONLY = {"NUMBA_CPU_FEATURES": ""}  # not this machine's, which Numba adds to any name
_USED = [name for name in umath.__cpu_dispatch__ if umath.__cpu_features__[name]]
NO_NUMPY = {"NPY_DISABLE_CPU_FEATURES": " ".join(_USED)}
TARGETS = {
    "native": {},
    "skylake-avx512": {"NUMBA_CPU_NAME": "skylake-avx512", **ONLY},
    "haswell": {"NUMBA_CPU_NAME": "haswell", **ONLY},
    "generic": {"NUMBA_CPU_NAME": "generic", **ONLY},
    "alderlake, AVX-VNNI": {"NUMBA_CPU_NAME": "alderlake", **ONLY},
    "without VNNI": {"BATCHGEN_VECTORS": "16,16,0"},
    "narrow tiles, VNNI": {"BATCHGEN_VECTORS": "8,8,8"},
    "narrow tiles": {"BATCHGEN_VECTORS": "8,8,0"},
    "narrowest tiles": {"BATCHGEN_VECTORS": "4,4,0"},
    "not optimised": {"NUMBA_OPT": "0"},
}

NEEDED = {"skylake-avx512": "avx512vl", "haswell": "fma", "alderlake": "avxvnni"}  # of this machine, to run their code

# Greedy rows, drawn rows and rows with rules, by the number of the row; None: the parameters of the run.
CUT = {"top_k": 0, "top_n_sigma": 2.5, "typical_p": 0.7, "xtc_probability": 0.5}
ROWS = (None, {"temperature": 0}, {"temperature": 1.2, "min_p": 0.02}, {"repetition_penalty": 1.3, "top_k": 0}, CUT)
SCORES = {"logprobs": 2, "prompt_logprobs": 2}
SAMPLING = SamplingParams(max_tokens=10, n=2, temperature=0.9, top_k=20, top_p=0.95, seed=7, **SCORES)


@dataclass(frozen=True)
class Case:
    """One job; its name is that of what must be the same."""

    name: str
    model: Path | str
    prompts: Path
    precision: Precision
    max_tokens: int = 10
    work: dict[str, object] = field(default_factory=dict)


def is_possible(settings: dict[str, str]) -> bool:
    """Whether this machine has the instructions of a target."""
    needed = NEEDED.get(settings.get("NUMBA_CPU_NAME", ""))
    return needed is None or bool(get_host_cpu_features().get(needed))


def byte_config(width: int) -> GPT2Config:
    return replace(BYTES, n_head=2, n_embd=2 * width)


def write_prompts(path: Path, n: int, longest: int = 110) -> Path:
    """Prompts of 1 to `longest` letters: alone, equal, with a short and with a long beginning in common.

    With 2 samples a row they are more than one pass takes: a pass ends within a prompt.
    """
    rng = random.Random(n)
    letters = lambda size: "".join(rng.choices("abcdefgh ", k=size))  # noqa: E731
    shared = [letters(size) for size in (20, 70, longest - 20)]
    with open(path, "w", encoding="utf-8") as file:
        for i in range(n):
            text = (
                rng.choice(["", *shared]) + letters(rng.randint(1, 20)) if i % 3 else letters(rng.randint(1, longest))
            )
            text = shared[1] if i % 8 == 7 else text
            file.write(json.dumps({"prompt": text, **(ROWS[i % len(ROWS)] or {})}) + "\n")
    return path


def tiny_cases(folder: Path, widths: Iterable[int] = WIDTHS, n: int = 24) -> list[Case]:
    """Both precisions of a model for each width; of one also in small batches, cut otherwise, without sharing."""
    prompts = write_prompts(folder / "prompts.jsonl", n)
    models = [(width, write_byte_model(folder / f"width-{width}", byte_config(width))) for width in widths]
    cases = [Case(f"{w} {precision}", model, prompts, precision) for w, model in models for precision in PRECISIONS]
    width, model = models[len(models) // 2]
    other: dict[str, object] = {"batch_size": 3, "chunk_rows": n // 2 - 1, "share_prefixes": False}
    return cases + [Case(f"{width} {precision}", model, prompts, precision, work=other) for precision in PRECISIONS]


def column_digests(path: Path) -> dict[str, str]:
    """SHA-256 of the values of each column."""
    table = pq.read_table(path)
    return {
        name: hashlib.sha256(repr(table.column(name).to_pylist()).encode()).hexdigest()[:16]
        for name in table.column_names
    }


def run_cases(cases: Iterable[Case], folder: Path) -> dict[str, dict[str, str]]:
    """Run each case; cases of one name must give the same. {name: {column: digest}}"""
    found: dict[str, dict[str, str]] = {}
    for case in cases:
        output = folder / f"output-{os.getpid()}.parquet"
        sampling = replace(SAMPLING, max_tokens=case.max_tokens)
        work = {"jobs": 1, "precision": case.precision, **case.work}
        summary = run_job(make_job(case.prompts, output, str(case.model), sampling, **work))
        assert summary.ok == summary.rows, summary
        digests = column_digests(output)
        assert found.setdefault(case.name, digests) == digests, f"{case.name} with {case.work}"
    return found


def run_target(settings: dict[str, str], folder: Path, *arguments: str) -> dict[str, dict[str, str]]:
    """run_cases in a process with these settings, on what is in the folder."""
    command = [sys.executable, "-m", "tests.same_bits", "--one", str(folder), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | settings
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{settings}: {done.stderr}"
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def differences(targets: dict[str, dict[str, dict[str, str]]]) -> Iterator[str]:
    """A line for each column of a case that is not as under the first target."""
    first, *others = targets
    for target in others:
        for name, columns in targets[target].items():
            if wrong := [column for column, digest in columns.items() if targets[first][name][column] != digest]:
                yield f"{name}: {', '.join(wrong)} differ under {target}"


def real_cases(folder: Path, n: int = 2000) -> list[Case]:
    """Real text for the embedded model, in one and two workers, batches of 8 and automatic ones."""
    sample = [json.loads(line)["prompt"] for line in (ROOT / "data/prompts/sample.jsonl").read_text().splitlines()]
    rng = random.Random(n)
    path = folder / "real.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for i in range(n):
            words = f"{rng.choice(sample)} {rng.choice(sample)}".split()
            text = " ".join(words[: rng.randint(1, len(words))])
            file.write(json.dumps({"prompt": text, **(ROWS[i % len(ROWS)] or {})}) + "\n")
    works: list[dict[str, object]] = [{}, {"jobs": 2}, {"batch_size": 8}, {"jobs": 2, "batch_size": 8}]
    return [Case(f"real {p}", DEFAULT_MODEL, path, p, 24, work) for p in PRECISIONS for work in works]


def main() -> None:
    """Without arguments, compare everything; exit code 1 and a line for each difference."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--one", type=Path, help="run the tiny cases in this folder, in this process, and print digests"
    )
    parser.add_argument("--widths", default=",".join(map(str, WIDTHS)))
    parser.add_argument("--prompts", type=int, default=200, help="of a tiny model")
    parser.add_argument("--real", type=int, default=2000, help="prompts of the embedded model")
    asked = parser.parse_args()
    widths = list(map(int, asked.widths.split(",")))
    if asked.one:
        with tempfile.TemporaryDirectory(dir=asked.one) as folder:
            cases = real_cases(Path(folder), asked.real) if not asked.prompts else None
            cases = cases or tiny_cases(Path(folder), widths, asked.prompts)
            print(json.dumps(run_cases(cases, Path(folder))))
        return
    with tempfile.TemporaryDirectory() as folder:
        wrong = list(compare_all(Path(folder), asked.widths, asked.prompts, asked.real))
    print("\n".join(wrong) or "all bits are the same")
    sys.exit(bool(wrong))


def compare_all(folder: Path, widths: str, prompts: int, real: int) -> Iterator[str]:
    """Differences of tiny models under all targets, and of real prompts under two."""
    tiny, found = ("--widths", widths, "--prompts", str(prompts)), {}
    for name, settings in TARGETS.items():
        if not is_possible(settings):
            print(f"{name}: this machine has not its instructions", flush=True)
            continue
        is_slow = name == "generic"  # an fma is a call of a function there
        found[name] = run_target(settings, folder, *(("--widths", widths, "--prompts", "24") if is_slow else tiny))
        print(f"{name}: {len(found[name])} cases", flush=True)
    found["native, other instructions of NumPy"] = run_target(NO_NUMPY, folder, *tiny)
    found["native, 24 prompts"] = run_target({}, folder, "--widths", widths, "--prompts", "24")
    few = {name: found.pop(name) for name in ("native, 24 prompts", "generic")}
    yield from differences(found)
    yield from differences(few)
    two = [name for name in ("native", "haswell") if is_possible(TARGETS[name])]
    big = {name: run_target(TARGETS[name], folder, "--prompts", "0", "--real", str(real)) for name in two}
    yield from differences(big)


if __name__ == "__main__":
    main()
