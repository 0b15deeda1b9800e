"""Trees: dataclasses, dicts, tuples and lists whose leaves are arrays or numbers.

A Mapping that is no dict rebuilds itself (`rebuilt`). A dataclass field made with `static()` is structure, not a leaf.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import field, fields, is_dataclass, replace
from functools import cache
from typing import Any, TypeVar, cast

Tree = TypeVar("Tree")  # a tree, and what has its structure
Kind = TypeVar("Kind", bound=type)

KEPT: dict[str, type] = {}  # dataclasses that a file can name, so that it is read back as what it was


def static(**kwargs: Any) -> Any:
    """A dataclass field that belongs to the tree's structure."""
    return field(metadata={"static": True}, **kwargs)


def added(era: int = 1, **kwargs: Any) -> Any:
    """A dataclass field that files of before do not have: its leaves are then zero. Fields that came at the same time
    have one era, later ones a higher one."""
    return field(metadata={"era": era}, **kwargs)


def later(tree: object, path: str = "", era: int = 0) -> dict[int, set[str]]:
    """The paths of leaves under fields made with `added()`, by era."""
    inner = children(tree)
    if inner is None:
        return {era: {path}} if era else {}
    of = {f.name: f.metadata.get("era", 0) for f in fields(tree)} if is_dataclass(tree) else {}
    found: dict[int, set[str]] = {}
    for name, child in inner:
        below = later(child, f"{path}/{name}" if path else name, max(era, of.get(name, 0)))
        for when, paths in below.items():
            found.setdefault(when, set()).update(paths)
    return found


def kept(kind: Kind) -> Kind:
    """Class decorator: files name this dataclass, and `io.load` without `like` gives it back."""
    KEPT[kind.__name__] = kind
    return kind


def marks(tree: object, variable: str, marked: bool = False) -> list[bool]:
    """Whether each leaf, in the order of `leaves`, is of a field that its dataclass lists in a class variable:
    `SYMMETRIC` in its last two axes, `DRAWS_FIRST` before the blocks."""
    inner = children(tree)
    if inner is None:
        return [marked]
    names = getattr(type(tree), variable, ())
    return [mark for name, child in inner for mark in marks(child, variable, name in names)]


def children(tree: object) -> list[tuple[str, object]] | None:
    """(name, child) of each child in a fixed order, or None for a leaf."""
    if isinstance(tree, Mapping):
        return [(str(key), tree[key]) for key in tree]
    names = varying(type(tree))
    if names is not None:
        return [(name, getattr(tree, name)) for name in names]
    if isinstance(tree, tuple | list):
        return [(str(i), child) for i, child in enumerate(tree)]
    return None


@cache
def varying(kind: type) -> tuple[str, ...] | None:
    """The fields of a dataclass that are no structure; None for other types. Asked at every leaf of every step."""
    return tuple(f.name for f in fields(kind) if not f.metadata.get("static")) if is_dataclass(kind) else None


def rebuild(tree: Tree, new: Sequence[object]) -> Tree:
    """`tree` with its children replaced by `new`, in the order of `children`."""
    return cast("Tree", _rebuilt(tree, new))


def _rebuilt(tree: Any, new: Sequence[object]) -> object:
    if isinstance(tree, Mapping):
        named = dict(zip(tree, new, strict=True))
        other: Any = tree
        return named if isinstance(tree, dict) else other.rebuilt(named)
    names = varying(type(tree))
    if names is not None:
        return replace(tree, **dict(zip(names, new, strict=True)))
    if hasattr(tree, "_fields"):
        return type(tree)(*new)
    return list(new) if isinstance(tree, list) else tuple(new)


def items(tree: object, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, leaf) of every leaf, depth first; path components are joined by '/'."""
    inner = children(tree)
    if inner is None:
        yield path, tree
        return
    for name, child in inner:
        yield from items(child, f"{path}/{name}" if path else name)


def leaves(tree: object) -> list[Any]:
    """All leaves, depth first."""
    return [leaf for _, leaf in items(tree)]


def map(function: Callable[..., object], tree: Tree, *others: object) -> Tree:
    """`function` applied to corresponding leaves of trees of one structure."""
    inner = children(tree)
    if inner is None:
        return cast("Tree", function(tree, *others))
    rows = [[child for _, child in children(other) or []] for other in others]
    if any(len(row) != len(inner) for row in rows):
        raise ValueError(f"trees differ: {[n for n, _ in inner]} against {[len(r) for r in rows]} children")
    columns = zip(*rows, strict=True) if rows else ((),) * len(inner)
    new = [map(function, child, *rest) for (_, child), rest in zip(inner, columns, strict=True)]
    return rebuild(tree, new)


def add(a: Tree, b: Tree) -> Tree:
    """Leafwise sum: how Stats of two micro-batches or ranks combine."""
    return map(lambda x, y: x + y, a, b)
