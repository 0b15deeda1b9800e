"""Whether records hold the loss's own gradients, seen from the mean gradient stored with them; and their noise."""

from __future__ import annotations

from kfaccore import xp as kernels
from kfaccore.linalg.grams import present
from kfaccore.posterior.reading import noise_scale
from kfaccore.record import Record
from kfaccore.record.jacobian import pulled
from kfaccore.record.squares import squares
from kfaccore.xp.arrays import Array, namespace

NO_GRADIENT = "no mean gradient is stored with the records"
FEW = "need one draw of two examples or more"
DRAWN = "the gradient stored is not that of the records: their labels were drawn, or the loss has a penalty"


def not_own(record: Record, grad: Array | None) -> str:
    """Why the records of a layer are not of the loss's own gradients; empty where they are.

    They are where the mean of the examples' gradients, sum of g a^T over n, is `grad` to the root of the precision
    it is stored in: labels drawn from the model have another mean.
    """
    if grad is None:
        return NO_GRADIENT
    if record.draws != 1 or record.batch < 2:
        return FEW
    xp = namespace(record.g)
    mean = pulled(record, record.g[0, ...]) / kernels.scalar(record.n, record.g)
    rounding = float(xp.finfo(grad.dtype).eps)
    given = xp.reshape(xp.astype(grad, mean.dtype), mean.shape)
    away = mean - given
    return "" if float(xp.sum(away * away)) <= rounding * float(xp.sum(given * given)) else DRAWN


def noise(record: Record, grad: Array | None) -> float:
    """tr Sigma / |G|^2 in examples, as `kfaccore.posterior.reading` has it; NaN where the records are `not_own`."""
    if grad is None or not_own(record, grad):
        return float("nan")
    xp = namespace(record.g)
    examples = present(record)
    scale = examples / float(record.n)
    mean = float(xp.sum(xp.astype(grad, record.g.dtype) ** 2))
    return noise_scale(scale**2 * float(xp.sum(squares(record))), mean, examples)


__all__ = ["DRAWN", "FEW", "NO_GRADIENT", "noise", "not_own"]
