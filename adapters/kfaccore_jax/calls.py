"""A captured call: which leaf acts on which axes of an input and an output, and both in the order of a Record."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from kfaccore import Ids, Patches, Window
from kfaccore_jax.layout import Axis, Layout


@dataclass(frozen=True)
class View:
    """Axes of an array by role: blocks, shared (the batch is one of them), features.

    split   (axis, groups) that is divided in two first; the roles count its parts as two axes
    """

    blocks: tuple[int, ...] = ()
    shared: tuple[int, ...] = ()
    features: tuple[int, ...] = ()
    split: tuple[int, int] | None = None

    def within(self, stacked: bool) -> View:
        """Seen from outside a scan: a new first axis, of blocks if the leaf is stacked over it."""
        blocks, shared, features = (tuple(i + 1 for i in axes) for axes in (self.blocks, self.shared, self.features))
        split = self.split and (self.split[0] + 1, self.split[1])
        if stacked:
            return View((0, *blocks), shared, features, split)
        return View(blocks, (0, *shared), features, split)

    def arranged(self, x: Any, batch: int | None, keep: bool = False) -> Any:
        """x as (blocks, batch, other shared axes joined, features), features joined unless `keep`; `batch` is the
        place of the batch axis within `shared`, None for rows that all examples share: a batch of one."""
        if self.split:
            axis, groups = self.split
            x = x.reshape(*x.shape[:axis], groups, x.shape[axis] // groups, *x.shape[axis + 1 :])
        others = tuple(axis for i, axis in enumerate(self.shared) if i != batch)
        first = () if batch is None else (self.shared[batch],)
        lead = prod(x.shape[i] for i in self.blocks), prod(x.shape[i] for i in first), prod(x.shape[i] for i in others)
        features = tuple(x.shape[i] for i in self.features)
        x = x.transpose(*self.blocks, *first, *others, *self.features)
        return x.reshape(*lead, *(features if keep else (prod(features),)))


@dataclass(frozen=True)
class BiasOf:
    """A bias added to the untouched output of a call: its leaf, axes like the call's, and the sign it came with."""

    leaf: int
    blocks: tuple[Axis, ...]
    outs: tuple[Axis, ...]
    offset: int
    factor: float


@dataclass(frozen=True)
class Call:
    """One use of a leaf.

    kind     dense | conv | embedding | bias | scale
    blocks, outs, ins   axes of the leaf in the order of the matrix (blocks, d_out, d_in)
    x, y     roles of the axes of the input kept and of the output
    window   geometry of a convolution; `edges` (low, high, interior) pad and dilate its image first
    stack    depths of the scans whose axis is one of blocks; they come first
    batch    place of the batch axis within `shared`, set by the plan; None for rows that all examples share
    mixed    outputs of other examples depend on a row, through a sum over examples; set by the plan
    outer    batches that lie one behind the other on that axis, as two views concatenated do; set by the plan
    """

    kind: str
    leaf: int
    blocks: tuple[Axis, ...]
    outs: tuple[Axis, ...]
    ins: tuple[Axis, ...]
    offset: int
    x: View
    y: View
    window: Window | None = None
    edges: tuple[tuple[int, int, int], ...] = ()
    stack: tuple[int, ...] = ()
    bias: BiasOf | None = None
    batch: int | None = 0
    mixed: bool = False
    outer: int = 1

    def within(self, depth: int) -> Call:
        """Seen from outside the scan of that depth."""
        stacked = depth in self.stack
        return replace(self, x=self.x.within(stacked), y=self.y.within(stacked))

    def layout(self) -> Layout:
        """Of the matrix in the leaf, axes not joined."""
        return Layout.from_axes((*self.blocks, *self.outs, *self.ins), self.offset)

    def owners(self, n: int) -> int:
        """Examples in its record: n, or 1 where all share its rows."""
        return 1 if self.batch is None else n

    def _arranged(self, view: View, x: Any, n: int, keep: bool = False) -> Any:
        """View.arranged with all rows of an example after those of the example before it."""
        x = view.arranged(x, self.batch, keep)
        if self.outer == 1:
            return x
        return x.reshape(x.shape[0], self.outer, n, -1, *x.shape[2:]).swapaxes(1, 2).reshape(x.shape)

    def gradients(self, g: Any, x: Any, n: int) -> Any:
        """Output gradients (draws, *y.shape) -> g (draws, blocks, batch, shared, d_out)."""

        def one(g: Any) -> Any:
            g = g * x if self.kind == "scale" else g
            g = self._arranged(self.y, g, n)
            return g.reshape(g.shape[0], self.owners(n), -1, g.shape[-1])

        return jax.vmap(one)(g)

    def inputs(self, x: Any, like: Any, n: int, lone: bool = False) -> Any:
        """What a Record calls `a`, for g `like`: (blocks, batch, shared, d_in), Ids or Patches.

        lone   for the bias of this call alone: ones
        """
        shape = like.shape[1:4]
        n = self.owners(n)
        if self.kind == "embedding" and not lone:
            return Ids(self._arranged(self.x, x, n).reshape(n, -1), self.ins[0][0])
        if self.kind in ("dense", "conv") and not lone:
            x = self._image(x, n) if self.kind == "conv" else self._arranged(self.x, x, n)
            return x if isinstance(x, Patches) else x.reshape(*shape, x.shape[-1]).astype(like.dtype)
        size = prod(k for k, _ in self.ins)
        if lone or not self.ins:
            return jnp.full((*shape, 1), self.bias.factor if lone and self.bias else 1.0, like.dtype)
        return Ids(jnp.tile(jnp.arange(size), (n, shape[2] // size)), size)

    def _image(self, x: Any, n: int) -> Any:
        """Patches (groups, batch, *spatial, C); their rows where more than one image belongs to an example."""
        window = self.window
        assert window is not None
        x = self._arranged(self.x, x, n, keep=True)
        blocks, batch, shared = x.shape[:3]
        if self.edges:
            x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0)] * 3 + list(self.edges) + [(0, 0, 0)])
        patches = Patches(x.reshape(blocks, batch * shared, *x.shape[3:]), window)
        return patches if batch * shared == n else jnp.reshape(patches.unfold(), (blocks, n, -1, patches.shape[-1]))
