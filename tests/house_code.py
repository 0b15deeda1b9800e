"""What can be counted of how the code reads: types that say something, one assignment a line."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CORE = sorted(ROOT.glob("kfaccore/**/*.py"))
SOURCES = [*CORE, *sorted(ROOT.glob("adapters/**/*.py"))]


def public_functions(body: list[ast.stmt], hidden: bool = False) -> Iterator[ast.FunctionDef]:
    """Functions and methods whose names, and whose classes' names, are public."""
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield from public_functions(node.body, hidden or node.name.startswith("_"))
        elif isinstance(node, ast.FunctionDef):
            dunder = node.name.startswith("__")
            if not hidden and (dunder or not node.name.startswith("_")):
                yield node


def annotations(function: ast.FunctionDef) -> list[ast.expr]:
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    found = [argument.annotation for argument in every if argument is not None] + [function.returns]
    return [annotation for annotation in found if annotation is not None]


def aliases_of_any(modules: list[ast.Module]) -> set[str]:
    """Any, and every name that is only another word for it."""
    known = {"Any"}
    assigned = [node for module in modules for node in module.body if isinstance(node, ast.Assign)]
    while True:
        new = {
            target.id
            for node in assigned
            if isinstance(node.value, ast.Name) and node.value.id in known
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        if new <= known:
            return known
        known |= new


def says_any(function: ast.FunctionDef, known: set[str]) -> bool:
    return any(
        isinstance(node, ast.Name) and node.id in known
        for annotation in annotations(function)
        for node in ast.walk(annotation)
    )


def test_public_signatures_of_the_core_say_what_they_take():
    modules = [ast.parse(path.read_text()) for path in CORE]
    known = aliases_of_any(modules)
    functions = [(path, f) for path, module in zip(CORE, modules, strict=True) for f in public_functions(module.body)]
    vague = [f"{path.relative_to(ROOT)}: {f.name}" for path, f in functions if says_any(f, known)]
    assert len(vague) <= 0.05 * len(functions), "\n".join([f"{len(vague)} of {len(functions)} say Any:", *vague])


def parallel(module: ast.Module) -> list[int]:
    """Lines with a tuple on both sides of an assignment; a swap of two names is none."""
    found = []
    for node in ast.walk(module):
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
            continue
        target = node.targets[0]
        if isinstance(target, ast.Tuple) and {ast.unparse(x) for x in target.elts} != {
            ast.unparse(x) for x in node.value.elts
        }:
            found.append(node.lineno)
    return found


def test_one_assignment_a_line():
    """At most 8 parallel assignments in 1,000 statements."""
    modules = {path: ast.parse(path.read_text()) for path in SOURCES}
    statements = sum(isinstance(node, ast.stmt) for module in modules.values() for node in ast.walk(module))
    lines = [f"{path.relative_to(ROOT)}:{line}" for path, module in modules.items() for line in parallel(module)]
    assert 1000 * len(lines) <= 8 * statements, "\n".join([f"{len(lines)} in {statements} statements:", *lines])


def test_the_counts_see_what_they_count():
    module = ast.parse("X = Any\ndef f(x: list[X]) -> int: ...\ndef g(x: int) -> int: ...\ndef _h(x: Any): ...\n")
    assert [f.name for f in public_functions(module.body) if says_any(f, aliases_of_any([module]))] == ["f"]
    assert parallel(ast.parse("a, b = 1, 2\na, b = b, a\na, b = f()\n")) == [1]
