"""The pages that are promised exist, each is in a table of contents, and what is run on them is run somewhere."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PROMISED = {
    "start": "install first_run picture which_road",
    "tutorials": "torch_loop jax_optax keras arrays choosing reading equation laplace add_a_method",
    "howto": (
        "index huggingface lightning accelerate ddp mixed_precision padding accumulation freezing gpu wide_layers "
        "many_layers small_batches"
    ),
    "coming_from": "index kfac_pytorch kfac_jax curvlinops laplace kronfluence soap muon",
    ".": (
        "index pytorch jax tensorflow step analysis posterior equations methods reference versions architecture "
        "identities benchmarks reliability loses contributing changes"
    ),
}
PAGES = sorted(path for folder in PROMISED for path in (DOCS / folder).glob("*.md"))
FENCE = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RUN = {"python", "{code-cell}", "{shell}", "{processes}", "{gpu}", "{needs}"}  # docs/_ext/runs.py; myst-nb the cells
SHOWN = {"", "{toctree}", "{literalinclude}", "{include}"}  # formulas and sketches, and what other files hold

pages = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(DOCS)))


@pytest.mark.parametrize("folder", PROMISED)
def test_promised_pages_are_there_and_no_other(folder):
    assert {path.stem for path in (DOCS / folder).glob("*.md")} == set(PROMISED[folder].split())


@pages
def test_every_block_is_of_a_kind_that_is_run_or_only_shown(page):
    kinds = {kind for kind, _ in FENCE.findall(page.read_text())}
    assert kinds <= RUN | SHOWN, "give it a kind that is run: docs/_ext/runs.py lists them"


@pages
def test_blocks_are_python(page):
    """Also those that only a GPU or another library could run."""
    for kind, code in FENCE.findall(page.read_text()):
        if kind in {"python", "{gpu}", "{needs}", "{processes}"} or (kind == "{code-cell}" and "%%" not in code):
            ast.parse(re.sub(r"^:\w+:.*\n", "", code, flags=re.MULTILINE))


@pages
def test_notebooks_say_so(page):
    text = page.read_text()
    assert ("{code-cell}" in text) == text.startswith("---\nfile_format: mystnb\n")


def test_figures_have_command_machine_and_date():
    """Every section of the benchmarks names the script that prints its figures; the page says where and when."""
    first, *sections = (DOCS / "benchmarks.md").read_text().split("\n## ")
    assert re.search(r"machine: 2 shared CPU cores.*date: \w+ 20\d\d", first)
    assert [part.split("\n")[0] for part in sections if not re.search(r"`python bench/\w+\.py", part)] == []
    loses = (DOCS / "loses.md").read_text().split("\n## ")[0]
    rows = [line for line in loses.splitlines() if line.startswith("| ")][2:]
    assert rows
    assert all("`python bench/" in row for row in rows)


def test_one_version_everywhere():
    version = re.search(r'__version__ = "(.*)"', (ROOT / "kfaccore/__init__.py").read_text())[1]
    cited = (ROOT / "CITATION.cff").read_text()
    newest, date = re.search(r"^## \[(.*?)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE).groups()
    assert newest == version
    assert f"version: {version}\n" in cited
    assert f'date-released: "{date}"' in cited


@pytest.mark.parametrize("name", ["numpy", "scipy", "torch", "jax", "tensorflow-cpu", "keras"])
def test_the_oldest_that_is_allowed_is_the_one_that_is_tested(name):
    """pyproject.toml, the matrix, and the first number of the table's row on the versions page."""
    (bound,) = re.findall(rf'"{name}>=([\d.]+)', (ROOT / "pyproject.toml").read_text())
    assert re.findall(rf"\b{name}==([\d.]+)", (ROOT / "Makefile").read_text()) == [f"{bound}.0"]
    table = (DOCS / "versions.md").read_text().split("## What a version promises")[0]
    oldest = [line.split("|")[2] for line in table.splitlines() if line.endswith("-matrix` |")]
    assert bound in re.findall(r"[\d.]+", " ".join(oldest))
