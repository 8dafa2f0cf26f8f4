"""What of this machine matters to a run: each thing found, whether it is well, and the remedy where it is not."""

import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from threadpoolctl import threadpool_limits

from batchgen import __version__
from batchgen.engine.probe import Blas, blas_info, is_batch_invariant
from batchgen.errors import BatchgenError
from batchgen.models.registry import DEFAULT_MODEL, find_model, list_models
from batchgen.models.shards import load_manifest, load_params, verify_shards
from batchgen.planning import available_jobs, available_memory, default_kv_bytes, fitting_jobs

State = Literal["ok", "note", "broken"]

PACKAGES = ("numpy", "pyarrow", "joblib", "threadpoolctl", "regex", "safetensors", "typer", "rich")
OPTIONAL = {  # package: (what needs it, how to have it)
    "matplotlib": ("batchgen report", "pip install 'batchgen[report]'"),
    "tensorflow-cpu": ("batchgen fetch, and batchgen convert of OpenAI's checkpoints", "pip install tensorflow-cpu"),
}
VECTORS = ("avx", "avx2", "fma", "avx512f", "avx512vl", "avx512_bf16", "amx_tile", "asimd", "sve")
AVX512 = frozenset({"SkylakeX", "Cooperlake", "SapphireRapids"})  # OpenBLAS's kernels that use it
CORETYPE = "OPENBLAS_CORETYPE"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at: `note` is worth knowing, `broken` keeps some command from working."""

    name: str
    text: str
    state: State = "ok"


def examine() -> Iterator[Finding]:
    """Look at everything, one thing after another; what is broken is a finding, not an error."""
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
    """Versions of what is installed, and what is not."""
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
    """Its name and its features, as Linux gives them; elsewhere, no features are known."""
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
    """The library that multiplies, the kernels it chose, and what keeps it from the best ones."""
    chosen = f"{blas.name} {blas.version}, kernels for {blas.core_type}"
    forced = environment.get(CORETYPE)
    able = "avx512vl" in flags and blas.name == "openblas"
    if able and blas.core_type not in AVX512 and forced:
        yield Finding("BLAS", f"{chosen}: {CORETYPE}={forced} holds it back from AVX-512; unset it", "note")
    elif able and blas.core_type not in AVX512:
        yield Finding("BLAS", f"{chosen}: it does not use the AVX-512 that the processor has", "note")
    elif forced and blas.name == "openblas":
        yield Finding("BLAS", f"{chosen}, because {CORETYPE}={forced} says so; unset it to let OpenBLAS choose", "note")
    else:
        yield Finding("BLAS", f"{chosen}, its own choice")


def examine_rows() -> Finding:
    """The probe that a run makes, on the model that comes with batchgen."""
    try:
        directory = find_model(DEFAULT_MODEL)
        manifest = load_manifest(directory)
        with threadpool_limits(1, user_api="blas"):  # as in a worker
            invariant = is_batch_invariant(load_params(directory, manifest), manifest.config)
    except BatchgenError as error:
        return Finding("rows", f"could not be probed: {error}", "broken")
    if invariant:
        return Finding("rows", "batch-invariant: bit for bit the same in any company")
    text = "not batch-invariant: rounded differently in other company; the same plan gives the same bits"
    return Finding("rows", text, "note")


def examine_cores(environment: Mapping[str, str]) -> Finding:
    """The cores of the machine, and those that this process may use."""
    usable, all_of_them = available_jobs(), os.cpu_count() or 1
    text = f"{usable} usable of {all_of_them}"
    reasons = []
    if hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) < all_of_them:
        reasons.append(f"affinity allows {len(os.sched_getaffinity(0))}")
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.exists() and not quota.read_text().startswith("max"):
        allowed, period = quota.read_text().split()[:2]
        reasons.append(f"cgroup allows {int(allowed) / int(period):.1f}")
    if "LOKY_MAX_CPU_COUNT" in environment:
        reasons.append(f"LOKY_MAX_CPU_COUNT is {environment['LOKY_MAX_CPU_COUNT']}")
    return Finding("cores", f"{text} ({', '.join(reasons)})" if reasons else text)


def examine_memory() -> Finding:
    """What is free, and how many workers of the model that comes with batchgen would fit."""
    free = available_memory()
    try:
        config = load_manifest(find_model(DEFAULT_MODEL)).config
    except BatchgenError:
        return Finding("memory", f"{free / 1e9:.1f} GB free")
    kv_bytes = default_kv_bytes(config)
    text = f"{free / 1e9:.1f} GB free; --jobs auto would be {fitting_jobs(kv_bytes, 0)}"
    if kv_bytes > free:
        return Finding("memory", f"{text}, and lack memory: pass --kv-memory {int(free / 4e6)}M", "note")
    return Finding("memory", text)


def examine_models() -> Iterator[Finding]:
    """The models that are here; the one that comes with batchgen by its hashes, the others by their manifests."""
    for info in list_models():
        if info.error is not None:
            yield Finding("models", f"{info.name}: {info.error}", "broken")
        elif info.config is not None:
            yield Finding("models", f"{info.name}: context {info.config.n_ctx}, {info.path}")
    try:
        verify_shards(find_model(DEFAULT_MODEL))
    except BatchgenError as error:
        yield Finding(
            "models", f"{DEFAULT_MODEL}, which comes with batchgen: {error}; install batchgen again", "broken"
        )
