"""CG-FAC: (F~ + damping I) x = V by conjugate gradients on products with rows, without A, G or their inverses.

F~ is `Kron`, G (x) A of the newest rows (G V A through them, in the cheaper order), `KronFactored`, the same with
damping shared between the factors, or `Empirical`, F of the newest examples itself. What is not iterated away acts as
further damping: `iterations` and `residual` are in the info, code UNCONVERGED at the limit.

Exact, at convergence, where K-FAC is with exact damping (Kron) or with split damping (KronFactored), and for Empirical
always. `InRows` reaches Kron's and Empirical's solution without iterating.
Source: Chen 2021 (2101.00218), of which only the abstract was open to us: stopping, warm start, preconditioning and the
three operators are our choices; Martens 2010 for stopping by progress.
Cost: memory rows (d_in + d_out) and 4 d_in d_out; update a copy of the rows; no refresh; an iteration
2 rows d_in d_out + rows^2 (d_in + d_out), or 4 rows d_in d_out, for Kron, and 2 rows d_in d_out for Empirical.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import reduce
from operator import add
from typing import Any, ClassVar, Protocol

from kfaccore.factors import unrefreshed
from kfaccore.linalg import cg
from kfaccore.linalg.cg import CG, Result
from kfaccore.method import Block, Hyper, Stats
from kfaccore.methods.rows.empirical import Empirical
from kfaccore.methods.rows.kron import Kron, KronFactored
from kfaccore.methods.rows.operators import Map, Operator, Parts
from kfaccore.options import instance
from kfaccore.record import Factored, Record
from kfaccore.solution import Solution, check_gradient, finish, gradient
from kfaccore.xp.arrays import Array, namespace, place, select
from kfaccore.xp.codes import Code, choose
from kfaccore.xp.owned import instead, owned
from kfaccore.xp.ranges import COUNT, ranged

__all__ = ["CG", "CGFAC", "Empirical", "InRows", "Kron", "KronFactored"]


class Solver(Protocol):
    """How a solution is reached; `warm` is the share of the last one to start from."""

    warm: float


@dataclass(frozen=True)
class InRows:
    """Instead of CG: the same solution in the space of the rows, in rows^3 + 2 rows d_in d_out."""

    warm: ClassVar[float] = 0.0


@dataclass(frozen=True)
class State:
    """The operator's rows; start (blocks, d_out, d_in) of the next solve, or of no columns without warm starts;
    code (blocks,)."""

    parts: Parts
    start: Array
    code: Array

    @property
    def weight(self) -> Array:
        return self.parts.weight


@dataclass(frozen=True)
class CGFAC:
    """(F~ + damping I) x = V by conjugate gradients on products with the newest rows; no d x d array exists.

    V and x (blocks, d_out, d_in); `iterations` and `residual` are in the solution's info, code UNCONVERGED at the
    limit. Exact at convergence where its operator is. Chen 2021, arxiv.org/abs/2101.00218.

    operator    Kron(...) | KronFactored(...) | Empirical(...)
    solver      CG(stop, limit, warm, jacobi) | InRows()
    rows        capacity, where Block.rows is 0. Of the oldest batch only the first rows may fit, in their order: a
                multiple of a batch's rows cuts none
    """

    operator: Operator[Any, Any] = field(default=Kron())
    solver: CG | InRows = field(default=CG())
    rows: int = 512
    cycles: ClassVar[int] = 1
    linear_sides: ClassVar[bool] = True

    def __post_init__(self) -> None:
        instance(self, "operator", Operator, "Kron(...), KronFactored(...) or Empirical(...)")
        instance(self, "solver", Solver, "CG(...) or InRows()")
        ranged(self, rows=COUNT)

    def init(self, block: Block, like: Array) -> State:
        shape = (block.blocks, block.d_out, block.d_in if self.solver.warm else 0)
        start = namespace(like).zeros(shape, **place(like))
        return State(self.operator.init(block, like, self.rows), start, unrefreshed(block, like))

    def measure(self, state: State, record: Record, hyper: Hyper) -> Stats:
        return self.operator.measure(state.parts, record)

    def combine(self, first: Stats, second: Stats) -> Stats:
        return self.operator.combine(first, second)

    def update(self, state: State, stats: Stats, hyper: Hyper, donate: bool = False) -> State:
        return replace(state, parts=self.operator.update(state.parts, stats, hyper, donate))

    def refresh(self, state: State, hyper: Hyper) -> State:
        return replace(state, code=choose(state.weight > 0, Code.OK, state.code))

    def solve(self, state: State, grad: Array | Factored, hyper: Hyper, record: Record | None = None) -> Solution:
        v, squeeze = gradient(grad.dense() if isinstance(grad, Factored) else grad, self.operator.shape(state.parts))
        fresh = state.code == int(Code.IDENTITY)
        if isinstance(self.solver, InRows):
            x, code = self.operator.in_rows(state.parts, v, hyper.damping)
            info = {}
        else:
            x, code, info = self._iterated(state, v, hyper.damping, self.solver)
        x = instead(fresh, v, x)
        code = choose(fresh & (code != int(Code.NONFINITE)), Code.IDENTITY, code)
        solution = finish(x, code, state, squeeze, **info)
        if not self.solver.warm:
            return solution
        xp = namespace(x)
        usable = ~fresh & (code != int(Code.NONFINITE)) & xp.all(xp.isfinite(x), axis=(-2, -1))
        return replace(solution, state=replace(state, start=owned(select(usable, x, state.start))))

    def matvec(self, state: State, v: Array, hyper: Hyper) -> Array:
        check_gradient(v, self.operator.shape(state.parts))
        return self.operator.product(state.parts, v)

    def _iterated(
        self, state: State, v: Array, damping: float | Array, how: CG
    ) -> tuple[Array, Array, dict[str, Array]]:
        """Direction, code, and info with iterations summed and the largest residual over the systems."""
        xp = namespace(v)
        systems = self.operator.systems(state.parts, damping)
        by_diagonal: list[Map | None] = [None] * len(systems)
        if how.jacobi:
            by_diagonal = [_scaled(d**-how.jacobi) for d in self.operator.diagonals(state.parts, damping)]
        starts: list[Array | None] = [None] * len(systems)
        if how.warm:
            starts[-1] = how.warm * state.start  # a direction: what the last system is solved for
        results: list[Result] = []
        x = v
        for system, precondition, start in zip(systems, by_diagonal, starts, strict=True):
            results.append(cg.solve(system, x, how, precondition, start))
            x = results[-1].x
        info = {
            "iterations": reduce(add, (result.iterations for result in results)),
            "residual": reduce(xp.maximum, (result.residual for result in results)),
        }
        return x, reduce(xp.maximum, (result.code for result in results)), info


def _scaled(scale: Array) -> Map:
    return lambda r: scale * r
