"""Global FNGD: one coefficient an example for all layers, from K = sum over layers of K_l.

x_l = sum_i c_i J_{l,i} with (K + n damping I) c = 1 is the natural gradient of the whole network's empirical Fisher,
layers not taken apart. Layers of unequal dampings enter as K_l / r_l and x_l / r_l, r_l a damping over the largest.
Epochs, tables and `weighted` are FNGD's, layer by layer.

Exact while coefficients are computed, for gradients of any layers together.
Source: Ou et al. 2024 (2403.03473) take layers apart; the sum over layers is F's definition.
Cost: first epoch FNGD's for any gradient, with one system of batch^3 for all layers; later FNGD's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import add
from typing import Any, ClassVar

from kfaccore import xp as kernels
from kfaccore.method import Block, Hyper, Solution, finish, gradient
from kfaccore.methods import FNGD
from kfaccore.network.each import Each, Hypers, joined, one_batch
from kfaccore.record import Factored, Record
from kfaccore.sharing import expand, whole
from kfaccore.stacked import units
from kfaccore.stacked.shares import Share, mean_vector
from kfaccore.xp.arrays import Array, namespace, scalar, select
from kfaccore.xp.codes import Code, choose


@dataclass(frozen=True)
class State:
    """FNGD's state of every layer."""

    layers: dict[str, Any]


@dataclass(frozen=True)
class GlobalFNGD(Each):
    """Coefficients shared by all layers; see the module. Fields as FNGD's; sharing whole | reduce."""

    method: FNGD = field(init=False, repr=False)
    share: Share = mean_vector
    steps: int = 100
    every: int = 0
    sharing: Callable[[Record], Record] = whole
    slots: int = 512
    relative: bool = False

    needs_records: ClassVar[bool] = True
    own_gradients: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.sharing is expand:
            raise ValueError("GlobalFNGD has one coefficient an example: positions differ between layers; take whole")
        method = FNGD(self.share, self.steps, self.every, self.sharing, self.slots, self.relative)
        object.__setattr__(self, "method", method)

    def init(self, blocks: Mapping[str, Block], like: Array) -> State:
        return State({name: self.method.init(block, like) for name, block in blocks.items()})

    def rests(self, hyper: Hyper) -> bool | Array:
        """Whether the step uses shared coefficients: no records are needed, and gradients come weighted."""
        return self.method.rests(hyper)

    def measure(self, state: State, records: Mapping[str, Record], hypers: Hypers) -> dict[str, Any]:
        """FNGD's; a record that is not finite is bad for all layers."""
        found = super().measure(state, records, hypers)
        bad = reduce(add, (namespace(x.bad).sum(x.bad) for x in found.values()))
        return {name: replace(x, bad=bad + namespace(x.bad).zeros_like(x.bad)) for name, x in found.items()}

    def refresh(self, state: State, hypers: Hypers) -> State:
        return State({name: self.method.refresh(layer, hypers[name]) for name, layer in state.layers.items()})

    def solve(
        self, state: State, grads: Mapping[str, Any], hypers: Hypers, records: Mapping[str, Record] | None = None
    ) -> Solution:
        """`direction`, `code` and `state` as FNGD's, on dicts, for any gradients of layers with records of one batch.

        Differences are taken in the widest dtype. Without records gradients are handed on, as those of a resting step.
        """
        if records is None:
            return joined(state, {n: self.method.solve(state.layers[n], g, hypers[n]) for n, g in grads.items()})
        n = one_batch(records, grads)
        seen = {name: units.widened(self.sharing(records[name])) for name in grads}
        given = {name: gradient(grad, _shape(seen[name])) for name, grad in grads.items()}
        vs = {name: _dense(v, seen[name].g) for name, (v, _) in given.items()}
        damping, r = _shares(hypers, seen)
        xp = namespace(damping)
        K = reduce(add, (xp.sum(units.gram(x), axis=0, keepdims=True) / r[name] for name, x in seen.items()))
        inner = reduce(add, (xp.sum(units.inner(x, vs[name]), axis=0) / r[name] for name, x in seen.items()))
        inverse, shift, code = units.damped_inverse(K, n, damping, self.relative)
        y, c = xp.matmul(inverse, inner[None, :, None])[:, :, 0], xp.sum(inverse, axis=-1)
        found = {}
        for name, (v, squeeze) in given.items():
            layer, record, sizes = state.layers[name], seen[name], (vs[name].shape[0], c.shape[-1])
            fresh = layer.code == int(Code.IDENTITY)
            x = (vs[name] - units.combined(record, xp.broadcast_to(y, sizes))) / (shift * r[name])
            x = xp.astype(select(fresh, vs[name], x), getattr(v, "g", v).dtype)
            codes = choose(fresh, Code.IDENTITY, xp.broadcast_to(code, fresh.shape))
            layer = self.method.filled(layer, xp.broadcast_to(c / r[name], sizes), code, hypers[name], record)
            found[name] = finish(x, codes, layer, squeeze)
        return joined(state, found)

    def weighted(
        self, state: State, g: Mapping[str, Array], hypers: Hypers, ids: Array | None = None
    ) -> dict[str, Array]:
        """Output gradients {layer: (batch, [positions,] d_out)} for the weight path, as FNGD's."""
        return {name: self.method.weighted(state.layers[name], x, hypers[name], ids) for name, x in g.items()}


def _shape(record: Record) -> tuple[int, int, int]:
    return record.blocks, record.d_out, record.d_in


def _dense(grad: Any, like: Array) -> Array:
    """A gradient (blocks, d_out, d_in) in the dtype of `like`, rows multiplied out in that."""
    xp = namespace(like)
    if isinstance(grad, Factored):
        return Factored(xp.astype(grad.a, like.dtype), xp.astype(grad.g, like.dtype), grad.n).dense()
    return xp.astype(grad, like.dtype)


def _shares(hypers: Hypers, records: Mapping[str, Record]) -> tuple[Array, dict[str, Array]]:
    """The largest damping of the layers of `records`, and each one's share of it, at least eps."""
    like = next(iter(records.values())).g
    xp, zero = namespace(like), namespace(like).zeros_like(like[0, 0, 0, 0, 0])
    damping = {name: zero + scalar(hypers[name].damping, like) for name in records}
    top = reduce(xp.maximum, damping.values())
    unit, least = xp.where(top > 0, top, xp.ones_like(top)), zero + kernels.eps(like.dtype, xp)
    return top, {name: xp.maximum(x / unit, least) for name, x in damping.items()}
