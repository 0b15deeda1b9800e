"""Covered parameters as the matrices of their layers, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from kfaccore_torch.bridge import chosen, ordered, to_core, to_torch
from kfaccore_torch.plan import Plan, modules
from kfaccore_torch.settle import Layer
from kfaccore_torch.stream import Stream

Array = Any
Source = nn.Module | Plan | Stream


def matrices(model: Source, namespace: str | None = None, skip: tuple[str, ...] = ()) -> dict[str, Array]:
    """{layer: matrix} of the covered parameters, copies: the `mean` of a `kfaccore.Posterior`.

    model   the `Stream` that the curvature is of, or `kfaccore_torch.plan(model, *inputs)`: layers as forwards show
            them, of raw parameters, slices and biases added apart too; or a model, whose modules say by their types
            what its layers are
    skip    of a model alone, as a stream or a plan has its own
    """
    layers = _layers(model, skip)
    device = next(p.device for layer in layers.values() for p in layer.parameters.values())
    if namespace is None and isinstance(model, Stream):
        namespace = model.engine.namespace
    namespace = chosen(namespace, device)
    found = {}
    with torch.no_grad(), ordered(namespace, device):
        for name, layer in layers.items():
            copies = {role: p.detach().clone() for role, p in layer.parameters.items()}
            found[name] = layer.matrix({role: to_core(x, namespace) for role, x in copies.items()})
    return found


def assign(model: Source, matrices: Mapping[str, Array], skip: tuple[str, ...] = ()) -> None:
    """Set the covered parameters to `matrices`, such as `P.sample(noise)`; layers left out keep theirs.

    model, skip   as `matrices` takes them

    ValueError for layers that the model does not have, or of another size; nothing is set then.
    """
    layers = _layers(model, skip)
    unknown = sorted(set(matrices) - set(layers))
    if unknown:
        told = "" if isinstance(model, Plan | Stream) else _HOW
        raise ValueError(f"the model has no layers {unknown}; it has {sorted(layers)}{told}")
    found = {name: _blocked(name, layers[name], matrix, model) for name, matrix in matrices.items()}
    with torch.no_grad():
        for name, full in found.items():
            layer = layers[name]
            for role, x in layer.arrays(full).items():
                p = layer.parameters[role]
                x = to_torch(x, p)
                if layer.partial(role):
                    layer.write(role, p, x)
                else:
                    p.copy_(x)


_HOW = (
    ", by the types of its modules: pass the Stream, or kfaccore_torch.plan(model, *inputs), in the place of the model "
    "for the layers that forwards show"
)


def _layers(source: Source, skip: tuple[str, ...]) -> dict[str, Layer]:
    """The layers of a model, a plan or a stream; ValueError where there is none."""
    if isinstance(source, nn.Module):
        layers = modules(source, skip).layers
    elif skip:
        raise ValueError(f"skip is {skip} beside a {type(source).__name__}, which has its own: leave it out")
    else:
        layers = source.plan.layers if isinstance(source, Stream) else source.layers
    if not layers:
        raise ValueError(f"no parameter of this {type(source).__name__} is covered{_HOW}")
    return layers


def _blocked(name: str, layer: Layer, matrix: Array, source: Source) -> Array:
    """A layer's matrix, blocks first; ValueError for one of another size."""
    block = layer.kind.block()
    shape = (block.blocks, block.d_out, block.d_in)
    if tuple(matrix.shape) not in (shape, shape[1:] if shape[0] == 1 else shape):
        told = "" if isinstance(source, Plan | Stream) else _HOW
        raise ValueError(f"layer {name!r} got a matrix of {tuple(matrix.shape)}; need {shape}, blocks first{told}")
    return matrix.reshape(shape)
