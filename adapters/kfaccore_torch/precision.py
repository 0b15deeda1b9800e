"""In what precision the user's own step multiplies, layer by layer: observed at each call, on CUDA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from kfaccore import Precision
from kfaccore_torch.bridge import HALF
from kfaccore_torch.settle import Layer

_KINDS = ("float32", "tf32", "half")  # from the strictest
_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
_MULTIPLY = (*_CONVOLUTIONS, F.linear)


def product_of(func: Any, output: torch.Tensor) -> str | None:
    """How a call has multiplied, "float32", "tf32" or "half"; None where it is no product, or not on CUDA."""
    if func not in _MULTIPLY or not output.is_cuda:
        return None
    if output.dtype in HALF:
        return "half"
    single = output.dtype == torch.float32
    return "tf32" if single and (_cudnn() if func in _CONVOLUTIONS else _matmul()) else "float32"


def by_layer(layers: Mapping[str, Layer], products: Mapping[str, str]) -> dict[str, Precision] | None:
    """What each layer's statistics and solve are made in where its own product was `products` by parameter: bfloat16
    rows and TF32 solves for less than float32. Gains, lone biases and tables have no product; their gradients came
    through those of others, so that the loosest of these counts. None where nothing was seen."""
    if not products:
        return None
    loosest = max(products.values(), key=_KINDS.index)
    found = {}
    for name, layer in layers.items():
        seen = [products[path] for path in layer.paths.values() if path in products]
        how = min(seen, key=_KINDS.index) if seen else loosest
        found[name] = Precision() if how == "float32" else Precision("bfloat16", "tf32")
    return found


def _matmul() -> bool:
    """Whether dense products of float32 run in TF32."""
    flags = torch.backends.cuda.matmul
    if not hasattr(flags, "fp32_precision"):  # before torch 2.9
        return bool(flags.allow_tf32)
    return _first(flags.fp32_precision, torch.backends.fp32_precision) == "tf32"


def _cudnn() -> bool:
    """Whether convolutions do."""
    flags: Any = torch.backends.cudnn
    if not hasattr(flags, "conv"):
        return bool(flags.allow_tf32)
    return _first(flags.conv.fp32_precision, flags.fp32_precision, torch.backends.fp32_precision) == "tf32"


def _first(*settings: str) -> str:
    """The setting nearest to an operation that says anything."""
    return next((setting for setting in settings if setting != "none"), "none")
