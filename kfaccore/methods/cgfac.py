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

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import array_api_compat as aac

from kfaccore import stacked
from kfaccore.damping import Split, pi
from kfaccore.factors import per_block
from kfaccore.linalg import cg, span
from kfaccore.linalg import stack as stacks
from kfaccore.linalg.cg import CG
from kfaccore.linalg.stack import Stack
from kfaccore.method import Block, Hyper, Solution, finish, gradient
from kfaccore.record import Factored, Record
from kfaccore.sharing import expand, whole
from kfaccore.stacked import fisher
from kfaccore.stacked.factors import Branch, fewer_rows
from kfaccore.xp.arrays import Array, namespace, select
from kfaccore.xp.codes import Code, choose

Sharing = Callable[[Record], Record]


@dataclass(frozen=True)
class Kron:
    """G (x) A + damping I from rows; a side of rows >= d is a matrix.

    sharing         expand | reduce | mean_mean | Subsample(...)
    branch          fewer_rows | always: when a side of (rows, d) is kept as rows
    through_batch   None takes the cheaper product order; False forbids rows x rows arrays
    """

    sharing: Sharing = expand
    branch: Branch = fewer_rows
    through_batch: bool | None = None

    def init(self, block: Block, like: Array, rows: int) -> Any:
        return stacked.init(block, like, rows, self.branch)

    def measure(self, parts: Any, record: Record) -> Any:
        return stacked.measure(parts, self.sharing(record))

    def combine(self, first: Any, second: Any) -> Any:
        return stacked.combine(first, second)

    def update(self, parts: Any, stats: Any, hyper: Hyper, donate: bool) -> Any:
        return stacked.update(parts, stats, hyper, donate=donate)

    def product(self, parts: Any, v: Array) -> Array:
        """G v A."""
        A, G = stacked.debiased(parts)
        return stacked.product(G, v, A, self.through_batch)

    def systems(self, parts: Any, damping: float | Array) -> tuple[cg.Map, ...]:
        """Operators to solve with, one after the other."""
        c = per_block(damping, parts.weight)[:, None, None]
        return (lambda v: self.product(parts, v) + c * v,)

    def diagonals(self, parts: Any, damping: float | Array) -> tuple[Array, ...]:
        """Diagonal of each of `systems`."""
        A, G = (stacked.diagonal(x) for x in stacked.debiased(parts))
        return (G[:, :, None] * A[:, None, :] + per_block(damping, parts.weight)[:, None, None],)

    def in_rows(self, parts: Any, v: Array, damping: float | Array) -> tuple[Array, Array]:
        """The solution without iterations, and a code; ValueError unless both sides are rows."""
        A, G = stacked.debiased(parts)
        if not (isinstance(A, Stack) and isinstance(G, Stack)):
            raise ValueError("InRows needs both sides as rows; a side has rows >= d: give the operator branch=always")
        a, g = (x.rows * stacks.scales(x)[:, :, None] for x in (A, G))
        c = per_block(damping, parts.weight)
        return span.solve(g, a, v, c), choose(c > 0, Code.OK, Code.INDEFINITE)


@dataclass(frozen=True)
class KronFactored(Kron):
    """(G + d_g I) (x) (A + d_a I) from rows: at convergence SKFAC's and K-FAC's own solution.

    split       pi | equal | per_factor | Relative(...)
    one_side    two systems, one a side, of about the root of the condition number
    """

    split: Split = pi
    one_side: bool = False

    def systems(self, parts: Any, damping: float | Array) -> tuple[cg.Map, ...]:
        A, G = stacked.debiased(parts)
        d_a, d_g = (x[:, None, None] for x in self._shifts(A, G, damping))

        def right(v: Array) -> Array:
            return stacked.times(v, A) + d_a * v

        def left(v: Array) -> Array:
            return stacked.times(v.mT, G).mT + d_g * v

        return (right, left) if self.one_side else (lambda v: left(right(v)),)

    def diagonals(self, parts: Any, damping: float | Array) -> tuple[Array, ...]:
        A, G = stacked.debiased(parts)
        d_a, d_g = (x[:, None] for x in self._shifts(A, G, damping))
        a, g = (stacked.diagonal(A) + d_a)[:, None, :], (stacked.diagonal(G) + d_g)[:, :, None]
        return (a, g) if self.one_side else (g * a,)

    def in_rows(self, parts: Any, v: Array, damping: float | Array) -> tuple[Array, Array]:
        raise ValueError("KronFactored in the space of its rows is SKFAC: use that method")

    def _shifts(self, A: Any, G: Any, damping: float | Array) -> tuple[Array, Array]:
        return self.split.shifts(stacked.scale(A), stacked.scale(G), damping)


@dataclass(frozen=True)
class Empirical:
    """F + damping I of the newest examples: not a Kronecker product, and not K-FAC's block.

    sharing     whole (an example is all its positions, exact) | expand (every position one) | reduce
    """

    sharing: Sharing = whole

    def init(self, block: Block, like: Array, rows: int) -> Any:
        return fisher.init(block, like, rows)

    def measure(self, parts: Any, record: Record) -> Any:
        return fisher.measure(parts, self.sharing(record))

    def combine(self, first: Any, second: Any) -> Any:
        return fisher.combine(first, second)

    def update(self, parts: Any, stats: Any, hyper: Hyper, donate: bool) -> Any:
        return fisher.update(parts, stats, hyper)

    def product(self, parts: Any, v: Array) -> Array:
        return fisher.product(parts, v)

    def systems(self, parts: Any, damping: float | Array) -> tuple[cg.Map, ...]:
        c = per_block(damping, parts.weight)[:, None, None]
        return (lambda v: fisher.product(parts, v) + c * v,)

    def diagonals(self, parts: Any, damping: float | Array) -> tuple[Array, ...]:
        return (fisher.diagonal(parts) + per_block(damping, parts.weight)[:, None, None],)

    def in_rows(self, parts: Any, v: Array, damping: float | Array) -> tuple[Array, Array]:
        return fisher.solve(parts, v, per_block(damping, parts.weight))


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
    solver: CG | InRows = CG()
    rows: int = 512
    cycles: ClassVar[int] = 1

    def init(self, block: Block, like: Array) -> State:
        shape = (block.blocks, block.d_out, block.d_in if self.solver.warm else 0)
        start = namespace(like).zeros(shape, dtype=like.dtype, device=aac.device(like))
        return State(self.operator.init(block, like, self.rows), start, stacked.unrefreshed(block, like))

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
