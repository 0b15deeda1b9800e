"""Which equations of a jaxpr are layers: a leaf meets data in a product, a convolution, a look-up or a sum."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import jax.numpy as jnp

from kfaccore import Window
from kfaccore_jax.calls import BiasOf, Call, View
from kfaccore_jax.tags import Out, Param


def dense(eqn: Any, tag: Param, place: int) -> Call | None:
    """dot_general of a leaf: contracted axes are d_in, its free axes d_out, its batch axes blocks."""
    contract, batch = eqn.params["dimension_numbers"]
    w = tag.layout
    x = eqn.invars[1 - place].aval
    c_w, c_x, b_w, b_x = (tuple(axes[i]) for axes in (contract, batch) for i in (place, 1 - place))
    free_w = [i for i in range(len(w.shape)) if i not in (*c_w, *b_w)]
    free_x = [i for i in range(x.ndim) if i not in (*c_x, *b_x)]
    count = len(b_w)
    first, second = (free_w, free_x) if place == 0 else (free_x, free_w)
    y_first = range(count, count + len(first))
    y_second = range(count + len(first), count + len(first) + len(second))
    y_w, y_x = (y_first, y_second) if place == 0 else (y_second, y_first)
    if any(w.strides[i] == 0 and w.shape[i] > 1 for i in (*c_w, *free_w)):
        return None
    ins = sorted(zip(c_w, c_x, strict=True), key=lambda pair: -w.strides[pair[0]])
    outs = sorted(zip(free_w, y_w, strict=True), key=lambda pair: -w.strides[pair[0]])
    blocks = [k for k, i in enumerate(b_w) if w.strides[i] > 0]
    shared = [k for k, i in enumerate(b_w) if w.strides[i] == 0]
    return Call(
        "dense",
        tag.leaf,
        (*tag.blocks, *(w.axes[b_w[k]] for k in blocks)),
        tuple(w.axes[i] for i, _ in outs),
        tuple(w.axes[i] for i, _ in ins),
        w.offset,
        View(tuple(b_x[k] for k in blocks), (*(b_x[k] for k in shared), *free_x), tuple(i for _, i in ins)),
        View(tuple(blocks), (*shared, *y_x), tuple(i for _, i in outs)),
        stack=tag.depths,
    )


def conv(eqn: Any, tag: Param, place: int) -> Call | None:
    """conv_general_dilated with a leaf for kernel; one block a group."""
    p = eqn.params
    w = tag.layout
    groups = int(eqn.params["feature_group_count"])
    numbers = p["dimension_numbers"]
    lhs, rhs, out = (tuple(getattr(numbers, f"{side}_spec")) for side in ("lhs", "rhs", "out"))
    axes = len(lhs) - 2
    if place != 1 or p["batch_group_count"] != 1 or not 1 <= axes <= 3 or w.repeated:
        return None
    pads = tuple(map(tuple, p["padding"]))
    dilated = tuple(p["lhs_dilation"])
    edges = ()
    if max(dilated) > 1 or min(v for pair in pads for v in pair) < 0:
        edges = tuple((int(lo), int(hi), d - 1) for (lo, hi), d in zip(pads, dilated, strict=True))
    kernel = tuple(w.shape[i] for i in rhs[2:])
    padding = ((0, 0),) * axes if edges else tuple((int(lo), int(hi)) for lo, hi in pads)
    window = Window(kernel, tuple(p["window_strides"]), padding, tuple(p["rhs_dilation"]))
    size, stride = w.axes[rhs[0]]

    def after(axis: int, channel: int) -> int:  # its place once `channel` is split in two
        return axis + (axis > channel)

    def view(spec: tuple[int, ...], image: bool) -> View:
        batch, channel, *spatial = spec
        places = tuple(after(axis, channel) for axis in spatial)
        features = (*places, channel + 1) if image else (channel + 1,)
        shared = (after(batch, channel),) if image else (after(batch, channel), *places)
        return View((channel,), shared, features, (channel, groups))

    return Call(
        "conv",
        tag.leaf,
        (*tag.blocks, (groups, stride * (size // groups))),
        ((size // groups, stride),),
        (*(w.axes[i] for i in rhs[2:]), w.axes[rhs[1]]),
        w.offset,
        view(lhs, True),
        view(out, False),
        window,
        edges,
        tag.depths,
    )


def embedding(eqn: Any, tag: Param, place: int) -> Call | None:
    """gather of whole rows of a leaf."""
    p = eqn.params
    w = tag.layout
    ids = eqn.invars[1].aval
    numbers = p["dimension_numbers"]
    out = len(eqn.outvars[0].aval.shape)
    offset = tuple(numbers.offset_dims)
    starts = tuple(numbers.start_index_map)
    inside = any(mode in str(p["mode"]).upper() for mode in ("CLIP", "PROMISE"))  # whole rows then start at column 0
    kept = starts == (0,) or (starts == tuple(range(len(starts))) and inside)
    rows = kept and tuple(numbers.collapsed_slice_dims) in ((), (0,))
    whole = tuple(p["slice_sizes"]) == (1, *w.shape[1:]) and not getattr(numbers, "operand_batching_dims", ())
    if place != 0 or not rows or not whole or tag.stack or w.repeated or tag.factor != 1 or tag.scale is not None:
        return None
    shared = tuple(i for i in range(out) if i not in offset)
    x = View((), tuple(range(ids.ndim - 1)))
    y = View((), shared, offset)
    return Call("embedding", tag.leaf, (), w.axes[1:], w.axes[:1], w.offset, x, y)


def lone(kind: str, eqn: Any, tag: Param) -> Call:
    """A leaf added to or multiplied with data: a vector of d_out, or a table whose rows the other axes pick."""
    return _spread(kind, tag, tuple(eqn.outvars[0].aval.shape))


def _spread(kind: str, tag: Param, shape: tuple[int, ...]) -> Call:
    """A leaf whose elements lie in an array of `shape`."""
    w = tag.layout.stretch(shape)
    mine = tuple(i for i, s in enumerate(w.strides) if s > 0)
    repeated = tuple(i for i in range(len(shape)) if i not in mine)
    outs, ins = (mine, ()) if tag.stack else (mine[-1:], mine[:-1])
    return Call(
        kind,
        tag.leaf,
        tag.blocks,
        tuple(w.axes[i] for i in outs),
        tuple(w.axes[i] for i in ins),
        w.offset,
        View(),
        View((), (*repeated, *ins), outs),
        stack=tag.depths,
    )


def valued(tag: Param, y: Any) -> tuple[Call, Any]:
    """The call that a leaf's own value y is, and what it was multiplied by."""
    shape = tuple(y.shape)
    factor = tag.factor if tag.scale is None else tag.factor * tag.scale
    if tag.by is not None:
        return _spread("scale", tag, shape), jnp.broadcast_to(tag.by * factor, shape)
    if tag.factor == 1.0 and tag.scale is None:
        return _spread("bias", tag, shape), None
    return _spread("scale", tag, shape), jnp.full(shape, factor, y.dtype)


def paired(call: Call, shape: tuple[int, ...], out: Out, tag: Param, factor: float) -> BiasOf | None:
    """The leaf `tag`, added to `out`, as the bias column of `call` (output of `shape`), or None if it is not one."""
    lain = tag.layout.stretch(out.layout.shape)
    order = tuple(sorted(range(len(lain.shape)), key=lambda i: (-out.layout.strides[i], i)))
    seen = lain.transpose(order).reshape(shape) if prod(out.layout.shape) == prod(shape) else None
    if seen is None or tag.scale is not None or call.bias:
        return None
    axes = list(seen.axes)
    if call.y.split:
        axis, groups = call.y.split
        n, s = axes[axis]
        axes[axis : axis + 1] = [(groups, s * (n // groups)), (n // groups, s)]
    if tag.depths != call.stack or any(axes[i][1] and axes[i][0] > 1 for i in call.y.shared):
        return None
    own = [axes[i] for i in (*call.y.blocks, *call.y.features)]
    if any(s == 0 and n > 1 for n, s in own):
        return None
    blocks = (*tag.blocks, *(axes[i] for i in call.y.blocks))
    return BiasOf(tag.leaf, blocks, tuple(axes[i] for i in call.y.features), seen.offset, factor)


RULES: dict[str, Callable[[Any, Param, int], Call | None]] = {
    "dot_general": dense,
    "conv_general_dilated": conv,
    "gather": embedding,
}
