"""Runs what the pages show, while Sphinx reads them; what fails or prints something else is a warning, so an error.

python          in a process of its own; each `print(...)  # x` must print x
{gpu}           Python that needs a GPU: parsed, never run, and labelled so
{needs} NAME    Python that needs a library the tests do not install: run where it is there, else parsed
{processes} 2   Python started by torchrun in that many gloo processes; its output is shown
{shell}         a command line a line, run one after the other, and what they print; blocks of a page share a folder
"""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive, directives
from sphinx.application import Sphinx
from sphinx.util import logging

from snippets import blocks, missing, printed, promised

log = logging.getLogger(__name__)
_FOLDERS: dict[str, tempfile.TemporaryDirectory] = {}  # by page, for as long as the build lasts


def folder(page: str) -> Path:
    """Where a page's blocks run: an empty folder outside the repository."""
    if page not in _FOLDERS:
        _FOLDERS[page] = tempfile.TemporaryDirectory(prefix="page-")
    return Path(_FOLDERS[page].name)


def read(app: Sphinx, page: str, source: list[str]) -> None:
    """Runs a page's Python; generated pages repeat signatures, which are no programs."""
    for number, code in enumerate(blocks(source[0]) if not page.startswith("generated/") else ()):
        absent = missing(code)
        if absent:
            log.warning("block %d needs %s, which is not installed", number, ", ".join(absent), location=page)
            continue
        done = printed(code, folder(page))
        if done.returncode:
            log.warning("block %d fails:\n%s", number, done.stderr, location=page)
        elif done.stdout.splitlines() != promised(code):
            log.warning("block %d prints\n%s\nand not\n%s", number, done.stdout, promised(code), location=page)


def shown(code: str, label: str = "", language: str = "python") -> list[nodes.Node]:
    """A block of code, under a line that says what it needs."""
    block = nodes.literal_block(code, code, language=language)
    return [nodes.paragraph("", "", nodes.emphasis(label, label)), block] if label else [block]


def output(text: str) -> list[nodes.Node]:
    """What a command printed, as the page shows it."""
    return [nodes.literal_block(text, text, language="none", classes=["output"])] if text.strip() else []


class Block(Directive):
    """What the directives share: code in, the code and what it printed out."""

    has_content = True

    @property
    def code(self) -> str:
        return "\n".join(self.content)

    @property
    def page(self) -> str:
        return self.state.document.settings.env.docname

    def parsed(self) -> None:
        """A block that is not run must at least be Python."""
        try:
            ast.parse(self.code)
        except SyntaxError as error:
            log.warning("a block is not Python: %s", error, location=(self.page, self.lineno))

    def ran(self, command: list[str] | str) -> str:
        """The output of a command that must succeed."""
        done = subprocess.run(
            command,
            shell=isinstance(command, str),
            cwd=folder(self.page),
            env={**os.environ, "TERM": "dumb"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            log.warning("%s fails:\n%s%s", command, done.stdout, done.stderr, location=(self.page, self.lineno))
        return done.stdout


class Gpu(Block):
    def run(self) -> list[nodes.Node]:
        self.parsed()
        return shown(self.code, "Needs a GPU; parsed, not run, when these pages are built.")


class Needs(Block):
    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        if importlib.util.find_spec(name) is None:
            self.parsed()
            return shown(self.code, f"Needs {name}; parsed, not run, when these pages were built.")
        return shown(self.code, f"Needs {name}.") + output(self.ran([sys.executable, "-c", self.code]))


class Processes(Block):
    required_arguments = 1
    option_spec = {"file": directives.unchanged}  # noqa: RUF012 docutils' way

    def run(self) -> list[nodes.Node]:
        count, name = self.arguments[0], self.options.get("file", "train.py")
        (folder(self.page) / name).write_text(self.code)
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count, name]
        label = f"{name}, started by: torchrun --nproc-per-node {count} {name}"
        return shown(self.code, label) + output(self.ran([sys.executable, *start]))


class Shell(Block):
    def run(self) -> list[nodes.Node]:
        return [
            node for line in self.code.splitlines() for node in shown(line, language="shell") + output(self.ran(line))
        ]


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", read)
    for name, directive in {"gpu": Gpu, "needs": Needs, "processes": Processes, "shell": Shell}.items():
        app.add_directive(name, directive)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
