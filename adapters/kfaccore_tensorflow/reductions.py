"""What Keras divides a loss by: the `reduction` of its losses, as the n of a record."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np

from kfaccore_tensorflow.broadcast import numbers, weight_like

REDUCTIONS = ("sum_over_batch_size", "mean", "mean_with_sample_weight", "sum")


def share(reduction: str, core: Any, outputs: Callable, labels: Callable) -> Callable[..., float]:
    """(prediction, target, mask of its positions or None, weight or None) -> n.

    outputs    of a prediction, what Keras has the mean of a position over
    labels     (prediction, target) -> one for each position; those that the core ignores do not count
    """
    ignore = getattr(core, "ignore", None)

    def n(f: np.ndarray, y: Any, mask: np.ndarray | None, weight: np.ndarray | None) -> float:
        positions = prod(f.shape[:-1])
        each = outputs(f) * positions / max(prod(numbers(f, y)), 1)  # of one number that Keras sums
        if reduction == "sum":
            return float(each)
        there = None if mask is None else np.broadcast_to(mask, f.shape[:-1])
        if ignore is not None and y is not None:
            counted = labels(f, y) != ignore
            there = counted if there is None else there & counted
        if reduction != "mean_with_sample_weight" or weight is None:
            return float(outputs(f) * (positions if there is None else there.sum()))
        if there is None:  # Keras adds up weights as they are given, unless it has laid a mask on them
            return float(each * weight.sum(dtype=float))
        spread = weight_like(weight, f, y, positions=True)
        return float(each * (spread.reshape(spread.shape + (1,) * (there.ndim - spread.ndim)) * there).sum(dtype=float))

    return n


def reduction_of(name: str, loss: Any) -> str:
    """Of a loss; ValueError for one that leaves a number for each example."""
    found = getattr(loss, "reduction", REDUCTIONS[0])
    if found not in REDUCTIONS:
        raise ValueError(f"{name} has reduction {found!r}; need that of one number, such as {REDUCTIONS[0]!r}")
    return found
