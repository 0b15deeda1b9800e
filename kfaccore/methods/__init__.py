"""One file a method, named as its paper names it."""

from kfaccore.methods.brand import BrandKFAC
from kfaccore.methods.brand_c import BrandCKFAC
from kfaccore.methods.brand_r import BrandRKFAC
from kfaccore.methods.cgfac import CGFAC
from kfaccore.methods.deflation import Deflation
from kfaccore.methods.diagonal import Diagonal
from kfaccore.methods.ekfac import EKFAC
from kfaccore.methods.exact import Exact
from kfaccore.methods.fngd import FNGD
from kfaccore.methods.identity import Identity
from kfaccore.methods.kfac import KFAC
from kfaccore.methods.kfac_corrected import KFACCorrected
from kfaccore.methods.kpsvd import KPSVD
from kfaccore.methods.lanczos import Lanczos
from kfaccore.methods.pinn_kfac import PINNKFAC
from kfaccore.methods.randomized import RandomizedKFAC
from kfaccore.methods.singd import IKFAC, SINGD
from kfaccore.methods.skfac import SKFAC
from kfaccore.methods.tekfac import TEKFAC
from kfaccore.methods.tkfac import TKFAC

CATALOGUE = {
    "kfac": KFAC,
    "ekfac": EKFAC,
    "tkfac": TKFAC,
    "tekfac": TEKFAC,
    "kpsvd": KPSVD,
    "deflation": Deflation,
    "lanczos": Lanczos,
    "kfac-corrected": KFACCorrected,
    "diagonal": Diagonal,
    "identity": Identity,
    "exact": Exact,
    "pinn-kfac": PINNKFAC,
    "singd": SINGD,
    "ikfac": IKFAC,
    "randomized": RandomizedKFAC,
    "brand": BrandKFAC,
    "brand-r": BrandRKFAC,
    "brand-c": BrandCKFAC,
    "skfac": SKFAC,
    "cgfac": CGFAC,
    "fngd": FNGD,
}

__all__ = [
    "CATALOGUE",
    "CGFAC",
    "EKFAC",
    "FNGD",
    "IKFAC",
    "KFAC",
    "KPSVD",
    "PINNKFAC",
    "SINGD",
    "SKFAC",
    "TEKFAC",
    "TKFAC",
    "BrandCKFAC",
    "BrandKFAC",
    "BrandRKFAC",
    "Deflation",
    "Diagonal",
    "Exact",
    "Identity",
    "KFACCorrected",
    "Lanczos",
    "RandomizedKFAC",
]
