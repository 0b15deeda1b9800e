"""The loss's own output gradients, by example, for rules that leave examples out of the model of their direction."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

import kfaccore as kf
from kfaccore_torch.batch import mean
from kfaccore_torch.draw import asked, at_calls, by_layer, whole_record

if TYPE_CHECKING:
    from kfaccore_torch.capture import Capture
    from kfaccore_torch.draw import Batch
    from kfaccore_torch.gradients import Backward
    from kfaccore_torch.observe import Observed
    from kfaccore_torch.step import Engine


def own_draw(engine: Engine, value: torch.Tensor, batch: Batch, times: float = 1.0) -> list[torch.Tensor] | None:
    """Gradients of the per-example loss at the prediction's heads, (1, *f.shape) each, from the training loss itself:
    whatever its labels are, the gradient is the sum of theirs over n. For loops that differentiate the loss themselves;
    None where the rule has no use for them."""
    if not engine.core.rule.wants_own:
        return None
    heads = engine.objective.heads(batch.f)
    share = engine.share(batch) * times
    found = torch.autograd.grad(value, heads, retain_graph=True, allow_unused=True)
    return [(torch.zeros_like(f) if g is None else g.detach() * share)[None] for g, f in zip(found, heads, strict=True)]


def with_own(
    engine: Engine, seen: Capture, batch: Batch, n: float, pull: Callable[[Observed], Sequence[torch.Tensor | None]]
) -> tuple[dict[str, kf.Record], dict[str, kf.Record], Observed]:
    """As `drawn`, and records of the same rows with the gradients that `pull` gives at the outputs of the observed
    calls: those of the training loss, whose n is therefore over its share."""
    heads, observed, draws = asked(engine, seen, batch, 0, None, 1.0, None)
    layers = engine.plan.layers
    grads = at_calls(engine, heads, observed, draws)
    observed = engine.observer.again(observed, layers, heads, grads)
    last = _alike(pull(observed), grads, observed)
    observed = engine.observer.again(observed, layers, heads, last)
    records = by_layer(observed, grads, partial(whole_record, engine, batch, n, False))
    batch.told.check(set(records), set(seen.calls))
    own = partial(whole_record, engine, batch, n / engine.share(batch), False, like=records)
    return records, by_layer(observed, last, own), observed


def _alike(
    last: Sequence[torch.Tensor | None], grads: Sequence[torch.Tensor | None], observed: Observed
) -> list[torch.Tensor | None]:
    """A last draw, (1, *shape) a call: of the calls that the others reach, so that rows are the same."""
    found: list[torch.Tensor | None] = []
    for x, g, (_, call) in zip(last, grads, observed.calls, strict=True):
        if g is None:
            found.append(None)
        else:
            found.append(torch.zeros_like(g[:1]) if x is None else call.of_parameter(x[None]))
    return found


def parted(records: Mapping[str, kf.Record], mixing: set[str]) -> tuple[dict[str, kf.Record], dict[str, kf.Record]]:
    """(draws, own) of records whose last draw is the loss's own; layers whose rows mix examples have none."""
    drawn = {name: replace(record, g=record.g[:-1, ...]) for name, record in records.items()}
    own = {name: replace(record, g=record.g[-1:, ...]) for name, record in records.items() if name not in mixing}
    return drawn, own


def recorded(
    engine: Engine, seen: Capture, batch: Batch, backward: Backward, n: float
) -> tuple[dict[str, Any] | None, dict[str, kf.Record], Observed | None]:
    """Records, or Stats of them, where the step needs them; the same rows with the loss's own gradients where its rule
    wants them; and what was observed of the calls."""
    if not engine.due or n <= 0:
        return {} if engine.due else None, {}, None
    if engine.core.rule.wants_own:
        records, own, observed = with_own(engine, seen, batch, n, backward.outputs)
        engine.mixing |= observed.mixing
        return records, {name: record for name, record in own.items() if name not in engine.mixing}, observed
    if engine.core.rule.needs_records:
        records, observed = engine.records(seen, batch, 0, n)
        return records, {}, observed
    found, observed = engine.measured(seen, batch, 0, n, copies=False)
    return found, {}, observed


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


def mean_loss(engine: Engine, values: Sequence[tuple[float, float]]) -> float | None:
    """The loss of a batch on all ranks, from n of each forward, counted once, and n value of its losses, which add up
    as they are where the loss is a sum; None where no rule asks for it."""
    if not engine.core.rule.wants_own or not engine.due:
        return None
    total = sum(n for n, _ in values)
    value = sum(value for _, value in values)
    value = value if engine.objective.total else value / total if total else 0.0
    return mean(engine, value, total)
