"""The product of posteriors of one model: merging models trained apart.

argmin of the sum of energies, (sum of L_k) x = sum of L_k mean_k. With G = I it is RegMean, with diagonals Fisher
merging, with K-FAC MaTS; a penalty `loss + sum(P.energy(theta) for P in past)` is EWC.
Source: Matena & Raffel 2022; Jin et al. 2023; Tam et al. 2024; Kirkpatrick et al. 2017.
Cost: a product L v and a solve of each posterior an iteration; of two Kronecker products without a precision four
eigendecompositions and no iteration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from operator import add

from kfaccore.linalg import cg, kronsum, side
from kfaccore.linalg.basis import Basis
from kfaccore.linalg.cg import CG
from kfaccore.posterior.checks import check_layers
from kfaccore.posterior.conditional import CLOSE
from kfaccore.posterior.gaussian import Posterior
from kfaccore.xp.arrays import Array, eps, is_tracer, namespace


def merge(posteriors: Sequence[Posterior], how: CG = CLOSE) -> tuple[dict[str, Array], dict[str, Array]]:
    """(mean, codes): the parameters that all posteriors together find likeliest, a code (blocks,) for each layer.

    Shards that each carry a share of one prior give what training on all of them gives, where the loss is quadratic.
    Two posteriors whose L is one Kronecker product each (K-FAC, its precision 0) are solved exactly, `linalg.kronsum`;
    all others by conjugate gradients from the mean of the means, preconditioned by the sum of the covariances:
    UNCONVERGED at the limit of `how`, whose last iterate is returned. ValueError for no posteriors and for layers or
    shapes that differ.
    """
    if isinstance(posteriors, Posterior | Mapping):
        raise TypeError(f"merge got a {type(posteriors).__name__}; need a list of posteriors")
    if not posteriors:
        raise ValueError("merge got no posteriors; need at least one")
    first = posteriors[0]
    for other in posteriors[1:]:
        check_layers("the posteriors", first.mean, other.mean)
        for name, basis in first.curvature.layers.items():
            if other.curvature.layers[name].shape != basis.shape:
                theirs = other.curvature.layers[name].shape
                raise ValueError(f"layer {name!r} has shape {basis.shape} in one posterior and {theirs} in another")
    mean = {}
    codes = {}
    for name, own in first.mean.items():
        found, codes[name] = _merged(posteriors, name, how)
        mean[name] = namespace(own).reshape(found, own.shape)
    return mean, codes


def _merged(posteriors: Sequence[Posterior], name: str, how: CG) -> tuple[Array, Array]:
    """One layer, (blocks, d_out, d_in)."""
    bases = [P.curvature.layers[name] for P in posteriors]
    spectra = [P.spectrum(name) for P in posteriors]
    xp = namespace(spectra[0])
    means = [xp.reshape(P.mean[name], bases[0].shape) for P in posteriors]

    def each(weights: list[Array], vectors: list[Array]) -> Array:
        return reduce(add, [b.times(w, v) for b, w, v in zip(bases, weights, vectors, strict=True)])

    count = len(bases)
    terms = [_term(b, s) for b, s in zip(bases, spectra, strict=True)]
    if count == 2 and terms[0] is not None and terms[1] is not None:
        pair, code = kronsum.pair(*terms[0], *terms[1])
        return kronsum.solve(pair, each(spectra, means)), code
    inverses = [1.0 / s for s in spectra]
    found = cg.solve(
        lambda x: each(spectra, [x] * count),
        each(spectra, means),
        how,
        lambda r: each(inverses, [r] * count),
        reduce(add, means) / count,
    )
    return found.x, found.code


def _term(basis: Basis, spectrum: Array) -> tuple[Array, Array] | None:
    """(G, A) if the matrix with this spectrum, positive, is G (x) A with two dense sides: then all 2 x 2 minors of the
    spectrum are zero. None otherwise, and where arrays are traced, whose numbers cannot be asked."""
    if isinstance(basis.Qa, tuple) or is_tracer(spectrum):
        return None
    if side.is_diagonal(basis.Qa) or side.is_diagonal(basis.Qg):
        return None
    xp = namespace(spectrum)
    g = spectrum[:, :, -1:]
    a = spectrum[:, -1:, :] / spectrum[:, -1:, -1:]
    if not bool(xp.all(xp.abs(g * a - spectrum) <= 16 * eps(spectrum.dtype, xp) * spectrum)):
        return None
    return xp.matmul(basis.Qg * g.mT, basis.Qg.mT), xp.matmul(basis.Qa * a, basis.Qa.mT)
