"""The gradients of a step, arrays or rows not multiplied out, and what a coarse level asks of them."""

from __future__ import annotations

from collections.abc import Mapping

from kfaccore.network.two_level.vectors import Outer, Vector, dots, inner
from kfaccore.record import Factored, Record
from kfaccore.xp.arrays import Array, namespace, scalar
from kfaccore.xp.memory import same

Tree = dict[str, Array]


class Gradients:
    """The gradients of a step with their blocks axis, in the dtypes of `like`, each multiplied out when asked for."""

    def __init__(self, grads: Mapping[str, Array | Factored], like: Tree) -> None:
        self.grads: dict[str, Array | Factored] = {
            name: grad if isinstance(grad, Factored) else full(grad, like[name]) for name, grad in grads.items()
        }
        self.like = like
        self.found: Tree = {}

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

    def slope(self, name: str, r: Vector) -> Array:
        """<r, g> of a layer's vector; a gradient not multiplied out stays so where r is a product."""
        grad = self.grads[name]
        if not isinstance(grad, Factored) or not isinstance(r, Outer):
            return inner(r, self.of(name))
        p, q = dots(Record(grad.a, grad.g, grad.n), r)
        return namespace(p).sum(p * q[0, ...]) / scalar(grad.n, p)


def full(grad: Array | Factored, like: Array) -> Array:
    """A gradient or direction with its blocks axis, in the dtype of `like`."""
    v = grad.dense() if isinstance(grad, Factored) else grad
    return namespace(v).astype(v if v.ndim == 3 else v[None, ...], like.dtype, copy=False)
