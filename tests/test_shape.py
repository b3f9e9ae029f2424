"""The module keeps its shape: rooms in order, each resting only on the rooms above it, and small parts."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import adce

SOURCE = Path(adce.__file__ or "").read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)
BANNER = re.compile(r"^# -{60,} (.+)$", re.MULTILINE)
BANNED = re.compile(r"util|helper|manager|misc|common|stuff", re.IGNORECASE)
Definition = ast.FunctionDef | ast.ClassDef


def room_starts() -> list[tuple[int, str]]:
    return [(SOURCE.count("\n", 0, match.start()) + 1, match[1]) for match in BANNER.finditer(SOURCE)]


def room_of(line: int) -> int:
    """The number of the room that holds a line; -1 before the first."""
    return sum(start <= line for start, _ in room_starts()) - 1


def defined_names() -> dict[str, int]:
    """Every top-level name with the line that defines it."""
    names = {}
    for node in TREE.body:
        if isinstance(node, Definition):
            names[node.name] = node.lineno
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names.update({target.id: node.lineno for target in targets if isinstance(target, ast.Name)})
    return names


def definitions(kind: type[ast.AST]) -> list[ast.AST]:
    return [node for node in ast.walk(TREE) if isinstance(node, kind)]


def length(node: ast.FunctionDef) -> int:
    """Lines of a function without its docstring."""
    first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
    return (node.end_lineno or 0) - first.lineno + 1


def test_map_in_the_docstring_names_the_rooms_in_order():
    listed = re.findall(r"^    ([A-Z][A-Za-z ]+?)  +\S", adce.__doc__ or "", re.MULTILINE)
    assert listed == [name for _, name in room_starts()]


def global_uses() -> list[ast.Name]:
    """Every name that is read and that no function around it binds."""
    found: list[ast.Name] = []

    def visit(node: ast.AST, bound: frozenset[str]) -> None:
        if isinstance(
            node, ast.FunctionDef | ast.Lambda | ast.GeneratorExp | ast.ListComp | ast.DictComp | ast.SetComp
        ):
            inner = [part for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)]
            arguments = [part.arg for part in ast.walk(node) if isinstance(part, ast.arg)]
            bound |= {part.id for part in inner} | set(arguments)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id not in bound:
            found.append(node)
        for child in ast.iter_child_nodes(node):
            visit(child, bound)

    visit(TREE, frozenset())
    return found


def test_nothing_refers_to_a_later_room():
    defined = defined_names()
    upward = [
        f"line {node.lineno}: {node.id}"
        for node in global_uses()
        if node.id in defined and room_of(node.lineno) < room_of(defined[node.id])
    ]
    assert upward == []


def test_no_room_is_longer_than_300_lines():
    starts = [line for line, _ in room_starts()] + [SOURCE.count("\n") + 1]
    sizes = {name: following - line for (line, name), following in zip(room_starts(), starts[1:], strict=True)}
    assert {name: size for name, size in sizes.items() if size > 300} == {}


def test_no_function_is_longer_than_60_lines():
    functions = [node for node in definitions(ast.FunctionDef) if isinstance(node, ast.FunctionDef)]
    assert {node.name: length(node) for node in functions if length(node) > 60} == {}


def test_no_class_has_more_than_15_methods():
    classes = [node for node in definitions(ast.ClassDef) if isinstance(node, ast.ClassDef)]
    counts = {node.name: sum(isinstance(part, ast.FunctionDef) for part in node.body) for node in classes}
    assert {name: count for name, count in counts.items() if count > 15} == {}


def test_no_function_takes_more_than_six_parameters():
    for node in definitions(ast.FunctionDef):
        assert isinstance(node, ast.FunctionDef)
        names = [argument.arg for argument in node.args.args + node.args.kwonlyargs if argument.arg != "self"]
        assert len(names) <= 6, node.name


def test_module_level_names_are_constants_types_or_functions():
    for name, line in defined_names().items():
        node = next(node for node in TREE.body if node.lineno == line)
        if isinstance(node, ast.Assign | ast.AnnAssign):
            assert re.fullmatch(r"[A-Z_0-9]+|__\w+__|[A-Z]\w+", name), name


def test_every_public_name_has_a_docstring():
    missing = [
        node.name
        for node in TREE.body
        if isinstance(node, Definition) and not node.name.startswith("_") and not ast.get_docstring(node)
    ]
    records = [name for name in missing if hasattr(getattr(adce, name), "__dataclass_fields__")]
    assert set(missing) - set(records) == set()


def test_promised_names_exist():
    assert [name for name in adce.__all__ if not hasattr(adce, name)] == []


def test_no_section_or_function_is_named_for_what_it_is_not():
    names = [name for _, name in room_starts()] + list(defined_names())
    assert [name for name in names if BANNED.search(name)] == []


@pytest.mark.parametrize("method", ["execute", "executemany", "executescript", "read", "value"])
def test_no_value_is_pasted_into_sql(method):
    """An f-string that reaches SQL may only be built of constants, and says so with a noqa."""
    lines = SOURCE.splitlines()
    calls = [
        node.lineno
        for node in ast.walk(TREE)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == method
        if any(isinstance(argument, ast.JoinedStr) for argument in node.args)
    ]
    assert [line for line in calls if not re.search(r"noqa: S608|pragma|sql\}", lines[line - 1])] == []
