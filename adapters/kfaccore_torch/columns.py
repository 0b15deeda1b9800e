"""Whose columns a file has: torch alone keeps the kernel of a transposed convolution as the parameter has it."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike

from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd

import kfaccore as kf
from kfaccore.layers import Conv
from kfaccore_torch.plan import Layer


def check_columns(path: str | PathLike, layers: Mapping[str, Layer], model: nn.Module) -> None:
    """ValueError where a file's matrix of a transposed convolution is of another adapter, whose columns are those of
    the image's rows: it has no axis of one block."""
    turned = [name for name, layer in layers.items() if _turned(layer, model)]
    saved = kf.flatten(kf.load(path)) if turned else {}
    theirs = [name for name in turned if saved[f"params/{name}"].ndim == 2]
    if theirs:
        raise ValueError(
            f"{path} was written by another adapter, which keeps the kernels of transposed convolutions the other way "
            f"round than is done here, of layers {theirs}: begin their curvature anew, and set their weights from the "
            f"model's own"
        )


def _turned(layer: Layer, model: nn.Module) -> bool:
    """Whether a layer is a transposed convolution: its outputs stand before its inputs in the weight's memory, or its
    module says so."""
    if not isinstance(layer.kind, Conv) or max(layer.kind.window.kernel) == 1:
        return False
    outs, ins = layer.view("weight").axes[:2]
    if outs and ins and outs[-1][1] < ins[-1][1]:
        return True
    owner = model.get_submodule(layer.paths["weight"].rpartition(".")[0])
    return isinstance(owner, _ConvTransposeNd)
