"""Which leaves of a state each clock replaces, found on a layer of two by two."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kfaccore import tree
from kfaccore.method import Block, Hyper, Method, Terms, declares
from kfaccore.record import Record
from kfaccore.xp.arrays import Array, device_of, namespace, to_host

_HYPER = Hyper(0, 0.9, 0.1)
_SMALL = Block(2, 2)


@dataclass(frozen=True)
class Trial:
    """Leaves by path: of a state after `init`, `update` and `refresh`, and of Stats before and after the refresh."""

    started: dict[str, Any]
    updated: dict[str, Any]
    refreshed: dict[str, Any]
    measured: dict[str, Any]
    again: dict[str, Any]

    @classmethod
    def of(cls, method: Method, like: Array, block: Block) -> Trial:
        """One cycle; sides are diagonal where those of `block` are."""
        xp = namespace(like)
        where = {"dtype": like.dtype, "device": device_of(like)}
        a = xp.asarray([[1.0, 2.0], [3.0, 5.0]], **where)
        g = xp.asarray([[1.0, -1.0], [2.0, 1.0]], **where)
        record = Record(a, g, 2)
        given = (record,) * method.terms if declares(method, Terms) else record
        known: Any = method
        start = known.init(replace(block, d_out=2, d_in=2, blocks=1, rows=2, samples=2), like)
        stats = known.measure(start, given, _HYPER)
        updated = known.update(start, stats, _HYPER)
        refreshed = known.refresh(updated, _HYPER)
        again = known.measure(refreshed, given, _HYPER)
        return cls(*(dict(tree.items(x)) for x in (start, updated, refreshed, stats, again)))

    @property
    def moved(self) -> dict[str, bool]:
        """Which leaves of the state `update` replaces."""
        return {path: x is not self.started[path] for path, x in self.updated.items()}

    @property
    def made(self) -> dict[str, bool]:
        """Which leaves of the state `refresh` replaces."""
        return {path: x is not self.updated[path] for path, x in self.refreshed.items()}


def floating(state: object) -> Array:
    """An array (1,) that tells where and in what a state computes: float32 where it holds nothing but integers."""
    leaves = tree.leaves(state)
    like = next((x for x in leaves if "float" in str(x.dtype)), leaves[0])
    xp = namespace(like)
    return xp.zeros((1,), dtype=like.dtype if "float" in str(like.dtype) else xp.float32, device=device_of(like))


def refreshed_leaves(method: Method, like: Array, block: Block = _SMALL) -> tuple[tuple[bool, ...], bool]:
    """Which leaves of a method's state `refresh` replaces, and whether `measure` looks at them."""
    found = Trial.of(method, like, block)
    pairs = zip(found.measured.values(), found.again.values(), strict=True)
    return tuple(found.made.values()), any(bool(np.any(to_host(x) != to_host(y))) for x, y in pairs)
