"""What waits between a loss and the step: statistics, or copies of rows where the step needs rows.

A loss leaves nothing until it is differentiated. Stats are sums; their shares n of the normaliser are settled at the
step, when it is known how many losses and micro-batches there were.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

import kfaccore as kf
from kfaccore import tree
from kfaccore.method import RowsAtSolve, declares

Array = Any


@dataclass
class Shot:
    """One captured forward.

    n         its share of the normaliser, 0 where nothing in it counts
    total     whether its loss is a sum, whose n all micro-batches share
    found     layer -> Records or Stats, one a loss that was differentiated
    void      why nothing in it counts
    """

    n: float = 0.0
    total: bool = False
    found: dict[str, list[Any]] = field(default_factory=dict)
    void: str = ""
    used: bool = False


def gathered(shots: list[Shot], world: int) -> dict[str, list[Any]]:
    """{layer: Records or Stats} of one update, whose shares add up to the normaliser of all that was seen.

    A layer that some forwards did not reach counts them all the same: their examples have J = 0 there. Several losses
    on one forward count it once. A sum over everything has n = 1, whatever the number of parts and ranks.
    """
    counted = [shot for shot in shots if shot.n > 0]
    all_n = sum(shot.n for shot in counted)
    parts = len(counted) * world if counted and counted[0].total else 1
    records: dict[str, list[Any]] = {}
    for name in dict.fromkeys(name for shot in counted for name in shot.found):
        here = [shot for shot in counted if name in shot.found]
        times = all_n / sum(shot.n for shot in here) / parts
        for shot in here:
            given = shot.found[name]
            records.setdefault(name, []).extend(weighted(x, times / len(given)) for x in given)
    return records


def weighted(x: Any, factor: float) -> Any:
    """A Record or Stats with its n times `factor`."""
    if factor == 1.0:
        return x
    if isinstance(x, kf.Record):
        return replace(x, n=x.n * factor)
    leaves = {path: leaf * factor if path.split("/")[-1] == "n" else leaf for path, leaf in tree.items(x)}
    return _rebuilt(x, iter(leaves.values()))


def _rebuilt(x: Any, leaves: Any) -> Any:
    inner = tree.children(x)
    return next(leaves) if inner is None else tree.rebuild(x, [_rebuilt(child, leaves) for _, child in inner])


def needs_rows(core: kf.Preconditioner, name: str, covered: Any) -> bool:
    """Whether the step itself looks at the rows of a layer."""
    if core.rule.needs_records or name in covered:
        return True
    return declares(method_of(core, name), RowsAtSolve)


def method_of(core: kf.Preconditioner, name: str) -> Any:
    """The method of a layer."""
    return core.methods[name] if isinstance(core.methods, Mapping) else core.methods


def measured(core: kf.Preconditioner, state: Any, name: str, record: kf.Record) -> Any:
    """Stats of one record, as the step would measure them; nothing in them is a view of it."""
    hyper = core.schedules.hyper(name, state.step)
    with np.errstate(all="ignore"):
        stats = method_of(core, name).measure(state.layers[name], record, hyper)
    return tree.map(lambda leaf: copied(leaf) if _is_view(leaf) else leaf, stats)


def copied(x: Any) -> Any:
    """An array of its own."""
    if isinstance(x, torch.Tensor):
        return x.clone()
    return x.copy() if hasattr(x, "copy") and hasattr(x, "dtype") else x


def kept(record: kf.Record) -> kf.Record:
    """A record that shares no memory."""
    return tree.map(copied, record)


def _is_view(x: Any) -> bool:
    if isinstance(x, torch.Tensor):
        return True
    return isinstance(x, np.ndarray) and not x.flags.owndata and x.base is not None
