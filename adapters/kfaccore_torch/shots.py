"""The forwards of a step, and what their losses leave, as one: Stats are sums; their shares n of the normaliser are
settled at the step, when it is known how many losses and micro-batches there were."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

import kfaccore as kf
from kfaccore_torch.collect import complaint, weighted
from kfaccore_torch.evened import evened
from kfaccore_torch.formed import Formed
from kfaccore_torch.slopes import Passed, check_even, check_shares, check_sum, means, past
from kfaccore_torch.uncounted import share_of_none, uncounted
from kfaccore_torch.unread import read

if TYPE_CHECKING:
    from kfaccore_torch.pending import Pending
    from kfaccore_torch.step import Engine


@dataclass
class Shot:
    """One captured forward.

    n         its share of the normaliser, 0 where nothing in it counts; one that was not read is NaN there
    total     whether its loss is a sum, whose n all micro-batches share
    void      why nothing in it counts
    formed    whether a loss was formed on it that counts
    losses    those formed on it that count, once they are differentiated
    """

    n: float | torch.Tensor = 0.0
    total: bool = False
    void: str = ""
    formed: bool = False
    losses: list[Formed] = field(default_factory=list)

    @property
    def found(self) -> dict[str, list[Any]]:
        """Layer -> Records or Stats, one a loss that counts there."""
        found: dict[str, list[Any]] = {}
        for loss in self.losses:
            for name, one in loss.found.items() if loss.counts else ():
                if name not in loss.without:
                    found.setdefault(name, []).append(one)
        return found

    def reaches(self, name: str) -> bool:
        """Whether it is a forward of what a layer's gradient is made of, with J = 0 where it does not use the layer."""
        losses = [loss for loss in self.losses if loss.counts]
        return not losses or any(name not in loss.without for loss in losses)

    @property
    def values(self) -> list[float]:
        """n value of its losses, where a rule asks for it."""
        return [loss.value for loss in self.losses if loss.counts and loss.value is not None]

    @property
    def slopes(self) -> list[torch.Tensor]:
        """What each of its losses was multiplied by, of those that were differentiated."""
        return [loss.slope for loss in self.losses if loss.slope is not None]

    @property
    def whole(self) -> bool:
        """Whether its losses are the training loss of its examples, as of a micro-batch: one of them has weight 1, or
        the weights add up to it, as those of mixed labels do. Else it is a part of a loss that other forwards share."""
        weights = [loss.weight for loss in self.losses if loss.counts] or [loss.weight for loss in self.losses]
        return not weights or 1.0 in weights or math.isclose(sum(weights), 1.0)

    @property
    def part(self) -> bool:
        """Whether something counts in it, as a part, by its weight, of a mean that other forwards share."""
        return not (self.whole or self.total) and read(self.n) > 0

    def joined(self, n: Any, weight: float, unit: float | None) -> float:
        """A loss of this n and weight joins those formed on the forward: the factor on its draws, by the root of the
        ratio, so that the n of the first serves all; and so does the `unit` of forwards before, if there is one."""
        if not self.formed:
            self.formed = True
            self.n = n if unit is None else unit
            return (weight if unit is None else weight * unit / n) ** 0.5
        if not read(self.n):  # nothing counted in the losses before
            self.n = n
            self.losses.clear()
        return (weight * self.n / n) ** 0.5

    def uncounted(self, total: bool) -> float:
        """A loss of which no label counts is the first on the forward: a sum has its n all the same."""
        self.formed = True
        self.n = 1.0 if total else 0.0
        return 1.0


def unit(before: Sequence[Shot], weight: float) -> float | None:
    """The n that a forward's first loss is to have, where the loss is a sum over forwards by weights, so that means
    over few and many examples add; None for a micro-batch, which counts by its own."""
    formed = [shot for shot in before if shot.formed]
    if weight == 1.0 and all(shot.whole for shot in formed):
        return None
    return next((n for shot in formed if (n := read(shot.n))), None)


class Gathered(NamedTuple):
    """{layer: Records or Stats} of one update, and what their shares n add up to."""

    records: dict[str, list[Any]]
    n: Any


def gathered(engine: Engine, pending: Pending, scale: torch.Tensor | None, captured: Sequence[Shot]) -> Gathered:
    """What was seen for one update, whose shares add up to its normaliser.

    A layer that some forwards did not reach counts them all the same: their examples have J = 0 there. Several losses
    on one forward count it once. Those of networks that share no layer, whose losses are added, are micro-batches of
    their own network alone. A sum over everything has n = 1, whatever the number of parts and ranks; where means were
    given weights, F is the sum over forwards too, of one n for all, and the mean over ranks.

    scale     what a scaler multiplied the losses by
    captured  all forwards, those whose gradients were thrown away too
    """
    shots = pending.shots
    world = engine.core.comm.world
    for shot in shots:
        check_even(shot.slopes)
    counted = _counting(shots)
    apart = len(counted) > 1 and not counted[0].total and not all(shot.whole for shot in counted)
    check_shares([shot.slopes for shot in counted], [shot.n for shot in counted], apart)
    slopes = _slopes(counted) if apart else []
    if apart and not slopes:
        check_sum([shot.slopes for shot in counted], scale)
    every = [shot.slopes for shot in shots if shot.slopes]  # parts of a mean too where no label of theirs counts
    known = {id(shot) for shot in shots}
    lost = any(shot.formed and id(shot) not in known for shot in captured)  # parts that a sum of factors would miss
    # forward_only has no draws that a weight could scale
    if not (apart or lost or engine.settings.fisher is kf.forward_only):
        total = any(shot.total for shot in counted)
        pending.common.check(every, Passed(scale, world, total, pending.untouched))
    slope = past(slopes, scale)
    whole = _whole(counted, counted, world, apart) / slope if counted else 0.0
    whole = evened(engine, counted, whole) or whole
    own = {} if apart else _networks(counted, every, scale)
    records: dict[str, list[Any]] = {}
    pieces = [(shot, shot.found) for shot in counted]
    for name in dict.fromkeys(name for _, found in pieces for name in found):
        here = [(shot, found[name]) for shot, found in pieces if name in found]
        together = [shot for shot in own.get(name, counted) if shot.reaches(name)]
        times = 1.0
        if apart or counted[0].total or len(here) < len(together):
            times = _whole(together, counted, world, apart) / slope / _sum([shot for shot, _ in here])
        for _, given in here:
            records.setdefault(name, []).extend(weighted(x, times / len(given)) for x in given)
    if counted or world > 1:
        for shot in shots:  # of which no label counts: their inputs count in A
            for name, given in shot.found.items() if not any(shot is other for other in counted) else ():
                share = 0.0 if records.get(name) or counted else whole
                records.setdefault(name, []).extend(uncounted(x, share) for x in given[:1])
    return Gathered(records, whole)


def completed(
    engine: Engine,
    pending: Pending,
    grads: dict[str, Any],
    scale: torch.Tensor | None,
    formed: int,
    captured: list[Shot],
) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """Records and gradients of a step, and n of it; ValueError where gradients have no statistics to go with. A rank
    without any data has no share of them, where others have: that is told once, if no batch of it said so.

    formed, captured   how many losses were, and the forwards
    """
    found, n = gathered(engine, pending, scale, captured)
    records = {name: pieces for name, pieces in found.items() if name in grads}
    void = next((shot.void for shot in [*pending.shots, *captured] if shot.void), "")
    if not (engine.counting if engine.core.comm.world > 1 else records):
        raise complaint(void, formed, bool(captured))
    if not (records or void):
        pending.tell_idle(engine.core.comm.rank)
    if isinstance(n, float) and n <= 0:
        n = share_of_none(engine)
    return *engine.completed(records, grads, n, plainly=True), n


def _whole(shots: Sequence[Shot], counted: Sequence[Shot], world: int, apart: bool) -> Any:
    """What the shares n of these, of all that counted, add up to."""
    if apart:
        return read(counted[0].n)
    if counted[0].total:
        return 1.0 / world * _sum(shots) / len(shots)
    return _sum(shots) if len(shots) > 1 else shots[0].n


def _networks(
    counted: Sequence[Shot], every: Sequence[Sequence[torch.Tensor]], scale: torch.Tensor | None
) -> dict[str, list[Shot]]:
    """Layer -> the forwards of its network, where they are of several that share no layer and of which each has a loss
    of its own, as two discriminators; empty where all are of one, or where `every` loss is a part of one mean."""
    groups: list[tuple[set[str], list[Shot]]] = []
    for shot in counted:
        names = set(shot.found)
        joined = [group for group in groups if group[0] & names]
        groups = [group for group in groups if not group[0] & names]
        groups.append((names.union(*(one[0] for one in joined)), [*(x for _, shots in joined for x in shots), shot]))
    if len(groups) < 2 or not all(names for names, _ in groups) or means(every, scale):
        return {}
    return {name: shots for names, shots in groups for name in names}


def _slopes(counted: Sequence[Shot]) -> list[torch.Tensor]:
    """What micro-batches with backward passes of their own were divided by; of one pass, as of one forward, a factor
    past the loss is not known to its curvature."""
    passes = {number for shot in counted for loss in shot.losses for number in loss.passes}
    return [slope for shot in counted for slope in shot.slopes[:1]] if len(passes) > 1 else []


def _counting(shots: list[Shot]) -> list[Shot]:
    """Those in which something counts; the only one is taken as it is, where its n was not read."""
    if len(shots) == 1 and isinstance(shots[0].n, torch.Tensor):
        return shots
    for shot in shots:
        shot.n = read(shot.n)
    return [shot for shot in shots if shot.n > 0]


def _sum(shots: Sequence[Shot]) -> float:
    return sum(read(shot.n) for shot in shots)
