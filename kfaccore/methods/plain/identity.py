"""Identity: x = V. For parameters that should keep their plain gradient.

Exact when F is the identity and damping is 0.
Source: gradient descent.
Cost: none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kfaccore import factors, tree
from kfaccore.method import Additive, Block, Hyper
from kfaccore.record import Factored, Record
from kfaccore.solution import Solution, finish, gradient
from kfaccore.xp.arrays import Array, device_of, namespace


@dataclass(frozen=True)
class State:
    """Nothing but the code (blocks,): OK, since the gradient is what was asked for; `shape` is structure."""

    code: Array
    shape: tuple[int, int, int] = tree.static(default=(1, 1, 1))


@dataclass(frozen=True)
class Stats:
    """Nothing to measure."""

    bad: Array


@dataclass(frozen=True)
class Identity(Additive):
    """x = V, for parameters that keep their plain gradient; takes no records, and the damping does not scale it.

    V and x (blocks, d_out, d_in); code OK from the start.
    """

    cycles: ClassVar[int] = 1
    unmeasured: ClassVar[bool] = True

    def init(self, block: Block, like: Array) -> State:
        code = namespace(like).zeros_like(factors.unrefreshed(block, like))
        return State(code, (block.blocks, block.d_out, block.d_in))

    def measure(self, state: State, record: Record, hyper: Hyper) -> Stats:
        return Stats(namespace(state.code).zeros_like(state.code))

    def update(self, state: State, stats: Stats, hyper: Hyper, donate: bool = False) -> State:
        return state

    def refresh(self, state: State, hyper: Hyper) -> State:
        return state

    def solve(self, state: State, grad: Array | Factored, hyper: Hyper, record: Record | None = None) -> Solution:
        v = grad.dense() if isinstance(grad, Factored) else grad
        v, squeeze = gradient(v, (state.code.shape[0], *v.shape[-2:]))
        return finish(v, state.code, state, squeeze)

    def matvec(self, state: State, v: Array, hyper: Hyper) -> Array:
        return v

    def eigensystem(self, state: State, hyper: Hyper) -> tuple[Array, Array, Array]:
        """(I, I, 1), the bases as diagonals."""
        blocks, d_out, d_in = state.shape
        xp = namespace(state.code)
        device = device_of(state.code)
        Qa = xp.ones((blocks, d_in), device=device)
        Qg = xp.ones((blocks, d_out), device=device)
        return Qa, Qg, xp.ones(state.shape, device=device)
