"""A record of the host in another namespace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from kfaccore.convolution.patches import Patches
from kfaccore.record.ids import Ids
from kfaccore.record.record import Record
from kfaccore.xp.arrays import Array


def moved(record: Record, asarray: Callable[[Array], Array]) -> Record:
    """The same record with arrays made by `asarray`."""
    a: Any = record.a
    if isinstance(a, Ids):
        a = Ids(asarray(a.index), a.size)
    elif isinstance(a, Patches):
        a = replace(a, image=asarray(a.image))
    else:
        a = asarray(a)
    others = {name: getattr(record, name) for name in ("mask", "ids")}
    there = {name: None if x is None else asarray(x) for name, x in others.items()}
    return Record(a, asarray(record.g), record.n, **there)
