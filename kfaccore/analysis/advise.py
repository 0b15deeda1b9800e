"""Which method for which layer, under a budget: the multiple-choice knapsack over the figures of `compare`.

Minimises the squared error of the damped direction summed over layers, sum ||x~_l - x_l||^2, subject to a sum of costs.
Layer by layer only plans that no other beats in both cost and error are kept, which is exact; above `WIDTH` of them the
front is thinned evenly in cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kfaccore.analysis.compare import Figures

WIDTH = 20_000


@dataclass(frozen=True)
class Plan:
    """A method a layer, its total cost, and its squared error relative to the squared size of the direction."""

    methods: dict[str, str]
    cost: float
    error: float


@dataclass(frozen=True)
class Advice:
    """The best plan within the budget, None if there is none, and the cheapest plan there is."""

    best: Plan | None
    cheapest: Plan


def advise(figures: Sequence[Figures], cost: Callable[[Figures], float], budget: float) -> Advice:
    """The plan of least error whose cost is at most `budget`; ties go to the cheaper.

    Raises ValueError naming a layer that no method could be measured on.
    """
    layers = list(dict.fromkeys(f.layer for f in figures))
    scale = sum(max(f.size**2 for f in figures if f.layer == layer) for layer in layers) or 1.0
    front: list[tuple[float, float, tuple[str, ...]]] = [(0.0, 0.0, ())]
    for layer in layers:
        choices = [f for f in figures if f.layer == layer and f.inverse_error == f.inverse_error]
        if not choices:
            raise ValueError(f"no method could be measured on layer {layer!r}")
        moves = [(cost(f), (f.inverse_error * f.size) ** 2, f.method) for f in choices]
        front = _front([(c + dc, e + de, (*names, name)) for c, e, names in front for dc, de, name in moves])
    plans = [Plan(dict(zip(layers, names, strict=True)), c, e / scale) for c, e, names in front]
    within = [plan for plan in plans if plan.cost <= budget]
    return Advice(within[-1] if within else None, plans[0])


def _front(plans: list[tuple[float, float, tuple[str, ...]]]) -> list[tuple[float, float, tuple[str, ...]]]:
    """Plans by rising cost and strictly falling error; the cheapest and the best are never thinned away."""
    kept: list[tuple[float, float, tuple[str, ...]]] = []
    for plan in sorted(plans):
        if not kept or plan[1] < kept[-1][1]:
            kept.append(plan)
    if len(kept) <= WIDTH:
        return kept
    step = (len(kept) - 1) / (WIDTH - 1)
    return [kept[round(i * step)] for i in range(WIDTH)]
