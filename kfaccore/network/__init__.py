"""Network-level methods: they see all layers of one batch."""

from kfaccore.network.coarse import Enriched, Given, Krylov, Nicolaides, Residual, Spectral
from kfaccore.network.corrections import add, balance, deflate_first, deflate_last, woodbury, woodbury_inverse
from kfaccore.network.matrices import exact, kronecker
from kfaccore.network.tridiagonal import Tridiagonal
from kfaccore.network.two_level import TwoLevel

__all__ = [
    "Enriched",
    "Given",
    "Krylov",
    "Nicolaides",
    "Residual",
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
