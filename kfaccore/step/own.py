"""Every example's own share of a direction, over the layers: what a batch flatters itself by.

A direction x = P grad holds P h_b / n of every example b that judges it, so that <grad, x> and x^T F x along it are
both too large. `Own` gathers those shares from the records, for the methods that say how they solve (`InverseSides`,
`Inverses`, `Eigensystem`). Where a layer's method does not, where its rows are not one example's each, and where the
shell gave no gradients of the loss itself, nothing is left out for that layer; `layers` tells how many.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from kfaccore.linalg.inverse import floored
from kfaccore.linalg.shares import Inverted, Rotated, Solve, shares
from kfaccore.method import Eigensystem, Hyper, Inverses, InverseSides, Method, State, declares, inverse_sides
from kfaccore.record import Record
from kfaccore.step.read import read_all
from kfaccore.xp.arrays import Array
from kfaccore.xp.numbers import Number, pick


class Left(NamedTuple):
    """What a model leaves out: s (draws, batch) = J_vb P h_b and q = sum_b h_b . P h_b, times their weight in the
    direction and added over layers, both still to be divided by n; factor on what remains, and the least share of the
    batch's slope that does; the layers that s and q are of, None for all; the own records, to see whether the gradients
    that the direction was made of are a multiple of theirs."""

    s: Array
    q: Number
    factor: Number = 1.0
    least: Number = 0.0
    layers: frozenset[str] | None = None
    own: Mapping[str, Record] = {}

    def of(self, name: str) -> bool:
        """Whether a layer's shares are among them."""
        return self.layers is None or name in self.layers


@dataclass(frozen=True)
class Own:
    """What a step was given beside records and gradients, and how the layers solve.

    records  {layer: Record} whose g are the loss's own gradients, one draw, for the rows of the layer's record, which
             are the examples of the batch, or none at all; g / n counts: n may be another than the record's
    solving  {layer: method, state and numbers of its P}; a layer that is missing in either is not left out
    """

    records: Mapping[str, Record] = field(default_factory=dict)
    solving: Mapping[str, tuple[Method, State, Hyper]] = field(default_factory=dict)

    def layers(self, drawn: Mapping[str, Record]) -> list[str]:
        """The layers whose own shares are known: gradients by example, and a P in closed form."""
        return [name for name in drawn if name in self.records and solvable(self.solving.get(name))]

    def shares(self, drawn: Mapping[str, Record], weights: Mapping[str, Number]) -> Left:
        """The shares of the layers of `weights`, each times its weight: the part of this batch in its direction."""
        found = read_all({name: self._share(drawn[name], name) for name in weights})
        total: list[Array] = []
        q: Number = 0.0
        for name, (s, own, n, mine) in found.items():
            unit = n / mine
            total = [weights[name] * unit * s + sum(total)]
            q = q + weights[name] * unit * unit * own
        return Left(total[0], q)

    def _share(self, drawn: Record, name: str) -> tuple[Array, Array, Number, Number]:
        """Shares of one layer and their own part, and the n of both records; nothing is read."""
        mine = self.records[name]
        return (*shares(drawn, mine, solve_of(*self.solving[name])), drawn.n, mine.n)


def remaining(whole: bool | Array, examples: Number) -> Number:
    """The factor on what remains: where the direction is all of this batch, a mean of one example fewer."""
    alone = whole & (examples > 1)
    return pick(alone, examples / pick(alone, examples - 1.0, 1.0), 1.0)


def most_examples(records: Mapping[str, Record]) -> Record:
    """A record whose rows are the examples of the batch: those of the others are shared by them."""
    return max(records.values(), key=lambda record: record.batch)


def solvable(solving: tuple[Method, State, Hyper] | None) -> bool:
    """Whether a method says how it solves."""
    ways = (InverseSides, Inverses, Eigensystem)
    return solving is not None and any(declares(solving[0], way) for way in ways)


def solve_of(method: Method, state: State, hyper: Hyper) -> Solve:
    """How a method that says so solves with this state, in closed form."""
    pair = inverse_sides(method, state, hyper)
    if pair is not None:
        return Inverted(*pair)
    system = method.eigensystem(state, hyper) if declares(method, Eigensystem) else None
    if system is None:
        raise TypeError(f"{method} declares how it solves and says nothing; see Inverses and Eigensystem")
    Qa, Qg, values = system
    below, _ = floored(values, state.code)
    return Rotated(Qa, Qg, below)
