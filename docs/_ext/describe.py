"""The public names of one package as JSON: `python describe.py kfaccore_torch`. Alone, for a process a framework."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

INNER = {"kfaccore": ("kfaccore.analysis", "kfaccore.layers", "kfaccore.posterior")}  # public rooms of their own


def default(value: Any) -> str:
    """A default as one would write it."""
    if inspect.isclass(value) or inspect.isroutine(value):
        return value.__name__
    text = repr(value)
    return "..." if text.startswith("<") else re.sub(r"<function (?:\w+\.)*(\w+) at 0x\w+>", r"\1", text)


def signature(thing: Callable[..., Any]) -> str:
    """(a, b=1): names and defaults; the types are in the source."""
    try:
        parameters = inspect.signature(thing).parameters.values()
    except (TypeError, ValueError):
        return "(...)"
    parts: list[str] = []
    starred = False
    for p in parameters:
        if p.name == "self" or p.name.startswith("_"):
            continue
        if p.kind is p.KEYWORD_ONLY and not starred:
            parts.append("*")
            starred = True
        starred = starred or p.kind is p.VAR_POSITIONAL
        mark = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        parts.append(f"{mark}{p.name}" + ("" if p.default is p.empty else f"={default(p.default)}"))
    line = f"({', '.join(parts)})"
    return line if len(line) < 90 else "(\n" + "".join(f"    {part},\n" for part in parts) + ")"


def text(thing: Any) -> str:
    """The docstring, that of the class above where a method has none; "" for what dataclasses write themselves."""
    found = inspect.getdoc(thing) or ""
    name = getattr(thing, "__name__", "")
    return "" if found.startswith(f"{name}(") and inspect.isclass(thing) else found


def members(thing: type) -> list[dict[str, str]]:
    """The public methods and properties of a class, those it inherits from ours too."""
    found = []
    for name, member in inspect.getmembers(thing):
        owner = next((c for c in thing.__mro__ if name in vars(c)), thing)
        ours = owner.__module__.startswith("kfaccore") and name not in vars(thing).get("__dataclass_fields__", {})
        if name.startswith("_") or not ours or not (inspect.isroutine(member) or isinstance(member, property)):
            continue
        found.append({"name": name, "signature": "" if isinstance(member, property) else signature(member)})
        found[-1]["text"] = inspect.getdoc(member) or ""
    return found


def described(name: str, thing: Any) -> dict[str, Any]:
    """One public name."""
    kind = "class" if inspect.isclass(thing) else "function" if callable(thing) else "data"
    found = {"name": name, "kind": kind, "module": getattr(thing, "__module__", ""), "text": text(thing)}
    found["signature"] = "" if kind == "data" else signature(thing)
    found["members"] = members(thing) if kind == "class" else []
    found["page"] = inspect.getdoc(sys.modules.get(found["module"])) or ""
    return found


def package(name: str) -> list[dict[str, Any]]:
    """The public rooms of a package, each with its page and its names."""
    rooms = []
    for room in (name, *INNER.get(name, ())):
        module = importlib.import_module(room)
        public = {key: getattr(module, key) for key in sorted(module.__all__, key=str.lower)}
        things = [described(key, value) for key, value in public.items() if not isinstance(value, ModuleType)]
        rooms.append({"room": room, "page": inspect.getdoc(module) or "", "names": things})
    return rooms


def family_pages() -> dict[str, str]:
    """What a family's page says of it."""
    names = [*catalogue(), "network"]
    rooms = {name: "kfaccore.network" if name == "network" else f"kfaccore.methods.{name}" for name in names}
    return {name: inspect.getdoc(importlib.import_module(room)) or "" for name, room in rooms.items()}


def catalogue() -> dict[str, list[str]]:
    """The families of methods: the classes of each."""
    methods = importlib.import_module("kfaccore.methods")
    found: dict[str, list[str]] = {}
    for name, method in methods.CATALOGUE.items():
        found.setdefault(method.__module__.split(".")[2], []).append(f"{method.__name__} {name}")
    return found


if __name__ == "__main__":
    found: dict[str, Any] = {"rooms": package(sys.argv[1])}
    if sys.argv[1] == "kfaccore":
        found |= {"families": catalogue(), "pages": family_pages()}
    json.dump(found, sys.stdout)
