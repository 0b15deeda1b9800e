"""Whose row is it? Which axis of an operation's rows counts the examples, asked of the gradients of a batch.

A draw v and the same draw with each example scaled by a power of two are pulled back to the rows. A row that one
example owns is scaled by that example's number, exactly; no other row is. What shapes suggest is confirmed so; where
nothing is, rows mix examples or are shared by them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import numpy as np

_LEVELS = 6


@dataclass(frozen=True)
class Place:
    """Examples are the index along one row axis, divided (outer) or modulo (inner); axis None: no row is one's own.

    mixes   whether rows move several examples, or are shared by them
    """

    axis: int | None = 0
    inner: bool = False
    mixes: bool = False

    def put(self, x: np.ndarray, lead: int, rows: int, examples: int) -> np.ndarray:
        """(*lead, *rows, d) -> (*lead, examples, positions, d); one example where axis is None."""
        if self.axis is None:
            return x.reshape(*x.shape[:lead], 1, prod(x.shape[lead:-1]), x.shape[-1])
        axis = lead + self.axis
        apart = x.shape[axis] // examples
        x = x.reshape(*x.shape[:axis], *((apart, examples) if self.inner else (examples, apart)), *x.shape[axis + 1 :])
        x = np.moveaxis(x, axis + self.inner, lead)
        return x.reshape(*x.shape[: lead + 1], prod(x.shape[lead + 1 : lead + rows + 1]), x.shape[-1])

    def fits(self, rows: tuple[int, ...], examples: int) -> bool:
        """Whether rows of these sizes can be so."""
        return self.axis is None or (self.axis < len(rows) and rows[self.axis] % examples == 0)


def suggested(rows: tuple[int, ...], examples: int) -> Iterator[Place]:
    """What sizes suggest, likeliest first."""
    for axis, size in enumerate(rows):
        if size == examples:
            yield Place(axis)
    for axis, size in enumerate(rows):
        if size > examples and size % examples == 0:
            yield Place(axis)
            yield Place(axis, inner=True)


def factors(examples: int) -> np.ndarray:
    """A power of two an example: all different where there are few, else drawn."""
    if examples <= _LEVELS:
        return 2.0 ** np.arange(examples)
    return 2.0 ** np.random.default_rng(examples).integers(0, _LEVELS, examples)


def owned(first: np.ndarray, second: np.ndarray, examples: int, old: Place | None = None) -> tuple[Place, bool]:
    """The place of rows (*rows, d) that gave `first` for a draw, and `second` for the draw times `factors`; and whether
    they show it: without a gradient, or where several places agree with it, `old` holds if there is one."""
    rows = first.shape[:-1]
    s = factors(examples)
    eps = np.finfo(first.dtype).eps
    slack = min(eps**0.5, 0.02) * np.abs(first).max(initial=0.0, axis=-1) + 4 * eps * s.max() * np.abs(first).max(
        initial=0.0
    )
    likeliest = None
    agreed = []
    for place in suggested(rows, examples):
        likeliest = likeliest or place
        a, b = (place.put(x, 0, len(rows), examples) for x in (first, second))
        wanted = s.astype(first.dtype)[:, None, None] * a
        room = place.put(slack[..., None], 0, len(rows), examples)
        if np.all(np.abs(b - wanted) <= room * s[:, None, None]):
            agreed.append(place)
    shown = examples > 1 and bool(np.any(first))
    if not shown or len(agreed) > 1:
        last = None if old is None or not old.fits(rows, examples) or (shown and old not in agreed) else old
        return last or next(iter(agreed), likeliest) or Place(None, mixes=True), False
    if agreed:
        return agreed[0], True
    apart = likeliest is None or ragged(first, second, examples) or _shared(first, second, likeliest, s)
    return Place(None if apart or likeliest is None else likeliest.axis, mixes=True), True


def ragged(first: np.ndarray, second: np.ndarray, examples: int) -> bool:
    """Whether each row is one example's, though no axis tells whose: its number is that of some example."""
    first, second = (x.reshape(-1, x.shape[-1]) for x in (first, second))
    size = np.abs(first).max(axis=1, initial=0.0)
    s = np.unique(factors(examples)).astype(first.dtype)[:, None]
    gap = np.stack([np.abs(second - one * first).max(axis=1, initial=0.0) for one in s])
    room = min(np.finfo(first.dtype).eps ** 0.5, 0.02) * size
    return bool(np.any(size > 0) and np.all(np.any(gap <= s * room, axis=0)))


def _shared(first: np.ndarray, second: np.ndarray, place: Place, s: np.ndarray) -> bool:
    """Whether rows are no example's even most of the time."""
    a, b = (place.put(x, 0, first.ndim - 1, len(s)) for x in (first, second))
    own = s[:, None, None] * a
    return float(((b - own) ** 2).sum()) >= 0.25 * float((own**2).sum())
