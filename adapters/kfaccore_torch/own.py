"""The loss's own output gradients, by example, for rules that leave examples out of the model of their direction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

import kfaccore as kf

if TYPE_CHECKING:
    from kfaccore_torch.capture import Capture
    from kfaccore_torch.draw import Batch
    from kfaccore_torch.observe import Observed
    from kfaccore_torch.step import Engine


def own_draw(engine: Engine, value: torch.Tensor, batch: Batch, times: float = 1.0) -> list[torch.Tensor] | None:
    """Gradients of the per-example loss at the prediction's heads, (1, *f.shape) each, from the training loss itself:
    whatever its labels are, the gradient is the sum of theirs over n. None where the rule has no use for them."""
    if not engine.core.rule.wants_own:
        return None
    heads = engine.objective.heads(batch.f)
    share = engine.share(batch) * times
    found = torch.autograd.grad(value, heads, retain_graph=True, allow_unused=True)
    return [(torch.zeros_like(f) if g is None else g.detach() * share)[None] for g, f in zip(found, heads, strict=True)]


def parted(records: Mapping[str, kf.Record], mixing: set[str]) -> tuple[dict[str, kf.Record], dict[str, kf.Record]]:
    """(draws, own) of records whose last draw is the loss's own; layers whose rows mix examples have none."""
    drawn = {name: replace(record, g=record.g[:-1, ...]) for name, record in records.items()}
    own = {name: replace(record, g=record.g[-1:, ...]) for name, record in records.items() if name not in mixing}
    return drawn, own


def recorded(
    engine: Engine, seen: Capture, batch: Batch, value: torch.Tensor, n: float
) -> tuple[dict[str, Any] | None, dict[str, kf.Record], Observed | None]:
    """Records, or Stats of them, where the step needs them; the same rows with the loss's own gradients where its rule
    wants them; and what was observed of the calls."""
    if not engine.due or n <= 0:
        return {} if engine.due else None, {}, None
    more = own_draw(engine, value, batch)
    if more is None and not engine.core.rule.needs_records:
        found, observed = engine.measured(seen, batch, 0, n, copies=False)
        return found, {}, observed
    records, observed = engine.records(seen, batch, 0, n, more=more)
    drawn, own = parted(records, engine.mixing) if more else (records, {})
    return drawn, own, observed


def own_apart(
    engine: Engine, records: dict[str, Any] | None
) -> tuple[dict[str, Any] | None, dict[str, list[kf.Record]]]:
    """As `parted`, of what waited for a step."""
    if records is None or not engine.core.rule.wants_own:
        return records, {}
    mixing = engine.mixing
    pairs = {name: [parted({name: record}, mixing) for record in given] for name, given in records.items()}
    drawn = {name: [drawn[name] for drawn, _ in found] for name, found in pairs.items()}
    return drawn, {name: [own[name] for _, own in found] for name, found in pairs.items() if name not in mixing}


def mean_loss(values: Sequence[tuple[float, float]]) -> float | None:
    """The loss of a batch from (n, value) of its micro-batches; None of none."""
    total = sum(n for n, _ in values)
    return sum(n * value for n, value in values) / total if total else None
