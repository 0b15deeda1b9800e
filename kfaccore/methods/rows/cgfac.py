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
from typing import Any, ClassVar

import array_api_compat as aac

from kfaccore.factors import unrefreshed
from kfaccore.linalg import cg
from kfaccore.linalg.cg import CG
from kfaccore.method import Block, Hyper
from kfaccore.methods.rows.operators import Empirical, Kron, KronFactored
from kfaccore.record import Factored, Record
from kfaccore.solution import Solution, finish, gradient
from kfaccore.xp.arrays import Array, namespace, select
from kfaccore.xp.codes import Code, choose

__all__ = ["CG", "CGFAC", "Empirical", "InRows", "Kron", "KronFactored"]


@dataclass(frozen=True)
class InRows:
    """Instead of CG: the same solution in the space of the rows, in rows^3 + 2 rows d_in d_out."""

    warm: ClassVar[float] = 0.0


@dataclass(frozen=True)
class State:
    """The operator's rows; start (blocks, d_out, d_in) of the next solve, or of no columns without warm starts;
    code (blocks,)."""

    parts: Any
    start: Array
    code: Array

    @property
    def weight(self) -> Array:
        return self.parts.weight


@dataclass(frozen=True)
class CGFAC:
    """Matrix-free natural gradient by conjugate gradients; see the module.

    operator    Kron(...) | KronFactored(...) | Empirical(...)
    solver      CG(stop, limit, warm, jacobi) | InRows()
    rows        capacity, where Block.rows is 0
    """

    operator: Any = field(default=Kron())
    solver: CG | InRows = field(default=CG())
    rows: int = 512
    cycles: ClassVar[int] = 1

    def init(self, block: Block, like: Array) -> State:
        shape = (block.blocks, block.d_out, block.d_in if self.solver.warm else 0)
        start = namespace(like).zeros(shape, dtype=like.dtype, device=aac.device(like))
        return State(self.operator.init(block, like, self.rows), start, unrefreshed(block, like))

    def measure(self, state: State, record: Record, hyper: Hyper) -> Any:
        return self.operator.measure(state.parts, record)

    def combine(self, first: Any, second: Any) -> Any:
        return self.operator.combine(first, second)

    def update(self, state: State, stats: Any, hyper: Hyper, donate: bool = False) -> State:
        return replace(state, parts=self.operator.update(state.parts, stats, hyper, donate))

    def refresh(self, state: State, hyper: Hyper) -> State:
        return replace(state, code=choose(state.weight > 0, Code.OK, state.code))

    def solve(self, state: State, grad: Array | Factored, hyper: Hyper, record: Record | None = None) -> Solution:
        v, squeeze = gradient(grad.dense() if isinstance(grad, Factored) else grad, self._shape(state, grad))
        fresh = state.code == int(Code.IDENTITY)
        if isinstance(self.solver, InRows):
            x, code = self.operator.in_rows(state.parts, v, hyper.damping)
            info = {}
        else:
            x, code, info = self._iterated(state, v, hyper.damping, self.solver)
        x = select(fresh, v, x)
        code = choose(fresh & (code != int(Code.NONFINITE)), Code.IDENTITY, code)
        solution = finish(x, code, state, squeeze, **info)
        if not self.solver.warm:
            return solution
        usable = ~fresh & (code != int(Code.NONFINITE)) & namespace(x).all(namespace(x).isfinite(x), axis=(-2, -1))
        return replace(solution, state=replace(state, start=select(usable, x, state.start)))

    def matvec(self, state: State, v: Array, hyper: Hyper) -> Array:
        return self.operator.product(state.parts, v)

    def _iterated(self, state: State, v: Array, damping: Any, how: CG) -> tuple[Array, Array, dict[str, Array]]:
        """Direction, code, and info with iterations summed and the largest residual over the systems."""
        xp = namespace(v)
        systems = self.operator.systems(state.parts, damping)
        scales: tuple = (None,) * len(systems)
        if how.jacobi:
            scales = tuple(d**-how.jacobi for d in self.operator.diagonals(state.parts, damping))
        x, code, info = v, None, {}
        for index, (system, scale) in enumerate(zip(systems, scales, strict=True)):
            start = how.warm * state.start if how.warm and index == len(systems) - 1 else None
            found = cg.solve(system, x, how, None if scale is None else lambda r, s=scale: s * r, start)
            x, code = found.x, found.code if code is None else xp.maximum(code, found.code)
            info = {
                "iterations": found.iterations + info.get("iterations", 0),
                "residual": xp.maximum(found.residual, info["residual"]) if info else found.residual,
            }
        return x, code, info

    def _shape(self, state: State, grad: Any) -> tuple[int, ...]:
        """(blocks, d_out, d_in) of the state; without a warm start's array, the columns come from the rows."""
        parts = state.parts
        columns = parts.a.shape[-1] if hasattr(parts, "a") else getattr(parts.A, "rows", parts.A).shape[-1]
        return (*state.start.shape[:2], columns)
