"""The Fishers: four ways to fill g, as gradients of per-example losses with respect to the prediction f.

A draw has the shape of f and the draws come first; backpropagating it gives a layer's g.
Source: Martens 2020 (1412.1193); Dangel et al. 2025 (2507.05127) for the catalogue.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

from kfaccore.fisher.losses import Gaussian, Loss, SoftmaxCrossEntropy
from kfaccore.xp.arrays import Array, device_of, namespace, widen

N = TypeVar("N", covariant=True)


def type2(loss: Any, f: Any, target: Any = None, mask: Any = None, signs: Array | None = None) -> Any:
    """Columns of a root of the loss Hessian: sum over draws of v v^T is the Hessian of each example, exactly.

    f (batch, *positions, C) gives (T C, *f.shape) draws for T label positions, each zero but at one position. With
    `signs`, +-1 for each position (broadcast to f.shape[:-1]), C draws carry all positions at once: unbiased over
    independent random signs, exact when T = 1. Predictions by head, of a `Joint`, give draws by head.
    """
    if isinstance(f, Mapping):
        return loss.draws(type2, f, target, mask)
    f = widen(f, "f")
    xp = namespace(f)
    roots = loss.roots(f, target, mask)
    positions = 1
    for size in f.shape[1:-1]:
        positions *= size
    if signs is not None:
        return roots * xp.astype(signs, f.dtype)[..., None]
    if positions == 1:
        return roots
    eye = xp.reshape(xp.eye(positions, dtype=f.dtype, device=device_of(f)), (positions, 1, 1, *f.shape[1:-1], 1))
    return xp.reshape(roots[None, ...] * eye, (-1, *f.shape))


def monte_carlo(loss: Any, f: Any, noise: Any, target: Any = None, mask: Any = None) -> Any:
    """Gradients at labels drawn from the model, weighted 1/sqrt(draws): (draws, *f.shape), unbiased for type2.

    noise   uniform [0, 1) (draws, *f.shape[:-1]) for softmax and (draws, *f.shape) for Bernoulli, standard normal
            (draws, *f.shape) for Gaussian: `draw_noise`. ValueError for NumPy's outside of [0, 1] where it is uniform
    target  needed when the loss has class weights or ignored labels
    """
    if isinstance(f, Mapping):
        return loss.draws(monte_carlo, f, target, mask, noise)
    f = widen(f, "f")
    return loss.sampled(f, namespace(f).astype(noise, f.dtype), target, mask) * noise.shape[0] ** -0.5


def empirical(loss: Any, f: Any, target: Any, mask: Any = None) -> Any:
    """Gradients at the true labels, (1, *f.shape): the gradient of the training loss, per example."""
    if isinstance(f, Mapping):
        return loss.draws(empirical, f, target, mask)
    return loss.gradient(widen(f, "f"), target, mask)[None, ...]


def forward_only(f: Any) -> Any:
    """No draws at all, (0, *f.shape): G = I by definition."""
    if isinstance(f, Mapping):
        return {head: forward_only(x) for head, x in f.items()}
    return namespace(f).zeros((0, *f.shape), dtype=widen(f, "f").dtype, device=device_of(f))


class Generator(Protocol[N]):
    """What noise is drawn from: a NumPy generator, or one that makes arrays elsewhere."""

    def standard_normal(self, size: tuple[int, ...], /) -> N:
        """Standard normal numbers."""
        ...

    def random(self, size: tuple[int, ...], /) -> N:
        """Uniform numbers in [0, 1)."""
        ...


def draw_noise(loss: Loss, shape: tuple[int, ...], draws: int, rng: Generator[N]) -> N:
    """Noise for `monte_carlo` on a prediction of `shape`, from a generator seeded by (seed, step)."""
    if isinstance(loss, Gaussian):
        return rng.standard_normal((draws, *shape))
    return rng.random((draws, *(shape[:-1] if isinstance(loss, SoftmaxCrossEntropy) else shape)))
