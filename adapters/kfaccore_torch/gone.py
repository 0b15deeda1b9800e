"""What has become of the gradients that a backward pass left."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from kfaccore_torch.unread import known_at_once
from kfaccore_torch.unusual import dense

Left = list[tuple[torch.Tensor, torch.Tensor, int]]  # parameters, their gradients, and versions of these


def gradients(trained: Sequence[torch.Tensor]) -> Left:
    """Those that there are now."""
    return [(p, p.grad, p.grad._version) for p in trained if p.grad is not None]


def same(now: Left, left: Left) -> bool:
    """Whether these are the tensors that there were, and nothing is known to have written to them."""
    return len(now) == len(left) and all(
        grad is old and version == before for (_, grad, version), (_, old, before) in zip(now, left, strict=True)
    )


def gone(left: Left) -> set[int] | None:
    """Parameters, by id, whose gradients were let go of or set to zero since: all, or those of which it is certain.
    None where only a device knows, which is not asked.

    A gradient may be zero as its pass left it: only where all are, or where it was written to and others were not, that
    tells. What goes past autograd (`p.grad.data`, a NumPy view) leaves no version.
    """
    there = [
        (p, p.grad, p.grad is grad and grad._version == version) for p, grad, version in left if p.grad is not None
    ]
    found = {id(p) for p, _, _ in left if p.grad is None}
    untouched = [grad for _, grad, as_left in there if as_left]
    if untouched and not all(known_at_once(grad) for grad in untouched):
        return None if len(untouched) == len(left) else found | _zeros(there)
    if left and not _any(grad for _, grad, _ in there):
        return {id(p) for p, _, _ in left}
    return found | _zeros(there) if untouched else found


def doubt(left: Left) -> torch.Tensor:
    """Whether all gradients are zero, on their device; nothing waits for it."""
    most = torch._foreach_norm([dense(p.grad) for p, _, _ in left if p.grad is not None], float("inf"))
    return torch.stack([x.double().to(most[0].device) for x in most]).max() == 0


def _zeros(there: Iterable[tuple[torch.Tensor, torch.Tensor, bool]]) -> set[int]:
    """Of gradients that were written to, those that are zero."""
    return {id(p) for p, grad, as_left in there if not as_left and not _any([grad])}


def _any(grads: Iterable[torch.Tensor]) -> bool:
    """Whether any number is not zero; small ones first, as most often the first tells."""
    return any(bool(dense(grad).any()) for grad in sorted(grads, key=torch.Tensor.numel))
