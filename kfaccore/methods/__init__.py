"""One file a method, named as its paper names it."""

from kfaccore.methods.diagonal import Diagonal
from kfaccore.methods.ekfac import EKFAC
from kfaccore.methods.exact import Exact
from kfaccore.methods.identity import Identity
from kfaccore.methods.kfac import KFAC
from kfaccore.methods.pinn_kfac import PINNKFAC

CATALOGUE = {
    "kfac": KFAC,
    "ekfac": EKFAC,
    "diagonal": Diagonal,
    "identity": Identity,
    "exact": Exact,
    "pinn-kfac": PINNKFAC,
}

__all__ = ["CATALOGUE", "EKFAC", "KFAC", "PINNKFAC", "Diagonal", "Exact", "Identity"]
