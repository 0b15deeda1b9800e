"""The state of the optax transformation, and where it is in that of a chain."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax


class KFACState(NamedTuple):
    """The Preconditioner's state, the code of each block after the last step, how often each code came up, and the
    state of `rest`."""

    core: Any
    codes: dict[str, Any]
    counts: Any
    rest: Any = ()


def state_of(state: Any) -> KFACState:
    """The state of kfac in that of a chain."""
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, KFACState))
    found = [x for x in leaves if isinstance(x, KFACState)]
    if len(found) != 1:
        raise ValueError(f"the state of one kfac(plan) is needed; this has {len(found)}")
    return found[0]


def counts_of(state: Any) -> Any:
    """How often each code has come up, from the state of a chain with kfac."""
    return state_of(state).counts
