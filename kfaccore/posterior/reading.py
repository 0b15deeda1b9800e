"""What a posterior says of a training step, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from kfaccore import xp as kernels
from kfaccore.linalg import forms
from kfaccore.linalg.grams import present
from kfaccore.posterior.checks import check_layers, check_records
from kfaccore.posterior.gaussian import Posterior, Records
from kfaccore.record import Record
from kfaccore.xp.arrays import Array, namespace


class Noise(NamedTuple):
    """tr Sigma / |G|^2, in examples: plain, and with both in L^-1. inf where the mean gradient is lost in noise."""

    plain: float
    natural: float


@dataclass(frozen=True)
class Reading:
    """Of one layer.

    trace, top   of scale F~
    condition    largest over smallest eigenvalue of L
    gamma        how many parameters the data decide
    newton       grad . L^-1 grad, twice the decrease that the model promises
    noise        the batch size beyond which larger ones stop helping
    """

    trace: float
    top: float
    condition: float
    gamma: float
    newton: float
    noise: Noise


def reading(P: Posterior, records: Records, grads: Mapping[str, Array]) -> dict[str, Reading]:
    """{layer: Reading} of one batch.

    records   of the loss's own gradients (empirical, one draw), B at least 2
    grads     the mean gradient of that batch, {layer: like the mean}

    Sigma is the covariance of one example's gradient and G the true one, both unbiased: B |g|^2 is subtracted from the
    sum of squares. Per-example gradients are not formed where there is one position.
    Source: McCandlish et al. 2018 (noise scale). ValueError for several draws, one example, or layers that differ.
    """
    check_layers("grads and curvature", grads, P.curvature.layers)
    check_records(P.curvature.layers, records)
    gamma = P.gamma()
    found = {}
    for name, record in records.items():
        if record.draws != 1 or record.batch < 2:
            raise ValueError(
                f"layer {name!r}: the record has {record.draws} draws of {record.batch} examples; need one draw, of "
                f"the true labels (empirical), and at least two examples"
            )
        values = P.eigenvalues(name)
        spectrum = P.spectrum(name)
        xp = namespace(values)
        share = P.curvature.layers[name].into(xp.reshape(grads[name], P.curvature.layers[name].shape))
        plain = _noise(P, name, record, share, xp.ones_like(spectrum))
        natural = _noise(P, name, record, share, 1.0 / spectrum)
        found[name] = Reading(
            trace=float(xp.sum(values)),
            top=float(xp.max(values)),
            condition=float(xp.max(spectrum) / xp.min(spectrum)),
            gamma=float(gamma[name]),
            newton=float(xp.sum(share * share / spectrum)),
            noise=Noise(plain, natural),
        )
    return found


def _noise(P: Posterior, name: str, record: Record, share: Array, W: Array) -> float:
    """tr Sigma / |G|^2 with squares weighted by W in the basis; an example's gradient is J B / n."""
    xp = namespace(W)
    batch = present(record)
    scale = batch / kernels.scalar(record.n, W)
    squares = scale**2 * float(xp.sum(forms.quadratic(record, P.curvature.layers[name], W, diagonal=True)))
    mean = float(xp.sum(W * share * share))
    return noise_scale(float(squares), mean, batch)


def noise_scale(squares: float, mean: float, batch: int) -> float:
    """tr Sigma / |G|^2 from the sum of the examples' squared gradients and the square of their mean, both unbiased; inf
    where the mean gradient is lost in noise."""
    trace = (squares - batch * mean) / (batch - 1)
    true = mean - trace / batch
    return trace / true if true > 0 else float("inf")
