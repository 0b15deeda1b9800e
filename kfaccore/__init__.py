"""K-FAC on the Array API: a layer gives a record; a method measures it, updates its state, refreshes, and solves."""

from kfaccore.comm import Serial
from kfaccore.damping import Relative, equal, exact, mean_eigenvalue, per_factor, pi, top_eigenvalue
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
from kfaccore.linalg.patches import Patches, Window
from kfaccore.method import Block, Code, Hyper, Method, Solution, settle
from kfaccore.methods import EKFAC, KFAC, PINNKFAC, Diagonal, Exact, Identity
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
    "KFAC",
    "PINNKFAC",
    "Bernoulli",
    "Block",
    "Clocks",
    "Code",
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
    "KLClip",
    "LineSearch",
    "Method",
    "NormConstraint",
    "Patches",
    "Preconditioner",
    "Quadratic",
    "Record",
    "Relative",
    "Schedules",
    "SelfTuning",
    "Serial",
    "SoftmaxCrossEntropy",
    "Solution",
    "Window",
    "cholesky",
    "concat",
    "dense",
    "direction",
    "draw_noise",
    "eigh",
    "empirical",
    "equal",
    "exact",
    "expand",
    "flatten",
    "forward_only",
    "load",
    "mean_eigenvalue",
    "metadata",
    "monte_carlo",
    "per_factor",
    "pi",
    "reduce",
    "save",
    "settle",
    "top_eigenvalue",
    "type2",
    "unflatten",
]
