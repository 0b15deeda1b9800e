"""Losses of torch and of kfaccore: their draws come from the core's per-example loss."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

import kfaccore as kf
from kfaccore_torch.bridge import detached
from kfaccore_torch.ends import asks_labels, check_alike, check_its_own, check_labels, nonnegative
from kfaccore_torch.outputs import tensor_of
from kfaccore_torch.split import Split
from kfaccore_torch.unread import known_at_once, unread

CORE = (kf.SoftmaxCrossEntropy, kf.Bernoulli, kf.Gaussian)
Share = Callable[[Any, Any, torch.Tensor, Any], float]
Mass = Callable[[Any, torch.Tensor, Any], torch.Tensor | None]


@dataclass(frozen=True)
class Objective:
    """A loss of one output whose Fisher is known.

    core_of  loss -> the per-example loss, on predictions with the classes last; asked anew each time, as a loop may
             change the numbers of its loss
    loss     what the user gave: called with prediction and target
    share_of (loss, core, prediction, target) -> n: the training loss is the core's sum over examples divided by n
    mass_of  (loss, prediction, target) -> what multiplies the core's Hessian, like the prediction but for its class
             axis of 1; None where the core knows
    classes_second   whether the prediction has its classes on axis 1, as `nn.CrossEntropyLoss` wants them
    times    the loss over the core's: gradients are as many times larger, roots of the Hessian the root of it
    """

    core_of: Callable[[Any], Any]
    loss: Any
    share_of: Share
    mass_of: Mass = lambda loss, f, target: None
    classes_second: bool = False
    times: float = 1.0

    @property
    def core(self) -> Any:
        """The per-example loss as `loss` is now."""
        return self.core_of(self.loss)

    @property
    def total(self) -> bool:
        """Whether the loss is a sum, whose n does not grow with the batch."""
        return getattr(self.loss, "reduction", "mean") == "sum"

    def nonnegative(self, target: Any) -> bool | None:
        """Whether the loss cannot be below 0; None where that is not known."""
        return nonnegative(self.loss, self.core, target)

    def heads(self, f: Any) -> list[torch.Tensor]:
        """The tensors of a prediction; TypeError for what is not one."""
        return [tensor_of(f)]

    def value(self, f: Any, target: Any) -> torch.Tensor:
        """The training loss, 0-d, differentiable."""
        check_labels(self.loss, target)
        if isinstance(self.loss, CORE):
            return self.loss.value(f, target) / self.loss.normaliser(f, target)
        if self.classes_second and f.ndim > 2 and f.stride(1) == 1:
            f, target = _flat(f, target)
        elif not self.classes_second:
            check_alike(self.loss, f, target)
        value = self.loss(f, target)
        check_its_own(self.loss, value, f, target)
        return value

    def share(self, f: Any, target: Any) -> float:
        """n of a record of this batch; 0 where no example or label counts."""
        if asks_labels(self.loss):
            check_labels(self.loss, target)
        return self.share_of(self.loss, self.core, f, target) if f.numel() else 0.0

    def unread_share(self, f: Any, target: Any) -> torch.Tensor | None:
        """`share` as a number on the device that would have to be waited for, NaN where nothing counts: what is divided
        by it is refused. None where the host knows it."""
        if known_at_once(f):
            return None
        if isinstance(self.loss, CORE):
            return unread(self.loss.normaliser(f.detach(), target))
        labelled = isinstance(self.loss, nn.CrossEntropyLoss) and self.loss.reduction == "mean" and f.ndim > 1
        hard = labelled and isinstance(target, torch.Tensor) and target.ndim == f.ndim - 1
        return unread(_label_weight(self.core, f, target)) if hard else None

    def draws(
        self, fisher: Callable, count: int, f: Any, target: Any, rng: Any, split: Split | None = None
    ) -> torch.Tensor:
        """Gradients of the per-example loss with respect to f, (draws, *f.shape), in single precision or better; label
        positions of one example of `split` are drawn together."""
        if fisher is kf.empirical:
            check_labels(self.loss, target)
        core = self.core
        f = detached(f)
        if isinstance(target, torch.Tensor) and target.is_floating_point():
            target = target.to(f.dtype)
        mass = self.mass_of(self.loss, f, target)
        if mass is not None:
            if fisher is kf.empirical:
                return self._own_gradient(f, target)[None]
            core = _unweighted(core)
            target = None
        shape = f.shape
        if isinstance(target, torch.Tensor) and not isinstance(core, kf.SoftmaxCrossEntropy):
            target = self._classes_last(target.expand(shape))
        f = self._classes_last(f)
        last = f.shape
        if split is not None and split.examples != len(f):
            f = _unfolded(f, split)
            target = None if target is None else _unfolded(target, split)
        found = _drawn(core, fisher, count, f, target, rng)
        if self.times != 1:
            found = found * (self.times if fisher is kf.empirical else self.times**0.5)
        if split is not None and split.examples != last[0]:
            found = found.movedim(1, 2) if split.inner else found
            found = found.reshape(len(found), *last)
        found = found if mass is None else found * self._classes_last(mass).clamp(min=0).sqrt()
        return (found.movedim(-1, 2) if self.classes_second else found).reshape(len(found), *shape)

    def _classes_last(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, *positions, classes); a number an example is one class."""
        return x[..., None] if x.ndim == 1 else x.movedim(1, -1) if self.classes_second else x

    def _own_gradient(self, f: torch.Tensor, target: Any) -> torch.Tensor:
        """Of the sum of the losses, by autograd."""
        summed = copy.copy(self.loss)
        summed.reduction = "sum"
        with torch.enable_grad():
            x = f.detach().requires_grad_()
            return torch.autograd.grad(summed(x, target), x)[0]


def _drawn(core: Any, fisher: Callable, count: int, f: torch.Tensor, target: Any, rng: Any) -> torch.Tensor:
    """(draws, *f.shape)."""
    if fisher is kf.forward_only:
        return f.new_zeros((0, *f.shape))
    if fisher is kf.monte_carlo:
        noise = kf.draw_noise(core, tuple(f.shape), count, rng if f.device.type == "cpu" else _OnDevice(rng, f))
        return kf.monte_carlo(core, f, torch.as_tensor(noise).to(f), target)
    return kf.type2(core, f, target) if fisher is kf.type2 else kf.empirical(core, f, target)


class _OnDevice:
    """Noise made where the prediction lies, from a seed of a generator on the host: a copy would wait for the host to
    make it, longer than a step takes."""

    def __init__(self, rng: np.random.Generator, like: torch.Tensor) -> None:
        self.how: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        self.how["generator"] = torch.Generator(like.device).manual_seed(int(rng.integers(2**62)))

    def standard_normal(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, **self.how)

    def random(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.rand(shape, **self.how)


def _flat(f: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Label positions as rows: logits that lie with their classes behind each other in memory are then read in order,
    and the loss is to the bit that of logits flattened by hand."""
    soft = target.ndim == f.ndim
    target = target.movedim(1, -1).reshape(-1, f.shape[1]) if soft else target.reshape(-1)
    return f.movedim(1, -1).reshape(-1, f.shape[1]), target


def _unweighted(core: Any) -> Any:
    """A core whose Hessian does not depend on the target."""
    return replace(core, ignore=None, weights=None) if isinstance(core, kf.SoftmaxCrossEntropy) else core


def _unfolded(x: torch.Tensor, split: Split) -> torch.Tensor:
    """(rows, ...) as (examples, rows of each, ...)."""
    apart = len(x) // split.examples
    if split.inner:
        return x.unflatten(0, (apart, split.examples)).movedim(1, 0)
    return x.unflatten(0, (split.examples, apart))


def _cross_entropy_share(loss: nn.CrossEntropyLoss, core: Any, f: torch.Tensor, y: torch.Tensor) -> float:
    if f.ndim < 2:
        raise ValueError(f"CrossEntropyLoss got a prediction of shape {tuple(f.shape)}; need (batch, classes, ...)")
    if y.ndim == f.ndim:  # class probabilities
        return 1.0 if loss.reduction == "sum" else f.numel() / f.shape[1]
    if loss.reduction == "sum":
        return 1.0 if bool((y != loss.ignore_index).any()) else 0.0
    return float(_label_weight(core, f, y))


def _label_weight(core: Any, f: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """What the labels weigh together, 0-d, in single precision or better; of f its shape counts alone."""
    like = torch.zeros((), dtype=torch.promote_types(f.dtype, torch.float32), device=f.device)
    return core.normaliser(like.expand(f.shape).movedim(1, -1), y)


def _cross_entropy_mass(loss: nn.CrossEntropyLoss, f: torch.Tensor, y: Any) -> torch.Tensor | None:
    """Soft labels: what the (smoothed, weighted) ones of a position add up to, which need not be one."""
    if not isinstance(y, torch.Tensor) or y.ndim != f.ndim:
        return None
    soft = (1 - loss.label_smoothing) * y + loss.label_smoothing / f.shape[1]
    if loss.weight is not None:
        soft = soft * loss.weight.to(f).reshape(-1, *(1,) * (f.ndim - 2))
    return soft.sum(1, keepdim=True)


def _numbers(loss: nn.MSELoss | nn.BCEWithLogitsLoss, core: Any, f: torch.Tensor, y: Any) -> float:
    """The mean divides by every number in f."""
    return 1.0 if loss.reduction == "sum" else float(f.numel())


def _logistic_mass(loss: nn.BCEWithLogitsLoss, f: torch.Tensor, y: Any) -> torch.Tensor | None:
    """The Hessian of w (-p y log s(f) - (1 - y) log s(-f)) is w (p y + 1 - y) times that without weights."""
    if loss.weight is None and loss.pos_weight is None:
        return None
    mass = torch.ones_like(f)
    if loss.pos_weight is not None:
        mass = loss.pos_weight.to(f) * y + 1 - y
    return (mass if loss.weight is None else mass * loss.weight.to(f)).expand(f.shape)


class _Softmax:
    """The core's loss of a CrossEntropyLoss; the weights are read on the host when they have changed."""

    def __init__(self) -> None:
        self.read: tuple[Any, int, tuple[float, ...] | None] = (None, 0, None)

    def __call__(self, loss: nn.CrossEntropyLoss) -> kf.SoftmaxCrossEntropy:
        w = loss.weight
        written = 0 if w is None or w.is_inference() else w._version
        if self.read[0] is not w or self.read[1] != written:
            self.read = w, written, None if w is None else tuple(float(one) for one in w)
        return kf.SoftmaxCrossEntropy(loss.label_smoothing, self.read[2], loss.ignore_index)


TABLE: dict[type, Callable[[Any], Objective]] = {
    nn.CrossEntropyLoss: lambda loss: Objective(
        _Softmax(), loss, _cross_entropy_share, _cross_entropy_mass, classes_second=True
    ),
    # (f - y)^2 is twice the core's
    nn.MSELoss: lambda loss: Objective(lambda _: kf.Gaussian(), loss, _numbers, times=2.0),
    nn.BCEWithLogitsLoss: lambda loss: Objective(lambda _: kf.Bernoulli(), loss, _numbers, _logistic_mass),
}
