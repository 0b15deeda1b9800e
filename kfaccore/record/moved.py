"""A record of the host in another namespace."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kfaccore.convolution.patches import Patches
from kfaccore.record.record import Ids, Record


def moved(record: Record, xp: Any) -> Record:
    """The same record with arrays of `xp`."""
    a: Any = record.a
    if isinstance(a, Ids):
        a = Ids(xp.asarray(a.index), a.size)
    elif isinstance(a, Patches):
        a = replace(a, image=xp.asarray(a.image))
    else:
        a = xp.asarray(a)
    others = {name: getattr(record, name) for name in ("mask", "ids")}
    there = {name: None if x is None else xp.asarray(x) for name, x in others.items()}
    return Record(a, xp.asarray(record.g), record.n, **there)
