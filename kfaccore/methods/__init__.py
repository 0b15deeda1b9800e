"""One file a method, named as its paper names it."""

from kfaccore.methods.cgfac import CGFAC
from kfaccore.methods.diagonal import Diagonal
from kfaccore.methods.ekfac import EKFAC
from kfaccore.methods.exact import Exact
from kfaccore.methods.fngd import FNGD
from kfaccore.methods.identity import Identity
from kfaccore.methods.kfac import KFAC
from kfaccore.methods.skfac import SKFAC

CATALOGUE = {
    "kfac": KFAC,
    "ekfac": EKFAC,
    "diagonal": Diagonal,
    "identity": Identity,
    "exact": Exact,
    "skfac": SKFAC,
    "cgfac": CGFAC,
    "fngd": FNGD,
}

__all__ = ["CATALOGUE", "CGFAC", "EKFAC", "FNGD", "KFAC", "SKFAC", "Diagonal", "Exact", "Identity"]
