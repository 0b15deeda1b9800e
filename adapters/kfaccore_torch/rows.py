"""Calls, their places and their output gradients as kfaccore's records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import array_api_compat as aac
import torch

from kfaccore import Ids, Patches, Record
from kfaccore.layers import Bias, Conv, Embedding, Gain, Linear
from kfaccore_torch.bridge import constant, detached, to_core
from kfaccore_torch.calls import Call, Remade
from kfaccore_torch.images import conv_part
from kfaccore_torch.kinds import Rest, Stack, Tied
from kfaccore_torch.lookup import each, existing, looked_up
from kfaccore_torch.merged import apart, side_by_side
from kfaccore_torch.places import Groups, Place, together
from kfaccore_torch.settle import Layer
from kfaccore_torch.tied import both

Array = Any


@dataclass(frozen=True)
class Part:
    """One call in a record: a (batch, positions, d_in), or with blocks first, or Ids or Patches; g with draws first;
    which of its positions exist, (batch, positions) or none."""

    a: Any
    g: Array
    exists: torch.Tensor | None


def record(
    layer: Layer,
    calls: Sequence[Call],
    grads: Sequence[torch.Tensor],
    places: Sequence[Place],
    n: float,
    namespace: str,
    masks: Sequence[torch.Tensor | None],
    ids: Any = None,
    like: Record | None = None,
) -> Record:
    """One record of all calls; several calls are more positions of the same examples.

    grads   a call each, (draws, *output shape): gradients of the per-example loss
    places  where the rows of each call stand
    masks   a call each, (batch, positions) of positions that exist, or none
    ids     (batch,) places of the examples in the dataset
    like    a record of the same calls and places, whose rows are taken as they are
    """
    if len({place.examples for place in places}) > 1:  # some rows are shared: then all are of one example
        pairs = zip(masks, places, strict=True)
        masks = [None if m is None or isinstance(place, Groups) else m.reshape(1, -1) for m, place in pairs]
        return record(layer, calls, grads, [together(place) for place in places], n, namespace, masks, like=like)
    if isinstance(layer.kind, Tied) and len(grads[0]):
        found = both(layer.kind, calls, grads, places, masks)
        known = ids is not None and len(found.a) == len(ids)
        a, g, exists = (to_core(x, namespace) for x in (found.a, found.g, found.exists))
        mask = None if bool(found.exists.all()) else exists
        return Record(a, g, n, mask=mask, ids=to_core(ids, namespace) if known else None)
    if isinstance(layer.kind, Tied):  # without draws G = I, and A is that of the output layer
        heads = [i for i, call in enumerate(calls) if call.x.is_floating_point()]
        calls = [calls[i] for i in heads]
        grads = [grads[i] for i in heads]
        places = [places[i] for i in heads]
        masks = [masks[i] for i in heads]
    if len(calls) > 1 and isinstance(layer.kind, Linear) and all(m is None for m in masks) and apart(places):
        calls, grads, places = side_by_side(layer.kind, calls, grads, places)
        masks = [None]
    given = zip(calls, grads, places, masks, strict=True)
    parts = [_part(layer, call, g, place, mask, namespace, like is None) for call, g, place, mask in given]
    part = parts[0] if len(parts) == 1 else _joined(parts)
    if like is not None:
        return replace(like, g=part.g, n=n)
    exists = None if part.exists is None else to_core(part.exists, namespace)
    known = ids is not None and places[0].examples == len(ids)
    return Record(part.a, part.g, n, mask=exists, ids=to_core(ids, namespace) if known else None)


def rows(layer: Layer, call: Call, place: Place, namespace: str) -> Array:
    """The rows `a` of one call of a linear layer, (batch, positions, d_in)."""
    a = to_core(_put(detached(call.x), place), namespace)
    return layer.kind.activations(a) if isinstance(layer.kind, Linear) else a


def output_rows(layer: Layer, call: Call, g: torch.Tensor, place: Place) -> torch.Tensor:
    """One draw's output gradient as (batch, positions, d_out)."""
    return place.put(call.features_last(g.reshape(call.shape), layer.kind.d_out))


def by_rows(layer: Layer, call: Call, g: torch.Tensor) -> torch.Tensor:
    """An output gradient as (rows, d)."""
    d = layer.kind.d if isinstance(layer.kind, Bias) else g.numel() // max(1, prod(call.rows))
    g = call.features_last(detached(g).reshape(call.shape), d)
    if isinstance(layer.kind, Stack):
        g = g.movedim(0, -2)
    count = prod(call.rows)
    return g.reshape(count, g.numel() // max(1, count))


def _part(
    layer: Layer,
    call: Call,
    g: torch.Tensor,
    place: Place,
    mask: torch.Tensor | None,
    namespace: str,
    whole: bool = True,
) -> Part:
    """a and g of one call, and what exists of it; a may be missing where it is not to be `whole`."""
    kind = layer.kind
    g = detached(g).reshape(g.shape[0], *call.shape)
    exists = existing(place.mask(), mask)
    exists = None if exists is None else exists.to(g.device)
    if isinstance(kind, Conv):
        return Part(*conv_part(kind, call, g, place, namespace), exists)
    if isinstance(kind, Embedding):
        return _looked_up(kind, call, g, place, exists, namespace)
    block = kind.block()
    g = call.features_last(g, block.d_out)
    if isinstance(kind, Gain):
        g = scaled(call, g, kind.d)
    g = each(g.reshape(*g.shape[: g.ndim - 1 - len(place.rows)], *place.rows, g.shape[-1]), place)
    a: Any = None
    if not whole:
        pass
    elif isinstance(kind, Bias | Rest):
        a = to_core(constant(1.0, g.dtype, g.device).expand(*g.shape[1:3], 1), namespace)  # one number for all rows
    elif isinstance(kind, Stack):
        x = detached(call.x)
        a = to_core(place.put(x.reshape(len(x), *place.rows, kind.d_in)), namespace)
    else:
        a = rows(layer, call, place, namespace)
    return Part(a, to_core(g, namespace), exists)


def scaled(call: Call, g: torch.Tensor, d: int) -> torch.Tensor:
    """Output gradients (draws, *rows, d) times what a gain was multiplied with."""
    if call.normalised is None:
        return g
    x = call.features_last(detached(call.normalised()), d)
    if isinstance(call.normalised, Remade) and len(g) == 1 and x.dtype == g.dtype:
        return x[None].mul_(g)  # one array less where it is the largest
    return g * x.to(g)


def _looked_up(
    kind: Embedding, call: Call, g: torch.Tensor, place: Place, exists: torch.Tensor | None, namespace: str
) -> Part:
    """Rows of a table: one an output row, or in a bag several."""
    g = scaled(call, call.features_last(g, kind.d_out), kind.d_out)
    index, g, exists = looked_up(kind.size, call, g, place, exists)
    return Part(Ids(to_core(index, namespace), kind.size), to_core(g, namespace), exists)


def check_unwritten(layer: Layer, call: Call) -> None:
    """ValueError for an input that is no longer what the layer saw."""
    needed = isinstance(layer.kind, Gain) or not isinstance(layer.kind, Bias)
    if needed and not call.x.is_inference() and call.x._version != call.version:
        raise ValueError(
            f"the input of layer {layer.name!r} was overwritten between its forward and the loss: form the loss "
            f"first, or write to a copy"
        )


def _put(x: torch.Tensor, place: Place) -> torch.Tensor:
    return place.put(x.reshape(*place.rows, x.shape[-1]))


def _joined(parts: list[Part]) -> Part:
    """Calls as more positions of the same examples."""
    xp = aac.array_namespace(parts[0].g)
    gs = [part.g for part in parts]
    exists = None
    if any(part.exists is not None for part in parts):
        every = [
            part.exists if part.exists is not None else torch.ones(_extent(part), dtype=torch.bool) for part in parts
        ]
        exists = torch.cat([x.to(every[0].device) for x in every], 1)
    a: Any
    if parts[0].a is None:
        return Part(None, xp.concat(gs, axis=-2), None)
    if isinstance(parts[0].a, Ids):
        a = Ids(xp.concat([part.a.index for part in parts], axis=1), parts[0].a.size)
    else:
        unfolded = [part.a.unfold() if isinstance(part.a, Patches) else part.a for part in parts]
        blocks_first = max(x.ndim for x in unfolded) == 4
        unfolded = [x[None] if blocks_first and x.ndim == 3 else x for x in unfolded]
        gs = [g[:, None] if blocks_first and g.ndim == 4 else g for g in gs]
        a = xp.concat(unfolded, axis=-2)
    return Part(a, xp.concat(gs, axis=-2), exists)


def _extent(part: Part) -> tuple[int, int]:
    """(batch, positions)."""
    return part.g.shape[-3], part.g.shape[-2]


def absent(layer: Layer, n: float, like: torch.Tensor, namespace: str) -> Record:
    """Examples that did not reach a layer: no valid row, J = 0, and their share n."""
    block = layer.kind.block()
    g = like.new_zeros((1, block.blocks, 1, 1, block.d_out))
    nothing = torch.zeros((1, 1), dtype=torch.bool, device=like.device)
    a: Any
    if block.diagonal_in:
        a = Ids(to_core(nothing.to(torch.int64), namespace), block.d_in)
    else:
        a = to_core(like.new_zeros((block.blocks, 1, 1, block.d_in)), namespace)
    return Record(a, to_core(g, namespace), n, mask=to_core(nothing, namespace))
