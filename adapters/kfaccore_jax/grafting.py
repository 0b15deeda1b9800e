"""Grafting: directions of the method, in each layer as long as the update of another optax transformation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from kfaccore import Block, Fixed, Graft, Schedules
from kfaccore_jax.judge import finitely
from kfaccore_jax.names import named
from kfaccore_jax.plan import Plan
from kfaccore_jax.present import held, matrices
from kfaccore_jax.probing import outline, shrinks, turns
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


def check_decay(schedules: Schedules, graft: optax.GradientTransformation | None) -> None:
    """ValueError where the optimizer that grafts is not the one that has weight decay."""
    if graft is not None and (schedules.penalised or schedules.weight_decay):
        raise ValueError("weight decay and l2 are those of graft's optimizer: set them there, not in Schedules")


class Taken(NamedTuple):
    """A step of the other rule, with the sign of a gradient: all of it, and what of it shrinks parameters beside the
    rest, as AdamW's weight decay does (None without)."""

    updates: Any
    shrinking: Any


def grafted(
    graft: optax.GradientTransformation,
    plan: Plan,
    blocks: Mapping[str, Block],
    grads: Any,
    state: Any,
    params: Any,
    told: Mapping[str, Any],
) -> tuple[Taken, dict[str, Any], Any]:
    """The step of `graft`, {layer or leaf: its norm without what shrinks}, and its state."""
    check_given("graft", blocks, matrices(plan, grads, blocks))
    updates, after = finitely(graft, grads, state, params, told)
    bare = updates
    of = outline(grads if params is None else params)
    turned = turns(graft, of)
    if turned is None:
        raise ValueError(
            "graft's optimizer has moved nothing in 100 steps of a gradient, so that its sign cannot be seen: begin "
            "with a small rate in place of 0"
        )
    if params is not None and shrinks(graft, of):
        bare, _ = finitely(graft, grads, state, jax.tree.map(jnp.zeros_like, params), told)
    if turned:
        updates, bare = (jax.tree.map(jnp.negative, x) for x in (updates, bare))
    shrinking = None if bare is updates else jax.tree.map(jnp.subtract, updates, bare)
    found = matrices(plan, bare, blocks)
    lengths = {name: jnp.linalg.norm(jnp.ravel(found[name])) for name in blocks}
    return Taken(updates, shrinking), lengths, after


def beside(plan: Plan, moves: Any, taken: Taken | None) -> Any:
    """`moves` with what shrinks beside them, and with the leaves of no layer as `graft` would move them; as they are
    without one."""
    if taken is None:
        return moves
    if taken.shrinking is not None:
        moves = jax.tree.map(jnp.add, moves, taken.shrinking)
    leaves = named(moves)
    owned = {part.leaf for item in held(plan, leaves) for part in item.layer.parts}
    own = {name: x for name, x in named(taken.updates).items() if name not in owned}
    return jax.tree.unflatten(jax.tree.structure(moves), list((leaves | own).values()))
