"""Every example's own share of a direction, over the layers: what a batch flatters itself by.

A direction x = P grad holds P h_b / n of every example b that judges it, so that <grad, x> and x^T F x along it are both
too large. `Own` gathers those shares from the records, for the methods that say how they solve (`Inverses`,
`Eigensystem`). Where a layer's method does not, where its rows are not one example's each, and where the shell gave no
gradients of the loss itself, nothing is left out for that layer; `layers` tells how many.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from kfaccore.linalg.inverse import floored
from kfaccore.linalg.shares import Inverted, Rotated, Solve, shares
from kfaccore.method import Eigensystem, Hyper, Inverses, Method, State, declares
from kfaccore.record import Record
from kfaccore.xp.arrays import Array
from kfaccore.xp.numbers import Number, number, numbers


class Shares(NamedTuple):
    """s (draws, batch) = J_vb P h_b and q = sum_b h_b . P h_b, added over layers; both still to be divided by n."""

    s: Array
    q: Number


@dataclass(frozen=True)
class Own:
    """What a step was given beside records and gradients, and how the layers solve.

    records  {layer: Record} whose g are the loss's own gradients, one draw, for the rows of the layer's record
    solves   {layer: its P}; a layer that is missing in either is not left out
    """

    records: Mapping[str, Record] = field(default_factory=dict)
    solves: Mapping[str, Solve] = field(default_factory=dict)

    def layers(self, drawn: Mapping[str, Record]) -> list[str]:
        """The layers whose own shares are known: one row an example of the batch, and a P in closed form."""
        batch = max((record.batch for record in drawn.values()), default=0)
        return [name for name in drawn if name in self.records and name in self.solves and drawn[name].batch == batch]

    def shares(self, drawn: Mapping[str, Record], weights: Mapping[str, Number]) -> Shares | None:
        """The shares of all layers, each times its weight: the part of this batch in the layer's direction."""
        s: Array | float = 0.0
        q: Number = 0.0
        names = self.layers(drawn)
        for name in names:
            found, own = shares(drawn[name], self.records[name], self.solves[name])
            s = s + weights[name] * numbers(found)
            q = q + weights[name] * number(own)
        return Shares(s, q) if names else None


def solve_of(method: Method, state: State, hyper: Hyper) -> Solve | None:
    """How a method solves with this state, in closed form; None where it does not say."""
    pair = method.inverses(state, hyper) if declares(method, Inverses) else None
    if pair is not None:
        return Inverted(*pair)
    system = method.eigensystem(state, hyper) if declares(method, Eigensystem) else None
    if system is None:
        return None
    Qa, Qg, values = system
    below, _ = floored(values, state.code)
    return Rotated(Qa, Qg, below)
