"""What waits between a loss and the step: statistics, or copies of rows where the step needs rows.

A loss leaves nothing until it is differentiated. Stats are sums; their shares n of the normaliser are settled at the
step, when it is known how many losses and micro-batches there were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import kfaccore as kf
from kfaccore_torch.formed import Formed
from kfaccore_torch.slopes import check_even, check_shares
from kfaccore_torch.unread import read

if TYPE_CHECKING:
    from kfaccore_torch.pending import Pending

Array = Any


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
    def values(self) -> list[tuple[float, float]]:
        """n of the forward, and n value of its losses together, where a rule asks for it."""
        values = [loss.value for loss in self.losses if loss.counts and loss.value is not None]
        return [(read(self.n), sum(values))] if values else []

    @property
    def slopes(self) -> list[torch.Tensor]:
        """What each of its losses was multiplied by, of those that were differentiated."""
        return [loss.slope for loss in self.losses if loss.slope is not None]

    def joined(self, n: Any, weight: float) -> float:
        """A loss of this n and weight joins those formed on the forward: the factor on its draws, by the root of the
        ratio, so that the n of the first serves all."""
        if not self.formed:
            self.formed = True
            self.n = n
            return weight**0.5
        if not read(self.n):  # nothing counted in the losses before
            self.n = n
            self.losses.clear()
        return (weight * self.n / n) ** 0.5


def gathered(shots: list[Shot], world: int) -> dict[str, list[Any]]:
    """{layer: Records or Stats} of one update, whose shares add up to the normaliser of all that was seen.

    A layer that some forwards did not reach counts them all the same: their examples have J = 0 there. Several losses
    on one forward count it once. A sum over everything has n = 1, whatever the number of parts and ranks.
    """
    for shot in shots:
        check_even(shot.slopes)
    counted = _counting(shots)
    check_shares([shot.slopes for shot in counted], [shot.n for shot in counted])
    records: dict[str, list[Any]] = {}
    pieces = [(shot, shot.found) for shot in counted]
    for name in dict.fromkeys(name for _, found in pieces for name in found):
        here = [(shot, found[name]) for shot, found in pieces if name in found]
        together = [shot for shot in counted if shot.reaches(name)]
        missed = 1.0 if len(here) == len(together) else _sum(together) / _sum([shot for shot, _ in here])
        times = missed / (len(together) * world if counted[0].total else 1)
        for _, given in here:
            records.setdefault(name, []).extend(weighted(x, times / len(given)) for x in given)
    return records


def _counting(shots: list[Shot]) -> list[Shot]:
    """Those in which something counts; the only one is taken as it is, where its n was not read."""
    if len(shots) == 1 and isinstance(shots[0].n, torch.Tensor):
        return shots
    for shot in shots:
        shot.n = read(shot.n)
    return [shot for shot in shots if shot.n > 0]


def _sum(shots: Sequence[Shot]) -> float:
    return sum(read(shot.n) for shot in shots)


def complain(shots: list[Shot], formed: int, captured: bool, world: int) -> None:
    """ValueError that says why a step has no statistics: `formed` losses, whether a forward was `captured`."""
    void = [shot.void for shot in shots if shot.void]
    if void and world > 1:
        return
    if void:
        raise ValueError(f"this step has no statistics to update from: {void[0]}; skip such a batch")
    if formed:
        raise ValueError(
            "this step updates statistics but got no records: pre.loss was formed and never differentiated; call "
            "backward on what it returned, or on a sum it is part of"
        )
    if captured:
        raise ValueError(
            "this step updates statistics but got no records: the forward was captured, but pre.loss was not "
            "called; form the loss by pre.loss(prediction, target)"
        )
    raise ValueError(
        "this step updates statistics but got no records: run the forward inside `with pre.capture():` and form "
        "the loss by pre.loss"
    )


def weighted(x: Any, factor: float) -> Any:
    """A Record or Stats with its n times `factor`."""
    if factor == 1.0:
        return x
    return mapped(lambda name, leaf: leaf * factor if name == "n" else leaf, x)


def kept(stats: Any, record: kf.Record) -> Any:
    """Stats of a record, or the record itself, that share no memory with it."""
    arrays = [x for x in leaves(record) if not isinstance(x, int | float)]
    of_torch = {x.untyped_storage().data_ptr() for x in arrays if isinstance(x, torch.Tensor)}
    others = [x for x in arrays if not isinstance(x, torch.Tensor)]

    def shares(x: Any) -> bool:
        if isinstance(x, torch.Tensor):
            return x.untyped_storage().data_ptr() in of_torch
        return any(_overlap(x, y) for y in others)

    if not any(shares(leaf) for leaf in leaves(stats)):
        return stats
    return mapped(lambda name, leaf: _copied(leaf) if shares(leaf) else leaf, stats)


def leaves(x: Any) -> Iterator[Any]:
    """Those that `mapped` visits, in its order."""
    names = _varying(type(x))
    if names is not None:
        for name in names:
            yield from leaves(getattr(x, name))
    elif isinstance(x, dict | tuple | list):
        for child in x.values() if isinstance(x, dict) else x:
            yield from leaves(child)
    else:
        yield x


def mapped(function: Callable[[str, Any], Any], x: Any, name: str = "") -> Any:
    """function(field's name, leaf) of every leaf of dataclasses, dicts, tuples and lists."""
    names = _varying(type(x))
    if names is not None:
        return replace(x, **{field: mapped(function, getattr(x, field), field) for field in names})
    if isinstance(x, dict):
        return {key: mapped(function, child, key) for key, child in x.items()}
    if isinstance(x, tuple | list):
        return type(x)(mapped(function, child, name) for child in x)
    return function(name, x)


@cache
def _varying(kind: type) -> tuple[str, ...] | None:
    """The fields of a dataclass that are no structure; None for other types."""
    return tuple(f.name for f in fields(kind) if not f.metadata.get("static")) if is_dataclass(kind) else None


def _copied(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return x.clone()
    return x.copy() if hasattr(x, "copy") and hasattr(x, "dtype") else x


def _overlap(x: Any, y: Any) -> bool:
    """Whether two arrays, not both of torch, may lie in the same memory."""
    if isinstance(x, np.ndarray) and isinstance(y, np.ndarray):
        return np.may_share_memory(x, y)
    return hasattr(x, "dtype") and type(x) is type(y) and not isinstance(x, np.generic)


def counted(
    value: torch.Tensor,
    pending: Pending,
    shot: Shot,
    let_go: Callable[[], None],
    formed: Formed | None = None,
) -> torch.Tensor:
    """The loss; once it is differentiated, what was `formed` with it counts among what is pending for the step, and the
    forward is let go of."""
    if not value.requires_grad:
        return value
    if formed is not None:
        shot.losses.append(formed)
    value.register_hook(partial(_count, pending, shot, let_go, formed))
    return value


def _count(pending: Pending, shot: Shot, let_go: Callable[[], None], formed: Formed | None, grad: torch.Tensor) -> None:
    """A loss is differentiated: what it left counts, once."""
    if formed is not None and not formed.note(grad, pending.follow):
        return
    let_go()
    if not any(other is shot for other in pending.shots):
        pending.shots.append(shot)
