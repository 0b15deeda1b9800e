"""Batches of which no label counts: their rows are those of the layers all the same, as where few labels count.

They add nothing to the gradient, to G and to n; their inputs count in A, and they in the number of examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import array_api_compat as aac
import torch

from kfaccore_torch.collect import mapped

if TYPE_CHECKING:
    from kfaccore_torch.step import Engine

NEXT_TO_NOTHING = 1e-30  # an n that adds nothing to those of others


def standing(heads: Sequence[torch.Tensor]) -> bool:
    """Whether a prediction has rows at all, labelled or not."""
    return not any(0 in head.shape for head in heads)


def zero(heads: Sequence[torch.Tensor]) -> torch.Tensor:
    """The loss of a batch of which no label counts."""
    return torch.stack([head.sum() for head in heads]).sum() * 0.0


def share_of_none(engine: Engine) -> float:
    """n of what a rank has where nothing counts: a sum is one sum over all ranks, whatever they have."""
    return 1.0 / engine.core.comm.world if engine.objective.total else 0.0


def taking(n: Any) -> Any:
    """The n that statistics are taken with, which must be positive; one that lies on a device is not read."""
    return n if isinstance(n, torch.Tensor) or n > 0 else NEXT_TO_NOTHING


def uncounted(x: Any, share: float = 0.0) -> Any:
    """A Record or Stats of another n, whatever it was: NaN where a device knew that nothing counts. Without a share it
    is next to nothing."""
    return mapped(lambda name, leaf: _filled(leaf, taking(share)) if name == "n" else leaf, x)


def _filled(n: Any, value: float) -> Any:
    return aac.array_namespace(n).full_like(n, value) if hasattr(n, "dtype") else value
