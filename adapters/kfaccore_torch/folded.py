"""Draws as examples: of a tied table what goes in is drawn too, so that a record of several draws has one of so many
times the examples. A method that takes layers together is given all of them so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import array_api_compat as aac

import kfaccore as kf
from kfaccore_torch.kinds import Tied

if TYPE_CHECKING:
    from kfaccore_torch.step import Engine


def as_examples(engine: Engine, records: Mapping[str, kf.Record], own: bool) -> dict[str, kf.Record]:
    """Records of which those that a network-level method takes with a tied table have one draw; F is the same.

    Raises ValueError where the loss's `own` gradients, of the examples themselves, go with them.
    """
    found = dict(records)
    if engine.core.network is None or all(record.draws < 2 for record in found.values()):
        return found
    names = found.keys() & engine.core.assigned.together(engine.blocks()).keys()
    tied = [name for name in names if isinstance(engine.plan.layers[name].kind, Tied)]
    if tied and own:
        raise ValueError(
            f"layer {tied[0]!r} is table and output layer, and {engine.core.rule} compares examples with their draws, "
            f"of which {engine.core.network} then takes one: pass fisher=kfaccore.monte_carlo and draws=1"
        )
    return found | {name: _folded(found[name]) for name in names} if tied else found


def _folded(record: kf.Record) -> kf.Record:
    """One draw of draws x batch examples, a draw's behind each other."""
    draws, blocks, batch, shared, d = record.g.shape
    if draws < 2:
        return record
    xp = aac.array_namespace(record.g)
    g = xp.reshape(xp.permute_dims(record.g, (1, 0, 2, 3, 4)), (1, blocks, draws * batch, shared, d))
    a: Any = record.a.unfold() if isinstance(record.a, kf.Patches) else record.a
    if isinstance(a, kf.Ids):
        a = kf.Ids(xp.concat([a.index] * draws, axis=0), a.size)
    else:
        a = xp.concat([a] * draws, axis=1)
    mask = None if record.mask is None else xp.concat([record.mask] * draws, axis=0)
    return kf.Record(a, g, record.n, mask=mask)
