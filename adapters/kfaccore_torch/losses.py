"""Training losses of torch: what kfaccore's Fisher needs to know of each, read from the loss object itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

import kfaccore as kf
from kfaccore_torch.bridge import detached

FISHERS = (kf.monte_carlo, kf.type2, kf.empirical)


@dataclass(frozen=True)
class Objective:
    """A loss whose Fisher is known.

    core     the per-example loss, on predictions with the classes last
    value    (prediction, target) -> the training loss, 0-d, differentiable
    share    (prediction, target) -> n: the training loss is the core's sum over examples divided by n
    classes_second   whether the prediction has its classes on axis 1, as `nn.CrossEntropyLoss` wants them
    """

    core: Any
    value: Callable[[torch.Tensor, Any], torch.Tensor]
    share: Callable[[torch.Tensor, Any], float]
    classes_second: bool = False

    def draws(self, fisher: Callable, count: int, f: torch.Tensor, target: Any, rng: Any) -> torch.Tensor:
        """Gradients of the per-example loss with respect to f, (draws, *f.shape), in single precision or better."""
        core, f = self.core, detached(f)
        f = f.movedim(1, -1) if self.classes_second else f
        if self.classes_second and isinstance(target, torch.Tensor) and target.ndim == f.ndim:
            if fisher is kf.empirical:
                raise ValueError("the empirical Fisher needs hard labels, the target holds probabilities")
            core, target = replace(core, ignore=None), None
        elif isinstance(target, torch.Tensor) and target.is_floating_point():
            target = target.to(f.dtype)
        if fisher is kf.monte_carlo:
            noise = torch.from_numpy(kf.draw_noise(core, tuple(f.shape), count, rng)).to(f)
            found = kf.monte_carlo(core, f, noise, target)
        elif fisher is kf.type2:
            found = kf.type2(core, f, target)
        else:
            found = kf.empirical(core, f, target)
        return found.movedim(-1, 2) if self.classes_second else found


def objective(loss: Any) -> Objective:
    """From a loss of torch with reduction mean or sum, or one of kfaccore; ValueError for any other."""
    if isinstance(loss, kf.SoftmaxCrossEntropy | kf.Bernoulli | kf.Gaussian):
        return _core(loss)
    for kind, build in TABLE.items():
        if type(loss) is kind:
            if loss.reduction not in ("mean", "sum"):
                raise ValueError(f"{kind.__name__} has reduction {loss.reduction!r}; need 'mean' or 'sum'")
            return build(loss)
    known = sorted(kind.__name__ for kind in TABLE)
    hint = "; end the model with logits and use CrossEntropyLoss" if isinstance(loss, nn.NLLLoss | nn.BCELoss) else ""
    raise ValueError(f"loss {loss!r} has no Fisher here; need one of {known} or of kfaccore{hint}")


def _core(loss: Any) -> Objective:
    """A loss of kfaccore runs on torch tensors as it is: the mean over its normaliser."""
    return Objective(
        loss,
        lambda f, y: loss.value(f, y) / loss.normaliser(f, y),
        lambda f, y: float(loss.normaliser(detached(f), y)),
    )


def _cross_entropy(loss: nn.CrossEntropyLoss) -> Objective:
    weights = None if loss.weight is None else tuple(float(w) for w in loss.weight)
    core = kf.SoftmaxCrossEntropy(loss.label_smoothing, weights, loss.ignore_index)

    def share(f: torch.Tensor, y: torch.Tensor) -> float:
        if y.ndim == f.ndim:  # class probabilities
            if weights is not None:
                raise ValueError("CrossEntropyLoss with class weights needs class indices, got probabilities")
            return 1.0 if loss.reduction == "sum" else f.numel() / f.shape[1]
        classes_last = detached(f).movedim(1, -1)
        return 1.0 if loss.reduction == "sum" else float(core.normaliser(classes_last, y))

    return Objective(core, loss, share, classes_second=True)


def _squared(loss: nn.MSELoss) -> Objective:
    """sum (f - y)^2 is twice the core's; the mean divides by every number in f."""
    return Objective(kf.Gaussian(), loss, lambda f, y: 0.5 if loss.reduction == "sum" else f.numel() / 2)


def _logistic(loss: nn.BCEWithLogitsLoss) -> Objective:
    if loss.weight is not None or loss.pos_weight is not None:
        raise ValueError("BCEWithLogitsLoss with weight or pos_weight has no Fisher here; need it without")
    return Objective(kf.Bernoulli(), loss, lambda f, y: 1.0 if loss.reduction == "sum" else float(f.numel()))


TABLE: dict[type, Callable[[Any], Objective]] = {
    nn.CrossEntropyLoss: _cross_entropy,
    nn.MSELoss: _squared,
    nn.BCEWithLogitsLoss: _logistic,
}
