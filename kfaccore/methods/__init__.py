"""The methods, one folder a family: each family's page says its formula and when to choose which."""

from kfaccore.methods.kronecker import EKFAC, KFAC, TEKFAC, TKFAC
from kfaccore.methods.lowrank import BrandCKFAC, BrandKFAC, BrandRKFAC, RandomizedKFAC
from kfaccore.methods.plain import Diagonal, Exact, Identity
from kfaccore.methods.rows import CGFAC, FNGD, SKFAC
from kfaccore.methods.singd import IKFAC, SINGD
from kfaccore.methods.terms import KPSVD, PINNKFAC, Deflation, KFACCorrected, Lanczos

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
