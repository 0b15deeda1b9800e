"""Iterators that modules hold: a forward that reads from one moves it, and few of them can be moved back."""

from __future__ import annotations

import copy
import gc
import itertools
import warnings
from collections.abc import Iterator
from operator import length_hint
from types import GeneratorType
from typing import Any

_OF_THEIR_OWN = tuple(type(iter(x)) for x in ([], (), "", b"", range(0), range(1 << 70), {}, set()))
_INSIDE = 3  # iterators in each other


def copied(x: Iterator) -> Iterator | None:
    """One that stands where x stands and moves by itself; None where there is no such thing."""
    if not isinstance(x, (*_OF_THEIR_OWN, itertools.count)):
        return None  # others are copied with what is inside them shared, or not at all
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a count, from Python 3.12 on
        try:
            return copy.copy(x)
        except TypeError:
            return None


def place(x: Iterator, depth: int = 0) -> Any:
    """Equal as long as an iterator has not moved, as far as it shows."""
    if isinstance(x, GeneratorType):
        frame = x.gi_frame
        shown: Any = None if frame is None else (frame.f_lasti, [id(v) for v in frame.f_locals.values()])
    elif isinstance(x, itertools.count):
        shown = repr(x)
    else:
        try:
            shown = length_hint(x, -1)
        except TypeError:
            shown = None
    inner = gc.get_referents(x) if depth < _INSIDE else ()
    inner = [child for y in inner for child in (y if isinstance(y, tuple) else (y,))]  # `map` has a tuple of them
    return shown, [place(child, depth + 1) for child in inner if isinstance(child, Iterator)]
