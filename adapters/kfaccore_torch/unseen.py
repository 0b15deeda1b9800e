"""Gradients that no captured call explains: an error, unless another rank called the layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from kfaccore_torch.step import Engine


def check_seen(engine: Engine, records: Mapping[str, Any], grads: Mapping[str, Any]) -> None:
    """ValueError for a gradient that no captured call explains: it would keep an old batch's curvature. Where gradients
    are sums over ranks, a call on any of them explains it on those that did not call the layer at all."""
    missing = [name for name in grads if name not in records and _nonzero(grads[name])]
    if engine.partly:  # then all ranks are here
        there = _called_on_ranks(engine, records)
        missing = [name for name in missing if name in engine.called or name not in there]
    aside = [name for name in missing if name in engine.called]
    if not missing:
        return
    text = (
        f"layers {aside} have a gradient and were called, but do not lie behind the prediction of this loss: "
        f"another term has a prediction of its own. Form its loss by pre.loss too, whose curvature is added, or "
        f"give one kfaccore.Joint of both; or skip those parameters"
    )
    if not aside:
        text = (
            f"layer {missing[0]!r} has a gradient but none of its calls was captured"
            f"{f' (nor of {missing[1:]})' if missing[1:] else ''}: was the model run inside capture(), and is "
            f"checkpointing non-reentrant (use_reentrant=False)?"
        )
    error = ValueError(text)
    engine.leave_word(error)
    raise error


def _called_on_ranks(engine: Engine, records: Mapping[str, Any]) -> set[str]:
    """Layers of which some rank has records."""
    names = sorted(engine.plan.layers)
    counts = engine.core.comm.all_reduce([np.array([name in records for name in names], np.float64)])[0]
    return {name for name, count in zip(names, counts.tolist(), strict=True) if count}


def _nonzero(grad: Any) -> bool:
    return bool((getattr(grad, "g", grad) != 0).any())
