"""Containers, arrays and tensors, kept as they are to be put back; attributes in `__slots__` are among them."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterator, MutableMapping
from functools import partial
from operator import is_
from types import MemberDescriptorType
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

_known: WeakKeyDictionary[type, dict[str, MemberDescriptorType]] = WeakKeyDictionary()


def slots(kind: type) -> dict[str, MemberDescriptorType]:
    """What reads and binds each, by name; read past the class's own `__setattr__`, as of one that is frozen."""
    found = _known.get(kind)
    if found is None:
        own = [vars(c) for c in reversed(kind.__mro__) if "__slots__" in vars(c)]
        found = {k: v for names in own for k, v in names.items() if isinstance(v, MemberDescriptorType)}
        _known[kind] = found
    return found


class Slots(MutableMapping[str, Any]):
    """The attributes of an object that stand in slots, by name: those that are bound."""

    def __init__(self, of: Any) -> None:
        self.of = of
        self.named = slots(type(of))

    def __getitem__(self, key: str) -> Any:
        try:
            return self.named[key].__get__(self.of)
        except AttributeError:
            raise KeyError(key) from None

    def __setitem__(self, key: str, value: Any) -> None:
        self.named[key].__set__(self.of, value)

    def __delitem__(self, key: str) -> None:
        self.named[key].__delete__(self.of)

    def __iter__(self) -> Iterator[str]:
        return (key for key in self.named if key in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def copy(self) -> dict[str, Any]:
        """As they are now, to be kept."""
        return dict(self)


NAMED = dict | Slots
CONTAINERS = NAMED | list | set | deque | bytearray | array


def kept_as_is(x: Any) -> partial:
    """What puts the numbers of an array, or the things in a container, back as they are now."""
    return partial(np.copyto if isinstance(x, np.ndarray) else filled, x, copied_as_is(x))


def copied_as_is(x: Any) -> Any:
    """The numbers of an array, or the things in a container, to be kept."""
    return x[:] if isinstance(x, array) else x.copy()


def written(x: torch.Tensor, kept: torch.Tensor) -> None:
    """Its numbers as they were; graphs that know the tensor do not count that as a change."""
    with torch.inference_mode(x.is_inference()):
        if x.shape != kept.shape:
            x.data = kept
        else:
            x.data.copy_(kept)


def filled(x: Any, kept: Any) -> None:
    """A container with what it had; the dict of a module's attributes, of which torch keeps some, too."""
    if len(x) == len(kept) and _same(x, kept):
        return
    if isinstance(x, list | bytearray | array):
        x[:] = kept
    elif isinstance(x, NAMED):
        for key in x.keys() - kept.keys():
            del x[key]
        for key, value in kept.items():
            x[key] = value  # `update` of a Counter adds
    else:
        x.clear()
        x.update(kept) if isinstance(x, set) else x.extend(kept)


def _same(x: Any, kept: Any) -> bool:
    """Whether two containers of one kind and size hold the same things."""
    if isinstance(x, NAMED):
        return all(map(is_, x.values(), kept.values())) and all(map(is_, x, kept))
    return isinstance(x, list | deque) and all(map(is_, x, kept))


def changed(x: Any, kept: Any) -> bool:
    """Whether a tensor, an array or a container is not as it was kept."""
    if isinstance(x, torch.Tensor):
        return x.shape != kept.shape or not bool(((x == kept) | ((x != x) & (kept != kept))).all())
    if isinstance(x, np.ndarray | array):
        return x.tobytes() != kept.tobytes()
    return len(x) != len(kept) or not (x == kept if isinstance(x, set | bytearray) else _same(x, kept))
