"""The declared contract: required functions, optional capabilities, and that nothing else is ever probed."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import kfaccore as kf
from kfaccore import method as contract
from kfaccore.method import CAPABILITIES, Method, declares, names
from kfaccore.step.rule import Rule

ROOT = Path(__file__).resolve().parents[1]
CATALOGUE = kf.methods.CATALOGUE
PROBES_ALLOWED = {  # files that look at arrays, trees or modules of others
    "kfaccore/tree.py": "named tuples",
    "kfaccore/io.py": "leaves that may be numbers",
    "kfaccore/options.py": "what was given for an option",
    "kfaccore/declared.py": "`declares` itself",
    "kfaccore/xp/half.py": "dtypes of a namespace",
    "kfaccore/cli/doctor.py": "libraries of this machine",
}


def parameters(function) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_method_keeps_the_contract(name):
    """All required names, and of each capability either none of its names or all, with the Protocol's parameters."""
    method = CATALOGUE[name]()
    for required in names(Method):
        assert hasattr(method, required), f"{name} has no {required}: see kfaccore/method.py"
    for kind in (Method, *CAPABILITIES):
        for part in names(kind):
            wanted = getattr(kind, part, None)
            if inspect.isfunction(wanted) and hasattr(type(method), part):
                given = parameters(getattr(type(method), part))
                assert given[: len(parameters(wanted))] == parameters(wanted), f"{name}.{part} of {kind.__name__}"
    for kind in CAPABILITIES:
        has = [part for part in names(kind) if hasattr(method, part)]
        assert has in ([], list(names(kind))), f"{name} declares a part of {kind.__name__}: {has}"


def test_every_capability_is_in_the_table_and_offered_by_somebody():
    protocols = {x for x in vars(contract).values() if inspect.isclass(x) and getattr(x, "_is_protocol", False)}
    states = {contract.State, contract.Stats, contract.Method}
    optional = {x for x in protocols - states if x.__module__ == contract.__name__}
    assert optional == set(CAPABILITIES)
    for kind in CAPABILITIES:
        assert any(declares(method(), kind) for method in CATALOGUE.values()), kind.__name__
        assert kind.__doc__


def test_a_capability_can_be_refused():
    class Quiet:
        rows_at_solve = False

    assert not declares(Quiet(), contract.RowsAtSolve)
    assert not declares(object(), contract.RowsAtSolve)
    assert declares(kf.FNGD(), contract.RowsAtSolve)
    assert not declares(kf.KFAC(), contract.Resting)


@pytest.mark.parametrize("rule", [kf.Fixed(), kf.SelfTuning(), kf.LineSearch(), kf.GridSearch(), kf.Quadratic()])
def test_every_rule_keeps_its_contract(rule):
    for required in names(Rule):
        assert hasattr(rule, required), f"{rule} has no {required}: see kfaccore/step/rule.py"


def probes(path: Path) -> list[str]:
    """Attributes that a file looks for without knowing that they are there."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            guarded = node.func.id == "getattr" and len(node.args) == 3
            if node.func.id == "hasattr" or guarded:
                found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("path", sorted(ROOT.glob("kfaccore/**/*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_in_the_core_probes_what_is_not_declared(path):
    """A capability is asked for with `declares(method, Capability)`; arrays of others are another matter."""
    if str(path.relative_to(ROOT)) not in PROBES_ALLOWED:
        assert not probes(path), "declare a capability in kfaccore/method.py and ask with `declares`"


@pytest.mark.parametrize("path", sorted(ROOT.glob("adapters/**/*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_shell_probes_a_method(path):
    """Shells look at models of others, never at methods, rules or states of the core."""
    declared = {part for kind in (Method, Rule, *CAPABILITIES) for part in names(kind)} - {"init", "matrix"}
    assert not [line for line in probes(path) if any(f"'{part}'" in line for part in declared)]
