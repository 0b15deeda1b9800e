"""Targets and weights in the shape of a prediction, spread as Keras's losses spread them."""

from __future__ import annotations

import numpy as np


def target_like(y: np.ndarray, f: np.ndarray) -> np.ndarray:
    """A target of numbers in the shape of f; ValueError where it cannot be."""
    y = np.asarray(y, f.dtype)
    if y.size == f.size:
        return y.reshape(f.shape)
    if y.ndim == f.ndim - 1 and f.shape[-1] == 1:
        y = y[..., None]
    elif y.ndim == f.ndim + 1 and y.shape[-1] == 1:
        y = y[..., 0]
    return _spread(y, f.shape, "target")


def weight_like(weight: np.ndarray, f: np.ndarray, y: np.ndarray | None, positions: bool) -> np.ndarray:
    """A weight for each number that the loss of f (*lead, outputs) has, along the first axes of f.

    positions    spread from the last axis on, as Keras's losses do; else, and where that cannot be, from the first
    """
    lead = numbers(f, y)
    last = weight
    if weight.ndim == len(lead) - 1 and lead[-1] == 1:
        last = weight[..., None]
    elif weight.ndim == len(lead) + 1 and weight.shape[-1] == 1:
        last = weight[..., 0]
    if positions and _meets(last.shape, lead):
        return np.broadcast_to(last, lead)
    if 0 < weight.ndim <= f.ndim and weight.shape == f.shape[: weight.ndim]:
        return weight
    return _spread(last, lead, "sample_weight")


def mask_like(mask: np.ndarray, f: np.ndarray) -> np.ndarray:
    """(batch, positions) as one entry a position of f (*positions, outputs)."""
    lone = (1,) * (f.ndim - 1 - mask.ndim)
    return np.broadcast_to(mask.reshape(*mask.shape, *lone), f.shape[:-1])


def numbers(f: np.ndarray, y: np.ndarray | None) -> tuple[int, ...]:
    """The shape of what a loss of Keras sums, or has the mean of: a number for each position of f."""
    lead = f.shape[:-1]
    # where the target has no last axis Keras takes it away, and has the mean over the next
    return lead[:-1] if y is not None and y.ndim == f.ndim - 1 > 1 and f.shape[-1] == 1 else lead


def _meets(shape: tuple[int, ...], lead: tuple[int, ...]) -> bool:
    pairs = zip(reversed(shape), reversed(lead), strict=False)
    return len(shape) <= len(lead) and all(size in (1, other) for size, other in pairs)


def _spread(x: np.ndarray, shape: tuple[int, ...], what: str) -> np.ndarray:
    try:
        return np.broadcast_to(x, shape)
    except ValueError:
        raise ValueError(f"{what} has shape {x.shape}; need one that spreads to {shape}") from None
