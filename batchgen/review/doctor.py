"""Looks at what a run needs of this machine: each finding, whether it is well, and the remedy if it is not."""

import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from batchgen import __version__
from batchgen.engine.probe import Blas, blas_info
from batchgen.errors import BatchgenError
from batchgen.job import DEFAULT_MODEL
from batchgen.models.model import Model
from batchgen.models.registry import list_models
from batchgen.options import say
from batchgen.planning import available_jobs, available_memory, default_kv_bytes, fitting_jobs, probe_arithmetic

State = Literal["ok", "note", "broken"]

PACKAGES = ("numpy", "pyarrow", "joblib", "threadpoolctl", "regex", "safetensors", "typer", "rich")
OPTIONAL = {  # package: (what needs it, how to install it)
    "matplotlib": ("batchgen report", "pip install matplotlib"),
    "tensorflow-cpu": ("batchgen fetch, and batchgen convert of OpenAI's checkpoints", "pip install tensorflow-cpu"),
}
VECTORS = ("avx", "avx2", "fma", "avx512f", "avx512vl", "avx512_bf16", "amx_tile", "asimd", "sve")
AVX512 = frozenset({"SkylakeX", "Cooperlake", "SapphireRapids"})  # OpenBLAS's kernels that use it
CORETYPE = "OPENBLAS_CORETYPE"


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
    yield from examine_blas(blas_info(), flags, os.environ)
    yield examine_rows()
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


def examine_blas(blas: Blas, flags: frozenset[str], environment: Mapping[str, str]) -> Iterator[Finding]:
    """The BLAS, the kernels that it chose, and what keeps it from faster ones."""
    chosen = f"{blas.name} {blas.version}, kernels for {blas.core_type}"
    forced = environment.get(CORETYPE)
    able = "avx512vl" in flags and blas.name == "openblas"
    if able and blas.core_type not in AVX512 and forced:
        yield Finding("BLAS", f"{chosen}: {CORETYPE}={forced} keeps it from AVX-512; unset it", "note")
    elif able and blas.core_type not in AVX512:
        yield Finding("BLAS", f"{chosen}: it does not use the processor's AVX-512", "note")
    elif forced and blas.name == "openblas":
        yield Finding("BLAS", f"{chosen}, set by {CORETYPE}={forced}; unset it to let OpenBLAS choose", "note")
    else:
        yield Finding("BLAS", f"{chosen}, its own choice")


def examine_rows() -> Finding:
    """The probe of a run, on the embedded model."""
    try:
        invariant = probe_arithmetic(Model.open(DEFAULT_MODEL)).batch_invariant
    except BatchgenError as error:
        return Finding("rows", f"could not be probed: {error}", "broken")
    if invariant:
        return Finding("rows", "batch-invariant: a row has the same bits in any batch")
    text = "not batch-invariant: the bits of a row depend on its batch; the same plan gives the same bits"
    return Finding("rows", text, "note")


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
    """Free memory, and how many workers of the embedded model fit into it."""
    free = available_memory()
    try:
        config = Model.open(DEFAULT_MODEL).config
    except BatchgenError:
        return Finding("memory", f"{free / 1e9:.1f} GB free")
    kv_bytes = default_kv_bytes(config)
    text = f"{free / 1e9:.1f} GB free; --jobs auto would be {fitting_jobs(kv_bytes, 0)}"
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
