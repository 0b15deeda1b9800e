"""What is due in one step: Python flags on the host, traced ones where a step is compiled once for all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from kfaccore import tree
from kfaccore.xp.arrays import Array, is_tracer
from kfaccore.xp.numbers import when

Flag = bool | Array
T = TypeVar("T")


@dataclass(frozen=True)
class Due:
    """Whether statistics move and whether inverses are made anew; an array decides on the device, under tracing."""

    update: Flag
    refresh: Flag


def strikes(step: int | Array, every: int) -> Flag:
    """Whether a clock strikes at a step; True itself where it always does, so that nothing is decided on a device."""
    if every == 1:
        return True
    struck = step % every == 0
    return struck if is_tracer(struck) else bool(struck)


def either(one: Flag, other: Flag) -> Flag:
    """`one` or `other`."""
    if one is True or other is True:
        return True
    return other if one is False else one if other is False else one | other


def gated(flag: Flag, yes: Callable[[], T], no: T) -> T:
    """yes() where the flag holds, else `no`, a tree of the same structure, shapes and dtypes; only one is run."""
    if isinstance(flag, bool):
        return yes() if flag else no
    leaves = iter(when(flag, lambda: tuple(tree.leaves(yes())), lambda: tuple(tree.leaves(no))))
    return tree.map(lambda _: next(leaves), no)
