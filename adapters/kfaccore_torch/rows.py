"""Calls and their output gradients as kfaccore's records."""

from __future__ import annotations

from typing import Any

import array_api_compat as aac
import torch

from kfaccore import Ids, Patches, Record, Window
from kfaccore.layers import Bias, Conv, Embedding, Gain
from kfaccore_torch.bridge import detached, to_core
from kfaccore_torch.capture import Call
from kfaccore_torch.table import Layer

Array = Any


def record(
    layer: Layer,
    calls: list[Call],
    grads: list[torch.Tensor],
    batch: int,
    n: float,
    namespace: str,
    mask: Any = None,
    ids: Any = None,
) -> Record:
    """One record of all calls; several calls are more positions of the same examples.

    grads   a call each, (draws, *output shape): gradients of the per-example loss
    batch   examples; axes of inputs that are not it are positions
    mask    (batch, positions) of tokens that exist, used where it fits
    ids     (batch,) places of the examples in the dataset
    """
    parts = [_part(layer, call, g, batch, namespace) for call, g in zip(calls, grads, strict=True)]
    a, g = parts[0] if len(parts) == 1 else _joined(layer, parts)
    keep = None
    if isinstance(a, Ids) and calls[0].options.get("padding_idx") is not None:
        keep = a.index != calls[0].options["padding_idx"]
    if mask is not None and tuple(mask.shape) == tuple(g.shape[-3:-1]):
        keep = to_core(mask, namespace) if keep is None else keep & to_core(mask, namespace)
    return Record(a, g, n, mask=keep, ids=None if ids is None else to_core(ids, namespace))


def examples(f: torch.Tensor, calls: dict[str, list[Call]]) -> int:
    """How many examples a prediction f (examples, ...) is of: those of the layers where f (examples positions, classes)
    joined the two axes of theirs."""
    shapes = {c.shape for found in calls.values() for c in found if len(c.shape) == 3 and not c.positions}
    joined = {shape[0] for shape in shapes if shape[0] * shape[1] == f.shape[0]}
    return joined.pop() if f.ndim == 2 and len(joined) == 1 else f.shape[0]


def rows(layer: Layer, call: Call, batch: int, namespace: str) -> Array:
    """The rows `a` of one call of a linear layer, (batch, positions, d_in)."""
    return _shared(layer.kind.activations(to_core(_examples(call.x, batch, call.positions), namespace)))


def output_rows(g: torch.Tensor, call: Call, batch: int) -> torch.Tensor:
    """One draw's output gradient as (batch, positions, d_out)."""
    return _examples(g, batch, call.positions)


def _part(layer: Layer, call: Call, g: torch.Tensor, batch: int, namespace: str) -> tuple[Any, Array]:
    """a and g of one call, (batch, positions, d) each, draws in front of g; blocks first for groups."""
    kind = layer.kind
    g = detached(g)
    if isinstance(kind, Conv):
        return _conv(kind, call, g, namespace)
    if isinstance(kind, Bias):
        g = _channels_last(g, call.channel % len(call.shape) - len(call.shape), kind.d)
        if isinstance(kind, Gain) and call.normalised is not None:
            xhat = _channels_last(detached(call.normalised()), call.channel % len(call.shape) - len(call.shape), kind.d)
            g = g * xhat
    draws = [_examples(x, batch, call.positions) for x in g]
    g = draws[0][None] if len(draws) == 1 else torch.stack(draws)  # of one draw a view
    if isinstance(kind, Bias):
        a = to_core(torch.ones_like(g[0, ..., :1]), namespace)
    elif isinstance(kind, Embedding):
        index = call.x if call.x.ndim else call.x[None]
        a = Ids(to_core(_examples(index[..., None], batch, call.positions)[..., 0], namespace), kind.size)
    else:
        a = _shared(kind.activations(to_core(_examples(detached(call.x), batch, call.positions), namespace)))
    return a, to_core(g, namespace)


def _conv(kind: Conv, call: Call, g: torch.Tensor, namespace: str) -> tuple[Patches, Array]:
    """The geometry is that of the call: padding of other modes has been done to the image before."""
    x, given = detached(call.x), call.options
    axes = len(kind.window.kernel)
    if x.ndim == axes + 1:
        x, g = x[None], g[:, None]
    options = {name: given[name] for name in ("stride", "padding", "dilation") if name in given}
    options = {name: v if isinstance(v, str | int) else tuple(v) for name, v in options.items()}
    window = Window(kind.window.kernel, **options)
    kind = Conv(window, kind.channels, kind.groups, kind.bias, channels_first=True)
    return kind.activations(to_core(x, namespace)), kind.gradients(to_core(g, namespace), draws=True)


def _examples(x: torch.Tensor, batch: int, positions: int = 0) -> torch.Tensor:
    """(batch, positions, d) of rows x (..., d).

    The batch is the first axis, or the second, or a divisor of the first (windows folded into it); where it is nowhere
    (what all examples share), all rows belong to one example, which is right for draws of zero mean.
    """
    d = x.shape[-1]
    if positions:
        x = x.contiguous()  # a and g in one order: neither is copied when positions are folded
        return x.reshape(positions, -1, d).movedim(1, 0)
    if x.ndim == 1:
        return x.reshape(1, 1, d)
    if x.ndim > 2 and x.shape[0] != batch == x.shape[1]:
        return x.movedim(1, 0).reshape(batch, -1, d)
    return x.reshape(batch if x.shape[0] % batch == 0 else 1, -1, d)


def _channels_last(x: torch.Tensor, channel: int, d: int) -> torch.Tensor:
    """x with its trailing or channel axes, which hold d numbers, joined at the end."""
    axes = -channel
    tail = 1
    for size in x.shape[channel:]:
        tail *= size
    if tail == d:
        return x.reshape(*x.shape[: x.ndim - axes], d)
    return x.movedim(channel, -1)


def _shared(a: Array) -> Array:
    return a if a.ndim == 3 else a[:, None, :]


def _joined(layer: Layer, parts: list[tuple[Any, Array]]) -> tuple[Any, Array]:
    """Calls as more positions of the same examples."""
    xp = aac.array_namespace(parts[0][1])
    gs = [g for _, g in parts]
    if len({g.shape[:-2] for g in gs}) > 1:
        sizes = [g.shape[-3] for g in gs]
        raise ValueError(f"layer {layer.name!r} was called with batches of {sizes} examples; need one capture a batch")
    if isinstance(parts[0][0], Ids):
        index = xp.concat([a.index for a, _ in parts], axis=1)
        return Ids(index, parts[0][0].size), xp.concat(gs, axis=-2)
    unfolded = [a.unfold() if isinstance(a, Patches) else a for a, _ in parts]
    if unfolded[0].ndim == 4 and gs[0].ndim == 4:
        gs = [g[:, None] for g in gs]
    return xp.concat(unfolded, axis=-2), xp.concat(gs, axis=-2)
