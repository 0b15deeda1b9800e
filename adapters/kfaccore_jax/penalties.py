"""`Schedules(l2=, weight_decay=)` in a transformation: what the shells add to gradients, losses and moves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from kfaccore import Block, Schedules
from kfaccore_jax.plan import Plan
from kfaccore_jax.present import matrices
from kfaccore_jax.wrappers import completed


def weights(schedules: Schedules, plan: Plan, params: Any, blocks: Mapping[str, Block]) -> dict[str, Any]:
    """{layer or leaf: parameters (blocks, d_out, d_in)} where something is added by them; empty without."""
    if not (schedules.penalised or schedules.weight_decay):
        return {}
    if params is None:
        raise ValueError("Schedules(l2=..., weight_decay=...) need the parameters: update(grads, state, params, ...)")
    return {name: x for name, x in matrices(plan, params, blocks).items() if name in blocks}


def sloped(schedules: Schedules, grads: Mapping[str, Any], theta: Mapping[str, Any], step: Any) -> dict[str, Any]:
    """Gradients (blocks, d_out, d_in) plus l2 theta."""
    l2 = schedules.penalties(grads, step)
    return {name: g + (l2[name] * theta[name]).astype(g.dtype) if l2 else g for name, g in grads.items()}


def shrunk(schedules: Schedules, moves: Mapping[str, Any], theta: Mapping[str, Any], alpha: Any) -> dict[str, Any]:
    """Moves plus alpha weight_decay theta."""
    shrink = schedules.weight_decay
    return {name: x + (alpha * shrink * theta[name]).astype(x.dtype) if shrink else x for name, x in moves.items()}


def penalty(schedules: Schedules, theta: Mapping[str, Any], step: Any) -> Any:
    """The sum of l2 / 2 |theta|^2; 0 without l2."""
    l2 = schedules.penalties(theta, step)
    return sum(0.5 * l2[name] * jnp.sum(x * x) for name, x in theta.items()) if l2 else 0


def penalised(
    schedules: Schedules,
    plan: Plan,
    blocks: Mapping[str, Block],
    theta: Mapping[str, Any],
    step: Any,
    value: Any,
    value_fn: Callable | None,
    whole: Any,
) -> tuple[Any, Callable | None]:
    """A loss and a function of it with the penalty of what is preconditioned, where they are given; leaves that a mask
    hides are those of `whole`."""

    def with_penalty(params: Any) -> Any:
        assert value_fn is not None
        now = weights(schedules, plan, completed(params, whole), blocks)
        return value_fn(params) + penalty(schedules, now, step)

    value = None if value is None else value + penalty(schedules, theta, step)
    return value, None if value_fn is None else with_penalty
