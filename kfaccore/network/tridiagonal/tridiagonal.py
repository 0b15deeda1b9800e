"""Tridiagonal: F^-1 ~ Xi^T Lambda Xi, block-tridiagonal over a chain of layers, with the curvature of neighbours in it.

Between any two layers F~_ij = G_ij (x) A_ij. With Psi_i = F~_i,i+1 F~_i+1,i+1^-1 = Psi_G (x) Psi_A, Xi is the identity
with -Psi_i to the right of the diagonal and Lambda = diag(S_i^-1), S_i = G_i (x) A_i - (Psi_G G_i+1 Psi_G^T) (x) (Psi_A
A_i+1 Psi_A^T), last S = G (x) A. The inverse of this is the positive definite matrix that equals F~ on the three
diagonals and has nothing else in its own inverse. The damping shifts the diagonal factors, before all else.

Exact when F is F~ and its inverse tridiagonal: two layers that see one example.
Source: Martens & Grosse 2015 (1503.05671), section 4.3 and appendix B.
Cost: update K-FAC's and rows (d_in d_in' + d_out d_out'); refresh two inverses and four eigendecompositions a layer;
eight products a solve, about 3 times K-FAC; memory 5 (d_in^2 + d_out^2) + d_in d_out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from itertools import pairwise
from operator import add
from typing import Any

import array_api_compat as aac

from kfaccore import factors
from kfaccore import xp as kernels
from kfaccore.damping import Split, pi
from kfaccore.linalg import kron, side
from kfaccore.linalg.inverse import accepted
from kfaccore.method import Additive, Block, Hyper
from kfaccore.network.tridiagonal.chain import checked, paired, refused
from kfaccore.network.tridiagonal.difference import denominators, whitened
from kfaccore.record import Factored, Record
from kfaccore.record.sharing import expand
from kfaccore.solution import Solution, finish, gradient
from kfaccore.xp.arrays import Array, all_finite, namespace, scalar, select
from kfaccore.xp.codes import Code, choose

Hypers = Mapping[str, Hyper]


@dataclass(frozen=True)
class Link:
    """Averages of a a'^T (1, d_in, d_in') and g g'^T (1, d_out, d_out') with the next layer, times its weight."""

    A: Array
    G: Array


@dataclass(frozen=True)
class Parts:
    """S^-1 = (Kg (x) Ka) diag(1 / below) (Kg (x) Ka)^T and Psi = PsiG (x) PsiA, a Link; () for the last layer."""

    Kg: Array
    Ka: Array
    below: Array
    psi: Any


@dataclass(frozen=True)
class Layer:
    """Averages A, G times `weight` (1,), the link to the next layer, what the last refresh made of them, code (1,)."""

    A: Array
    G: Array
    weight: Array
    link: Any
    parts: Parts
    code: Array


@dataclass(frozen=True)
class State:
    """The layers, in the order of the chain."""

    layers: dict[str, Layer]


@dataclass(frozen=True)
class Stats:
    """K-FAC's sums and those of the link; a record that is not finite is bad for the whole chain."""

    factors: factors.Stats
    link: Any

    @property
    def bad(self) -> Array:
        return self.factors.bad


@dataclass(frozen=True)
class Tridiagonal(Additive):
    """Block-tridiagonal K-FAC; see the module. Dense layers, or convolutions of as many positions each.

    order     names of the chain; () for all layers as they come. Others are left to `methods`
    sharing   expand | reduce; split: pi | equal | per_factor | Relative(...)
    """

    order: tuple[str, ...] = ()
    sharing: Callable[[Record], Record] = expand
    split: Split = pi

    needs_records = False

    def __post_init__(self) -> None:
        if not self.split.separable:
            raise ValueError(f"split={self.split} does not shift each factor, which Tridiagonal needs: use pi")

    def covers(self, blocks: Mapping[str, Block]) -> list[str]:
        """The chain; ValueError naming the layer that breaks it."""
        return checked(blocks, self.order)

    def init(self, blocks: Mapping[str, Block], like: Array) -> State:
        xp, where = namespace(like), {"dtype": like.dtype, "device": aac.device(like)}
        names = self.covers(blocks)
        layers = {}
        for name, following in zip(names, [*names[1:], None], strict=True):
            block = blocks[name]
            fields, link = factors.init(block, like), ()
            if following is not None:
                sizes = (block.d_in, blocks[following].d_in), (block.d_out, blocks[following].d_out)
                link = Link(*(xp.zeros((1, *size), **where) for size in sizes))
            Kg, Ka = side.identity(fields["G"]), side.identity(fields["A"])
            parts = Parts(Kg, Ka, xp.ones((1, block.d_out, block.d_in), **where), link)
            layers[name] = Layer(**fields, link=link, parts=parts)
        return State(layers)

    def measure(self, state: State, records: Mapping[str, Record], hypers: Hypers) -> dict[str, Stats]:
        names = list(state.layers)
        refused({name: records[name] for name in names})
        shared = {name: self.sharing(records[name]) for name in names}
        sums = {name: factors.measure(records[name], self.sharing) for name in names}
        bad = reduce(add, (found.bad for found in sums.values()))
        found = {name: Stats(replace(sums[name], bad=bad), ()) for name in names}
        for name, following in pairwise(names):
            link = Link(*paired(shared[name], shared[following]))
            found[name] = replace(found[name], link=link)
        return found

    def combine(self, first: dict[str, Stats], second: dict[str, Stats]) -> dict[str, Stats]:
        return {name: Additive.combine(self, stats, second[name]) for name, stats in first.items()}

    def update(self, state: State, stats: Mapping[str, Stats], hypers: Hypers, donate: bool = False) -> State:
        layers = {}
        for name, layer in state.layers.items():
            own, link = stats[name].factors, layer.link
            if link != ():
                ok, decay = (own.bad == 0) & (own.rows > 0), scalar(hypers[name].decay, layer.weight)
                rows = namespace(own.rows).where(own.rows > 0, own.rows, 1.0 + 0.0 * own.rows)
                sums, keep = stats[name].link, 1 - decay
                A = kernels.average(link.A, sums.A, decay, keep / rows, ok, donate)
                link = Link(A, kernels.average(link.G, sums.G, decay, keep / own.n, ok, donate))
            layers[name] = replace(factors.update(layer, own, hypers[name], donate), link=link)
        return State(layers)

    def refresh(self, state: State, hypers: Hypers) -> State:
        """All layers or none: what belongs together was made together."""
        made, codes = self._parts(state, {name: hyper.damping for name, hyper in hypers.items()})
        xp = namespace(next(iter(codes.values())))
        worst = reduce(xp.maximum, codes.values())
        layers = {}
        for name, layer in state.layers.items():
            code = xp.where(worst >= int(Code.INDEFINITE), worst, codes[name])
            parts, code = accepted(made[name], code, layer.parts, layer.code, layer.weight)
            layers[name] = replace(layer, parts=parts, code=code)
        return State(layers)

    def solve(
        self, state: State, grads: Mapping[str, Any], hypers: Hypers, records: Mapping[str, Record] | None = None
    ) -> Solution:
        """Directions, codes and state of the chain, on dicts. A gradient that is not finite counts as zero."""
        v, squeeze, ok = {}, {}, {}
        for name, layer in state.layers.items():
            shape = (*layer.G.shape[:2], layer.A.shape[-1])
            grad, squeeze[name] = gradient(grads[name], shape)
            grad = grad.dense() if isinstance(grad, Factored) else grad
            ok[name] = all_finite(grad)
            v[name] = select(ok[name], grad, namespace(grad).zeros_like(grad))
        x, directions, codes = self._inverse(state, v), {}, {}
        for name, layer in state.layers.items():
            code = choose(~ok[name], Code.NONFINITE, layer.code)
            kept = select(ok[name], x[name], namespace(x[name]).zeros_like(x[name]))
            solution = finish(kept, code, None, squeeze[name])
            directions[name], codes[name] = solution.direction, solution.code
        return Solution(directions, codes, state)

    def matvec(self, state: State, v: Mapping[str, Array], hypers: Hypers) -> dict[str, Array]:
        """F^ v with the factors damped by `hypers`: at 0 the approximation itself, where it is positive definite."""
        damping = {name: hyper.damping for name, hyper in hypers.items()}
        parts, names = self._parts(state, damping)[0], list(state.layers)
        A, G = self._damped(state, damping)
        y: dict[str, Array] = {}
        for before, name in zip([None, *names[:-1]], names, strict=True):
            y[name] = v[name]
            if before is not None:
                psi = parts[before].psi
                y[name] = y[name] + kron.apply(psi.G.mT, y[before], psi.A)
        x: dict[str, Array] = {}
        for name, following in reversed(list(zip(names, [*names[1:], None], strict=True))):
            x[name] = kron.apply(G[name], y[name], A[name])
            if following is not None:
                psi = parts[name].psi
                low = kron.apply(psi.G.mT, y[name], psi.A)
                low = x[following] - kron.apply(G[following], low, A[following])
                x[name] = x[name] + kron.apply(psi.G, low, psi.A.mT)
        return {name: x[name] for name in names}

    def _inverse(self, state: State, v: Mapping[str, Array]) -> dict[str, Array]:
        """Xi^T Lambda Xi v."""
        names, last = list(state.layers), None
        x: dict[str, Array] = {}
        for name, following in zip(names, [*names[1:], None], strict=True):
            p, u = state.layers[name].parts, v[name]
            if following is not None:
                u = u - kron.apply(p.psi.G, v[following], p.psi.A.mT)
            y = kron.solve(p.Kg, u, p.Ka, p.below)
            x[name] = y if last is None else y - kron.apply(last[0].psi.G.mT, last[1], last[0].psi.A)
            last = (p, y)
        return x

    def _damped(self, state: State, damping: Mapping[str, Any]) -> tuple[dict[str, Array], dict[str, Array]]:
        """(A + d_a I, G + d_g I) of every layer."""
        A, G = {}, {}
        for name, layer in state.layers.items():
            a, g = (factors.mean(x, layer.weight) for x in (layer.A, layer.G))
            d_a, d_g = self.split.shifts(side.Scale.of_factor(a), side.Scale.of_factor(g), damping[name])
            A[name] = a + d_a[:, None, None] * side.identity(a)
            G[name] = g + d_g[:, None, None] * side.identity(g)
        return A, G

    def _parts(self, state: State, damping: Mapping[str, Any]) -> tuple[dict[str, Parts], dict[str, Array]]:
        (A, G), names = self._damped(state, damping), list(state.layers)
        made, codes = {}, {}
        for name, following in zip(names, [*names[1:], None], strict=True):
            psi, less = (), [namespace(x).zeros_like(x) for x in (A[name], G[name])]
            code = choose(state.layers[name].weight >= 0, Code.OK, Code.OK)
            if following is not None:
                link, weight, found = state.layers[name].link, state.layers[name].weight, []
                for i, (cross, D) in enumerate(((link.A, A[following]), (link.G, G[following]))):
                    cross = factors.mean(cross, weight)
                    inverse, told = kernels.spd_inverse(D)
                    found.append(namespace(cross).matmul(cross, inverse))
                    less[i] = namespace(cross).matmul(found[i], cross.mT)
                    code = namespace(code).maximum(code, told)
                psi = Link(*found)
            Ka, s_a, code_a = whitened(A[name], less[0])
            Kg, s_g, code_g = whitened(G[name], less[1])
            below, told = denominators(s_g, s_a)
            made[name] = Parts(Kg, Ka, below, psi)
            codes[name] = reduce(namespace(code).maximum, (code, code_a, code_g, told))
        return made, codes
