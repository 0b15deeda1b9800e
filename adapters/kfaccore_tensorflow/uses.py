"""One use of a variable by one operation of a graph, and a tensor on its way from the variable there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from kfaccore_tensorflow.kinds import Kind
from kfaccore_tensorflow.layout import Layout, Matrix

Tensor = Any
Operation = Any

AS_IT_IS, BY_ONE_NUMBER, ELEMENTWISE = range(3)


@dataclass(frozen=True)
class Hot:
    """A tensor made of elements of one variable, one each.

    read     the variable's value, where it came from
    changed  AS_IT_IS; BY_ONE_NUMBER: all of it multiplied alike; ELEMENTWISE: each element by some function of it
    """

    tensor: Tensor
    layout: Layout
    read: Tensor
    changed: int = AS_IT_IS

    def on(self, tensor: Tensor, layout: Layout | None = None, changed: int = AS_IT_IS) -> Hot:
        """One operation further."""
        return replace(self, tensor=tensor, layout=layout or self.layout, changed=max(self.changed, changed))


@dataclass(frozen=True)
class Use:
    """`out` is linear in the matrix, up to the change that `hot` has been through.

    x        the other operand, or None
    """

    hot: Hot
    matrix: Matrix
    kind: Kind
    x: Tensor | None
    out: Tensor


class Unread(Exception):
    """Why a use of a variable cannot be read."""
