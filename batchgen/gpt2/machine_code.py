"""The machine code of the kernels: compiled once for a processor, kept on disk, loaded by every later process.

Numba's own cache knows of one source file for a kernel, of no checksum, and of one folder for the whole process. Here
the name of a file has a digest of all that its code depends on, and the file begins with a SHA-256 of the rest. It is
replaced at once, by one process at a time: others read or wait meanwhile, and what is damaged is compiled again.
"""

import ctypes
import errno
import hashlib
import json
import logging
import os
import platform
import re
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property, lru_cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from batchgen.errors import SetupError
from batchgen.files import cache_dir, locked, replace_file

logger = logging.getLogger(__name__)

LOWEST, ABOVE = (0, 61), (0, 69)  # versions of Numba that compile the kernels: from the first, below the second
REMEDY = 'pip install "numba>={}.{},<{}.{}"'.format(*LOWEST, *ABOVE)
SECONDS = 15  # to compile all kernels, about
DAY = 86_400
UNUSED_DAYS = 30  # after which a file is removed
CHECK = hashlib.sha256().digest_size

# What changes machine code besides sources, versions and the processor; BATCHGEN_VECTORS is for tests.
_OF_NUMBA = "CPU_NAME CPU_FEATURES ENABLE_AVX OPT LOOP_VECTORIZE SLP_VECTORIZE BOUNDSCHECK DEBUGINFO"
SETTINGS = ("BATCHGEN_VECTORS", *(f"NUMBA_{name}" for name in _OF_NUMBA.split()))

_FOLDERS = ("gpt2", "engine")  # that have kernels
_HAS_KERNELS = re.compile(r"^from batchgen\.gpt2\.compiled import .*\bkernel\b", re.MULTILINE)
_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA = 158, 0x1023, 18  # of Linux on x86-64
_MAKE_TARGET = """
import sys
from llvmlite import binding
binding.initialize_native_target()
binding.Target.from_default_triple().create_target_machine(cpu=sys.argv[1], features=sys.argv[2])
"""
_USES_FMA = """
define float @f(float %x) {
  %y = call float @llvm.fma.f32(float %x, float %x, float %x)
  ret float %y
}
declare float @llvm.fma.f32(float, float, float)
"""


# ---- what code depends on


def kernel_modules() -> list[str]:
    """The modules that have kernels; nothing is imported."""
    root = Path(__file__).parents[1]
    paths = [path for folder in _FOLDERS for path in sorted((root / folder).glob("*.py"))]
    return [f"batchgen.{p.parent.name}.{p.stem}" for p in paths if _HAS_KERNELS.search(p.read_text(encoding="utf-8"))]


@lru_cache
def source_digest(module: str) -> str:
    """SHA-256 of a module's source and of all that it imports from folders of its package: code holds their numbers."""
    imports = re.compile(rf"^from ({module.partition('.')[0]}\.\w+\.\w+) import", re.MULTILINE)
    sources: dict[str, str] = {}
    left = [module]
    while left:
        if (name := left.pop()) not in sources:
            origin = getattr(find_spec(name), "origin", None)
            assert origin is not None, name
            sources[name] = Path(origin).read_text(encoding="utf-8")
            left += imports.findall(sources[name])
    return _digest(sorted(sources.items()))


def target() -> tuple[str, str]:
    """The processor to compile for, and its features, as Numba chooses them."""
    from llvmlite import binding

    asked = os.environ.get("NUMBA_CPU_NAME")
    features = "" if asked == "generic" else binding.get_host_cpu_features().flatten()
    return asked or binding.get_host_cpu_name(), os.environ.get("NUMBA_CPU_FEATURES", features)


def has_fma() -> bool:
    """Whether the processor multiplies and adds in one instruction; else each of them is a call of a function."""
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    name, features = target()
    machine = binding.Target.from_default_triple().create_target_machine(cpu=name, features=features)
    return "fmaf" not in machine.emit_assembly(binding.parse_assembly(_USES_FMA))


@lru_cache(maxsize=1)
def uses_amx() -> bool:
    """Whether int8 products are by AMX: BATCHGEN_AMX=1, the processor has it, and Linux lets this process use it."""
    if os.environ.get("BATCHGEN_AMX") != "1" or "+amx-int8" not in target()[1].split(","):
        return False
    return bool(ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA) == 0)


@lru_cache(maxsize=1)
def setting() -> str:
    """What the code of all kernels depends on besides their sources, as a digest."""
    versions = [version(name) for name in ("numba", "llvmlite", "numpy")]
    python = sys.implementation.cache_tag, platform.python_version(), sys.platform, platform.machine()
    return _digest([versions, python, target(), uses_amx(), [os.environ.get(name) for name in SETTINGS]])


def code_name(module: str, kernel: str, signature: str) -> str:
    """The file of one kernel's code for one signature: `batchgen.gpt2.kernels.linear_float32-0123456789abcdef`."""
    return f"{module}.{kernel}-{_digest([setting(), source_digest(module), signature])[:16]}"


def _digest(values: object) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _check(name: str, data: bytes) -> bytes:
    """What a file begins with; a file under another's name has another one."""
    return hashlib.sha256(name.encode() + data).digest()


# ---- where code is kept


def is_safe(folder: Path) -> bool:
    """Whether only this user, or the owner of batchgen's own sources, can have written what is in a folder."""
    try:
        found = os.lstat(folder)
    except OSError:
        return False
    owners = {os.getuid(), os.stat(__file__).st_uid}
    return stat.S_ISDIR(found.st_mode) and found.st_uid in owners and not found.st_mode & 0o022


def make_folder(folder: Path) -> None:
    """Make a folder; OSError if it cannot be written, or if others can write into it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        folder.mkdir(0o755)
    if not is_safe(folder):
        raise OSError(errno.EPERM, "others can write into it, or it is no folder")
    tempfile.TemporaryFile(dir=folder).close()


def places_here() -> list[Path]:
    """Beside the sources, the user's cache, the folder for temporary files."""
    own = cache_dir()
    return [
        Path(__file__).parents[1] / "__pycache__/kernels",
        *([own / "kernels"] if own else []),
        Path(tempfile.gettempdir(), f"batchgen-kernels-{os.getuid()}"),
    ]


class CodeCache:
    """Machine code in files, looked for in all places and written into the first that can be written."""

    def __init__(self, places: Sequence[Path]) -> None:
        self.places = places
        self.names: set[str] = set()  # of this process's kernels
        self.problems: list[str] = []  # why code could not be kept

    @cached_property
    def folder(self) -> Path | None:
        """The first place that can be written, made if it is missing."""
        problems = []
        for place in self.places:
            try:
                make_folder(place)
                return place
            except OSError as error:
                problems.append(f"{place}: {error.strerror or error}")
        self.problems = problems
        return None

    def _paths(self, name: str) -> Iterator[Path]:
        return (place / name for place in self.places if is_safe(place))

    def read(self, name: str) -> bytes | None:
        """The contents of a file; None if it is in no place. A damaged one is removed."""
        for path in self._paths(name):
            with suppress(OSError):
                data = path.read_bytes()
                if _check(name, data[CHECK:]) != data[:CHECK]:
                    path.unlink()
                    continue
                if time.time() - path.stat().st_mtime > DAY:
                    with suppress(OSError):
                        os.utime(path)  # it is used
                return data[CHECK:]
        return None

    def write(self, name: str, data: bytes) -> None:
        """Keep a file in the first place that takes it; if none does, `problems` says why."""
        problems = []
        for place in self.places:
            try:
                make_folder(place)
                replace_file(place / name, _check(name, data) + data, durable=False)
                return
            except OSError as error:
                problems.append(f"{place}: {error.strerror or error}")
        self.problems = problems

    @contextmanager
    def code(self, name: str) -> Iterator[bytes | None]:
        """The code of a kernel; if there is none, the block is to write it, and no other process does meanwhile."""
        self.names.add(name)
        data = self.read(name)
        if data is not None or self.folder is None:
            yield data
            return
        with ExitStack() as stack:
            with suppress(OSError):  # without locks, two processes may compile the same
                stack.enter_context(locked(self.folder))
            yield self.read(name)

    def completed(self) -> list[Path] | None:
        """The files of all kernels, if all are there."""
        names = json.loads(self.read(_complete_name()) or b"null")
        files = [next(filter(Path.exists, self._paths(name)), None) for name in names or ()]
        return None if names is None or None in files else [file for file in files if file]

    def complete(self) -> None:
        """Record that the kernels of this process are all, and remove what nobody has used for long."""
        if self.folder is None or self.problems:
            return
        modules = tuple(f"{module}." for module in kernel_modules())
        names = sorted(name for name in self.names if name.startswith(modules))
        self.write(_complete_name(), json.dumps(names).encode())
        for path in self.folder.iterdir():
            with suppress(OSError):  # removed by another process
                if time.time() - path.stat().st_mtime > UNUSED_DAYS * DAY:
                    path.unlink()


def _complete_name() -> str:
    return f"complete-{_digest([setting(), *map(source_digest, kernel_modules())])[:16]}"


CACHE = CodeCache(places_here())


# ---- the first use


def check_numba() -> None:
    """Raise SetupError if Numba is missing or of a version that cannot compile the kernels."""
    try:
        found = version("numba")
        version("llvmlite")
    except PackageNotFoundError as error:
        raise SetupError(f"{error.name} is not installed, and the engine needs it; {REMEDY}") from error
    numbers = tuple(int(number) for number in re.findall(r"\d+", found)[:2])
    if not LOWEST <= numbers < ABOVE:
        raise SetupError(f"Numba {found} is installed, and batchgen cannot work with it; {REMEDY}")
    if os.environ.get("NUMBA_DISABLE_JIT", "0") != "0":
        raise SetupError("NUMBA_DISABLE_JIT is set, and Numba then compiles nothing; unset it")


def check_target() -> None:
    """Raise SetupError if LLVM does not know the processor that is asked for: it would end the process, or go on."""
    asked = [f"{name}={os.environ[name]}" for name in ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES") if name in os.environ]
    if asked:
        done = subprocess.run([sys.executable, "-c", _MAKE_TARGET, *target()], capture_output=True, check=False)
        if done.returncode or b"not a recognized" in done.stderr:
            raise SetupError(f"LLVM cannot compile for {' and '.join(map(ascii, asked))}; unset what is wrong")


def import_kernels() -> None:
    """Load or compile all kernels; SetupError if Numba cannot be imported."""
    try:
        for module in kernel_modules():
            import_module(module)
    except ImportError as error:
        raise SetupError(f"Numba cannot be imported ({error}); {REMEDY}") from error


@lru_cache(maxsize=1)
def prepare_kernels() -> None:
    """Compile the kernels if that is still to be done, and warn of what slows them down; SetupError if it cannot be.

    A command calls it once, before its first row: its workers then load what it has compiled.
    """
    check_numba()
    check_target()
    if CACHE.completed() is None:
        if CACHE.folder:
            logger.warning("compiling the kernels for this processor, once (about %d s)", SECONDS)
            import_kernels()
            CACHE.complete()
        if CACHE.problems:
            logger.warning(
                "the compiled kernels cannot be kept (%s); every process compiles them again, about %d s: "
                "free space there, or set XDG_CACHE_HOME to a folder that can be written",
                "; ".join(CACHE.problems),
                SECONDS,
            )
    if not has_fma():
        logger.warning("this processor has no FMA instruction (%s): the engine is about 50 times slower", target()[0])
    if os.environ.get("BATCHGEN_AMX") == "1" and not uses_amx():
        logger.warning("BATCHGEN_AMX=1: the processor or the system has no AMX for int8; other instructions are used")
