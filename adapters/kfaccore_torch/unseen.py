"""Gradients that no captured call explains: an error, unless another rank called the layer, or the loss itself, or a
term of it that was declared, is seen to use the parameters: these have no curvature here, and keep their gradients."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.autograd.graph import get_gradient_edge

from kfaccore_torch.rows import absent
from kfaccore_torch.uncounted import taking

if TYPE_CHECKING:
    from kfaccore_torch.step import Engine


def completed(
    engine: Engine, records: Mapping[str, Any], grads: dict[str, Any], n: float, plainly: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Records and gradients of one step, n its share: a layer that no example reached, such as an expert without
    tokens, is left as it is, or counts with J = 0 where other ranks or layers wait for it. One that is behind no
    prediction, but in the loss by itself, is left out `plainly`, to have its plain gradient, or an error."""
    aside = alone(engine, records, grads, plainly)
    engine.plainly = (engine.plainly - records.keys()) | aside
    grads = {name: g for name, g in grads.items() if name not in aside}
    check_seen(engine, records, grads)
    missing = [name for name in grads if name not in records]
    together = engine.core.network.covers(engine.blocks()) if engine.core.network is not None else ()
    found = dict(records)
    with engine.working():
        for name in missing:
            if engine.core.comm.world > 1 or name in together:
                share = taking(n * engine.settings.draws_on)
                found[name] = absent(engine.plan.layers[name], share, engine.like, engine.namespace)
    return found, {name: g for name, g in grads.items() if name in found}


def check_seen(engine: Engine, records: Mapping[str, Any], grads: Mapping[str, Any]) -> None:
    """ValueError for a gradient that no captured call explains: it would keep an old batch's curvature. Where gradients
    are sums over ranks, a call on any of them explains it on those that did not call the layer at all."""
    missing = [name for name in grads if name not in records and _nonzero(grads[name])]
    if engine.partly:  # then all ranks are here
        there = _called_on_ranks(engine, records)
        # where nothing was differentiated here at all, what was called was in a batch that does not count
        missing = [name for name in missing if (records and name in engine.called) or name not in there]
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
            f"checkpointing non-reentrant (use_reentrant=False)? Where a term of the loss alone uses it, declare that: "
            f"pre.extra(term)"
        )
    error = ValueError(text)
    engine.leave_word(error)
    raise error


def within(engine: Engine, term: torch.Tensor, heads: Sequence[torch.Tensor]) -> set[str]:
    """Layers of which a loss uses parameters by itself: on its way back to the `heads`, and not behind them."""
    met: set[Any] = {get_gradient_edge(f).node for f in heads if f.requires_grad}
    waiting = [get_gradient_edge(term).node] if term.requires_grad else []
    leaves: set[int] = set()
    while waiting:
        node = waiting.pop()
        if node in met:
            continue
        met.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        waiting.extend(before for before, _ in node.next_functions if before is not None)
    if not leaves:  # as of most losses
        return set()
    layers = engine.plan.layers.items()
    return {name for name, layer in layers if any(id(p) in leaves for p in layer.parameters.values())}


def alone(engine: Engine, records: Mapping[str, Any], grads: Mapping[str, Any], plainly: bool) -> set[str]:
    """Layers with a gradient that the loss, or a declared term, uses and no prediction does, named once where they have
    their gradients `plainly`; else a ValueError, and on several ranks, of which another may have a prediction."""
    names = sorted(engine.beyond & (grads.keys() - records.keys()) - engine.called)  # a call may have a prediction
    if not names:
        return set()
    paths = [path for name in names for path in engine.plan.layers[name].paths.values()]
    what = f"parameters {paths} are used by the loss, or by a term of it, and are behind no prediction"
    if not plainly or engine.core.comm.world > 1:
        error = ValueError(
            f"{what}: they have no curvature here, and no rule sets their rate. Give them an optimizer of their own: "
            f"Optimizer(..., rest=torch.optim.Adam, skip={tuple(paths)}); or take a Preconditioner with the same skip, "
            f"which leaves their gradients as they are"
        )
        engine.leave_word(error)
        raise error
    if not engine.plainly.issuperset(names):
        warnings.warn(f"{what}: they have no curvature, and keep their plain gradients", stacklevel=2)
    return set(names)


def _called_on_ranks(engine: Engine, records: Mapping[str, Any]) -> set[str]:
    """Layers of which some rank has records."""
    names = sorted(engine.plan.layers)
    counts = engine.core.comm.all_reduce([np.array([name in records for name in names], np.float64)])[0]
    return {name for name, count in zip(names, counts.tolist(), strict=True) if count}


def _nonzero(grad: Any) -> bool:
    return bool((getattr(grad, "g", grad) != 0).any())
