"""How the coefficients of one epoch are found again in the next: when, and which entry of a table a unit of a batch is.

Source: Ou et al. 2024 (2403.03473) share coefficients between epochs; these readings of it are ours.
Cost: none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

from kfaccore.method import Hyper
from kfaccore.options import function, instance
from kfaccore.record import Record
from kfaccore.record.sharing import whole
from kfaccore.xp.arrays import Array, device_of, namespace, scalar
from kfaccore.xp.ranges import COUNT, SOME, ranged


class Share(Protocol):
    """Which entry of the table a unit of a batch is."""

    def size(self, samples: int, slots: int, steps: int) -> int:
        """Entries of the table."""
        ...

    def index(self, slot: Array, ids: Array | None, turn: int | Array, steps: int, size: int) -> Array:
        """Entries (units,) of a batch at step `turn` of its `steps`, in a table of `size`, -1 where there is none; slot
        is 0, 1, ..."""
        ...


@dataclass(frozen=True)
class Position:
    """Step in the epoch and slot in the batch: for batches replayed in the same order."""

    def size(self, samples: int, slots: int, steps: int) -> int:
        return steps * slots

    def index(self, slot: Array, ids: Array | None, turn: int | Array, steps: int, size: int) -> Array:
        slots = size // steps
        return _fitting(slot, slots) + scalar(turn, slot) * slots


@dataclass(frozen=True)
class Sample:
    """The dataset position (`Record.ids`): the literal reading, for any order. A position that does not exist is an
    error where ids can be read for nothing; on a device and under a trace it has no entry, and its weight is NaN."""

    def size(self, samples: int, slots: int, steps: int) -> int:
        if samples < 1:
            raise ValueError("FNGD(share=sample) needs the size of the dataset: give Block.samples")
        return samples

    def index(self, slot: Array, ids: Array | None, turn: int | Array, steps: int, size: int) -> Array:
        if ids is None:
            raise ValueError("FNGD(share=sample) got no ids: give the dataset positions of the batch")
        xp = namespace(slot)
        if not xp.isdtype(ids.dtype, "integral"):
            raise TypeError(f"FNGD(share=sample) got ids of dtype {ids.dtype}; need integers, the dataset positions")
        given = xp.astype(ids, slot.dtype)
        exists = (given >= 0) & (given < size)
        free = str(device_of(given)) == "cpu"  # NumPy and torch; JAX calls no device so, and is not read
        if free and not bool(xp.all(exists)):
            raise ValueError(
                f"FNGD(share=sample) got ids from {int(xp.min(given))} to {int(xp.max(given))}; need dataset positions "
                f"from 0 to {size - 1}: Block.samples, the size of the dataset, is {size}"
            )
        return xp.where(exists, given, xp.zeros_like(given) - 1)


@dataclass(frozen=True)
class MeanVector:
    """The slot in the batch: the mean over the steps of the epoch."""

    def size(self, samples: int, slots: int, steps: int) -> int:
        return slots

    def index(self, slot: Array, ids: Array | None, turn: int | Array, steps: int, size: int) -> Array:
        return _fitting(slot, size)


@dataclass(frozen=True)
class Scalar:
    """One number a layer, the mean of all: SGD with a rate a layer, which the others must beat."""

    def size(self, samples: int, slots: int, steps: int) -> int:
        return 1

    def index(self, slot: Array, ids: Array | None, turn: int | Array, steps: int, size: int) -> Array:
        return namespace(slot).zeros_like(slot)


position = Position()
sample = Sample()
mean_vector = MeanVector()
scalar_rate = Scalar()


@dataclass(frozen=True)
class Coefficients:
    """What FNGD of a layer, which explains the fields, and FNGD of all layers have in common: when and how coefficients
    are shared."""

    share: Share = mean_vector
    steps: int = 100
    every: int = 0
    sharing: Callable[[Record], Record] = whole
    slots: int = 512
    relative: bool = False
    own_gradients: ClassVar[bool] = True

    def __post_init__(self) -> None:
        instance(self, "share", Share, "mean_vector, position, sample or scalar_rate of kfaccore.methods.rows.fngd")
        function(self, "sharing", "whole, expand or reduce")
        ranged(self, steps=SOME, every=SOME, slots=COUNT)

    def rests(self, hyper: Hyper) -> bool | Array:
        """Whether the step is in an epoch that shares: no record is needed, and gradients come weighted."""
        if not self.steps:
            return False
        epoch = hyper.step // self.steps
        return epoch % self.every != 0 if self.every else epoch > 0

    def entries(self, units: int, ids: Array | None, hyper: Hyper, size: int, like: Array) -> Array:
        """Entries (units,) of the units of the batch of a step, in a table of `size`; ValueError where they do not
        fit."""
        xp = namespace(like)
        slot = xp.arange(units, dtype=xp.int64, device=device_of(like))
        return self.share.index(slot, ids, hyper.step % self.steps, self.steps, size)


def _fitting(slot: Array, slots: int) -> Array:
    if slot.shape[0] > slots:
        raise ValueError(f"a batch has {slot.shape[0]} units and there are {slots} slots: raise slots (or Block.rows)")
    return slot
