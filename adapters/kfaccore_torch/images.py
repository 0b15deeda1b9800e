"""Calls of a convolution as a record: the image is kept wherever the examples are along its batch axis."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from kfaccore import Patches, Window
from kfaccore.layers import Conv
from kfaccore_torch.bridge import detached, to_core
from kfaccore_torch.calls import Call
from kfaccore_torch.places import Axes, Place

Array = Any


def conv_part(kind: Conv, call: Call, g: torch.Tensor, place: Place, namespace: str) -> tuple[Any, Array]:
    """a and g (draws first) of one call, g (draws, *output shape).

    The geometry is that of the call: padding of other modes has been done to the image before. Several images an
    example are one more axis of it, along which the kernel is 1; any other place unfolds the rows.
    """
    axes = len(kind.window.kernel)
    here = replace(kind, window=_window(kind, call), padding_mode="zeros", channels_first=True)
    x = detached(call.x)
    if x.ndim == axes + 1:
        x = x[None]
        g = g[:, None]
    if call.options.get("transposed"):
        x, g = _turned(x, g, here, call)
        here = replace(here, window=Window(kind.window.kernel, dilation=tuple(call.options["dilation"])))
    if isinstance(place, Axes) and place.plain:
        return here.activations(to_core(x, namespace)), here.gradients(to_core(g, namespace), draws=True)
    patches = here.activations(x)
    g = here.gradients(g, draws=True)  # (draws, [groups,] images, positions, C / groups)
    g = g[:, None] if g.ndim == 4 else g
    g = g.reshape(*g.shape[:2], *call.rows, g.shape[-1])
    if isinstance(place, Axes) and place.axis == 0 and axes < 3:
        patches = _frames(patches, place, namespace)
        g = place.put(g)
        return patches, to_core(g if patches.blocks > 1 else g[:, 0], namespace)
    a: Any = patches.unfold()
    a = place.put(a.reshape(a.shape[0], *call.rows, a.shape[-1]))
    return to_core(a, namespace), to_core(place.put(g), namespace)


def _turned(x: torch.Tensor, g: torch.Tensor, kind: Conv, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """Image and output gradient of the plain convolution that a transposed one is: each output number sums the inputs
    that reach it, so the image is spread by the stride, padded and, as the kernel runs backwards, turned round."""
    axes = len(kind.window.kernel)
    given = call.options
    kept = x
    places = []
    sizes = []
    for axis in range(axes):
        reach = given["dilation"][axis] * (kind.window.kernel[axis] - 1)
        size = g.shape[3 + axis] + reach
        steps = torch.arange(x.shape[2 + axis], device=x.device)
        place = reach - given["padding"][axis] + given["stride"][axis] * steps
        inside = (place >= 0) & (place < size)
        kept = kept.index_select(2 + axis, inside.nonzero()[:, 0])
        places.append(place[inside])
        sizes.append(size)
    spread = x.new_zeros((*x.shape[:2], *sizes))
    spread[(slice(None), slice(None), *torch.meshgrid(*places, indexing="ij"))] = kept
    turned = range(-axes, 0)
    return spread.flip(*turned), g.flip(*turned)


def _window(kind: Conv, call: Call) -> Window:
    """The window of this call."""
    given = call.options
    options = {name: given[name] for name in ("stride", "padding", "dilation") if name in given}
    return Window(kind.window.kernel, **{n: v if isinstance(v, str | int) else tuple(v) for n, v in options.items()})


def _frames(patches: Patches, place: Axes, namespace: str) -> Patches:
    """Images as frames of their examples."""
    window = patches.window
    image: Any = patches.image
    apart = image.shape[1] // place.examples
    image = image.unflatten(1, (apart, place.examples) if place.inner else (place.examples, apart))
    image = image.movedim(2, 1) if place.inner else image
    longer = Window((1, *window.kernel), (1, *window.stride), ((0, 0), *window.padding), (1, *window.dilation))
    return Patches(to_core(image, namespace), longer, patches.bias)
