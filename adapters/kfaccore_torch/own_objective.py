"""The objective that a user's loss is: what is asked of it, and in which shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import kfaccore as kf
from kfaccore_torch.bridge import detached
from kfaccore_torch.handed import version
from kfaccore_torch.outputs import tensor_of
from kfaccore_torch.split import Split
from kfaccore_torch.unread import known_at_once, unread


@dataclass(frozen=True)
class Own:
    """The objective of a user's `Loss`."""

    loss: Any
    _leaves: dict[str, bool] = field(default_factory=dict, compare=False, repr=False)  # method -> f as it was

    def _asked(self, name: str, f: torch.Tensor, *given: Any) -> torch.Tensor:
        """What a method of the loss says of a prediction, which it may write to: of a copy, unless it was seen to leave
        it as it was."""
        leaves = self._leaves.get(name)
        x = f if leaves else f.clone()
        before = version(x)
        found = getattr(self.loss, name)(x, *given)
        wrote = version(x) != before
        if wrote and leaves:
            raise ValueError(
                f"{type(self.loss).__name__}.{name} wrote to its prediction, {tuple(f.shape)}, as it had not before, "
                f"so that what the model gave is gone: begin it with f = f.clone()"
            )
        self._leaves[name] = not wrote and leaves is not False
        return found

    @property
    def total(self) -> bool:
        """Whether the loss is a sum, whose n does not grow with the batch."""
        return getattr(self.loss, "reduction", "mean") == "sum"

    def nonnegative(self, target: Any) -> bool:
        """Whether the loss says that it cannot be below 0; of one that does not say so only differences count."""
        return getattr(self.loss, "nonnegative", False)

    def heads(self, f: Any) -> list[torch.Tensor]:
        """The tensor of a prediction; TypeError for what is not one."""
        return [tensor_of(f)]

    def value(self, f: Any, target: Any) -> torch.Tensor:
        """The training loss, 0-d, differentiable."""
        return self._asked("value", f, target) / self.loss.normaliser(f, target)

    def share(self, f: Any, target: Any) -> float:
        """n of a record of this batch; 0 where nothing counts."""
        return float(self.loss.normaliser(f.detach(), target)) if f.numel() else 0.0

    def unread_share(self, f: Any, target: Any) -> torch.Tensor | None:
        """`share` as a number on the device, NaN for 0; None where the host knows it."""
        return None if known_at_once(f) else unread(self.loss.normaliser(f.detach(), target))

    def draws(
        self, fisher: Callable, count: int, f: Any, target: Any, rng: Any, split: Split | None = None
    ) -> torch.Tensor:
        """(draws, *f.shape), in single precision or better. Rows of one example of `split` have losses of their own:
        their roots stand in draws of their own."""
        f = detached(f)
        if fisher is kf.forward_only:
            return f.new_zeros((0, *f.shape))
        if fisher is kf.empirical:
            return self._checked("gradient", self._asked("gradient", f, target)[None], f)
        if fisher is kf.monte_carlo:
            tiny = torch.finfo(f.dtype).eps
            noise = torch.from_numpy(rng.random((count, *f.shape))).to(f).clamp(tiny, 1 - tiny)
            return self._checked("sampled", self._asked("sampled", f, noise, target), f) * count**-0.5
        found = self._checked("roots", self._asked("roots", f, target), f)
        if split is None or split.examples == len(f):
            return found
        apart = len(f) // split.examples
        position = torch.arange(len(f), device=f.device)
        position = position // split.examples if split.inner else position % apart
        each = (position == torch.arange(apart, device=f.device)[:, None]).to(f)
        return (found * each.reshape(apart, 1, len(f), *(1,) * (f.ndim - 1))).reshape(-1, *f.shape)

    def _checked(self, name: str, found: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
        if found.shape[1:] != f.shape:
            what = tuple(found.shape[1:]) if name == "gradient" else tuple(found.shape)
            need = tuple(f.shape) if name == "gradient" else f"(draws, {', '.join(map(str, f.shape))})"
            raise ValueError(f"{type(self.loss).__name__}.{name} gave the shape {what}; need {need}")
        return found.detach()
