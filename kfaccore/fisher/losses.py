"""Losses that a Fisher can be taken of: value, normaliser, gradient, Hessian root and model sampling in one place.

f (batch, *positions, outputs); the per-example loss sums over label positions. Masked or ignored positions count
nowhere: value, normaliser, gradient and draws are zero there, whatever they hold. A mask is of flags; a label, of any
dtype, is one of the classes: `positions`. Logits may be -inf. Value and normaliser are summed in float32 at least.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from kfaccore.fisher.positions import Positions, beside, labelled, masked
from kfaccore.xp.arrays import Array, device_of, is_numpy, namespace, widen


class Loss(Protocol):
    """What a Fisher is taken of: f (batch, *positions, outputs), target and mask as the loss has them."""

    def value(self, f: Array, target: Array, mask: Array | None = None) -> Array:
        """Sum of the per-example losses, 0-d."""
        ...

    def normaliser(self, f: Array, target: Array, mask: Array | None = None) -> Array | float:
        """What the sum is divided by for the mean."""
        ...

    def gradient(self, f: Array, target: Array, mask: Array | None = None) -> Array:
        """Of each example's loss, like f."""
        ...

    def roots(self, f: Array, target: Array | None = None, mask: Array | None = None) -> Array:
        """Columns of S with S S^T the Hessian at each position: (columns, *f.shape)."""
        ...

    def sampled(self, f: Array, noise: Array, target: Array | None = None, mask: Array | None = None) -> Array:
        """Gradients at labels drawn from the model: (draws, *f.shape)."""
        ...


@dataclass(frozen=True)
class SoftmaxCrossEntropy:
    """-sum_c v_c log softmax(f)_c with v = weights * q, q the smoothed one-hot label (as PyTorch defines it).

    smoothing   share of each label spread evenly over the classes
    weights     one number a class, a tuple, or none
    ignore      label value of positions that do not count

    Labels are 0 to C - 1, of any dtype. Another one is refused: ValueError of NumPy's, NaN in value, gradient and draws
    of others, whose host waits for no label.
    """

    smoothing: float = 0.0
    weights: tuple[float, ...] | None = None
    ignore: int | None = None

    @property
    def nonnegative(self) -> bool:
        """Whether it cannot be below 0: not with weights or shares of a label that are."""
        return 0 <= self.smoothing <= 1 and all(weight >= 0 for weight in self.weights or ())

    def value(self, f: Array, target: Array, mask: Array | None = None) -> Array:
        """Sum of the loss over examples and positions, 0-d; divide by `normaliser` for the mean."""
        f = widen(f, "f")
        v, there = self._soft(f, target, mask)
        return -namespace(f).sum(_times(there.of(v), _log_softmax(there.zeroed(f))))

    def normaliser(self, f: Array, target: Array | None, mask: Array | None = None) -> Array:
        """Sum of the label weights of the valid positions, 0-d (their number without class weights: then target may be
        None)."""
        if target is None or self.weights is None:
            return self._weighed(f, target, mask)[1].count(f)
        hard = SoftmaxCrossEntropy(0.0, self.weights, self.ignore)
        v, there = hard._soft(widen(f, "f"), target, mask)
        return namespace(f).sum(there.zeroed(v))

    def gradient(self, f: Array, target: Array, mask: Array | None = None) -> Array:
        """(sum_c v_c) p - v, like f."""
        v, there = self._soft(f, target, mask)
        return there.of(namespace(f).sum(v, axis=-1, keepdims=True) * _softmax(f) - v)

    def roots(self, f: Array, target: Array | None = None, mask: Array | None = None) -> Array:
        """Columns of S with S S^T = diag p - p p^T at each position, weighted: (C, *f.shape)."""
        xp = namespace(f)
        scale, there = self._weighed(f, target, mask)
        p = there.of(_softmax(f))  # of p = 0 all columns are zero
        root = xp.sqrt(p) if scale is None else xp.sqrt(p) * scale
        classes = f.shape[-1]
        eye = xp.eye(classes, dtype=f.dtype, device=device_of(f))
        eye = xp.reshape(eye, (classes, *(1,) * (f.ndim - 1), classes))
        column = xp.reshape(xp.permute_dims(root, (f.ndim - 1, *range(f.ndim - 1))), (classes, *f.shape[:-1], 1))
        return column * (eye - p[None, ...])

    def sampled(self, f: Array, noise: Array, target: Array | None = None, mask: Array | None = None) -> Array:
        """p - onehot(y), y drawn from the model by inverting the cumulative sum at noise (draws, *f.shape[:-1])."""
        xp = namespace(f)
        _check_noise(noise, f.shape[:-1], "uniform")
        scale, there = self._weighed(f, target, mask)
        p = _softmax(f)
        below = xp.cumulative_sum(p, axis=-1)
        # counted in bytes: all classes of all positions are many
        y = xp.sum(xp.astype(noise[..., None] >= below[None, ..., :-1], xp.uint8), axis=-1, dtype=xp.int32)
        found = there.of(p[None, ...] - _onehot(y, f))
        return found if scale is None else found * scale[None, ...]

    def _soft(self, f: Array, target: Array, mask: Array | None) -> tuple[Array, Positions]:
        """v (*f.shape): smoothed, weighted labels, those of class 0 at positions that do not count."""
        label, there = labelled(f, target, mask, self.ignore)
        v = (1.0 - self.smoothing) * _onehot(label, f) + self.smoothing / f.shape[-1]
        if self.weights is not None:
            if len(self.weights) != f.shape[-1]:
                raise ValueError(f"weights has {len(self.weights)} classes, f has shape {tuple(f.shape)}; need equal")
            v = v * _along(namespace(f).asarray(self.weights, dtype=f.dtype, device=device_of(f)), f)
        return v, there

    def _weighed(self, f: Array, target: Array | None, mask: Array | None) -> tuple[Array | None, Positions]:
        """Root of each position's total label weight (*f.shape[:-1], 1), what a draw is multiplied by; None for 1."""
        if target is None and (self.weights is not None or self.ignore is not None):
            raise ValueError("class weights and ignored labels depend on the label: pass target to the draws too")
        if target is None:
            return None, masked(f, mask)
        if self.weights is None:  # labels add up to one
            return None, labelled(f, target, mask, self.ignore)[1]
        xp = namespace(f)
        v, there = self._soft(f, target, mask)
        return xp.sqrt(xp.sum(v, axis=-1, keepdims=True)), there


@dataclass(frozen=True)
class Bernoulli:
    """log(1 + exp f) - y f summed over outputs: f are logits, y in [0, 1]."""

    nonnegative: ClassVar[bool] = True  # whether it cannot be below 0

    def value(self, f: Array, target: Array, mask: Array | None = None) -> Array:
        """Sum over examples, positions and outputs, 0-d."""
        xp = namespace(f)
        there = masked(f, mask)
        f = there.zeroed(widen(f, "f"))
        y = there.zeroed(beside(f, target))
        zero = xp.zeros_like(f)
        # |f| is up + down, as autograd's slope of a maximum at 0 is 1/2 everywhere, and of |f| 1 in JAX
        up = xp.maximum(f, zero)
        down = xp.maximum(-f, zero)
        return xp.sum(there.of(_times(1.0 - y, up) + _times(y, down) + xp.log1p(xp.exp(-(up + down)))))

    def normaliser(self, f: Array, target: Array, mask: Array | None = None) -> Array | float:
        """Number of examples, or of valid positions under a mask."""
        return _count(f, mask)

    def gradient(self, f: Array, target: Array, mask: Array | None = None) -> Array:
        """sigmoid(f) - y."""
        return masked(f, mask).of(_sigmoid(f) - beside(f, target))

    def roots(self, f: Array, target: Array | None = None, mask: Array | None = None) -> Array:
        """(outputs, *f.shape): sqrt(p (1 - p)) on the diagonal."""
        p = _sigmoid(f)
        return _diagonal_roots(masked(f, mask).of(namespace(f).sqrt(p * (1.0 - p))))

    def sampled(self, f: Array, noise: Array, target: Array | None = None, mask: Array | None = None) -> Array:
        """p - y with y = [noise < p], noise uniform (draws, *f.shape)."""
        xp = namespace(f)
        _check_noise(noise, f.shape, "uniform")
        p = _sigmoid(f)
        return masked(f, mask).of(p[None, ...] - xp.astype(noise < p[None, ...], f.dtype))


@dataclass(frozen=True)
class Gaussian:
    """1/2 |f - y|^2 summed over outputs: unit variance."""

    nonnegative: ClassVar[bool] = True  # whether it cannot be below 0

    def value(self, f: Array, target: Array, mask: Array | None = None) -> Array:
        """Sum over examples, positions and outputs, 0-d."""
        f = widen(f, "f")
        return 0.5 * namespace(f).sum(self.gradient(f, target, mask) ** 2)

    def normaliser(self, f: Array, target: Array, mask: Array | None = None) -> Array | float:
        """Number of examples, or of valid positions under a mask."""
        return _count(f, mask)

    def gradient(self, f: Array, target: Array, mask: Array | None = None) -> Array:
        """f - y."""
        return masked(f, mask).of(f - beside(f, target))

    def roots(self, f: Array, target: Array | None = None, mask: Array | None = None) -> Array:
        """(outputs, *f.shape): columns of the identity."""
        return _diagonal_roots(masked(f, mask).of(namespace(f).ones_like(f)))

    def sampled(self, f: Array, noise: Array, target: Array | None = None, mask: Array | None = None) -> Array:
        """f - y with y = f + noise: minus the standard normal noise (draws, *f.shape)."""
        _check_noise(noise, f.shape, "standard normal")
        return masked(f, mask).of(-noise)


def _log_softmax(f: Array) -> Array:
    xp = namespace(f)
    f = f - xp.max(f, axis=-1, keepdims=True)
    return f - xp.log(xp.sum(xp.exp(f), axis=-1, keepdims=True))


def _softmax(f: Array) -> Array:
    return namespace(f).exp(_log_softmax(f))


def _sigmoid(f: Array) -> Array:
    xp = namespace(f)
    small = xp.exp(-xp.abs(f))
    return xp.where(f >= 0, xp.ones_like(f), small) / (1.0 + small)


def _onehot(label: Array, like: Array) -> Array:
    xp = namespace(like)
    classes = xp.arange(like.shape[-1], dtype=label.dtype, device=device_of(like))
    return xp.astype(label[..., None] == _along(classes, label[..., None]), like.dtype)


def _along(row: Array, like: Array) -> Array:
    """A row along the last axis of `like`, with as many axes: jax_numpy_rank_promotion="raise" wants it so."""
    return namespace(row).reshape(row, (*(1,) * (like.ndim - 1), -1))


def _diagonal_roots(scale: Array) -> Array:
    xp = namespace(scale)
    d = scale.shape[-1]
    eye = xp.eye(d, dtype=scale.dtype, device=device_of(scale))
    return xp.reshape(eye, (d, *(1,) * (scale.ndim - 1), d)) * scale[None, ...]


def _count(f: Array, mask: Array | None) -> Array | float:
    return float(f.shape[0]) if mask is None else masked(f, mask).count(f)


def _times(weight: Array, x: Array) -> Array:
    """weight * x, where a weight of 0 takes nothing, of what is infinite neither."""
    xp = namespace(x)
    return weight * xp.where(weight != 0, x, xp.zeros_like(x))


def _check_noise(noise: Array, shape: tuple[int, ...], kind: str) -> None:
    if noise.ndim != len(shape) + 1 or tuple(noise.shape[1:]) != tuple(shape):
        raise ValueError(f"noise has shape {tuple(noise.shape)}; need {kind} noise of shape (draws, *{tuple(shape)})")
    # rounded to the dtype of f it may be 1
    if kind == "uniform" and is_numpy(noise) and not ((noise >= 0) & (noise <= 1)).all():
        raise ValueError(
            "noise has entries outside of [0, 1), where labels are drawn: need uniform noise, as draw_noise"
        )
