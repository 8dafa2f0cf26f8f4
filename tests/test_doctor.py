"""doctor.py: it names what slows a run or breaks it, with the remedy; only something broken is exit code 1."""

import shutil
from importlib.metadata import PackageNotFoundError, version

import pytest
from typer.testing import CliRunner

from batchgen.errors import ModelError
from batchgen.gpt2 import machine_code
from batchgen.gpt2.machine_code import CodeCache
from batchgen.gpt2.microkernels import Vectors
from batchgen.jobs.cli import app
from batchgen.models.model import Model
from batchgen.review import doctor
from batchgen.review.doctor import (
    examine,
    examine_code,
    examine_cores,
    examine_kernels,
    examine_memory,
    examine_models,
    examine_packages,
    read_processor,
)
from tests.support.models import write_byte_model


def test_everything_is_looked_at_and_nothing_is_broken():
    found = list(examine())
    assert [f.name for f in found if f.state == "broken"] == []
    assert {f.name for f in found} == {
        "batchgen", "packages", "processor", "kernels", "cores", "memory", "models"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("vectors", "texts", "states"),
    [
        (Vectors(16, 16, 16), ["float32 with AVX-512; int8 with AVX-512 VNNI"], ["ok"]),
        (Vectors(8, 8, 8), ["float32 with AVX2 and FMA; int8 with AVX-VNNI"], ["ok"]),
        (Vectors(8, 8, 0), ["int8 without VNNI", "int8 are about as fast as in float32"], ["ok", "note"]),
        (Vectors(0, 4, 0), ["about 50 times as long", "int8 are about as fast"], ["note", "note"]),
    ],
)
def test_a_processor_that_slows_the_kernels_is_a_note(vectors, texts, states):
    found = list(examine_kernels(vectors))
    assert [finding.state for finding in found] == states
    assert all(text in finding.text for finding, text in zip(found, texts, strict=True))


def test_amx_is_named_if_it_is_used(monkeypatch):
    monkeypatch.setattr(doctor, "uses_amx", lambda: True)
    (finding,) = examine_kernels(Vectors(16, 16, 16))
    assert "int8 with AMX" in finding.text


def test_the_processor_is_read_as_linux_reports_it(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: A: B\nflags\t\t: fpu avx2\n\nprocessor\t: 1\nflags\t: other\n")
    assert read_processor(cpuinfo) == ("A: B", {"fpu", "avx2"})
    cpuinfo.write_text("processor\t: 0\nFeatures\t: fp asimd sve\n")
    assert read_processor(cpuinfo)[1] == {"fp", "asimd", "sve"}
    cpuinfo.write_bytes(b"\xff\x00")
    assert read_processor(cpuinfo)[1] == frozenset()
    assert read_processor(tmp_path / "none")[1] == frozenset()


def test_a_package_that_one_command_needs_is_a_note_and_any_other_broken(monkeypatch):
    absent = {"matplotlib", "pyarrow"}

    def look(name: str) -> str:
        if name in absent:
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(doctor, "version", look)
    states = {f.text.split()[0]: f for f in examine_packages() if f.state != "ok"}
    assert {name: f.state for name, f in states.items()} == {"pyarrow": "broken", "matplotlib": "note"}
    assert "pip install matplotlib" in states["matplotlib"].text


def test_where_kernels_are_and_what_keeps_them_from_being_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(machine_code, "kernel_modules", lambda: ["batchgen.gpt2.kernels"])
    cache = CodeCache([tmp_path / "a"])
    assert examine_code(cache).text.startswith("not compiled yet")
    name = "batchgen.gpt2.kernels.linear"
    cache.names.add(name)
    cache.write(name, bytes(10**6))
    cache.complete()
    assert f"1 compiled, 1.0 MB in {tmp_path / 'a'}" in examine_code(cache).text
    (tmp_path / "file").touch()
    finding = examine_code(CodeCache([tmp_path / "file"]))
    assert finding.state == "note"
    assert str(tmp_path / "file") in finding.text
    monkeypatch.setattr(machine_code, "LOWEST", (1000, 0))
    assert examine_code(cache).state == "broken"


def test_what_limits_the_cores_is_named(monkeypatch):
    monkeypatch.setattr(doctor.os, "cpu_count", lambda: 64)
    assert "usable of 64 (affinity allows" in examine_cores({}).text
    assert "LOKY_MAX_CPU_COUNT is 1" in examine_cores({"LOKY_MAX_CPU_COUNT": "1"}).text


def test_too_little_memory_names_a_value_that_fits(monkeypatch):
    monkeypatch.setattr(doctor, "available_memory", lambda: 8 * 10**8)
    finding = examine_memory()
    assert finding.state == "note"
    assert "pass --kv-memory 200M" in finding.text
    assert "a worker takes up to 1.2 GB; --jobs auto" in finding.text


def test_a_broken_model_is_named_and_is_exit_code_1(monkeypatch, tmp_path):
    monkeypatch.setenv("BATCHGEN_MODELS", str(tmp_path))
    write_byte_model(tmp_path / "mine")
    shutil.rmtree(tmp_path / "mine-vocabulary")  # a folder among the models that is not a model
    assert [f.state for f in examine_models()] == ["ok", "ok"]
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 0
    (tmp_path / "mine" / "wpe.npy").write_bytes(b"")
    assert {f.state for f in examine_models()} == {"ok", "broken"}
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 1
    (line,) = [line for line in done.output.splitlines() if line.startswith("BROKEN")]
    assert "mine" in line
    assert "wpe.npy" in line


def test_without_its_own_model_batchgen_is_broken(monkeypatch):
    def nowhere(name: str) -> Model:
        raise ModelError(f"unknown model {name!r}")

    monkeypatch.setattr(Model, "open", nowhere)
    assert list(examine_models())[-1].state == "broken"
    assert examine_memory().state == "ok"
