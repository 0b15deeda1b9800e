"""Convolutions over 1, 2 or 3 spatial axes: the record keeps the image, one block a group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

from kfaccore.convolution.patches import Patches, Window
from kfaccore.method import Block
from kfaccore.xp.arrays import Array, device_of, namespace


@dataclass(frozen=True)
class Conv:
    """Geometry of a convolution layer.

    window           kernel, stride, dilation, and padding: numbers, (low, high) pairs, "same" or "valid"
    channels         (in, out) over all groups
    padding_mode     "zeros", "reflect", "replicate" or "circular"
    channels_first   images (batch, C, *spatial) and weight (C_out, C_in / groups, *kernel) when True; else
                     (batch, *spatial, C) and (*kernel, C_in / groups, C_out)
    """

    window: Window
    channels: tuple[int, int]
    groups: int = 1
    bias: bool = True
    padding_mode: str = "zeros"
    channels_first: bool = False

    def __post_init__(self) -> None:
        if self.groups < 1 or min(self.channels) < 1 or any(c % self.groups for c in self.channels):
            raise ValueError(f"channels {self.channels} do not divide into {self.groups} groups")
        if self.padding_mode not in ("zeros", "reflect", "replicate", "circular"):
            raise ValueError(f"padding_mode is {self.padding_mode!r}; need zeros, reflect, replicate or circular")

    def block(self) -> Block:
        """One block a group, the bias a column."""
        c_in, c_out = (c // self.groups for c in self.channels)
        return Block(c_out, prod(self.window.kernel) * c_in + self.bias, self.groups)

    def activations(self, x: Array) -> Patches:
        """Images as Patches, groups first when there are several; other padding modes are applied here."""
        xp = namespace(x)
        axes = len(self.window.kernel)
        self._check("x", x, 1, self.channels[0])
        if self.channels_first:
            x = xp.permute_dims(x, (0, *range(2, axes + 2), 1))
        window = self.window
        if self.padding_mode != "zeros":
            for axis, (low, high) in enumerate(window.padding, start=1):
                x = _padded(x, axis, low, high, self.padding_mode)
            window = replace(window, padding=0)
        if self.groups > 1:
            x = xp.reshape(x, (*x.shape[:-1], self.groups, -1))
            x = xp.permute_dims(x, (axes + 1, *range(axes + 1), axes + 2))
        return Patches(x, window, self.bias)

    def gradients(self, gy: Array, draws: bool = False) -> Array:
        """Output gradients, draws first if `draws` -> g (groups if several, batch, positions, C_out / groups)."""
        xp = namespace(gy)
        lead = 1 + draws
        self._check("gy", gy, lead, self.channels[1])
        if self.channels_first:
            gy = xp.permute_dims(gy, (*range(lead), *range(lead + 1, gy.ndim), lead))
        gy = xp.reshape(gy, (*gy.shape[:lead], -1, gy.shape[-1]))
        if self.groups == 1:
            return gy
        gy = xp.reshape(gy, (*gy.shape[:-1], self.groups, -1))
        return xp.permute_dims(gy, (*range(draws), gy.ndim - 2, *range(draws, gy.ndim - 2), gy.ndim - 1))

    def matrix(self, parameters: Mapping[str, Array]) -> Array:
        """{"weight", "bias"} -> (groups, C_out / groups, d_in), columns (kernel positions, channel), then the bias."""
        xp = namespace(*parameters.values())
        w = parameters["weight"]
        axes = len(self.window.kernel)
        kernel = self.window.kernel
        c_in = self.channels[0] // self.groups
        c_out = self.channels[1]
        need = (c_out, c_in, *kernel) if self.channels_first else (*kernel, c_in, c_out)
        if tuple(w.shape) != need:
            raise ValueError(f"weight has shape {tuple(w.shape)}; need {need} for channels_first={self.channels_first}")
        w = xp.permute_dims(w, (0, *range(2, axes + 2), 1) if self.channels_first else (axes + 1, *range(axes + 1)))
        w = xp.reshape(w, (self.groups, self.channels[1] // self.groups, -1))
        return xp.concat([w, xp.reshape(parameters["bias"], (self.groups, -1, 1))], axis=-1) if self.bias else w

    def parameters(self, matrix: Array) -> dict[str, Array]:
        """The inverse of `matrix`; a 2-D matrix is taken for one group."""
        xp = namespace(matrix)
        axes = len(self.window.kernel)
        c_in = self.channels[0] // self.groups
        block = self.block()
        need = (block.blocks, block.d_out, block.d_in)
        if tuple(matrix.shape) != (need if matrix.ndim == 3 or block.blocks > 1 else need[1:]):
            raise ValueError(f"matrix has shape {tuple(matrix.shape)}; need (groups, d_out, d_in) = {need}")
        w = matrix[..., : matrix.shape[-1] - 1] if self.bias else matrix
        w = xp.reshape(w, (self.channels[1], *self.window.kernel, c_in))
        order = (0, axes + 1, *range(1, axes + 1)) if self.channels_first else (*range(1, axes + 2), 0)
        named = {"weight": xp.permute_dims(w, order)}
        return {**named, "bias": xp.reshape(matrix[..., -1], (-1,))} if self.bias else named

    def _check(self, name: str, x: Array, lead: int, channels: int) -> None:
        """ValueError unless `x` has `lead` leading axes, the spatial ones and `channels`."""
        axes = len(self.window.kernel)
        place = lead if self.channels_first else -1
        if x.ndim != lead + axes + 1 or x.shape[place] != channels:
            order = f"{channels} channels {'before' if self.channels_first else 'after'} {axes} spatial axes"
            raise ValueError(f"{name} has shape {tuple(x.shape)}; need {'draws, ' * (lead - 1)}batch and {order}")


def _padded(x: Array, axis: int, low: int, high: int, mode: str) -> Array:
    """x with `low` and `high` positions added on `axis` by copying others."""
    size = x.shape[axis]
    if (mode == "reflect" and max(low, high) >= size) or (mode == "circular" and max(low, high) > size):
        raise ValueError(f"{mode} padding of {(low, high)} needs a longer axis than {size}")
    index = range(-low, size + high)
    if mode == "replicate":
        index = [min(max(i, 0), size - 1) for i in index]
    elif mode == "circular":
        index = [i % size for i in index]
    else:
        index = [abs(i) if i < size else 2 * (size - 1) - i for i in index]
    xp = namespace(x)
    return xp.take(x, xp.asarray(list(index), device=device_of(x)), axis=axis)
