"""Masks: flags of which positions exist, in whatever dtype they come."""

from __future__ import annotations

from kfaccore.xp.arrays import Array, is_numpy, namespace


def flags(mask: Array) -> tuple[Array, Array | None]:
    """(positions that exist, entries that are flags: False, True, 0 or 1), bool like the mask.

    None where the host knows that all are. A weight is no flag: ValueError where it can be read, which on a device is
    for the record or loss to show.
    """
    xp = namespace(mask)
    if xp.isdtype(mask.dtype, "bool"):
        return mask, None
    exists = mask != 0
    good = ~exists | (mask == 1)
    if not is_numpy(good):
        return exists, good
    if not good.all():
        raise ValueError(
            f"mask has entries such as {mask[~good][0]}, shape {tuple(mask.shape)}; need 0 or 1, whether a position "
            f"exists: weights of examples multiply the loss and its gradient, their roots the draws, and n is their sum"
        )
    return exists, None
