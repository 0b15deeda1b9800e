"""Rows of a table that a call looked up: one an output row, or in a bag several, each counted as it is in it."""

from __future__ import annotations

import torch

from kfaccore_torch.bags import padded
from kfaccore_torch.calls import Call
from kfaccore_torch.places import Place, Together


def looked_up(
    size: int, call: Call, g: torch.Tensor, place: Place, exists: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Tokens (examples, positions), gradients at their rows (draws, examples, positions, d), and which of them exist.

    g        (draws, *output shape), features last, of a table of `size` rows
    exists   (examples, positions) of the outputs
    """
    g = each(g.reshape(len(g), *place.rows, g.shape[-1]), place)
    factor = call.options.get("factor")
    if factor is None:
        index = place.put(call.x.reshape(*call.rows, 1))[..., 0].to(g.device)
    elif isinstance(place, Together) and place.like is None:  # rows in their own order: no bag is padded
        bags = call.options["bags"]
        index = call.x[None]
        g = g[:, :, bags] * factor.to(g)[:, None]
        exists = existing(None if exists is None else exists[:, bags], factor[None] != 0)
    else:
        tokens, factor = padded(call)
        index = place.put(tokens)
        counts = place.put(factor.to(g)).flatten(1)
        g = (g[..., None, :] * counts.reshape(*index.shape, 1)).flatten(2, 3)
        exists = None if exists is None else exists.repeat_interleave(index.shape[-1], 1)
        exists = existing(exists, counts != 0)
        index = index.flatten(1)
    padding = call.options.get("padding_idx")
    if padding is not None:
        exists = existing(exists, index != padding % size)
    return index, g, exists


def each(g: torch.Tensor, place: Place) -> torch.Tensor:
    """Draws apart: of one draw a view."""
    if len(g) == 1:
        return place.put(g[0])[None]
    return torch.stack([place.put(x) for x in g]) if len(g) else place.put(g)


def existing(first: torch.Tensor | None, second: torch.Tensor | None) -> torch.Tensor | None:
    """What exists by both, None for all."""
    if first is None or second is None:
        return first if second is None else second
    return first & second
