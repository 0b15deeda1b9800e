"""Draws at the outputs of the calls: pulled back from the prediction, stacked, and by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from kfaccore_torch.observe import Observed
from kfaccore_torch.passes import passing
from kfaccore_torch.unusual import dense

if TYPE_CHECKING:
    from kfaccore_torch.step import Engine


def pulled(heads: list[torch.Tensor], observed: Observed, v: Sequence[torch.Tensor]) -> tuple:
    """One draw at the outputs of all calls."""
    edges = [call.edge for _, call in observed.calls]
    given = [x.to(f) for x, f in zip(v, heads, strict=True)]
    with passing(observed.quiet):
        found = torch.autograd.grad(heads, edges, given, retain_graph=True, allow_unused=True)
    return tuple(g if g is None else dense(g) for g in found)


def all_pulled(
    engine: Engine, heads: list[torch.Tensor], observed: Observed, draws: list[torch.Tensor]
) -> list[torch.Tensor | None]:
    """All draws at the outputs of all calls, (draws, *shape) each."""
    rows = [pulled(heads, observed, lowered(observed, v)) for v in zip(*draws, strict=True)]
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(observed.calls)
    pairs = zip(columns, observed.calls, strict=True)
    return [raised(observed, _stacked(column, call, engine.like.dtype)) for column, (_, call) in pairs]


def lowered(observed: Observed, v: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """A draw as it is to be pulled, so that no hook on the way clips it."""
    return v if observed.times == 1 else [x * observed.times for x in v]


def raised(observed: Observed, g: torch.Tensor | None) -> torch.Tensor | None:
    """What a draw that was `lowered` moved, as the draw itself does."""
    return g if observed.times == 1 or g is None else g / observed.times


def _stacked(column: tuple, call: Any, dtype: torch.dtype) -> torch.Tensor | None:
    """Draws of one call, (draws, *shape); None where it does not reach the prediction."""
    if not column:
        return torch.zeros((0, *call.shape), dtype=dtype, device=call.x.device)
    if column[0] is None:
        return None
    return call.of_parameter(column[0][None] if len(column) == 1 else torch.stack(column))


def alike(
    last: Sequence[torch.Tensor | None], observed: Observed, grads: Sequence[torch.Tensor | None]
) -> list[torch.Tensor | None]:
    """A last draw, (1, *shape) a call: of those that the others reach, so that rows are the same."""
    found: list[torch.Tensor | None] = []
    for x, g, (_, call) in zip(last, grads, observed.calls, strict=True):
        found.append(None if g is None else torch.zeros_like(g[:1]) if x is None else call.of_parameter(x[None]))
    return found


def by_layer(observed: Observed, grads: Sequence[torch.Tensor | None]) -> dict[str, dict[int, torch.Tensor]]:
    """Gradients of the calls that the draws reached, by layer and number of the call."""
    found: dict[str, dict[int, torch.Tensor]] = {}
    for i, ((name, _), g) in enumerate(zip(observed.calls, grads, strict=True)):
        if g is not None:
            found.setdefault(name, {})[i] = g
    return found


def remembering(observed: Observed) -> Observed:
    """With normalised inputs that are computed once for all records of a call."""
    calls = []
    for name, call in observed.calls:
        known = None if call.normalised is None else cache(call.normalised)
        calls.append((name, replace(call, normalised=known)))
    return replace(observed, calls=tuple(calls))
