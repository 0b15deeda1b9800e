"""What a saved run says of itself: what `kfaccore inspect` shows beside the arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

import numpy as np

from kfaccore.precondition.preconditioner import Preconditioner, State
from kfaccore.xp.arrays import to_host


def describe(
    core: Preconditioner,
    state: State,
    model: str = "",
    parameters: int = 0,
    uncovered: Mapping[str, tuple[int, str]] | None = None,
) -> dict[str, object]:
    """Metadata for `save`: method, damping in force and block a layer, clocks, and of the model what the shell knows.

    parameters   how many numbers are trained, covered or not
    uncovered    {parameter: (how many numbers, why it has no factors)}
    """
    blocks = dict(state.blocks)
    hypers = {name: core.rule.hyper(state.motion, core.schedules.hyper(name, state.step)) for name in blocks}
    method = core.network or core.methods
    kinds = set(map(_name, method.values())) if isinstance(method, Mapping) else {_name(method)}
    found: dict[str, object] = {
        "method": ", ".join(sorted(kinds)),
        "damping": {name: float(np.max(to_host(hyper.damping))) for name, hyper in hypers.items()},
        "blocks": {name: asdict(block) for name, block in blocks.items()},
        "clocks": {name: value for name, value in asdict(core.clocks).items() if value},
    }
    if model:
        found["model"] = model
    if parameters:
        found["parameters"] = parameters
    if uncovered is not None:
        found["uncovered"] = {name: list(why) for name, why in uncovered.items()}
    return found


def _name(method: object) -> str:
    return type(method).__name__
