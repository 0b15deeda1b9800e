"""Network-level methods: the names of a method, on dicts {layer: ...} of one batch with the same draws."""

from kfaccore.network.fngd import GlobalFNGD
from kfaccore.network.gauss_newton import GaussNewton
from kfaccore.network.shared_damping import SharedDamping
from kfaccore.network.tridiagonal.tridiagonal import Tridiagonal
from kfaccore.network.two_level.coarse import Directions, Enriched, Given, Krylov, Nicolaides, Residual, Spectral
from kfaccore.network.two_level.corrections import add, balance, deflate_first, deflate_last, woodbury, woodbury_inverse
from kfaccore.network.two_level.matrices import exact, kronecker
from kfaccore.network.two_level.two_level import TwoLevel

__all__ = [
    "Directions",
    "Enriched",
    "GaussNewton",
    "Given",
    "GlobalFNGD",
    "Krylov",
    "Nicolaides",
    "Residual",
    "SharedDamping",
    "Spectral",
    "Tridiagonal",
    "TwoLevel",
    "add",
    "balance",
    "deflate_first",
    "deflate_last",
    "exact",
    "kronecker",
    "woodbury",
    "woodbury_inverse",
]
