"""A method on one record as three functions of arrays, compiled where the namespace is JAX."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import numpy as np

import kfaccore as kf
from kfaccore import tree

ROUNDS = 4  # between two looks at whether a state still moves
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def cycled(method: Any, n: float, state: Any, a: Any, g: Any, damping: Any) -> Any:
    """One measure, update, refresh, without memory."""
    hyper = kf.Hyper(0, 0.0, damping)
    return method.refresh(method.update(state, method.measure(state, kf.Record(a, g, n), hyper), hyper), hyper)


def solved(method: Any, n: float, state: Any, a: Any, g: Any, v: Any, damping: Any) -> tuple[Any, Any]:
    """One more measure and update, as `settle` has it, and the direction and code of a solve."""
    record = kf.Record(a, g, n)
    hyper = kf.Hyper(0, 0.0, damping)
    state = method.update(state, method.measure(state, record, hyper), hyper)
    solution = method.solve(state, v, hyper, record)
    return solution.direction, solution.code


@cache
def parts(method: Any, n: float, traced: bool) -> tuple[Any, Any]:
    """`cycled` and `solved` of a method."""
    found = partial(cycled, method, n), partial(solved, method, n)
    if not traced:
        return found
    import jax

    return tuple(jax.jit(part, compiler_options=FAST) for part in found)  # type: ignore[return-value]


def direction(method: Any, n: float, arrays: tuple[Any, Any, Any], damping: float, cycles: int, traced: bool) -> Any:
    """(direction, code) of a gradient; many cycles end where the state stands still."""
    a, g, v = arrays
    cycle, solve = parts(method, n, traced)
    record = kf.Record(a, g, n)
    state = method.init(kf.Block.of(record), record.g)
    if traced:
        from kfaccore_jax.trees import register

        register(state)
    for number in range(cycles):
        before = state
        state = cycle(state, a, g, damping)
        if number % ROUNDS == ROUNDS - 1 and all(map(_still, tree.leaves(before), tree.leaves(state))):
            break
    return solve(state, a, g, v, damping)


def _still(before: Any, after: Any) -> bool:
    """Whether a leaf has moved by rounding alone; counts go on."""
    if getattr(after, "ndim", 0) < 2:
        return True
    x = np.asarray(before)
    y = np.asarray(after)
    return y.dtype.kind != "f" or bool(np.abs(x - y).max() <= 8 * np.finfo(y.dtype).eps * np.abs(y).max())
