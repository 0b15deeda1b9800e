"""TwoLevel: z = z0 + c R^T F_c^-1 R (g - F_d z0) with z0 = M^-1 g layer by layer and F_c = R F_d R^T.

Block methods drop the curvature between layers; a few vectors a layer, the rows of R, bring some of it back. F_d = F +
damping I is the whole network's exact curvature on this step's records, met only in products: nothing has the size of
examples times parameters or of parameters squared. F_c is rebuilt at every step, so with c = 1 the step is never
further from F_d^-1 g, in the norm of F_d, than z0 is; `info` tells the `gain` E(z) - E(z0) <= 0.

Exact when the vectors span the whole space (A-DEF2, A-DEF1, balanced; not the additive form), or where M is F_d.
Source: Koroko et al. 2023 (2303.18083); Tselepidis et al. 2020 (2011.00573).
Cost: records at every step; rows d_in d_out a product with J: 1 for ones and eigenvectors, 2 with M^-1 1, 3 (4) for the
residual (and its power), beside the block method's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import ClassVar

from kfaccore import tree
from kfaccore.convolution.patches import Patches
from kfaccore.linalg import side
from kfaccore.linalg.inverse import floored
from kfaccore.method import Block, Eigensystem, Hyper, Method, RowsAtSolve, declares
from kfaccore.method import State as LayerState
from kfaccore.methods import KFAC
from kfaccore.network.each import Each, Hypers, NetworkSolution, one_batch
from kfaccore.network.two_level.coarse import Nicolaides, Space
from kfaccore.network.two_level.corrections import Change, Solver, applied, deflate_last
from kfaccore.network.two_level.gradients import Gradients, Tree, full
from kfaccore.network.two_level.level import Level
from kfaccore.network.two_level.local import Local, eigenpairs, inverse_product
from kfaccore.network.two_level.matrices import exact, kronecker
from kfaccore.network.two_level.products import gathered, images, residuals, ridge
from kfaccore.network.two_level.turned import Turned
from kfaccore.network.two_level.vectors import Outer, Vector, dense, unit
from kfaccore.options import is_method
from kfaccore.record import Factored, Ids, Record
from kfaccore.record.jacobian import outputs
from kfaccore.solution import Solution
from kfaccore.xp.arrays import Array, namespace
from kfaccore.xp.codes import Code, choose
from kfaccore.xp.memory import plus
from kfaccore.xp.ranges import ANY, ranged

_NOWHERE: Mapping[str, Turned] = MappingProxyType({})


@dataclass(frozen=True)
class State:
    """The block method's state of every layer, and what the coarse space keeps from refresh to refresh."""

    layers: dict[str, LayerState]
    kept: dict[str, object]
    blocks: tuple[tuple[str, Block], ...] = tree.static(default=())


@dataclass(frozen=True)
class TwoLevel(Each[State]):
    """z = z0 + c R^T F_c^-1 R (g - F_d z0): a block method's z0 = M^-1 g, corrected in the span of the rows of R.

    F_d = F + damping I is the whole network's on this step's records, met in products; F_c = R F_d R^T. Gradients and
    directions are {layer: (blocks, d_out, d_in)}. Exact when R spans the space. Takes records at every step.
    Koroko et al. 2023, arxiv.org/abs/2303.18083; Tselepidis et al. 2020, arxiv.org/abs/2011.00573.

    method        the block method, or a mapping from layer to method
    space         Nicolaides | Spectral | Directions | Residual | Krylov(Nicolaides() or Residual()) | Enriched(count) |
                  Given(make)
    correction    deflate_last | deflate_first | balance | add | woodbury | woodbury_inverse
    matrix        exact | kronecker (for spaces of products: ones and eigenvectors)
    coefficient   c, a factor on the correction
    """

    method: Method | Mapping[str, Method] = field(default=KFAC())
    space: Space = field(default=Nicolaides())
    correction: Callable[[Level, Array, Solver], Change] = deflate_last
    matrix: Callable[[Level], Array] = exact
    coefficient: float = 1.0

    needs_records: ClassVar[bool] = True

    def __post_init__(self) -> None:
        ranged(self, coefficient=ANY)
        for method in self.method.values() if isinstance(self.method, Mapping) else (self.method,):
            is_method("TwoLevel", method)
        if self.matrix is kronecker and not self.space.outer:
            raise ValueError(f"matrix=kronecker needs vectors that are products; {self.space} has others: use exact")

    def init(self, blocks: Mapping[str, Block], like: Array) -> State:
        for name in blocks:
            method = self._of(name)
            if declares(method, RowsAtSolve):
                raise ValueError(
                    f"layer {name!r}: {type(method).__name__} solves with the rows of its batch, which TwoLevel hands "
                    f"to no method: take another, such as KFAC() or CGFAC(Empirical())"
                )
        layers = {name: self._of(name).init(block, like) for name, block in blocks.items()}
        state = State(layers, {}, tuple(blocks.items()))
        hyper = Hyper(0, 0.0, 0.0)
        kept = {}
        for name, block in blocks.items():
            kept[name] = self.space.init(name, block, like, self._local(state, name, hyper))
        return replace(state, kept=kept)

    def refresh(self, state: State, hypers: Hypers) -> State:
        state = replace(state, layers=self._refreshed(state.layers, hypers))
        kept = {}
        for name, before in state.kept.items():
            kept[name] = self.space.refresh(before, self._local(state, name, hypers[name]))
        return replace(state, kept=kept)

    def solve(
        self,
        state: State,
        grads: Mapping[str, Array | Factored],
        hypers: Hypers,
        records: Mapping[str, Record] | None = None,
    ) -> NetworkSolution:
        """`direction`, `code` and `state` as the block method's, on dicts; info: gain, and the coarse code."""
        if records is None:
            raise ValueError("TwoLevel got no records: its correction needs those of every step")
        one_batch(records, grads)
        at = self._turned(state, hypers, records)
        seen = {name: at[name].record(records[name]) if name in at else records[name] for name in grads}
        given = {name: at[name].grad(g, records[name], seen[name]) if name in at else g for name, g in grads.items()}

        def fine(v: Tree) -> Tree:
            return {name: self._solve(state, name, x, hypers[name], at.get(name)).direction for name, x in v.items()}

        solutions = {name: self._solve(state, name, grad, hypers[name], at.get(name)) for name, grad in given.items()}
        codes = {name: solution.code for name, solution in solutions.items()}
        z = {name: solution.direction for name, solution in solutions.items()}
        solved = replace(state, layers={**state.layers, **{name: found.state for name, found in solutions.items()}})
        z0 = {name: full(x, x) for name, x in z.items()}
        level = self._level(solved, given, z0, hypers, seen, at)
        if level is None:
            return NetworkSolution(z, codes, solved)
        change = self.correction(level, self.matrix(level), fine)
        d, gain, ok = applied(level, change, self.coefficient)
        # the coarse level's code, where it was not applied and the layer's own is OK
        codes = {name: choose(ok | (code > 0), Code.OK, change.code) + code for name, code in codes.items()}
        for name, own in z.items():
            x = plus(d[name], 1.0, level.z0[name])
            x = at[name].back(x) if name in at else x
            z[name] = namespace(own).reshape(x, own.shape)
        return NetworkSolution(z, codes, solved, {"gain": gain, "coarse": change.code})

    def _level(
        self,
        state: State,
        grads: Mapping[str, Array | Factored],
        z0: Tree,
        hypers: Hypers,
        records: Mapping[str, Record],
        at: Mapping[str, Turned] = _NOWHERE,
    ) -> Level | None:
        """The coarse level of this step, all of it in the coordinates `at`; None when the space is empty."""
        n = one_batch(records, z0)
        damping = {name: hypers[name].damping for name in z0}
        seen = {name: records[name] for name in z0}
        g = Gradients(grads, z0)
        moved = {name: outputs(seen[name], x)[0] for name, x in z0.items()}
        w0 = gathered(seen, moved)
        residual = residuals(seen, damping, n, z0, w0, g) if self.space.residual else {}
        layers: list[str] = []
        vectors: list[Vector] = []
        for name, x in z0.items():
            local = self._local(state, name, hypers[name], at.get(name))
            local = replace(local, grad=lambda name=name: g.of(name), direction=x, residual=residual.get(name))
            for v in self.space.vectors(state.kept[name], local):
                layers.append(name)
                vectors.append(v if v is x else unit(v))  # the direction stays itself: its image is known
        if not vectors:
            return None
        known = {id(z0[name]): x for name, x in moved.items()}
        Y, slopes = images(seen, layers, vectors, g, known)
        RR = ridge(layers, vectors, damping)
        return Level(seen, damping, n, tuple(layers), tuple(vectors), Y, RR, z0, w0, g, residual, slopes)

    def _local(self, state: State, name: str, hyper: Hyper, at: Turned | None = None) -> Local:
        method = self._of(name)
        layer = state.layers[name]

        def eigensystem() -> tuple[Array, Array, Array]:
            return eigenpairs(method, layer, name, dict(state.blocks)[name])

        def solve(v: Vector) -> Vector:
            product = inverse_product(method, layer, hyper, v) if isinstance(v, Outer) else None
            return self._solve(state, name, dense(v), hyper, at).direction if product is None else product

        return Local(solve, eigensystem)

    def _turned(self, state: State, hypers: Hypers, records: Mapping[str, Record]) -> dict[str, Turned]:
        """Layers whose step is computed in the coordinates of M's eigenvectors."""
        found = {}
        for name, record in records.items() if self.space.turns else ():
            method = self._of(name)
            layer = state.layers[name]
            if isinstance(record.a, Ids | Patches) or not declares(method, Eigensystem):
                continue
            system = method.eigensystem(layer, hypers[name])
            if system is not None and not any(side.is_diagonal(Q) for Q in system[:2]):
                Qa, Qg, values = system
                below, code = floored(values, layer.code)
                found[name] = Turned(Qg, below, Qa, code)
        return found

    def _solve(
        self, state: State, name: str, grad: Array | Factored, hyper: Hyper, at: Turned | None = None
    ) -> Solution:
        """M^-1 of one layer's gradient, in its coordinates `at`."""
        if at is not None:
            return at.solve(grad, state.layers[name])
        return self._of(name).solve(state.layers[name], grad, hyper)
