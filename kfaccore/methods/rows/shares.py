"""How the coefficients of one epoch are found again in the next: which entry of a table a unit of a batch is.

Source: Ou et al. 2024 (2403.03473) share coefficients between epochs; these readings of it are ours.
Cost: none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import array_api_compat as aac

from kfaccore.xp.arrays import Array, namespace, scalar


def epochs_rest(step: int | Array, steps: int, every: int) -> bool | Array:
    """Whether `step` is in an epoch of `steps` that shares: every one but the first, or but each `every`-th."""
    if not steps:
        return False
    epoch = step // steps
    return epoch % every != 0 if every else epoch > 0


def entries(
    share: Share, units: int, ids: Array | None, step: int | Array, steps: int, size: int, like: Array
) -> Array:
    """Entries (units,) of the units of the batch at `step`, in a table of `size`; ValueError where they do not fit."""
    slot = namespace(like).arange(units, dtype=namespace(like).int64, device=aac.device(like))
    return share.index(slot, ids, step % steps, size // steps if isinstance(share, Position) else size)


class Share(Protocol):
    """Which entry of the table a unit of a batch is."""

    def size(self, samples: int, slots: int, steps: int) -> int:
        """Entries of the table."""
        ...

    def index(self, slot: Array, ids: Array | None, turn: int | Array, slots: int) -> Array:
        """Entries (units,) of a batch at step `turn` of its epoch; slot is 0, 1, ..."""
        ...


@dataclass(frozen=True)
class Position:
    """Step in the epoch and slot in the batch: for batches replayed in the same order."""

    def size(self, samples: int, slots: int, steps: int) -> int:
        return steps * slots

    def index(self, slot: Array, ids: Array | None, turn: int | Array, slots: int) -> Array:
        return _fitting(slot, slots) + scalar(turn, slot) * slots


@dataclass(frozen=True)
class Sample:
    """The dataset position (`Record.ids`): the literal reading, for any order."""

    def size(self, samples: int, slots: int, steps: int) -> int:
        if samples < 1:
            raise ValueError("FNGD(share=sample) needs the size of the dataset: give Block.samples")
        return samples

    def index(self, slot: Array, ids: Array | None, turn: int | Array, slots: int) -> Array:
        if ids is None:
            raise ValueError("FNGD(share=sample) got no ids: give the dataset positions of the batch")
        return namespace(slot).astype(ids, slot.dtype)


@dataclass(frozen=True)
class MeanVector:
    """The slot in the batch: the mean over the steps of the epoch."""

    def size(self, samples: int, slots: int, steps: int) -> int:
        return slots

    def index(self, slot: Array, ids: Array | None, turn: int | Array, slots: int) -> Array:
        return _fitting(slot, slots)


@dataclass(frozen=True)
class Scalar:
    """One number a layer, the mean of all: SGD with a rate a layer, which the others must beat."""

    def size(self, samples: int, slots: int, steps: int) -> int:
        return 1

    def index(self, slot: Array, ids: Array | None, turn: int | Array, slots: int) -> Array:
        return namespace(slot).zeros_like(slot)


position, sample, mean_vector, scalar_rate = Position(), Sample(), MeanVector(), Scalar()


def _fitting(slot: Array, slots: int) -> Array:
    if slot.shape[0] > slots:
        raise ValueError(f"a batch has {slot.shape[0]} units and there are {slots} slots: raise slots (or Block.rows)")
    return slot
