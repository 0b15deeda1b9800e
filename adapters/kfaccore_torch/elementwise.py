"""Operations that meet a parameter element by element, or only repeat it: gains, added vectors, tables of positions.

One number of the output is moved by one number of the parameter, so J of an example is a sum of g times a local slope.
A parameter with one axis is a lone gain or bias. One of several is a table: the last axis makes G, the others index its
rows, and A is the diagonal of their counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch.autograd.graph import GradientEdge

from kfaccore.layers import Bias, Embedding, Gain
from kfaccore_torch.alone import Examples
from kfaccore_torch.calls import Call, Mark, Use
from kfaccore_torch.provenance import output_shape
from kfaccore_torch.views import Ref, View

Refs = Mapping[int, Ref]


def met(node: Any, refs: Refs, known: Mapping[str, torch.nn.Parameter], examples: Examples) -> list[Use] | str:
    """Uses of parameters in an operation element by element."""
    shape = output_shape(node)
    children = [child for child, _ in node.next_functions]
    others = [child for i, child in enumerate(children) if child is not None and i not in refs]
    uses = []
    for i, ref in refs.items():
        slope = None if _unit(node, i) else Slope(node, i)
        found = _use(node, ref, tuple(known[ref.name].shape), shape, slope, examples)
        if isinstance(found, str):
            return found
        # with nothing repeated there may be no axis of examples: a constant, or another parameter, changes it for all
        own = ref.view.shape
        weight = found.mark.weight
        assert weight is not None
        if prod(own) == prod(shape) and (not examples.meets(weight, own, shape) or (not others and len(refs) > 1)):
            return f"{node.name()} by itself, before it meets an example"
        uses.append(found)
    return uses


def repeated(node: Any, refs: Refs, known: Mapping[str, torch.nn.Parameter], examples: Examples) -> list[Use] | str:
    """Expand and Repeat: every copy is a row."""
    ref = refs[0]
    shape = output_shape(node)
    own = ref.view.shape
    if not node.name().startswith("Expand"):
        times = tuple(node._saved_repeats)
        fresh = len(times) - len(own)
        # (r s) is r copies of s: their axes apart are those of an expansion
        shape = (*times[:fresh], *(n for pair in zip(times[fresh:], own, strict=True) for n in pair))
        apart = tuple(axis for own_axis in ref.view.axes for axis in ((), own_axis))
        ref = replace(ref, view=View(apart, ref.view.offset))
    found = _use(node, ref, tuple(known[ref.name].shape), shape, None, examples)
    return found if isinstance(found, str) else [found]


def _unit(node: Any, index: int) -> bool:
    """Whether every number of the output moves as that of its `index`-th input does."""
    if node.name().startswith("AddmmBackward"):
        return node._saved_beta == 1  # alpha is the product's
    return node.name().startswith("AddBackward") and (index == 0 or getattr(node, "_saved_alpha", 1) == 1)


@dataclass(frozen=True)
class Slope:
    """What the operation multiplies an output gradient with for its `index`-th input: the other factor of a product,
    which takes no memory; of other operations their own backward says it."""

    node: Any
    index: int

    def __call__(self) -> torch.Tensor:
        shape = output_shape(self.node)
        like = self.node._input_metadata[0]
        if self.node.name().startswith("MulBackward"):
            other = self.node._saved_self if self.index else self.node._saved_other
            return torch.as_tensor(other, device=like.device).detach().to(like.dtype).expand(shape)
        ones = torch.ones(shape, dtype=like.dtype, device=like.device)
        found = self.node(ones)
        found = found[self.index] if isinstance(found, tuple) else found
        return found.detach().expand(shape)


def _use(
    node: Any, ref: Ref, own: tuple[int, ...], shape: tuple[int, ...], slope: Any, examples: Examples
) -> Use | str:
    """The use of a part that is broadcast to `shape`, the output's axes, maybe apart."""
    view = View(((),) * (len(shape) - len(ref.view.axes)) + ref.view.axes, ref.view.offset)
    axes = [i for i, n in enumerate(view.shape) if n > 1]
    feature = axes[-1] if axes else None
    d = view.shape[feature] if feature is not None else 1
    rows = tuple(n for i, n in enumerate(shape) if i != feature) or (1,)
    out = output_shape(node)
    back = None if feature is None else feature - len(shape)

    def arrange(g: torch.Tensor) -> torch.Tensor:
        lead = g.shape[: g.ndim - len(out)]
        g = g.reshape(*lead, *shape)
        g = g[..., None] if back is None else g.movedim(back, -1)
        return g.reshape(*lead, *rows, d)

    nothing = torch.zeros(0, device=node._input_metadata[0].device)
    call = Call(nothing, GradientEdge(node, 0), out, rows, normalised=slope, arrange=arrange)
    if len(axes) < 2 and not _row(view, feature, ref, own, examples):
        lone = View((tuple(fine for axis in view.axes for fine in axis),), view.offset)
        kind = Bias(d) if slope is None else Gain(d)
        return Use(Mark(kind, replace(ref, view=lone)), call)
    return _table(node, replace(ref, view=view), own, shape, call)


def _row(view: View, feature: int | None, ref: Ref, own: tuple[int, ...], examples: Examples) -> bool:
    """Whether a part is one row of what other forwards have shown to be a table, as of positions."""
    if feature is None or view.shape[feature] == prod(own):
        return False
    table = _rows(ref, own)
    return view.axes[feature] == table.view.axes[1] and examples.table(table)


def _rows(ref: Ref, own: tuple[int, ...]) -> Ref:
    """All of a parameter as rows along its last axis."""
    last = next((n for n in reversed(own) if n > 1), 1)
    return replace(ref, view=View.whole((prod(own) // last, last)))


def _table(node: Any, ref: Ref, own: tuple[int, ...], shape: tuple[int, ...], call: Call) -> Use | str:
    """A part with several axes: rows of the table that its last axis makes of the whole parameter."""
    table = _rows(ref, own)
    size, last = table.view.shape
    view = ref.view
    feature = max(i for i, n in enumerate(view.shape) if n > 1)
    if view.axes[feature] != ((last, 1),):
        return f"{node.name()} along several axes whose last is not the parameter's"
    index = _index(view, own, shape, feature, last)
    return Use(Mark(Embedding(size, last), table), replace(call, x=index))


@lru_cache(maxsize=64)
def _index(view: View, own: tuple[int, ...], shape: tuple[int, ...], feature: int, last: int) -> torch.Tensor:
    """The row of the table, (prod(own) / last, last), that each row of the output is moved by."""
    numbers = torch.arange(prod(own), device="cpu").reshape(own)
    rows = view.take(numbers).select(feature, 0) // last
    whole = tuple(n for i, n in enumerate(shape) if i != feature) or (1,)
    return rows.expand(whole)
