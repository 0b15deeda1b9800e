"""The coarse level of one step, and products with the network's J and F_d = F + damping I, from records."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from kfaccore.jacobian import adjoint, products
from kfaccore.network.vectors import Outer, dense, inner, scaled
from kfaccore.record import Factored, Ids, Record
from kfaccore.xp.arrays import Array, from_host, namespace, scalar

Tree = dict[str, Array]


@dataclass(frozen=True)
class Level:
    """The coarse level of one step: layer of each vector in `layers`, the vectors, Y = J R^T (rows, m), R R^T of equal
    layers times damping in `ridge`, the fine direction z0 with its image w0 = J z0 (rows,), the gradients, and R g."""

    records: dict[str, Record]
    damping: dict[str, Any]
    n: Any
    layers: tuple[str, ...]
    vectors: tuple[Any, ...]
    Y: Array
    ridge: Array
    z0: Tree
    w0: Array
    g: Callable[[], Tree]
    rg: Array

    @property
    def rhs(self) -> Array:
        """R (g - F_d z0), (m,)."""
        return self.rg - self.curved_coarse(self.z0, self.w0)

    def restrict(self, v: Tree) -> Array:
        """R v, (m,)."""
        return namespace(self.Y).stack([inner(r, v[name]) for name, r in self._pairs()])

    def prolong(self, beta: Array) -> Tree:
        """R^T beta."""
        found: Tree = {}
        for i, (name, r) in enumerate(self._pairs()):
            x = scaled(beta[i], r)
            found[name] = found[name] + x if name in found else x
        return {name: found[name] if name in found else namespace(z).zeros_like(z) for name, z in self.z0.items()}

    def _pairs(self) -> Iterator[tuple[str, Any]]:
        return zip(self.layers, self.vectors, strict=True)

    def image(self, v: Tree) -> Array:
        """J v, (rows,)."""
        return image(self.records, v)

    def curved(self, v: Tree, w: Array) -> Tree:
        """F_d v, given w = J v."""
        return curved(self.records, self.damping, self.n, v, w)

    def curved_coarse(self, v: Tree, w: Array) -> Array:
        """R F_d v, given w = J v, without J^T."""
        damped = [scalar(self.damping[name], self.Y) * inner(r, v[name]) for name, r in self._pairs()]
        return self.Y.mT @ w / self.n + namespace(self.Y).stack(damped)

    def apart(self) -> Array:
        """1 where two vectors lie on different layers, (m, m)."""
        names = np.array(self.layers)
        mask = from_host((names[:, None] != names[None, :]).astype(np.float64), self.Y)
        return namespace(self.Y).astype(mask, self.Y.dtype)


def image(records: dict[str, Record], v: Tree) -> Array:
    """J v of every draw and example over all layers, (rows,)."""
    parts = [namespace(v[name]).reshape(products(records[name], v[name])[0], (-1,)) for name in v]
    return sum(parts[1:], parts[0])


def curved(records: dict[str, Record], damping: dict[str, Any], n: Any, v: Tree, w: Array) -> Tree:
    """F_d v over all layers, given w = J v."""
    found = {}
    for name, x in v.items():
        record = records[name]
        back = adjoint(record, namespace(w).reshape(w, (record.draws, record.batch)))
        found[name] = back / n + scalar(damping[name], x) * x
    return found


def images(records: dict[str, Record], layers: tuple[str, ...], vectors: tuple[Any, ...]) -> Array:
    """Y = J R^T, (rows, m)."""
    found: list[Any] = [None] * len(layers)
    for name in dict.fromkeys(layers):
        record = records[name]
        mine = [i for i, layer in enumerate(layers) if layer == name]
        full = [i for i in mine if not isinstance(vectors[i], Outer)]
        for i in set(mine) - set(full):
            p, q = dots(record, vectors[i])
            found[i] = namespace(q).sum(q * p[None, ...], axis=(1, 3))
        for i, w in zip(full, products(record, *(vectors[i] for i in full)) if full else (), strict=True):
            found[i] = w
    xp = namespace(found[0])
    return xp.stack([xp.reshape(w, (-1,)) for w in found], axis=-1)


def dots(record: Record, r: Outer) -> tuple[Array, Array]:
    """right . a (blocks, batch, shared) and left . g (draws, blocks, batch, shared)."""
    xp = namespace(record.g)
    shape = (record.blocks, record.batch, record.shared)
    if isinstance(record.a, Ids):
        p = xp.take(r.right[0, :], xp.reshape(record.a.index, (-1,)))
    else:
        p = xp.matmul(xp.reshape(record.rows(), (record.blocks, -1, record.d_in)), r.right[:, :, None])
    q = xp.matmul(xp.reshape(record.g, (record.draws, record.blocks, -1, record.d_out)), r.left[None, :, :, None])
    return xp.reshape(p, shape), xp.reshape(q, (record.draws, *shape))


def ridge(layers: tuple[str, ...], vectors: tuple[Any, ...], damping: dict[str, Any]) -> Array:
    """damping <r_i, r_j> of vectors of one layer, (m, m)."""
    pairs, rows = list(zip(layers, vectors, strict=True)), []
    xp = namespace(dense(vectors[0]))
    zero = 0.0 * inner(vectors[0], vectors[0])
    for name, x in pairs:
        row = [scalar(damping[name], zero) * inner(x, y) if name == other else zero for other, y in pairs]
        rows.append(xp.stack(row))
    return xp.stack(rows)


def slopes(grads: dict[str, Any], layers: tuple[str, ...], vectors: tuple[Any, ...], g: Callable[[], Tree]) -> Array:
    """R g, (m,); of a gradient not multiplied out only where a vector is no product is it formed."""
    found = []
    for name, r in zip(layers, vectors, strict=True):
        grad = grads[name]
        if isinstance(grad, Factored) and isinstance(r, Outer):
            p, q = dots(Record(grad.a, grad.g, grad.n), r)
            found.append(namespace(p).sum(p * q[0, ...]) / scalar(grad.n, p))
        else:
            found.append(inner(r, g()[name]))
    return namespace(found[0]).stack(found)
