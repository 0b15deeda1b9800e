"""Bytes of a state and of what an update needs beside it, before anything of that size exists.

Methods' own `init` runs on shapes. What a `refresh` replaces in a state, found on a layer of two by two, are inverses,
everything else averages; an update needs as much again as it replaces for the record's sums, and for the new arrays.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kfaccore import tree
from kfaccore.method import Block, Method
from kfaccore.precondition.assigned import Assigned
from kfaccore.precondition.given import named
from kfaccore.precondition.trial import Trial
from kfaccore.xp.arrays import Array, is_half
from kfaccore.xp.shapes import Shape

_WORK = 6  # matrices beside the result while a side is decomposed, with its shifted copy


@dataclass(frozen=True)
class Footprint:
    """Bytes of one layer.

    averages   what updates move: sums, rows, momenta, codes
    inverses   what a refresh makes
    peak       held at once at the worst moment of an update with one record and a refresh, the state included: the
               record's sums and the new averages beside the old ones, or means and the new inverses beside the old.
               A refresh also has six matrices of its largest dense side, what a decomposition takes on NumPy; rows of
               the record come on top
    """

    averages: int
    inverses: int
    peak: int

    @property
    def state(self) -> int:
        """Between steps."""
        return self.averages + self.inverses


def footprints(
    assigned: Assigned, blocks: Mapping[str, Block], like: Array | None, donate: bool
) -> dict[str, Footprint]:
    """{layer: Footprint}, and "network" for the layers of a network-level method, all of whose state counts as
    averages."""
    dtype = "float32" if like is None or is_half(like, "like") else str(like.dtype).rpartition(".")[2]
    shape: Any = Shape((1,), np.dtype(dtype))
    together = assigned.together(blocks)
    given = assigned.narrowed(blocks)
    found = {}
    for name, block in given.items():
        if name not in together:
            with named(name):
                found[name] = _of_layer(assigned.of(name), block, shape, donate)
    if assigned.network is not None and together:
        size = sum(_bytes(leaf) for leaf in tree.leaves(assigned.network.init(together, shape)))
        found["network"] = _at_worst(size, 0, size, donate)
    return found


def _of_layer(method: Method, block: Block, like: Array, donate: bool) -> Footprint:
    leaves = dict(tree.items(method.init(block, like)))
    sizes = {path: _bytes(leaf) for path, leaf in leaves.items()}
    small: Any = np.zeros(1, like.dtype)
    trial = Trial.of(method, small, block)
    made = _chosen(sizes, trial.made)
    inverses = sum(sizes[path] for path in made)
    moved = sum(sizes[path] for path in _chosen(sizes, trial.moved))
    work = _WORK * max((sizes[path] for path in made if _square(leaves[path])), default=0)
    return _at_worst(sum(sizes.values()) - inverses, inverses, moved, donate, work)


def _chosen(paths: Iterable[str], wanted: dict[str, bool]) -> list[str]:
    """The paths that are wanted, on a layer where a side may have another form, so be a leaf or several."""
    chosen = [path for path, is_wanted in wanted.items() if is_wanted]
    return [path for path in paths if any(_inside(path, x) or _inside(x, path) for x in chosen)]


def _square(leaf: Array) -> bool:
    """Whether it is a matrix a block."""
    return leaf.ndim == 3 and leaf.shape[-1] == leaf.shape[-2]


def _inside(path: str, other: str) -> bool:
    return f"{path}/".startswith(f"{other}/")


def _at_worst(averages: int, inverses: int, moved: int, donate: bool, work: int = 0) -> Footprint:
    """The footprint of a state of which an update moves so many bytes and a refresh works in so many."""
    update = moved if donate else 2 * moved
    refresh = moved + inverses + work
    return Footprint(averages, inverses, averages + inverses + max(update, refresh))


def _bytes(leaf: Array | float) -> int:
    return leaf.nbytes if isinstance(leaf, Shape) else np.asarray(leaf).nbytes
