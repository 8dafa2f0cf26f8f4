"""docs/ and the pages at the top: their commands, options and links exist, and the index has every page."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from batchgen.jobs.cli import app
from batchgen.jobs.panels import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "data").glob("**/README.md")])
REFERENCE = ROOT / "docs" / "commands.md"


def commands() -> dict[str, Any]:
    group: Any = typer.main.get_command(app)
    return {name: group.commands[name] for names in COMMANDS.values() for name in names}


def reference() -> str:
    """The page of every command and option, from the commands themselves."""
    lines = [
        "# Commands",
        "",
        "`batchgen COMMAND --help-all` (or `--help`) says the same. Written by `python -m tests.test_docs`.",
        "",
    ]
    for name, command in commands().items():
        lines += [f"## batchgen {name}", "", *_paragraphs(command.help or ""), ""]
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        lines += ["| | default | |", "|---|---|---|"]
        lines += [f"| `{a.metavar or a.name.upper()}` | | {_cell(getattr(a, 'help', ''))} |" for a in arguments]
        lines += [_option(option) for option in command.params if option.param_type_name == "option"]
        lines.append("")
    return "\n".join(lines)


def _paragraphs(text: str) -> list[str]:
    paragraphs = [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
    shown = [re.sub(r"^Example: (.*)", r"Example: `\1`", paragraph) for paragraph in paragraphs]
    return "\n\n".join(shown).split("\n")


def _option(option: Any) -> str:
    names = ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
    default = "" if option.default is None or option.is_flag and not option.default else f"`{option.default}`"
    if option.is_flag and option.secondary_opts:
        default = f"`{(option.opts if option.default else option.secondary_opts)[0]}`"
    return f"| {names} | {default if default != '``' else ''} | {_cell(option.help)} |"


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


def test_the_reference_says_what_help_says():
    assert REFERENCE.read_text(encoding="utf-8") == reference() + "\n", "run python -m tests.test_docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_to_a_file_has_a_target(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_line_has_only_options_that_exist(page):
    known = commands()
    text = page.read_text(encoding="utf-8")
    shown = re.findall(r"^(?:\$ |\s+)?(?:.*\| )?batchgen ([a-z]+)((?: [^\n`]*)?)$", text, re.MULTILINE)
    for word, rest in shown:
        longer = " ".join([word, *rest.split()[:1]])  # plan score
        name = longer if longer in known else word
        if name not in known:
            continue
        options = {name for p in known[name].params for name in (*p.opts, *p.secondary_opts)} | {"--help"}
        for option in re.findall(r"(?<= )--[a-z][a-z-]*", rest):
            assert option in options, f"{name} {option}"


def test_every_page_is_linked_from_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert f"docs/{page.name}" in readme, page.name


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for page in {*(ROOT / "docs").glob("*.md")} - {ROOT / "docs" / "README.md"}:
        assert f"({page.name})" in index, page.name


if __name__ == "__main__":
    REFERENCE.write_text(reference() + "\n", encoding="utf-8")
    sys.exit(0)
