"""K-FAC on the Array API: a layer gives a record; a method measures it, updates its state, refreshes, and solves."""

from kfaccore.comm import Serial
from kfaccore.damping import (
    Adaptive,
    Relative,
    as_given,
    equal,
    exact,
    mean_eigenvalue,
    per_factor,
    pi,
    top,
    top_eigenvalue,
)
from kfaccore.fisher import (
    Bernoulli,
    Gaussian,
    SoftmaxCrossEntropy,
    draw_noise,
    empirical,
    forward_only,
    monte_carlo,
    type2,
)
from kfaccore.info import Info
from kfaccore.io import flatten, load, metadata, save, unflatten
from kfaccore.linalg.inverse import cholesky, eigh
from kfaccore.linalg.lowrank import Rank, adaptive, adaptive_brand, even, lowest, nothing
from kfaccore.linalg.patches import Patches, Window
from kfaccore.linalg.sketch import Singular, Symmetric
from kfaccore.linalg.two_terms import absolute, first_term
from kfaccore.method import Block, Code, Hyper, Method, Solution, settle
from kfaccore.methods import (
    EKFAC,
    IKFAC,
    KFAC,
    KPSVD,
    PINNKFAC,
    SINGD,
    TEKFAC,
    TKFAC,
    BrandCKFAC,
    BrandKFAC,
    BrandRKFAC,
    Deflation,
    Diagonal,
    Exact,
    Identity,
    KFACCorrected,
    Lanczos,
    RandomizedKFAC,
)
from kfaccore.network import GaussNewton
from kfaccore.oneshot import direction
from kfaccore.preconditioner import Preconditioner
from kfaccore.record import Factored, Ids, Record, dense
from kfaccore.rescale import KLClip, NormConstraint
from kfaccore.schedule import Clocks, Schedules
from kfaccore.sharing import concat, expand, reduce
from kfaccore.step import Fixed, GridSearch, IterateAverage, LineSearch, Quadratic, SelfTuning

__version__ = "0.1.0"

__all__ = [
    "EKFAC",
    "IKFAC",
    "KFAC",
    "KPSVD",
    "PINNKFAC",
    "SINGD",
    "TEKFAC",
    "TKFAC",
    "Adaptive",
    "Bernoulli",
    "Block",
    "BrandCKFAC",
    "BrandKFAC",
    "BrandRKFAC",
    "Clocks",
    "Code",
    "Deflation",
    "Diagonal",
    "Exact",
    "Factored",
    "Fixed",
    "GaussNewton",
    "Gaussian",
    "GridSearch",
    "Hyper",
    "Identity",
    "Ids",
    "Info",
    "IterateAverage",
    "KFACCorrected",
    "KLClip",
    "Lanczos",
    "LineSearch",
    "Method",
    "NormConstraint",
    "Patches",
    "Preconditioner",
    "Quadratic",
    "RandomizedKFAC",
    "Rank",
    "Record",
    "Relative",
    "Schedules",
    "SelfTuning",
    "Serial",
    "Singular",
    "SoftmaxCrossEntropy",
    "Solution",
    "Symmetric",
    "Window",
    "absolute",
    "adaptive",
    "adaptive_brand",
    "as_given",
    "cholesky",
    "concat",
    "dense",
    "direction",
    "draw_noise",
    "eigh",
    "empirical",
    "equal",
    "even",
    "exact",
    "expand",
    "first_term",
    "flatten",
    "forward_only",
    "load",
    "lowest",
    "mean_eigenvalue",
    "metadata",
    "monte_carlo",
    "nothing",
    "per_factor",
    "pi",
    "reduce",
    "save",
    "settle",
    "top",
    "top_eigenvalue",
    "type2",
    "unflatten",
]
