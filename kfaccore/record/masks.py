"""Masks: flags of which positions exist, in whatever dtype they come."""

from __future__ import annotations

from kfaccore.xp.arrays import Array, is_numpy, namespace


def flags(mask: Array) -> tuple[Array, Array | None]:
    """(positions that exist, entries that are flags: False, True, 0 or 1), (batch, shared) or (batch, 1) bool.

    None where the host knows that all are. A weight is no flag: ValueError where it can be read, which on a device is
    for the record to show.
    """
    xp = namespace(mask)
    mask = mask[:, None] if mask.ndim == 1 else mask
    if xp.isdtype(mask.dtype, "bool"):
        return mask, None
    exists = mask != 0
    good = ~exists | (mask == 1)
    if not is_numpy(good):
        return exists, good
    if not good.all():
        raise ValueError(
            f"mask has entries such as {mask[~good][0]}, shape {tuple(mask.shape)}; need 0 or 1, whether a position "
            f"exists: weights of examples belong into the loss, so into g, and n is their sum"
        )
    return exists, None
