"""One use of a variable by one operation of a graph, and a tensor on its way from the variable there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from kfaccore_tensorflow.kinds import Kind
from kfaccore_tensorflow.layout import Layout, Matrix
from kfaccore_tensorflow.slopes import Factor, Path

Tensor = Any
Operation = Any

AS_IT_IS, BY_ONE_NUMBER, ELEMENTWISE = range(3)


@dataclass(frozen=True)
class Hot:
    """A tensor made of elements of one variable, one each.

    changed  AS_IT_IS; BY_ONE_NUMBER: all of it multiplied alike; ELEMENTWISE: each element by some function of it
    paths    the operations that changed it, of each way it came
    """

    tensor: Tensor
    layout: Layout
    changed: int = AS_IT_IS
    paths: tuple[Path, ...] = ((),)

    def on(self, tensor: Tensor, layout: Layout | None = None) -> Hot:
        """One operation further, as it is."""
        return replace(self, tensor=tensor, layout=layout or self.layout)

    def by(self, op: Operation, changed: int, layout: Layout | None = None) -> Hot:
        """One operation further, which changes each element."""
        layout = layout or self.layout
        factor = Factor(op, self.tensor, layout)
        paths = tuple((*path, factor) for path in self.paths)
        return Hot(op.outputs[0], layout, max(self.changed, changed), paths)


@dataclass(frozen=True)
class Use:
    """`out` is linear in the matrix, up to the change that `hot` has been through.

    x        the other operand, or None
    by       the other factor, of a weight that is a product of two
    """

    hot: Hot
    matrix: Matrix
    kind: Kind
    x: Tensor | None
    out: Tensor
    by: Tensor | None = None


def merged(uses: Sequence[Use]) -> list[Use]:
    """Uses of one tensor by one operation are one, to which the variable came by several paths."""
    found: dict[tuple, Use] = {}
    for use in uses:
        key = (id(use.out), id(use.hot.tensor), use.matrix.key)
        if key in found:
            first = found[key].hot
            hot = replace(first, changed=max(first.changed, use.hot.changed), paths=first.paths + use.hot.paths)
            use = replace(use, hot=hot)
        found[key] = use
    return list(found.values())


class Unread(Exception):
    """Why a use of a variable cannot be read."""
