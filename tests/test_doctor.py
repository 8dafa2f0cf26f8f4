"""doctor.py: it names what slows a run or breaks it, with the remedy; only something broken is exit code 1."""

import shutil
from importlib.metadata import PackageNotFoundError, version

import pytest
from typer.testing import CliRunner

from batchgen import planning
from batchgen.engine.probe import Blas
from batchgen.errors import ModelError
from batchgen.jobs.cli import app
from batchgen.models.model import Model
from batchgen.review import doctor
from batchgen.review.doctor import (
    examine,
    examine_blas,
    examine_cores,
    examine_memory,
    examine_models,
    examine_packages,
    examine_rows,
    read_processor,
)
from tests.support.models import write_byte_model

SKYLAKE, HASWELL = (Blas("openblas", "0.3.31", kind, 2) for kind in ("SkylakeX", "Haswell"))
AVX2, AVX512 = frozenset({"avx", "avx2", "fma"}), frozenset({"avx", "avx2", "fma", "avx512f", "avx512vl"})


def test_everything_is_looked_at_and_nothing_is_broken():
    found = list(examine())
    assert [f.name for f in found if f.state == "broken"] == []
    assert {f.name for f in found} == {
        "batchgen", "packages", "processor", "BLAS", "rows", "cores", "memory", "models"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("blas", "flags", "environment", "state", "text"),
    [
        (SKYLAKE, AVX512, {}, "ok", "its own choice"),
        (HASWELL, AVX2, {}, "ok", "its own choice"),
        (HASWELL, frozenset(), {}, "ok", "its own choice"),
        (HASWELL, AVX512, {"OPENBLAS_CORETYPE": "Haswell"}, "note", "Haswell keeps it from AVX-512; unset it"),
        (HASWELL, AVX512, {}, "note", "does not use the processor's AVX-512"),
        (HASWELL, AVX2, {"OPENBLAS_CORETYPE": "Haswell"}, "note", "set by OPENBLAS_CORETYPE=Haswell"),
        (Blas("mkl", "2025", "Skylake", 2), AVX512, {"OPENBLAS_CORETYPE": "Haswell"}, "ok", "mkl 2025"),
    ],
)
def test_a_setting_that_slows_the_blas_is_named(blas, flags, environment, state, text):
    (finding,) = examine_blas(blas, flags, environment)
    assert finding.state == state
    assert text in finding.text


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


def test_rows_that_depend_on_their_batch_are_a_note(monkeypatch):
    monkeypatch.setattr(planning, "is_batch_invariant", lambda params, config: False)
    assert examine_rows().state == "note"
    monkeypatch.setattr(planning, "is_batch_invariant", lambda params, config: True)
    assert examine_rows().state == "ok"


def test_what_limits_the_cores_is_named(monkeypatch):
    monkeypatch.setattr(doctor.os, "cpu_count", lambda: 64)
    assert "usable of 64 (affinity allows" in examine_cores({}).text
    assert "LOKY_MAX_CPU_COUNT is 1" in examine_cores({"LOKY_MAX_CPU_COUNT": "1"}).text


def test_too_little_memory_names_a_value_that_fits(monkeypatch):
    monkeypatch.setattr(doctor, "available_memory", lambda: 10**9)
    finding = examine_memory()
    assert finding.state == "note"
    assert "pass --kv-memory 250M" in finding.text


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
    assert examine_rows().state == "broken"
    assert list(examine_models())[-1].state == "broken"
    assert examine_memory().state == "ok"
