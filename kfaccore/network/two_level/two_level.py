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
from typing import Any, ClassVar

from kfaccore import tree
from kfaccore.convolution.patches import Patches
from kfaccore.linalg import side
from kfaccore.linalg.inverse import floored
from kfaccore.method import Block, Eigensystem, Hyper, Inverses, KroneckerTerms, declares
from kfaccore.methods import KFAC
from kfaccore.network.each import Each, Hypers, one_batch
from kfaccore.network.two_level.coarse import Local, Nicolaides
from kfaccore.network.two_level.corrections import Change, deflate_last
from kfaccore.network.two_level.level import Gradients, Level, Tree, full, gathered, images, residuals, ridge
from kfaccore.network.two_level.matrices import exact, kronecker
from kfaccore.network.two_level.turned import Turned
from kfaccore.network.two_level.vectors import Outer, dense, unit
from kfaccore.record import Ids, Record
from kfaccore.record.jacobian import outputs
from kfaccore.solution import Solution
from kfaccore.xp.arrays import Array, all_finite, namespace, plus, scalar, select
from kfaccore.xp.codes import Code, choose

_UNDAMPED = Hyper(0, 0.0, 0.0)


@dataclass(frozen=True)
class State:
    """The block method's state of every layer, and what the coarse space keeps from refresh to refresh."""

    layers: dict[str, Any]
    kept: dict[str, Any]
    blocks: tuple[tuple[str, Block], ...] = tree.static(default=())


@dataclass(frozen=True)
class TwoLevel(Each):
    """A coarse correction between layers on top of a block method; see the module.

    method        the block method, or a mapping from layer to method
    space         Nicolaides | Spectral | Directions | Residual | Krylov(Nicolaides() or Residual()) | Enriched(count) |
                  Given(make)
    correction    deflate_last | deflate_first | balance | add | woodbury | woodbury_inverse
    matrix        exact | kronecker (for spaces of products: ones and eigenvectors)
    coefficient   c, a factor on the correction
    """

    method: Any = field(default=KFAC())
    space: Any = field(default=Nicolaides())
    correction: Callable = deflate_last
    matrix: Callable[[Level], Array] = exact
    coefficient: float = 1.0

    needs_records: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.matrix is kronecker and not self.space.outer:
            raise ValueError(f"matrix=kronecker needs vectors that are products; {self.space} has others: use exact")

    def init(self, blocks: Mapping[str, Block], like: Array) -> State:
        layers = {name: self._of(name).init(block, like) for name, block in blocks.items()}
        state, hyper = State(layers, {}, tuple(blocks.items())), Hyper(0, 0.0, 0.0)
        made = {n: self.space.init(n, b, like, self._local(state, n, hyper)) for n, b in blocks.items()}
        return replace(state, kept=made)

    def refresh(self, state: State, hypers: Hypers) -> State:
        layers = {name: self._of(name).refresh(s, hypers[name]) for name, s in state.layers.items()}
        state = replace(state, layers=layers)
        kept = {n: self.space.refresh(kept, self._local(state, n, hypers[n])) for n, kept in state.kept.items()}
        return replace(state, kept=kept)

    def solve(
        self, state: State, grads: Mapping[str, Any], hypers: Hypers, records: Mapping[str, Record] | None = None
    ) -> Solution:
        """`direction`, `code` and `state` as the block method's, on dicts; info: gain, and the coarse code."""
        if records is None:
            raise ValueError("TwoLevel got no records: its correction needs those of every step")
        one_batch(records, grads)
        at = self._turned(state, hypers, records)
        seen = {n: at[n].record(records[n]) if n in at else records[n] for n in grads}
        given = {n: at[n].grad(g, records[n], seen[n]) if n in at else g for n, g in grads.items()}

        def fine(v: Tree) -> Tree:
            return {name: self._solve(state, name, x, hypers[name], at.get(name)).direction for name, x in v.items()}

        solutions = {name: self._solve(state, name, grad, hypers[name], at.get(name)) for name, grad in given.items()}
        codes = {name: s.code for name, s in solutions.items()}
        z = {name: s.direction for name, s in solutions.items()}
        state = replace(state, layers={**state.layers, **{name: s.state for name, s in solutions.items()}})
        level = self._level(state, given, {name: full(x, x) for name, x in z.items()}, hypers, seen, at)
        if level is None:
            return Solution(z, codes, state, {})
        change = self.correction(level, self.matrix(level), fine)
        d, gain, ok = _applied(level, change, self.coefficient)
        codes = {name: choose(ok | (x > 0), Code.OK, change.code) + x for name, x in codes.items()}
        found = {name: plus(d[name], 1.0, level.z0[name]) for name in z}
        found = {name: at[name].back(x) if name in at else x for name, x in found.items()}
        z = {name: namespace(x).reshape(found[name], x.shape) for name, x in z.items()}
        return Solution(z, codes, state, {"gain": gain, "coarse": change.code})

    def _level(
        self,
        state: State,
        grads: Mapping[str, Any],
        z0: Tree,
        hypers: Hypers,
        records: Mapping[str, Record],
        at: Mapping[str, Turned] = MappingProxyType({}),
    ) -> Level | None:
        """The coarse level of this step, all of it in the coordinates `at`; None when the space is empty."""
        n, damping = one_batch(records, z0), {name: hypers[name].damping for name in z0}
        seen = {name: records[name] for name in z0}
        moved, g = {name: outputs(seen[name], x)[0] for name, x in z0.items()}, Gradients(grads, z0)
        w0 = gathered(seen, moved)
        residual = residuals(seen, damping, n, z0, w0, g) if self.space.residual else {}
        pairs = []
        for name in z0:
            local = self._local(state, name, hypers[name], at.get(name))
            now = {"grad": lambda name=name: g.of(name), "direction": z0[name], "residual": residual.get(name)}
            local = replace(local, **now)
            pairs += [(name, v if v is z0[name] else unit(v)) for v in self.space.vectors(state.kept[name], local)]
        if not pairs:
            return None
        layers, vectors = (tuple(column) for column in zip(*pairs, strict=True))
        known = {id(z0[name]): x for name, x in moved.items()}
        (Y, slopes), RR = images(seen, layers, vectors, g, known), ridge(layers, vectors, damping)
        return Level(seen, damping, n, layers, vectors, Y, RR, z0, w0, g, residual, slopes)

    def _local(self, state: State, name: str, hyper: Hyper, at: Turned | None = None) -> Local:
        def eigensystem() -> tuple[Array, Array, Array]:
            return _eigensystem(self._of(name), state.layers[name], name, dict(state.blocks)[name])

        def solve(v: Any) -> Any:
            method = self._of(name)
            product = isinstance(v, Outer) and declares(method, Inverses)
            parts = method.inverses(state.layers[name], hyper) if product else None
            if parts is None:
                return self._solve(state, name, dense(v), hyper, at).direction
            left, right = (side.times(x[:, None, :], p)[:, 0, :] for x, p in ((v.left, parts[1]), (v.right, parts[0])))
            return Outer(left, right)

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

    def _solve(self, state: State, name: str, grad: Any, hyper: Hyper, at: Turned | None = None) -> Solution:
        if at is not None:
            return at.solve(grad, state.layers[name])
        return self._of(name).solve(state.layers[name], grad, hyper)


def _eigensystem(method: Any, state: Any, name: str, block: Block) -> tuple[Array, Array, Array]:
    """(S (blocks, d_out, d_in), Qg, Qa) of a method that is one Kronecker product or knows its eigenvectors."""
    terms = method.kronecker_terms(state, block) if declares(method, KroneckerTerms) else ()
    system = method.eigensystem(state, _UNDAMPED) if not terms and declares(method, Eigensystem) else None
    if system is not None:
        Qa, Qg, S = system
        return S, _full_side(Qg), Qa if block.diagonal_in else _full_side(Qa)
    if len(terms) != 1:
        raise ValueError(f"layer {name!r}: {type(method).__name__} knows no eigenvectors; choose another coarse space")
    (a, Qa, _), (g, Qg, _) = (side.eigh(x) for x in terms[0])
    return g[:, :, None] * a[:, None, :], Qg, Qa


def _full_side(Q: Array) -> Array:
    """Eigenvectors as a matrix, also those of a standard basis, which come as a diagonal of ones."""
    return side.identity(side.zeros(Q.shape[0], Q.shape[1], False, Q)) if side.is_diagonal(Q) else Q


def _applied(level: Level, change: Change, c: float) -> tuple[Tree, Array, Array]:
    """(c (z - z0), gain, ok (1,)): zero for all layers unless all of it is finite and its system could be solved.

    gain = E(z0 + d) - E(z0) for E(z) = ||z - F_d^-1 g||^2 in the norm of F_d on these records.
    """
    xp, ok = namespace(level.Y), change.code < int(Code.INDEFINITE)
    if change.beta is not None:
        ok = ok & xp.all(xp.isfinite(change.beta))
        beta = c * xp.where(ok, change.beta, xp.zeros_like(change.beta))
        w = level.Y @ beta
        gain = xp.sum(w * w) / level.n + xp.sum(beta * (level.ridge @ beta)) - 2 * xp.sum(beta * level.rhs)
        return level.prolong(beta), gain, ok
    for x in (change.d or {}).values():
        ok = ok & xp.all(all_finite(x))
    d = {n: c * select(ok, x[None, ...], xp.zeros_like(x)[None, ...])[0, ...] for n, x in (change.d or {}).items()}
    w, g = level.image(d), level.g()
    gain = (xp.sum(w * w) + 2 * xp.sum(w * level.w0)) / level.n
    for name, x in d.items():
        gain = gain + xp.sum(x * (scalar(level.damping[name], x) * (x + 2 * level.z0[name]) - 2 * g[name]))
    return d, gain, ok
