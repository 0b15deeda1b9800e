"""Operations that multiply with a parameter, as autograd kept them: products, convolutions, look-ups."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch.autograd.graph import GradientEdge

from kfaccore import Window
from kfaccore.layers import Conv, Embedding, Linear
from kfaccore_torch.bags import bag
from kfaccore_torch.calls import Call, Mark, Use
from kfaccore_torch.kinds import Stack
from kfaccore_torch.provenance import output_shape
from kfaccore_torch.unusual import unusual
from kfaccore_torch.views import Ref, View

Refs = Mapping[int, Ref]
Found = list[Use] | str  # uses, or why there are none


def matrix_product(node: Any, refs: Refs, lead: tuple[int, ...] | None) -> Found:
    """Mm and Addmm: rows times a parameter, or a parameter times columns."""
    added = node.name().startswith("Addmm")
    left, right = (1, 2) if added else (0, 1)
    if left in refs and right in refs:
        return f"{node.name()} of two parameters"
    ref = refs[right] if right in refs else refs[left]
    turned = right not in refs
    saved = node._saved_mat2 if turned else (node._saved_mat1 if added else node._saved_self)
    if unusual(saved):
        return f"{node.name()} with {unusual(saved)}"
    x = saved.detach().mT if turned else saved.detach()
    x = x * node._saved_alpha if added and node._saved_alpha != 1 else x
    view = ref.view if turned else ref.view.permuted((1, 0))
    d_out, d_in = view.shape
    rows = lead if lead is not None and prod(lead) == len(x) and not turned else (len(x),)
    arrange = _columns if turned else None
    call = replace(_call(node, x.reshape(*rows, d_in), rows), arrange=arrange)
    bias = refs.get(0) if added and not turned and node._saved_beta == 1 else None
    fits = bias is not None and bias.view.reshaped((d_out,)) is not None and prod(bias.view.shape) == d_out
    bias = replace(bias, view=bias.view.reshaped((d_out,))) if fits and bias is not None else None  # type: ignore[arg-type]
    return [Use(Mark(Linear(d_in, d_out, bias=False), replace(ref, view=view), bias), call)]


def _columns(g: torch.Tensor) -> torch.Tensor:
    return g.mT


def vector_product(node: Any, refs: Refs, lead: tuple[int, ...] | None) -> Found:
    """Mv: rows times a vector that is a parameter, or a parameter times one row."""
    if 0 in refs and 1 in refs:
        return f"{node.name()} of two parameters"
    saved = node._saved_vec if 0 in refs else node._saved_self
    if unusual(saved):
        return f"{node.name()} with {unusual(saved)}"
    if 0 in refs:
        d_out, d_in = refs[0].view.shape
        call = replace(_call(node, saved.detach()[None], (1,)), arrange=lambda g: g[..., None, :])
        return [Use(Mark(Linear(d_in, d_out, bias=False), refs[0]), call)]
    view = refs[1].view
    x = saved.detach()
    call = replace(_call(node, x, (len(x),)), arrange=lambda g: g[..., None])
    row = View(((), *view.axes), view.offset)
    return [Use(Mark(Linear(x.shape[1], 1, bias=False), replace(refs[1], view=row)), call)]


def stacked_product(node: Any, refs: Refs, lead: tuple[int, ...] | None) -> Found:
    """Bmm and Baddbmm with a parameter of three axes, or one repeated along the first: its own axis is the blocks."""
    added = node.name().startswith("Baddbmm")
    left, right = (1, 2) if added else (0, 1)
    if left in refs and right in refs:
        return f"{node.name()} of two parameters"
    turned = right not in refs
    ref = refs[left] if turned else refs[right]
    names = ("_saved_batch1", "_saved_batch2") if added else ("_saved_self", "_saved_mat2")
    x = getattr(node, names[1] if turned else names[0]).detach()
    if unusual(x):
        return f"{node.name()} with {unusual(x)}"
    x = x.mT if turned else x
    x = x * node._saved_alpha if added and node._saved_alpha != 1 else x
    stack = ref.view.axes[0]
    kept = tuple(i for i, (_, stride) in enumerate(stack) if stride)
    own = tuple(stack[i] for i in kept)
    outs, ins = (1, 2) if turned else (2, 1)
    view = View((own, ref.view.axes[outs], ref.view.axes[ins]), ref.view.offset)
    if view.repeats:
        return f"{node.name()} of a repeated parameter"
    blocks, d_out, d_in = view.shape
    sizes = tuple(n for n, _ in stack)
    spread = _spread(sizes, kept, turned)
    x = _gathered(x, sizes, kept)
    rows = tuple(x.shape[1:-1])
    if blocks > 1:
        call = replace(_call(node, x, rows), arrange=spread)
        return [Use(Mark(Stack(blocks, d_in, d_out), replace(ref, view=view)), call)]
    rows = lead if lead is not None and prod(lead) == prod(rows) and not turned else rows
    flat = View(view.axes[1:], view.offset)
    arrange = _reshaped(spread, (*rows, d_out))
    call = replace(_call(node, x.reshape(*rows, d_in), rows), arrange=arrange)
    return [Use(Mark(Linear(d_in, d_out, bias=False), replace(ref, view=flat)), call)]


def grouped_product(node: Any, refs: Refs, lead: tuple[int, ...] | None) -> Found:
    """GroupedMm of rows sorted by expert and a stack of matrices: each slice with the rows of its own."""
    ref = refs.get(1)
    offs = node._saved_offs
    if ref is None or 0 in refs or offs is None or len(ref.view.axes) != 3 or len(ref.view.axes[0]) != 1:
        return node.name()
    x = node._saved_self.detach()
    if x.ndim != 2 or unusual(x):
        return f"{node.name()} with {unusual(x) or 'rows in stacks'}"
    stride = ref.view.axes[0][0][1]
    found = []
    for i, (start, end) in enumerate(pairwise([0, *offs.tolist()])):
        if start < end:  # an expert without tokens is not called
            view = View((ref.view.axes[2], ref.view.axes[1]), ref.view.offset + i * stride)
            call = replace(_call(node, x[start:end], (end - start,)), arrange=partial(_rows, start, end))
            d_out, d_in = view.shape
            found.append(Use(Mark(Linear(d_in, d_out, bias=False), replace(ref, view=view)), call))
    return found


def _rows(start: int, end: int, g: torch.Tensor) -> torch.Tensor:
    return g[..., start:end, :]


def _gathered(x: torch.Tensor, sizes: tuple[int, ...], kept: tuple[int, ...]) -> torch.Tensor:
    """(..., batch, rows, d) -> (..., blocks, repeats, rows, d): the axes of the parameter's own before those it is
    repeated along."""
    lead = x.ndim - 3
    x = x.reshape(*x.shape[:lead], *sizes, *x.shape[lead + 1 :]) if sizes else x
    others = [i for i in range(len(sizes)) if i not in kept]
    order = [*range(lead), *(lead + i for i in (*kept, *others)), x.ndim - 2, x.ndim - 1]
    x = x.permute(order) if sizes else x
    blocks = prod(sizes[i] for i in kept)
    between = [sizes[i] for i in others]
    return x.reshape(*x.shape[:lead], blocks, *between, *x.shape[-2:])


def _spread(sizes: tuple[int, ...], kept: tuple[int, ...], turned: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda g: _gathered(g.mT if turned else g, sizes, kept)


def _reshaped(
    spread: Callable[[torch.Tensor], torch.Tensor], tail: tuple[int, ...]
) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda g: spread(g).reshape(*g.shape[: g.ndim - 3], *tail)


def convolution(node: Any, refs: Refs, lead: tuple[int, ...] | None) -> Found:
    """Convolutions, transposed ones too, whose weight is (C_in, C_out / groups, *kernel): groups are blocks."""
    if 1 not in refs:
        return [Use(Mark(None, None, refs[2]), _bias_call(node))] if set(refs) == {2} else node.name()
    x = node._saved_input.detach()
    weight = refs[1].view
    axes = len(weight.axes) - 2
    kernel = weight.shape[2:]
    groups = node._saved_groups
    shape = output_shape(node)
    view: View | None = weight
    if node._saved_transposed:
        apart = weight.reshaped((groups, weight.shape[0] // groups, *weight.shape[1:]))
        order = (0, 2, 1, *range(3, axes + 3))
        turned = None if apart is None else apart.permuted(order)
        view = None if turned is None else turned.reshaped((shape[1], weight.shape[0] // groups, *kernel))
    if view is None:
        return f"{node.name()} of a weight in another order"
    names = ("stride", "padding", "dilation", "transposed", "output_padding")
    options = {name: getattr(node, f"_saved_{name}") for name in names}
    kind = Conv(Window(kernel), (x.shape[1], shape[1]), groups, bias=False, channels_first=True)
    call = replace(_call(node, x, (shape[0], *shape[2:])), options=options, channel=-1 - axes)
    return [Use(Mark(kind, replace(refs[1], view=view), refs.get(2)), call)]


def _bias_call(node: Any) -> Call:
    """A convolution of which only the bias counts."""
    shape = output_shape(node)
    nothing = torch.zeros(0, device=node._input_metadata[0].device)
    return Call(nothing, GradientEdge(node, 0), shape, (shape[0], *shape[2:]), channel=1 - len(shape))


def looked_up(node: Any, refs: Refs, lead: tuple[int, ...] | None) -> Found:
    """Rows of a parameter taken by an index."""
    view = refs[0].view
    name = node.name()
    if name.startswith("EmbeddingBag"):
        return bag(node, refs[0])
    if name.startswith("IndexSelect"):
        index = node._saved_index if node._saved_dim == 0 else None
    elif name.startswith("EmbeddingBackward"):
        index = None if node._saved_scale_grad_by_freq or node._saved_sparse else node._saved_indices
    else:
        index = node._saved_indices[0] if len(node._saved_indices) == 1 else None
    if index is None or index.dtype not in (torch.int64, torch.int32):
        return f"{name} other than whole rows by number, with dense gradients that no frequencies scale"
    size, d = view.shape[0], prod(view.shape[1:])
    table = view.reshaped((size, d))
    if table is None:
        return f"{name} of a parameter in another order"
    index = torch.where(index < 0, index + size, index)
    rows = tuple(index.shape) or (1,)
    call = _call(node, index.reshape(rows), rows)
    if name.startswith("EmbeddingBackward"):
        padding = node._saved_padding_idx
        call = replace(call, options={"padding_idx": None if padding >= 2**63 else padding})
    return [Use(Mark(Embedding(size, d), replace(refs[0], view=table)), call)]


def _call(node: Any, x: torch.Tensor, rows: tuple[int, ...]) -> Call:
    """A call of this node; its saved input is autograd's own, which knows whether it was written since."""
    return Call(x, GradientEdge(node, 0), output_shape(node), rows, 0 if x.is_inference() else x._version)
