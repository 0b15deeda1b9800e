"""Tensors that are not arrays of real numbers: complex ones, sparse and nested ones. No record is made of them."""

from __future__ import annotations

from typing import Any

import torch


def unusual(x: Any) -> str:
    """What a tensor is that is none of real numbers, each in its place; "" of all others."""
    if not isinstance(x, torch.Tensor):
        return ""
    if x.is_nested:
        return "a nested tensor"
    if x.layout is not torch.strided:
        return f"a {x.layout} tensor"
    return f"a {x.dtype} tensor" if x.is_complex() else ""


def unusual_output(node: Any) -> str:
    """As `unusual`, of what an operation gave; autograd does not tell layouts."""
    told = node._input_metadata
    if not told:
        return ""
    if told[0].is_nested_tensor:
        return "a nested tensor"
    return f"a {told[0].dtype} tensor" if told[0].dtype.is_complex else ""


def dense(g: torch.Tensor) -> torch.Tensor:
    """A gradient that may be sparse, as that of a table is on request."""
    return g if g.layout is torch.strided else g.to_dense()


def dense_grad(p: torch.Tensor) -> torch.Tensor | None:
    """The gradient of a parameter, whose direction is dense where it has one."""
    if p.grad is not None and p.grad.layout is not torch.strided:
        p.grad = p.grad.to_dense()
    return p.grad
