"""The house: arrows, sizes, the contract, counts, the public surface, the installed package, the README's code."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import kfaccore as kf
from house_code import *  # noqa: F403 what is counted of the code
from house_contract import *  # noqa: F403 the declared contract
from kfaccore import layers, posterior
from rows import FRAMEWORKS
from snippets import runs_as_printed, snippets

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*ROOT.glob("kfaccore/**/*.py"), *ROOT.glob("adapters/**/*.py")])
FOREIGN = {"torch", "jax", "tensorflow", "cupy", "cupyx"}

FLOOR = {"xp", "tree", "convolution", "record"}
FAMILY = FLOOR | {"fisher", "method", "refreshing", "options", "solution", "factors", "damping", "linalg"}
ALLOWED = {  # room: rooms it may import; a name with a dot is a single file
    "xp": set(),
    "tree": set(),
    "convolution": {"xp"},
    "outline": {"xp", "tree"},
    "written": set(),
    "io": {"xp", "tree", "outline", "written"},
    "record": {"tree", "xp", "convolution", "io"},
    "fisher": {"xp", "record"},
    "linalg": FLOOR | {"damping"},
    "damping": FLOOR | {"linalg", "options"},
    "solution": FLOOR,
    "declared": set(),
    "block": FLOOR,
    "method": FLOOR | {"block", "solution", "declared"},
    "refreshing": FLOOR | {"method"},
    "settle": FLOOR | {"method", "options"},
    "options": {"method"},
    "layers": FLOOR | {"method"},
    "factors": FLOOR | {"method", "linalg"},
    "methods": FAMILY,
    "network": FAMILY | {"methods"},
    "precondition": FLOOR | {"fisher", "method", "refreshing", "options", "solution", "step"},
    "step": FLOOR | {"linalg", "method", "precondition.comm"},
    "oneshot": FLOOR | {"method", "methods", "settle"},
    "posterior": FLOOR | {"method", "options", "factors", "linalg", "written"},
    "analysis": FLOOR | {"method", "options", "settle", "factors", "linalg", "posterior", "written"},
    "saved": FLOOR | {"io", "method", "methods", "posterior", "precondition"},
}


def imports(path: Path, everywhere: bool = True) -> list[str]:
    """Dotted names imported by a file, TYPE_CHECKING blocks left out."""
    module = ast.parse(path.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(module)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(module) if everywhere else module.body:
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def module(name: str) -> str:
    """The file or folder that a dotted name of ours comes from."""
    parts = name.split(".")
    while not ROOT.joinpath(*parts).with_suffix(".py").exists() and not ROOT.joinpath(*parts, "__init__.py").exists():
        parts = parts[:-1]
    return ".".join(parts)


def family(name: str) -> str:
    """lowrank of kfaccore.methods.lowrank.brand."""
    return name.split(".")[2]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    ours = {name for name in imports(path) if name.split(".")[0] == "kfaccore" and name != "kfaccore"}
    if parts[0] == "adapters":
        public = {f"kfaccore.{name}" for name in kf.__all__} | {f"kfaccore.layers.{name}" for name in layers.__all__}
        public |= {f"kfaccore.posterior.{name}" for name in posterior.__all__}
        assert ours <= public
        others = {name.split(".")[0] for name in imports(path) if name.startswith("kfaccore_")}
        assert others <= {parts[1]}
    elif parts[1] in ALLOWED:
        modules = {module(name) for name in ours}
        inner = {name.removeprefix("kfaccore.") for name in modules} - ALLOWED[parts[1]]
        assert {name.split(".")[0] for name in inner} <= ALLOWED[parts[1]] | {parts[1]}
    foreign = FOREIGN - {parts[1].removeprefix("kfaccore_")}
    used = {name.split(".")[0] for name in imports(path)} & foreign
    assert not used or parts[1] in ("xp", "cli")
    assert not {name.split(".")[0] for name in imports(path, everywhere=False)} & foreign


@pytest.mark.parametrize("path", sorted(ROOT.glob("kfaccore/**/*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_one_place_asks_for_devices(path):
    """`device_of` alone: what jax answers for a tracer costs as much as all that was traced before it."""
    asked = {"device", "to_device"}
    if path != ROOT / "kfaccore/xp/arrays.py":
        names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        assert not names & asked
        assert not {f"array_api_compat.{name}" for name in asked} & set(imports(path))


METHOD_FILES = {method.__module__ for method in kf.methods.CATALOGUE.values()}


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("kfaccore/methods/*/*.py")), ids=lambda p: f"{p.parent.name}/{p.stem}"
)
def test_families(path):
    """No family knows another, no method its siblings, and what they share knows no method."""
    me = f"kfaccore.methods.{path.parent.name}.{path.stem}"
    others = {module(name) for name in imports(path) if name.startswith("kfaccore.methods")}
    assert all(family(other) == family(me) for other in others)
    assert path.stem == "__init__" or not others & METHOD_FILES
    assert path.stem != "__init__" or others <= METHOD_FILES


def test_no_circles():
    """Files import each other in one direction, also inside a room; a package's page counts as what it imports."""
    graph = {}
    for path in ROOT.glob("kfaccore/**/*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        graph[name] = {module(found) for found in imports(path) if found.startswith("kfaccore.")} - {name}
    done: set[str] = set()
    while True:
        free = {name for name in graph.keys() - done if graph[name] <= done}
        if not free:
            break
        done |= free
    assert not graph.keys() - done


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_small_files_and_functions(path):
    text = path.read_text()
    assert text.count("\n") <= 250
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno <= 50, node.name


def test_public_surface():
    promised = (
        "Record Ids Patches Window Factored dense concat expand reduce Block Hyper Code Solution settle KFAC EKFAC "
        "Diagonal Identity Exact direction SoftmaxCrossEntropy Bernoulli Gaussian type2 monte_carlo empirical "
        "Preconditioner Clocks Schedules Fixed Serial save load SelfTuning LineSearch CGFAC SKFAC FNGD SINGD "
        "RandomizedKFAC BrandKFAC KPSVD Deflation Lanczos KFACCorrected TKFAC TEKFAC TwoLevel Tridiagonal PINNKFAC "
        "fit Basis Curvature Posterior evidence tuned scores merge"
    )
    assert set(promised.split(" ")) <= set(kf.__all__)
    for name in kf.__all__:
        assert getattr(kf, name) is not None
        if callable(getattr(kf, name)):
            assert getattr(kf, name).__doc__, name
    public = {n for n in vars(kf) if not n.startswith("_") and not isinstance(getattr(kf, n), type(sys))}
    assert public == set(kf.__all__)


@pytest.mark.parametrize("name", list(kf.methods.CATALOGUE))
def test_methods_are_constructible_hashable_and_documented(name):
    method = kf.methods.CATALOGUE[name]
    assert method() == method()
    assert hash(method()) == hash(method())
    text = sys.modules[method.__module__].__doc__
    assert all(word in text for word in ("Source:", "Cost:", "Exact"))


def python(code: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)


def test_import_stays_light(tmp_path):
    heavy = ("torch", "jax", "cupy", "tensorflow", "rich", "typer", "safetensors", "matplotlib", "sklearn")
    done = python(f"import sys, kfaccore; print([m for m in {heavy} if m in sys.modules])", tmp_path)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_installed_names(name, tmp_path):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    assert python(f"import kfaccore, kfaccore_{name}", tmp_path).returncode == 0
    assert (ROOT / "adapters" / f"kfaccore_{name}").is_dir()
    assert "No module named 'adapters'" in python("import adapters", tmp_path).stderr
    assert "No module named 'bench'" in python("import bench", tmp_path).stderr


@pytest.mark.parametrize("code", snippets("README.md"))
def test_the_readme_runs_as_printed(code, tmp_path):
    runs_as_printed(code, tmp_path)
