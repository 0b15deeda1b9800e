"""A captured forward and the prediction it led to: which uses of parameters lie behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kfaccore_torch.alone import Examples
from kfaccore_torch.beside import Quiet
from kfaccore_torch.calls import Call, Mark, Use
from kfaccore_torch.capture import Capture
from kfaccore_torch.explain import explained
from kfaccore_torch.graph import Behind, behind
from kfaccore_torch.plan import Plan


@dataclass(frozen=True)
class Sight:
    """Calls that reach the prediction, by layer and in order, and the plan that they are of.

    marks, odd   what this forward has shown
    quiet        what draws through it leave as it is
    """

    graph: Behind
    plan: Plan
    calls: tuple[tuple[str, Call], ...]
    marks: tuple[Mark, ...]
    odd: dict[str, str]
    quiet: Quiet


def sighted(seen: Capture, heads: Sequence[torch.Tensor]) -> Sight:
    """What lies behind a prediction; the plan of `seen` with what it shows.

    Raises ValueError for parameters that a layer's call explains by half.
    """
    graph = behind(heads, seen.inputs, seen.known)
    uses = _reached(seen, graph)
    named = {name: p for name, p, _ in seen.plan.made_of}
    examples = Examples.of(max(len(f) for f in heads), [use.call.rows for use in uses], seen.plan.marks)
    found, odd = explained(graph, seen.known, named, examples) if graph.met else ([], {})
    if not uses and not graph.met and not seen.empty:
        raise ValueError(
            "no captured call lies behind this prediction: run the model whose parameters these are inside `with "
            "pre.capture():`, and hand over what that run returned"
        )
    marks = tuple(use.mark for use in (*uses, *found))
    shown = {**seen.odd, **odd}
    plan = seen.plan.with_seen(marks, shown)
    strange = [use for use in found if not seen.span.made(use.call.node)]
    _check_half(plan, uses, strange, odd)
    uses += found
    seen.plan = plan
    calls = ((name, call) for name, calls in plan.assigned(uses).items() for call in calls)
    return Sight(graph, plan, tuple(calls), marks, shown, Quiet(seen.made.retaining(heads)))


def _reached(seen: Capture, graph: Behind) -> list[Use]:
    """Captured uses on the way to the prediction; one that was widened to a sum as it was before where the sum does not
    lie there, or its output goes anywhere else too."""
    found = []
    for use in seen.uses:
        call = use.call
        if call.narrow is not None and graph.users(call.narrow.node) != {call.node}:
            call = call.narrow
        if call.node in graph.nodes:
            found.append(Use(use.mark, call))
    return found


def _check_half(plan: Plan, called: Sequence[Use], strange: Sequence[Use], odd: dict[str, str]) -> None:
    """ValueError for a weight that went into the prediction through a layer's call and past it, in a way that nothing
    explains or, to no layer with the call, outside the forward (`strange`). Two ways of the forward itself that are
    explained and make no layer together leave the weight uncovered, as two calls do."""
    past = {use.mark.weight.name for use in strange if use.mark.weight is not None} | odd.keys()
    through = {use.mark.weight.name for use in called if use.mark.weight is not None}
    half = {name: plan.uncovered[name] for name in plan.uncovered if name in past & through}
    if not half:
        return
    names = ", ".join(f"{name!r} ({why})" for name, why in list(half.items())[:5])
    raise ValueError(
        f"these parameters reach the prediction by a road that no captured call explains, beside one that does: "
        f"{names}: a weight used by hand or under torch.func, a call outside capture(), or a derivative of the network "
        f"(create_graph=True; such a loss needs Taylor records, kfaccore_torch.taylor). Their curvature would be "
        f"covered by half: run all of the forward inside capture(), or pass skip=({next(iter(half))!r},)"
    )
