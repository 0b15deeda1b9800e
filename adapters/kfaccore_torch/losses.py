"""Training losses of torch: what kfaccore's Fisher needs to know of each, read from the loss object itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import kfaccore as kf
from kfaccore_torch.known_losses import CORE, TABLE, Objective
from kfaccore_torch.outputs import tensor_of
from kfaccore_torch.own_losses import Loss
from kfaccore_torch.own_objective import Own
from kfaccore_torch.plan import unwrapped
from kfaccore_torch.split import Split

FISHERS = (kf.monte_carlo, kf.type2, kf.empirical, kf.forward_only)


@dataclass(frozen=True)
class Joined:
    """A `kfaccore.Joint`: an objective a head; predictions and targets are dicts. All heads are means, or all sums."""

    joint: kf.Joint
    parts: dict[str, Objective | Own]

    @property
    def total(self) -> bool:
        """Whether the loss is a sum, whose n does not grow with the batch."""
        return all(part.total for part in self.parts.values())

    def nonnegative(self, target: Any) -> bool | None:
        """Whether no head's loss can be below 0; None where that is not known of one and True of the others."""
        targets = target or {}
        found = [part.nonnegative(targets.get(head)) for head, part in self.parts.items()]
        return False if False in found else None if None in found else True

    def __post_init__(self) -> None:
        sums = [head for head, part in self.parts.items() if part.total]
        if sums and len(sums) < len(self.parts):
            means = [head for head in self.parts if head not in sums]
            raise ValueError(
                f"Joint has sum losses for {sums} and mean losses for {means}: what micro-batches add up to is another "
                f"for each; need one reduction for all, and weights={{head: number}} where a head is to count more"
            )

    @property
    def weights(self) -> dict[str, float]:
        """A number a head."""
        return dict(self.joint.weights)

    def heads(self, f: Any) -> list[torch.Tensor]:
        """In the order of the losses."""
        if not isinstance(f, Mapping) or set(f) != set(self.parts):
            given = sorted(f) if isinstance(f, Mapping) else type(f).__name__
            raise TypeError(f"Joint needs a dict of predictions for {sorted(self.parts)}, got {given}")
        return [tensor_of(f[head]) for head in self.parts]

    def _pairs(self, f: Any, target: Any) -> None:
        """TypeError where predictions and targets are not those of the heads."""
        self.heads(f)
        missing = sorted(set(self.parts) - set(target)) if isinstance(target, Mapping) else sorted(self.parts)
        if missing:
            got = sorted(target) if isinstance(target, Mapping) else type(target).__name__
            raise TypeError(f"Joint needs a dict of targets for {sorted(self.parts)}, got {got}")

    def value(self, f: Any, target: Any) -> torch.Tensor:
        """The weighted sum of the heads' losses, of those in which something counts; NaN where nothing does in any."""
        self._pairs(f, target)
        values = []
        unread = []
        for head, part in self.parts.items():
            n = None if self.total else part.unread_share(f[head], target[head])
            values.append(self.weights[head] * _counted(part, f[head], target[head], n))
            unread.append(n)
        total = torch.stack([v.to(values[0].dtype) for v in values]).sum()
        known = [n for n in unread if n is not None]
        if len(known) < len(unread):
            return total
        return torch.where(torch.stack(known).isnan().all(), float("nan"), total)

    def share(self, f: Any, target: Any) -> float:
        """The number of examples, of sums 1; 0 where nothing counts in any head, as far as the host knows."""
        self._pairs(f, target)
        heads = self.heads(f)
        each = [(part, f[head], target[head]) for head, part in self.parts.items()]
        if self.total:
            return max(part.share(*pair) for part, *pair in each)
        counts = any(part.unread_share(*pair) is not None or part.share(*pair) for part, *pair in each)
        return float(min(len(x) for x in heads)) if counts else 0.0

    def unread_share(self, f: Any, target: Any) -> None:
        """Known on the host."""

    def draws(
        self, fisher: Callable, count: int, f: Any, target: Any, rng: Any, split: Split | None = None
    ) -> list[torch.Tensor]:
        """Draws a head that share one axis: those of type2 in turn, the others at once."""
        n, found = self.share(f, target), {}
        for place, (head, part) in enumerate(self.parts.items()):
            v = part.draws(fisher, count, f[head], target[head], rng, None if split is None else split.of(place))
            own = part.share(f[head], target[head])
            scale = self.weights[head] * n / own if own else 0.0
            found[head] = v * (scale if fisher is kf.empirical else scale**0.5)
        return list((self.joint.padded(found) if fisher is kf.type2 else found).values())


def _counted(part: Objective | Own, f: Any, target: Any, unread: torch.Tensor | None) -> torch.Tensor:
    """A head's loss; 0, of slope 0, where nothing in it counts: of what lies on a device chosen there, by its n."""
    if part.total:
        return part.value(f, target)
    if unread is None:
        return part.value(f, target) if part.share(f, target) else f[:0].sum()
    if isinstance(part.loss, (*CORE, Loss)):  # 0 / 0 has no slope
        return part.loss.value(f, target) / unread.nan_to_num(1.0)
    return torch.where(unread.isnan(), 0.0, part.value(f, target))


def objective(loss: Any) -> Objective | Own | Joined:
    """From a loss of torch with reduction mean or sum, compiled or not, one of kfaccore, or one's own that has what
    `Loss` says; ValueError for any other."""
    if isinstance(loss, kf.Joint):
        return Joined(loss, {head: _single(part) for head, part in loss.losses})
    return _single(loss)


def _single(loss: Any) -> Objective | Own:
    loss = unwrapped(loss)
    if isinstance(loss, CORE):
        return Objective(lambda loss: loss, loss, lambda loss, core, f, y: float(core.normaliser(f.detach(), y)))
    for kind, build in TABLE.items():
        if type(loss) is kind:
            if loss.reduction not in ("mean", "sum"):
                raise ValueError(f"{kind.__name__} has reduction {loss.reduction!r}; need 'mean' or 'sum'")
            return build(loss)
    if isinstance(loss, Loss):
        return Own(loss)
    known = sorted(kind.__name__ for kind in TABLE)
    raise ValueError(
        f"loss {loss!r} has no Fisher here; need one of {known}, of kfaccore, or one's own with the methods of "
        f"kfaccore_torch.Loss{_hint(loss)}"
    )


def _hint(loss: Any) -> str:
    """What to give instead."""
    if isinstance(loss, type):
        return f"; give an instance, {loss.__name__}()"
    for function, kind in FUNCTIONS.items():
        if loss is function:
            return f"; give nn.{kind.__name__}()"
    own = (
        "; as a kfaccore_torch.ExampleLoss it needs each example's loss, each(f, target), and no more where "
        "fisher=kfaccore.type2 or kfaccore.empirical is passed"
    )
    return next((text for kind, text in HINTS.items() if isinstance(loss, kind)), own)


FUNCTIONS = {
    nn.functional.cross_entropy: nn.CrossEntropyLoss,
    nn.functional.mse_loss: nn.MSELoss,
    nn.functional.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
}
HINTS = {
    nn.BCELoss: "; drop the sigmoid at the model's end, so that it gives logits, and use BCEWithLogitsLoss",
    nn.NLLLoss: "; drop the log-softmax at the model's end, so that it gives logits, and use CrossEntropyLoss",
}
