"""The pages: links lead somewhere, names and files exist. `make docs` runs their code, test_house.py README's."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import kfaccore
from snippets import ADAPTERS, blocks, promised

ROOT = Path(__file__).resolve().parents[1]
WRITTEN = [path for path in sorted(ROOT.glob("docs/**/*.md")) if not {"_build", "generated"} & set(path.parts)]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *WRITTEN]
INCLUDED = {"docs/contributing.md": "CONTRIBUTING.md", "docs/changes.md": "CHANGELOG.md"}
pages = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def test_readme_is_short_and_shows_torch_and_numpy():
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 135
    torch, numpy = blocks(text)
    assert "import torch" in torch
    assert "import torch" not in numpy
    assert promised(torch)
    assert promised(numpy)


def anchors(page: Path) -> set[str]:
    """Headings as links name them."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pages
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if "generated" in target.parts:
            continue  # there once `make docs` has written it, and then checked
        target = ROOT / INCLUDED.get(str(target.relative_to(ROOT)), target)
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target), link


@pages
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = re.findall(r"(?:`|^ +|\$ )make ([\w-]+)", page.read_text(), re.MULTILINE)
    assert set(named) <= targets


def exists(dotted: str) -> bool:
    """Whether `kfaccore.x.Y` is a module of ours, or a name in one."""
    first, *rest = dotted.split(".")
    here: Any = importlib.import_module(first)
    for name in rest:
        inner = f"{here.__name__}.{name}" if isinstance(here, ModuleType) else ""
        if not hasattr(here, name) and not (inner and importlib.util.find_spec(inner)):
            return False
        here = getattr(here, name) if hasattr(here, name) else importlib.import_module(inner)
    return True


@pages
def test_public_names_exist(page):
    """kfaccore_tensorflow's are left to its page's code: TensorFlow beside other frameworks can abort the process."""
    text = re.sub(r"\bkf\.", "kfaccore.", page.read_text())
    for dotted in sorted(set(re.findall(r"(?<![/\w.-])(kfaccore(?:_[a-z]+)?(?:\.[A-Za-z]\w*)+)", text))):
        package = dotted.split(".")[0]
        if package != "kfaccore_tensorflow" and importlib.util.find_spec(ADAPTERS.get(package, package)):
            assert exists(dotted), f"{page.name} names {dotted}, which does not exist"


def test_the_method_table_is_complete():
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| `")]
    named = set(re.findall(r"\b([A-Za-z]+)\(", " ".join(row.split(" | ")[0] for row in rows)))
    methods = {method.__name__ for method in kfaccore.methods.CATALOGUE.values()}
    network = {"TwoLevel", "Tridiagonal", "SharedDamping", "GlobalFNGD", "GaussNewton"}
    assert named == methods | network


@pages
def test_named_files_and_rooms_exist(page):
    """Paths in backquotes; placeholders (FAMILY, kfaccore_X, docs/X.md) left out."""
    text = page.read_text()
    for path in re.findall(r"`((?:kfaccore|tests|bench|adapters|docs)/[\w./]*)`", text):
        if not re.search(r"[A-Z]{2}|_X|/X", path):
            assert (ROOT / path).exists(), path
    for script in re.findall(r"python (bench/\w+\.py)", text):
        assert (ROOT / script).exists(), script


def test_recipes_name_what_is_there():
    """CONTRIBUTING.md: constants and private names stand in the file in bold before them, members in its folder."""
    behind = re.findall(r"\*\*`([\w./]+)`\*\*(.*?)(?=\*\*`|\n\d\. |\n#)", PAGES[1].read_text(), re.DOTALL)
    real = [(ROOT / path, rest) for path, rest in behind if not re.search(r"[A-Z]{4}|_X|/X", path)]
    assert len(real) > 30
    for path, rest in real:
        text = path.read_text() if path.is_file() else ""
        for name in re.findall(r"`(_[a-z]\w*|[A-Z]{3}[A-Z_]*)`", rest):
            assert re.search(rf"\b{name}\b", text), f"{path} has no {name}"
        beside = "".join(file.read_text() for file in path.parent.glob("*.py"))
        for name in re.findall(r"`([A-Z]\w+\.[a-z]\w+)`", rest):
            assert set(name.split(".")) <= set(re.findall(r"\w+", beside)), f"{path.parent} has no {name}"
