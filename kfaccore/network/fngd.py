"""Global FNGD: one coefficient an example for all layers, from K = sum over layers of K_l.

x_l = sum_i c_i J_{l,i} with (K + n damping I) c = 1 is the natural gradient of the whole network's empirical Fisher,
layers not taken apart. Layers of unequal dampings enter as K_l / r_l and x_l / r_l, r_l a damping over the largest.
Epochs, tables and `weighted` are FNGD's, layer by layer.

Exact while coefficients are computed, for gradients of any layers together.
Source: Ou et al. 2024 (2403.03473) take layers apart; the sum over layers is F's definition.
Cost: FNGD's, with one system of batch^3 for all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import add, and_
from typing import Any, ClassVar

from kfaccore import xp as kernels
from kfaccore.method import Block, Hyper
from kfaccore.methods import FNGD
from kfaccore.methods.rows import units
from kfaccore.methods.rows.shares import Share, mean_vector
from kfaccore.network.each import Each, Hypers, joined, one_batch
from kfaccore.record import Factored, Record
from kfaccore.record.sharing import expand, whole
from kfaccore.solution import Solution, finish, gradient
from kfaccore.xp.arrays import Array, loop, namespace, scalar, select
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

        Without records gradients are handed on, as those of a resting step are.
        """
        if records is None:
            return joined(state, {n: self.method.solve(state.layers[n], g, hypers[n]) for n, g in grads.items()})
        one_batch(records, grads)
        shapes = {name: (records[name].blocks, records[name].d_out, records[name].d_in) for name in grads}
        given = {name: gradient(grad, shapes[name]) for name, grad in grads.items()}
        grads = {name: grad for name, (grad, _) in given.items()}
        own = [x for x in (self.method.own(records[name], grad) for name, grad in grads.items()) if x is not None]
        seen = {name: self.sharing(records[name]) for name in grads}
        if len(own) < len(grads):
            xs, c, code = self._general(seen, grads, hypers)
        else:
            inverse, _, r, code = self._system(seen, hypers)
            c = {name: namespace(inverse).sum(inverse, axis=-1) / x for name, x in r.items()}
            scales = [scalar(x.n, x.g) / scalar(grads[name].n, x.g) for name, x in seen.items()]
            xs = tuple(_combined(x, c[name]) * scales[0] for name, x in seen.items())
            all_own = reduce(and_, (namespace(x).all(x & (s == scales[0])) for x, s in zip(own, scales, strict=True)))
            xs = loop(lambda _: ~all_own, lambda _: self._general(seen, grads, hypers)[0], xs, 1)
        found = {}
        for (name, record), x in zip(seen.items(), xs, strict=True):
            layer, xp = state.layers[name], namespace(x)
            fresh = layer.code == int(Code.IDENTITY)
            codes = choose(fresh, Code.IDENTITY, xp.broadcast_to(code, fresh.shape))
            each = xp.broadcast_to(c[name], (record.blocks, c[name].shape[-1]))
            layer = self.method.filled(layer, each, code, hypers[name], record)
            found[name] = finish(_unless(fresh, x, grads[name]), codes, layer, given[name][1])
        return joined(state, found)

    def weighted(
        self, state: State, g: Mapping[str, Array], hypers: Hypers, ids: Array | None = None
    ) -> dict[str, Array]:
        """Output gradients {layer: (batch, [positions,] d_out)} for the weight path, as FNGD's."""
        return {name: self.method.weighted(state.layers[name], x, hypers[name], ids) for name, x in g.items()}

    def _general(
        self, seen: Mapping[str, Record], grads: Mapping[str, Any], hypers: Hypers
    ) -> tuple[tuple, dict, Array]:
        """(V_l - U_l (K + n damping I)^-1 sum_m U_m^T V_m / r_m) / damping_l for any V, a difference taken in the
        widest dtype; c_l; a code."""
        wide = {name: units.widened(record) for name, record in seen.items()}
        vs = {name: _dense(grads[name], record.g) for name, record in wide.items()}
        inverse, shift, r, code = self._system(wide, hypers)
        xp = namespace(inverse)
        inner = reduce(add, (xp.sum(units.inner(x, vs[name]), axis=0) / r[name] for name, x in wide.items()))
        y = xp.matmul(inverse, inner[None, :, None])[:, :, 0]
        xs = {name: (vs[name] - _combined(x, y)) / (shift * r[name]) for name, x in wide.items()}
        dtypes = {name: getattr(grad, "g", grad).dtype for name, grad in grads.items()}
        c = {name: xp.sum(inverse, axis=-1) / x for name, x in r.items()}
        return tuple(xp.astype(x, dtypes[name]) for name, x in xs.items()), c, code

    def _system(self, seen: Mapping[str, Record], hypers: Hypers) -> tuple[Array, Array, dict[str, Array], Array]:
        """(K + n damping I)^-1 with the largest damping, that damping, every r_l, and a code; NaN where it failed."""
        first = next(iter(seen.values()))
        xp, zero = namespace(first.g), namespace(first.g).zeros_like(first.g[0, 0, 0, 0, 0])
        damping = {name: zero + scalar(hypers[name].damping, zero) for name in seen}
        top = reduce(xp.maximum, damping.values())
        unit, least = xp.where(top > 0, top, xp.ones_like(top)), zero + kernels.eps(zero.dtype, xp)
        r = {name: xp.maximum(x / unit, least) for name, x in damping.items()}
        K = reduce(add, (xp.sum(units.gram(x), axis=0, keepdims=True) / r[name] for name, x in seen.items()))
        inverse, shift, code = units.damped_inverse(K, first.n, top, self.relative)
        return select(code < int(Code.NONFINITE), inverse, inverse * float("nan")), shift, r, code


def _dense(grad: Any, like: Array) -> Array:
    """A gradient (blocks, d_out, d_in) in the dtype of `like`, rows multiplied out in that."""
    xp = namespace(like)
    if isinstance(grad, Factored):
        return Factored(xp.astype(grad.a, like.dtype), xp.astype(grad.g, like.dtype), grad.n).dense()
    return xp.astype(grad, like.dtype)


def _unless(fresh: Array, x: Array, grad: Any) -> Array:
    """x, but the gradient in blocks that are `fresh`."""
    xp = namespace(x)
    return loop(lambda _: xp.any(fresh), lambda x: (select(fresh, _dense(grad, x[0]), x[0]),), (x,), 1)[0]


def _combined(record: Record, y: Array) -> Array:
    """U_l y for y (1, units) of all layers' blocks."""
    return units.combined(record, namespace(y).broadcast_to(y, (record.blocks, y.shape[-1])))
