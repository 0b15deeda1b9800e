"""Grafting: directions of the method, in each layer as long as the update of another optax transformation."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from kfaccore import Block, Fixed, Graft, Schedules
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
    graft: optax.GradientTransformation, plan: Plan, blocks: Mapping[str, Block], grads: Any, state: Any, params: Any
) -> tuple[Taken, dict[str, Any], Any]:
    """The step of `graft`, {layer or leaf: its norm without what shrinks}, and its state."""
    check_given("graft", blocks, matrices(plan, grads, blocks))
    updates, after = finitely(graft, grads, state, params)
    bare = updates
    if params is not None and _shrinks(graft, *_outline(params)):
        bare, _ = finitely(graft, grads, state, jax.tree.map(jnp.zeros_like, params))
    if turns(graft):
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


def _outline(tree: Any) -> tuple[Any, tuple[Any, ...]]:
    """Structure, and small shapes of as many axes with their dtypes."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((tuple(min(2, n) for n in x.shape), x.dtype) for x in leaves)


@lru_cache(maxsize=64)
def _shrinks(graft: optax.GradientTransformation, structure: Any, outlines: tuple[Any, ...]) -> bool:
    """Whether a step has a part that is linear in the parameters and asks for nothing of the gradient. Seen in three
    steps, as a rate may begin with 0, on small arrays."""
    with jax.ensure_compile_time_eval():
        ones = jax.tree.unflatten(structure, [jnp.ones(shape, dtype) for shape, dtype in outlines])
        state = graft.init(ones)
        for _ in range(3):
            steps = {
                (sign, size): graft.update(_times(sign, ones), state, _times(size, ones))
                for sign in (1.0, -0.5)
                for size in (0.0, 1.0, 2.0)
            }
            parts = [
                jax.tree.map(jnp.subtract, steps[sign, size + 1][0], steps[sign, size][0])
                for sign in (1.0, -0.5)
                for size in (0.0, 1.0)
            ]
            if any(bool(jnp.any(x != 0)) for x in jax.tree.leaves(parts[0])):
                return all(_alike(parts[0], part) for part in parts[1:])
            state = steps[1.0, 1.0][1]
    return False


def _times(number: float, tree: Any) -> Any:
    return jax.tree.map(lambda x: (number * x).astype(x.dtype), tree)


def _alike(one: Any, other: Any) -> bool:
    """Whether two trees differ by rounding alone."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(bool(jnp.allclose(x, y, rtol=1e-2, atol=0.0)) for x, y in pairs)
