"""Which positions of an example a call's rows are, for masks: told from the model traced at another length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from kfaccore_jax.direction import BACKWARDS, UNKNOWN, direction_of
from kfaccore_jax.mesh import Shape
from kfaccore_jax.stretch import Way, ways

if TYPE_CHECKING:
    from kfaccore_jax.layers import Layer
    from kfaccore_jax.plan import Plan


@dataclass(frozen=True)
class Longer:
    """Types of the calls' outputs at this batch, and what gets longer with each position axis of the mask."""

    here: Mapping[str, Shape]
    ways: tuple[tuple[Way, ...], ...]

    @classmethod
    def of(cls, plan: Plan, params: Any, args: tuple, here: Mapping[str, Shape], sizes: tuple[int, ...]) -> Longer:
        """Trace the model with each axis of positions stretched; ValueError where whose positions the mask means cannot
        be seen."""
        found = cls(here, tuple(ways(plan, params, args, axis, size) for axis, size in enumerate(sizes, start=1)))
        for size, several in zip(sizes, found.ways, strict=True):
            layers = [names for way in several if way.ours and (names := found._grown(plan, way))]
            if len(layers) > 1:
                raise ValueError(
                    f"mask has {size} positions, and so have arrays of apply that do not go together: layers "
                    f"{' and '.join(map(str, layers))} have rows of one each, and which of them the mask means cannot "
                    f"be seen: give mask={{layer: (batch, rows)}}, without the layers whose rows all exist"
                )
        return found

    def _grown(self, plan: Plan, way: Way) -> list[str]:
        """The layers that have other rows."""
        return [
            layer.name
            for layer in plan.layers
            if not layer.common
            and any(way.outputs[key].shape != self.here[key].shape for key in (*layer.calls, *layer.turned))
        ]

    def axes(self, key: str) -> list[int | None]:
        """For each axis of the call's output the axis of the mask it is, None for one that is none."""
        shape = self.here[key].shape
        found: list[int | None] = [None] * len(shape)
        for k, several in enumerate(self.ways):
            for way in several:
                for i, n in enumerate(shape):
                    if way.ours and n == way.size and way.stretches(self.here[key], key, i):
                        found[i] = k
        return found

    def along(self, key: str, mask: Any) -> Any:
        """The mask as positions run in the rows of a call; None where they run both ways, or in another order."""
        axes = range(len(self.here[key].shape))
        for k, several in enumerate(self.ways, start=1):
            its = [way for way in several if way.ours and any(way.stretches(self.here[key], key, i) for i in axes)]
            ways = {direction_of(way.order, key) for way in its}
            if UNKNOWN in ways or len(ways) > 1:
                return None
            mask = jnp.flip(mask, k) if BACKWARDS in ways else mask
        return mask

    def joined(self, key: str, axis: int) -> bool:
        """Whether an axis of the call's output holds the positions of all the mask's axes."""
        return all(any(way.ours and way.stretches(self.here[key], key, axis) for way in part) for part in self.ways)


def masks_of(plan: Plan, mask: Any, longer: Longer, draws: int) -> dict[str, Any]:
    """{layer: (batch, shared)}, None where its rows have no positions, for a mask (batch, *positions).

    Raises ValueError naming the layers where what their rows are cannot be seen.
    """
    found = {}
    unseen = {}
    for layer in plan.layers:
        try:
            found[layer.name] = _mask_of(plan, layer, mask, longer, draws)
        except _Unseen as error:
            unseen[layer.name] = error.args[0]
    if unseen:
        rows = ", ".join(f"layer {name!r} has rows of shape {shape} an example" for name, shape in unseen.items())
        raise ValueError(
            f"{rows}, and which of them a mask of shape {tuple(mask.shape)} means cannot be seen, as the model does "
            f"not run, or not have them so, at another length, joins several batches along one axis, or has them in "
            f"another order: give mask={{layer: (batch, rows)}}, all rows of an example in order, None for layers "
            f"without one"
        )
    return found if any(x is not None for x in found.values()) else _of_examples(plan, mask, draws)


def _of_examples(plan: Plan, mask: Any, draws: int) -> dict[str, Any]:
    """Where no layer's rows have positions: a mask of one position tells which examples exist, another one nothing."""
    if prod(mask.shape[1:]) != 1:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}, and no layer has rows of such positions; give (batch, 1) where it "
            f"tells which examples exist, or mask={{layer: (batch, rows)}}"
        )
    found: dict[str, Any] = {}
    for layer in plan.layers:
        times = (draws if layer.turned else 1, len(layer.calls) + len(layer.turned))
        found[layer.name] = None if layer.common else jnp.tile(mask.reshape(-1, 1), times)
    return found


class _Unseen(Exception):
    """The shape of rows whose positions cannot be seen."""


def marks(mask: Any, name: str = "mask") -> Any:
    """A mask as flags, bool where that is known; else 0, 1, and 2 for what is none, which a record shows.

    Raises ValueError for other entries than 0 and 1, as an additive mask has, where they can be read.
    """
    mask = jnp.asarray(mask)
    if mask.dtype == bool:
        return mask
    good = (mask == 0) | (mask == 1)
    if isinstance(mask, jax.core.Tracer):
        return jnp.where(good, mask, 2).astype(jnp.int8)
    if not good.all():
        raise ValueError(
            f"{name} has entries such as {mask[~good][0]}, dtype {mask.dtype}, shape {mask.shape}; need True or 1 "
            f"where a position exists, else False or 0: of an additive mask, 0 and very negative, give mask == 0"
        )
    return mask.astype(bool)


def _mask_of(plan: Plan, layer: Layer, mask: Any, longer: Longer, draws: int) -> Any:
    """(batch, shared) of a layer's record for a mask (batch, *positions); None where its rows have no positions."""
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
    axes = longer.axes(key)
    shape = longer.here[key].shape
    batch = call.y.shared[call.batch or 0]
    whole = batch  # its axis before one is split
    if call.y.split:
        place, groups = call.y.split
        axes[place : place + 1] = [None, axes[place]]
        shape = (*shape[:place], groups, shape[place] // groups, *shape[place + 1 :])
        whole -= batch > place
    others = [i for i in call.y.shared if i != batch]
    sizes = [shape[i] for i in others]
    each = shape[batch] // mask.shape[0]  # positions joined with the batch stand behind it
    rows = each * prod(sizes)
    known: list[int | None] = [axes[i] for i in others]
    if call.outer > 1 and (each != call.outer or (each,) != mask.shape[1:] or others):
        raise _Unseen((each, *sizes))  # of several views; steps of time before the examples are in their order
    if each == 1 and not others:
        return None, rows
    mask = longer.along(key, mask)
    if mask is None:
        raise _Unseen((each, *sizes))
    if each == prod(mask.shape[1:]) and not others and longer.joined(key, whole):
        return mask.reshape(mask.shape[0], -1), rows
    if each != 1 or not any(k is not None for k in known):
        raise _Unseen((each, *sizes))
    return _spread(mask, known, sizes), rows


def _spread(mask: Any, known: list[int | None], sizes: list[int]) -> Any:
    """The mask over the axes of a call's rows: positions that they lack are there if any of theirs is."""
    present = [k for k in known if k is not None]
    lacking = tuple(k + 1 for k in range(mask.ndim - 1) if k not in present)
    small = mask.max(axis=lacking) if lacking else mask
    order = sorted(present)
    small = small.transpose(0, *(1 + order.index(k) for k in present))
    shape = [mask.shape[0], *(size if k is not None else 1 for k, size in zip(known, sizes, strict=True))]
    return jnp.broadcast_to(small.reshape(shape), (mask.shape[0], *sizes)).reshape(mask.shape[0], -1)
