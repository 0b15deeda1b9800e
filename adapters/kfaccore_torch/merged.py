"""Many calls of a linear layer as one, of all their rows: examples of ragged sizes that are called one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

import torch

from kfaccore.layers import Linear
from kfaccore_torch.bridge import detached
from kfaccore_torch.calls import Call
from kfaccore_torch.places import Groups, Place, Together, grouped


def apart(places: Sequence[Place]) -> bool:
    """Whether each row has an example by itself, or all rows have the same: then calls need not stand in each other's
    order, and beside each other they are padded once and not call by call."""
    together = [isinstance(place, Together) and place.like is None and place.exists is None for place in places]
    return all(together) or all(isinstance(place, Groups) for place in places)


def side_by_side(
    kind: Linear, calls: Sequence[Call], grads: Sequence[torch.Tensor], places: Sequence[Place]
) -> tuple[list[Call], list[torch.Tensor], list[Place]]:
    """One call with the rows of all, its gradient and its place. `grads` are (draws, *output shape), a call each."""
    x = torch.cat([detached(call.x).reshape(-1, kind.d_in) for call in calls])
    g = []
    for call, given in zip(calls, grads, strict=True):
        own = call.features_last(detached(given).reshape(len(given), *call.shape), kind.d_out)
        g.append(own.reshape(len(given), prod(call.rows), kind.d_out))
    rows = (len(x),)
    owners = [place.owner() for place in places if isinstance(place, Groups)]
    place = grouped(rows, torch.cat(owners), places[0].examples) if owners else Together(rows)
    one = replace(calls[0], x=x, shape=(len(x), kind.d_out), rows=rows, channel=-1, arrange=None)
    return [one], [torch.cat(g, 1)], [place]
