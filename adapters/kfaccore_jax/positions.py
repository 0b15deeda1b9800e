"""Which positions of an example a call's rows are, for masks: told from the model traced at twice their number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from kfaccore_jax.mesh import Shape

if TYPE_CHECKING:
    from kfaccore_jax.layers import Layer
    from kfaccore_jax.plan import Plan


@dataclass(frozen=True)
class Longer:
    """Types of the calls' outputs at this batch, and again with each position axis of the mask twice as long; None for
    an axis where the model does not run so, as one with a table of positions does not."""

    here: Mapping[str, Shape]
    longer: tuple[Mapping[str, Shape] | None, ...]

    @classmethod
    def of(cls, plan: Plan, params: Any, args: tuple, here: Mapping[str, Shape], sizes: tuple[int, ...]) -> Longer:
        """Trace the model with each axis of positions stretched."""
        found = []
        for axis, size in enumerate(sizes, start=1):
            found.append(_traced(plan, params, _stretched(plan, args, axis, size)))
        return cls(here, tuple(found))

    def axes(self, key: str, positions: tuple[int, ...]) -> list[int | None]:
        """For each axis of the call's output the axis of the mask it is, None for one that is none."""
        shape = self.here[key].shape
        found: list[int | None] = [None] * len(shape)
        for k, size in enumerate(positions):
            other = self.longer[k]
            for i, n in enumerate(shape):
                if n == size and other is not None and other[key].shape[i] == 2 * n:
                    found[i] = k
        return found


def _stretched(plan: Plan, args: tuple, axis: int, size: int) -> tuple:
    """Shapes of the arguments with twice the positions on their axis `axis`."""

    def longer(x: Any) -> jax.ShapeDtypeStruct:
        shape = list(x.shape)
        if len(shape) > axis and shape[axis] == size:
            shape[axis] = 2 * size
        return jax.ShapeDtypeStruct(tuple(shape), x.dtype)

    return tuple(jax.tree.map(longer, arg) if i in plan.batched else arg for i, arg in enumerate(args))


def _traced(plan: Plan, params: Any, args: tuple) -> Mapping[str, Shape] | None:
    from kfaccore_jax.plan import evaluated

    found: dict[str, Shape] = {}

    def abstract(params: Any, args: tuple) -> None:
        found.update(evaluated(plan.apply, params, args, plan.has_aux, plan.explicit, None, plan.known)[2].outputs)

    try:
        jax.eval_shape(abstract, params, args)
    except (TypeError, ValueError):
        return None
    return found if found.keys() == plan.calls.keys() else None


def mask_of(plan: Plan, layer: Layer, mask: Any, longer: Longer, draws: int) -> Any:
    """(batch, shared) of a layer's record for a mask (batch, *positions); None where its rows have no positions.

    Raises ValueError naming the layer where what its rows are cannot be seen.
    """
    if layer.common:
        return None
    found = [_call_mask(plan, layer, key, mask, longer) for key in (*layer.calls, *layer.turned)]
    if all(one is None for one, _ in found):
        return None
    n = mask.shape[0]
    whole = jnp.concatenate([jnp.ones((n, rows), bool) if one is None else one for one, rows in found], 1)
    return jnp.tile(whole, (draws, 1)) if layer.turned else whole


def _call_mask(plan: Plan, layer: Layer, key: str, mask: Any, longer: Longer) -> tuple[Any, int]:
    """The mask of one call's rows, None where they have no positions, and how many rows an example has."""
    call = plan.calls[key]
    axes = longer.axes(key, tuple(mask.shape[1:]))
    shape = longer.here[key].shape
    if call.y.split:
        place, groups = call.y.split
        axes[place : place + 1] = [None, axes[place]]
        shape = (*shape[:place], groups, shape[place] // groups, *shape[place + 1 :])
    batch = call.y.shared[call.batch or 0]
    others = [i for i in call.y.shared if i != batch]
    sizes = [shape[i] for i in others]
    each = shape[batch] // mask.shape[0]  # positions joined with the batch stand behind it
    rows = each * prod(sizes)
    known: list[int | None] = [axes[i] for i in others]
    if each == 1 and not others:
        return None, rows
    if each == 1 and sizes == list(mask.shape[1:]) and None in longer.longer:
        known = [*range(len(sizes))]
    if each == prod(mask.shape[1:]) and not others:
        return mask.reshape(mask.shape[0], -1).astype(bool), rows
    if each != 1 or not any(k is not None for k in known):
        raise ValueError(
            f"layer {layer.name!r} has rows of shape {(each, *sizes)} an example, and which of them a mask of shape "
            f"{tuple(mask.shape)} means cannot be seen: give mask={{layer: (batch, rows)}}, None for layers without one"
        )
    return _spread(mask, known, sizes), rows


def _spread(mask: Any, known: list[int | None], sizes: list[int]) -> Any:
    """The mask over the axes of a call's rows: positions that they lack are there if any of theirs is."""
    present = [k for k in known if k is not None]
    lacking = tuple(k + 1 for k in range(mask.ndim - 1) if k not in present)
    small = jnp.any(mask.astype(bool), axis=lacking) if lacking else mask.astype(bool)
    order = sorted(present)
    small = small.transpose(0, *(1 + order.index(k) for k in present))
    shape = [mask.shape[0], *(size if k is not None else 1 for k, size in zip(known, sizes, strict=True))]
    return jnp.broadcast_to(small.reshape(shape), (mask.shape[0], *sizes)).reshape(mask.shape[0], -1)
