"""Grafting: directions of the method, in each layer as long as the update of another optax transformation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from kfaccore import Block, Fixed, Graft
from kfaccore_jax.judge import finitely, turns
from kfaccore_jax.names import named
from kfaccore_jax.plan import Plan
from kfaccore_jax.present import held, matrices
from kfaccore_jax.wrappers import check_given

if TYPE_CHECKING:
    import optax


def rule_of(step: Any, graft: optax.GradientTransformation | None, rest: object) -> Any:
    """The rule of the step under `graft`; ValueError for what contradicts it."""
    if graft is None:
        return step
    if rest is not None:
        raise ValueError("both graft and rest are given: graft moves the leaves without a layer itself; leave out rest")
    if step == Fixed():
        return Fixed(rescale=Graft())
    if not (isinstance(step, Fixed) and isinstance(step.rescale, Graft)):
        raise ValueError(f"step is {step}, and graft gives each layer its length: take Fixed(rescale=Graft())")
    return step


def grafted(
    graft: optax.GradientTransformation, plan: Plan, blocks: Mapping[str, Block], grads: Any, state: Any, params: Any
) -> tuple[Any, dict[str, Any], Any]:
    """The updates of `graft` with the sign of a gradient, {layer or leaf: their norm}, and its state."""
    check_given("graft", blocks, matrices(plan, grads, blocks))
    updates, state = finitely(graft, grads, state, params)
    updates = jax.tree.map(jnp.negative, updates) if turns(graft) else updates
    found = matrices(plan, updates, blocks)
    return updates, {name: jnp.linalg.norm(jnp.ravel(found[name])) for name in blocks}, state


def beside(plan: Plan, moves: Any, updates: Any) -> Any:
    """`moves` with the leaves of no layer as `graft` would move them."""
    leaves = named(moves)
    owned = {part.leaf for item in held(plan, leaves) for part in item.layer.parts}
    own = {name: x for name, x in named(updates).items() if name not in owned}
    return jax.tree.unflatten(jax.tree.structure(moves), list((leaves | own).values()))
