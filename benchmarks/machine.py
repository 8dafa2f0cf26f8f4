"""This machine: processor, cores, BLAS, and its speed at products of matrices with nothing else to do.

`python -m benchmarks.machine` prints one process's rate as JSON; sgemm_peak starts one for each core.
"""

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import joblib
import numpy as np
from threadpoolctl import threadpool_info, threadpool_limits

# set when a program starts, they change the kernels of BLAS or its number of threads
UNSET = (
    "OPENBLAS_CORETYPE",
    "OPENBLAS_L2_SIZE",
    "OPENBLAS_NUM_THREADS",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "PYTHONPATH",
    "VIRTUAL_ENV",
)


def blas() -> str:
    """The BLAS that np.matmul uses, and the processor type of its kernels."""
    found = [library for library in threadpool_info() if library["user_api"] == "blas"]
    if not found:
        return "unknown BLAS"
    name, version, threads = (found[0][key] for key in ("internal_api", "version", "num_threads"))
    kernels = found[0].get("architecture") or "unknown core type"
    return f"{name} {version} {kernels}, {threads} thread{'s' if threads > 1 else ''}"


def without_blas_variables(module: str) -> None:
    """Start `python -m module` again without the variables that BLAS reads when it is loaded."""
    if any(name in os.environ for name in UNSET if "OPENBLAS" in name):
        environment = {name: value for name, value in os.environ.items() if name not in UNSET}
        os.execve(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], environment)


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in UNSET}


def available_cores() -> int:
    return int(joblib.cpu_count())


def processor() -> str:
    """The processor's name, according to the system."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def instruction_sets() -> str:
    """The instruction sets that decide the speed of bfloat16, int8 and float32."""
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.exists() else set()
    wanted = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_vnni": "VNNI", "avx512_bf16": "BF16", "amx_tile": "AMX"}
    return " ".join(name for flag, name in wanted.items() if flag in flags)


def sgemm_rate(seconds: float = 1.5) -> float:
    """GF/s of one thread: the best of many products [1024, 768] @ [768, 3072]."""
    a, b = np.ones((1024, 768), np.float32), np.ones((768, 3072), np.float32)
    out = np.empty((1024, 3072), np.float32)
    best, end = float("inf"), time.perf_counter() + seconds
    with threadpool_limits(1, user_api="blas"):
        while time.perf_counter() < end:
            start = time.perf_counter()
            np.matmul(a, b, out=out)
            best = min(best, time.perf_counter() - start)
    return 2 * a.shape[0] * b.size / best / 1e9


def sgemm_peak(jobs: int) -> tuple[float, str]:
    """GF/s of `jobs` processes together, and the BLAS that they use."""
    command = [sys.executable, "-m", "benchmarks.machine"]
    running = [
        subprocess.Popen(command, env=clean_environment(), stdout=subprocess.PIPE, text=True) for _ in range(jobs)
    ]
    answers = [json.loads(process.communicate()[0]) for process in running]
    return sum(answer["gflops"] for answer in answers), answers[0]["blas"]


def describe(jobs: int) -> str:
    peak, library = sgemm_peak(jobs)
    return (
        f"{processor()} ({instruction_sets()}), {jobs} of {available_cores()} cores; "
        f"NumPy {np.__version__}, {library} a process; sgemm peak {peak:,.0f} GF/s"
    )


if __name__ == "__main__":
    with threadpool_limits(1, user_api="blas"):
        print(json.dumps({"gflops": sgemm_rate(), "blas": blas()}))
