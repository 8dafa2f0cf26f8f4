"""What an installation has: one package, with the commands and the embedded model inside, though both are links."""

import os
import re
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]


pytest.importorskip("hatchling", reason="hatchling is not installed (it is in requirements/run.txt)")
pytest.importorskip("editables", reason="editables is not installed (it is in requirements/run.txt)")


def build(hook: str, folder: Path) -> Path:
    """A wheel by the build backend itself, as pip calls it without isolation: nothing is downloaded."""
    script = f"import hatchling.build, sys; hatchling.build.{hook}(sys.argv[1])"
    subprocess.run([sys.executable, "-c", script, str(folder)], cwd=ROOT, check=True, capture_output=True, timeout=120)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the contents of the wheel, as in site-packages."""
    folder = tmp_path_factory.mktemp("site")
    with ZipFile(build("build_wheel", tmp_path_factory.mktemp("wheel"))) as wheel:
        wheel.extractall(folder)
    return folder


def names(folder: Path, pattern: str) -> set[str]:
    return {path.name for path in folder.glob(pattern)}


def test_a_wheel_has_the_package_batchgen_and_no_other(installed: Path) -> None:
    assert {path.name.partition("-")[0] for path in installed.iterdir()} == {"batchgen", "batchgen_gpt2"}
    assert (next(installed.glob("*.dist-info")) / "entry_points.txt").read_text().count("batchgen = ") == 1


def advised(text: str) -> list[str]:
    """The words after `pip install` and the like that are the distribution `batchgen`, with or without extras."""
    lines = re.findall(r"\b(?:pip3?|pipx|uvx?|conda|poetry)\b[^\n`#]*?\b(?:install|add)\b([^\n`#&;]*)", text)
    words = [word.strip("'\"),.:") for line in lines for word in line.split()]
    return [word for word in words if re.fullmatch(r"batchgen(\[.*)?([=<>~!]=.*)?", word)]


def test_no_page_or_message_advises_the_strangers_package() -> None:
    """On the public index, `batchgen` is an empty package of somebody else."""
    name = "batch" + "gen"  # or this file would advise it
    for wrong in (f"pip install '{name}[ray]'", f"uv add {name}", f"`pip install {name}`", f"pip install -U {name}==1"):
        assert advised(wrong), wrong
    for right in (f"pip install '.[ray]' && {name} models", f"pip install '{name}-gpt2[ray] @ file:///x.whl'"):
        assert not advised(right), right
    suffixes = {".md", ".py", ".toml", ".yml", ".example", ".service", ""}
    pages = [
        path for path in ROOT.rglob("*") if path.suffix in suffixes and path.is_file() and path.stat().st_size < 1e6
    ]
    mine = [page for page in pages if not any(part.startswith(".") for part in page.relative_to(ROOT).parts[:1])]
    assert len(mine) > 100
    assert [(page, word) for page in mine for word in advised(page.read_text(encoding="utf-8", errors="replace"))] == []


def test_a_wheel_has_every_command_and_the_whole_model(installed: Path) -> None:
    assert names(installed / "batchgen/jobs", "*.py") == names(ROOT / "jobs", "*.py")
    for pattern in ("*.npy", "manifest.json", "encoder.json", "vocab.bpe"):
        model = names(installed / "batchgen/data/models/tales", pattern)
        assert model
        assert model == names(ROOT / "data/models/tales", pattern)
    assert (installed / "batchgen/py.typed").exists()


def test_what_is_installed_runs_and_finds_its_model(installed: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "batchgen", "models"]
    environment = os.environ | {"PYTHONPATH": str(installed), "COLUMNS": "300"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert str(installed / "batchgen/data/models/tales") in done.stdout


def test_an_editable_installation_maps_the_package_batchgen_and_no_other(tmp_path: Path) -> None:
    with ZipFile(build("build_editable", tmp_path)) as wheel:
        (module,) = (name for name in wheel.namelist() if name.endswith(".py"))
        mapped = [line for line in wheel.read(module).decode().splitlines() if line.startswith("F.map")]
    assert mapped == [f"F.map_module('batchgen', {str(ROOT / 'batchgen/__init__.py')!r})"]
