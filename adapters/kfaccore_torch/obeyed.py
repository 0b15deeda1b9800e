"""Hooks of parameters where the gradient does not pass through `.grad`: they change it as in any other backward."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch


def hooked(parameters: Iterable[torch.Tensor]) -> bool:
    """Whether one of them has a hook, which asks for its gradient itself."""
    return any(bool(p._backward_hooks) or bool(p._post_accumulate_grad_hooks) for p in parameters)


def obeyed(wanted: Sequence[Any], found: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """What a derivative by `wanted`, in which autograd runs the hooks of tensors, is after those that run once a
    gradient stands in `.grad`; there it stands for as long as they run."""
    after: dict[int, torch.Tensor | None] = {}
    for p, g in zip(wanted, found, strict=True):
        hooks = p._post_accumulate_grad_hooks if isinstance(p, torch.Tensor) else None
        if not hooks or g is None or id(p) in after:
            continue
        before = p.grad
        p.grad = g.detach()
        try:
            with torch.no_grad():
                for hook in list(hooks.values()):
                    hook(p)
            after[id(p)] = p.grad
        finally:
            p.grad = before
    return [after.get(id(p), g) for p, g in zip(wanted, found, strict=True)] if after else list(found)
