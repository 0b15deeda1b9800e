"""Variables without a Kronecker record, as rows that all examples share: a = 1, g the draw's gradient, a batch of one.

For draws that are independent of zero mean an example the squares of g are an unbiased diagonal of the Fisher.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import kfaccore as kf
from kfaccore_tensorflow.layout import Matrix
from kfaccore_tensorflow.plan import Part, Plan


def spanned(plan: Plan, core: kf.Preconditioner, method: Any) -> tuple[Plan, kf.Preconditioner]:
    """The plan with a part for each refused variable, and the core that gives these parts `method`.

    Raises ValueError beside a network-level method, which sees layers and not single variables.
    """
    if core.network is not None:
        names = ", ".join(plan.refused)
        raise ValueError(f"{core.network} works on layers, and {names} have no records: freeze them or take KFAC()")
    wholes = []
    for layer, (variables, reason) in plan.refused.items():
        for v in variables:
            name = v.name if layer == v.name else f"{layer}.{v.name}"
            matrix = Matrix(0, (), ((prod(int(s) for s in v.shape), 1),))
            wholes.append(Part(name, {"weight": v}, {"weight": matrix}, (f"diagonal: {reason}",), whole=True))
    parts = (*plan.parts, *wholes)
    one: Any = core.methods
    methods = dict(one) if isinstance(one, Mapping) else {part.name: one for part in plan.parts}
    methods |= {part.name: method for part in wholes if part.name not in methods}
    other = kf.Preconditioner(
        methods, core.clocks, core.schedules, step=core.rule, comm=core.comm, donate=core.donate, widest=core.widest
    )
    return Plan(parts, {}, plan.unused), other
