"""One Gaussian over the parameters of a trained model, six uses.

A fitted curvature and a precision make N(mean, (scale F~ + precision)^-1). Evidence is its normaliser (`evidence`), a
prediction its image (`links`), an influence its covariance (`influence`), pruning and quantising its conditional
(`saliency`, `conditional`, `quantise`), merging its product (`product`), a look at training its moments (`reading`).
Two forms over records (`linalg.forms`) carry all of it, and neither holds the Jacobian of a batch.
"""

from kfaccore.linalg.basis import Basis
from kfaccore.posterior import saliency
from kfaccore.posterior.agreement import cosine, lds
from kfaccore.posterior.conditional import given
from kfaccore.posterior.curvature import Curvature
from kfaccore.posterior.evidence import evidence, slope, tuned
from kfaccore.posterior.fit import fit
from kfaccore.posterior.gaussian import Posterior
from kfaccore.posterior.influence import passes, removal, scores
from kfaccore.posterior.links import bridge, monte_carlo_link, probit, regression
from kfaccore.posterior.product import merge
from kfaccore.posterior.projected import Projected
from kfaccore.posterior.quantise import quantise
from kfaccore.posterior.reading import Noise, Reading, reading
from kfaccore.posterior.saliency import columns, damage, modes, rows, weights
from kfaccore.posterior.units import apart, apart_mean, in_units, in_units_mean

__all__ = [
    "Basis",
    "Curvature",
    "Noise",
    "Posterior",
    "Projected",
    "Reading",
    "apart",
    "apart_mean",
    "bridge",
    "columns",
    "cosine",
    "damage",
    "evidence",
    "fit",
    "given",
    "in_units",
    "in_units_mean",
    "lds",
    "merge",
    "modes",
    "monte_carlo_link",
    "passes",
    "probit",
    "quantise",
    "reading",
    "regression",
    "removal",
    "rows",
    "saliency",
    "scores",
    "slope",
    "tuned",
    "weights",
]
