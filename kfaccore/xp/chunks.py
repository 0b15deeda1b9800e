"""How much to take at once, so that a temporary array stays bounded."""

from __future__ import annotations

from collections.abc import Iterator

from kfaccore.xp.arrays import Array, is_numpy

HELD = 1 << 22  # numbers that a temporary array may hold where nothing else is known: 16 MB in float32
CACHED = 1 << 19  # and that stay in a core's cache until they are read again: 2 MB


def at_once(each: int, held: int | None = None) -> int:
    """How many rows or examples fit when one takes `each` numbers and `held` may be held; at least one."""
    return max(1, (HELD if held is None else held) // each)


def read_again(each: int, x: Array) -> int:
    """As `at_once`, of a temporary array of NumPy's that is read again as soon as it is made; a device and a compiler
    ask for few operations instead."""
    return at_once(each, CACHED if is_numpy(x) else HELD)


def spans(count: int, step: int) -> Iterator[slice]:
    """0 .. count cut into slices of `step`, the last one shorter; ends are explicit, as the standard asks."""
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))
