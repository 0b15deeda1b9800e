"""No public name without a docstring, none that sends the reader elsewhere, and their examples run.

Public: classes, functions and their methods without a leading underscore, of every module but the examples, which are
programs with a page of their own. A method is documented by itself, by a class above it, or by the contract: a Protocol
of the package that says what a method of this name does. Members that a Protocol only names (a body of `...`) are
described by its class, and a setter by its property.
"""

from __future__ import annotations

import ast
import doctest
import importlib
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import kfaccore as kf

ROOT = Path(__file__).resolve().parents[1]
FILES = [path for path in sorted(ROOT.glob("*/**/*.py")) if path.relative_to(ROOT).parts[0] in ("kfaccore", "adapters")]
TREES = {path: ast.parse(path.read_text()) for path in FILES if "examples" not in path.parts}
CLASSES = [node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
ELSEWHERE = re.compile(r"see the (module|page|family)|see module", re.IGNORECASE)

Documented = ast.ClassDef | ast.FunctionDef


def members(node: ast.ClassDef) -> list[ast.FunctionDef]:
    """Public methods, setters left out."""
    found = [x for x in node.body if isinstance(x, ast.FunctionDef) and not x.name.startswith("_")]
    return [x for x in found if not any("setter" in ast.unparse(mark) for mark in x.decorator_list)]


def bases(node: ast.ClassDef) -> set[str]:
    """Names of the classes above, without what is in brackets."""
    return {ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases}


CONTRACT = {x.name for c in CLASSES if "Protocol" in bases(c) for x in members(c) if ast.get_docstring(x)}


def inherited(node: ast.ClassDef, name: str) -> bool:
    """Whether a class above, or the contract, says what a method of this name does."""
    above = [c for c in CLASSES if c.name in bases(node) and c is not node]
    own = any(x.name == name and ast.get_docstring(x) for c in above for x in members(c))
    return name in CONTRACT or own or any(inherited(c, name) for c in above)


def only_named(node: ast.FunctionDef) -> bool:
    """A member of a Protocol with no body."""
    return [ast.unparse(x) for x in node.body] == ["..."]


def public() -> Iterator[tuple[str, Documented, bool]]:
    """Every public name, and whether it is documented."""
    for path, tree in TREES.items():
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for node in tree.body:
            if not isinstance(node, Documented) or node.name.startswith("_"):
                continue
            yield f"{module}.{node.name}", node, bool(ast.get_docstring(node))
            for x in members(node) if isinstance(node, ast.ClassDef) else ():
                said = bool(ast.get_docstring(x)) or only_named(x) or inherited(node, x.name)
                yield f"{module}.{node.name}.{x.name}", x, said


def test_no_public_name_without_docstring():
    counted = list(public())
    assert len(counted) > 2000  # the count itself works
    assert [name for name, _, said in counted if not said] == []


def test_no_docstring_sends_the_reader_elsewhere():
    assert [name for name, node, _ in public() if ELSEWHERE.search(ast.get_docstring(node) or "")] == []


def test_a_missing_docstring_is_found():
    tree = ast.parse("class Rare:\n    '''Here.'''\n    def unheard(self): return 1\n    def solve(self): return 1\n")
    node = tree.body[0]
    assert isinstance(node, ast.ClassDef)
    said = {x.name: bool(ast.get_docstring(x)) or inherited(node, x.name) for x in members(node)}
    assert said == {"unheard": False, "solve": True}


MODULES = [name for _, name, _ in pkgutil.walk_packages(kf.__path__, "kfaccore.") if "__main__" not in name]
WITH_EXAMPLES = [name for name in MODULES if ">>> " in Path(importlib.util.find_spec(name).origin).read_text()]


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_run(name):
    done = doctest.testmod(importlib.import_module(name), extraglobs={"kf": kf}, optionflags=doctest.ELLIPSIS)
    assert done.attempted
    assert not done.failed
