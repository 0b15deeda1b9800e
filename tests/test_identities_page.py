"""docs/identities.md is the list of identities: each has the tests it names, and their docstrings start with it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = sorted(ROOT.glob("tests/test_*.py"))
IDENTIFIER = r"[A-Z]+-[A-Z]?\d+"
ENTRY = re.compile(rf"^- \*\*({IDENTIFIER})\*\* (.+?)(?=^- \*\*|^#|\Z)", re.MULTILINE | re.DOTALL)
NUMBERED = re.compile(r"test_([A-Z]+_?[a-z]?\d+|[pt]\d+|[ivx]+)_")  # as in test_S4_, test_T_b1_, test_p3_, test_iv_

Held = dict[str, set[str]]  # identifier: tests as file::name


def listed(page: str) -> Held:
    """The tests that a page names for each of its identities."""
    return {identifier: set(re.findall(r"`(test_\w+\.py::\w+)`", text)) for identifier, text in ENTRY.findall(page)}


def functions(source: str) -> list[ast.FunctionDef]:
    """The tests of a file."""
    nodes = ast.walk(ast.parse(source))
    return [node for node in nodes if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]


def stated(sources: dict[str, str]) -> Held:
    """The tests whose docstrings start with an identifier, by identifier."""
    found: Held = {}
    for file, source in sources.items():
        for test in functions(source):
            start = re.match(rf"({IDENTIFIER}): \S", ast.get_docstring(test) or "")
            if start:
                found.setdefault(start[1], set()).add(f"{file}::{test.name}")
    return found


def gaps(page: Held, tests: Held) -> list[str]:
    """What to add where, a line each; none if page and docstrings agree."""
    found = []
    for identifier in sorted(page.keys() | tests.keys()):
        on_page = page.get(identifier, set())
        in_tests = tests.get(identifier, set())
        found += [f"docs/identities.md: add {test} to {identifier}" for test in sorted(in_tests - on_page)]
        found += [f"{test}: start its docstring with '{identifier}: '" for test in sorted(on_page - in_tests)]
        if not on_page | in_tests:
            found.append(f"docs/identities.md: {identifier} names no test; add one that holds it")
    return found


def test_page_and_docstrings_agree():
    page = listed((ROOT / "docs" / "identities.md").read_text())
    assert page
    assert not gaps(page, stated({path.name: path.read_text() for path in TESTS}))


def test_every_entry_is_listed_once_with_its_regime():
    entries = ENTRY.findall((ROOT / "docs" / "identities.md").read_text())
    names = [identifier for identifier, _ in entries]
    assert len(names) == len(set(names))
    for identifier, text in entries:
        assert re.search(r"^  Holds: \S", text, re.MULTILINE), f"{identifier}: say where it holds, '  Holds: ...'"


def test_names_say_the_law_and_carry_no_numbers():
    names = [f"{path.name}::{test.name}" for path in TESTS for test in functions(path.read_text())]
    numbered = [name for name in names if NUMBERED.match(name.split("::")[1])]
    assert not numbered, "the identifier belongs to the start of the docstring"


def test_what_is_missing_is_named():
    """An identity without test, a test that does not state it, and one that the page does not know."""
    page = "- **AB-1** law.\n  Test: `test_x.py::test_one`,\n  `test_x.py::test_two`.\n- **AB-2** law.\n\n## More\n"
    source = 'def test_one():\n    """AB-1: law."""\n\n\ndef test_two():\n    pass\n'
    source += '\n\ndef test_three():\n    """AB-3: law."""\n'
    assert gaps(listed(page), stated({"test_x.py": source})) == [
        "test_x.py::test_two: start its docstring with 'AB-1: '",
        "docs/identities.md: AB-2 names no test; add one that holds it",
        "docs/identities.md: add test_x.py::test_three to AB-3",
    ]
    for name in ("test_S4_law", "test_T_b1_law", "test_p12_law", "test_iv_law"):
        assert NUMBERED.match(name)
    for name in ("test_l2_and_weight_decay", "test_float32_agrees", "test_it_turns"):
        assert not NUMBERED.match(name)
