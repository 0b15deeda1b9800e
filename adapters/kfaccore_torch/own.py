"""The loss's own output gradients, by example, for rules that leave examples out of the model of their direction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

import kfaccore as kf

if TYPE_CHECKING:
    from kfaccore_torch.draw import Batch
    from kfaccore_torch.step import Engine


def own_draw(engine: Engine, value: torch.Tensor, batch: Batch) -> list[torch.Tensor]:
    """Gradients of the per-example loss at the prediction's heads, (1, *f.shape) each, from the training loss itself:
    whatever its labels are, the gradient is the sum of theirs over n."""
    heads = engine.objective.heads(batch.f)
    share = engine.share(batch)
    found = torch.autograd.grad(value, heads, retain_graph=True, allow_unused=True)
    return [(torch.zeros_like(f) if g is None else g.detach() * share)[None] for g, f in zip(found, heads, strict=True)]


def parted(records: Mapping[str, kf.Record], mixing: set[str]) -> tuple[dict[str, kf.Record], dict[str, kf.Record]]:
    """(draws, own) of records whose last draw is the loss's own; layers whose rows mix examples have none."""
    drawn = {name: replace(record, g=record.g[:-1, ...]) for name, record in records.items()}
    own = {name: replace(record, g=record.g[-1:, ...]) for name, record in records.items() if name not in mixing}
    return drawn, own


def own_apart(
    records: Mapping[str, Sequence[kf.Record]] | None, mixing: set[str]
) -> tuple[dict[str, list[kf.Record]] | None, dict[str, list[kf.Record]]]:
    """As `parted`, of micro-batches."""
    if records is None:
        return None, {}
    pairs = {name: [parted({name: record}, mixing) for record in given] for name, given in records.items()}
    drawn = {name: [drawn[name] for drawn, _ in found] for name, found in pairs.items()}
    return drawn, {name: [own[name] for _, own in found] for name, found in pairs.items() if name not in mixing}


def mean_loss(values: Sequence[tuple[float, float]]) -> float | None:
    """The loss of a batch from (n, value) of its micro-batches; None of none."""
    total = sum(n for n, _ in values)
    return sum(n * value for n, value in values) / total if total else None
