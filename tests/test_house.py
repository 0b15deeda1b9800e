"""The house: arrows between modules, sizes, the public surface, the installed package, the README's code."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import kfaccore as kf
from kfaccore import layers
from rows import FRAMEWORKS

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*ROOT.glob("kfaccore/**/*.py"), *ROOT.glob("adapters/**/*.py")])
FOREIGN = {"torch", "jax", "tensorflow", "cupy", "cupyx"}

BELOW = {"xp", "tree", "linalg", "record"}
ALLOWED = {  # room: rooms it may import
    "xp": set(),
    "tree": set(),
    "linalg": {"xp", "tree"},
    "record": BELOW - {"record"},
    "sharing": BELOW,
    "damping": BELOW,
    "factors": BELOW,
    "rearranged": BELOW | {"factors"},
    "stacked": BELOW | {"factors", "damping", "sharing"},
    "fisher": BELOW,
    "method": {"xp", "tree", "record"},
    "modes": BELOW | {"method", "damping", "factors"},
    "moments": BELOW | {"method", "factors"},
    "methods": BELOW | {"method", "damping", "factors", "modes", "moments", "rearranged", "sharing", "stacked"},
    "jacobian": {"xp", "record"},
    "network": BELOW | {"method", "methods", "damping", "factors", "sharing", "stacked", "jacobian"},
    "rescale": {"xp", "tree", "record"},
    "schedule": {"method"},
    "step": {"xp", "tree", "record", "method", "rescale", "jacobian", "comm"},
    "comm": set(),
    "placement": {"xp", "tree", "comm", "record", "method"},
    "given": {"xp", "tree", "record"},
    "layerwise": {"xp", "method", "comm", "given", "placement", "sharing"},
    "info": {"xp"},
    "weighting": {"xp"},
    "preconditioner": {"xp", "tree", "record", "method", "schedule", "sharing", "step", "comm"}
    | {"given", "info", "layerwise", "placement", "weighting"},
    "oneshot": {"xp", "record", "method", "methods"},
    "io": {"xp", "tree"},
    "records": {"linalg", "record", "sharing", "io"},
    "layers": BELOW | {"method"},
    "analysis": BELOW | {"method", "factors", "jacobian"},
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


def room(name: str) -> str:
    return name.split(".")[1]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    ours = [name for name in imports(path) if name.split(".")[0] == "kfaccore" and name != "kfaccore"]
    if parts[0] == "adapters":
        public = {f"kfaccore.{name}" for name in kf.__all__} | {f"kfaccore.layers.{name}" for name in layers.__all__}
        assert set(ours) <= public
        others = {name.split(".")[0] for name in imports(path) if name.startswith("kfaccore_")}
        assert others <= {parts[1]}
    elif parts[1] in ALLOWED:
        assert {room(name) for name in ours} <= ALLOWED[parts[1]] | {parts[1]}
    if parts[:2] == ("kfaccore", "methods") and parts[2] != "__init__":
        assert not [name for name in ours if room(name) == "methods"]
    foreign = FOREIGN - {parts[1].removeprefix("kfaccore_")}
    used = {name.split(".")[0] for name in imports(path)} & foreign
    assert not used or parts[1] in ("xp", "comm", "cli")
    assert not {name.split(".")[0] for name in imports(path, everywhere=False)} & foreign


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
        "RandomizedKFAC BrandKFAC KPSVD Deflation Lanczos KFACCorrected TKFAC TEKFAC TwoLevel Tridiagonal PINNKFAC"
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


def test_readme_runs_as_printed(tmp_path):
    text = (ROOT / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "{<Code.OK: 0>: 1}"
