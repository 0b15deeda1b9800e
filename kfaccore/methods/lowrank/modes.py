"""What the four methods share: rank rules and damping by modes, the damped solve, and which sides a refresh keeps.

Each side of a state is a `LowRank`, or a diagonal (blocks, size). Averages start at `start` times
the identity, which no side stores: start * (1 - weight) of it is left, and joins the damping.
Source: Puiu 2022 (2206.15397) and 2022 (2210.08494).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from kfaccore import factors, method
from kfaccore.damping import Split, check
from kfaccore.linalg.inverse import accepted
from kfaccore.method import Hyper
from kfaccore.methods.lowrank import lowrank
from kfaccore.methods.lowrank.lowrank import RANKS, Factor, Outside, Rank
from kfaccore.options import function, instance
from kfaccore.record import Factored, Record
from kfaccore.solution import Solution, finish_later, gradient
from kfaccore.xp import Code, choose
from kfaccore.xp.arrays import Array, device_of, namespace, place
from kfaccore.xp.ranges import AT_LEAST_0, ranged


class State(method.State, Protocol):
    """A state with the `weight` (blocks,) of its averages."""

    @property
    def weight(self) -> Array: ...


S = TypeVar("S", bound=State)


@dataclass(frozen=True)
class Sides:
    """Both factors by their modes, and what of the `identity` the averages still hold, (blocks,)."""

    A: Factor
    G: Factor
    identity: Array


class Modes(Generic[S]):
    """Base of methods whose solve goes by modes; they add the three clocks' functions and say their `sides`."""

    sharing: Callable[[Record], Record]
    rank: Rank
    split: Split
    outside: Outside
    start: float

    def __post_init__(self) -> None:
        function(self, "sharing", factors.SHARINGS)
        instance(self, "rank", Rank, RANKS)
        check(self, self.split)
        function(self, "outside", "kf.even, kf.lowest or kf.nothing")
        ranged(self, start=AT_LEAST_0)

    def sides(self, state: S) -> Sides:
        """A~ and G~ of F~ = G~ (x) A~."""
        raise NotImplementedError

    def solve(self, state: S, grad: Array | Factored, hyper: Hyper, record: Record | None = None) -> Solution:
        """(G~ + d_g I)^-1 V (A~ + d_a I)^-1 at the newest damping; a factored V is never formed."""
        sides = self.sides(state)
        grad, squeeze = gradient(grad, (state.code.shape[0], lowrank.size(sides.G), lowrank.size(sides.A)))
        A, G, lifted = self._damped(state, sides, hyper)
        code = choose(lifted & (state.code == int(Code.OK)), Code.JITTERED, state.code)
        return finish_later(lowrank.between(G, grad, A), code, state, squeeze)

    def inverse_sides(self, state: S, hyper: Hyper) -> tuple[Factor, Factor]:
        """(A~ + d_a I)^-1 and (G~ + d_g I)^-1 by their modes."""
        A, G, _ = self._damped(state, self.sides(state), hyper)
        return A, G

    def inverses(self, state: S, hyper: Hyper) -> tuple[Array, Array]:
        """Dense ((A~ + d_a I)^-1, (G~ + d_g I)^-1), for analysis."""
        A, G = self.inverse_sides(state, hyper)
        return lowrank.dense(A), lowrank.dense(G)

    def matvec(self, state: S, v: Array, hyper: Hyper) -> Array:
        sides = self.sides(state)
        return lowrank.between(sides.G, v, sides.A)

    def _damped(self, state: S, sides: Sides, hyper: Hyper) -> tuple[Factor, Factor, Array]:
        """Damped inverses of A and G, the identity before anything was seen; whether a denominator was lifted."""
        unit = state.code == int(Code.IDENTITY)
        d_a, d_g = self.split.shifts(lowrank.scale(sides.A), lowrank.scale(sides.G), hyper.damping)
        A, lifted_a = lowrank.inverse(sides.A, d_a + sides.identity, unit)
        G, lifted_g = lowrank.inverse(sides.G, d_g + sides.identity, unit)
        return A, G, lifted_a | lifted_g


def normaliser(weight: Array, start: float) -> tuple[Array, Array]:
    """(what averages are divided by, the identity's share) at this weight: start * (1 - weight) is left of it."""
    xp = namespace(weight)
    left = start * (1 - weight)
    total = weight + left
    total = xp.where(total > 0, total, xp.ones_like(total))
    return total, left / total


def empty(d: int, diagonal: bool, blocks: int, held: int, rank: Rank, like: Array) -> Factor:
    """A side before any update, with room for `held` modes."""
    if diagonal:
        return namespace(like).zeros((blocks, d), **place(like))
    return lowrank.start(blocks, d, held, rank, like)


def well(like: Array) -> Array:
    """Code OK for each block, (blocks,), of a side that has no modes to find."""
    xp = namespace(like)
    return xp.zeros(like.shape[:1], dtype=xp.int32, device=device_of(like))


def kept(
    new_A: tuple[Factor, Array], new_G: tuple[Factor, Array], old: tuple[Factor, Factor], state: State
) -> tuple[Factor, Factor, Array]:
    """(A, G, code) from both refreshed sides with their codes; the `old` ones where they cannot be used."""
    A, code_a = new_A
    G, code_g = new_G
    code = namespace(code_a).maximum(code_a, code_g)
    sides, code = accepted((A, G), code, old, state.code, state.weight)
    return sides[0], sides[1], code
