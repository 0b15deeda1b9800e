"""Gradients of all layers as matrices and back, those of layers of one kind in the same few operations.

On an accelerator an operation is a launch, and most layers are small: equal layers are stacked first, and what makes
matrices of their parameters takes the stack for one wide layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from kfaccore.layers import Bias, Conv, Linear
from kfaccore_torch.bridge import HALF
from kfaccore_torch.settle import Layer

Tensors = dict[str, torch.Tensor]  # by role, like a layer's parameters
_PLAIN = (Linear, Conv, Bias)


def matrices(layers: Mapping[str, Layer], given: Mapping[str, Tensors]) -> dict[str, torch.Tensor]:
    """The matrix of each layer's tensors; those of equal layers are slices of one array."""
    found: dict[str, torch.Tensor] = {}
    for names in _alike(layers, given):
        layer = layers[names[0]]
        if len(names) == 1:
            found[names[0]] = layer.matrix({role: _single(x) for role, x in given[names[0]].items()})
            continue
        stacks = {role: _single(torch.stack([given[name][role] for name in names])) for role in given[names[0]]}
        found |= zip(names, _matrices(layer, stacks).unbind(0), strict=True)
    return {name: found[name] for name in given}


def tensors(layers: Mapping[str, Layer], given: Mapping[str, torch.Tensor]) -> dict[str, Tensors]:
    """The inverse of `matrices`, each tensor in its parameter's dtype; whole stacks are turned at once where they lie
    as such."""
    found: dict[str, Tensors] = {}
    for names in _alike(layers, given):
        layer = layers[names[0]]
        whole = _stack([given[name] for name in names]) if len(names) > 1 else None
        if whole is None:
            for name in names:
                found[name] = _like_parameters(layers[name], layers[name].arrays(given[name]))
            continue
        turned = {}
        for role, x in _arrays(layer, whole).items():
            turned[role] = _laid_out(x, layer.parameters[role]).unbind(0)
        for i, name in enumerate(names):
            found[name] = _like_parameters(layers[name], {role: parts[i] for role, parts in turned.items()})
    return {name: found[name] for name in given}


def _alike(layers: Mapping[str, Layer], names: Iterable[str]) -> list[list[str]]:
    """Layers of one kind whose parameters have the same shapes and dtypes, in order; all others one by one."""
    groups: dict[Any, list[str]] = {}
    for name in names:
        layer = layers[name]
        plain = isinstance(layer.kind, _PLAIN) and not layer.views
        shapes = tuple((role, tuple(p.shape), p.dtype) for role, p in layer.parameters.items())
        groups.setdefault((layer.kind, shapes) if plain else name, []).append(name)
    return list(groups.values())


def _matrices(layer: Layer, stacks: Tensors) -> torch.Tensor:
    """`layer.matrix` of each of a stack: those of a convolution are groups of one."""
    kind = layer.kind
    if isinstance(kind, Linear):
        return kind.matrix(stacks)
    if not isinstance(kind, Conv):
        return torch.vmap(layer.matrix)(stacks)
    many = len(next(iter(stacks.values())))
    whole: Any = _wide(kind, many).matrix({role: x.flatten(0, 1) for role, x in stacks.items()})
    return whole.unflatten(0, (many, kind.groups))


def _arrays(layer: Layer, whole: torch.Tensor) -> Tensors:
    """`layer.arrays` of each of a stack: linear layers are outputs of one, convolutions groups."""
    kind = layer.kind
    if not isinstance(kind, Conv | Linear) or (isinstance(kind, Linear) and kind.transposed):
        return torch.vmap(layer.arrays)(whole)
    many = len(whole)
    # a blocks axis of 1 may stand before the rows of a linear layer, or be left out
    rows = whole.flatten(0, -2) if isinstance(kind, Linear) else whole.flatten(0, -3)
    named: Any = _wide(kind, many).parameters(rows)
    return {role: named[role].unflatten(0, (many, -1)).reshape(many, *p.shape) for role, p in layer.parameters.items()}


def _wide(kind: Linear | Conv, many: int) -> Linear | Conv:
    """As many layers of a kind as one."""
    if isinstance(kind, Linear):
        return replace(kind, d_out=many * kind.d_out)
    inputs, outputs = kind.channels
    return replace(kind, channels=(many * inputs, many * outputs), groups=many * kind.groups)


def _single(x: torch.Tensor) -> torch.Tensor:
    """Outside the graph, in single precision at least."""
    x = x.detach().resolve_conj().resolve_neg()
    return x.float() if x.dtype in HALF else x


def _stack(parts: list[torch.Tensor]) -> torch.Tensor | None:
    """Arrays that lie at equal distances in one memory as one array, a view; None where they do not."""
    first = parts[0]
    step = parts[1].storage_offset() - first.storage_offset()
    memory = first.untyped_storage().data_ptr()
    for i, part in enumerate(parts):
        same = part.untyped_storage().data_ptr() == memory and part.stride() == first.stride()
        if not same or part.shape != first.shape or part.storage_offset() != first.storage_offset() + i * step:
            return None
    return first.as_strided((len(parts), *first.shape), (step, *first.stride()))


def _laid_out(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A stack whose slices lie as a parameter does, so that all of them are copied in one operation later."""
    return x if x[0].stride() == like.stride() or not like.is_contiguous() else x.contiguous()


def _like_parameters(layer: Layer, found: Mapping[str, Any]) -> Tensors:
    return {role: x.to(layer.parameters[role]) for role, x in found.items()}
