"""What a step is given for a layer: Records, tuples of them (one a loss term), or Stats measured elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from kfaccore import tree
from kfaccore.record import Record
from kfaccore.xp.arrays import Array, namespace


def is_stats(x: Any) -> bool:
    """Whether it is Stats of a method: they count what was not finite."""
    return hasattr(x, "bad")


def records_of(batches: Sequence[Any]) -> Iterator[Record]:
    """The Records of micro-batches, terms of tuples one by one, Stats left out."""
    for batch in batches:
        yield from batch if isinstance(batch, tuple) else () if is_stats(batch) else (batch,)


def in_dtype(stats: Any, like: Array | None) -> Any:
    """Stats in the dtype of the state they will move."""
    if like is None or stats.bad.dtype == like.dtype:
        return stats
    return tree.map(lambda x: namespace(x).astype(x, like.dtype), stats)


def like_gradient(direction: Array, grad: Any, like: Array | None) -> Array:
    """A direction in the dtype of its gradient, where the state's wider one made it wider."""
    wanted = getattr(grad, "g", grad).dtype
    if like is None or direction.dtype == wanted or direction.dtype != like.dtype:
        return direction
    return namespace(like).astype(direction, wanted)


@contextmanager
def named(layer: str) -> Iterator[None]:
    """Adds the layer's name to whatever is raised inside, once."""
    try:
        yield
    except Exception as error:
        error.add_note(f"in layer {layer!r}")
        raise
