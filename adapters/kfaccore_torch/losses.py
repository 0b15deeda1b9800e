"""Training losses of torch: what kfaccore's Fisher needs to know of each, read from the loss object itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

import kfaccore as kf
from kfaccore_torch.bridge import detached
from kfaccore_torch.owner import Split

FISHERS = (kf.monte_carlo, kf.type2, kf.empirical, kf.forward_only)
CORE = (kf.SoftmaxCrossEntropy, kf.Bernoulli, kf.Gaussian)
Share = Callable[[Any, Any, torch.Tensor, Any], float]


@dataclass(frozen=True)
class Objective:
    """A loss of one output whose Fisher is known.

    core     the per-example loss, on predictions with the classes last
    loss     what the user gave: called with prediction and target
    share_of (loss, core, prediction, target) -> n: the training loss is the core's sum over examples divided by n
    classes_second   whether the prediction has its classes on axis 1, as `nn.CrossEntropyLoss` wants them
    times    the loss over the core's: gradients are as many times larger, roots of the Hessian the root of it
    """

    core: Any
    loss: Any
    share_of: Share
    classes_second: bool = False
    times: float = 1.0

    @property
    def total(self) -> bool:
        """Whether the loss is a sum, whose n does not grow with the batch."""
        return getattr(self.loss, "reduction", "mean") == "sum"

    def heads(self, f: Any) -> list[torch.Tensor]:
        """The tensors of a prediction; TypeError for what is not one."""
        return [_tensor(f)]

    def value(self, f: Any, target: Any) -> torch.Tensor:
        """The training loss, 0-d, differentiable."""
        if isinstance(self.loss, CORE):
            return self.loss.value(f, target) / self.loss.normaliser(f, target)
        return self.loss(f, target)

    def share(self, f: Any, target: Any) -> float:
        """n of a record of this batch; 0 where no example or label counts."""
        return self.share_of(self.loss, self.core, f, target) if f.numel() else 0.0

    def draws(
        self, fisher: Callable, count: int, f: Any, target: Any, rng: Any, split: Split | None = None
    ) -> torch.Tensor:
        """Gradients of the per-example loss with respect to f, (draws, *f.shape), in single precision or better; label
        positions of one example of `split` are drawn together."""
        core, f = self.core, detached(f)
        f = f.movedim(1, -1) if self.classes_second else f
        mass = None
        if self.classes_second and isinstance(target, torch.Tensor) and target.ndim == f.ndim:
            if fisher is kf.empirical:
                raise ValueError("the empirical Fisher needs hard labels, the target holds probabilities")
            smoothing = core.smoothing
            mass = ((1 - smoothing) * target.movedim(1, -1).sum(-1, keepdim=True) + smoothing).clamp(min=0).sqrt().to(f)
            core, target = replace(core, ignore=None, weights=None), None
        elif isinstance(target, torch.Tensor) and target.is_floating_point():
            target = target.to(f.dtype)
        shape = f.shape
        if split is not None and split.examples != len(f):
            f, target = _unfolded(f, split), None if target is None else _unfolded(target, split)
        if fisher is kf.forward_only:
            found = f.new_zeros((0, *f.shape))
        elif fisher is kf.monte_carlo:
            noise = torch.from_numpy(kf.draw_noise(core, tuple(f.shape), count, rng)).to(f)
            found = kf.monte_carlo(core, f, noise, target)
        elif fisher is kf.type2:
            found = kf.type2(core, f, target)
        else:
            found = kf.empirical(core, f, target)
        if self.times != 1:
            found = found * (self.times if fisher is kf.empirical else self.times**0.5)
        if split is not None and split.examples != shape[0]:
            found = found.movedim(1, 2) if split.inner else found
            found = found.reshape(len(found), *shape)
        found = found if mass is None else found * mass
        return found.movedim(-1, 2) if self.classes_second else found


@dataclass(frozen=True)
class Joined:
    """A `kfaccore.Joint`: an Objective a head; predictions and targets are dicts."""

    joint: kf.Joint
    parts: dict[str, Objective]
    total: bool = False

    @property
    def weights(self) -> dict[str, float]:
        """A number a head."""
        return dict(self.joint.weights)

    def heads(self, f: Any) -> list[torch.Tensor]:
        """In the order of the losses."""
        if not isinstance(f, Mapping) or set(f) != set(self.parts):
            given = sorted(f) if isinstance(f, Mapping) else type(f).__name__
            raise TypeError(f"Joint needs a dict of predictions for {sorted(self.parts)}, got {given}")
        return [_tensor(f[head]) for head in self.parts]

    def value(self, f: Any, target: Any) -> torch.Tensor:
        """The weighted sum of the heads' losses."""
        self.heads(f)
        values = [self.weights[head] * part.value(f[head], target[head]) for head, part in self.parts.items()]
        return torch.stack([v.to(values[0].dtype) for v in values]).sum()

    def share(self, f: Any, target: Any) -> float:
        """The number of examples."""
        return float(min(len(x) for x in self.heads(f)))

    def draws(
        self, fisher: Callable, count: int, f: Any, target: Any, rng: Any, split: Split | None = None
    ) -> list[torch.Tensor]:
        """Draws a head that share one axis: those of type2 in turn, the others at once."""
        n, found = self.share(f, target), {}
        for head, part in self.parts.items():
            v = part.draws(fisher, count, f[head], target[head], rng, split)
            own = part.share(f[head], target[head])
            scale = self.weights[head] * n / own if own else 0.0
            found[head] = v * (scale if fisher is kf.empirical else scale**0.5)
        return list((self.joint.padded(found) if fisher is kf.type2 else found).values())


def objective(loss: Any) -> Objective | Joined:
    """From a loss of torch with reduction mean or sum, or one of kfaccore; ValueError for any other."""
    if isinstance(loss, kf.Joint):
        return Joined(loss, {head: _single(part) for head, part in loss.losses})
    return _single(loss)


def _single(loss: Any) -> Objective:
    if isinstance(loss, CORE):
        return Objective(loss, loss, _core_share)
    for kind, build in TABLE.items():
        if type(loss) is kind:
            if loss.reduction not in ("mean", "sum"):
                raise ValueError(f"{kind.__name__} has reduction {loss.reduction!r}; need 'mean' or 'sum'")
            return build(loss)
    known = sorted(kind.__name__ for kind in TABLE)
    hint = next((text for kind, text in HINTS.items() if isinstance(loss, kind)), "")
    raise ValueError(f"loss {loss!r} has no Fisher here; need one of {known} or of kfaccore{hint}")


HINTS = {
    nn.BCELoss: "; drop the sigmoid at the model's end, so that it gives logits, and use BCEWithLogitsLoss",
    nn.NLLLoss: "; drop the log-softmax at the model's end, so that it gives logits, and use CrossEntropyLoss",
}


def _tensor(f: Any) -> torch.Tensor:
    if isinstance(f, torch.Tensor):
        return f
    names = [str(name) for name in f] if isinstance(f, Mapping) else []
    which = f", such as output.{'logits' if 'logits' in names else names[0]}" if names else ""
    raise TypeError(
        f"the prediction is a {type(f).__name__}{f' of {names}' if names else ''}, not a tensor: hand over the tensor "
        f"that the loss is of{which} (with Optimizer, wrap the model so that it returns that); for several with a loss "
        f"each use kfaccore.Joint"
    )


def _unfolded(x: torch.Tensor, split: Split) -> torch.Tensor:
    """(rows, ...) as (examples, rows of each, ...)."""
    apart = len(x) // split.examples
    if split.inner:
        return x.unflatten(0, (apart, split.examples)).movedim(1, 0)
    return x.unflatten(0, (split.examples, apart))


def _core_share(loss: Any, core: Any, f: torch.Tensor, y: Any) -> float:
    return float(core.normaliser(detached(f), y))


def _cross_entropy_share(loss: nn.CrossEntropyLoss, core: Any, f: torch.Tensor, y: torch.Tensor) -> float:
    if y.ndim == f.ndim:  # class probabilities
        if core.weights is not None:
            raise ValueError("CrossEntropyLoss with class weights needs class indices, got probabilities")
        return 1.0 if loss.reduction == "sum" else f.numel() / f.shape[1]
    if loss.reduction == "sum":
        return 1.0 if bool((y != loss.ignore_index).any()) else 0.0
    return float(core.normaliser(detached(f).movedim(1, -1), y))


def _squared_share(loss: nn.MSELoss, core: Any, f: torch.Tensor, y: Any) -> float:
    """The mean divides by every number in f."""
    return 1.0 if loss.reduction == "sum" else float(f.numel())


def _logistic_share(loss: nn.BCEWithLogitsLoss, core: Any, f: torch.Tensor, y: Any) -> float:
    return 1.0 if loss.reduction == "sum" else float(f.numel())


def _cross_entropy(loss: nn.CrossEntropyLoss) -> Objective:
    weights = None if loss.weight is None else tuple(float(w) for w in loss.weight)
    core = kf.SoftmaxCrossEntropy(loss.label_smoothing, weights, loss.ignore_index)
    return Objective(core, loss, _cross_entropy_share, classes_second=True)


def _squared(loss: nn.MSELoss) -> Objective:
    """sum (f - y)^2 is twice the core's."""
    return Objective(kf.Gaussian(), loss, _squared_share, times=2.0)


def _logistic(loss: nn.BCEWithLogitsLoss) -> Objective:
    if loss.weight is not None or loss.pos_weight is not None:
        raise ValueError("BCEWithLogitsLoss with weight or pos_weight has no Fisher here; need it without")
    return Objective(kf.Bernoulli(), loss, _logistic_share)


TABLE: dict[type, Callable[[Any], Objective]] = {
    nn.CrossEntropyLoss: _cross_entropy,
    nn.MSELoss: _squared,
    nn.BCEWithLogitsLoss: _logistic,
}
