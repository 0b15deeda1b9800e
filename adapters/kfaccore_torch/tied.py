"""A table that is the output layer too: one record of both, whose factors balance them.

    J = sum_s g_s x_s^T + sum_t (e_t / c) (c h_t)^T

The first sum is the output layer's; in the second, a token's row of the table takes the place of the output gradient
and the gradient h_t of its embedding that of the input. `dense` of the record is the exact block, products of both
sums included. A Kronecker method sees sums of x x^T and c^2 h h^T in A, of g g^T and e e^T / c^2 in G; c makes the
mean squares of x and c h equal, so that tr A tr G is the sum of both terms' own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import one_hot

from kfaccore_torch.bridge import detached
from kfaccore_torch.calls import Call
from kfaccore_torch.kinds import Tied
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
    heads = [rows for call, rows in zip(calls, found, strict=True) if call.x.is_floating_point()]
    tables = [rows for call, rows in zip(calls, found, strict=True) if not call.x.is_floating_point()]
    factor = _balance(_mean_square(heads), _mean_square(tables)) if heads and tables else 1.0
    parts = [*heads, *(Rows(rows.a * factor, rows.g / factor, rows.exists) for rows in tables)]
    return Rows(*(torch.cat(x, 1) for x in zip(*((rows.a, rows.g, rows.exists) for rows in parts), strict=True)))


def _rows(kind: Tied, call: Call, g: torch.Tensor, place: Place, mask: torch.Tensor | None) -> Rows:
    g = detached(g).reshape(g.shape[0], *call.shape)
    exists = place.mask()
    draws = len(g)
    if call.x.is_floating_point():
        a = place.put(detached(call.x).reshape(*place.rows, kind.d)).repeat(draws, 1, 1)
        g = place.put(call.features_last(g, kind.size)).flatten(0, 1)
        a = a.to(g)
    else:
        index = place.put(call.x.reshape(*call.rows, 1))[..., 0]
        a = place.put(call.features_last(g, kind.d)).flatten(0, 1)
        g = one_hot(index.long(), kind.size).to(a).repeat(draws, 1, 1)
        padding = call.options.get("padding_idx")
        if padding is not None:
            mask = (index != padding % kind.size) & (torch.ones_like(index, dtype=torch.bool) if mask is None else mask)
    kept = torch.ones(a.shape[:2], dtype=torch.bool, device=a.device)
    for other in (exists, mask):
        kept = kept if other is None else kept & other.to(a.device).repeat(draws, 1)
    return Rows(a * kept[..., None], g * kept[..., None], kept)


def _mean_square(rows: Sequence[Rows]) -> float:
    total = sum(float(x.a.double().square().sum()) for x in rows)
    return total / max(1, sum(int(x.exists.sum()) for x in rows))


def _balance(first: float, second: float) -> float:
    """What the second's rows are multiplied with to be as large as the first's."""
    return (first / second) ** 0.5 if first > 0 and second > 0 else 1.0
