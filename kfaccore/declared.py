"""Whether a method declares a capability."""

from __future__ import annotations

from functools import cache
from typing import TypeGuard, TypeVar

C = TypeVar("C")


def declares(method: object, capability: type[C]) -> TypeGuard[C]:
    """Whether a method has all names of a capability, and does not say False to it."""
    return not any(getattr(method, name, False) is False for name in names(capability))


@cache
def names(capability: type) -> tuple[str, ...]:
    """The attributes that a capability is made of."""
    found = {**vars(capability).get("__annotations__", {}), **vars(capability)}
    return tuple(name for name in found if not name.startswith("_"))
