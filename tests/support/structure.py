"""The structure of batchgen/ and jobs/ in numbers, each with its limit: `python -m tests.support.structure`.

Exit code 1 if a number is above its limit. All but one of the numbers come from the syntax trees of the sources; the
last one is counted in a small run.
"""

import ast
import io
import os
import subprocess
import sys
import tempfile
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import TypeAlias

ROOT = Path(__file__).parents[2]
AUDIT_SITE = Path(__file__).parent / "audit_site"
LINKS = ("jobs", "data")  # in batchgen/; jobs/ is read on its own, data/ is no room

MAX_RUN_LINES = 120
MAX_FLOORS = 9
MAX_ROOMS = 21
MAX_PARAMETERS = 6
MAX_KERNEL_PARAMETERS = 11  # Numba takes no records: what would be one comes apart into arrays and numbers
MAX_FUNCTION_LINES = 40
MAX_ANY_LINES = 78
# Raised by a quarter for other tokenizers, CSV dialects, JSON layouts, tables, parameters under the names of other
# libraries, the protection of finished outputs, and the estimate of the time left; then by a twenty-fifth for what is
# compared while it is used (models, inputs, parts, places of rows), limits of the system, and bounds in bytes; then by
# an eighth for kernels of our own in two precisions, their code on disk, packed models, and chunks of related rows;
# then by a fifth for rows that are copied and continued, shards and their merge, templates, peek, cards, metrics and
# lineage.
MAX_LINES = 30_550
MAX_CODE_LINES = 19_600  # without imports, docstrings, comments and blank lines
MAX_INPUT_OPENS = 3

PLAN_WORDS = {"plan", "run", "manifest", "metadata"}
PROMPTS = '{"prompt": "Once upon a time"}\n{"prompt": "The king"}\n{"prompt": "In a forest"}\n'

NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}

Function: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef
Graph: TypeAlias = Mapping[str, set[str]]  # a room -> the rooms that it imports


@dataclass(frozen=True, slots=True)
class Source:
    """A Python file and its syntax tree."""

    path: str  # for people, relative to the repository
    module: str
    text: str
    tree: ast.Module

    @property
    def room(self) -> str | None:
        """batchgen.input.readers -> input; None for batchgen itself and for `python -m batchgen`."""
        name = self.module.split(".")[1:2]
        return name[0] if name and name[0] != "__main__" else None

    @property
    def n_lines(self) -> int:
        return len(self.text.splitlines())


@dataclass(frozen=True, slots=True)
class Measure:
    """A number, the highest that it may be, and the places that make it up."""

    name: str
    value: int
    limit: int
    places: tuple[str, ...] = ()

    @property
    def is_broken(self) -> bool:
        return self.value > self.limit

    def __str__(self) -> str:
        verdict = "  BROKEN" if self.is_broken else ""
        places = "".join(f"\n    {place}" for place in self.places if self.is_broken)
        return f"{self.name:<44}{self.value:>7,}  limit {self.limit:>6,}{verdict}{places}"


# ---- reading


def parse_source(path: str, module: str, text: str) -> Source:
    return Source(path, module, text, ast.parse(text, path))


def read_sources(root: Path) -> list[Source]:
    """The sources of batchgen/ and jobs/; batchgen/jobs and batchgen/data are links, which are left out."""
    library = (path for path in (root / "batchgen").rglob("*.py") if path.relative_to(root).parts[1] not in LINKS)
    return [
        parse_source(str(path.relative_to(root)), _module_of(path.relative_to(root)), path.read_text(encoding="utf-8"))
        for path in [*sorted(library), *sorted((root / "jobs").glob("*.py"))]
    ]


def _module_of(path: Path) -> str:
    """jobs/cli.py -> batchgen.jobs.cli; batchgen/input/__init__.py -> batchgen.input"""
    parts = path.with_suffix("").parts
    parts = parts if parts[0] == "batchgen" else ("batchgen", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def functions(node: ast.AST, in_class: bool = False) -> Iterator[tuple[Function, bool]]:
    """Each function below a node, with whether its first parameter is self or cls."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function):
            yield child, in_class and not _is_static(child)
            yield from functions(child)
        else:
            yield from functions(child, isinstance(child, ast.ClassDef) or in_class)


def _is_static(function: Function) -> bool:
    return any(isinstance(node, ast.Name) and node.id == "staticmethod" for node in function.decorator_list)


def _parameters(function: Function) -> list[ast.arg]:
    """All parameters of a function, * and ** included."""
    given = function.args
    starred = [one for one in (given.vararg, given.kwarg) if one]
    return [*given.posonlyargs, *given.args, *given.kwonlyargs, *starred]


def _place(source: Source, function: Function, what: str) -> str:
    return f"{source.path}:{function.lineno} {function.name}: {what}"


def count_code(source: Source) -> int:
    """Lines of code: without imports at the top, docstrings, comments and blank lines."""
    left_out = {line for node in ast.walk(source.tree) for line in _lines_left_out(node)}
    tokens = tokenize.generate_tokens(io.StringIO(source.text).readline)
    code = {line for token in tokens if token.type not in NO_CODE for line in range(token.start[0], token.end[0] + 1)}
    return len(code - left_out)


def _lines_left_out(node: ast.AST) -> Iterable[int]:
    """The lines of a docstring, or of an import at the top of a module."""
    if isinstance(node, ast.Module):
        for one in node.body:
            if isinstance(one, (ast.Import, ast.ImportFrom)):
                yield from range(one.lineno, (one.end_lineno or 0) + 1)
    if (
        isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        and ast.get_docstring(node) is not None
    ):
        yield from range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)


# ---- rooms and floors


def room_graph(sources: Iterable[Source]) -> dict[str, set[str]]:
    """Each room with the rooms that it imports, anywhere in its modules but under `if TYPE_CHECKING`."""
    sources = [source for source in sources if source.room]
    graph: dict[str, set[str]] = {source.room: set() for source in sources if source.room}
    for source in sources:
        for name in _imported(source.tree):
            room = name.split(".")[1] if name.startswith("batchgen.") else ""
            if source.room and room in graph and room != source.room:
                graph[source.room].add(room)
    return graph


def _imported(tree: ast.AST) -> Iterator[str]:
    """The full names that a module imports: `from batchgen.input import kept` -> batchgen.input.kept"""
    for node in _nodes_at_run_time(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _nodes_at_run_time(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    is_for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    for child in node.orelse if isinstance(node, ast.If) and is_for_types else ast.iter_child_nodes(node):
        yield from _nodes_at_run_time(child)


def find_cycle(graph: Graph) -> list[str]:
    """Rooms that import each other, first and last the same: ["a", "b", "a"]; empty if all imports look down."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def longest_chain(graph: Graph) -> list[str]:
    """The longest chain of imports from a room down to one that imports none: {"a": {"b"}, "b": set()} -> ["a", "b"]

    Raises CycleError.
    """
    chains: dict[str, list[str]] = {}
    for room in TopologicalSorter(graph).static_order():
        below = max((chains[name] for name in sorted(graph.get(room, ()))), key=len, default=[])
        chains[room] = [room, *below]
    return max(chains.values(), key=len, default=[])


# ---- functions


def is_compiled(source: Source) -> bool:
    """Whether functions of a module are compiled, or write code that is."""
    return any(f"{name}.".startswith(("numba.", "batchgen.gpt2.compiled.")) for name in _imported(source.tree))


def long_parameter_lists(source: Source, limit: int | None = None) -> Iterator[str]:
    """Functions of more parameters than that; self and cls do not count, and fields of a dataclass are none."""
    limit = limit or (MAX_KERNEL_PARAMETERS if is_compiled(source) else MAX_PARAMETERS)
    for function, is_method in functions(source.tree):
        count = len(_parameters(function)) - is_method
        if count > limit:
            yield _place(source, function, f"{count} parameters")


def long_functions(source: Source, limit: int = MAX_FUNCTION_LINES) -> Iterator[str]:
    """Functions of more lines than that, from `def` to the end; decorators do not count."""
    for function, _ in functions(source.tree):
        count = (function.end_lineno or function.lineno) - function.lineno + 1
        if count > limit:
            yield _place(source, function, f"{count} lines")


def loose_plans(source: Source) -> Iterator[str]:
    """Functions about a plan, by their name or a parameter, that pass a dict[str, Any]."""
    for function, _ in functions(source.tree):
        parameters = _parameters(function)
        annotations = [ast.unparse(one) for one in (function.returns, *(p.annotation for p in parameters)) if one]
        names = [function.name, *(parameter.arg for parameter in parameters), *annotations]
        is_about_plan = any(PLAN_WORDS & set(_words(name)) for name in names)
        if is_about_plan and any("dict[str, Any]" in annotation for annotation in annotations):
            yield _place(source, function, "dict[str, Any]")


def _words(name: str) -> list[str]:
    """read_manifest -> ["read", "manifest"]; Plan | None -> ["plan", "none"]"""
    return "".join(c if c.isalnum() else " " for c in name).lower().split()


def any_lines(source: Source) -> set[int]:
    """The numbers of the lines on which `Any` is imported or used."""
    return {node.lineno for node in ast.walk(source.tree) if _is_any(node)}


def _is_any(node: ast.AST) -> bool:
    names = {ast.Name: "id", ast.Attribute: "attr", ast.alias: "name"}
    return getattr(node, names.get(type(node), ""), None) == "Any"


# ---- a run


def input_opens() -> int:
    """How often the main process of a small run opens its input."""
    with tempfile.TemporaryDirectory() as folder:
        prompts, output = Path(folder, "prompts.jsonl"), Path(folder, "completions.parquet")
        prompts.write_text(PROMPTS, encoding="utf-8")
        options = ["--model", "tales", "--jobs", "1", "--max-tokens", "4"]
        return opens_of(prompts, ["-m", "batchgen", "generate", str(prompts), "--output", str(output), *options])


def opens_of(path: Path, arguments: list[str]) -> int:
    """How often a Python process with these arguments opens a file; what its children open does not count."""
    with tempfile.NamedTemporaryFile() as log:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(map(str, (AUDIT_SITE, ROOT))),
            "AUDIT_PATH": str(path),
            "AUDIT_LOG": log.name,
            "AUDIT_PARENT": str(os.getpid()),
        }
        command = [sys.executable, *arguments]
        subprocess.run(command, cwd=path.parent, env=environment, check=True, stdout=subprocess.DEVNULL, timeout=120)
        return len(log.read().splitlines())


# ---- all


def measure(root: Path = ROOT) -> Iterator[Measure]:
    """Every number, in the order in which people read them."""
    sources = read_sources(root)
    library = [source for source in sources if source.room != "jobs"]
    graph = room_graph(sources)
    cycle = find_cycle(graph)
    chain = [] if cycle else longest_chain(graph)
    run = [source.n_lines for source in sources if source.module == "batchgen.run"]
    with_any = [f"{source.path}: {len(any_lines(source))}" for source in sources if any_lines(source)]

    yield Measure("lines of batchgen/run.py", sum(run), MAX_RUN_LINES)
    yield Measure("floors (the longest chain of imports)", len(chain), MAX_FLOORS, (" -> ".join(chain),))
    yield Measure("rooms", len(graph), MAX_ROOMS, (", ".join(sorted(graph)),))
    yield Measure("cycles of imports between rooms", int(bool(cycle)), 0, (" -> ".join(cycle),))
    for name, find in (
        (f"functions of over {MAX_PARAMETERS} parameters ({MAX_KERNEL_PARAMETERS} compiled)", long_parameter_lists),
        (f"functions of more than {MAX_FUNCTION_LINES} lines", long_functions),
        ("signatures with a plan as dict[str, Any]", loose_plans),
    ):
        places = tuple(place for source in library for place in find(source))
        yield Measure(name, len(places), 0, places)
    yield Measure("lines with Any", sum(len(any_lines(s)) for s in sources), MAX_ANY_LINES, tuple(with_any))
    yield Measure("lines of batchgen/ and jobs/", sum(source.n_lines for source in sources), MAX_LINES)
    yield Measure("lines of code", sum(map(count_code, sources)), MAX_CODE_LINES)
    yield Measure("times that a run opens its input", input_opens(), MAX_INPUT_OPENS)


def main() -> int:
    measures = []
    for one in measure():
        print(one)
        measures.append(one)
    return int(any(one.is_broken for one in measures))


if __name__ == "__main__":
    sys.exit(main())
