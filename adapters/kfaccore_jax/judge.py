"""What a rule of the step says once its update is known, and other transformations beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kfaccore_jax.evaluate import followed
from kfaccore_jax.probing import outline, turns
from kfaccore_jax.trees import register
from kfaccore_jax.wrappers import completed


def losses_of(moves: Any, value: Any, value_fn: Callable, params: Any, whole: Any) -> Any:
    """The batch's loss before and after the update; leaves that a mask hides are those of `whole`."""
    back = jax.tree.map(lambda x: -x if jnp.issubdtype(x.dtype, jnp.inexact) else x, moves)
    after = value_fn(completed(added(params, back), whole))
    return jnp.stack([jnp.asarray(value), jnp.asarray(after)])


def whole_mean(value: Any, axes: Any, share: Any) -> Any:
    """A mean over a device's part of the batch as that over all of it; `axes` are None where it is all."""
    return value if axes is None else axes.mean(value, share)


def added(params: Any, moves: Any) -> Any:
    """The parameters with updates added, in their own dtypes; what is no inexact number, and what has no update, stays
    what it is."""

    def one(m: Any, p: Any) -> Any:
        return jnp.asarray(p + m, p.dtype) if m is not None and jnp.issubdtype(p.dtype, jnp.inexact) else p

    return jax.tree.map(one, moves, params, is_leaf=lambda m: m is None)


def judged(rule: Any, before: Any, motion: Any, moves: Any, losses: Any) -> tuple[Any, Any]:
    """The update, or zeros where the loss of its own batch speaks against it, and the motion that follows."""
    share, motion = rule.judge(motion, 1.0, losses[0], losses[1])
    motion = jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), register(motion), before)
    return jax.tree.map(lambda x: jnp.where(share > 0, x, jnp.zeros_like(x)), moves), motion


def arrays(motion: Any) -> Any:
    """A rule's numbers as arrays, floats in the widest dtype."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(type(x))) if isinstance(x, int | float) else x, motion)


def started(rest: Any, leaves: Mapping[str, Any]) -> Any:
    """The state of `rest`; ValueError where it turns the gradient round."""
    if turns(rest, outline(leaves)):
        raise ValueError(
            "rest turns gradients round, as a whole optimizer does; kfac() gives directions of the gradient's sign, so "
            "take the part before the rate, such as optax.scale_by_adam() of optax.adam"
        )
    return rest.init(leaves)


def finitely(tx: Any, grads: Any, state: Any, params: Any, told: Mapping[str, Any]) -> tuple[Any, Any]:
    """`tx.update`, told what the caller's update was if it asks for more than gradients; a gradient that is not finite
    moves nothing and leaves the state what it was, as in the core."""
    import optax

    try:
        updates, after = optax.with_extra_args_support(tx).update(grads, state, params, **told)
    except TypeError as error:
        error.add_note(
            f"graft and rest are told what the update of kfac(plan) is, here {sorted(told)}: update(..., value=loss)"
        )
        raise
    whole = jnp.stack([jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(grads) if followed(g)] or [True]).all()
    updates = jax.tree.map(lambda x: jnp.where(whole, x, jnp.zeros_like(x)), updates)
    return updates, jax.tree.map(lambda new, old: jnp.where(whole, new, old), after, state)
