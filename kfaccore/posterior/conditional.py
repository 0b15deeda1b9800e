"""The posterior given some of its weights: OBS for any set of them, and the compensation after quantising.

Source: Hassibi & Stork 1993; Frantar & Alistarh 2022. Cost: 8 products of size d an iteration.
"""

from __future__ import annotations

from collections.abc import Mapping

from kfaccore.linalg import cg
from kfaccore.linalg.cg import CG, Residual
from kfaccore.posterior.checks import check_layers
from kfaccore.posterior.gaussian import Posterior, Vectors
from kfaccore.xp.arrays import Array, is_numpy, namespace

CLOSE = CG(Residual(1e-10), 200)


def given(
    P: Posterior, values: Vectors | float, fixed: Mapping[str, Array], how: CG = CLOSE
) -> tuple[dict[str, Array], dict[str, Array]]:
    """(theta, codes): the argmin of the energy with theta = values where `fixed`, all other weights free.

    values   {layer: like the mean}, or a number: 0 prunes
    fixed    {layer: bool, like the mean}
    codes    {layer: (blocks,)}: UNCONVERGED at the limit of `how`, whose last iterate is returned

    ValueError for layers or shapes that differ and, in NumPy, for a `fixed` of other numbers than 0 and 1.
    Preconditioned conjugate gradients on the free weights, L^-1 masked being the preconditioner.
    """
    check_layers("fixed and mean", fixed, P.mean)
    if isinstance(values, Mapping):
        check_layers("values and mean", values, P.mean)
    theta = {}
    codes = {}
    for name, mean in P.mean.items():
        wanted = values[name] if isinstance(values, Mapping) else namespace(mean).zeros_like(mean) + values
        for x in (wanted, fixed[name]):
            namespace(x)  # TypeError for what is no array
        shape = tuple(mean.shape)
        if tuple(fixed[name].shape) != shape or tuple(wanted.shape) != shape:
            raise ValueError(
                f"layer {name!r}: fixed has shape {tuple(fixed[name].shape)} and values {tuple(wanted.shape)}; need "
                f"that of the mean, {shape}"
            )
        theta[name], codes[name] = _given(P, name, wanted, fixed[name], how)
    return theta, codes


def _given(P: Posterior, name: str, values: Array, fixed: Array, how: CG) -> tuple[Array, Array]:
    """One layer."""
    xp = namespace(values)
    basis = P.curvature.layers[name]
    spectrum = P.spectrum(name)
    mean = xp.reshape(P.mean[name], basis.shape)
    if is_numpy(fixed) and not ((fixed == 0) | (fixed == 1)).all():
        raise ValueError(
            f"fixed of layer {name!r} has entries that are neither True nor False: need which weights stay"
        )
    held = xp.reshape(xp.astype(fixed, xp.bool), basis.shape)
    zero = xp.zeros_like(mean)
    moved = xp.where(held, xp.reshape(values, basis.shape) - mean, zero)

    def free(x: Array) -> Array:
        return xp.where(held, zero, x)

    found = cg.solve(
        lambda x: free(basis.times(spectrum, x)),
        free(-basis.times(spectrum, moved)),
        how,
        lambda r: free(basis.times(1.0 / spectrum, r)),
    )
    theta = xp.where(held, xp.reshape(values, basis.shape), mean + found.x)
    return xp.reshape(theta, values.shape), found.code
