"""Which positions exist, and whose rows are whose, as the caller says, by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import prod
from typing import Any

import torch

from kfaccore_torch.calls import Call
from kfaccore_torch.places import Axes, Groups, Place, Together, grouped


@dataclass
class Told:
    """What the caller says of a batch beside its loss.

    mask       (batch, positions), true or 1 where a position exists: for every layer whose rows have such positions
    masks      pattern of layer names -> a mask for those layers instead
    examples   the example of each row, for the calls that have as many rows: (rows,), or pattern -> (rows,)
    """

    mask: torch.Tensor | None = None
    masks: Mapping[str, torch.Tensor] = field(default_factory=dict)
    examples: Any = None
    _fits: set[Any] = field(default_factory=set)

    def __post_init__(self) -> None:
        for name, mask in ((None, self.mask), *self.masks.items()):
            if mask is not None:
                _check_flags(mask, "mask" if name is None else f"masks[{name!r}]")

    @property
    def any(self) -> bool:
        """Whether the caller says anything."""
        return self.mask is not None or bool(self.masks) or self.examples is not None

    def mask_of(self, name: str, place: Place) -> torch.Tensor | None:
        """(batch, positions) of one call, or None; ValueError for a mask by name that does not fit."""
        for pattern, mask in self.masks.items():
            if fnmatchcase(name, pattern):
                found = _fitted(mask, place, name)
                if found is None:
                    raise ValueError(
                        f"masks[{pattern!r}] has shape {tuple(mask.shape)} and does not fit layer {name!r}, whose rows "
                        f"are {place.rows}: need (examples, positions) of it"
                    )
                self._fits.add(pattern)
                return found
        found = None if self.mask is None else _fitted(self.mask, place, name)
        if found is not None:
            self._fits.add(None)
        return found

    def place_of(self, name: str, call: Call, examples: int) -> Groups | None:
        """Where rows stand that the caller has told of."""
        given = self.examples
        if given is None:
            return None
        keyed = given if isinstance(given, Mapping) else {"*": given}
        for pattern, owner in keyed.items():
            if not fnmatchcase(name, pattern):
                continue
            owner = torch.as_tensor(owner).reshape(-1)
            rows = prod(call.rows)
            if len(owner) not in (rows, call.rows[0]):
                if isinstance(given, Mapping):
                    raise ValueError(
                        f"examples[{pattern!r}] names {len(owner)} rows and layer {name!r} has {call.rows}: "
                        f"need one a row"
                    )
                continue
            if len(owner) and int(owner.max()) >= examples:
                raise ValueError(f"examples names example {int(owner.max())}; the prediction has {examples}")
            self._fits.add(("examples", pattern))
            return grouped(call.rows, owner.repeat_interleave(rows // len(owner)), examples)
        return None

    def check(self, layers: set[str], called: set[str]) -> None:
        """ValueError for whatever fitted nothing; layers that were called for another loss may wait for that one."""
        waiting = called - layers
        shapes = {
            pattern: tuple(mask.shape)
            for pattern, mask in self.masks.items()
            if pattern not in self._fits and not any(fnmatchcase(name, pattern) for name in waiting)
        }
        if shapes:
            raise ValueError(f"masks {shapes} match none of the layers called, {sorted(layers)[:8]}")
        if self.mask is not None and None not in self._fits:
            raise ValueError(
                f"mask has shape {tuple(self.mask.shape)} and fits no layer: need (examples, positions) as a layer's "
                f"rows have them, or masks={{pattern: mask}} by layer"
            )
        patterns = (
            set(self.examples) if isinstance(self.examples, Mapping) else set() if self.examples is None else {"*"}
        )
        waits = {p for p in patterns if p != "*" and any(fnmatchcase(name, p) for name in waiting)}
        missing = {p for p in patterns - waits if ("examples", p) not in self._fits}
        if missing:
            raise ValueError(f"examples {sorted(missing)} fit no layer called: need the example of each of its rows")


def _check_flags(mask: torch.Tensor, name: str) -> None:
    """ValueError for entries other than 0 and 1, as an additive mask has; integers on a device are not read."""
    if mask.dtype == torch.bool or not (mask.is_cpu or mask.is_floating_point()):
        return
    wrong = mask[(mask != 0) & (mask != 1)]
    if len(wrong):
        raise ValueError(
            f"{name} has entries such as {wrong[0].item()}, dtype {mask.dtype}, shape {tuple(mask.shape)}; need True "
            f"or 1 where a position exists, else False or 0: of an additive mask, 0 and very negative, give mask == 0"
        )


def _fitted(mask: torch.Tensor, place: Place, name: str) -> torch.Tensor | None:
    """A mask repeated over the positions that it does not tell apart; None where shapes do not go together."""
    if isinstance(place, Together):
        inside = None if place.like is None else _fitted(mask, place.like, name)
        return None if inside is None else inside.reshape(1, -1)
    if mask.ndim != 2 or mask.shape[0] != place.examples:
        return None
    mask = mask.bool()
    batch, length = mask.shape
    positions = place.positions
    if length == prod(positions):
        return mask
    if not isinstance(place, Axes):
        return None
    fits = [axis for axis, size in enumerate(positions) if size == length]
    if len(fits) > 1:
        raise ValueError(
            f"mask of {length} positions fits several axes of layer {name!r}, whose rows are {place.rows}: give "
            f"masks={{{name!r}: mask of all {prod(positions)} positions}}"
        )
    if not fits:
        return None
    shape = [1] * len(positions)
    shape[fits[0]] = length
    return mask.reshape(batch, *shape).expand(batch, *positions).reshape(batch, -1)
