"""Losses that a Fisher can be taken of: value, normaliser, gradient, Hessian root and model sampling in one place.

f (batch, *positions, outputs); the per-example loss sums over label positions. Masked or ignored positions count
nowhere: value, normaliser, gradient and draws are zero there. Value and normaliser are summed in float32 at least.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from kfaccore.xp.arrays import Array, device_of, namespace, widen


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
    """

    smoothing: float = 0.0
    weights: tuple[float, ...] | None = None
    ignore: int | None = None

    def value(self, f: Array, target: Array, mask: Array | None = None) -> Array:
        """Sum of the loss over examples and positions, 0-d; divide by `normaliser` for the mean."""
        xp = namespace(f)
        f = widen(f, "f")
        return -xp.sum(self._soft(f, target, mask) * _log_softmax(f))

    def normaliser(self, f: Array, target: Array | None, mask: Array | None = None) -> Array:
        """Sum of the label weights of the valid positions, 0-d (their number without class weights: then target may be
        None)."""
        xp = namespace(f)
        f = widen(f, "f")
        if target is None:
            return xp.sum(self._scale(f, None, mask))
        if self.weights is None:
            return xp.sum(xp.astype(self._valid(f, target, mask), f.dtype))
        hard = SoftmaxCrossEntropy(0.0, self.weights, self.ignore)
        return xp.sum(hard._soft(f, target, mask))

    def gradient(self, f: Array, target: Array, mask: Array | None = None) -> Array:
        """(sum_c v_c) p - v, like f."""
        xp = namespace(f)
        v = self._soft(f, target, mask)
        return xp.sum(v, axis=-1, keepdims=True) * _softmax(f) - v

    def roots(self, f: Array, target: Array | None = None, mask: Array | None = None) -> Array:
        """Columns of S with S S^T = diag p - p p^T at each position, weighted: (C, *f.shape)."""
        xp = namespace(f)
        p = _softmax(f)
        root = xp.sqrt(p)
        classes = f.shape[-1]
        eye = xp.eye(classes, dtype=f.dtype, device=device_of(f))
        eye = xp.reshape(eye, (classes, *(1,) * (f.ndim - 1), classes))
        column = xp.reshape(xp.permute_dims(root, (f.ndim - 1, *range(f.ndim - 1))), (classes, *f.shape[:-1], 1))
        return column * (eye - p[None, ...]) * self._scale(f, target, mask)[None, ...]

    def sampled(self, f: Array, noise: Array, target: Array | None = None, mask: Array | None = None) -> Array:
        """p - onehot(y), y drawn from the model by inverting the cumulative sum at noise (draws, *f.shape[:-1])."""
        xp = namespace(f)
        _check_noise(noise, f.shape[:-1], "uniform")
        p = _softmax(f)
        below = xp.cumulative_sum(p, axis=-1)
        # counted in bytes: all classes of all positions are many
        y = xp.sum(xp.astype(noise[..., None] >= below[None, ..., :-1], xp.uint8), axis=-1, dtype=xp.int32)
        return (p[None, ...] - _onehot(y, f)) * self._scale(f, target, mask)[None, ...]

    def _soft(self, f: Array, target: Array, mask: Array | None) -> Array:
        """v (*f.shape): smoothed, weighted labels, zero at positions that do not count."""
        xp = namespace(f)
        valid = self._valid(f, target, mask)
        label = xp.where(valid, target, xp.zeros_like(target))
        q = (1.0 - self.smoothing) * _onehot(label, f) + self.smoothing / f.shape[-1]
        if self.weights is not None:
            if len(self.weights) != f.shape[-1]:
                raise ValueError(f"weights has {len(self.weights)} classes, f has shape {tuple(f.shape)}; need equal")
            q = q * _along(xp.asarray(self.weights, dtype=f.dtype, device=device_of(f)), f)
        return xp.where(valid[..., None], q, xp.zeros_like(q))

    def _scale(self, f: Array, target: Array | None, mask: Array | None) -> Array:
        """Root of each position's total label weight (*f.shape[:-1], 1): what a draw is multiplied by."""
        xp = namespace(f)
        if target is not None and self.weights is None:  # labels add up to one
            return xp.astype(self._valid(f, target, mask), f.dtype)[..., None]
        if target is not None:
            return xp.sqrt(xp.sum(self._soft(f, target, mask), axis=-1, keepdims=True))
        if self.weights is not None or self.ignore is not None:
            raise ValueError("class weights and ignored labels depend on the label: pass target to the draws too")
        return _masked_ones(f, mask)

    def _valid(self, f: Array, target: Array, mask: Array | None) -> Array:
        xp = namespace(f, target)
        if tuple(target.shape) != tuple(f.shape[:-1]):
            raise ValueError(f"target has shape {tuple(target.shape)}; need labels of shape {tuple(f.shape[:-1])}")
        valid = xp.ones(target.shape, dtype=xp.bool, device=device_of(f)) if mask is None else mask
        return valid if self.ignore is None else valid & (target != self.ignore)


@dataclass(frozen=True)
class Bernoulli:
    """log(1 + exp f) - y f summed over outputs: f are logits, y in [0, 1]."""

    def value(self, f: Array, target: Array, mask: Array | None = None) -> Array:
        """Sum over examples, positions and outputs, 0-d."""
        xp = namespace(f)
        f = widen(f, "f")
        zero = xp.zeros_like(f)
        loss = xp.maximum(f, zero) - _beside(f, target) * f + xp.log1p(xp.exp(-xp.abs(f)))
        return xp.sum(loss * _masked_ones(f, mask))

    def normaliser(self, f: Array, target: Array, mask: Array | None = None) -> Array | float:
        """Number of examples, or of valid positions under a mask."""
        return _count(f, mask)

    def gradient(self, f: Array, target: Array, mask: Array | None = None) -> Array:
        """sigmoid(f) - y."""
        return (_sigmoid(f) - _beside(f, target)) * _masked_ones(f, mask)

    def roots(self, f: Array, target: Array | None = None, mask: Array | None = None) -> Array:
        """(outputs, *f.shape): sqrt(p (1 - p)) on the diagonal."""
        xp = namespace(f)
        p = _sigmoid(f)
        return _diagonal_roots(xp.sqrt(p * (1.0 - p)) * _masked_ones(f, mask))

    def sampled(self, f: Array, noise: Array, target: Array | None = None, mask: Array | None = None) -> Array:
        """p - y with y = [noise < p], noise uniform (draws, *f.shape)."""
        xp = namespace(f)
        _check_noise(noise, f.shape, "uniform")
        p = _sigmoid(f)
        return (p[None, ...] - xp.astype(noise < p[None, ...], f.dtype)) * _masked_ones(f, mask)[None, ...]


@dataclass(frozen=True)
class Gaussian:
    """1/2 |f - y|^2 summed over outputs: unit variance."""

    def value(self, f: Array, target: Array, mask: Array | None = None) -> Array:
        """Sum over examples, positions and outputs, 0-d."""
        xp = namespace(f)
        f = widen(f, "f")
        return 0.5 * xp.sum((f - _beside(f, target)) ** 2 * _masked_ones(f, mask))

    def normaliser(self, f: Array, target: Array, mask: Array | None = None) -> Array | float:
        """Number of examples, or of valid positions under a mask."""
        return _count(f, mask)

    def gradient(self, f: Array, target: Array, mask: Array | None = None) -> Array:
        """f - y."""
        return (f - _beside(f, target)) * _masked_ones(f, mask)

    def roots(self, f: Array, target: Array | None = None, mask: Array | None = None) -> Array:
        """(outputs, *f.shape): columns of the identity."""
        return _diagonal_roots(namespace(f).ones_like(f) * _masked_ones(f, mask))

    def sampled(self, f: Array, noise: Array, target: Array | None = None, mask: Array | None = None) -> Array:
        """f - y with y = f + noise: minus the standard normal noise (draws, *f.shape)."""
        _check_noise(noise, f.shape, "standard normal")
        return -noise * _masked_ones(f, mask)[None, ...]


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


def _masked_ones(f: Array, mask: Array | None) -> Array:
    xp = namespace(f)
    if mask is None:
        return xp.ones((*f.shape[:-1], 1), dtype=f.dtype, device=device_of(f))
    if tuple(mask.shape) != tuple(f.shape[:-1]):
        raise ValueError(f"mask has shape {tuple(mask.shape)}; need {tuple(f.shape[:-1])}, one entry a position of f")
    return xp.astype(mask, f.dtype)[..., None]


def _count(f: Array, mask: Array | None) -> Array | float:
    xp = namespace(f)
    return float(f.shape[0]) if mask is None else xp.sum(xp.astype(mask, widen(f, "f").dtype))


def _beside(f: Array, target: Array) -> Array:
    """The target of f, widened as f is."""
    xp = namespace(f, target)
    if tuple(target.shape) != tuple(f.shape):
        raise ValueError(f"target has shape {tuple(target.shape)}; need that of f, {tuple(f.shape)}")
    half = f.dtype != target.dtype and str(target.dtype).rsplit(".", 1)[-1] in ("float16", "bfloat16")
    return xp.astype(target, f.dtype) if half else target


def _check_noise(noise: Array, shape: tuple[int, ...], kind: str) -> None:
    if noise.ndim != len(shape) + 1 or tuple(noise.shape[1:]) != tuple(shape):
        raise ValueError(f"noise has shape {tuple(noise.shape)}; need {kind} noise of shape (draws, *{tuple(shape)})")
