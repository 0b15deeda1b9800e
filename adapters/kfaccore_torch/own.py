"""The loss's own output gradients, by example, for rules that leave examples out of the model of their direction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import array_api_compat as aac
import torch

import kfaccore as kf
from kfaccore_torch.arriving import waiting
from kfaccore_torch.batch import mean
from kfaccore_torch.beside import Quiet
from kfaccore_torch.kinds import Tied
from kfaccore_torch.passes import passing
from kfaccore_torch.pulled import pulled
from kfaccore_torch.uncounted import share_of_none, standing, taking

if TYPE_CHECKING:
    from kfaccore_torch.capture import Capture
    from kfaccore_torch.draw import Batch, Drawn
    from kfaccore_torch.gradients import Backward
    from kfaccore_torch.observe import Observed
    from kfaccore_torch.step import Engine


Pull = Callable[["Observed"], Sequence[torch.Tensor | None]]  # to the outputs of all calls


def own_draw(engine: Engine, value: torch.Tensor, batch: Batch) -> Pull | None:
    """What pulls the training loss back to the outputs of all calls, for loops that differentiate it themselves. None
    where the rule has no use for it."""
    if not engine.core.rule.wants_own:
        return None
    heads = engine.objective.heads(batch.f)
    with passing(Quiet(tuple(f for f in heads if f.retains_grad))):
        found = torch.autograd.grad(value, heads, retain_graph=True, allow_unused=True)
    own = [torch.zeros_like(f) if g is None else g.detach() for g, f in zip(found, heads, strict=True)]
    return lambda observed: pulled(heads, observed, own)


def recorded(
    engine: Engine, seen: Capture, batch: Batch, backward: Backward, n: float
) -> tuple[dict[str, kf.Record] | None, dict[str, kf.Record], Observed | None]:
    """Records where the step needs them, the same rows with the loss's own gradients where its rule wants them, and
    what was observed of the calls. Layers whose rows mix examples have no gradients by example."""
    if not engine.due or not standing(engine.objective.heads(batch.f)):
        return {} if engine.due else None, {}, None
    n = taking(n or share_of_none(engine))
    if not engine.core.rule.wants_own and not engine.core.rule.needs_records:
        found, observed = engine.measured(seen, batch, 0, n, copies=False)
        return found, {}, observed
    more = backward.outputs if engine.core.rule.wants_own else None
    records, observed, own = engine.records(seen, batch, 0, n, more=more)
    return records, {name: own[name] for name in own.keys() & apart(engine)}, observed


def apart(engine: Engine) -> set[str]:
    """Layers that have gradients by example: not where rows mix examples, and not tied tables, whose draws are so many
    times the examples."""
    return {name for name in engine.plan.layers.keys() - engine.mixing if not _tied(engine, name)}


def _tied(engine: Engine, name: str) -> bool:
    return isinstance(engine.plan.layers[name].kind, Tied)


def taken(
    engine: Engine, seen: Capture, batch: Batch, turn: int, n: float, times: float, value: torch.Tensor
) -> tuple[dict[str, Any], Observed]:
    """What waits for the step of one loss, with the loss's own gradients, as a last draw, where the rule wants them."""
    more = own_draw(engine, value, batch)
    n = taking(n)
    with torch.autocast(engine.device.type, enabled=False):  # draws go backward, which is not for it
        if more is None:
            return engine.measured(seen, batch, turn, n, times=times)
        drawn = engine.records(seen, batch, turn, n, times=times, more=more)
    return waiting(engine, together(engine, drawn)), drawn.observed


def together(engine: Engine, found: Drawn) -> dict[str, kf.Record]:
    """Records with the loss's own gradients, of one n with the draws, as a last draw, to wait for a step as one."""
    own = {name: record for name, record in found.own.items() if not _tied(engine, name)}
    return {name: _last(r, own[name]) if name in own else r for name, r in found.records.items()}


def _last(drawn: kf.Record, own: kf.Record) -> kf.Record:
    g = own.g * (drawn.n / own.n)
    return replace(drawn, g=aac.array_namespace(g).concat([drawn.g, g], axis=0))


def own_apart(
    engine: Engine, records: dict[str, Any] | None
) -> tuple[dict[str, Any] | None, dict[str, list[kf.Record]]]:
    """What waited `together` for a step, as (draws, own); layers whose rows mix examples have none of their own. What
    no example here reached is no list but one Record of J = 0, and has no share either."""
    if records is None or not engine.core.rule.wants_own:
        return records, {}
    whole = {name: given for name, given in records.items() if isinstance(given, kf.Record) or _tied(engine, name)}
    both = {name: given for name, given in records.items() if name not in whole}
    drawn = whole | {name: [replace(r, g=r.g[:-1, ...]) for r in given] for name, given in both.items()}
    each = {name: given for name, given in both.items() if name not in engine.mixing}
    none = {n: [r] for n, r in whole.items() if isinstance(r, kf.Record) and n in apart(engine)}
    return drawn, none | {name: [replace(r, g=r.g[-1:, ...]) for r in given] for name, given in each.items()}


def weighed(engine: Engine, n: float, value: torch.Tensor) -> float | None:
    """n value of a loss, 0 where nothing counts, whose mean is no number; None where no rule asks for it."""
    if not engine.core.rule.wants_own:
        return None
    return n * float(value.detach()) if n else 0.0


def mean_loss(engine: Engine, values: Sequence[float], total: float) -> float | None:
    """The loss of a batch on all ranks, from n value of its losses, which add up as they are where the loss is a sum,
    and n of the batch; None where no rule asks for it."""
    if not engine.core.rule.wants_own or not engine.due:
        return None
    value = sum(values)
    value = value if engine.objective.total else value / total if total else 0.0
    return mean(engine, value, total)
