"""From a Gaussian over a model's outputs, f (batch, C) and covariance V, to a prediction.

V is (batch, C, C), or its diagonal (batch, C) where only that is used. One output (C = 1) is the logit of a Bernoulli.
Source: probit MacKay 1992; bridge Hobbhahn et al. 2022.
"""

from __future__ import annotations

from math import pi

from kfaccore import xp as kernels
from kfaccore.xp.arrays import Array, device_of, namespace, scalar


def probit(f: Array, V: Array) -> Array:
    """Probabilities softmax(f / sqrt(1 + pi/8 diag V)), (batch, C)."""
    _check(f, V)
    return probabilities(f / namespace(f).sqrt(1.0 + pi / 8 * _variances(V)))


def bridge(f: Array, V: Array) -> Array:
    """The mean of the Dirichlet that the Laplace bridge makes of N(f, V), (batch, C), C at least 2.

    Outputs are first conditioned on a sum of zero, where V has a part along it.
    """
    _check(f, V, full=True)
    xp = namespace(f)
    count = f.shape[-1]
    if count < 2:
        raise ValueError(f"bridge got f of shape {tuple(f.shape)}; it needs at least 2 classes: take probit")
    rows = xp.sum(V, axis=-1)
    total = xp.sum(rows, axis=-1)[:, None]
    share = rows / xp.where(total > 0, total, xp.ones_like(total))
    f = f - share * xp.sum(f, axis=-1, keepdims=True)
    V = V - share[:, :, None] * rows[:, None, :]
    variance = _variances(V)
    variance = xp.where(variance > 0, variance, xp.ones_like(variance) * float(xp.finfo(f.dtype).smallest_normal))
    low = xp.min(f, axis=-1, keepdims=True)
    power = f - low + xp.log(xp.sum(xp.exp(low - f), axis=-1, keepdims=True))  # of exp(f) sum exp(-f)
    top = xp.max(power, axis=-1, keepdims=True)  # at least 0
    alpha = ((1.0 - 2.0 / count) * xp.exp(-top) + xp.exp(power - top) / count**2) / variance
    return alpha / xp.sum(alpha, axis=-1, keepdims=True)


def monte_carlo_link(f: Array, V: Array, noise: Array) -> Array:
    """The mean of softmax(f + V^1/2 noise), (batch, C); noise (samples, batch, C) standard normal."""
    _check(f, V, full=True)
    if tuple(noise.shape[1:]) != tuple(f.shape):
        raise ValueError(
            f"noise has shape {tuple(noise.shape)}; need (samples, *f.shape) = (samples, *{tuple(f.shape)})"
        )
    xp = namespace(f)
    values, Q, _ = kernels.eigh(V)
    root = xp.sqrt(xp.where(values > 0, values, xp.zeros_like(values)))
    spread = xp.matmul(Q * root[:, None, :], Q.mT)
    moved = xp.matmul(spread[None, ...], noise[..., None])[..., 0]
    return xp.mean(probabilities(f + moved), axis=0)


def regression(f: Array, V: Array, sigma2: float | Array) -> tuple[Array, Array]:
    """(mean, variance) of a Gaussian observation: f, and V with the noise's sigma2 on its diagonal."""
    _check(f, V)
    if V.ndim == 2:
        return f, V + scalar(sigma2, V)
    eye = namespace(V).eye(V.shape[-1], dtype=V.dtype, device=device_of(V))
    return f, V + scalar(sigma2, V) * eye


def probabilities(f: Array) -> Array:
    """softmax over the last axis; of one output the sigmoid."""
    xp = namespace(f)
    if f.shape[-1] == 1:
        return 0.5 * (1.0 + xp.tanh(f / 2))
    risen = xp.exp(f - xp.max(f, axis=-1, keepdims=True))
    return risen / xp.sum(risen, axis=-1, keepdims=True)


def _variances(V: Array) -> Array:
    return V if V.ndim == 2 else namespace(V).linalg.diagonal(V)


def _check(f: Array, V: Array, full: bool = False) -> None:
    for x in (f, V):
        namespace(x)  # TypeError for what is no array
    wanted = [(*f.shape, *f.shape[1:])] + ([] if full else [tuple(f.shape)])
    if f.ndim != 2 or tuple(V.shape) not in wanted:
        raise ValueError(
            f"f has shape {tuple(f.shape)} and V {tuple(V.shape)}; need (batch, C) and (batch, C, C)"
            f"{'' if full else ', or its diagonal (batch, C)'}"
        )
