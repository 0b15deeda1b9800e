"""Weights that are a product of two parameters, W = first @ second, as low-rank adapters are: each factor's own use.

W goes into an operation that is linear in it, with rows a and output gradients g. With W (inputs, outputs) that is
linear in `first` for rows a and g second^T, and in `second` for a first and g; either factor is read with the other as
it is. Where the first axes of W alone are inputs, as of heads (inputs, heads, outputs), `first` has as many outputs a
head, and `second` a row a head. A table (ids, outputs) that is looked up is the same with a the ids' one-hot rows:
`first` is looked up itself, and `second` multiplied with the rows found there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import tensorflow as tf

from kfaccore import Patches
from kfaccore_tensorflow.kinds import Convolution, Kind, Lookup, Product, Seen
from kfaccore_tensorflow.layout import Layout, Matrix
from kfaccore_tensorflow.uses import BY_ONE_NUMBER, Hot, Operation, Tensor, Use


@dataclass(frozen=True)
class Half:
    """A factor's use.

    kind      of the product
    inputs    whether the factor is on the side of the inputs
    heads     elements of those axes of the first factor that are outputs of the product
    """

    kind: Kind
    inputs: bool
    heads: int = 1

    def rows(self, x: np.ndarray | None, gy: np.ndarray, ones: bool) -> Seen:
        """Of the product; `through` takes them to the factor."""
        return self.kind.rows(x, gy, ones)

    def through(self, seen: Seen, other: np.ndarray) -> Seen:
        """Rows of the factor: `other` is (outputs, rank) for one on the side of the inputs, else (inputs, rank)."""
        apart = (self.heads, seen.g.shape[-1] // self.heads)
        if self.inputs:
            g = seen.g.reshape(*seen.g.shape[:-1], *apart) @ other
            return Seen(seen.a, g.reshape(*seen.g.shape[:-1], -1))
        a = seen.a
        if isinstance(self.kind, Lookup):
            return Seen(other[np.asarray(a)][None].astype(seen.g.dtype), seen.g)
        if isinstance(a, Patches):
            unfolded = np.asarray(a.unfold())
            a = unfolded.reshape(unfolded.shape[0], *seen.rows, unfolded.shape[-1])
        if self.heads == 1:
            return Seen(a @ other, seen.g)
        made = a @ other.reshape(a.shape[-1], -1)
        return Seen(made.reshape(*a.shape[:-1], self.heads, -1), seen.g.reshape(*seen.g.shape[:-1], *apart))


def table(kind: Kind) -> Lookup | None:
    """The look-up by which an operation uses a weight, or a product that it is a factor of; None where it is none."""
    kind = kind.kind if isinstance(kind, Half) else kind
    return kind if isinstance(kind, Lookup) else None


def looked_up(kind: Kind) -> Lookup | None:
    """The look-up of a weight's own rows; None where it is used otherwise."""
    return None if isinstance(kind, Half) and not kind.inputs else table(kind)


def halves(use: Use, uses_of: Callable[[Hot], Sequence[Use] | None]) -> list[Use] | None:
    """The uses of a factor that `use` multiplies with another; None where the product is not a plain one, or goes
    elsewhere than into a matrix.

    uses_of   where a tensor goes; None where that cannot be read
    """
    op = use.out.op
    if not _plain(op) or use.hot.changed or not use.out.shape.is_fully_defined():
        return None
    layout = Layout.of(use.out.shape)
    straight = _straight(layout)  # rows of the product are inputs
    first = op.inputs[0] is use.hot.tensor
    goes = uses_of(Hot(use.out, layout))
    if not goes:
        return None
    found = []
    for one in goes:
        known = isinstance(one.kind, Product | Convolution | Lookup) and one.hot.changed <= BY_ONE_NUMBER
        turned = one.matrix.key == straight.turned().key != straight.key
        ins = straight.sizes[2] if turned or not known else one.matrix.sizes[2]
        whole = _apart(layout, ins)
        own = _apart(use.hot.layout, ins) if first else _straight(use.hot.layout)
        if not known or own is None or whole is None or not (turned or one.matrix.key == whole.key):
            return None
        other = tf.transpose(op.inputs[1]) if first else tf.reshape(op.inputs[0], [-1, op.inputs[0].shape[-1]])
        half = Half(one.kind, inputs=first != turned, heads=straight.sizes[2] // ins)
        scaled = other * _number(one.hot, other)
        found.append(replace(use, matrix=own.turned() if turned else own, kind=half, x=one.x, out=one.out, by=scaled))
    return found


def _plain(op: Operation) -> bool:
    """Whether it is rows times one matrix, rows along any axes: Keras 3.10 multiplies factors of kernels so."""
    if op.type == "MatMul":
        return not (op.get_attr("transpose_a") or op.get_attr("transpose_b"))
    batched = op.type in ("BatchMatMulV2", "BatchMatMulV3") and op.inputs[1].shape.rank == 2
    return batched and not (op.get_attr("adj_x") or op.get_attr("adj_y"))


def _straight(layout: Layout) -> Matrix:
    """The last axis are outputs, all others inputs."""
    last = len(layout.axes) - 1
    return Matrix.split(layout, (), (last,), range(last))


def _apart(layout: Layout, ins: int) -> Matrix | None:
    """So many elements of the first axes are inputs, those behind them outputs; None where they do not split so."""
    straight = _straight(layout)
    if straight.sizes[2] == ins:
        return straight
    try:
        split = layout.reshaped((ins, straight.sizes[2] // ins, layout.shape[-1]))
    except ValueError:
        return None
    return Matrix.split(split, (), (1, 2), (0,))


def _number(hot: Hot, like: Tensor) -> Tensor:
    """What the product was multiplied with on its way, over all ways it came."""
    total = []
    for path in hot.paths:
        slopes = [tf.cast(tf.reshape(factor.slope(), []), like.dtype) for factor in path]
        total.append(tf.reduce_prod(tf.stack([tf.ones([], like.dtype), *slopes])))
    return tf.add_n(total)
