"""machine_code.py, gpt2/compiled.py: code is compiled once, loaded by all, and rebuilt if anything is wrong with it."""

import errno
import importlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numba
import pytest

from batchgen.errors import SetupError
from batchgen.files import replace_file
from batchgen.gpt2 import compiled, machine_code
from batchgen.gpt2.compiled import kernel
from batchgen.gpt2.machine_code import (
    ABOVE,
    LOWEST,
    CodeCache,
    check_numba,
    check_target,
    code_name,
    has_fma,
    kernel_modules,
    prepare_kernels,
)
from batchgen.run import run_job
from tests.support.jobs import make_job
from tests.support.models import write_byte_model

ROOT = Path(__file__).parents[1]
MODULE = "toy.sub.kernels"
KERNELS = """
from toy.sub.numbers import ONE
from batchgen.gpt2.compiled import kernel

@kernel("f4(f4)")
def plus(x):
    return x + ONE
"""


@pytest.fixture(autouse=True)
def _nothing_is_remembered(monkeypatch):
    for function in (machine_code.setting, machine_code.source_digest, prepare_kernels):
        function.cache_clear()
    for name in machine_code.SETTINGS:
        monkeypatch.delenv(name, raising=False)
    yield
    for function in (machine_code.setting, machine_code.source_digest, prepare_kernels):
        function.cache_clear()


@pytest.fixture
def toy(tmp_path, monkeypatch) -> Path:
    """The folder of a package with one kernel, which the functions of machine_code.py take for batchgen's."""
    folder = tmp_path / "toy/sub"
    folder.mkdir(parents=True)
    (tmp_path / "toy/__init__.py").touch()
    (folder / "__init__.py").touch()
    (folder / "numbers.py").write_text("ONE = 1\n")
    (folder / "kernels.py").write_text(KERNELS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(machine_code, "kernel_modules", lambda: [MODULE])
    yield folder
    forget()


def forget() -> None:
    """As in a new process."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "toy"]:
        del sys.modules[name]


def use(monkeypatch, *places: Path) -> CodeCache:
    """Keep code in these folders, as a new process does."""
    cache = CodeCache(places)
    monkeypatch.setattr(compiled, "CACHE", cache)
    monkeypatch.setattr(machine_code, "CACHE", cache)
    forget()
    prepare_kernels.cache_clear()
    return cache


def is_compiled() -> bool:
    """Import the kernel: whether it was compiled, or loaded; in both cases it computes."""
    plus = importlib.import_module(MODULE).plus
    assert plus(1) == 2
    hits, misses = sum(plus.stats.cache_hits.values()), sum(plus.stats.cache_misses.values())
    assert hits + misses == 1
    return bool(misses)


# ---- kept and loaded


def test_a_kernel_is_compiled_once_and_then_loaded(toy, tmp_path, monkeypatch):
    use(monkeypatch, tmp_path / "a")
    assert is_compiled()
    use(monkeypatch, tmp_path / "a")
    assert not is_compiled()
    use(monkeypatch, tmp_path / "b")
    assert is_compiled()


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        lambda data: bytes([data[0] ^ 128]) + data[1:],
        lambda data: data[:-1],
        lambda data: b"",
    ],
    ids=["a bit of the code", "a bit of the checksum", "cut off", "empty"],
)
def test_damaged_code_never_runs_and_is_replaced(toy, tmp_path, monkeypatch, damage):
    place = tmp_path / "a"
    cache = use(monkeypatch, place)
    place.mkdir()
    name = code_name(MODULE, "plus", "f4(f4)")
    cache.write(name, b"not code: unpickled, it would raise")
    (place / name).write_bytes(damage((place / name).read_bytes()))
    assert cache.read(name) is None
    assert not (place / name).exists()
    assert is_compiled()
    use(monkeypatch, place)
    assert not is_compiled()


def test_users_own_functions_are_cached_as_numba_does(toy, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("import numba\n@numba.njit('i8(i8)', cache=True)\ndef f(x):\n    return x\n")
    use(monkeypatch, tmp_path / "a")
    is_compiled()
    mine = importlib.import_module("mine")
    del sys.modules["mine"]
    assert mine.f.stats.cache_path == str(tmp_path / "__pycache__")
    assert len(list((tmp_path / "a").iterdir())) == 1


def test_a_kernel_has_no_closure():
    number = 1
    with pytest.raises(AssertionError, match="closures"):
        kernel("f4(f4)")(lambda x: x + number)


# ---- names


def test_a_name_changes_with_all_that_the_code_depends_on(toy, monkeypatch):
    def name(module: str = MODULE, kernel: str = "plus", signature: str = "f4(f4)") -> str:
        machine_code.setting.cache_clear()
        machine_code.source_digest.cache_clear()
        return code_name(module, kernel, signature)

    names = [name(), name(signature="f8(f8)"), name(kernel="minus"), name(module="toy.sub.numbers")]
    for setting in machine_code.SETTINGS:
        monkeypatch.setenv(setting, "1")
        names.append(name())
        monkeypatch.delenv(setting)
    with monkeypatch.context() as context:
        context.setattr(machine_code, "version", lambda package: "1.2")
        names.append(name())
    with monkeypatch.context() as context:
        context.setattr(machine_code, "target", lambda: ("another", "+fma"))
        names.append(name())
    assert name() == names[0]
    (toy / "numbers.py").write_text("ONE = 2\n")  # imported by the module of the kernel
    names.append(name())
    assert len(set(names)) == len(names)


def test_every_module_that_declares_kernels_is_found():
    paths = [*(ROOT / "batchgen").glob("*.py"), *(ROOT / "batchgen").glob("[!j]*/*.py")]
    declare = {path for path in paths if "\n@kernel(" in path.read_text()}
    found = {Path(ROOT, *name.split(".")).with_suffix(".py") for name in kernel_modules()}
    assert declare <= found
    assert len(found) == len(kernel_modules())


# ---- places


def test_the_first_place_that_can_be_written_is_used_and_all_are_read(tmp_path):
    (tmp_path / "file").touch()
    unusable, first, second = (tmp_path / name for name in ("file", "first", "second"))
    CodeCache([second]).write("a", b"code")
    cache = CodeCache([unusable, first, second])
    assert cache.read("a") == b"code"
    cache.write("b", b"more")
    assert {path.name for path in first.iterdir()} == {"b"}
    (first / "c").mkdir()  # what cannot be replaced, or does not fit on a disk, goes to the next
    cache.write("c", b"code")
    assert CodeCache([first, second]).read("c") == b"code"
    assert cache.problems == []


def test_code_under_the_name_of_another_kernel_is_not_loaded(tmp_path):
    cache = CodeCache([tmp_path / "a"])
    cache.write("plus", b"code")
    (tmp_path / "a/plus").rename(tmp_path / "a/minus")
    assert cache.read("minus") is None
    assert list((tmp_path / "a").iterdir()) == []


def test_a_folder_that_others_can_write_is_neither_read_nor_written(tmp_path):
    place = tmp_path / "a"
    CodeCache([place]).write("a", b"code")
    assert place.stat().st_mode & 0o022 == 0
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert not machine_code.is_safe(tmp_path / "link")
    for mode in (0o720, 0o702):
        place.chmod(mode)
        cache = CodeCache([place])
        assert cache.read("a") is None
        assert cache.folder is None
        assert len(cache.problems) == 1


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder to another user")
def test_a_folder_of_another_user_is_neither_read_nor_written(tmp_path):
    place = tmp_path / "a"
    CodeCache([place]).write("a", b"code")
    os.chown(place, 54321, -1)
    assert CodeCache([place]).read("a") is None
    assert CodeCache([place]).folder is None


def test_what_is_used_stays_and_what_is_not_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(machine_code, "kernel_modules", list)
    cache = CodeCache([tmp_path / "a"])
    for name in ("used", "unused", "new"):
        cache.write(name, b"code")
    long_ago = time.time() - 31 * machine_code.DAY
    for name in ("used", "unused"):
        os.utime(tmp_path / "a" / name, (long_ago, long_ago))
    assert cache.read("used") == b"code"
    cache.complete()
    assert {"used", "new"} < {path.name for path in (tmp_path / "a").iterdir()}
    assert not (tmp_path / "a/unused").exists()


# ---- processes


def test_of_those_that_start_together_one_compiles_and_the_others_wait(tmp_path):
    started, compiled_by, read = threading.Barrier(8), [], []

    def start() -> None:
        cache = CodeCache([tmp_path / "a"])  # locks of one process exclude each other too: each opens the folder
        started.wait()
        with cache.code("kernel") as code:
            if code is None:
                compiled_by.append(cache)
                time.sleep(0.05)
                cache.write("kernel", b"code")
            else:
                read.append(code)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(compiled_by) == 1
    assert read == [b"code"] * 7


def test_a_compilation_that_is_killed_leaves_nothing_in_the_way(tmp_path):
    script = f"""
import os, signal
from pathlib import Path
from batchgen.files import replacing
from batchgen.gpt2.machine_code import CodeCache
cache = CodeCache([Path({str(tmp_path / "a")!r})])
with cache.code("kernel") as code, replacing(cache.folder / "kernel") as file:
    file.write(b"half of it")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(list((tmp_path / "a").iterdir())) == 1
    cache = CodeCache([tmp_path / "a"])
    with cache.code("kernel") as code:
        assert code is None
        cache.write("kernel", b"code")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["kernel"]
    assert cache.problems == []


# ---- the first use


def test_a_first_use_says_so_and_a_second_does_not_even_load_the_kernels(toy, tmp_path, monkeypatch, caplog):
    use(monkeypatch, tmp_path / "a")
    prepare_kernels()
    (message,) = [record.getMessage() for record in caplog.records]
    assert "compiling the kernels for this processor, once" in message
    caplog.clear()
    use(monkeypatch, tmp_path / "a")
    prepare_kernels()
    assert caplog.records == []
    assert MODULE not in sys.modules


def test_a_cache_that_lacks_a_kernel_is_not_complete(toy, tmp_path, monkeypatch):
    cache = use(monkeypatch, tmp_path / "a")
    prepare_kernels()
    (file,) = cache.completed()
    file.unlink()
    assert cache.completed() is None
    use(monkeypatch, tmp_path / "a")
    prepare_kernels()
    assert cache.completed() == [file]


def test_without_a_place_for_code_one_line_says_where_one_could_be(toy, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    use(monkeypatch, tmp_path / "file", tmp_path / "file/cache")
    prepare_kernels()
    prepare_kernels()
    (message,) = [record.getMessage() for record in caplog.records]
    assert f"{tmp_path / 'file'}: others can write into it, or it is no folder;" in message
    assert f"{tmp_path / 'file/cache'}: File exists)" in message
    assert "XDG_CACHE_HOME" in message
    assert is_compiled()


def test_on_a_full_disk_kernels_work_and_one_line_says_that_they_are_not_kept(toy, tmp_path, monkeypatch, caplog):
    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    use(monkeypatch, tmp_path / "a")
    monkeypatch.setattr(machine_code, "replace_file", full)
    prepare_kernels()
    assert is_compiled()
    assert [record.getMessage().count("No space left on device") for record in caplog.records] == [0, 1]
    monkeypatch.setattr(machine_code, "replace_file", replace_file)
    use(monkeypatch, tmp_path / "a")
    assert is_compiled()
    use(monkeypatch, tmp_path / "a")
    assert not is_compiled()


# ---- what keeps kernels from being compiled


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ("0.60.0", "Numba 0.60.0"),
        (f"{ABOVE[0]}.{ABOVE[1]}.0rc1", "batchgen cannot work with it"),
        (None, "numba is not installed"),
    ],
)
def test_a_numba_that_does_not_work_is_one_line_with_a_remedy(found, words, monkeypatch):
    def version(name: str) -> str:
        if found is None:
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr(machine_code, "version", version)
    with pytest.raises(SetupError, match=words) as caught:
        check_numba()
    assert str(caught.value).endswith('pip install "numba>=0.61,<0.69"')


def test_the_range_is_that_of_the_installation(monkeypatch):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"numba>={LOWEST[0]}.{LOWEST[1]},<{ABOVE[0]}.{ABOVE[1]}" in project["dependencies"]
    for numbers in (LOWEST, (ABOVE[0], ABOVE[1] - 1)):
        monkeypatch.setattr(machine_code, "version", lambda name, n=numbers: f"{n[0]}.{n[1]}.1")
        check_numba()


def test_numba_that_may_compile_nothing_is_one_line(monkeypatch):
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    with pytest.raises(SetupError, match="NUMBA_DISABLE_JIT is set.*unset it"):
        check_numba()
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)  # as a program or .numba_config.yaml sets it
    with pytest.raises(SetupError, match="DISABLE_JIT is set.*unset it"):
        kernel("f4(f4)")(lambda x: x)


@pytest.mark.parametrize(
    ("name", "value"),
    [("NUMBA_CPU_NAME", "nonsense"), ("NUMBA_CPU_FEATURES", "+nonsense"), ("NUMBA_CPU_FEATURES", "avx2")],
)
def test_a_processor_that_llvm_does_not_know_is_one_line(name, value, monkeypatch, capfd):
    """LLVM itself aborts, or prints its own line for every kernel."""
    monkeypatch.setenv(name, value)
    with pytest.raises(SetupError, match=rf"cannot compile for .*{re.escape(value)}.*unset"):
        prepare_kernels()
    assert capfd.readouterr().err == ""
    monkeypatch.setenv(name, {"NUMBA_CPU_NAME": "generic"}.get(name, ""))
    check_target()


def test_numba_that_cannot_be_imported_is_one_line(toy, tmp_path, monkeypatch):
    (toy / "kernels.py").write_text("raise ImportError('Numba needs NumPy 2.4 or less. Got NumPy 2.5.')\n")
    use(monkeypatch, tmp_path / "a")
    with pytest.raises(SetupError, match=r"Got NumPy 2.5.*pip install .numba"):
        prepare_kernels()


def test_a_job_without_numba_ends_before_its_first_row(tmp_path, monkeypatch):
    monkeypatch.setattr(machine_code, "version", lambda name: "0.60.0")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    model = write_byte_model(tmp_path / "bytes")
    with pytest.raises(SetupError, match="Numba 0.60.0"):
        run_job(make_job(tmp_path / "p.jsonl", tmp_path / "out.parquet", model=str(model)))
    assert not (tmp_path / "out.parquet").exists()


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="other processors always have it")
def test_a_processor_without_fma_is_named_once(toy, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("NUMBA_CPU_FEATURES", "")
    for name, expected in (("x86-64-v2", False), ("generic", False), ("haswell", True), ("skylake-avx512", True)):
        monkeypatch.setenv("NUMBA_CPU_NAME", name)
        assert has_fma() is expected, name
    monkeypatch.setenv("NUMBA_CPU_NAME", "x86-64-v2")
    monkeypatch.setattr(machine_code, "import_kernels", lambda: None)
    use(monkeypatch, tmp_path / "a")
    prepare_kernels()
    prepare_kernels()
    assert ["about 50 times slower" in record.getMessage() for record in caplog.records] == [False, True]
