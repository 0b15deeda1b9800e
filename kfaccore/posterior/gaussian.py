"""One Gaussian over the parameters of a model, N(mean, L^-1) with L = scale F~ + precision I, layer by layer.

Laplace: scale = N / (sigma^2 temperature), precision = that of the prior. Influence of a mean loss: scale = 1,
precision = damping (= l2, if there is one). Evidence is its normaliser, a prediction its image, an influence its
covariance, pruning its conditional, merging its product.
Source: MacKay 1992; Ritter, Botev & Barber 2018 (K-FAC); George et al. 2018 for the eigenvalues.
Cost: four products a layer for each of `matvec`, `solve`, `root`; `linalg.forms` for records.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add

from kfaccore import tree
from kfaccore.linalg import forms
from kfaccore.linalg.basis import Basis, alike
from kfaccore.options import by_layer
from kfaccore.posterior.checks import check_layers, check_positive, check_records, check_shapes
from kfaccore.posterior.curvature import Curvature
from kfaccore.record import Record
from kfaccore.xp.arrays import Array, namespace, scalar, widen
from kfaccore.xp.owned import owned

Number = float | Array
Vectors = Mapping[str, Array]
Records = Mapping[str, Record]


@tree.kept
@dataclass(frozen=True)
class Posterior:
    """N(mean, (scale F~ + precision I)^-1), a Gaussian over the parameters of the layers, each with a block of its own.

    mean        {layer: (blocks, d_out, d_in)}; a plain layer's may be (d_out, d_in). It is copied,
                of a torch leaf or Parameter the value alone
    curvature   F~ of the mean loss
    precision   a number, or {layer: number}
    scale       a number

    Arithmetic only: functions of it can be differentiated and traced. ValueError at construction for layers or shapes
    that differ, for a precision that is negative or not finite, and where L is not positive definite.
    """

    mean: dict[str, Array]
    curvature: Curvature
    precision: float | Array | Mapping[str, float | Array]
    scale: float | Array = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.curvature, Curvature):
            kind = type(self.curvature).__name__
            raise TypeError(f"curvature is a {kind}; need kf.fit(method, batches), or kf.Curvature.of a run's states")
        check_layers("mean and curvature", self.mean, self.curvature.layers)
        # parameters are trained on in place: a posterior is of those of now
        object.__setattr__(self, "mean", {name: owned(widen(x, "mean")) for name, x in self.mean.items()})
        if isinstance(self.precision, Mapping):
            check_layers("precision and curvature", self.precision, self.curvature.layers)
            object.__setattr__(self, "precision", dict(self.precision))
        for name, basis in self.curvature.layers.items():
            check_shapes(name, self.mean[name], basis)
            check_positive(name, basis, self.prior(name), self.scale)

    def prior(self, layer: str) -> Number:
        """The precision of a layer."""
        return self.precision[layer] if isinstance(self.precision, Mapping) else self.precision

    def eigenvalues(self, layer: str) -> Array:
        """Of scale F~, (blocks, d_out, d_in); negative rounding is zero."""
        values = self.curvature.layers[layer].cleaned(signed=True)
        return scalar(self.scale, values) * values

    def spectrum(self, layer: str) -> Array:
        """The eigenvalues of L, (blocks, d_out, d_in)."""
        values = self.eigenvalues(layer)
        return values + scalar(self.prior(layer), values)

    def matvec(self, v: Vectors) -> dict[str, Array]:
        """L v on {layer: (blocks, d_out, d_in)}, leading axes allowed."""
        return self._mapped(v, lambda d: d)

    def solve(self, v: Vectors) -> dict[str, Array]:
        """L^-1 v."""
        return self._mapped(v, lambda d: 1.0 / d)

    def root(self, v: Vectors) -> dict[str, Array]:
        """L^-1/2 v, the symmetric root."""
        return self._mapped(v, lambda d: 1.0 / namespace(d).sqrt(d))

    def sample(self, noise: Vectors) -> dict[str, Array]:
        """mean + L^-1/2 noise; noise {layer: (samples, blocks, d_out, d_in)} standard normal, never drawn inside."""
        full = {name: self._full(name) for name in noise}
        return {name: full[name] + x for name, x in self.root(noise).items()}

    def logdet(self) -> dict[str, Array]:
        """{layer: 0-d}: log det L - log det(precision I) = sum log(1 + scale s / p)."""
        return self._summed(lambda s, p: namespace(s).log1p(s / p))

    def gamma(self) -> dict[str, Array]:
        """{layer: 0-d}: sum scale s / (scale s + p), how many parameters the data decide."""
        return self._summed(lambda s, p: s / (s + p))

    def diagonal(self) -> dict[str, Array]:
        """The variance of every weight, the diagonal of L^-1, in the shape of the mean."""
        found = {}
        for name, basis in self.curvature.layers.items():
            variance = basis.diagonal(1.0 / self.spectrum(name))
            found[name] = namespace(variance).reshape(variance, self.mean[name].shape)
        return found

    def covariance(self, records: Records, diagonal: bool = False) -> Array:
        """J L^-1 J^T of each example, summed over layers: (batch, draws, draws), or its diagonal (batch, draws).

        With records of `outputs` the covariance of each prediction; with `diagonal` and one draw self-influence.
        """
        check_records(self.curvature.layers, records)
        layers = self.curvature.layers
        found = [forms.quadratic(r, layers[name], self._inverse(name), diagonal) for name, r in records.items()]
        return reduce(add, found)

    def queries(self, records: Records) -> dict[str, Array]:
        """L^-1 grad of each draw and example, {layer: (draws * batch, blocks, d_out, d_in)}: one side of `cross`."""
        check_records(self.curvature.layers, records)
        layers = self.curvature.layers
        return {name: forms.queries(record, layers[name], self._inverse(name)) for name, record in records.items()}

    def cross(self, queries: Records, records: Records, positions: bool = False) -> Array:
        """J_q L^-1 J_t^T summed over layers: (draws * queries, draws * batch), draws outermost; `positions` appends
        (shared,), what each position adds, for layers that all have the same."""
        check_layers("queries and records", queries, records)
        check_records(self.curvature.layers, records, positions)
        ready = self.queries(queries)
        return reduce(add, [forms.cross(ready[name], record, positions) for name, record in records.items()])

    def energy(self, theta: Vectors) -> Array:
        """1/2 (theta - mean)^T L (theta - mean), 0-d: minus the log density, up to a constant."""
        check_layers("theta and curvature", theta, self.curvature.layers)
        theta = {name: widen(x, "theta") for name, x in theta.items()}
        for name, mean in self.mean.items():
            shape = tuple(theta[name].shape)
            if shape != tuple(mean.shape):
                raise ValueError(f"theta of {name!r} has shape {shape}, the mean {tuple(mean.shape)}")
        away = {name: theta[name] - self.mean[name] for name in self.mean}
        moved = self.matvec(away)
        return 0.5 * reduce(add, [namespace(x).sum(x * moved[name]) for name, x in away.items()])

    def _full(self, layer: str) -> Array:
        """The mean with its axis of blocks."""
        mean = self.mean[layer]
        return namespace(mean).reshape(mean, self.curvature.layers[layer].shape)

    def _inverse(self, layer: str) -> Array:
        return 1.0 / self.spectrum(layer)

    def _mapped(self, v: Vectors, weights: Callable[[Array], Array]) -> dict[str, Array]:
        """The matrix whose eigenvalues are `weights` of L's, times v."""
        by_layer(vector=v)
        unknown = sorted(set(v) - set(self.curvature.layers))
        if unknown:
            raise ValueError(f"no curvature for layers {unknown}; it has {sorted(self.curvature.layers)}")
        found = {}
        for name, x in v.items():
            basis = self.curvature.layers[name]
            found[name] = _times(basis, weights(self.spectrum(name)), x)
        return found

    def _summed(self, of: Callable[[Array, Number], Array]) -> dict[str, Array]:
        found = {}
        for name in self.curvature.layers:
            values = self.eigenvalues(name)
            found[name] = namespace(values).sum(of(values, scalar(self.prior(name), values)))
        return found


def _times(basis: Basis, weights: Array, x: Array) -> Array:
    return alike(lambda v: basis.times(weights, v), x, basis.shape)
