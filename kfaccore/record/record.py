"""The record of a layer for one mini-batch, its gradient not multiplied out, and F by definition.

Shapes: a (blocks, batch, shared, d_in), g (draws, blocks, batch, shared, d_out). Per block and draw, example b has
J[v, b] = sum_s g[v, b, s] a[b, s]^T, and F = (1/n) sum_{v, b} vec(J) vec(J)^T with row-major vec.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import array_api_compat as aac
import numpy as np

from kfaccore import xp as kernels
from kfaccore.convolution.patches import Patches
from kfaccore.record.ids import Ids
from kfaccore.record.masks import flags
from kfaccore.xp.arrays import Array, device_of, is_numpy, namespace, widen


@dataclass(frozen=True)
class Record:
    """What a layer gives for one mini-batch.

    a     layer inputs (blocks, batch, shared, d_in) | (batch, shared, d_in) | (batch, d_in), or Ids, or Patches;
          a bias is a last column of ones (layers append it)
    g     gradients of the PER-EXAMPLE loss with respect to the layer's output: the rank of `a`, or one more with the
          draws first. Zero draws means G = I by definition
    n     this record's share of the loss normaliser: mean over B examples: B; token mean: the valid tokens; class
          weights: the sum of the weights; a sum loss: 1
    mask  (batch, shared) or (batch,): True or 1 where a position exists; the others are zeroed here and not counted.
          A number between them is no mask: ValueError, on a device a record that is not finite
    ids   (batch,) dataset positions, for methods that remember examples

    Raises ValueError or TypeError for wrong ranks, mismatched axes, mixed namespaces, dtypes or devices, an empty
    batch and n <= 0. Half precision is widened to float32.
    """

    a: Any
    g: Array
    n: float
    mask: Array | None = None
    ids: Array | None = None

    def __post_init__(self) -> None:
        put = object.__setattr__
        a, rank = _inputs(self.a)
        g = _gradients(widen(self.g, "g"), rank)
        put(self, "a", a)
        put(self, "g", g)
        _check_axes(a, g)
        if not isinstance(self.n, int | float | np.generic) and not (aac.is_array_api_obj(self.n) and self.n.ndim == 0):
            raise TypeError(f"n is {self.n!r}; need a number or a 0-d array")
        told = isinstance(self.n, int | float | np.generic)
        if (told and not 0 < self.n < float("inf")) or (is_numpy(self.n) and self.n < 0):
            raise ValueError(f"n is {self.n}; need the positive share of the loss normaliser (B for a mean over B)")
        if self.mask is not None:
            self._mask_out(self.mask)
        if isinstance(a, Ids):
            self._mark_strangers(a)
        if self.ids is not None and tuple(self.ids.shape) != (self.batch,):
            raise ValueError(f"ids has shape {tuple(self.ids.shape)}; need (batch,) = ({self.batch},)")

    def _mark_strangers(self, ids: Ids) -> None:
        """NaN for the gradients of ids that do not exist (NONFINITE later), which index row 0: never another's row."""
        xp = namespace(self.g)
        inside = (ids.index >= 0) & (ids.index < ids.size)
        if is_numpy(inside) and inside.all():
            return
        put = object.__setattr__
        put(self, "a", Ids(xp.where(inside, ids.index, xp.zeros_like(ids.index)), ids.size))
        self._show(inside if self.mask is None else inside | ~self.mask)

    def _show(self, good: Array) -> None:
        """NaN for the gradients of positions that are not good: what a device holds is not read, and NaN is seen."""
        xp = namespace(self.g)
        if self.draws:
            g = xp.where(good[..., None], self.g, xp.zeros_like(self.g) + float("nan"))
            object.__setattr__(self, "g", g)
        else:  # no gradients to mark: n is what is left
            object.__setattr__(self, "n", xp.where(xp.all(good), 1.0, float("nan")) * self.n)

    def _mask_out(self, mask: Array) -> None:
        """Zero the positions that do not exist, NaN padding included."""
        put = object.__setattr__
        xp = namespace(self.g, mask)
        mask, good = flags(mask[:, None] if mask.ndim == 1 else mask)
        if tuple(mask.shape) != (self.batch, self.shared):
            raise ValueError(f"mask has shape {tuple(mask.shape)}; need (batch, shared) = {(self.batch, self.shared)}")
        put(self, "mask", mask)
        put(self, "g", xp.where(mask[..., None], self.g, xp.zeros_like(self.g)))
        if not isinstance(self.a, Ids | Patches):
            put(self, "a", xp.where(mask[..., None], self.a, xp.zeros_like(self.a)))
        if good is not None:
            self._show(good)

    @property
    def draws(self) -> int:
        """Draws of g; 0 says that G = I."""
        return self.g.shape[0]

    @property
    def blocks(self) -> int:
        """Matrices that share this code path."""
        return self.g.shape[1]

    @property
    def batch(self) -> int:
        """Examples of the loss."""
        return self.g.shape[2]

    @property
    def shared(self) -> int:
        """Positions an example has, at most."""
        return self.g.shape[3]

    @property
    def d_out(self) -> int:
        """Width of g."""
        return self.g.shape[4]

    @property
    def d_in(self) -> int:
        """Width of a, the bias's column counted."""
        return self.a.size if isinstance(self.a, Ids) else self.a.shape[-1]

    def rows(self) -> Array:
        """`a` as an array (blocks, batch, shared, d_in): patches unfolded, ids one-hot; for small layers."""
        if isinstance(self.a, Patches):
            a = self.a.unfold()
        elif isinstance(self.a, Ids):
            xp = namespace(self.g)
            hit = self.a.index[..., None] == xp.arange(
                self.a.size, dtype=self.a.index.dtype, device=device_of(self.a.index)
            )
            a = xp.astype(hit, self.g.dtype)[None, ...]
        else:
            return self.a
        if self.mask is None:
            return a
        xp = namespace(a)
        return xp.where(self.mask[..., None], a, xp.zeros_like(a))

    def examples(self) -> Array:
        """J (draws, blocks, batch, d_out, d_in): the gradient of each example, summed over its positions."""
        return namespace(self.g).matmul(self.g.mT, self.rows()[None, ...])


@dataclass(frozen=True)
class Factored:
    """The mini-batch gradient g^T a / n, not multiplied out.

    a (blocks, batch, shared, d_in) | (batch, shared, d_in) | (batch, d_in); g alike with d_out. Raises as Record.
    """

    a: Array
    g: Array
    n: float

    def __post_init__(self) -> None:
        if isinstance(self.a, Ids | Patches):
            raise TypeError(f"Factored takes arrays, got {type(self.a).__name__}; form the gradient of such layers")
        record = Record(self.a, self.g, self.n)
        if record.draws != 1:
            raise ValueError(f"Factored.g has {record.draws} draws; a gradient has one")
        object.__setattr__(self, "a", record.a)
        object.__setattr__(self, "g", record.g[0, ...])

    def dense(self) -> Array:
        """The gradient (blocks, d_out, d_in)."""
        xp = namespace(self.a)
        a = xp.reshape(self.a, (self.a.shape[0], -1, self.a.shape[-1]))
        g = xp.reshape(self.g, (self.g.shape[0], -1, self.g.shape[-1]))
        return xp.matmul(g.mT, a) / kernels.scalar(self.n, a)


def dense(record: Record) -> Array:
    """F itself, literally: (blocks, d_out d_in, d_out d_in), row-major vec. The oracle of every method.

    Raises ValueError for a record without draws, whose G is I only by definition.
    """
    if record.draws == 0:
        raise ValueError("dense got a record of zero draws (forward only): its F is not defined, only G = I is")
    xp = namespace(record.g)
    j = xp.permute_dims(record.examples(), (1, 0, 2, 3, 4))
    j = xp.reshape(j, (record.blocks, record.draws * record.batch, -1))
    return kernels.gram(j) / kernels.scalar(record.n, j)


def _inputs(a: Any) -> tuple[Any, int]:
    """`a` with all its axes, and the rank that a `g` without draws must have."""
    if isinstance(a, Ids):
        index = a.index[:, None] if a.index.ndim == 1 else a.index
        return Ids(index, a.size), a.index.ndim + 1
    if isinstance(a, Patches):
        return a, 4 if a.blocks > 1 else 3
    a = widen(a, "a")
    if a.ndim not in (2, 3, 4):
        raise ValueError(
            f"a has shape {tuple(a.shape)}; need (batch, d_in), (batch, shared, d_in) or with blocks first"
        )
    rank = a.ndim
    for axis in {2: (1, 0), 3: (0,), 4: ()}[rank]:
        a = namespace(a).expand_dims(a, axis=axis)
    return a, rank


def _gradients(g: Array, rank: int) -> Array:
    """`g` with all its axes, read by the rank that goes with `a`; five axes are all of them."""
    xp = namespace(g)
    if g.ndim == 5:
        return g
    if g.ndim not in (rank, rank + 1):
        raise ValueError(f"g has shape {tuple(g.shape)}; need rank {rank} like a, or {rank + 1} with the draws first")
    g = xp.expand_dims(g, axis=0) if g.ndim == rank else g
    g = xp.expand_dims(g, axis=2) if rank == 2 else g
    return xp.expand_dims(g, axis=1) if rank < 4 else g


def _check_axes(a: Any, g: Array) -> None:
    array = a.index if isinstance(a, Ids) else a.image if isinstance(a, Patches) else a
    namespace(array, g)
    places = [device_of(array), device_of(g)]
    if None not in places and places[0] != places[1]:
        raise ValueError(f"a is on {places[0]} and g on {places[1]}; need one device")
    if not isinstance(a, Ids) and array.dtype != g.dtype:
        raise TypeError(f"a has dtype {array.dtype} and g {g.dtype}; need one dtype")
    shape = (1, *a.index.shape) if isinstance(a, Ids) else tuple(a.shape)[:-1]
    for name, left, right in zip(("blocks", "batch", "shared"), shape, g.shape[1:4], strict=True):
        if left != right:
            raise ValueError(
                f"{name} is {left} in a (shape {tuple(array.shape)}) and {right} in g (shape {tuple(g.shape)} with "
                f"draws and blocks first); need equal"
            )
    if 0 in g.shape[1:] or 0 in shape:
        raise ValueError(
            f"the record is empty: g has shape {tuple(g.shape)}; need at least one example, position and unit"
        )
