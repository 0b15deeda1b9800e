"""What a chain of layers is, and the sums that pair neighbours."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from kfaccore.convolution.patches import Patches
from kfaccore.method import Block
from kfaccore.record import Record
from kfaccore.xp.arrays import Array, namespace


def checked(blocks: Mapping[str, Block], order: tuple[str, ...]) -> list[str]:
    """Names of the chain; ValueError naming the layer that cannot be part of it."""
    names = list(order or blocks)
    unknown = [name for name in names if name not in blocks]
    if unknown or len(set(names)) != len(names):
        raise ValueError(f"order is {names}; need different names of {sorted(blocks)}")
    if not order:
        _one_level(names)
    for name in names:
        block = blocks[name]
        if block.diagonal_in or block.diagonal_out or block.blocks > 1:
            alone = "an embedding" if block.diagonal_in else "too wide for a matrix of its outputs"
            what = f"{block.blocks} blocks" if block.blocks > 1 else alone
            raise ValueError(
                f"layer {name!r} is {what}; Tridiagonal takes dense layers and plain convolutions: {_hint}"
            )
    for before, name in pairwise(names):
        given = blocks[before].d_out
        taken = blocks[name].d_in
        if taken % given not in (0, 1) or taken < given:  # a kernel of several positions, with or without a bias
            raise ValueError(
                f"layer {name!r} takes {taken} inputs where {before!r} before it gives {given}: a branch, not a chain; "
                f"{_hint}"
            )
    return names


def refused(records: Mapping[str, Record]) -> None:
    """ValueError unless neighbours have the same examples and positions, and each takes what the one before gives."""
    for before, name in pairwise(records):
        one = records[before]
        other = records[name]
        sizes = {
            "draws": (one.draws, other.draws),
            "batch": (one.batch, other.batch),
            "shared": (one.shared, other.shared),
        }
        for what, (left, right) in sizes.items():
            if left != right:
                raise ValueError(
                    f"{what} is {left} in layer {before!r} and {right} in {name!r} after it; a Tridiagonal chain needs "
                    f"layers of one batch with as many positions each: {_hint}"
                )
        image = other.a.image if isinstance(other.a, Patches) else None
        takes = {other.d_in, other.d_in - 1} if image is None else {image.shape[-1]}
        if one.d_out not in takes:
            raise ValueError(
                f"layer {name!r} takes {min(takes)} features where {before!r} before it gives {one.d_out}: a branch, "
                f"not a chain; {_hint}"
            )


def paired(one: Record, other: Record) -> tuple[Array, Array]:
    """Sums over rows of a a'^T (1, d_in, d_in') and g g'^T (1, d_out, d_out')."""
    xp = namespace(one.g)
    a = xp.reshape(one.rows(), (-1, one.d_in))
    a_next = xp.reshape(other.rows(), (-1, other.d_in))
    g = xp.reshape(one.g, (-1, one.d_out))
    g_next = xp.reshape(other.g, (-1, other.d_out))
    return xp.matmul(a.mT, a_next)[None, ...], xp.matmul(g.mT, g_next)[None, ...]


def _one_level(names: list[str]) -> None:
    """Layers of different parts of a network need not follow each other."""
    parts = {name: name.rpartition(".")[0] for name in names}
    inner = [name for name in names if parts[name] != parts[names[0]]]
    if inner:
        raise ValueError(
            f"layer {inner[0]!r} lies in another part of the network than {names[0]!r}, such as a residual branch; "
            f"{_hint}"
        )


_hint = "name a chain in `order` and give the other layers to `methods`"
