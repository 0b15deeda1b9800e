"""What a caller hands to a model, which a forward may write to: tensors, containers, objects, arrays.

A second look at a batch is at the batch that the first one was given, and leaves it as the first one left it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from kfaccore_torch.contents import CONTAINERS, kept_as_is, written
from kfaccore_torch.held import Undo, walked
from kfaccore_torch.replay import found


@dataclass
class Handed:
    """What is known of what forwards do to what they are given, and to what modules hold.

    writes  whether they write to its tensors, which are copied until that is known, and after where they do
    held    path of a large tensor that modules hold -> the same of it
    """

    writes: bool | None = None
    held: dict[str, bool] = field(default_factory=dict)

    def before(self, model: nn.Module, device: torch.device, given: dict[str, Any]) -> list[Undo]:
        """What puts all that a forward may move, and what it is `given`, back as it is now; TypeError for what can be
        read once only."""
        for path, x in walked(given):
            if isinstance(x, Iterator):
                raise TypeError(
                    f"{path} is a {type(x).__name__}, which can be read once: the step looks at the loss again after "
                    f"it. Hand over a list, or take a step that does not look back, such as kfaccore.Fixed"
                )
        watched = [(path, x, version(x)) for path, x in walked(given) if isinstance(x, torch.Tensor)]
        return [*found(model, device, self.held), partial(self._looked, watched), *self.after(given)]

    def after(self, given: dict[str, Any]) -> list[Undo]:
        """What puts what was `given` back as it is now."""
        return kept(given, self.writes is not False)

    def _looked(self, watched: list[tuple[str, torch.Tensor, int]]) -> None:
        """Before a second look: whether the first has written to tensors."""
        written = [path for path, x, before in watched if version(x) != before]
        if written and self.writes is False:
            warnings.warn(
                f"this forward has written to {written}, as no other before: the loss after this step was of what it "
                f"left there. From now on copies are made, and both looks at a batch are at what the step was given",
                stacklevel=2,
            )
        self.writes = bool(self.writes or written)


def kept(given: dict[str, Any], tensors: bool = True) -> list[Undo]:
    """What puts containers, arrays, attributes of objects, and if wanted the numbers in `tensors`, back as they are."""
    undo: list[Undo] = []
    for _, x in walked(given):
        if isinstance(x, torch.Tensor):
            if tensors and not isinstance(x, nn.Parameter):
                undo.append(partial(_rewritten, x, x.detach().clone(), version(x)))
        elif isinstance(x, np.ndarray | CONTAINERS):
            undo.append(kept_as_is(x))
    return undo


def version(x: torch.Tensor) -> int:
    """How often it was written to; 0 of one that does not count that."""
    return 0 if x.is_inference() else x._version


def _rewritten(x: torch.Tensor, old: torch.Tensor, before: int) -> None:
    if version(x) != before:
        written(x, old)
