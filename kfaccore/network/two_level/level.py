"""The coarse level of one step: the vectors, their images under J, and the fine direction that they correct."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from kfaccore.network.two_level import products
from kfaccore.network.two_level.gradients import Gradients, Tree
from kfaccore.network.two_level.products import Dampings, Slope
from kfaccore.network.two_level.vectors import Vector, dense, inner, scaled
from kfaccore.record import Record
from kfaccore.xp.arrays import Array, from_host, namespace, scalar
from kfaccore.xp.memory import plus


@dataclass(frozen=True)
class Level:
    """The coarse level of one step, R (m, parameters) with a vector a row.

    layers, vectors   the layer of each vector, and the vectors
    Y, ridge          J R^T (rows, m), and damping R R^T of vectors of one layer (m, m)
    z0, w0            the fine direction, and its image J z0 (rows,)
    g                 the gradients
    residual          g - F_d z0 of the layers, where the space asked for it
    slopes            of each vector <r, g>, where its image gave it
    """

    records: Mapping[str, Record]
    damping: Dampings
    n: float | Array
    layers: tuple[str, ...]
    vectors: tuple[Vector, ...]
    Y: Array
    ridge: Array
    z0: Tree
    w0: Array
    g: Gradients
    residual: Tree
    slopes: tuple[Slope, ...]

    @cached_property
    def rhs(self) -> Array:
        """R (g - F_d z0), (m,)."""
        if self.residual:
            return self.restrict(self.residual)
        return self.rg - self.curved_coarse(self.z0, self.w0)

    @cached_property
    def rg(self) -> Array:
        """R g, (m,)."""
        told = [None if slope is None else slope() for slope in self.slopes]
        pairs = zip(self._pairs(), told, strict=True)
        return namespace(self.Y).stack([self.g.slope(name, r) if x is None else x for (name, r), x in pairs])

    def restrict(self, v: Tree) -> Array:
        """R v, (m,)."""
        return namespace(self.Y).stack([inner(r, v[name]) for name, r in self._pairs()])

    def prolong(self, beta: Array) -> Tree:
        """R^T beta."""
        found: Tree = {}
        for i, (name, r) in enumerate(self._pairs()):
            if name not in found:
                found[name] = scaled(beta[i], r)
            else:
                found[name] = plus(found[name], beta[i], dense(r))
        return {name: found[name] if name in found else namespace(z).zeros_like(z) for name, z in self.z0.items()}

    def _pairs(self) -> Iterator[tuple[str, Vector]]:
        return zip(self.layers, self.vectors, strict=True)

    def image(self, v: Tree) -> Array:
        """J v, (rows,)."""
        return products.image(self.records, v)

    def curved(self, v: Tree, w: Array) -> Tree:
        """F_d v, given w = J v."""
        return products.curved(self.records, self.damping, self.n, v, w)

    def curved_coarse(self, v: Tree, w: Array) -> Array:
        """R F_d v, given w = J v, without J^T."""
        damped = [scalar(self.damping[name], self.Y) * inner(r, v[name]) for name, r in self._pairs()]
        return self.Y.mT @ w / self.n + namespace(self.Y).stack(damped)

    def apart(self) -> Array:
        """1 where two vectors lie on different layers, (m, m)."""
        names = np.array(self.layers)
        mask = from_host((names[:, None] != names[None, :]).astype(np.float64), self.Y)
        return namespace(self.Y).astype(mask, self.Y.dtype)
