"""Bags of embeddings: each row of the output is a sum, or a mean, of rows of the table."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.graph import GradientEdge

from kfaccore.layers import Embedding
from kfaccore_torch.calls import Call, Mark, Use
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
    weights = node._saved_per_sample_weights
    index, factor = padded(node._saved_indices, offsets, weights, None if padding >= 2**63 else padding, mode)
    call = Call(index, GradientEdge(node, 0), shape, shape[:-1], index._version, {"factor": factor})
    return [Use(Mark(Embedding(size, d), ref), call)]


def padded(
    index: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor | None, padding: int | None, mode: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of each bag, (bags, longest), and what each counts in it; 0 where there is none."""
    if index.is_meta:
        return index.new_zeros((len(offsets), 1)), torch.empty((len(offsets), 1), device="meta")
    ends = torch.cat([offsets[1:], offsets.new_tensor([len(index)])])
    lengths = ends - offsets
    longest = max(1, int(lengths.max()) if len(lengths) else 1)
    place = torch.arange(longest, device=index.device)
    exists = place < lengths[:, None]
    where = (offsets[:, None] + place).clamp(max=max(0, len(index) - 1))
    tokens = torch.where(exists, index[where], 0)
    exists = exists if padding is None else exists & (tokens != padding)
    factor = exists.to(torch.float64 if weights is None else weights.dtype)
    if weights is not None:
        factor = factor * weights.detach()[where]
    if mode == "mean":
        factor = factor / exists.sum(1, keepdim=True).clamp(min=1)
    return tokens, factor
