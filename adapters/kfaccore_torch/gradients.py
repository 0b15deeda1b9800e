"""The core's gradients of a loss: of covered layers, Factored where that is cheaper, and of the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

import kfaccore as kf
from kfaccore.layers import Linear
from kfaccore_torch.bridge import detached, to_core
from kfaccore_torch.calls import Call
from kfaccore_torch.capture import Capture
from kfaccore_torch.draw import Batch
from kfaccore_torch.inside import check_grad
from kfaccore_torch.obeyed import hooked, obeyed
from kfaccore_torch.observe import Observed
from kfaccore_torch.places import Place, Together
from kfaccore_torch.rows import output_rows, rows
from kfaccore_torch.scaling import Scaler
from kfaccore_torch.step import Engine
from kfaccore_torch.unusual import dense


@dataclass(frozen=True)
class Wanted:
    """What the backward of a loss is asked for.

    rows     layer -> its one call and the place of its rows: layers whose gradient stays Factored
    dense    (layer, role, parameter) of the others
    rest     parameters of no layer
    resting  whether methods weigh the rows: the step has no draws
    """

    rows: dict[str, tuple[Call, Place]]
    dense: list[tuple[str, str, torch.Tensor]]
    rest: list[torch.Tensor]
    resting: bool

    @property
    def parameters(self) -> list[torch.Tensor]:
        """Of no Factored layer, in order."""
        return [*(p for *_, p in self.dense), *self.rest]


class Backward:
    """The one backward of a training loss: its gradients at parameters and rows and, where a rule has a use for them,
    at the outputs of all calls.

    l2       of layers, whose part joins their gradients
    scaler   the loss is scaled by it, and its gradients back
    """

    def __init__(
        self,
        engine: Engine,
        value: torch.Tensor,
        seen: Capture,
        batch: Batch,
        l2: dict[str, float],
        scaler: Scaler | None = None,
    ) -> None:
        check_grad()
        self.engine = engine
        self.value = value
        self.seen = seen
        self.batch = batch
        self.l2 = l2
        self.scaler = scaler
        self._found: tuple[Wanted, Sequence[torch.Tensor | None]] | None = None

    def outputs(self, observed: Observed) -> list[torch.Tensor | None]:
        """At the outputs of the observed calls; what `gradients` needs is asked for with them."""
        wanted = self._wanted(observed)
        calls = [call for _, call in observed.calls]
        found = self._pulled([*(call.edge for call in calls), *wanted.parameters], keep=True)
        outputs = found[: len(calls)]
        at = {id(call): g for call, g in zip(calls, outputs, strict=True)}
        self._found = wanted, [*(at[id(call)] for call, _ in wanted.rows.values()), *found[len(calls) :]]
        return [g if g is None else dense(g) for g in outputs]

    def gradients(self, observed: Observed | None) -> tuple[dict[str, Any], tuple]:
        """The core's gradients of covered layers, Factored where that is cheaper, and those of the rest."""
        if self._found is None:
            wanted = self._wanted(observed)
            edges = [call.edge for call, _ in wanted.rows.values()]
            self._found = wanted, self._pulled([*edges, *wanted.parameters], keep=False)
        wanted, found = self._found
        cut = len(wanted.rows)
        end = cut + len(wanted.dense)
        return self._factored(wanted, found[:cut]) | self._dense(wanted, found[cut:end]), tuple(found[end:])

    def _wanted(self, observed: Observed | None) -> Wanted:
        """Of which layers rows are wanted, and of which the gradient."""
        engine = self.engine
        whole = bool(self.l2) or engine.core.comm.world > 1
        resting = kf.own_gradients(engine.core) and not engine.due  # every weight gradient is then made of given rows
        if resting:
            heads = engine.objective.heads(self.batch.f)
            sight = engine.sight(self.seen, heads)
            observed = engine.observer.look(sight, engine.plan.layers, heads, self.batch.told)
        layers = engine.plan.layers
        calls = _placed(self.seen, observed)
        own = {n for n in calls if hooked(layers[n].parameters.values())}  # gradients that hooks are to see
        rows = {
            n: c[0] for n, c in calls.items() if resting or (not whole and n not in own and _factors(layers[n].kind, c))
        }
        if resting and own:
            raise ValueError(
                f"parameters of layers {sorted(own)} have hooks, but FNGD makes their gradients of rows, which hooks "
                f"do not see: take the hooks off, or give those layers another method"
            )
        odd = [n for n in rows if resting and (len(calls[n]) > 1 or not isinstance(layers[n].kind, Linear))]
        if odd:
            raise ValueError(f"layers {odd} are not linear layers called once: give them another method than FNGD")
        dense = [(n, role, p) for n in layers if n not in rows for role, p in layers[n].parameters.items()]
        return Wanted(rows, dense, list(engine.plan.rest.values()), resting)

    def _pulled(self, wanted: list[Any], keep: bool) -> Sequence[torch.Tensor | None]:
        """Of the loss itself, also where it is scaled; `keep` the graph for more."""
        scaler = self.scaler
        value = self.value if scaler is None else scaler.scaled(self.value)
        found = obeyed(wanted, torch.autograd.grad(value, wanted, retain_graph=keep, allow_unused=True))
        return found if scaler is None else scaler.unscaled(found)

    def _factored(self, wanted: Wanted, found: Sequence[torch.Tensor | None]) -> dict[str, Any]:
        """Gradients not multiplied out."""
        engine = self.engine
        layers = engine.plan.layers
        grads: dict[str, Any] = {}
        for (name, (call, place)), g in zip(wanted.rows.items(), found, strict=True):
            if g is None:
                continue
            a = rows(layers[name], call, place, engine.namespace)
            given = to_core(output_rows(layers[name], call, call.of_parameter(detached(g)), place), engine.namespace)
            if wanted.resting:
                ids = None if self.batch.ids is None else to_core(self.batch.ids, engine.namespace)
                given = kf.weighted(engine.core, engine.state, {name: given}, ids)[name]
            grads[name] = kf.Factored(a, given, 1.0)
        return grads

    def _dense(self, wanted: Wanted, found: Sequence[torch.Tensor | None]) -> dict[str, Any]:
        """Matrices of layers all of whose parameters have a gradient."""
        engine = self.engine
        tensors: dict[str, dict[str, torch.Tensor]] = {}
        for (name, role, p), g in zip(wanted.dense, found, strict=True):
            if g is not None:
                tensors.setdefault(name, {})[role] = g + self.l2[name] * p.detach() if self.l2 else dense(g)
        layers = engine.plan.layers
        whole = {name: given for name, given in tensors.items() if len(given) == len(layers[name].parameters)}
        return engine.matrices(whole)


def _placed(seen: Capture, observed: Observed | None) -> dict[str, list[tuple[Call, Place]]]:
    """The calls of each layer and where their rows stand; all together where nobody needs to know."""
    found: dict[str, list[tuple[Call, Place]]] = {}
    if observed is None:
        return {name: [(call, Together(call.rows)) for call in calls] for name, calls in seen.calls.items()}
    for (name, call), place in zip(observed.calls, observed.places(False), strict=True):
        found.setdefault(name, []).append((call, place))
    return found


def _factors(kind: Any, calls: list[tuple[Call, Place]]) -> bool:
    """Whether applying inverses to the rows is cheaper than to the gradient: one call with fewer rows than width."""
    if not isinstance(kind, Linear) or len(calls) != 1:
        return False
    call, place = calls[0]
    return place.mask() is None and call.x.numel() // kind.d_in < max(kind.d_in, kind.d_out)
