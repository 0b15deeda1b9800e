"""What it costs to take a group of weights out, in units of the loss that P sums.

The cheapest way to zero a group is the conditional mean; its energy is 1/2 theta_g^T (Sigma_gg)^-1 theta_g, in closed
form for single weights, rows, columns and modes. With W = 1 / (scale s + p):
Source: Hassibi & Stork 1993 (OBS); LeCun et al. 1990 (OBD); Wang et al. 2019 (EigenDamage).
Cost: two to four products a layer.
"""

from __future__ import annotations

from kfaccore.linalg.basis import Basis, left, right
from kfaccore.posterior.gaussian import Posterior
from kfaccore.xp.arrays import Array, namespace

Saliency = dict[str, Array]


def weights(P: Posterior) -> Saliency:
    """OBS of each weight, 1/2 theta^2 / variance, in the shape of the mean."""
    variance = P.diagonal()
    return {name: 0.5 * theta * theta / variance[name] for name, theta in P.mean.items()}


def damage(P: Posterior) -> Saliency:
    """OBD of each weight, 1/2 theta^2 times the diagonal of L: the others stay where they are."""
    found = {}
    for name, theta in P.mean.items():
        diagonal = P.curvature.layers[name].diagonal(P.spectrum(name))
        found[name] = 0.5 * theta * theta * namespace(theta).reshape(diagonal, theta.shape)
    return found


def rows(P: Posterior) -> Saliency:
    """Of each output unit, (blocks, d_out): 1/2 sum_j (theta Qa)_oj^2 / ((Qg * Qg) W)_oj."""
    return {name: _rows(P, name) for name in P.mean}


def columns(P: Posterior) -> Saliency:
    """Of each input feature, (blocks, d_in): 1/2 sum_u (Qg^T theta)_ui^2 / (W (Qa * Qa)^T)_ui."""
    return {name: _columns(P, name) for name in P.mean}


def modes(P: Posterior) -> Saliency:
    """Of each eigenvector of F~, (blocks, d_out, d_in): 1/2 (scale s + p) (its share of theta)^2."""
    found = {}
    for name, basis in P.curvature.layers.items():
        share = basis.into(_full(P, name))
        found[name] = 0.5 * P.spectrum(name) * share * share
    return found


def _full(P: Posterior, name: str) -> Array:
    mean = P.mean[name]
    return namespace(mean).reshape(mean, P.curvature.layers[name].shape)


def _rows(P: Posterior, name: str) -> Array:
    basis = P.curvature.layers[name]
    theta = _full(P, name)
    W = 1.0 / P.spectrum(name)
    xp = namespace(theta)
    if isinstance(basis.Qa, tuple):
        return _of_dense(basis, theta, W, rows=True)
    turned = right(theta, basis.Qa)
    return 0.5 * xp.sum(turned * turned / left(basis.Qg * basis.Qg, W), axis=2)


def _columns(P: Posterior, name: str) -> Array:
    basis = P.curvature.layers[name]
    theta = _full(P, name)
    W = 1.0 / P.spectrum(name)
    xp = namespace(theta)
    if isinstance(basis.Qa, tuple):
        return _of_dense(basis, theta, W, rows=False)
    turned = left(basis.Qg if basis.Qg.ndim == 2 else basis.Qg.mT, theta)
    square = basis.Qa * basis.Qa
    return 0.5 * xp.sum(turned * turned / right(W, square if square.ndim == 2 else square.mT), axis=1)


def _of_dense(basis: Basis, theta: Array, W: Array, rows: bool) -> Array:
    """1/2 theta_g^T (Sigma_gg)^-1 theta_g of each row, or column, with Sigma written out."""
    xp = namespace(theta)
    blocks, d_out, d_in = basis.shape
    Sigma = xp.matmul(basis.Qg * xp.reshape(W, (blocks, 1, -1)), basis.Qg.mT)
    Sigma = xp.reshape(Sigma, (blocks, d_out, d_in, d_out, d_in))
    theta = theta if rows else theta.mT
    found = []
    for group in range(d_out if rows else d_in):
        own = Sigma[:, group, :, group, :] if rows else Sigma[:, :, group, :, group]
        part = theta[:, group, :, None]
        found.append(0.5 * xp.sum(part * xp.linalg.solve(own, part), axis=(1, 2)))
    return xp.stack(found, axis=1)
