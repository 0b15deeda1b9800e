"""Losses with weights on several ranks: F is the mean over ranks, as the gradient is, so every rank needs the same n.

Ranks of other sizes have measured with units of their own, as none knows those of others in time: what a rank has is
brought to the n of all, by the root of the ratio on its draws. Which sums in Stats go with draws, and which with inputs
alone, is seen of a row that is measured with draws of two sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import array_api_compat as aac
import numpy as np
import torch

import kfaccore as kf
from kfaccore_torch.bridge import to_core
from kfaccore_torch.collect import leaves, mapped
from kfaccore_torch.kinds import Tied
from kfaccore_torch.rows import absent

if TYPE_CHECKING:
    from kfaccore_torch.shots import Shot
    from kfaccore_torch.step import Engine

_FOUR = 4.0  # times the n, with draws of twice the size, at the second measure


def evened(engine: Engine, counted: Sequence[Shot], n: Any) -> float:
    """The n that every rank has where a rank's losses are parts by weights; 0 where none of them are. What `counted`
    here, with n in all, is brought to it. Every rank must ask."""
    if not engine.parted:
        return 0.0
    n = float(n)
    told = [np.array([n > 0, n], np.float64)]
    ranks, total = engine.core.comm.all_reduce(told)[0].tolist()
    if not ranks:
        return 0.0
    common = total / ranks
    if counted and not math.isclose(n, common, rel_tol=1e-12):
        for shot in counted:
            _bring(engine, shot, common / n)
    return common


def _bring(engine: Engine, shot: Shot, times: float) -> None:
    """A forward to so many times its n, of the same F."""
    shot.n = shot.n * times
    for loss in shot.losses:
        loss.found = {name: _brought(engine, name, x, times) for name, x in loss.found.items()}
        loss.value = None if loss.value is None else loss.value * times


def _brought(engine: Engine, name: str, x: Any, times: float) -> Any:
    """Stats, or the Record that waits in their place, of so many times the n and the same F."""
    if isinstance(x, kf.Record):
        g = x.g * times**0.5
        if engine.core.rule.wants_own and not isinstance(engine.plan.layers[name].kind, Tied):
            # the last is the loss's own gradient, which is over n
            g = aac.array_namespace(g).concat([g[:-1, ...], x.g[-1:, ...] * times], axis=0)
        return replace(x, g=g, n=x.n * times)
    sums = iter(_of_draws(engine, name))
    return mapped(lambda _, leaf: leaf * times if next(sums) else leaf, x)


def _of_draws(engine: Engine, name: str) -> list[bool]:
    """Which leaves of a layer's Stats grow as draws squared and n do; a leaf that is zero either way does not matter,
    as a state that has no use for it measures none."""
    layer = engine.plan.layers[name]
    noise = torch.Generator().manual_seed(0)

    def random(x: Any) -> Any:
        return to_core(torch.randn(*x.shape, generator=noise).to(engine.like), engine.namespace)

    with torch.no_grad(), engine.working():
        nothing = absent(layer, 1.0, engine.like, engine.namespace)
        a = nothing.a if isinstance(nothing.a, kf.Ids) else random(nothing.a)
        row = kf.Record(a, random(nothing.g), 1.0)
        more = replace(row, g=row.g * _FOUR**0.5, n=_FOUR)
        small, large = (kf.measured_together(engine.core, engine.state, {name: r})[name] for r in (row, more))
    sizes = zip(map(_size, leaves(small)), map(_size, leaves(large)), strict=True)
    return [after > before * _FOUR**0.5 for before, after in sizes]


def _size(leaf: Any) -> float:
    return float(abs(leaf * 1.0).sum()) if hasattr(leaf, "dtype") else abs(float(leaf))
