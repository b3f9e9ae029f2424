"""The module keeps its shape: rooms in order, each resting only on the rooms above it, and small parts."""

from __future__ import annotations

import ast
import bisect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import adce

SOURCE = Path(adce.__file__ or "").read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)
NODES = list(ast.walk(TREE))
FUNCTIONS = [node for node in NODES if isinstance(node, ast.FunctionDef)]
CLASSES = [node for node in NODES if isinstance(node, ast.ClassDef)]
BANNER = re.compile(r"^# -{60,} (.+)$", re.MULTILINE)
BANNED = re.compile(r"util|helper|manager|handler|misc|common|stuff", re.IGNORECASE)
MUTABLE = ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp
SCOPES = ast.FunctionDef | ast.Lambda | ast.GeneratorExp | ast.ListComp | ast.DictComp | ast.SetComp
ASSIGNMENTS = ast.Assign | ast.AnnAssign


def rooms(source: str) -> dict[str, int]:
    """The first line of each room, in order."""
    return {match[1]: source.count("\n", 0, match.start()) + 1 for match in BANNER.finditer(source)}


def targets(node: ast.Assign | ast.AnnAssign) -> list[str]:
    found = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [target.id for target in found if isinstance(target, ast.Name)]


def defined_names(tree: ast.Module) -> dict[str, ast.stmt]:
    """Every top-level name with the statement that defines it."""
    names: dict[str, ast.stmt] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names[node.name] = node
        elif isinstance(node, ASSIGNMENTS):
            names.update(dict.fromkeys(targets(node), node))
    return names


def within(scope: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a function or comprehension, without those of the ones inside it."""
    for child in ast.iter_child_nodes(scope):
        yield child
        if not isinstance(child, SCOPES):
            yield from within(child)


def global_uses(node: ast.AST, bound: frozenset[str] = frozenset()) -> Iterator[ast.Name]:
    """Every name that is read and that nothing around it binds; annotations and bodies count too."""
    if isinstance(node, SCOPES):
        bound |= {part.id for part in within(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
        bound |= {part.arg for part in within(node) if isinstance(part, ast.arg)}
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Load) and child.id not in bound:
            yield child
        yield from global_uses(child, bound)


def later_uses(source: str) -> list[str]:
    tree, starts = ast.parse(source), list(rooms(source).values())
    defined = {name: bisect.bisect(starts, node.lineno) for name, node in defined_names(tree).items()}
    return [
        f"line {use.lineno}: {use.id}"
        for use in global_uses(tree)
        if bisect.bisect(starts, use.lineno) < defined.get(use.id, 0)
    ]


def length(node: ast.FunctionDef) -> int:
    """Lines of a function without its docstring."""
    first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
    return (node.end_lineno or 0) - first.lineno + 1


def parameters(node: ast.FunctionDef) -> list[str]:
    every = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
    return [argument.arg for argument in every if argument.arg not in ("self", "cls")]


def test_map_in_the_docstring_names_the_rooms_in_order():
    listed = re.findall(r"^    ([A-Z][A-Za-z ]+?)  +\S", adce.__doc__ or "", re.MULTILINE)
    assert listed == list(rooms(SOURCE))


def test_nothing_refers_to_a_later_room():
    assert later_uses(SOURCE) == []


@pytest.mark.parametrize(
    ("line", "count"),
    [
        ("def above(): return below()", 1),
        ("def above(it: Below) -> None: ...", 1),
        ("class Above:\n    it: Below", 1),
        ("def above(below): return [below for _ in below]", 0),
        ("def above():\n    def inner(below): ...\n    return below()", 1),
        ("above = [below for below in ()]", 0),
    ],
)
def test_use_of_a_later_room_is_seen(line, count):
    banner = f"# {'-' * 64} "
    source = f"{banner}One\n{line}\n{banner}Two\ndef below(): ...\nclass Below: ...\n"
    assert len(later_uses(source)) == count


def test_module_stays_small():
    """These ceilings go down, and up only by what a new capability is worth."""
    ends = [*list(rooms(SOURCE).values())[1:], SOURCE.count("\n") + 1]
    sizes = {name: end - start for (name, start), end in zip(rooms(SOURCE).items(), ends, strict=True)}
    assert (SOURCE.count("\n") <= 9850, len(sizes) <= 32) == (True, True)
    assert {name: size for name, size in sizes.items() if size > 400} == {}


def test_no_function_is_longer_than_60_lines():
    assert {node.name: length(node) for node in FUNCTIONS if length(node) > 60} == {}


def test_no_class_has_more_than_15_methods():
    counts = {node.name: sum(isinstance(part, ast.FunctionDef) for part in node.body) for node in CLASSES}
    assert {name: count for name, count in counts.items() if count > 15} == {}


def test_no_function_takes_more_than_six_parameters():
    assert {node.name: parameters(node) for node in FUNCTIONS if len(parameters(node)) > 6} == {}


def test_only_upper_case_constants_hold_what_could_change():
    for name, node in defined_names(TREE).items():
        if isinstance(node, ASSIGNMENTS) and not re.fullmatch(r"[A-Z_0-9]+|__\w+__", name):
            assert re.fullmatch(r"[A-Z]\w+", name), name
            assert not isinstance(node.value, MUTABLE), name
            assert not isinstance(node.value, ast.Call) or ast.unparse(node.value.func) == "TypeVar", name
    assert [node.lineno for node in NODES if isinstance(node, ast.Global | ast.Nonlocal)] == []


def test_no_class_shares_a_mutable_value_between_its_instances():
    shared = [part for node in CLASSES for part in node.body if isinstance(part, ASSIGNMENTS)]
    assert [part.lineno for part in shared if isinstance(part.value, MUTABLE)] == []


def test_every_public_name_has_a_docstring():
    nodes = [node for node in TREE.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert [node.name for node in nodes if not node.name.startswith("_") and not ast.get_docstring(node)] == []


def test_promised_names_exist():
    assert [name for name in adce.__all__ if not hasattr(adce, name)] == []


def test_nothing_is_named_for_what_it_is_not():
    """But a handler of http.server has the name of its base."""
    http = {node.name for node in CLASSES for base in node.bases if ast.unparse(base).endswith("Handler")}
    names = [*rooms(SOURCE), *defined_names(TREE), *(node.name for node in FUNCTIONS + CLASSES)]
    assert [name for name in names if BANNED.search(name) and name not in http] == []


@pytest.mark.parametrize("method", ["execute", "executemany", "executescript", "read", "value"])
def test_no_value_is_pasted_into_sql(method):
    """An f-string that reaches SQL may only be built of constants, and says so with a noqa."""
    lines = SOURCE.splitlines()
    calls = [
        node.lineno
        for node in NODES
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == method
        if any(isinstance(argument, ast.JoinedStr) for argument in node.args)
    ]
    assert [line for line in calls if not re.search(r"noqa: S608|pragma|sql\}", lines[line - 1])] == []
