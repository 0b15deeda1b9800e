"""Draws of a batch at the outputs of its calls, as records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

import kfaccore as kf
from kfaccore_torch.arriving import Made, arriving, waiting
from kfaccore_torch.capture import Capture
from kfaccore_torch.folded import as_examples
from kfaccore_torch.inside import check_grad
from kfaccore_torch.layout import bounded, place_of
from kfaccore_torch.masks import Told
from kfaccore_torch.observe import Observed
from kfaccore_torch.probe import probe
from kfaccore_torch.pulled import alike, all_pulled, by_layer, remembering
from kfaccore_torch.rows import check_unwritten, record
from kfaccore_torch.share import Part, parts

if TYPE_CHECKING:
    from kfaccore_torch.step import Engine

MOST_BYTES = 8 * 2**30  # of type2 draws at the outputs of all layers


@dataclass(frozen=True)
class Batch:
    """A prediction, its target, what the caller tells of its rows, and the examples' places in the dataset."""

    f: Any
    target: Any
    told: Told
    ids: torch.Tensor | None = None


class Drawn(NamedTuple):
    """Records of the draws, what was observed of the calls, and records of the same rows with the last draw that the
    caller pulled."""

    records: dict[str, kf.Record]
    observed: Observed
    own: dict[str, kf.Record]


def drawn(
    engine: Engine,
    seen: Capture,
    batch: Batch,
    turn: int,
    n: float,
    exact: bool = False,
    given: Any = None,
    times: float = 1.0,
    more: Callable[[Observed], Sequence[torch.Tensor | None]] | None = None,
) -> Drawn:
    """One record a layer that was called, from draws backpropagated to the edges; `.grad` is never touched.

    n      of the records
    exact  rows that mix examples make one example, so that `dense` has the right mean; else only where the layer's
           method needs that (`layout.stands_together`), and elsewhere they stand as their shape suggests
    given  draws (draws, *f.shape) instead of those of the settings, or a list of them a head
    times  factor on the draws
    more   a draw that the caller pulls: gradients of the training loss at the outputs of the observed calls, for
           records of their own, whose n is therefore over its share
    """
    if engine.settings.draws_on < 1:
        raise ValueError("records are of a whole batch: leave draws_on at 1")
    heads, observed, draws, _ = _asked(engine, seen, batch, turn, given, times)
    found = _whole(engine, heads, observed, draws, partial(_record, engine, batch, n, exact), more)
    batch.told.check(set(found.records), set(seen.calls))
    if more is None:
        return found
    # of the draws, whose n the own gradients have too; where nothing counts they are zeros of any n
    unit = (engine.share(batch) or 1.0) * times * times
    return found._replace(own={name: replace(own, n=n / unit) for name, own in found.own.items()})


def measured(
    engine: Engine, seen: Capture, batch: Batch, turn: int, n: float, times: float = 1.0, copies: bool = True
) -> tuple[dict[str, Any], Observed]:
    """What waits for the step, by layer, in the place of the records of `drawn`: Stats, or where the step needs rows
    those, copied if `copies`. Of one draw nothing is kept but what is made of it, the moment it exists."""
    heads, observed, draws, part = _asked(engine, seen, batch, turn, None, times)
    made: Made = partial(_record, engine, batch, n, False)
    if part is not None:
        draws = part.alone(draws)
        made = partial(_in_part, part, partial(_record, engine, batch, n / part.parts, False))
    if len(draws[0]) == 1:
        found, observed = arriving(engine, observed, heads, [v[0] for v in draws], made, copies)
        batch.told.check(set(found), set(seen.calls))
        return found, observed
    whole = _whole(engine, heads, observed, draws, made)
    batch.told.check(set(whole.records), set(seen.calls))
    return waiting(engine, whole.records, copies), whole.observed


def _whole(
    engine: Engine,
    heads: list[torch.Tensor],
    observed: Observed,
    draws: list[torch.Tensor],
    made: Made,
    more: Callable[[Observed], Sequence[torch.Tensor | None]] | None = None,
) -> Drawn:
    """Records of all draws at once, and of the one that `more` pulls."""
    layers = engine.plan.layers
    grads = all_pulled(engine, heads, observed, draws)
    observed = engine.observer.again(observed, layers, heads, grads)
    last = None if more is None else alike(more(observed), observed, grads)
    if last is not None:
        observed = remembering(engine.observer.again(observed, layers, heads, last))
    with observed.quiet.around():
        records = {name: made(observed, name, parts) for name, parts in by_layer(observed, grads).items()}
        if last is None:
            return Drawn(as_examples(engine, records, False), observed, {})
        own = {name: made(observed, name, parts, records[name]) for name, parts in by_layer(observed, last).items()}
    return Drawn(as_examples(engine, records, True), observed, own)


def _asked(
    engine: Engine, seen: Capture, batch: Batch, turn: int, given: Any, times: float
) -> tuple[list[torch.Tensor], Observed, list[torch.Tensor], Part | None]:
    """Heads, what is observed of the calls behind them, the draws at each head, and the part of the batch that counts;
    None for all of it. Draws are the same whatever part it is."""
    heads = _checked(engine.objective.heads(batch.f))
    sight = engine.sight(seen, heads)
    layers = engine.plan.layers
    for name, calls in seen.calls.items():
        for call in calls:
            check_unwritten(layers[name], call)
    observed = engine.observer.look(sight, layers, heads, batch.told, lambda: probe(engine, heads, batch))
    observed = bounded(engine.core, observed)
    rank = [engine.core.comm.rank] if engine.core.comm.rank else []
    rng = np.random.default_rng([engine.settings.seed, engine.state.step, turn, *rank])
    draws = _draws(engine, heads, observed, batch, rng, given, times)
    many = parts(engine.settings.draws_on)
    return heads, observed, draws, Part.drawn(observed.split, many, rng) if many > 1 else None


def _draws(
    engine: Engine,
    heads: list[torch.Tensor],
    observed: Observed,
    batch: Batch,
    rng: np.random.Generator,
    given: Any,
    times: float,
) -> list[torch.Tensor]:
    """Draws at the prediction, (draws, *shape) a head: those `given`, or of the settings."""
    fisher = engine.settings.fisher
    draws = given
    if fisher is kf.type2 and given is None:
        _check_room(heads, observed)
    if draws is None:
        draws = engine.objective.draws(fisher, engine.settings.draws, batch.f, batch.target, rng, observed.split)
    draws = list(draws) if isinstance(draws, list | tuple) else [draws]
    draws = draws if times == 1 else [v * times for v in draws]
    if observed.mixing and fisher in (kf.type2, kf.empirical) and given is None:
        _check_own(engine, observed)
        draws = _signed(draws, observed, rng)
    return draws


def _record(
    engine: Engine,
    batch: Batch,
    n: float,
    exact: bool,
    observed: Observed,
    name: str,
    parts: dict[int, torch.Tensor],
    like: kf.Record | None = None,
) -> kf.Record:
    """The record of a layer from the draws at its calls that they reached, by the number of the call; with the rows of
    the record it is `like`."""
    blocks = {} if exact else engine.blocks()
    masked = batch.told.mask is not None or bool(batch.told.masks)
    calls = [observed.calls[i][1] for i in sorted(parts)]
    places = [place_of(engine.core, blocks, observed, i, exact, masked) for i in sorted(parts)]
    masks = [batch.told.mask_of(name, place) for place in places]
    grads = [parts[i] for i in sorted(parts)]
    with engine.working():
        return record(engine.plan.layers[name], calls, grads, places, n, engine.namespace, masks, batch.ids, like)


def _in_part(
    part: Part, made: Made, observed: Observed, name: str, parts: dict[int, torch.Tensor], like: kf.Record | None = None
) -> kf.Record:
    """The record of a layer on a part of the batch. Rows that mix examples all take part: those of other examples have
    gradients too."""
    record = made(observed, name, parts, like)
    mixes = any(observed.owned[i].mixes for i in parts)
    return record if mixes or record.batch != part.split.examples else part.of(record)


def _check_own(engine: Engine, observed: Observed) -> None:
    if kf.own_gradients(engine.core):
        raise ValueError(
            f"rows of layers {sorted(observed.mixing)} mix examples or are shared by them, so per-example "
            f"gradients, which {engine.core.network or engine.core.methods} is made of, do not exist there: give those "
            f"layers another method, or skip them"
        )


def _checked(heads: list[torch.Tensor]) -> list[torch.Tensor]:
    """ValueError for predictions without a batch axis or without a graph."""
    check_grad()
    for f in heads:
        if f.ndim < 1 or not f.requires_grad:
            raise ValueError(
                f"the prediction has shape {tuple(f.shape)}, requires_grad={f.requires_grad}; need (batch, ...) with a "
                f"graph behind it"
            )
    return heads


def _check_room(heads: list[torch.Tensor], observed: Observed) -> None:
    """ValueError, before anything is allocated, for type2 draws that would not fit: one for every number of an example
    of the prediction, each as large as it and the outputs of all layers."""
    number = sum(f.numel() // max(1, observed.split.of(head).examples) for head, f in enumerate(heads))
    size = max(4, heads[0].element_size())
    found = number * size * (sum(f.numel() for f in heads) + sum(prod(call.shape) for _, call in observed.calls))
    if found > MOST_BYTES:
        raise ValueError(
            f"type2 takes {number:,} draws of this prediction of shape {tuple(heads[0].shape)}, one for every number "
            f"of an example, and as many backward passes: {found:,} bytes at the layers' outputs, and the most is "
            f"{MOST_BYTES:,} (kfaccore_torch.draw.MOST_BYTES). Take fisher=kfaccore.monte_carlo, which is unbiased for "
            f"it, smaller examples or batches, or hand draws of your own to kfaccore_torch.records(draws=...)"
        )


def _signed(draws: list[torch.Tensor], observed: Observed, rng: Any) -> list[torch.Tensor]:
    """Each example of each draw with a random sign of its own: products of two examples vanish in expectation."""
    signs = torch.from_numpy(rng.choice([-1.0, 1.0], (len(draws[0]), observed.split.examples)))
    found = []
    for head, v in enumerate(draws):
        own = signs[:, observed.split.owner(v.shape[1], head)].to(v)
        found.append(v * own.reshape(*own.shape, *(1,) * (v.ndim - 2)))
    return found
