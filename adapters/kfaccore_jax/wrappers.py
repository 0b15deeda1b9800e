"""What transformations around `kfac` do to the trees that it sees: leaves hidden, gradients left out, steps put off."""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import Any

import jax

from kfaccore_jax.names import named
from kfaccore_jax.plan import Plan


def hidden(x: Any) -> bool:
    """Whether optax.masked or optax.partition put this in the place of a leaf, or of a tree of them."""
    import optax

    return isinstance(x, optax.MaskedNode)


def completed(params: Any, whole: Any) -> Any:
    """`params` with what is hidden of them as it is in `whole`, where that is given."""
    if whole is None:
        return params
    return jax.tree.map(lambda p, given: given if hidden(p) else p, params, whole, is_leaf=hidden)


def check_seen(plan: Plan, params: Any, whole: Any) -> None:
    """ValueError where a rule that judges would call value_fn without leaves that are hidden."""
    seen = params if whole is None else whole
    if any(hidden(x) for x in jax.tree.leaves(seen, is_leaf=hidden)):
        missing = [row.leaf for row in plan.table if row.leaf not in named(seen)]
        if whole is not None:
            raise ValueError(
                f"update got whole without {missing[:5]}: a wrapper masks it as it masks params, as optax.masked(..., "
                f"mask_compatible_extra_args=True) does with what has their structure; leave that argument out, so "
                f"that value_fn is called with all params"
            )
        raise ValueError(
            f"update sees params without {missing[:5]}, which optax.masked or optax.partition hides, and value_fn is a "
            f"function of all of them: pass update(..., whole=params) too"
        )


def check_given(name: str, wanted: Collection[str], given: Collection[str]) -> None:
    """ValueError where another transformation, which takes the tree of its init alone, would get no gradient of some
    leaves."""
    missing = sorted(set(wanted) - set(given))
    if missing:
        raise ValueError(
            f"{name} needs a gradient of every leaf that init saw, and got none of {missing[:5]}: give zeros for what "
            f"is frozen in some steps, or hide what always is by optax.masked or optax.partition"
        )


def not_within_multisteps() -> None:
    """ValueError where optax.MultiSteps asks: between its steps it drops the inner state, so that of all micro-batches
    only the last one's records would ever be measured."""
    import optax

    frame = sys._getframe(1)
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), optax.MultiSteps):
            raise ValueError(
                "optax.MultiSteps hands kfac() the records of the last micro-batch alone, so that the curvature of the "
                "others is lost: take kfaccore_jax.accumulate(kfac(plan), k), around the whole chain"
            )
        frame = frame.f_back
