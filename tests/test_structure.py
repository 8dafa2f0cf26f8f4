"""What counts the structure of the code, on sources made here; the numbers of the repository are `make lint`'s."""

from graphlib import CycleError
from pathlib import Path

import pytest

from tests.support import structure
from tests.support.structure import Measure, Source, parse_source

MAX = 3  # parameters and lines, in the sources below


def source(text: str, module: str = "batchgen.made") -> Source:
    return parse_source(f"{module.replace('.', '/')}.py", module, text)


def graph_of(**modules: str) -> dict[str, set[str]]:
    return structure.room_graph(source(text, f"batchgen.{name}") for name, text in modules.items())


# ---- reading


def test_the_links_in_batchgen_are_read_once_or_not_at_all(tmp_path):
    for name in ("batchgen/__init__.py", "batchgen/input/__init__.py", "batchgen/input/csv.py", "jobs/cli.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.py").touch()
    for name in ("jobs", "data"):
        (tmp_path / "batchgen" / name).symlink_to(Path("..", name))
    assert {one.module: (one.path, one.room) for one in structure.read_sources(tmp_path)} == {
        "batchgen": ("batchgen/__init__.py", None),
        "batchgen.input": ("batchgen/input/__init__.py", "input"),
        "batchgen.input.csv": ("batchgen/input/csv.py", "input"),
        "batchgen.jobs.cli": ("jobs/cli.py", "jobs"),
    }


def test_lines_of_code_leave_out_imports_docstrings_comments_and_blank_lines():
    text = """'''A module.'''

import json


def f(x):  # a comment beside code counts
    '''A function.

    More of it.
    '''
    # a comment alone does not
    return json.dumps(
        x
    )
"""
    assert structure.count_code(source(text)) == 4


# ---- rooms and floors


def test_imports_of_every_form_and_place_are_found():
    graph = graph_of(
        run="import batchgen.plan\nfrom batchgen import files\ndef f():\n    from batchgen.input.csv import rows",
        plan="import json",
        files="",
        **{"input.csv": ""},
    )
    assert graph == {"run": {"plan", "files", "input"}, "plan": set(), "files": set(), "input": set()}


def test_imports_for_types_inside_a_room_and_of_batchgen_itself_do_not_count():
    graph = graph_of(
        a="if TYPE_CHECKING:\n    from batchgen.b import B\nelse:\n    from batchgen.c import C",
        b="from batchgen import __version__\nfrom batchgen.b import other",
        c="from batchgen.nowhere import x",
        __main__="from batchgen.a import main",
    )
    assert graph == {"a": {"c"}, "b": set(), "c": set()}


def test_the_longest_chain_goes_from_the_top_to_the_bottom():
    graph = {"top": {"bottom", "middle"}, "middle": {"bottom"}, "bottom": set(), "alone": set()}
    assert structure.longest_chain(graph) == ["top", "middle", "bottom"]
    assert structure.find_cycle(graph) == []
    assert structure.longest_chain({}) == []


def test_a_cycle_is_named_and_has_no_longest_chain():
    graph = {"a": {"b"}, "b": {"a"}, "c": set()}
    cycle = structure.find_cycle(graph)
    assert cycle[0] == cycle[-1]
    assert set(cycle) == {"a", "b"}
    with pytest.raises(CycleError):
        structure.longest_chain(graph)


# ---- functions


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("def f(a, b, c): ...", None),
        ("def f(a, b, c, d): ...", 4),
        ("def f(a, /, b, *, c, d): ...", 4),
        ("async def f(a, b, *c, **d): ...", 4),
        ("class A:\n    def f(self, a, b, c): ...", None),
        ("class A:\n    @classmethod\n    def f(cls, a, b, c): ...", None),
        ("class A:\n    @staticmethod\n    def f(a, b, c, d): ...", 4),
        ("class A:\n    if TYPE_CHECKING:\n        def f(self, a, b, c): ...", None),
        ("class A:\n    def g(self):\n        def f(a, b, c, d): ...", 4),
        ("@dataclass\nclass A:\n    a: int\n    b: int\n    c: int\n    d: int", None),
    ],
)
def test_self_and_cls_are_no_parameters_and_fields_are_none(text, count):
    found = [place.partition(" ")[2] for place in structure.long_parameter_lists(source(text), MAX)]
    assert found == ([f"f: {count} parameters"] if count else [])


@pytest.mark.parametrize(("line", "limit"), [("import json", 6), ("from batchgen.gpt2.compiled import kernel", 11)])
def test_compiled_functions_may_have_more_parameters(line, limit):
    text = f"{line}\ndef f({', '.join(f'a{i}' for i in range(limit))}): ..."
    assert not list(structure.long_parameter_lists(source(text)))
    assert list(structure.long_parameter_lists(source(text.replace("a0", "a0, b"))))


def test_a_function_is_as_long_as_from_def_to_its_last_line():
    text = "@decorator\n@decorator\ndef short():\n    a\n    b\n\n\ndef long():\n    a\n    (\n    )\n"
    assert list(structure.long_functions(source(text), MAX)) == ["batchgen/made.py:8 long: 4 lines"]


@pytest.mark.parametrize(
    ("signature", "is_loose"),
    [
        ("def publish(plan: dict[str, Any]): ...", True),
        ("def read_manifest(path: Path) -> dict[str, Any]: ...", True),
        ("def settle(asked: Plan) -> dict[str, Any] | None: ...", True),
        ("def settle(values: list[dict[str, Any]], *, metadata: bytes): ...", True),
        ("def publish(plan: Plan) -> None: ...", False),
        ("def explain(row: dict[str, Any]) -> str: ...", False),
        ("def returns(planned: dict[str, Any]) -> str: ...", False),
        ("def publish(plan): ...", False),
    ],
)
def test_a_plan_passed_as_a_dict_is_found_by_name_or_annotation(signature, is_loose):
    assert bool(list(structure.loose_plans(source(signature)))) is is_loose


def test_lines_with_any_are_counted_once_and_prose_is_not():
    text = (
        '"""Any text."""\n'
        "from typing import Any, Literal\n"
        "import typing\n"
        "def f(a: Any, b: dict[str, Any]) -> Any: ...  # Any\n"
        "def g(anything: typing.Any): ...\n"
        "Anything = int\n"
    )
    assert structure.any_lines(source(text)) == {2, 4, 5}


# ---- measures


def test_a_number_at_its_limit_holds_and_one_above_it_names_the_places():
    assert str(Measure("rooms", 2, 2, ("a, b",))) == f"{'rooms':<44}{2:>7}  limit {2:>6}"
    assert str(Measure("rooms", 3, 2, ("a, b, c",))).endswith("  BROKEN\n    a, b, c")


def test_opens_are_counted_in_the_main_process_alone(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.touch()
    script = """
import os, subprocess, sys
path = sys.argv[1]
with open(path) as file, open(file.fileno(), closefd=False):
    pass
os.close(os.open(os.path.relpath(path), os.O_RDONLY))
if len(sys.argv) == 2:
    subprocess.run([sys.executable, *sys.orig_argv[1:], "child"], check=True)
"""
    assert structure.opens_of(path, ["-c", script, str(path)]) == 2
