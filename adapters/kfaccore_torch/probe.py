"""The draw that a question of whose row is whose begins with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

import kfaccore as kf
from kfaccore_torch.bridge import HALF

if TYPE_CHECKING:
    from kfaccore_torch.draw import Batch
    from kfaccore_torch.step import Engine


def probe(engine: Engine, heads: list[torch.Tensor], batch: Batch) -> tuple[Any, tuple]:
    """The loss's own gradient as the first draw of a question, if it moves every row: what it gives the parameters
    is then known too. Else nothing, and the question is asked with random numbers."""
    if batch.f is None or engine.core.comm.world > 1 or heads[0].dtype in HALF:
        return None, ()
    try:
        own = engine.objective.draws(kf.empirical, 1, batch.f, batch.target, None)
    except (ValueError, TypeError, AttributeError):  # soft labels, or none
        return None, ()
    own = [v[0] for v in (own if isinstance(own, list) else [own])]
    n = engine.objective.share(batch.f, batch.target)
    if not n or not all(bool((v != 0).all()) and bool(v.isfinite().all()) for v in own):
        return None, ()
    trained = engine.plan.trained
    return [v / n for v in own], trained if all(p.requires_grad for p in trained) else ()
