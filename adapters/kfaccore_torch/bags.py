"""Bags of embeddings: each row of the output is a sum, or a mean, of rows of the table."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch.autograd.graph import GradientEdge

from kfaccore.layers import Embedding
from kfaccore_torch.calls import Call, Mark, Use
from kfaccore_torch.places import RAGGED
from kfaccore_torch.provenance import output_shape
from kfaccore_torch.views import Ref

_MODES = ("sum", "mean", "max")


def bag(node: Any, ref: Ref) -> list[Use] | str:
    """The use of a table by EmbeddingBag."""
    mode = _MODES[node._saved_mode]
    if mode == "max" or node._saved_scale_grad_by_freq or node._saved_sparse:
        return f"{node.name()} by maxima, frequencies or with sparse gradients"
    size, d = ref.view.shape
    shape = output_shape(node)
    offsets = node._saved_offsets[: shape[0]]
    padding = node._saved_padding_idx
    index = node._saved_indices
    weights = node._saved_per_sample_weights
    options = _counted(index, offsets, weights, None if padding >= 2**63 else padding, mode)
    call = Call(index, GradientEdge(node, 0), shape, shape[:-1], index._version, options)
    return [Use(Mark(Embedding(size, d), ref), call)]


def _counted(
    index: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor | None, padding: int | None, mode: str
) -> dict[str, Any]:
    """Of each token its bag, what it counts in that, (tokens,), and its place there; and the longest bag."""
    number = torch.arange(len(index), device=index.device)
    bags = torch.searchsorted(offsets.long(), number, right=True) - 1
    factor = torch.ones_like(index, dtype=torch.float64) if weights is None else weights.detach()
    if padding is not None:
        factor = torch.where(index == padding, 0.0, factor)
    if mode == "mean":
        counts = torch.zeros(len(offsets), dtype=factor.dtype, device=index.device)
        counts.index_add_(0, bags, (factor != 0).to(factor))
        factor = factor / counts.clamp(min=1)[bags]
    places = number - offsets.long()[bags] if len(index) else number
    longest = 1 if index.is_meta or not len(index) else int(places.max()) + 1
    return {"factor": factor, "bags": bags, "places": places, "longest": longest}


def padded(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of each bag, (bags, longest), and what each counts in it; 0 where there is none."""
    where = call.options["bags"], call.options["places"]
    shape = *call.rows, call.options["longest"]
    tokens = call.x.new_zeros(shape)
    factor = call.options["factor"].new_zeros(shape)
    if not call.x.is_meta:
        tokens[where] = call.x
        factor[where] = call.options["factor"]
    return tokens, factor


def ragged(call: Call) -> bool:
    """Whether its bags would be far more tokens padded than they are."""
    return prod(call.rows) * call.options.get("longest", 0) > RAGGED * call.x.shape[0]
