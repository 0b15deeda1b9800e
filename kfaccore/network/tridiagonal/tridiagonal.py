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
from typing import ClassVar

from kfaccore import factors, tree
from kfaccore.damping import Split, pi
from kfaccore.linalg import side
from kfaccore.linalg.inverse import accepted
from kfaccore.method import Block
from kfaccore.network.each import Hypers, NetworkSolution
from kfaccore.network.tridiagonal.chain import checked, paired, refused
from kfaccore.network.tridiagonal.inverse import Damped, applied, decomposed, followed, inverted
from kfaccore.network.tridiagonal.state import Layer, Link, Next, Parts, State, Stats
from kfaccore.record import Factored, Record
from kfaccore.record.sharing import expand
from kfaccore.solution import finish, gradient
from kfaccore.xp.arrays import Array, all_finite, namespace, place, select
from kfaccore.xp.codes import Code, choose


@dataclass(frozen=True)
class Tridiagonal:
    """x = Xi^T Lambda Xi g over a chain of layers: an inverse whose inverse has K-FAC's F~ on three diagonals.

    F~_ij = G_ij (x) A_ij between neighbours; gradients and directions are {layer: (blocks, d_out, d_in)}. Dense layers,
    or convolutions of as many positions each. Exact for two layers that see one example. Martens & Grosse 2015, section
    4.3, arxiv.org/abs/1503.05671.

    order     names of the chain; () for all layers as they come. Others are left to `methods`
    sharing   expand | reduce; split: pi | equal | per_factor | Relative(...)
    """

    order: tuple[str, ...] = ()
    sharing: Callable[[Record], Record] = expand
    split: Split = pi

    needs_records: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.split.separable:
            raise ValueError(f"split={self.split} does not shift each factor, which Tridiagonal needs: use pi")

    def covers(self, blocks: Mapping[str, Block]) -> list[str]:
        """The chain; ValueError naming the layer that breaks it."""
        return checked(blocks, self.order)

    def init(self, blocks: Mapping[str, Block], like: Array) -> State:
        xp = namespace(like)
        where = place(like)
        layers = {}
        for name, following in followed(self.covers(blocks)):
            block = blocks[name]
            fields = factors.init(block, like)
            link: Next = ()
            if following is not None:
                after = blocks[following]
                cross_A = xp.zeros((1, block.d_in, after.d_in), **where)
                cross_G = xp.zeros((1, block.d_out, after.d_out), **where)
                link = Link(cross_A, cross_G)
            Kg = side.identity(fields["G"])
            Ka = side.identity(fields["A"])
            parts = Parts(Kg, Ka, xp.ones((1, block.d_out, block.d_in), **where), link)
            layers[name] = Layer(**fields, link=link, parts=parts)
        return State(layers)

    def measure(self, state: State, records: Mapping[str, Record], hypers: Hypers) -> dict[str, Stats]:
        names = list(state.layers)
        refused({name: records[name] for name in names})
        shared = {name: self.sharing(records[name]) for name in names}
        sums = {name: factors.measure(records[name], self.sharing) for name in names}
        bad = reduce(add, (own.bad for own in sums.values()))
        found = {name: Stats(replace(sums[name], bad=bad), ()) for name in names}
        for name, following in pairwise(names):
            link = Link(*paired(shared[name], shared[following]))
            found[name] = replace(found[name], link=link)
        return found

    def combine(self, first: dict[str, Stats], second: dict[str, Stats]) -> dict[str, Stats]:
        return {name: tree.add(stats, second[name]) for name, stats in first.items()}

    def update(self, state: State, stats: Mapping[str, Stats], hypers: Hypers, donate: bool = False) -> State:
        layers = {}
        for name, layer in state.layers.items():
            own = stats[name].factors
            sums = stats[name].link
            link = layer.link
            if isinstance(link, Link) and isinstance(sums, Link):
                ok = factors.counts(own.bad == 0, own.rows, own.n)
                rows = namespace(own.rows).where(own.rows > 0, own.rows, 1.0 + 0.0 * own.rows)
                A, _ = factors.moved(link.A, layer.weight, sums.A, rows, ok, hypers[name], donate)
                G, _ = factors.moved(link.G, layer.weight, sums.G, own.n, ok, hypers[name], donate)
                link = Link(A, G)
            layers[name] = replace(factors.update(layer, own, hypers[name], donate), link=link)
        return State(layers)

    def refresh(self, state: State, hypers: Hypers) -> State:
        """All layers or none: what belongs together was made together."""
        made, codes = decomposed(state.layers, self._damped(state, hypers))
        xp = namespace(next(iter(codes.values())))
        worst = reduce(xp.maximum, codes.values())
        layers = {}
        for name, layer in state.layers.items():
            code = xp.where(worst >= int(Code.INDEFINITE), worst, codes[name])
            parts, code = accepted(made[name], code, layer.parts, layer.code, layer.weight)
            layers[name] = replace(layer, parts=parts, code=code)
        return State(layers)

    def solve(
        self,
        state: State,
        grads: Mapping[str, Array | Factored],
        hypers: Hypers,
        records: Mapping[str, Record] | None = None,
    ) -> NetworkSolution:
        """Directions, codes and state of the chain, on dicts. A gradient that is not finite counts as zero."""
        v = {}
        squeeze = {}
        ok = {}
        for name, layer in state.layers.items():
            shape = (*layer.G.shape[:2], layer.A.shape[-1])
            grad, squeeze[name] = gradient(grads[name], shape)
            grad = grad.dense() if isinstance(grad, Factored) else grad
            ok[name] = all_finite(grad)
            v[name] = select(ok[name], grad, namespace(grad).zeros_like(grad))
        x = applied({name: layer.parts for name, layer in state.layers.items()}, v)
        directions = {}
        codes = {}
        for name, layer in state.layers.items():
            code = choose(~ok[name], Code.NONFINITE, layer.code)
            kept = select(ok[name], x[name], namespace(x[name]).zeros_like(x[name]))
            solution = finish(kept, code, None, squeeze[name])
            directions[name] = solution.direction
            codes[name] = solution.code
        return NetworkSolution(directions, codes, state)

    def matvec(self, state: State, v: Mapping[str, Array], hypers: Hypers) -> dict[str, Array]:
        """F^ v with the factors damped by `hypers`: at 0 the approximation itself, where it is positive definite."""
        damped = self._damped(state, hypers)
        parts, _ = decomposed(state.layers, damped)
        return inverted(parts, damped, v)

    def _damped(self, state: State, hypers: Hypers) -> dict[str, Damped]:
        """(A + d_a I, G + d_g I) of every layer."""
        found = {}
        for name, layer in state.layers.items():
            A = factors.mean(layer.A, layer.weight)
            G = factors.mean(layer.G, layer.weight)
            d_a, d_g = self.split.shifts(side.Scale.of_factor(A), side.Scale.of_factor(G), hypers[name].damping)
            A = A + d_a[:, None, None] * side.identity(A)
            G = G + d_g[:, None, None] * side.identity(G)
            found[name] = Damped(A, G)
        return found
