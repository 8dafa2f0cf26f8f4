"""requirements/: what `make lock` writes agrees with pyproject.toml, and each package has its hashes."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
WANTED = {"run.txt": ("report",), "dev.txt": ("report", "dev")}  # the extras of each


def packages(name: str) -> dict[str, tuple[str, str]]:
    """By package: its version, and the lines of its hashes."""
    text = (ROOT / "requirements" / name).read_text(encoding="utf-8")
    found = re.findall(r"^([a-z0-9-]+)==(\S+).*\n((?: +--hash=.*\n)*)", text, re.MULTILINE)
    return {package: (version, hashes) for package, version, hashes in found}


def requirements(extras: tuple[str, ...]) -> list[Requirement]:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project = pyproject["project"]
    lists = [project["dependencies"], pyproject["dependency-groups"]["build"]]
    lists += [project["optional-dependencies"][extra] for extra in extras]
    return [Requirement(text) for texts in lists for text in texts]


@pytest.mark.parametrize("name", WANTED)
def test_the_lock_has_a_version_that_pyproject_allows(name):
    locked = packages(name)
    for requirement in requirements(WANTED[name]):
        version, _ = locked.get(canonicalize_name(requirement.name), ("", ""))
        assert version, f"{requirement.name} is not in requirements/{name}; run make lock"
        assert requirement.specifier.contains(version), f"{requirement}: {version} is locked; run make lock"


@pytest.mark.parametrize("name", WANTED)
def test_the_lock_has_hashes_and_names_no_place(name):
    text = (ROOT / "requirements" / name).read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==\S+( ; .*)? \\|    --hash=sha256:[0-9a-f]{64}( \\)?", line) for line in lines)
    assert all(hashes for _, hashes in packages(name).values())


def test_tests_run_with_the_versions_that_users_have():
    development = packages("dev.txt")
    assert {package: development[package] for package in packages("run.txt")} == packages("run.txt")
