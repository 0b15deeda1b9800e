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
from kfaccore.solution import Solution, check_gradient, finish, gradient
from kfaccore.xp.arrays import Array, device_of, namespace
from kfaccore.xp.owned import owned


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
        v, squeeze = gradient(v, _shape(state))
        return finish(owned(v), state.code, state, squeeze)  # the caller may scale the one and need the other

    def matvec(self, state: State, v: Array, hyper: Hyper) -> Array:
        check_gradient(v, _shape(state))
        return owned(v)

    def eigensystem(self, state: State, hyper: Hyper) -> tuple[Array, Array, Array]:
        """(I, I, 1), the bases as diagonals."""
        blocks, d_out, d_in = state.shape
        xp = namespace(state.code)
        device = device_of(state.code)
        Qa = xp.ones((blocks, d_in), device=device)
        Qg = xp.ones((blocks, d_out), device=device)
        return Qa, Qg, xp.ones(state.shape, device=device)


def _shape(state: State) -> tuple[int, int, int]:
    """(blocks, d_out, d_in); layers of a stack are its blocks."""
    return (state.code.shape[0], *state.shape[1:])
