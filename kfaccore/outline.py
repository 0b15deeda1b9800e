"""The structure of a tree as JSON text, for files that name their classes: kind, and children by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any

import numpy as np

from kfaccore import tree

_NUMBERS = {"int": int, "float": float}


def outline(x: object) -> str | None:
    """The structure of `x`; None for a tree without a class of `tree.kept`, which is read as nested dicts."""
    return json.dumps(_structure(x)) if _named(x) else None


def filled(structure: str, arrays: Mapping[str, np.ndarray], source: str) -> object:
    """The tree of a structure with its leaves from `arrays`. ValueError, naming `source`, for leaves or classes that
    are not there."""
    return _filled(json.loads(structure), arrays, source, "")


def _named(x: object) -> bool:
    inner = tree.children(x) or []
    return tree.KEPT.get(type(x).__name__) is type(x) or any(_named(child) for _, child in inner)


def _structure(x: object) -> dict[str, Any]:
    inner = tree.children(x)
    if inner is None:
        return {"kind": type(x).__name__ if type(x).__name__ in _NUMBERS else "array"}
    children = {name: _structure(child) for name, child in inner}
    if is_dataclass(x):
        known = tree.KEPT.get(type(x).__name__) is type(x)
        return {"kind": "class" if known else "dict", "name": type(x).__name__, "children": children}
    return {"kind": "dict" if isinstance(x, dict) else "list" if isinstance(x, list) else "tuple", "children": children}


def _filled(structure: Mapping[str, Any], arrays: Mapping[str, np.ndarray], source: str, path: str) -> Any:
    kind = structure["kind"]
    if "children" not in structure:
        if path not in arrays:
            raise ValueError(f"{source} lacks the leaf {path!r}")
        return _NUMBERS[kind](arrays[path].item()) if kind in _NUMBERS else arrays[path]
    children = {
        name: _filled(child, arrays, source, f"{path}/{name}" if path else name)
        for name, child in structure["children"].items()
    }
    if kind == "class":
        name = structure["name"]
        if name not in tree.KEPT:
            raise ValueError(f"{source} holds a {name}, which this version does not know; it knows {sorted(tree.KEPT)}")
        return tree.KEPT[name](**children)
    if kind == "dict":
        return children
    return list(children.values()) if kind == "list" else tuple(children.values())
