"""What a new method must bring beside its file: each test says what to add, and where.

The checks are functions over data that return such sentences, so that what they say of a fault is tested as well.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import kfaccore as kf
from mutants import MUTANTS
from rows import METHODS

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = sorted(page.parent for page in ROOT.glob("kfaccore/methods/*/__init__.py"))
SPOKEN = re.compile(r"[^\W\d_][^:\n]*: .*[~=]")  # Name: formula, on one line


def rows_missing(catalogue, rows):
    """A sentence for each entry without a row of METHODS."""
    seen = {type(row.method) for row in rows}
    return [
        f"kf.methods.CATALOGUE has {name!r} and no law runs over it: add Row({name!r}, kf.{method.__name__}(), regime) "
        "to METHODS in tests/rows.py"
        for name, method in catalogue.items()
        if method not in seen
    ]


def formulas_missing(docstrings):
    """A sentence for each file of a method, {path: docstring}, whose page does not start with its formula."""
    return [
        f"{path} starts {(text or '').partition(chr(10))[0]!r}: let the first line of its docstring be "
        "`Name: formula`, as in `K-FAC: F ~ G (x) A, so x = ...`"
        for path, text in docstrings.items()
        if not SPOKEN.match(text or "")
    ]


def pages_missing(pages, members):
    """A sentence for each family {folder: docstring of its __init__} without a page, or with a method not on it."""
    found = []
    for family, text in pages.items():
        path = f"kfaccore/methods/{family}/__init__.py"
        if not text:
            found.append(f"{path} has no page: add a docstring with the family's formula, and when to choose which")
            continue
        named = set(re.findall(r"\w+", text))
        for name in sorted(set(members.get(family, ())) - named):
            found.append(f"{path} does not name {name}: add a line `{name}   what it is   when to choose it`")
    return found


def exports_missing(catalogue, public, exported):
    """A sentence for each method not in the public names, or not in those of its family, {module: names}."""
    found = []
    for method in catalogue.values():
        name, family = method.__name__, method.__module__.rpartition(".")[0]
        for module in (family, "kfaccore.methods"):
            if name not in exported.get(module, ()):
                path = module.replace(".", "/") + "/__init__.py"
                found.append(f"{name} is not exported by {module}: import it in {path} and add {name!r} to __all__")
        if name not in public:
            found.append(f"kf.{name} does not exist: import it in kfaccore/__init__.py and add {name!r} to __all__")
    return found


def mutants_missing(mutants, source, tests):
    """A sentence for each mutant whose line is not in its file exactly once, or whose tests do not exist."""
    found = []
    for name, file, old, new, killer in mutants:
        text = source(file)
        if text is None:
            found.append(f"mutant {name!r}: kfaccore/{file} does not exist: say in tests/mutants.py where it moved")
        elif text.count(old) != 1:
            found.append(f"mutant {name!r}: {old!r} is {text.count(old)} times in kfaccore/{file}; need it once")
        elif old == new:
            found.append(f"mutant {name!r} changes nothing")
        if killer.partition("::")[0] not in tests:
            found.append(f"mutant {name!r}: tests/{killer} does not exist")
    return found


def page(path):
    """The docstring of a file."""
    return ast.get_docstring(ast.parse(path.read_text()))


def source(file):
    """The text of a mutant's file: its path is from kfaccore/ of an installation, beside which the adapters lie."""
    adapter = file.startswith("../")
    path = ROOT / "adapters" / file.removeprefix("../") if adapter else ROOT / "kfaccore" / file
    return path.read_text() if path.exists() else None


def members():
    """{family: names of its methods}."""
    found = {}
    for method in kf.methods.CATALOGUE.values():
        found.setdefault(method.__module__.split(".")[2], []).append(method.__name__)
    return found


def test_every_method_has_a_row():
    missing = rows_missing(kf.methods.CATALOGUE, METHODS)
    assert not missing, "\n".join(missing)


def test_names_of_rows_differ():
    names = [row.name for row in METHODS]
    assert len(names) == len(set(names))


def test_every_method_starts_with_its_formula():
    files = {sys.modules[method.__module__].__file__ for method in kf.methods.CATALOGUE.values()}
    missing = formulas_missing({str(Path(f).relative_to(ROOT)): page(Path(f)) for f in sorted(files)})
    assert not missing, "\n".join(missing)


def test_every_family_has_its_page():
    missing = pages_missing({folder.name: page(folder / "__init__.py") for folder in FAMILIES}, members())
    assert not missing, "\n".join(missing)
    assert members().keys() == {folder.name for folder in FAMILIES}


def test_every_method_is_exported():
    exported = {f"kfaccore.methods.{folder.name}": None for folder in FAMILIES} | {"kfaccore.methods": None}
    missing = exports_missing(kf.methods.CATALOGUE, kf.__all__, {m: sys.modules[m].__all__ for m in exported})
    assert not missing, "\n".join(missing)


def test_every_mutant_has_its_line():
    missing = mutants_missing(MUTANTS, source, {path.name for path in ROOT.glob("tests/test_*.py")})
    assert not missing, "\n".join(missing)


class Eva:
    """A method that nobody wrote."""


Eva.__module__ = "kfaccore.methods.kronecker.eva"
ALONE = {"eva": Eva}
EXPORTED = {"kfaccore.methods": ["Eva"], "kfaccore.methods.kronecker": ["Eva"]}


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (rows_missing(ALONE, METHODS), [r"'eva' .* add Row\('eva', kf.Eva\(\), regime\) to METHODS in tests/rows.py"]),
        (rows_missing(ALONE, [SimpleNamespace(method=Eva())]), []),
        (formulas_missing({"eva.py": "Vectors only."}), [r"eva.py starts 'Vectors only.': .* be `Name: formula`"]),
        (formulas_missing({"eva.py": "Eva: vectors.\n\nx = V"}), ["eva.py starts 'Eva: vectors.'"]),
        (formulas_missing({"eva.py": None}), ["eva.py starts ''"]),
        (formulas_missing({"eva.py": "Eva: F ~ g g^T (x) a a^T."}), []),
        (pages_missing({"rank": None}, {}), ["kfaccore/methods/rank/__init__.py has no page: add a docstring"]),
        (
            pages_missing({"rank": "F ~ 1.\n\n  EvaKFAC  both"}, {"rank": ["Eva", "EvaKFAC"]}),
            ["kfaccore/methods/rank/__init__.py does not name Eva: add a line `Eva"],
        ),
        (
            exports_missing(ALONE, [], {"kfaccore.methods": []}),
            [
                r"import it in kfaccore/methods/kronecker/__init__.py and add 'Eva' to __all__",
                r"import it in kfaccore/methods/__init__.py and add 'Eva' to __all__",
                r"kf.Eva does not exist: import it in kfaccore/__init__.py and add 'Eva' to __all__",
            ],
        ),
        (exports_missing(ALONE, ["Eva"], EXPORTED), []),
        (
            mutants_missing(
                [("gone", "no.py", "x", "y", "test_x.py"), ("twice", "a.py", "x", "y", "test_x.py")],
                {"a.py": "x x"}.get,
                {"test_x.py"},
            ),
            [
                "'gone': kfaccore/no.py does not exist: say in tests/mutants.py",
                "'twice': 'x' is 2 times .* need it once",
            ],
        ),
        (
            mutants_missing([("same", "a.py", "x", "x", "test_y.py")], {"a.py": "x"}.get, set()),
            ["'same' changes nothing", "'same': tests/test_y.py does not exist"],
        ),
    ],
)
def test_faults_are_named_with_what_to_add(found, says):
    assert len(found) == len(says), found
    for sentence, pattern in zip(found, says, strict=True):
        assert re.search(pattern, sentence), sentence
