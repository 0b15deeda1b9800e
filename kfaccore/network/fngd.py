"""Global FNGD: one coefficient an example for all layers, from K = sum over layers of K_l.

x_l = sum_i c_i J_{l,i} with (K + n damping I) c = 1 is the natural gradient of the whole network's empirical Fisher,
layers not taken apart. Layers of unequal dampings enter as K_l / r_l and x_l / r_l, r_l a damping over the largest.
Epochs, tables and `weighted` are FNGD's, layer by layer.

Exact while coefficients are computed, for gradients of any layers together.
Source: Ou et al. 2024 (2403.03473) take layers apart; the sum over layers is F's definition.
Cost: FNGD's, with one system of batch^3 for all layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import add, and_
from typing import ClassVar

from kfaccore import xp as kernels
from kfaccore.method import Block, Stats
from kfaccore.methods import FNGD
from kfaccore.methods.rows import fngd, units
from kfaccore.methods.rows.shares import Coefficients
from kfaccore.network.each import Each, Hypers, joined, one_batch
from kfaccore.record import Factored, Record
from kfaccore.record.sharing import expand
from kfaccore.solution import Solution, finish, gradient
from kfaccore.xp.arrays import Array, loop, namespace, scalar, select
from kfaccore.xp.codes import Code, choose

Gradients = Mapping[str, Array | Factored]
Found = tuple[dict[str, Array], dict[str, Array], Array]  # directions, coefficients, a code


@dataclass(frozen=True)
class State:
    """FNGD's state of every layer."""

    layers: dict[str, fngd.State]


@dataclass(frozen=True)
class GlobalFNGD(Each, Coefficients):
    """x_l = sum_i c_i J_li with (K + n damping I) c = 1, K = sum over layers of <J_li, J_lj>: layers not taken apart.

    The natural gradient of the whole network's empirical Fisher; gradients and directions are {layer: (blocks, d_out,
    d_in)}. Exact while coefficients are computed. Fields as FNGD's; sharing whole | reduce.
    Ou et al. 2024, arxiv.org/abs/2403.03473.
    """

    method: FNGD = field(init=False, repr=False)

    needs_records: ClassVar[bool] = True

    def __post_init__(self) -> None:
        Coefficients.__post_init__(self)
        if self.sharing is expand:
            raise ValueError("GlobalFNGD has one coefficient an example: positions differ between layers; take whole")
        method = FNGD(self.share, self.steps, self.every, self.sharing, self.slots, self.relative)
        object.__setattr__(self, "method", method)

    def init(self, blocks: Mapping[str, Block], like: Array) -> State:
        return State({name: self.method.init(block, like) for name, block in blocks.items()})

    def measure(self, state: State, records: Mapping[str, Record], hypers: Hypers) -> dict[str, Stats]:
        """FNGD's; a record that is not finite is bad for all layers."""
        found = super().measure(state, records, hypers)
        bad = reduce(add, (namespace(x.bad).sum(x.bad) for x in found.values()))
        return {name: replace(x, bad=bad + namespace(x.bad).zeros_like(x.bad)) for name, x in found.items()}

    def refresh(self, state: State, hypers: Hypers) -> State:
        return State({name: self.method.refresh(layer, hypers[name]) for name, layer in state.layers.items()})

    def solve(
        self, state: State, grads: Gradients, hypers: Hypers, records: Mapping[str, Record] | None = None
    ) -> Solution:
        """`direction`, `code` and `state` as FNGD's, on dicts, for any gradients of layers with records of one batch.

        Without records gradients are handed on, as those of a resting step are.
        """
        if records is None:
            return joined(state, {n: self.method.solve(state.layers[n], g, hypers[n]) for n, g in grads.items()})
        one_batch(records, grads)
        given: dict[str, Array | Factored] = {}
        squeeze: dict[str, bool] = {}
        for name, grad in grads.items():
            record = records[name]
            given[name], squeeze[name] = gradient(grad, (record.blocks, record.d_out, record.d_in))
        seen = {name: units.shared(records[name], self.sharing) for name in grads}
        found = self._own(records, given, seen, hypers) or self._general(seen, given, hypers)
        directions, coefficients, code = found
        solutions = {}
        for name, record in seen.items():
            layer = state.layers[name]
            xp = namespace(code)
            fresh = layer.code == int(Code.IDENTITY)
            codes = choose(fresh, Code.IDENTITY, xp.broadcast_to(code, fresh.shape))
            c = xp.broadcast_to(coefficients[name], (record.blocks, coefficients[name].shape[-1]))
            layer = self.method.filled(layer, c, code, hypers[name], record)
            direction = fngd.unless(fresh, directions[name], given[name])
            solutions[name] = finish(direction, codes, layer, squeeze[name])
        return joined(state, solutions)

    def weighted(
        self, state: State, g: Mapping[str, Array], hypers: Hypers, ids: Array | None = None
    ) -> dict[str, Array]:
        """Output gradients {layer: (batch, [positions,] d_out)} for the weight path, as FNGD's."""
        return {name: self.method.weighted(state.layers[name], x, hypers[name], ids) for name, x in g.items()}

    def _own(
        self, records: Mapping[str, Record], grads: Gradients, seen: Mapping[str, Record], hypers: Hypers
    ) -> Found | None:
        """U_l c where the gradients of all layers are the records' own, without a difference; as `_general` where
        their values turn out not to be; None where they cannot be."""
        own = []
        scales = []
        for name, grad in grads.items():
            same = self.method.own(records[name], grad)
            if same is None or not isinstance(grad, Factored):
                return None
            own.append(same)
            g = seen[name].g
            scales.append(scalar(seen[name].n, g) / scalar(grad.n, g))
        K, r = self._system(seen, hypers)
        c = _coefficients(K.inverse, r)
        xs = tuple(_combined(record, c[name]) * scales[0] for name, record in seen.items())
        agree = [namespace(same).all(same & (scale == scales[0])) for same, scale in zip(own, scales, strict=True)]
        all_own = reduce(and_, agree)

        def general(_: tuple[Array, ...]) -> tuple[Array, ...]:
            return tuple(self._general(seen, grads, hypers)[0].values())

        xs = loop(lambda _: ~all_own, general, xs, 1)
        return dict(zip(seen, xs, strict=True)), c, K.code

    def _general(self, seen: Mapping[str, Record], grads: Gradients, hypers: Hypers) -> Found:
        """(V_l - U_l (K + n damping I)^-1 sum_m U_m^T V_m / r_m) / damping_l for any V, a difference taken in the
        widest dtype; c_l; a code."""
        wide = {name: units.widened(record) for name, record in seen.items()}
        vs = {name: fngd.dense(grads[name], record.g) for name, record in wide.items()}
        K, r = self._system(wide, hypers)
        xp = namespace(K.inverse)
        inner = reduce(add, (xp.sum(units.inner(x, vs[name]), axis=0) / r[name] for name, x in wide.items()))
        y = K.solve(inner[None, :])
        found = {}
        for name, record in wide.items():
            x = (vs[name] - _combined(record, y)) / (K.damping * r[name])
            grad = grads[name]
            found[name] = xp.astype(x, grad.g.dtype if isinstance(grad, Factored) else grad.dtype)
        return found, _coefficients(K.inverse, r), K.code

    def _system(self, seen: Mapping[str, Record], hypers: Hypers) -> tuple[units.Damped, dict[str, Array]]:
        """K + n damping I with the largest damping, its inverse NaN where it failed, and every r_l."""
        first = next(iter(seen.values()))
        xp = namespace(first.g)
        zero = xp.zeros_like(first.g[0, 0, 0, 0, 0])
        dampings = {name: zero + scalar(hypers[name].damping, zero) for name in seen}
        largest = reduce(xp.maximum, dampings.values())
        unit = xp.where(largest > 0, largest, xp.ones_like(largest))
        least = zero + kernels.eps(zero.dtype, xp)  # a layer without damping: its share can still be divided by
        r = {name: xp.maximum(damping / unit, least) for name, damping in dampings.items()}
        K = reduce(add, (xp.sum(units.gram(x), axis=0, keepdims=True) / r[name] for name, x in seen.items()))
        system = units.damped(K, first.n, largest, self.relative)
        inverse = select(system.code < int(Code.NONFINITE), system.inverse, system.inverse * float("nan"))
        return replace(system, inverse=inverse), r


def _coefficients(inverse: Array, r: Mapping[str, Array]) -> dict[str, Array]:
    """c_l (1, units) = (K + n damping I)^-1 1 / r_l of each layer."""
    total = namespace(inverse).sum(inverse, axis=-1)
    return {name: total / share for name, share in r.items()}


def _combined(record: Record, y: Array) -> Array:
    """U_l y for y (1, units) of all layers' blocks."""
    return units.combined(record, namespace(y).broadcast_to(y, (record.blocks, y.shape[-1])))
