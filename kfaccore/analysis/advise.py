"""Which method for which layer, under a budget: the multiple-choice knapsack over the figures of `compare`.

Minimises a loss summed over layers subject to a sum of costs; the loss is what a direction leaves of the model's best
decrease, (1 - gain_l) best_l, or the squared error of the damped direction, ||x~_l - x_l||^2, or of the block,
||F~_l - F_l||^2. Under gain a method must beat what costs next to nothing, `FLOOR`, by `MARGIN` to be taken. Methods
that solve with the very batch they are judged by are left out: their gain says nothing about the next one.
Layer by layer only plans that no other beats in both cost and loss are kept, which is exact; above `WIDTH` of them the
front is thinned evenly in cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isnan

from kfaccore.analysis.figures import FLOOR, MARGIN, Figures

WIDTH = 20_000
Choice = tuple[float, float, tuple[str, ...]]  # cost and squared error so far, the methods chosen

Loss = Callable[[Figures], tuple[float, float]]


def lost(f: Figures) -> tuple[float, float]:
    """Roots of the share of the best decrease that is left, and of that decrease; nothing where there is none."""
    return (0.0, 0.0) if f.best <= 0 else (max(1 - f.gain, 0.0) ** 0.5 if f.gain == f.gain else f.gain, f.best**0.5)


BY: dict[str, Loss] = {  # (relative error, what it is relative to) of one layer
    "gain": lost,
    "direction": lambda f: (f.inverse_error, f.size),
    "block": lambda f: (f.error, f.norm),
}


@dataclass(frozen=True)
class Plan:
    """A method a layer, its total cost, and its error: the root of the summed losses over that of the exact sizes."""

    methods: dict[str, str]
    cost: float
    error: float

    @property
    def gain(self) -> float:
        """Where gain was ranked by: the share of the best decrease that all directions together reach."""
        return 1.0 - self.error**2


@dataclass(frozen=True)
class Advice:
    """The best plan within the budget, None if there is none, and the cheapest plan there is."""

    best: Plan | None
    cheapest: Plan


def advise(
    figures: Sequence[Figures],
    cost: Callable[[Figures], float],
    budget: float,
    by: Loss = lost,
) -> Advice:
    """The plan of least error whose cost is at most `budget`; ties go to the cheaper.

    Raises ValueError naming a layer that no method could be measured on.
    """
    layers = list(dict.fromkeys(f.layer for f in figures))
    front: list[Choice] = [(0.0, 0.0, ())]
    scale = 0.0
    for layer in layers:
        fair = [f for f in figures if f.layer == layer and not f.own]
        choices = [f for f in fair if not isnan(by(f)[0]) and not isnan(cost(f))]
        choices = _beating_the_floor(choices, cost) if by is lost else choices
        if not choices:
            raise ValueError(
                f"no method could be measured on layer {layer!r}; what solves with the batch that it is judged by, as "
                f"FNGD, does not count"
            )
        scale += max(by(f)[1] for f in choices) ** 2
        moves = [(cost(f), (by(f)[0] * by(f)[1]) ** 2, f.method) for f in choices]
        front = _front([(c + dc, e + de, (*names, name)) for c, e, names in front for dc, de, name in moves])
    plans = [Plan(dict(zip(layers, names, strict=True)), c, (e / (scale or 1.0)) ** 0.5) for c, e, names in front]
    within = [plan for plan in plans if plan.cost <= budget]
    return Advice(within[-1] if within else None, plans[0])


def _beating_the_floor(choices: list[Figures], cost: Callable[[Figures], float]) -> list[Figures]:
    """Without the methods that a dearer computation does not pay for: they gain no more than what costs next to nothing
    and, in this layer, no more than they do."""
    floor = [f for f in choices if f.method in FLOOR]
    return [f for f in choices if f in floor or all(f.gain > x.gain + MARGIN or cost(f) < cost(x) for x in floor)]


def _front(plans: list[Choice]) -> list[Choice]:
    """Plans by rising cost and strictly falling error; the cheapest and the best are never thinned away."""
    kept: list[Choice] = []
    for plan in sorted(plans):
        if not kept or plan[1] < kept[-1][1]:
            kept.append(plan)
    if len(kept) <= WIDTH:
        return kept
    step = (len(kept) - 1) / (WIDTH - 1)
    return [kept[round(i * step)] for i in range(WIDTH)]
