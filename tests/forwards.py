"""Forwards of the layer kinds in plain NumPy, by their definitions; uses nothing of kfaccore."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np


def linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | float = 0.0) -> np.ndarray:
    """weight (d_out, d_in)."""
    return np.einsum("...i,oi->...o", x, weight) + bias


def kernel(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | float = 0.0) -> np.ndarray:
    """weight (d_in, d_out)."""
    return np.einsum("...i,io->...o", x, weight) + bias


def lookup(ids: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """weight (size, d_out)."""
    return weight[ids]


def lone_bias(x: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """What the bias adds to x."""
    return np.zeros_like(x) + bias


def gain(x: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """x normalised already."""
    return x * gain


@dataclass(frozen=True)
class Convolution:
    """By loops: x (batch, *spatial, C_in), weight (*kernel, C_in / groups, C_out); `mode` is that of numpy.pad."""

    padding: tuple[tuple[int, int], ...]
    stride: tuple[int, ...] = (1, 1, 1)
    dilation: tuple[int, ...] = (1, 1, 1)
    groups: int = 1
    mode: str = "constant"

    def __call__(self, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | float = 0.0) -> np.ndarray:
        *kernel, c_in, c_out = weight.shape
        x = np.pad(x, [(0, 0), *self.padding, (0, 0)], mode=self.mode)
        sizes = zip(x.shape[1:-1], kernel, self.stride, self.dilation, strict=False)
        outputs = [(size - (k - 1) * reach - 1) // step + 1 for size, k, step, reach in sizes]
        y = np.zeros((len(x), *outputs, c_out)) + bias
        width = c_out // self.groups
        for position, offset in itertools.product(np.ndindex(*outputs), np.ndindex(*kernel)):
            places = zip(position, self.stride, offset, self.dilation, strict=False)
            pixel = x[(slice(None), *(p * step + r * reach for p, step, r, reach in places))]
            for unit in range(c_out):
                group = unit // width
                seen = pixel[:, group * c_in : (group + 1) * c_in]
                y[(slice(None), *position, unit)] += seen @ weight[(*offset, slice(None), unit)]
        return y


@dataclass(frozen=True)
class ChannelsFirst:
    """The same for x (batch, C_in, *spatial) and weight (C_out, C_in / groups, *kernel)."""

    last: Convolution

    def __call__(self, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | float = 0.0) -> np.ndarray:
        weight = np.moveaxis(weight, (1, 0), (-2, -1))
        return np.moveaxis(self.last(np.moveaxis(x, 1, -1), weight, bias), -1, 1)
