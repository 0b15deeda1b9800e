"""Writes the method pages and the reference from docstrings, a process a package, before Sphinx looks for pages."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

HERE = Path(__file__).resolve().parent
Described = dict[str, Any]

PACKAGES = {
    "kfaccore": "The core",
    "kfaccore_numpy": "NumPy and CuPy",
    "kfaccore_torch": "PyTorch",
    "kfaccore_jax": "JAX",
    "kfaccore_tensorflow": "TensorFlow and Keras",
}
FAMILIES = {
    "kronecker": "One Kronecker product",
    "terms": "Sums of Kronecker products",
    "lowrank": "Leading modes",
    "rows": "Rows instead of factors",
    "singd": "No inverse",
    "plain": "Without Kronecker factors",
    "network": "All layers at once",
}
GROUPS = {  # where a name of the core is defined, and the heading it stands under
    "kfaccore.record": "Records",
    "kfaccore.convolution": "Records",
    "kfaccore.fisher": "Losses and Fishers",
    "kfaccore.methods": "Options of methods",
    "kfaccore.damping": "Damping",
    "kfaccore.linalg.inverse": "Options of methods",
    "kfaccore.linalg.shares": "The step",
    "kfaccore.linalg.basis": "One Gaussian, six uses",
    "kfaccore.posterior": "One Gaussian, six uses",
    "kfaccore.step": "The step",
    "kfaccore.io": "Files",
    "kfaccore.saved": "Files",
    "kfaccore.precondition.described": "Files",
    "kfaccore.precondition": "The preconditioner",
    "kfaccore": "The contract",
}
ORDER = list(dict.fromkeys(["Records", "Losses and Fishers", "The preconditioner", "The step", *GROUPS.values()]))


def described(package: str) -> Described:
    """What `describe.py` finds in a package."""
    done = subprocess.run([sys.executable, HERE / "describe.py", package], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{package} cannot be described: install it, then build again\n{done.stderr}")
    return json.loads(done.stdout)


def prose(text: str) -> str:
    """A docstring as Markdown: what is indented is code, and what Markdown would take for its own is not."""
    lines: list[str] = []
    code = False
    for line in re.sub(r"^(\S(?:\S| (?! ))*   +\S.*)((?:\n {6,}\S.*)+)", joined, text, flags=re.MULTILINE).splitlines():
        indented = line.startswith(("    ", ">>> "))
        if indented and not code:
            lines += ["", "```none"]
        elif code and line.strip() and not indented:
            lines += ["```", ""]
        if line.startswith(("Exact when", "Source:", "Cost:")):
            lines.append("")
        code = indented or (code and not line.strip())
        lines.append(line.removeprefix("    ") if code else plain(line))
    return "\n".join([*lines, "```"] if code else lines)


def joined(option: re.Match[str]) -> str:
    """An option and the lines that continue it, as one."""
    return " ".join([option[1], *(line.strip() for line in option[2].splitlines())])


def plain(line: str) -> str:
    """Signs of formulas kept from Markdown, outside backquotes; `name   what it is` becomes an item of a list."""
    if re.match(r"\S(\S| (?! ))*   +\S", line):
        name, rest = re.split(r"   +", line, maxsplit=1)
        return f"- `{name}`: {plain(rest)}"
    parts = re.split(r"(`[^`]*`)", line)
    return "".join(part if part.startswith("`") else re.sub(r"([*_<>|\[\]~^])", r"\\\1", part) for part in parts)


def entry(thing: Described, room: str, depth: int = 3) -> str:
    """One name: signature, text, and what a class has."""
    name = f"{room}.{thing['name']}"
    lines = [f"{'#' * depth} `{thing['name']}`", "", f"```none\n{name}{thing['signature']}\n```", ""]
    lines += [prose(thing["text"]), ""]
    for member in thing["members"]:
        if member["text"]:
            lines += [f"`.{member['name']}{' '.join(member['signature'].split())}`", "", prose(member["text"]), ""]
    return "\n".join(lines)


def group(module: str) -> str:
    """The heading for a name of the core, by the longest prefix of where it is defined."""
    return GROUPS[max((key for key in GROUPS if module.startswith(key)), key=len)]


def core(rooms: list[Described], methods: set[str]) -> dict[str, str]:
    """The core's reference: its own names under headings, then its public rooms."""
    first, *others = rooms
    found: dict[str, list[Described]] = {}
    for thing in first["names"]:
        if thing["name"] not in methods:
            found.setdefault(group(thing["module"]), []).append(thing)
    pages = {}
    for heading in ORDER:
        entries = "\n".join(entry(thing, "kfaccore", 2) for thing in found[heading])
        pages[slug(heading)] = f"# {heading}\n\n{entries}"
    for room in others:
        entries = "\n".join(entry(thing, room["room"], 2) for thing in room["names"])
        pages[room["room"]] = f"# `{room['room']}`\n\n{prose(room['page'])}\n\n{entries}"
    return pages


def slug(heading: str) -> str:
    """A file's name of a heading."""
    return re.sub(r"\W+", "_", heading.lower()).strip("_")


def family(name: str, things: list[Described], page: str) -> str:
    """A family of methods: its page, then each method's page and options."""
    lines = [f"# {FAMILIES[name]}", "", prose(page), ""]
    for thing in things:
        lines += [f"## {thing['name']}", "", prose(thing["page"]), ""]
        lines += [entry(thing, "kfaccore", 3).replace(f"### `{thing['name']}`", "### Options", 1), ""]
    return "\n".join(lines)


def families(found: Described) -> dict[str, str]:
    """The method pages, by family, those of a network last."""
    names = {thing["name"]: thing for thing in found["rooms"][0]["names"]}
    members = {key: [each.split(" ")[0] for each in value] for key, value in found["families"].items()}
    members["network"] = [key for key, thing in names.items() if thing["module"].startswith("kfaccore.network")]
    return {
        key: family(key, [names[each] for each in members[key]], found["pages"][key])
        for key in FAMILIES
        if key in members
    }


def write(folder: Path, pages: dict[str, str]) -> None:
    """Pages that changed, so that Sphinx reads only those again; others of the folder go."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.md"):
        if old.stem not in pages:
            old.unlink()
    for name, text in pages.items():
        path = folder / f"{name}.md"
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def generate(app: Sphinx) -> None:
    """docs/generated: methods a family, the core a topic, the adapters a package."""
    target = Path(app.srcdir) / "generated"
    found = described("kfaccore")
    methods = families(found)
    write(target / "methods", methods)
    shown = {name for page in methods.values() for name in re.findall(r"^## (\w+)$", page, re.MULTILINE)}
    pages = core(found["rooms"], shown)
    for package, title in list(PACKAGES.items())[1:]:
        room = described(package)["rooms"][0]
        entries = "\n".join(entry(thing, package, 2) for thing in room["names"])
        pages[package] = f"# {title}: `{package}`\n\n{prose(room['page'])}\n\n{entries}"
    write(target / "reference", pages)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("builder-inited", generate)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
