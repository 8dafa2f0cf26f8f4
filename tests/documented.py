"""Run the commands that the pages show and compare what they print: `python -m tests.documented [--write] [PAGE...]`.

A page's blocks run in order, in one folder with the sample prompts as prompts.jsonl; `--write` puts the present output
into the page. In a ```console block each line after `$ ` is a command; one whose output the page leaves out must
succeed; a file that `cat` shows is made from what is shown; a line `...` stands for any lines.
A ```python block runs as a script. An HTML comment before a block says more:

    <!-- setup: COMMAND -->      run this first; readers do not need to see it
    <!-- output of: COMMAND -->  the block is what this prints
    <!-- output -->              the block is what the script in the block above prints
    <!-- not run: REASON -->     neither run nor compared
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.support.command import batchgen

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])

_BLOCK = re.compile(r"((?:^<!-- .*? -->\n+)*)^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_HERE = re.compile(r"(batchgen [^;|<>$*&]*?)(?: \| (.*))?", re.DOTALL)  # a command, and what its output goes to
_COMMENT = re.compile(r"<!-- (setup|output of|output|not run)(?:: (.*?))? -->", re.DOTALL)
_VARYING = (  # what differs from run to run and from machine to machine
    (r"^batchgen: (compiling the kernels|rounding the weights) .*\n", ""),  # at the first use
    (r"in [\d.,]+ s: [\d,]+ tokens/s \([^)]*\)", "in T s: N tokens/s (MACHINE)"),
    (r"^(time|memory|work): .*", r"\1: MACHINE"),
    (r"--seed \d{6,} chooses", "--seed N chooses"),
    (r"(/[\w.-]+)+/", "/.../"),
    (r"\d{4}-\d\d-\d\d( \d\d:\d\d)?", "DATE"),
    (r"[\d.]+[ \t]*(s|ms|MiB|GiB|MB)\b", "N unit"),
    (r"(-?\d+\.\d{3})\d{4,}", r"\1"),  # log-probabilities
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, and what the comments before it say."""

    line: int
    language: str
    text: str
    span: tuple[int, int]  # of the text, in the page
    notes: tuple[tuple[str, str], ...]

    def says(self, kind: str) -> list[str]:
        return [text for name, text in self.notes if name == kind]


@dataclass
class Result:
    """A page's blocks as they are and as they should be, and the number of commands that ran."""

    commands: int = 0
    differences: list[str] = field(default_factory=list)
    replacements: list[tuple[tuple[int, int], str]] = field(default_factory=list)


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _BLOCK.finditer(text):
        notes = tuple((kind, " ".join(words.split())) for kind, words in _COMMENT.findall(match[1]))
        found.append(Block(text.count("\n", 0, match.start(3)), match[2], match[3], match.span(3), notes))
    return found


def run_page(page: Path) -> Result:
    """Run all blocks of a page that are to be run."""
    result = Result()
    with TemporaryDirectory() as folder:
        shell = Shell(Path(folder))
        for above, block in pairwise([None, *blocks_of(page)]):
            if block is None or block.says("not run"):
                continue
            for command in block.says("setup"):
                shell.run(command)
            text = block.text
            for part, expected, actual in _run_block(shell, above, block):
                result.commands += 1
                if masked(expected) != masked(_elide(expected, actual)):
                    result.differences.append(
                        f"{page.name}:{block.line}: {part}\n--- page\n{expected}--- now\n{actual}"
                    )
                    text = text.replace(expected, actual, 1)
            if text != block.text:
                result.replacements.append((block.span, text))
    return result


def _run_block(shell: "Shell", above: Block | None, block: Block) -> Iterator[tuple[str, str, str]]:
    """Yield each command of a block, what the page says that it prints, and what it prints."""
    for command in block.says("output of"):
        yield command, block.text, shell.run(command)
    if block.says("output") and above is not None:
        yield "the script above", block.text, shell.run(f"{sys.executable} -", above.text)
    if block.language == "console":
        for command, expected in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block.text, re.MULTILINE):
            shown = re.fullmatch(r"cat ([\w.-]+)", command)
            if shown and not (shell.folder / shown[1]).exists():
                (shell.folder / shown[1]).write_text(expected, encoding="utf-8")
            actual = shell.run(command)
            yield command, expected, actual if expected or shell.failed else ""


class Shell:
    """A folder in which commands run one after the other; variables that are exported stay.

    A command `batchgen` runs in this process, before those that its output is piped to, unless it needs a shell, for a
    file or a variable: there are many.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._last, self._exported = folder, 0, ""
        for name in ("data", "examples", "jobs", "Makefile", "pyproject.toml", "requirements"):
            (folder / name).symlink_to(ROOT / name)
        shutil.copy(ROOT / "data/prompts/sample.jsonl", folder / "prompts.jsonl")
        bin = folder / ".venv/bin"
        bin.mkdir(parents=True)
        for name, command in (("batchgen", "-m batchgen"), ("python", "")):
            (bin / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {command} "$@"\n')
            (bin / name).chmod(0o755)
        (folder / ".venv/run").touch()
        hidden = {name for name in os.environ if name.startswith(("BATCHGEN_", "AWS_", "MAKE"))}
        self._env = {name: value for name, value in os.environ.items() if name not in hidden} | {
            "PATH": f"{bin}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "COLUMNS": "120",
            "XDG_CACHE_HOME": str(folder / "home/.cache"),
        }

    @property
    def failed(self) -> bool:
        return self._last != 0

    def run(self, command: str, stdin: str = "") -> str:
        """What the command prints, its paths as a reader would have them."""
        parts = [_HERE.fullmatch(part) for part in re.split("; (?=batchgen )", self._without_script(command))]
        if all(parts):
            return self._as_shown("".join(self._run_here(*part.groups()) for part in parts if part))
        if command == "echo $?":
            return f"{self._last}\n"
        if command.startswith("export "):
            self._exported += f"{command}\n"
        return self._as_shown(self._run_in_shell(command, stdin))

    def _without_script(self, command: str) -> str:
        """For `sh FILE ARGUMENTS`, what FILE runs if that is one line `batchgen "$@" OPTIONS`."""
        words = command.split(" ", 2)
        text = (self.folder / words[1]).read_text(encoding="utf-8") if words[0] == "sh" and len(words) == 3 else ""
        script = re.fullmatch(r'batchgen "\$@"( .*)\n', text)
        return f"batchgen {words[2]}{script[1]}" if script else command

    def _run_in_shell(self, command: str, stdin: str) -> str:
        done = subprocess.run(
            ["bash", "-c", f"{self._exported}{command}"],
            cwd=self.folder,
            env=self._env,
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            timeout=300,
            check=False,
        )
        self._last = done.returncode
        return done.stdout

    def _run_here(self, command: str, piped_to: str | None) -> str:
        words = shlex.split(command)[1:]
        done = batchgen(*words, folder=self.folder, environment=self._env, together=piped_to is None)
        self._last = done.returncode
        if piped_to is None:
            return done.stdout.decode()
        return done.stderr.decode() + self._run_in_shell(piped_to, done.stdout.decode())

    def _as_shown(self, text: str) -> str:
        text = text.replace(str(self.folder), "/home/me").replace(str(ROOT), "/home/me/batchgen")
        return text if text.endswith("\n") or not text else text + "\n"


def masked(text: str) -> str:
    for pattern, replacement in _VARYING:
        text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
    return re.sub(r" +$", "", text, flags=re.MULTILINE)


def _elide(expected: str, actual: str) -> str:
    """The output with `...` wherever the page has it for any lines, if the rest is as on the page."""
    if "..." not in expected.splitlines():
        return actual
    parts = [re.escape(masked(part)) for part in re.split(r"^\.\.\.\n", expected, flags=re.MULTILINE)]
    return expected if re.fullmatch("(?:.*\n)*?".join(parts), masked(actual)) else actual


def write(page: Path, result: Result) -> None:
    """Put the present output into the page, the last block first: places before it stay."""
    text = page.read_text(encoding="utf-8")
    for (start, end), new in reversed(result.replacements):
        text = text[:start] + new + text[end:]
    page.write_text(text, encoding="utf-8")


def main(arguments: list[str]) -> int:
    pages = [Path(name).resolve() for name in arguments if name != "--write"] or PAGES
    differences = []
    for page in pages:
        result = run_page(page)
        differences += result.differences
        if "--write" in arguments:
            write(page, result)
        print(f"{page.name}: {result.commands} commands, {len(result.differences)} differ")
    print(*differences, sep="\n")
    return bool(differences)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
