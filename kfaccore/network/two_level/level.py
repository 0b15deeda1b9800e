"""The coarse level of one step, and products with the network's J and F_d = F + damping I, from records."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

from kfaccore.convolution.patches import Patches
from kfaccore.network.two_level.vectors import Outer, dense, inner, scaled
from kfaccore.record import Factored, Ids, Record
from kfaccore.record.jacobian import adjoint, contracted, outputs, pulled, weighed
from kfaccore.xp.arrays import Array, from_host, namespace, plus, same, scalar

Tree = dict[str, Array]


@dataclass(frozen=True)
class Level:
    """The coarse level of one step: layer of each vector in `layers`, the vectors, Y = J R^T (rows, m), R R^T of equal
    layers times damping in `ridge`, the fine direction z0 with its image w0 = J z0 (rows,), the gradients, g - F_d z0
    of the layers where the space asked for it, and <r, g> of the vectors where their images gave it."""

    records: dict[str, Record]
    damping: dict[str, Any]
    n: Any
    layers: tuple[str, ...]
    vectors: tuple[Any, ...]
    Y: Array
    ridge: Array
    z0: Tree
    w0: Array
    g: Gradients
    residual: Tree
    slopes: tuple[Any, ...]

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
        return namespace(self.Y).stack([self.g.slope(pair) if x is None else x for pair, x in pairs])

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
    return gathered(records, {name: outputs(records[name], x)[0] for name, x in v.items()})


def gathered(records: dict[str, Record], z: Tree) -> Array:
    """J v, (rows,), given V a of every layer."""
    return sum(_rows(records[name], x) for name, x in z.items())


def _rows(record: Record, z: Array) -> Array:
    """<g, V a> of each draw and example, (rows,), given V a."""
    return namespace(z).reshape(contracted(record, z), (-1,))


def curved(records: dict[str, Record], damping: dict[str, Any], n: Any, v: Tree, w: Array) -> Tree:
    """F_d v over all layers, given w = J v."""
    found = {}
    for name, x in v.items():
        record = records[name]
        back = adjoint(record, namespace(w).reshape(w, (record.draws, record.batch)))
        found[name] = back / n + scalar(damping[name], x) * x
    return found


def residuals(records: dict[str, Record], damping: dict[str, Any], n: Any, z0: Tree, w0: Array, g: Gradients) -> Tree:
    """g - F_d z0 over all layers, given w0 = J z0; one product with a where gradient and record share their inputs."""
    found = {}
    for name, x in z0.items():
        record, rows = records[name], g.rows(name, records[name])
        w = namespace(w0).reshape(w0, (record.draws, record.batch))
        if rows is None:
            left = g.of(name) - adjoint(record, w) / n
        else:
            rows -= weighed(record, w / n)  # an array of its own
            left = pulled(record, rows)
        found[name] = plus(left, -scalar(damping[name], x), x)
    return found


def images(
    records: dict[str, Record],
    layers: tuple[str, ...],
    vectors: tuple[Any, ...],
    g: Gradients,
    known: Mapping[int, Array],
) -> tuple[Array, tuple[Any, ...]]:
    """Y = J R^T, (rows, m), and of each vector <r, g> to be called where V a tells it, else None; `known` has V a of
    some arrays by their id."""
    found: list[Any] = [None] * len(layers)
    slopes: list[Any] = [None] * len(layers)
    for name in dict.fromkeys(layers):
        record = records[name]
        mine = [i for i, layer in enumerate(layers) if layer == name]
        full = [i for i in mine if not isinstance(vectors[i], Outer)]
        for i in set(mine) - set(full):
            p, q = dots(record, vectors[i])
            found[i] = namespace(q).reshape(namespace(q).sum(q * p[None, ...], axis=(1, 3)), (-1,))
        for i, z in zip(full, _outputs(record, [vectors[i] for i in full], known), strict=True):
            found[i] = _rows(record, z)
            slopes[i] = partial(_slope, g, name, record, z)
    return namespace(found[0]).stack(found, axis=-1), tuple(slopes)


def _slope(g: Gradients, name: str, record: Record, z: Array) -> Array | None:
    """<r, g> from V a, where the gradient has the record's inputs."""
    rows = g.rows(name, record)
    return None if rows is None else inner(rows, z)


def _outputs(record: Record, vs: list[Array], known: Mapping[int, Array]) -> list[Array]:
    """V a for each v: together where the rows must be formed, else apart, which needs no copy of the vectors."""
    if isinstance(record.a, Ids | Patches) and len(vs) > 1:
        return outputs(record, *vs)
    return [known[id(v)] if id(v) in known else outputs(record, v)[0] for v in vs]


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


class Gradients:
    """The gradients of a step with their blocks axis, in the dtypes of `like`, each multiplied out when asked for."""

    def __init__(self, grads: Mapping[str, Any], like: Tree) -> None:
        self.grads = {n: g if isinstance(g, Factored) else full(g, like[n]) for n, g in grads.items()}
        self.like, self.found = like, {}

    def __call__(self) -> Tree:
        return {name: self.of(name) for name in self.grads}

    def of(self, name: str) -> Array:
        """The gradient of one layer, (blocks, d_out, d_in)."""
        if name not in self.found:
            self.found[name] = full(self.grads[name], self.like[name])
        return self.found[name]

    def rows(self, name: str, record: Record) -> Array | None:
        """New rows (blocks, batch, shared, d_out) that give the gradient with the record's own inputs, or None."""
        grad = self.grads[name]
        if not isinstance(grad, Factored) or not same(grad.a, record.a) or grad.a.dtype != self.like[name].dtype:
            return None
        return grad.g / scalar(grad.n, grad.g)

    def slope(self, pair: tuple[str, Any]) -> Array:
        """<r, g> for (layer, r); a gradient not multiplied out stays so where r is a product."""
        name, r = pair
        grad = self.grads[name]
        if not isinstance(grad, Factored) or not isinstance(r, Outer):
            return inner(r, self.of(name))
        p, q = dots(Record(grad.a, grad.g, grad.n), r)
        return namespace(p).sum(p * q[0, ...]) / scalar(grad.n, p)


def full(grad: Any, like: Array) -> Array:
    """A gradient or direction with its blocks axis, in the dtype of `like`."""
    v = grad.dense() if isinstance(grad, Factored) else grad
    return namespace(v).astype(v if v.ndim == 3 else v[None, ...], like.dtype, copy=False)
