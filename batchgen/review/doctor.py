"""Looks at what a run needs of this machine: each finding, whether it is well, and the remedy if it is not."""

import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from batchgen import __version__
from batchgen.errors import BatchgenError
from batchgen.gpt2.machine_code import CACHE, SECONDS, CodeCache, check_numba, uses_amx
from batchgen.job import DEFAULT_MODEL
from batchgen.models.model import Model
from batchgen.models.registry import list_models
from batchgen.options import say
from batchgen.planning import WORKER_BYTES, available_jobs, available_memory, default_kv_bytes, fitting_jobs

if TYPE_CHECKING:
    from batchgen.gpt2.microkernels import Vectors

State = Literal["ok", "note", "broken"]

PACKAGES = ("numpy", "numba", "pyarrow", "joblib", "regex", "safetensors", "typer", "rich")
OPTIONAL = {  # package: (what needs it, how to install it)
    "matplotlib": ("batchgen report", "pip install matplotlib"),
    "tensorflow-cpu": ("batchgen fetch, and batchgen convert of OpenAI's checkpoints", "pip install tensorflow-cpu"),
}
VECTORS = ("avx", "avx2", "fma", "avx512f", "avx512vl", "avx512_vnni", "avx_vnni", "amx_tile", "asimd", "sve")


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding: `note` is worth knowing, `broken` keeps some command from working."""

    name: str
    text: str
    state: State = "ok"


def examine() -> Iterator[Finding]:
    """Look at one thing after another; something broken is a finding, not an error."""
    yield Finding("batchgen", f"{__version__}, Python {platform.python_version()}, {platform.platform()}")
    yield from examine_packages()
    name, flags = read_processor(Path("/proc/cpuinfo"))
    vectors = [flag for flag in VECTORS if flag in flags]
    yield Finding("processor", f"{name}; {', '.join(vectors) or 'vector extensions not known'}")
    code = examine_code(CACHE)
    yield code
    if code.state != "broken":
        from batchgen.gpt2.microkernels import target_vectors  # imports Numba

        yield from examine_kernels(target_vectors())
    yield examine_cores(os.environ)
    yield examine_memory()
    yield from examine_models()


def examine_packages() -> Iterator[Finding]:
    """Versions of the installed packages, and the missing ones."""
    found, absent = {}, []
    for name in (*PACKAGES, *OPTIONAL):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            absent.append(name)
    yield Finding("packages", ", ".join(f"{name} {number}" for name, number in found.items()))
    for name in absent:
        if name in OPTIONAL:
            needed_by, remedy = OPTIONAL[name]
            yield Finding("packages", f"{name} is not installed; {needed_by} needs it: {remedy}", "note")
        else:
            yield Finding("packages", f"{name} is not installed; install batchgen again", "broken")


def read_processor(cpuinfo: Path) -> tuple[str, frozenset[str]]:
    """Its name and its features, as Linux reports them; on other systems the features are not known."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine(), frozenset()
    fields: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = fields.get("flags") or fields.get("Features") or ""
    return fields.get("model name") or platform.machine(), frozenset(flags.split())


def examine_kernels(vectors: "Vectors") -> Iterator[Finding]:
    """Which instructions the kernels use here; they change the speed, and no bit of a row."""
    width = {16: "AVX-512", 8: "AVX2 and FMA", 4: "NEON"}
    dot = {16: "with AVX-512 VNNI", 8: "with AVX-VNNI"}
    if vectors.fma:
        int8 = "with AMX (BATCHGEN_AMX)" if uses_amx() else dot.get(vectors.dot, "without VNNI")
        yield Finding("kernels", f"float32 with {width[vectors.fma]}; int8 {int8}")
    else:
        what = "without FMA in the processor, a run takes about 50 times as long; use another machine"
        yield Finding("kernels", what, "note")
    if not vectors.dot:
        what = "without VNNI in the processor, products in int8 are about as fast as in float32, not 4 times"
        yield Finding("kernels", what, "note")


def examine_code(cache: CodeCache) -> Finding:
    """Whether the kernels are compiled, where their code is, and what keeps it from being kept."""
    try:
        check_numba()
    except BatchgenError as error:
        return Finding("kernels", str(error), "broken")
    if files := cache.completed():
        size, folders = sum(file.stat().st_size for file in files), sorted({str(file.parent) for file in files})
        return Finding("kernels", f"{len(files)} compiled, {size / 1e6:.1f} MB in {', '.join(folders)}")
    if cache.folder is None:
        return Finding("kernels", f"each process compiles them, about {SECONDS} s: {'; '.join(cache.problems)}", "note")
    return Finding(
        "kernels", f"not compiled yet: the first run does, about {SECONDS} s, and keeps them in {cache.folder}"
    )


def examine_cores(environment: Mapping[str, str]) -> Finding:
    """The cores of the machine, and the cores that this process may use."""
    usable, total = available_jobs(), os.cpu_count() or 1
    text = f"{usable} usable of {total}"
    reasons = []
    if hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) < total:
        reasons.append(f"affinity allows {len(os.sched_getaffinity(0))}")
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.exists() and not quota.read_text().startswith("max"):
        allowed, period = quota.read_text().split()[:2]
        reasons.append(f"cgroup allows {int(allowed) / int(period):.1f}")
    if "LOKY_MAX_CPU_COUNT" in environment:
        reasons.append(f"LOKY_MAX_CPU_COUNT is {environment['LOKY_MAX_CPU_COUNT']}")
    return Finding("cores", f"{text} ({', '.join(reasons)})" if reasons else text)


def examine_memory() -> Finding:
    """Free memory, what a worker of the embedded model takes of it, and how many fit into it."""
    free = available_memory()
    try:
        config = Model.open(DEFAULT_MODEL).config
    except BatchgenError:
        return Finding("memory", f"{free / 1e9:.1f} GB free")
    kv_bytes = default_kv_bytes(config, "float32")
    takes, jobs = WORKER_BYTES + kv_bytes, fitting_jobs(kv_bytes, 0)
    text = f"{free / 1e9:.1f} GB free; a worker takes up to {takes / 1e9:.1f} GB; --jobs auto would be {jobs}"
    if kv_bytes > free:
        return Finding(
            "memory", f"{text}, and one would lack memory: pass {say('kv_bytes', f'{int(free / 4e6)}M')}", "note"
        )
    return Finding("memory", text)


def examine_models() -> Iterator[Finding]:
    """The models that are here; the embedded one is checked by its hashes, the others by their manifests."""
    for info in list_models():
        if info.error is not None:
            yield Finding("models", f"{info.name}: {info.error}", "broken")
        elif info.config is not None:
            yield Finding("models", f"{info.name}: context {info.config.n_ctx}, {info.path}")
    try:
        Model.open(DEFAULT_MODEL).verify()
    except BatchgenError as error:
        yield Finding("models", f"{DEFAULT_MODEL}, the embedded model: {error}; install batchgen again", "broken")
