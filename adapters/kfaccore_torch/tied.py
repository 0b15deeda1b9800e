"""A table that is the output layer too: one record of both, whose rows are scaled to meet.

    J = sum_s (g_s |x_s|) (x_s / |x_s|)^T + sum_t (e_t |h_t|) (h_t / |h_t|)^T

The first sum is the output layer's; in the second, a token's row of the table takes the place of the output gradient
and the gradient h_t of its embedding that of the input. `dense` of the record is the exact block, products of both
sums included. A Kronecker method averages rows of both kinds: with inputs of length 1 its A has trace 1 and its G the
trace of F, whatever the sizes of x and h are. A row is scaled by itself alone, so that micro-batches and ranks add.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import one_hot

from kfaccore_torch.bridge import detached
from kfaccore_torch.calls import Call
from kfaccore_torch.kinds import Tied
from kfaccore_torch.lookup import existing, looked_up
from kfaccore_torch.places import Place


@dataclass(frozen=True)
class Rows:
    """a (examples, positions, d), g (examples, positions, size), exists (examples, positions)."""

    a: torch.Tensor
    g: torch.Tensor
    exists: torch.Tensor


def both(
    kind: Tied,
    calls: Sequence[Call],
    grads: Sequence[torch.Tensor],
    places: Sequence[Place],
    masks: Sequence[torch.Tensor | None],
) -> Rows:
    """Rows of all calls; several draws are so many times the examples, since the second sum's inputs are drawn."""
    found = [_rows(kind, *given) for given in zip(calls, grads, places, masks, strict=True)]
    parts = [_met(rows) for rows in found]
    return Rows(*(torch.cat(x, 1) for x in zip(*((rows.a, rows.g, rows.exists) for rows in parts), strict=True)))


def _rows(kind: Tied, call: Call, g: torch.Tensor, place: Place, mask: torch.Tensor | None) -> Rows:
    g = detached(g).reshape(g.shape[0], *call.shape)
    exists = existing(place.mask(), mask)
    draws = len(g)
    if call.x.is_floating_point():
        a = place.put(detached(call.x).reshape(*place.rows, kind.d)).repeat(draws, 1, 1)
        g = place.put(call.features_last(g, kind.size)).flatten(0, 1)
        a = a.to(g)
    else:
        index, found, exists = looked_up(kind.size, call, call.features_last(g, kind.d), place, exists)
        a = found.flatten(0, 1)
        g = one_hot(index.long(), kind.size).to(a).repeat(draws, 1, 1)
    every = torch.ones(a.shape[:2], dtype=torch.bool, device=a.device)
    kept = every if exists is None else exists.to(a.device).repeat(draws, 1)
    return Rows(a * kept[..., None], g * kept[..., None], kept)


def _met(rows: Rows) -> Rows:
    """The same J with inputs of length 1."""
    length = torch.linalg.vector_norm(rows.a, dim=-1, keepdim=True)
    return Rows(rows.a / torch.where(length > 0, length, 1.0), rows.g * length, rows.exists)


def ties(made_of: Sequence[tuple[str, torch.nn.Parameter, bool]]) -> dict[str, list[str]]:
    """Name of a parameter -> all that it has."""
    found: dict[int, list[str]] = {}
    for name, p, _ in made_of:
        found.setdefault(id(p), []).append(name)
    return {name: found[id(p)] for name, p, _ in made_of}
