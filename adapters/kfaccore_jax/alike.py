"""Matrices of layers that are alike, made as one array: XLA on a CPU compiles a kernel for each transposition and each
bias that it joins, 10 to 40 ms a layer, and joins the slices of one array again for nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from kfaccore_jax.layers import Layer
from kfaccore_jax.layout import merged


def matrices_of(layers: Sequence[Layer], leaves: Mapping[str, Any]) -> dict[str, Any]:
    """{layer: (blocks, d_out, d_in)} from {path: leaf}, a bias as the last column."""
    groups: dict[tuple, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(_kind(layer, leaves), []).append(layer)
    found = {}
    for (plain, *_), alike in groups.items():
        if plain and len(alike) > 1:
            found |= _together(alike, leaves)
        else:
            found |= {layer.name: layer.matrix(leaves) for layer in alike}
    return {layer.name: found[layer.name] for layer in layers}


def _kind(layer: Layer, leaves: Mapping[str, Any]) -> tuple:
    """Whether its leaves are one whole kernel, inputs before outputs, and its whole bias; sizes; dtypes."""
    blocks, d_out, d_in = layer.weight.shape
    whole = all(leaves[part.leaf].size == d_out * n for part, n in zip(layer.parts, (d_in, 1), strict=False))
    out = merged(((d_out, 1),))
    turned = merged(layer.weight.ins) == merged(((d_in, d_out),)) and merged(layer.weight.outs) == out
    straight = layer.bias is None or merged(layer.bias.outs) == out
    plain = whole and blocks == 1 and turned and straight
    return plain, d_out, d_in, tuple(str(leaves[part.leaf].dtype) for part in layer.parts)


def _together(layers: Sequence[Layer], leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Those of one kind: kernels as they are, one after the other, turned and joined with their biases as one."""
    _, d_out, d_in = layers[0].weight.shape
    whole = jnp.concatenate([leaves[layer.weight.leaf].reshape(1, d_in, d_out) for layer in layers]).mT
    biases = [leaves[layer.bias.leaf].reshape(1, d_out, 1) for layer in layers if layer.bias is not None]
    if biases:
        whole = jnp.concatenate([whole, jnp.concatenate(biases).astype(whole.dtype)], axis=-1)
    return {layer.name: lax.slice_in_dim(whole, i, i + 1) for i, layer in enumerate(layers)}
