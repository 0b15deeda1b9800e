"""K-FAC on the Array API: a layer gives a record; a method measures it, updates its state, refreshes, and solves."""

from kfaccore import analysis as analysis
from kfaccore.convolution.patches import Patches, Window
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
    Joint,
    SoftmaxCrossEntropy,
    draw_noise,
    empirical,
    forward_only,
    monte_carlo,
    type2,
)
from kfaccore.io import flatten, load, metadata, save, unflatten
from kfaccore.linalg.inverse import cholesky, eigh
from kfaccore.linalg.shares import critical_batch
from kfaccore.method import Block, Hyper, Method
from kfaccore.methods import (
    CGFAC,
    EKFAC,
    FNGD,
    IKFAC,
    KFAC,
    KPSVD,
    PINNKFAC,
    SINGD,
    SKFAC,
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
from kfaccore.methods.lowrank.lowrank import Rank, adaptive, adaptive_brand, even, lowest, nothing
from kfaccore.methods.lowrank.sketch import Singular, Symmetric
from kfaccore.methods.terms.two_terms import absolute, first_term
from kfaccore.network import GaussNewton, GlobalFNGD, SharedDamping, Tridiagonal, TwoLevel
from kfaccore.oneshot import direction
from kfaccore.posterior import Basis, Curvature, Posterior, evidence, fit, merge, scores, tuned
from kfaccore.precondition.comm import Serial
from kfaccore.precondition.described import describe
from kfaccore.precondition.due import Due
from kfaccore.precondition.footprint import Footprint
from kfaccore.precondition.info import Info
from kfaccore.precondition.preconditioner import Preconditioner
from kfaccore.precondition.schedule import Clocks, Schedules
from kfaccore.precondition.waiting import measured, measured_together
from kfaccore.precondition.weighting import own_gradients, weighted
from kfaccore.record import Factored, Ids, Record, dense
from kfaccore.record.files import load_records, save_records
from kfaccore.record.sharing import ReceptiveMean, Subsample, concat, expand, mean_mean, reduce, sum_sum
from kfaccore.saved import Saved, saved
from kfaccore.settle import settle
from kfaccore.solution import Solution
from kfaccore.step import Fixed, GridSearch, IterateAverage, LineSearch, Quadratic, SelfTuning
from kfaccore.step.noise import Noise
from kfaccore.step.rescale import Graft, KLClip, NormConstraint
from kfaccore.xp import Code
from kfaccore.xp.precision import Precision, precisely

__version__ = "0.2.0"

__all__ = [
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
    "Adaptive",
    "Basis",
    "Bernoulli",
    "Block",
    "BrandCKFAC",
    "BrandKFAC",
    "BrandRKFAC",
    "Clocks",
    "Code",
    "Curvature",
    "Deflation",
    "Diagonal",
    "Due",
    "Exact",
    "Factored",
    "Fixed",
    "Footprint",
    "GaussNewton",
    "Gaussian",
    "GlobalFNGD",
    "Graft",
    "GridSearch",
    "Hyper",
    "Identity",
    "Ids",
    "Info",
    "IterateAverage",
    "Joint",
    "KFACCorrected",
    "KLClip",
    "Lanczos",
    "LineSearch",
    "Method",
    "Noise",
    "NormConstraint",
    "Patches",
    "Posterior",
    "Precision",
    "Preconditioner",
    "Quadratic",
    "RandomizedKFAC",
    "Rank",
    "ReceptiveMean",
    "Record",
    "Relative",
    "Saved",
    "Schedules",
    "SelfTuning",
    "Serial",
    "SharedDamping",
    "Singular",
    "SoftmaxCrossEntropy",
    "Solution",
    "Subsample",
    "Symmetric",
    "Tridiagonal",
    "TwoLevel",
    "Window",
    "absolute",
    "adaptive",
    "adaptive_brand",
    "as_given",
    "cholesky",
    "concat",
    "critical_batch",
    "dense",
    "describe",
    "direction",
    "draw_noise",
    "eigh",
    "empirical",
    "equal",
    "even",
    "evidence",
    "exact",
    "expand",
    "first_term",
    "fit",
    "flatten",
    "forward_only",
    "load",
    "load_records",
    "lowest",
    "mean_eigenvalue",
    "mean_mean",
    "measured",
    "measured_together",
    "merge",
    "metadata",
    "monte_carlo",
    "nothing",
    "own_gradients",
    "per_factor",
    "pi",
    "precisely",
    "reduce",
    "save",
    "save_records",
    "saved",
    "scores",
    "settle",
    "sum_sum",
    "top",
    "top_eigenvalue",
    "tuned",
    "type2",
    "unflatten",
    "weighted",
]
